//! The whole path, with nothing pretended but EC2: a real ipamd and a real plugin on the lab's nodes, real packets.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flatwire_tests::{eventually, name_of, programs};
use lab::client::Lab;
use lab::ctl::{Control, DaemonAction, Info, NodeSpec, PodInfo, Request, Spec};
use serde_json::Value;

const PODS: usize = 110;

fn node(instance_type: &str, vars: &[(&str, &str)]) -> NodeSpec {
    let mut spec: NodeSpec = instance_type.parse().unwrap();
    spec.env = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    spec
}

fn start(nodes: Vec<NodeSpec>) -> Lab {
    let spec = Spec { name: name_of("node"), nodes, bin_dir: Some(programs()), ..Spec::default() };
    flatwire_tests::start(&spec)
}

/// Adds a pod as the kubelet would: again and again until it succeeds.
fn add_until_it_succeeds(control: &mut Control, node: &str, name: &str, failures: &AtomicUsize) -> PodInfo {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        match control.ask(&Request::PodAdd { node: node.to_owned(), name: name.to_owned() }) {
            Ok(pod) => return pod,
            Err(error) => {
                failures.fetch_add(1, Ordering::Relaxed);
                assert!(Instant::now() < deadline, "{name}: {}", lab::error::chain(&error));
                std::thread::yield_now();
            }
        }
    }
}

/// What ipamd says, through its own command line on the node.
fn ipamd_status(lab: &Lab, node: &str) -> Value {
    let ipamd = lab.ipamd().unwrap();
    serde_json::from_str(&lab.run(node, &[&ipamd, "status", "--json"]).unwrap()).unwrap()
}

/// Cloud, ledger and kernel agree that nobody lives here any more.
fn nothing_is_left(lab: &Lab, node: &str) {
    eventually("the ledger is empty", || {
        let status = ipamd_status(lab, node);
        status["pods"].as_array().is_some_and(Vec::is_empty) && status["counts"]["assigned"] == 0
    });
    let routes: Value = serde_json::from_str(&lab.run(node, &["ip", "-j", "route"]).unwrap()).unwrap();
    let to_pods = routes.as_array().unwrap().iter().filter(|r| r["dev"].as_str().is_some_and(|d| d.starts_with("eni")));
    assert_eq!(to_pods.count(), 0, "routes to pods are left: {routes}");
    eventually("the veths are gone", || {
        let links: Value = serde_json::from_str(&lab.run(node, &["ip", "-j", "link"]).unwrap()).unwrap();
        !links.as_array().unwrap().iter().any(|l| l["ifname"].as_str().is_some_and(|n| n.starts_with("eni")))
    });
    eventually("the add-on's checkpoint is empty", || {
        let checkpoint = lab.run(node, &["cat", "/var/run/aws-node/ipam.json"]).unwrap();
        checkpoint == "{\"version\":\"vpc-cni-ipam/1\",\"allocations\":[]}\n"
    });
}

/// 110 pods at once; `meanwhile` runs when some of them are there.
fn burst(lab: &Lab, node: &str, meanwhile: impl FnOnce() + Send) -> (Vec<PodInfo>, usize) {
    let (done, failures) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let pods: Vec<PodInfo> = std::thread::scope(|scope| {
        let adding: Vec<_> = (0..PODS)
            .map(|n| {
                let mut control = lab.connect().unwrap();
                let (done, failures) = (&done, &failures);
                scope.spawn(move || {
                    let pod = add_until_it_succeeds(&mut control, node, &format!("pod-{n}"), failures);
                    done.fetch_add(1, Ordering::Relaxed);
                    pod
                })
            })
            .collect();
        eventually("some pods are there", || done.load(Ordering::Relaxed) >= 10);
        meanwhile();
        adding.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.address).collect();
    assert_eq!(addresses.len(), PODS, "an address was given twice");
    (pods, failures.load(Ordering::Relaxed))
}

fn all_answer(lab: &mut Lab, from: &str, pods: &[PodInfo]) {
    let targets: Vec<String> = pods.iter().map(|pod| format!("{}/{}", pod.node, pod.name)).collect();
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    for probe in lab.probe(from, &targets).unwrap() {
        assert!(probe.rtt_us.is_some() && probe.seen.is_some(), "no answer: {probe:?}");
    }
}

fn delete_all(lab: &Lab, pods: &[PodInfo]) {
    std::thread::scope(|scope| {
        for pod in pods {
            let mut control = lab.connect().unwrap();
            scope.spawn(move || {
                let request = Request::PodDel { node: pod.node.clone(), name: pod.name.clone() };
                control.ask::<f64>(&request).unwrap_or_else(|e| panic!("{}", lab::error::chain(&e)));
            });
        }
    });
}

#[test]
fn burst_of_110_in_parallel_all_reachable_then_nothing_left() {
    let mut lab = start(vec![node("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true")]), node("m5.large", &[])]);
    let (pods, failures) = burst(&lab, "node-1", || {});
    assert_eq!(failures, 0, "a pod was refused");
    all_answer(&mut lab, "node-2", &pods);
    delete_all(&lab, &pods);
    nothing_is_left(&lab, "node-1");
}

