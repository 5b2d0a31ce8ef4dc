//! What an operator asks a node, on a node of the lab: every command with its exit codes, with the daemon there and away.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::process::Output;

use flatwire_tests::{eventually, name_of, programs};
use lab::client::Lab;
use lab::ctl::{DaemonAction, Spec};
use lab::fabric::{EC2_INSIDE, IMDS};
use serde_json::Value;

const NODE: &str = "node-1";
const NODE_STATE: &str = "/var/run/aws-node/node-state.json";

fn start() -> Lab {
    let nodes = vec!["m5.large".parse().unwrap()];
    let spec = Spec { name: name_of("operator"), nodes, bin_dir: Some(programs()), ..Spec::default() };
    flatwire_tests::start(&spec)
}

/// Runs `ipamd` with these arguments on the node, in the environment of the node's daemon.
fn ipamd(lab: &Lab, arguments: &[&str]) -> (i32, String) {
    let (program, ec2, imds) = (
        lab.ipamd().unwrap(),
        format!("AWS_EC2_ENDPOINT=http://{EC2_INSIDE}"),
        format!("AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{IMDS}"),
    );
    let command: Vec<&str> = ["env", &ec2, &imds, &program].into_iter().chain(arguments.iter().copied()).collect();
    let Output { status, stdout, stderr } = lab.exec(NODE, &command).unwrap();
    (status.code().unwrap(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

fn level_in_force(lab: &Lab) -> Value {
    let (code, status) = ipamd(lab, &["status", "--json"]);
    assert_eq!(code, 0, "{status}");
    serde_json::from_str::<Value>(&status).unwrap()["node_state"]["level"].clone()
}

#[test]
fn an_audit_is_clean_then_names_what_differs_and_says_when_it_could_not_be_done() {
    let mut lab = start();
    let pod = lab.pod_add(NODE, "web").unwrap();
    let (code, said) = ipamd(&lab, &["audit"]);
    assert_eq!((code, said.contains("audit: clean")), (0, true), "{said}");

    // Somebody takes a free address away in EC2.
    let status: Value = serde_json::from_str(&ipamd(&lab, &["status", "--json"]).1).unwrap();
    let eni = status["enis"][0]["id"].as_str().unwrap().to_owned();
    let slots = status["enis"][0]["slots"].as_array().unwrap().iter().map(|slot| slot.as_str().unwrap());
    let free = slots.map(|slot| slot.trim_end_matches("/32").to_owned()).find(|slot| *slot != pod.address.to_string());
    let free = free.unwrap();
    let parameters = [("NetworkInterfaceId", eni.as_str()), ("PrivateIpAddress.1", free.as_str())];
    lab.ec2().call("UnassignPrivateIpAddresses", &parameters).unwrap();
    let (code, said) = ipamd(&lab, &["audit"]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("slot_not_in_cloud") && said.contains(&free) && said.contains("audit: 1 difference"),
        "{said}"
    );
    let (code, json) = ipamd(&lab, &["audit", "--json"]);
    assert_eq!(
        (code, serde_json::from_str::<Value>(&json).unwrap()["findings"][0]["kind"].as_str()),
        (1, Some("slot_not_in_cloud"))
    );

    lab.daemon(NODE, DaemonAction::Kill).unwrap();
    let (code, said) = ipamd(&lab, &["audit"]);
    assert_eq!((code, said.contains("is it running here")), (2, true), "{said}");
}

#[test]
fn an_explanation_names_the_pod_the_address_the_eni_and_the_target() {
    let mut lab = start();
    let pod = lab.pod_add(NODE, "web").unwrap();
    let address = pod.address.to_string();
    let (_, by_pod) = ipamd(&lab, &["explain", "pod", "default/web"]);
    assert!(by_pod.contains(&format!("got {address}")), "{by_pod}");
    let (_, by_address) = ipamd(&lab, &["explain", "address", &address]);
    assert!(by_address.contains("pod default/web") && by_address.contains("has it"), "{by_address}");
    let eni = lab.info().nodes[0].enis[0].id.clone();
    let (_, by_eni) = ipamd(&lab, &["explain", "eni", &eni]);
    assert!(by_eni.contains("is device 0") && by_eni.contains("in service"), "{by_eni}");
    let (code, target) = ipamd(&lab, &["explain", "target", "--json"]);
    assert!(code == 0 && serde_json::from_str::<Value>(&target).unwrap()["lines"].is_array(), "{target}");
    let (code, said) = ipamd(&lab, &["explain", "pod", "web"]);
    assert_eq!((code, said.contains("NAMESPACE/NAME")), (2, true), "{said}");
}

#[test]
fn a_level_is_followed_survives_a_restart_and_outlives_a_bad_file() {
    let mut lab = start();
    let (code, said) = ipamd(&lab, &["level"]);
    assert_eq!((code, said.starts_with("level normal")), (0, true), "{said}");
    let (code, said) = ipamd(&lab, &["level", "no-cloud"]);
    assert_eq!((code, said.contains("was normal")), (0, true), "{said}");
    eventually("the daemon follows", || level_in_force(&lab) == "no-cloud");
    let (code, said) = ipamd(&lab, &["audit"]);
    assert_eq!((code, said.contains("EC2 could not be read")), (2, true), "{said}");

    lab.daemon(NODE, DaemonAction::Stop).unwrap();
    let (code, said) = ipamd(&lab, &["level", "no-release"]);
    assert_eq!((code, said.contains("was no-cloud")), (0, true), "with the daemon away: {said}");
    lab.daemon(NODE, DaemonAction::Start).unwrap();
    assert_eq!(level_in_force(&lab), "no-release");

    lab.run(NODE, &["bash", "-c", &format!("echo '{{\"level\":\"slow\"}}' > {NODE_STATE}")]).unwrap();
    let log = || lab.run(NODE, &["cat", "/var/log/aws-routed-eni/ipamd.log"]).unwrap();
    eventually("the bad file is reported", || log().contains("cannot be read; this holds"));
    assert_eq!(level_in_force(&lab), "no-release", "what was said before holds");
    let (code, said) = ipamd(&lab, &["level", "normal"]);
    assert_eq!((code, said.contains("remove it")), (1, true), "{said}");
    lab.run(NODE, &["rm", NODE_STATE]).unwrap();
    eventually("nothing is said any more", || level_in_force(&lab) == "normal");
    assert_eq!(ipamd(&lab, &["level", "no-release"]).0, 0);
    let (code, said) = ipamd(&lab, &["level", "--clear"]);
    assert_eq!((code, said.contains("says none now")), (0, true), "{said}");
    let file = lab.run(NODE, &["cat", NODE_STATE]).unwrap();
    assert!(!file.contains("level"), "{file}");
    eventually("nothing is said any more", || level_in_force(&lab) == "normal");
}

#[test]
fn a_preflight_passes_on_a_node_and_fails_with_a_way_out_where_something_is_missing() {
    let lab = start();
    let (code, said) = ipamd(&lab, &["preflight"]);
    assert_eq!((code, said.contains("failed=0")), (0, true), "{said}");
    assert!(said.contains("ec2:AssignPrivateIpAddresses") && said.contains("nftables with NAT"), "{said}");
    let (code, json) = ipamd(&lab, &["preflight", "--json"]);
    let checks: Vec<Value> = serde_json::from_str(&json).unwrap();
    let granted = |check: &&Value| check["check"].as_str().unwrap().starts_with("ec2:") && check["verdict"] == "ok";
    assert_eq!((code, checks.iter().filter(granted).count()), (0, 11), "{json}");

    let program = lab.ipamd().unwrap();
    let nowhere = "AWS_EC2_METADATA_SERVICE_ENDPOINT=http://169.254.169.1";
    let bad = lab.exec(NODE, &["env", nowhere, "HTTP_TIMEOUT=1", &program, "preflight"]).unwrap();
    let said = String::from_utf8_lossy(&bad.stdout).into_owned();
    assert_eq!((bad.status.code(), said.contains("hop limit")), (Some(1), true), "{said}");
    let refused = lab.exec(NODE, &["env", "ENABLE_MULTI_NIC=true", &program, "preflight"]).unwrap();
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert_eq!((refused.status.code(), said.contains("not supported by this version")), (Some(1), true), "{said}");
}
