//! The servers: how moto and LocalStack are started, and how a VPC with one running instance is laid out on them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use flatwire_cloud::{AwsCloud, Config};
use flatwire_core::ids::{InstanceId, SecurityGroupId, SubnetId, VpcId};

use crate::canned::{self, Answer, Canned, Keys, Request};
use crate::process::{Process, free_port};
use crate::query::{Query, http, text, texts};
use crate::{loud, root};

/// A cold start on a busy machine takes LocalStack 20 s.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A free port can be taken by somebody else before the server binds it.
const START_ATTEMPTS: u32 = 3;
const HTTP_TIMEOUT: Duration = Duration::from_secs(20);
pub const REGION: &str = "us-east-1";

/// A VPC with a subnet, a group and one running m5.large, as an operator would have laid it out.
#[derive(Debug, Clone)]
pub struct Place {
    pub vpc: VpcId,
    pub subnet: SubnetId,
    pub zone: String,
    pub group: SecurityGroupId,
    pub instance: InstanceId,
}

/// A server of somebody else's with the operator's way in.
pub struct Server {
    /// Held for its life; the server dies with it.
    pub process: Process,
    pub query: Query,
    pub repair: fn(String) -> String,
}

impl Server {
    /// moto, or `None` where FLATWIRE_OFFLINE allows the test to be left out.
    pub fn moto() -> Option<Self> {
        let python = python("moto")?;
        let program = python.join("bin/moto_server");
        Some(start("moto", "123456789012", |port| {
            let environment = [
                ("MOTO_EC2_LOAD_DEFAULT_AMIS", "false".to_owned()),
                ("AWS_ACCESS_KEY_ID", "test".to_owned()),
                ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ];
            let process = Process::start("moto", &program, &["-H", "127.0.0.1", "-p", &port.to_string()], &environment);
            (process, Box::new(move || matches!(http(port, "GET", "/moto-api/", &[], ""), Ok((200, _)))))
        }))
    }

    /// LocalStack without a container, or `None` as for moto. The access key is the account: twelve digits.
    pub fn localstack() -> Option<Self> {
        let python = python("localstack")?;
        let program = python.join("bin/python");
        loud("REPAIRED localstack macAddress: the server writes numbers that are no hexadecimal");
        let server = start("localstack", "000000000001", |port| {
            let listen = format!("127.0.0.1:{port}");
            let on = || "1".to_owned();
            let environment = [
                ("LOCALSTACK_VOLUME_DIR", "{home}/volume".to_owned()),
                ("CONFIG_DIR", "{home}/config".to_owned()),
                // The default gateway listens on all addresses.
                ("GATEWAY_SERVER", "hypercorn".to_owned()),
                ("GATEWAY_LISTEN", listen.clone()),
                ("LOCALSTACK_HOST", listen),
                ("SERVICES", "ec2,sts,iam".to_owned()),
                ("STRICT_SERVICE_LOADING", on()),
                ("EAGER_SERVICE_LOADING", on()),
                ("DISABLE_EVENTS", on()),
                ("SKIP_SSL_CERT_DOWNLOAD", on()),
                ("DNS_ADDRESS", "0".to_owned()),
            ];
            let process = Process::start("localstack", &program, &["-m", "localstack.runtime.main"], &environment);
            let ready = move || {
                let health = http(port, "GET", "/_localstack/health", &[], "");
                matches!(health, Ok((200, body)) if body.contains("\"ec2\": \"running\""))
            };
            (process, Box::new(ready))
        });
        Some(Self { repair: repair_macs, ..server })
    }

    /// Lays out the place. The subnet has 65,531 free addresses: moto picks at random without looking, and hangs when
    /// asked for more than there are.
    pub fn lay_out(&self) -> Place {
        let ec2 = |action: &str, parameters: &[(&str, &str)]| self.query.ec2(action, parameters);
        let vpc = text(&ec2("CreateVpc", &[("CidrBlock", "10.0.0.0/16")]), "vpcId");
        let zone = format!("{REGION}a");
        let subnet = text(
            &ec2(
                "CreateSubnet",
                &[
                    ("VpcId", &vpc),
                    ("CidrBlock", "10.0.0.0/16"),
                    ("AvailabilityZone", &zone),
                    ("TagSpecification.1.ResourceType", "subnet"),
                    ("TagSpecification.1.Tag.1.Key", "kubernetes.io/role/cni"),
                    ("TagSpecification.1.Tag.1.Value", "1"),
                ],
            ),
            "subnetId",
        );
        let group = text(
            &ec2("CreateSecurityGroup", &[("VpcId", &vpc), ("GroupName", "nodes"), ("GroupDescription", "nodes")]),
            "groupId",
        );
        let instance = text(
            &ec2(
                "RunInstances",
                &[
                    ("ImageId", "ami-12c6146b"),
                    ("InstanceType", "m5.large"),
                    ("MinCount", "1"),
                    ("MaxCount", "1"),
                    ("NetworkInterface.1.DeviceIndex", "0"),
                    ("NetworkInterface.1.SubnetId", &subnet),
                    ("NetworkInterface.1.SecurityGroupId.1", &group),
                ],
            ),
            "instanceId",
        );
        Place {
            vpc: VpcId::new(vpc).unwrap(),
            subnet: SubnetId::new(subnet).unwrap(),
            zone,
            group: SecurityGroupId::new(group).unwrap(),
            instance: InstanceId::new(instance).unwrap(),
        }
    }