#[test]
fn burst_of_110_with_a_killed_daemon() {
    // Single addresses: four ENIs are created and attached while the daemon dies.
    let mut lab = start(vec![node("m5.4xlarge", &[]), node("m5.large", &[])]);
    let mut control = lab.connect().unwrap();
    let (pods, _) = burst(&lab, "node-1", || {
        let daemon = |action| Request::Daemon { node: "node-1".to_owned(), action };
        control.ask::<()>(&daemon(DaemonAction::Kill)).unwrap();
        control.ask::<()>(&daemon(DaemonAction::Start)).unwrap();
    });
    all_answer(&mut lab, "node-2", &pods);
    // Sandboxes whose ADD died with the daemon are in the queue of releases for a moment.
    eventually("the ledger knows every pod, and no more", || {
        ipamd_status(&lab, "node-1")["pods"].as_array().map(Vec::len) == Some(PODS)
    });
    // What EC2 says the node holds is what the ledger says.
    lab.settle().unwrap();
    let info: Info = lab.ask(&Request::Info).unwrap();
    let cloud: BTreeSet<String> = info.nodes[0].enis.iter().map(|eni| eni.id.clone()).collect();
    eventually("the ledger knows every ENI", || {
        let status = ipamd_status(&lab, "node-1");
        let known = status["enis"].as_array().unwrap().iter();
        known.filter_map(|eni| eni["id"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>() == cloud
    });
    delete_all(&lab, &pods);
    nothing_is_left(&lab, "node-1");
}

#[test]
fn a_pod_deleted_while_the_daemon_is_away_is_released_when_it_is_back() {
    let mut lab = start(vec![node("m5.large", &[])]);
    let pod = lab.pod_add("node-1", "web").unwrap();
    lab.daemon("node-1", DaemonAction::Kill).unwrap();
    lab.pod_del("node-1", "web").unwrap();
    let queue = lab.run("node-1", &["ls", "/var/run/aws-node/releases"]).unwrap();
    assert_eq!(queue.lines().count(), 1, "one release is queued: {queue}");
    lab.daemon("node-1", DaemonAction::Start).unwrap();
    nothing_is_left(&lab, "node-1");
    eventually("the queue is empty", || lab.run("node-1", &["ls", "/var/run/aws-node/releases"]).unwrap().is_empty());
    let again = lab.pod_add("node-1", "web").unwrap();
    assert_ne!(again.address, pod.address, "the address is cooling");
}

#[test]
fn running_pods_keep_their_traffic_while_the_daemon_restarts() {
    let mut lab = start(vec![node("m5.large", &[]), node("m5.large", &[])]);
    let pods: Vec<PodInfo> = (0..12).map(|n| lab.pod_add("node-1", &format!("pod-{n}")).unwrap()).collect();
    let table = |lab: &Lab| lab.run("node-1", &["ip", "rule"]).unwrap();
    let rules = table(&lab);
    lab.daemon("node-1", DaemonAction::Stop).unwrap();
    all_answer(&mut lab, "node-2", &pods);
    lab.daemon("node-1", DaemonAction::Start).unwrap();
    all_answer(&mut lab, "node-2", &pods);
    assert_eq!(table(&lab), rules, "a restart changes no rule");
    assert_eq!(ipamd_status(&lab, "node-1")["pods"].as_array().map(Vec::len), Some(12));
}

/// A node launched with prefixes: addresses come from IMDS, and EC2 is not called at all.
#[test]
fn a_node_launched_with_prefixes_serves_its_pods_without_an_ec2_call() {
    let lab_node = node("m5.large:2", &[("ENABLE_PREFIX_DELEGATION", "true")]);
    let mut lab = start(vec![lab_node]);
    let before = lab.status().unwrap().calls;
    for n in 0..20 {
        lab.pod_add("node-1", &format!("pod-{n}")).unwrap();
    }
    let status = lab.status().unwrap();
    assert_eq!(status.calls, before, "EC2 was called");
    let metrics = lab.run(
        "node-1",
        &["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/61678; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"],
    );
    let metrics = metrics.unwrap();
    assert!(metrics.contains("awscni_assigned_ip_addresses 20"), "{metrics}");
    assert!(!metrics.contains("fn=\"AssignPrivateIpAddresses\""), "{metrics}");
}

/// What an operator and a probe see of a node that serves.
#[test]
fn the_daemon_shows_itself() {
    let mut lab = start(vec![node("m5.large", &[])]);
    let pod = lab.pod_add("node-1", "web").unwrap();
    let ipamd = lab.ipamd().unwrap();
    let table = lab.run("node-1", &[&ipamd, "status"]).unwrap();
    assert!(table.contains("1 of 3 ENIs") && table.contains("1 pods"), "{table}");
    let row = table.lines().find(|line| line.starts_with("default/web ")).unwrap_or_else(|| panic!("{table}"));
    assert!(row.contains(&pod.address.to_string()), "{row}");
    let mode = lab.run("node-1", &["stat", "-c", "%a %F", "/var/run/aws-node/ipamd.sock"]).unwrap();
    assert_eq!(mode.trim(), "660 socket");
    let get = |port: u16, path: &str| {
        let script =
            format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3");
        lab.run("node-1", &["bash", "-c", &script]).unwrap()
    };
    assert!(get(61678, "/healthz").contains(" 200 ") && get(61678, "/readyz").contains(" 200 "));
    let enis = get(61679, "/v1/enis");
    let body: Value = serde_json::from_str(enis.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(body["0"]["AssignedIPs"], 1, "the add-on's shape: {body}");
    assert!(get(61679, "/").contains("AvailableCommands"));
    let second = lab.exec("node-1", &[&ipamd, "run"]).unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("is held by another ipamd"), "{said}");
    let refused = lab.exec("node-1", &["env", "WARM_IP_TARGET=many", &ipamd, "run"]).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("WARM_IP_TARGET=\"many\" is not allowed"), "{said}");
}

/// The AWS CLI takes one pod's address away and gives it back; that pod's traffic, and no other's, follows.
#[test]
fn the_aws_cli_unassigns_one_pods_address_and_exactly_its_traffic_stops() {
    let Some(aws) = aws_cli() else { return };
    let mut lab = start(vec![node("m5.large", &[]), node("m5.large", &[])]);
    let pods: Vec<PodInfo> = (0..12).map(|n| lab.pod_add("node-1", &format!("pod-{n}")).unwrap()).collect();
    all_answer(&mut lab, "node-2", &pods);
    let victim = pods[11].clone();
    let address = victim.address.to_string();
    let filter = format!("Name=addresses.private-ip-address,Values={address}");
    let found = aws(&lab, &["ec2", "describe-network-interfaces", "--filters", &filter]);
    let eni = found["NetworkInterfaces"][0]["NetworkInterfaceId"].as_str().expect("one ENI has it").to_owned();
    assert_eq!(found["NetworkInterfaces"].as_array().map(Vec::len), Some(1));

    let change = |verb: &str, lab: &Lab| {
        aws(lab, &["ec2", verb, "--network-interface-id", &eni, "--private-ip-addresses", &address]);
    };
    change("unassign-private-ip-addresses", &lab);
    lab.settle().unwrap();
    let targets: Vec<String> = pods.iter().map(|pod| format!("node-1/{}", pod.name)).collect();
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    for probe in lab.probe("node-2", &targets).unwrap() {
        let is_victim = probe.target == victim.address;
        assert_eq!(probe.seen.is_none() && probe.rtt_us.is_none(), is_victim, "{probe:?}");
    }
    change("assign-private-ip-addresses", &lab);
    lab.settle().unwrap();
    all_answer(&mut lab, "node-2", &pods);
}

type Aws = Box<dyn Fn(&Lab, &[&str]) -> Value>;

/// The real AWS CLI, from a private virtual environment.
fn aws_cli() -> Option<Aws> {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("python.sh");
    let output = Command::new(script).arg("aws").output().expect("tests/python.sh starts");
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(std::env::var_os("FLATWIRE_OFFLINE").is_some(), "the AWS CLI could not be installed: {why}");
        println!("SKIPPED the AWS CLI: FLATWIRE_OFFLINE is set and it is not installed");
        return None;
    }
    let program = format!("{}/bin/aws", String::from_utf8_lossy(&output.stdout).trim());
    Some(Box::new(move |lab: &Lab, arguments: &[&str]| {
        let info = lab.info();
        let output = Command::new(&program)
            .args(arguments)
            .args(["--output", "json", "--endpoint-url", &format!("http://{}", info.endpoint)])
            .env("AWS_ACCESS_KEY_ID", &info.credentials.access_key_id)
            .env("AWS_SECRET_ACCESS_KEY", &info.credentials.secret_access_key)
            .env("AWS_DEFAULT_REGION", &info.region)
            .env_remove("AWS_SESSION_TOKEN")
            .output()
            .expect("aws starts");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "aws {arguments:?}: {err}");
        if out.trim().is_empty() { Value::Null } else { serde_json::from_str(&out).unwrap() }
    }))
}

