//! The AWS CLI and boto3, unchanged, against the lab's EC2: what nobody here wrote must be able to talk to it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use serde_json::Value;

/// A `lab-ec2` of its own on a free loopback port; it ends when its standard input does.
struct Lab {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Vec<String>,
}

impl Lab {
    /// `arguments` beyond the port; `last` is the line after which it is ready.
    fn start(arguments: &[&str], last: &str) -> Self {
        let mut child = Command::new(flatwire_tests::binary("lab-ec2"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("lab-ec2 starts");
        let mut output = BufReader::new(child.stdout.take().expect("standard output is piped")).lines();
        let mut lines: Vec<String> = Vec::new();
        while !lines.last().is_some_and(|line| line.starts_with(last)) {
            lines.push(output.next().expect("lab-ec2 says where it listens").expect("its output is text"));
        }
        let stdin = child.stdin.take();
        Self { child, stdin, lines }
    }

    fn said(&self, start: &str) -> &str {
        let line = self.lines.iter().find_map(|line| line.strip_prefix(start));
        line.unwrap_or_else(|| panic!("no line {start:?} among {:?}", self.lines))
    }

    fn endpoint(&self) -> &str {
        self.said("endpoint ")
    }

    /// A program that sees the endpoint, the keys, and nothing of the machine's own AWS settings.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/nonexistent")
            .env("LANG", "C.UTF-8")
            .env("AWS_CONFIG_FILE", "/nonexistent/config")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
            .env("AWS_DEFAULT_REGION", self.said("AWS_DEFAULT_REGION="))
            .env("AWS_ACCESS_KEY_ID", self.said("AWS_ACCESS_KEY_ID="))
            .env("AWS_SECRET_ACCESS_KEY", self.said("AWS_SECRET_ACCESS_KEY="))
            .env("AWS_ENDPOINT_URL", self.endpoint())
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_MAX_ATTEMPTS", "1");
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.stdin.take());
        if self.child.wait().is_err() {
            eprintln!("lab-ec2 could not be waited for");
        }
    }
}

/// The virtual environment with the CLI and boto3; `None`, said loudly, where there is no network on purpose.
fn python() -> Option<PathBuf> {
    if std::env::var_os("FLATWIRE_OFFLINE").is_some_and(|value| value == "1") {
        // Straight to standard error: what a passing test prints in the usual way is not shown.
        writeln!(std::io::stderr(), "SKIPPED: FLATWIRE_OFFLINE=1, and the AWS CLI and boto3 come from the network")
            .expect("standard error is open");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python.sh");
    let output = Command::new(script).arg("aws").stderr(Stdio::inherit()).output().expect("tests/python.sh starts");
    assert!(
        output.status.success(),
        "the AWS CLI and boto3 could not be installed; without a network, FLATWIRE_OFFLINE=1 skips these tests"
    );
    Some(PathBuf::from(String::from_utf8(output.stdout).expect("a path is text").trim()))
}

type Environment<'a> = &'a [(&'a str, &'a str)];

struct Cli<'a> {
    lab: &'a Lab,
    program: PathBuf,
}

impl Cli<'_> {
    fn run(&self, arguments: &str, more: Environment<'_>) -> Output {
        let mut command = self.lab.command(&self.program);
        command.args(arguments.split_whitespace()).args(["--output", "json"]);
        command.envs(more.iter().copied());
        command.output().expect("the AWS CLI starts")
    }

    #[track_caller]
    fn ok(&self, arguments: &str) -> Value {
        let output = self.run(arguments, &[]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "aws {arguments}: {errors}");
        let text = String::from_utf8_lossy(&output.stdout);
        if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).expect("the CLI prints JSON") }
    }

    /// The error code that the CLI was given.
    #[track_caller]
    fn refused(&self, arguments: &str, more: Environment<'_>) -> String {
        let output = self.run(arguments, more);
        assert!(!output.status.success(), "aws {arguments} was not refused");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = text.split_once("An error occurred (").and_then(|(_, rest)| rest.split_once(')'));
        code.unwrap_or_else(|| panic!("aws {arguments}: no code in {text}")).0.to_owned()
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text"))
}