    /// The adapter as it runs on a node: its keys come from the metadata service. The two servers between it and the
    /// world live as long as they are held.
    pub fn adapter(&self, keys: Keys) -> (AwsCloud, [Canned; 2]) {
        let imds = canned::imds(keys, |_, _| None);
        let (port, repair) = (self.query.port, self.repair);
        let ec2 = Canned::start(move |request, _| pass_on(port, request, repair));
        let cloud = adapter(&ec2.url(), &imds.url());
        (cloud, [imds, ec2])
    }
}

/// Hands a request on to the server and its answer back, put right where the server is known to be wrong.
pub fn pass_on(port: u16, request: &Request, repair: fn(String) -> String) -> Answer {
    let kept = |name: &str| !matches!(name, "connection" | "content-length");
    let headers: Vec<(&str, &str)> =
        request.headers.iter().filter(|(name, _)| kept(name)).map(|(name, value)| (&**name, &**value)).collect();
    match http(port, &request.method, &request.path, &headers, &request.body) {
        Ok((status, body)) => Answer::status(status, repair(body)),
        Err(_) => Answer::Hangup,
    }
}

/// moto 5.1 writes MAC addresses as `02:00:00:9002x:702x:13202x`: decimal numbers with the format's own letters
/// behind them.
fn repair_macs(body: String) -> String {
    let mut repaired = body.clone();
    for mac in texts(&body, "macAddress") {
        repaired = repaired.replace(mac, &repair_mac(mac));
    }
    repaired
}

pub fn repair_mac(mac: &str) -> String {
    let pair = |part: &str| match part.strip_suffix("02x").and_then(|number| number.parse::<u8>().ok()) {
        Some(number) if part.len() > 2 => format!("{number:02x}"),
        _ => part.to_owned(),
    };
    mac.split(':').map(pair).collect::<Vec<_>>().join(":")
}

pub fn adapter(ec2: &str, imds: &str) -> AwsCloud {
    for name in ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"] {
        assert!(std::env::var_os(name).is_none(), "{name} is set and would be used in place of the test's own keys");
    }
    let config = Config {
        region: Some(REGION.to_owned()),
        ec2_endpoint: Some(ec2.to_owned()),
        imds_endpoint: Some(imds.to_owned()),
        http_timeout: HTTP_TIMEOUT,
        ..Config::new("0.0.0-test")
    };
    AwsCloud::connect(config, Arc::new(())).unwrap()
}

type Ready = Box<dyn Fn() -> bool>;

fn start(name: &'static str, access_key: &str, run: impl Fn(u16) -> (Process, Ready)) -> Server {
    let mut attempt = 1;
    loop {
        let port = free_port();
        let (mut process, ready) = run(port);
        match process.wait_until(START_LIMIT, ready) {
            Ok(waited) => {
                process.assert_loopback_only(port);
                loud(&format!("{name} is ready after {:.1} s", waited.as_secs_f32()));
                let query = Query { port, access_key: access_key.to_owned(), region: REGION.to_owned() };
                return Server { process, query, repair: |body| body };
            }
            Err(why) if attempt == START_ATTEMPTS => panic!("{why}"),
            Err(_) => attempt += 1,
        }
    }
}

/// The private Python environment of this name. Fails loudly where it cannot be made, unless FLATWIRE_OFFLINE=1 says
/// that this machine is known to have no package index.
fn python(name: &str) -> Option<PathBuf> {
    let output = Command::new(root().join("tests/python.sh")).arg(name).output().unwrap();
    if output.status.success() {
        return Some(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()));
    }
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    if std::env::var("FLATWIRE_OFFLINE").as_deref() == Ok("1") {
        loud(&format!("SKIPPED {name}: its Python packages cannot be installed and FLATWIRE_OFFLINE=1"));
        return None;
    }
    panic!("{name}: its Python packages cannot be installed (FLATWIRE_OFFLINE=1 leaves this test out):\n{why}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_broken_macs_are_repaired() {
        let broken = "<macAddress>02:00:00:8502x:1702x:13502x</macAddress><x>02:00:00:8502x</x>".to_owned();
        assert_eq!(repair_macs(broken), "<macAddress>02:00:00:55:11:87</macAddress><x>02:00:00:8502x</x>");
        let whole = "<macAddress>02:00:00:85:17:02</macAddress>".to_owned();
        assert_eq!(repair_macs(whole.clone()), whole);
    }
}
