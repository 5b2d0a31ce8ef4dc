//! The policies of `deploy/iam` against what real daemons call in the lab, with the settings each policy is for.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use flatwire_tests::{name_of, programs};
use lab::client::Lab;
use lab::ctl::{DaemonAction, Spec};
use serde_json::Value;

const NODE: &str = "node-1";

/// The actions a policy allows.
fn policy(name: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/iam").join(name);
    let policy: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let statements = policy["Statement"].as_array().unwrap().iter();
    let actions = statements.flat_map(|statement| statement["Action"].as_array().unwrap());
    actions.map(|action| action.as_str().unwrap().to_owned()).collect()
}

/// A node of this kind (`type:prefixes`), and a daemon with these settings.
fn start(env: &[(&str, &str)], node: &str) -> Lab {
    let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let ipv6 = env.contains_key("ENABLE_IPv6");
    let nodes = vec![node.parse().unwrap()];
    let spec = Spec { name: name_of("iam"), nodes, ipv6, bin_dir: Some(programs()), env, ..Spec::default() };
    flatwire_tests::start(&spec)
}

/// What the daemon called so far. Nobody else is in this lab.
fn called(lab: &mut Lab) -> BTreeSet<String> {
    lab.status().unwrap().calls.into_keys().map(|action| format!("ec2:{action}")).collect()
}

fn live(lab: &mut Lab, pods: usize) {
    for n in 0..pods {
        lab.pod_add(NODE, &format!("pod-{n}")).unwrap();
    }
    // A start with a ledger asks more than one without.
    lab.daemon(NODE, DaemonAction::Stop).unwrap();
    lab.daemon(NODE, DaemonAction::Start).unwrap();
    for n in 0..pods {
        lab.pod_del(NODE, &format!("pod-{n}")).unwrap();
    }
}

#[test]
fn a_daemon_that_trusts_the_metadata_calls_nothing() {
    let mut lab = start(&[("ENABLE_IMDS_ONLY_MODE", "true"), ("ENABLE_PREFIX_DELEGATION", "true")], "m5.large:1");
    live(&mut lab, 5);
    assert_eq!(called(&mut lab), BTreeSet::new());
}

#[test]
fn a_daemon_that_changes_nothing_calls_what_its_policy_allows() {
    let env = [("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
    // A type that ipamd's own table does not have is asked for; every other is not.
    let mut lab = start(&env, "m5.large:1");
    live(&mut lab, 5);
    let deadline = Instant::now() + Duration::from_secs(30);
    let allowed = policy("policy-read-only.json");
    loop {
        let called = called(&mut lab);
        assert!(called.is_subset(&allowed), "{called:?} and {allowed:?}");
        if called.contains("ec2:DescribeNetworkInterfaces") {
            return;
        }
        assert!(Instant::now() < deadline, "EC2 is never read: {called:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_daemon_that_grows_and_shrinks_calls_what_its_policy_allows() {
    let mut lab = start(&[("CLUSTER_NAME", "demo"), ("IP_COOLDOWN_PERIOD", "1")], "m5.large");
    live(&mut lab, 14);
    let (called, allowed) = (called(&mut lab), policy("policy-ipv4.json"));
    assert!(called.is_subset(&allowed), "{called:?} and {allowed:?}");
    for action in ["AssignPrivateIpAddresses", "AttachNetworkInterface", "CreateNetworkInterface"] {
        assert!(called.contains(&format!("ec2:{action}")), "the node never grew: {called:?}");
    }
}

#[test]
fn a_daemon_with_pods_of_both_families_calls_what_its_policy_allows() {
    let mut lab = start(&[("CLUSTER_NAME", "demo"), ("IP_COOLDOWN_PERIOD", "1"), ("ENABLE_IPv6", "true")], "m5.large");
    live(&mut lab, 14);
    let (called, allowed) = (called(&mut lab), policy("policy-ipv6.json"));
    assert!(called.is_subset(&allowed), "{called:?} and {allowed:?}");
    assert!(called.contains("ec2:AssignIpv6Addresses"), "{called:?}");
}