fn count(value: &Value) -> usize {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list")).len()
}

#[test]
fn the_aws_cli_walks_the_life_of_an_interface() {
    let Some(python) = python() else { return };
    let lab = Lab::start(&[], "AWS_DEFAULT_REGION=");
    let cli = Cli { lab: &lab, program: python.join("bin/aws") };

    assert_eq!(cli.ok("sts get-caller-identity")["Account"], "123456789012");
    let vpc = cli.ok("ec2 create-vpc --cidr-block 10.0.0.0/16")["Vpc"]["VpcId"].clone();
    let vpc = text(&vpc);
    let subnet = cli.ok(&format!(
        "ec2 create-subnet --vpc-id {vpc} --cidr-block 10.0.0.0/24 --availability-zone us-east-1a \
         --tag-specifications ResourceType=subnet,Tags=[{{Key=kubernetes.io/role/cni,Value=1}}]"
    ));
    assert_eq!(subnet["Subnet"]["AvailableIpAddressCount"], 251);
    let subnet = text(&subnet["Subnet"]["SubnetId"]).to_owned();
    let group =
        cli.ok(&format!("ec2 create-security-group --group-name pods --description pods --vpc-id {vpc}"))["GroupId"]
            .clone();
    let group = text(&group);
    cli.ok(&format!(
        "ec2 authorize-security-group-ingress --group-id {group} --protocol tcp --port 443 --cidr 10.0.0.0/16"
    ));
    let instance = cli.ok(&format!(
        "ec2 run-instances --image-id ami-1 --instance-type m5.large --subnet-id {subnet} --security-group-ids {group}"
    ))["Instances"][0]["InstanceId"]
        .clone();
    let instance = text(&instance);
    cli.ok(&format!("ec2 wait instance-running --instance-ids {instance}"));

    let eni = cli.ok(&format!(
        "ec2 create-network-interface --subnet-id {subnet} --groups {group} --description aws-K8S-{instance} \
         --secondary-private-ip-address-count 2 \
         --tag-specifications \
         ResourceType=network-interface,Tags=[{{Key=node.k8s.amazonaws.com/instance_id,Value={instance}}}]"
    ))["NetworkInterface"]
        .clone();
    assert_eq!(count(&eni["PrivateIpAddresses"]), 3);
    let eni = text(&eni["NetworkInterfaceId"]).to_owned();
    let attachment = cli.ok(&format!(
        "ec2 attach-network-interface --network-interface-id {eni} --instance-id {instance} --device-index 1"
    ))["AttachmentId"]
        .clone();
    let attachment = text(&attachment);
    cli.ok(&format!(
        "ec2 modify-network-interface-attribute --network-interface-id {eni} \
         --attachment AttachmentId={attachment},DeleteOnTermination=true"
    ));
    let assigned = cli.ok(&format!(
        "ec2 assign-private-ip-addresses --network-interface-id {eni} --secondary-private-ip-address-count 1"
    ));
    assert_eq!(count(&assigned["AssignedPrivateIpAddresses"]), 1);
    let prefixes =
        cli.ok(&format!("ec2 assign-private-ip-addresses --network-interface-id {eni} --ipv4-prefix-count 2"));
    assert_eq!(count(&prefixes["AssignedIpv4Prefixes"]), 2);

    let shown = cli.ok(&format!(
        "ec2 describe-network-interfaces --filters Name=attachment.instance-id,Values={instance} \
         Name=tag:node.k8s.amazonaws.com/instance_id,Values={instance}"
    ));
    assert_eq!(count(&shown["NetworkInterfaces"]), 1);
    let shown = &shown["NetworkInterfaces"][0];
    assert_eq!(shown["Attachment"]["DeleteOnTermination"], true);
    assert_eq!(shown["Attachment"]["DeviceIndex"], 1);
    assert_eq!(count(&shown["Ipv4Prefixes"]), 2);
    assert_eq!(count(&shown["PrivateIpAddresses"]), 4);
    let left = cli.ok(&format!("ec2 describe-subnets --subnet-ids {subnet}"));
    assert_eq!(left["Subnets"][0]["AvailableIpAddressCount"], 251 - 1 - 4 - 32);

    let address = text(&assigned["AssignedPrivateIpAddresses"][0]["PrivateIpAddress"]).to_owned();
    let prefix = text(&prefixes["AssignedIpv4Prefixes"][0]["Ipv4Prefix"]).to_owned();
    cli.ok(&format!("ec2 unassign-private-ip-addresses --network-interface-id {eni} --private-ip-addresses {address}"));
    cli.ok(&format!("ec2 unassign-private-ip-addresses --network-interface-id {eni} --ipv4-prefixes {prefix}"));
    let left = cli.ok("ec2 describe-subnets --filters Name=tag-key,Values=kubernetes.io/role/cni");
    assert_eq!(left["Subnets"][0]["AvailableIpAddressCount"], 251 - 1 - 3 - 16);

    // The CLI pages by itself when it is told a page size.
    for _ in 0..6 {
        cli.ok(&format!("ec2 create-network-interface --subnet-id {subnet}"));
    }
    let paged = cli.ok("ec2 describe-network-interfaces --page-size 5");
    assert_eq!(count(&paged["NetworkInterfaces"]), 8);
    let kind = cli.ok("ec2 describe-instance-types --instance-types m5.large");
    assert_eq!(kind["InstanceTypes"][0]["NetworkInfo"]["Ipv4AddressesPerInterface"], 10);

    cli.ok(&format!("ec2 terminate-instances --instance-ids {instance}"));
    cli.ok(&format!("ec2 wait instance-terminated --instance-ids {instance}"));
    let refused = cli.refused(&format!("ec2 describe-network-interfaces --network-interface-ids {eni}"), &[]);
    assert_eq!(refused, "InvalidNetworkInterfaceID.NotFound");
}