/// Whether each of these answers `from`: by echo, UDP and TCP, or by none.
fn reach(lab: &mut Lab, from: &str, targets: &[&str]) -> Vec<bool> {
    let probes = lab.probe(from, targets).unwrap();
    probes
        .into_iter()
        .map(|probe| {
            let heard = [probe.rtt_us.is_some(), probe.seen.is_some(), probe.seen_tcp.is_some()];
            assert!(heard.iter().all(|one| *one == heard[0]), "{probe:?}");
            heard[0]
        })
        .collect()
}

#[test]
fn pods_are_under_the_groups_of_their_eni_and_under_those_of_the_eni_config() {
    let custom = [("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"), ("MANAGE_ENIS_NON_SCHEDULABLE", "true")];
    let mut lab = start(vec![node("m5.large", &custom), node("m5.large", &[])]);
    let vpc = lab.info().vpc.id.clone();
    let parameters = [("GroupName", "pods"), ("GroupDescription", "of pods"), ("VpcId", vpc.as_str())];
    let made = lab.ec2().call("CreateSecurityGroup", &parameters).unwrap();
    let group = lab::api::element(&made, "groupId").unwrap();
    let info: Info = lab.ask(&Request::Info).unwrap();
    let subnet = info.nodes[0].enis[0].subnet.clone();
    let state = format!(r#"{{"eni_config":{{"subnet":"{subnet}","security_groups":["{group}"]}}}}"#);
    let script = format!("echo '{state}' > /var/run/aws-node/node-state.json");
    lab.run("node-1", &["sh", "-c", &script]).unwrap();

    let mut control = lab.connect().unwrap();
    let failures = AtomicUsize::new(0);
    let guarded = add_until_it_succeeds(&mut control, "node-1", "guarded", &failures);
    let plain = add_until_it_succeeds(&mut control, "node-2", "plain", &failures);
    let view = lab.view().unwrap();
    let eni_of = |pod: &PodInfo| view.enis.iter().find(|eni| eni.holds(pod.address)).unwrap();
    let groups_of = |pod: &PodInfo| eni_of(pod).security_groups.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(groups_of(&guarded), [group.as_str()], "the ENIConfig's");
    assert_ne!(groups_of(&plain), [group.as_str()], "the ENI's own");
    let plain_eni = eni_of(&plain).id.to_string();

    let (guarded, plain) = ("node-1/guarded", "node-2/plain");
    assert_eq!(reach(&mut lab, plain, &[guarded, "node-1"]), [false, true], "the pod is guarded, its node is not");
    assert_eq!(reach(&mut lab, "node-2", &[guarded, plain]), [false, true]);
    assert_eq!(reach(&mut lab, guarded, &[plain, "node-2", "internet"]), [true, true, true]);
    let parameters = [
        ("GroupId", group.as_str()),
        ("IpPermissions.1.IpProtocol", "-1"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "10.0.0.0/16"),
    ];
    lab.ec2().call("AuthorizeSecurityGroupIngress", &parameters).unwrap();
    assert_eq!(reach(&mut lab, plain, &[guarded]), [true], "a change takes effect");

    lab.ec2().call("RevokeSecurityGroupIngress", &parameters).unwrap();
    let parameters = [("NetworkInterfaceId", plain_eni.as_str()), ("SecurityGroupId.1", group.as_str())];
    lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
    assert_eq!(reach(&mut lab, "node-1", &[plain]), [false], "so do other groups");
}
