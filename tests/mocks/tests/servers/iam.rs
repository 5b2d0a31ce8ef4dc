//! Each policy of `deploy/iam` against the lab's EC2, which refuses what a role is not allowed: the adapter's whole life
//! needs every action in it, and no other.

use std::collections::BTreeSet;

use flatwire_cloud::ACTIONS;
use flatwire_core::ports::{Cloud, CloudErrorKind, CloudRequest};
use flatwire_mock_tests::root;
use lab_ec2::NODE_ROLE;
use tokio::task::{LocalSet, spawn_local};

use crate::lab::{Lab, instant, lab};

/// The actions a policy allows.
pub fn policy(name: &str) -> BTreeSet<String> {
    let path = root().join("deploy/iam").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let policy: serde_json::Value = serde_json::from_str(&text).unwrap();
    let statements = policy["Statement"].as_array().unwrap().iter();
    let actions = statements.flat_map(|statement| statement["Action"].as_array().unwrap());
    actions.map(|action| action.as_str().unwrap().to_owned()).collect()
}

async fn under(actions: &BTreeSet<String>) -> Lab {
    let lab = lab(instant(), "10.0.0.0/20", 0).await;
    lab.ec2.set_role(NODE_ROLE, Some(actions.clone()));
    lab
}

#[tokio::test]
async fn iam_ipv4_needs_each_of_its_actions_and_no_other() {
    let whole = policy("policy-ipv4.json");
    let known: BTreeSet<String> = ACTIONS.iter().map(|action| format!("ec2:{action}")).collect();
    assert_eq!(whole, known, "the policy and the list that preflight asks for");

    let lab = under(&whole).await;
    lab.walk().run().await;
    let called: BTreeSet<String> = lab.ec2.calls().into_keys().map(|action| format!("ec2:{action}")).collect();
    assert_eq!(called, whole, "called, and allowed");

    for action in &whole {
        let mut lesser = whole.clone();
        lesser.remove(action);
        let lab = under(&lesser).await;
        let alone = LocalSet::new();
        let walk = alone.run_until(async { spawn_local(async move { lab.walk().run().await }).await }).await;
        let ended = walk.expect_err(&format!("nothing misses {action}")).into_panic();
        let why = ended.downcast_ref::<String>().map_or("", String::as_str);
        assert!(why.contains(&format!("is not authorized to perform: {action} ")), "without {action}: {why}");
        println!("iam: policy-ipv4.json without {action}: refused");
    }
    println!("iam: policy-ipv4.json actions={}", whole.len());
}

/// A node that keeps what it was launched with reads two things: what EC2 shows of it, and what a type can carry that ipamd's
/// own table does not have.
#[tokio::test]
async fn iam_read_only_needs_each_of_its_actions_and_no_other() {
    let whole = policy("policy-read-only.json");
    let questions = |lab: &Lab| {
        [
            ("ec2:DescribeNetworkInterfaces", CloudRequest::DescribeNode { instance: lab.place.instance.clone() }),
            ("ec2:DescribeInstanceTypes", CloudRequest::DescribeInstanceType { instance_type: "m5.large".to_owned() }),
        ]
    };
    let lab = under(&whole).await;
    let asked: BTreeSet<String> = questions(&lab).iter().map(|(action, _)| (*action).to_owned()).collect();
    assert_eq!(asked, whole);
    for action in &whole {
        let lab = under(&whole.iter().filter(|other| *other != action).cloned().collect()).await;
        for (asked, request) in questions(&lab) {
            let refused = lab.cloud.call(request).await.err().map(|error| error.kind);
            assert_eq!(refused, (asked == action).then_some(CloudErrorKind::Denied), "{asked} without {action}");
        }
        println!("iam: policy-read-only.json without {action}: refused");
    }
    println!("iam: policy-read-only.json actions={}", whole.len());
}