#[test]
fn the_aws_cli_is_refused_in_ec2s_words() {
    let Some(python) = python() else { return };
    let lab = Lab::start(&[], "AWS_DEFAULT_REGION=");
    let cli = Cli { lab: &lab, program: python.join("bin/aws") };
    let table: [(&str, Environment<'_>, &str); 7] = [
        ("ec2 describe-vpcs", &[("AWS_SECRET_ACCESS_KEY", "wrong")], "AuthFailure"),
        ("ec2 describe-vpcs", &[("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")], "AuthFailure"),
        ("sts get-caller-identity", &[("AWS_SECRET_ACCESS_KEY", "wrong")], "SignatureDoesNotMatch"),
        ("ec2 delete-network-interface --network-interface-id eni-x", &[], "InvalidNetworkInterfaceId.Malformed"),
        ("ec2 describe-subnets --filters Name=colour,Values=red", &[], "InvalidParameterValue"),
        (
            "ec2 describe-network-interfaces --max-results 5 --network-interface-ids eni-0123456789abcdef0",
            &[],
            "InvalidParameterCombination",
        ),
        ("ec2 describe-images", &[], "InvalidAction"),
    ];
    for (arguments, environment, code) in table {
        assert_eq!(cli.refused(arguments, environment), code, "aws {arguments}");
    }
}

#[test]
fn boto3_walks_the_life_of_an_interface() {
    let Some(python) = python() else { return };
    let lab = Lab::start(&[], "AWS_DEFAULT_REGION=");
    run_script(&lab, &python, "boto3_walk.py", &[]);
}

/// The credentials, the region and the identity of a node all come from the lab's IMDS, and sign calls that are let in.
#[test]
fn boto3_lives_on_instance_metadata_alone() {
    let Some(python) = python() else { return };
    let lab = Lab::start(&["--node", "m5.large"], "imds ");
    run_script(&lab, &python, "boto3_imds.py", &[lab.said("imds "), lab.said("instance ")]);
}

fn run_script(lab: &Lab, python: &Path, script: &str, arguments: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts").join(script);
    let output = lab.command(&python.join("bin/python")).arg(path).args(arguments).output().expect("python starts");
    assert!(
        output.status.success(),
        "{script}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
