//! Each policy of `deploy/iam` against the lab's EC2, which refuses what a role is not allowed: the adapter's whole life
//! needs every action in it, and no other.

use std::collections::{BTreeMap, BTreeSet};

use flatwire_cloud::{ACTIONS, IPV6_ACTION, PermissionOutcome};
use flatwire_core::ids::DeviceIndex;
use flatwire_core::ports::{Cloud, CloudErrorKind, CloudReply, CloudRequest, Want};
use flatwire_mock_tests::root;
use lab_ec2::{NODE_ROLE, Policy, Tags, wall_clock};
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
    life(&lab).await.unwrap();
    let called: BTreeSet<String> = lab.ec2.calls().into_keys().map(|action| format!("ec2:{action}")).collect();
    assert_eq!(called, whole, "called, and allowed");

    for action in &whole {
        let mut lesser = whole.clone();
        lesser.remove(action);
        let lab = under(&lesser).await;
        let why = life(&lab).await.expect_err(&format!("nothing misses {action}"));
        assert!(why.contains(&format!("is not authorized to perform: {action} ")), "without {action}: {why}");
        println!("iam: policy-ipv4.json without {action}: refused");
    }
    println!("iam: policy-ipv4.json actions={}", whole.len());
}

/// IPv6 takes one action more, in dual stack and alone: without it the IPv4 policy's life goes on, and no ENI gets its /80.
#[tokio::test]
async fn iam_ipv6_needs_one_action_more() {
    let (whole, lesser) = (policy("policy-ipv6.json"), policy("policy-ipv4.json"));
    let action = format!("ec2:{IPV6_ACTION}");
    assert_eq!(whole.difference(&lesser).collect::<Vec<_>>(), [&action]);
    assert!(lesser.is_subset(&whole));
    for (allowed, refused) in [(&whole, None), (&lesser, Some(CloudErrorKind::Denied))] {
        let lab = under(allowed).await;
        let (vpc, subnet) = (lab.place.vpc.clone(), lab.place.subnet.clone());
        let block = lab.ec2.give_vpc_ipv6(wall_clock(), &vpc).unwrap();
        let block = block.subnets(64).unwrap().next().unwrap();
        lab.ec2.give_subnet_ipv6(wall_clock(), &subnet, block).unwrap();
        let eni = lab.ec2.view(wall_clock()).enis[0].id.clone();
        let answer = lab.cloud.call(CloudRequest::AssignIpv6Prefix { eni, prefix: None }).await;
        assert_eq!(answer.as_ref().err().map(|error| error.kind), refused, "{answer:?}");
        let asked = lab.cloud.permissions(true).await;
        let allowed = asked.iter().find(|permission| permission.action == IPV6_ACTION).unwrap();
        assert_eq!(allowed.outcome == PermissionOutcome::Allowed, refused.is_none(), "{allowed:?}");
    }
    println!("iam: policy-ipv6.json without {action}: refused");
    println!("iam: policy-ipv6.json actions={}", whole.len());
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

const CLUSTER: &str = "walk";
const CLUSTER_TAG: &str = "cluster.k8s.amazonaws.com/name";

/// A lab under a policy that looks at tags. The node, its primary ENI included, carries what EKS and the launch template
/// give it.
async fn under_policy(policy: &Policy) -> Lab {
    let lab = lab(instant(), "10.0.0.0/20", 0).await;
    let primary = lab.ec2.view(wall_clock()).enis[0].id.to_string();
    let tag = |id: &str, key: &str, value: &str| {
        lab.ec2.set_tags(wall_clock(), id, &Tags::from([(key.to_owned(), value.to_owned())])).unwrap();
    };
    tag(&primary, CLUSTER_TAG, CLUSTER);
    tag(lab.place.instance.as_str(), &format!("kubernetes.io/cluster/{CLUSTER}"), "owned");
    lab.ec2.set_role_policy(NODE_ROLE, policy.clone());
    lab
}

#[tokio::test]
async fn iam_scoped_to_a_cluster_needs_each_of_its_grants_and_reaches_no_other_cluster() {
    let text = std::fs::read_to_string(root().join("deploy/iam/policy-ipv4-scoped.json")).unwrap();
    let whole = Policy::parse(&text.replace("CLUSTER", CLUSTER)).unwrap();
    let lab = under_policy(&whole).await;
    life(&lab).await.unwrap();
    let called: BTreeSet<String> = lab.ec2.calls().into_keys().map(|action| format!("ec2:{action}")).collect();
    assert_eq!(called, whole.grants().into_iter().map(|(_, action)| action).collect());

    for (sid, action) in whole.grants() {
        let lab = under_policy(&whole.without(&sid, &action)).await;
        let why = life(&lab).await.expect_err(&format!("nothing misses {action} of {sid}"));
        assert!(why.contains(&format!("is not authorized to perform: {action} ")), "{sid} without {action}: {why}");
        println!("iam: policy-ipv4-scoped.json {sid} without {action}: refused");
    }

    // An ENI of another cluster in the same VPC, and a machine of nobody's.
    let lab = under_policy(&whole).await;
    let creation = |cluster: &str, token: &str| CloudRequest::CreateEni {
        subnet: lab.place.subnet.clone(),
        security_groups: vec![lab.place.group.clone()],
        want: Want::Addresses(1),
        ipv6_prefix: false,
        description: "test".to_owned(),
        tags: BTreeMap::from([(CLUSTER_TAG.to_owned(), cluster.to_owned())]),
        client_token: token.to_owned(),
    };
    assert_denied(&lab, creation("elsewhere", "a")).await;
    let CloudReply::Created(eni) = lab.cloud.call(creation(CLUSTER, "b")).await.unwrap() else { panic!("no ENI") };
    let foreign = Tags::from([(CLUSTER_TAG.to_owned(), "elsewhere".to_owned())]);
    lab.ec2.set_tags(wall_clock(), eni.id.as_str(), &foreign).unwrap();
    let (id, instance) = (eni.id, lab.place.instance.clone());
    assert_denied(&lab, CloudRequest::Assign { eni: id.clone(), want: Want::Addresses(1) }).await;
    let to_us = Tags::from([(CLUSTER_TAG.to_owned(), CLUSTER.to_owned())]);
    assert_denied(&lab, CloudRequest::TagEni { eni: id.clone(), tags: to_us.clone() }).await;
    assert_denied(&lab, CloudRequest::DeleteEni { eni: id.clone() }).await;
    lab.ec2.set_tags(wall_clock(), id.as_str(), &to_us).unwrap();
    let not_ours = Tags::from([(format!("kubernetes.io/cluster/{CLUSTER}"), "shared".to_owned())]);
    lab.ec2.set_tags(wall_clock(), instance.as_str(), &not_ours).unwrap();
    assert_denied(&lab, CloudRequest::AttachEni { eni: id, instance, device: DeviceIndex(1), card: 0 }).await;
    println!("iam: policy-ipv4-scoped.json actions={}", called.len());
}

/// The whole walk, and the one call that it leaves out: other groups for an ENI. What stopped it, if something did.
async fn life(lab: &Lab) -> Result<(), String> {
    let walk = lab.walk();
    let (cloud, groups) = (lab.cloud.clone(), vec![lab.place.group.clone()]);
    let eni = lab.ec2.view(wall_clock()).enis[0].id.clone();
    let whole = async move {
        walk.run().await;
        cloud.call(CloudRequest::SetSecurityGroups { eni, security_groups: groups }).await.unwrap();
    };
    let ended = LocalSet::new().run_until(async { spawn_local(whole).await }).await;
    ended.map_err(|ended| ended.into_panic().downcast_ref::<String>().cloned().unwrap_or_default())
}

async fn assert_denied(lab: &Lab, request: CloudRequest) {
    let text = format!("{request:?}");
    let error = lab.cloud.call(request).await.expect_err(&text);
    assert_eq!((error.kind, error.code.as_str()), (CloudErrorKind::Denied, "UnauthorizedOperation"), "{text}: {error}");
}
