//! The same walk on the lab's EC2, with no step left out, and what only a faithful server can be asked: full subnets,
//! fragmentation, lost replies, throttling, denials, a node born with prefixes. The adapter gets everything from the
//! lab's metadata service: its region, its keys, and who it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use flatwire_cloud::{ACTIONS, AwsCloud, Config, PermissionOutcome};
use flatwire_core::ids::{DeviceIndex, EniId, SecurityGroupId, VpcId};
use flatwire_core::ports::{
    Cloud, CloudErrorKind as Kind, CloudReply, CloudRequest, EniStatus, EniView, Metadata, Want,
};
use flatwire_mock_tests::server::Place;
use flatwire_mock_tests::walk::Walk;
use lab_ec2::{
    Bucket, Buckets, Delays, Ec2, Ending, Fault, FaultRule, Faults, NODE_ROLE, Options, RunInstance, When, wall_clock,
};
use tokio::net::TcpListener;

use crate::iam::policy;

pub struct Lab {
    pub ec2: Arc<Ec2>,
    pub place: Place,
    pub cloud: AwsCloud,
}

/// A VPC with one subnet of this size and one running m5.large with so many prefixes, and the adapter on that node.
pub async fn lab(options: Options, subnet: &str, prefixes: u32) -> Lab {
    let region = options.region.clone();
    let ec2 = Arc::new(Ec2::new(options));
    tokio::spawn(lab_ec2::drive(ec2.clone(), wall_clock));

    let now = wall_clock();
    let zone = format!("{region}a");
    let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse().unwrap(), "lab").unwrap();
    let role = BTreeMap::from([("kubernetes.io/role/cni".to_owned(), "1".to_owned())]);
    let subnet = ec2.create_subnet(now, &vpc, subnet.parse().unwrap(), Some(&zone), role).unwrap();
    let group = ec2.create_security_group(now, &vpc, "nodes").unwrap();
    let run = RunInstance {
        groups: vec![group.clone()],
        ipv4_prefix_count: prefixes,
        ..RunInstance::new("m5.large", subnet.clone())
    };
    let instance = ec2.run_instance(now, &run).unwrap();

    let api = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let imds = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = |listener: &TcpListener| Some(format!("http://{}", listener.local_addr().unwrap()));
    let config = Config {
        ec2_endpoint: url(&api),
        imds_endpoint: url(&imds),
        http_timeout: Duration::from_secs(5),
        ..Config::new("0.0.0-test")
    };
    for name in ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"]
    {
        assert!(std::env::var_os(name).is_none(), "{name} is set and would be used in place of what IMDS says");
    }
    let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();

    let router = lab_ec2::router(ec2.clone(), wall_clock);
    tokio::spawn(async move { axum::serve(api, router).await.unwrap() });
    let asker = instance.clone();
    let metadata = lab_ec2::imds_router(ec2.clone(), wall_clock, Arc::new(move |_| Some(asker.clone())));
    let metadata = metadata.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(imds, metadata).await.unwrap() });

    Lab { ec2, place: Place { vpc, subnet, zone, group, instance }, cloud }
}

/// A lab in which nothing takes time and nothing is throttled.
pub fn instant() -> Options {
    Options { delays: Delays::NONE, throttle: None, ..Options::default() }
}

impl Lab {
    pub fn walk(&self) -> Walk {
        Walk::new("lab", self.cloud.clone(), self.place.clone(), Vec::new())
    }

    async fn metadata(&self) -> Metadata {
        match self.cloud.call(CloudRequest::ReadMetadata).await.unwrap() {
            CloudReply::Metadata(metadata) => metadata,
            other => panic!("{other:?}"),
        }
    }

    async fn node(&self) -> Vec<EniView> {
        match self.cloud.call(CloudRequest::DescribeNode { instance: self.place.instance.clone() }).await.unwrap() {
            CloudReply::Enis(enis) => enis,
            other => panic!("{other:?}"),
        }
    }

    async fn primary(&self) -> EniId {
        self.node().await[0].id.clone()
    }

    fn creation(&self, want: Want, token: &str) -> CloudRequest {
        CloudRequest::CreateEni {
            subnet: self.place.subnet.clone(),
            security_groups: vec![self.place.group.clone()],
            want,
            ipv6_prefix: false,
            description: "test".to_owned(),
            tags: BTreeMap::new(),
            client_token: token.to_owned(),
        }
    }

    fn fail_next(&self, action: &str, fault: Fault) {
        let rule = FaultRule { action: action.to_owned(), access_key: None, when: When::Next(1), fault };
        self.ec2.set_faults(Faults { calls: vec![rule], imds: Vec::new() });
    }
}

#[tokio::test]
async fn lab_walk() {
    let lab = lab(Options::default(), "10.0.0.0/20", 0).await;
    lab.walk().run().await;
}

/// The preflight finds exactly what is missing, and asking changes nothing.
#[tokio::test]
async fn a_preflight_names_the_action_that_the_policy_lacks() {
    let lab = lab(instant(), "10.0.0.0/20", 0).await;
    let before = lab.ec2.view(wall_clock());
    let shipped = policy("policy-ipv4.json");
    for missing in [None].into_iter().chain(ACTIONS.map(Some)) {
        let mut allowed = shipped.clone();
        let known = missing.is_none_or(|action| allowed.remove(&format!("ec2:{action}")));
        assert!(known, "the policy does not name {missing:?}");
        lab.ec2.set_role(NODE_ROLE, Some(allowed));
        for permission in lab.cloud.permissions(false).await {
            let action = permission.action;
            match permission.outcome {
                PermissionOutcome::Allowed => assert_ne!(Some(action), missing),
                // Creating with tags needs the right to tag, and detaching is asked about an attachment that EC2 must show.
                PermissionOutcome::Denied { message } => {
                    let due =
                        Some(action) == missing || (action, missing) == ("CreateNetworkInterface", Some("CreateTags"));
                    assert!(due, "{action} without {missing:?}: {message}");
                    assert!(message.contains(missing.unwrap()) && !message.contains("Encoded"), "{message}");
                }
                PermissionOutcome::Unknown { why } => {
                    assert_eq!(
                        (action, missing),
                        ("DetachNetworkInterface", Some("DescribeNetworkInterfaces")),
                        "{why}"
                    );
                }
            }
        }
    }
    let after = lab.ec2.view(wall_clock());
    assert_eq!((after.version, after.enis), (before.version, before.enis));

    // The one action that only a preflight would use: without it there is less to say, and nothing is amiss.
    let service = lab.cloud.metadata_service().await;
    assert_eq!(service.instance.unwrap(), lab.place.instance);
    assert_eq!(service.options.unwrap_err().kind, Kind::Denied);
    lab.ec2.set_role(NODE_ROLE, Some(shipped.into_iter().chain(["ec2:DescribeInstances".to_owned()]).collect()));
    let options = lab.cloud.metadata_service().await.options.unwrap();
    assert_eq!((options.hop_limit, options.tokens_required), (2, true));
}

#[tokio::test]
async fn an_announced_end_reaches_the_metadata() {
    let lab = lab(instant(), "10.0.0.0/24", 0).await;
    assert!(!lab.metadata().await.terminating);
    for ending in [Ending::ScaleIn, Ending::Spot] {
        lab.ec2.announce_end(wall_clock(), &lab.place.instance, ending).unwrap();
        assert!(lab.metadata().await.terminating, "{ending:?}");
    }
}

/// Addresses come back by their names unless somebody else has them by now.
#[tokio::test]
async fn what_was_lost_comes_back_by_name_unless_another_took_it() {
    let lab = lab(instant(), "10.0.0.0/24", 1).await;
    let eni = lab.primary().await;
    let assign = CloudRequest::Assign { eni: eni.clone(), want: Want::Addresses(2) };
    lab.cloud.call(assign).await.unwrap();
    let held = lab.node().await[0].slots.clone();
    lab.cloud.call(CloudRequest::Unassign { eni: eni.clone(), slots: held.clone() }).await.unwrap();
    assert!(lab.node().await[0].slots.is_empty());
    let back = CloudRequest::AssignNamed { eni: eni.clone(), slots: held.clone() };
    assert_eq!(lab.cloud.call(back.clone()).await.unwrap(), CloudReply::Assigned(held.clone()));
    assert_eq!(lab.node().await[0].slots, held);

    lab.cloud.call(CloudRequest::Unassign { eni: eni.clone(), slots: held.clone() }).await.unwrap();
    let CloudReply::Created(other) = lab.cloud.call(lab.creation(Want::Addresses(0), "o")).await.unwrap() else {
        panic!("not created")
    };
    let taken = CloudRequest::AssignNamed { eni: other.id.clone(), slots: held.clone() };
    lab.cloud.call(taken).await.unwrap();
    let error = lab.cloud.call(back).await.unwrap_err();
    assert_eq!(error.kind, Kind::Invalid, "{error}");
    let CloudReply::Eni(view) = lab.cloud.call(CloudRequest::DescribeEni { eni: other.id }).await.unwrap() else {
        panic!("not an ENI")
    };
    assert_eq!(view.slots, held, "nothing was taken from the other ENI");
}

#[tokio::test]
async fn groups_follow_and_foreign_ones_are_refused() {
    let lab = lab(instant(), "10.0.0.0/24", 0).await;
    let eni = lab.primary().await;
    let more = lab.ec2.create_security_group(wall_clock(), &lab.place.vpc, "more").unwrap();
    let both = vec![lab.place.group.clone(), more];
    let set = |groups: &[SecurityGroupId]| CloudRequest::SetSecurityGroups {
        eni: eni.clone(),
        security_groups: groups.to_vec(),
    };
    assert_eq!(lab.cloud.call(set(&both)).await.unwrap(), CloudReply::Done);
    assert_eq!(lab.node().await[0].security_groups, both);
    let nobody = SecurityGroupId::new("sg-00000000000000001").unwrap();
    let error = lab.cloud.call(set(&[nobody])).await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound, "{error}");
    assert_eq!(lab.node().await[0].security_groups, both);
}

/// Leaked ENIs fill several pages, and those of other clusters, other VPCs and in use are not among them.
#[tokio::test]
async fn unattached_enis_are_found_over_all_pages() {
    let lab = lab(instant(), "10.0.0.0/18", 0).await;
    let now = wall_clock();
    let node = ("node.k8s.amazonaws.com/instance_id".to_owned(), "i-0".to_owned());
    let cluster = |name: &str| ("cluster.k8s.amazonaws.com/name".to_owned(), name.to_owned());
    let made = |tags: Vec<(String, String)>| {
        lab.ec2.create_eni(now, &lab.place.subnet, &[], "", tags.into_iter().collect()).unwrap()
    };
    let ours: BTreeSet<EniId> = (0..1_005).map(|_| made(vec![node.clone(), cluster("c")])).collect();
    made(vec![node.clone(), cluster("other")]);
    made(vec![cluster("c")]);
    let used = made(vec![node, cluster("c")]);
    lab.ec2.attach_eni(now, &used, &lab.place.instance, DeviceIndex(1), 0).unwrap();
    let tags = BTreeMap::from([cluster("c")]);
    let request = CloudRequest::DescribeUnattached { vpc: lab.place.vpc.clone(), tags: tags.clone() };
    let CloudReply::Enis(found) = lab.cloud.call(request).await.unwrap() else { panic!("not ENIs") };
    assert_eq!(found.into_iter().map(|eni| eni.id).collect::<BTreeSet<_>>(), ours);
    assert_eq!(lab.ec2.calls()["DescribeNetworkInterfaces"].ok, 2);
    let elsewhere = VpcId::new("vpc-00000000000000001").unwrap();
    let request = CloudRequest::DescribeUnattached { vpc: elsewhere, tags };
    assert_eq!(lab.cloud.call(request).await.unwrap(), CloudReply::Enis(Vec::new()));
}

/// Both views of a node agree, and a node born with prefixes needs no EC2 call to know them.
#[tokio::test]
async fn metadata_and_ec2_show_the_same_node() {
    let lab = lab(instant(), "10.0.0.0/20", 2).await;
    let metadata = lab.metadata().await;
    assert_eq!(metadata.enis[0].slots.len(), 2);
    assert!(metadata.enis[0].slots.iter().all(|slot| slot.prefix_len() == 28));
    assert!(lab.ec2.calls().is_empty(), "{:?}", lab.ec2.calls());
    assert_eq!((&metadata.instance, &metadata.vpc), (&lab.place.instance, &lab.place.vpc));
    assert_eq!((metadata.region.as_str(), &metadata.availability_zone), ("us-east-1", &lab.place.zone));
    assert_eq!(metadata.instance_type, "m5.large");
    assert_eq!(metadata.vpc_cidrs, ["10.0.0.0/16".parse().unwrap()]);

    let assign = CloudRequest::Assign { eni: metadata.enis[0].id.clone(), want: Want::Addresses(3) };
    lab.cloud.call(assign).await.unwrap();
    let CloudReply::Created(created) = lab.cloud.call(lab.creation(Want::Addresses(2), "t")).await.unwrap() else {
        panic!()
    };
    let attach = CloudRequest::AttachEni {
        eni: created.id,
        instance: lab.place.instance.clone(),
        device: DeviceIndex(1),
        card: 0,
    };
    lab.cloud.call(attach).await.unwrap();

    let metadata = lab.metadata().await;
    let mut ec2 = lab.node().await;
    assert_eq!(ec2.len(), 2);
    // What only one of the two knows.
    for view in &mut ec2 {
        assert_eq!(view.status, EniStatus::Attached);
        view.attachment = None;
        view.description.clear();
        view.tags.clear();
        view.subnet_cidr = Some("10.0.0.0/20".parse().unwrap());
    }
    ec2.sort_by_key(|eni| eni.mac);
    assert_eq!(metadata.enis, ec2);
    assert_eq!(metadata.primary_ipv4, metadata.enis.iter().find(|eni| eni.device.0 == 0).unwrap().primary_ipv4);
}

#[tokio::test]
async fn a_full_subnet_and_a_fragmented_one_are_told_apart() {
    // Eleven addresses to give, one of them the node's; no /28 within a /28 is free of reserved addresses.
    let lab = lab(instant(), "10.0.0.0/28", 0).await;
    let eni = lab.primary().await;
    let assign = |want| CloudRequest::Assign { eni: eni.clone(), want };
    let error = lab.cloud.call(assign(Want::Prefixes(1))).await.unwrap_err();
    assert_eq!(error.kind, Kind::Fragmented, "{error}");
    let error = lab.cloud.call(lab.creation(Want::Prefixes(1), "p")).await.unwrap_err();
    assert_eq!(error.kind, Kind::Fragmented, "{error}");
    assert!(
        matches!(lab.cloud.call(assign(Want::Addresses(9))).await, Ok(CloudReply::Assigned(new)) if new.len() == 9)
    );
    let error = lab.cloud.call(lab.creation(Want::Addresses(3), "a")).await.unwrap_err();
    assert_eq!(error.kind, Kind::SubnetEmpty, "{error}");
}

#[tokio::test]
async fn a_quota_of_the_account_is_told_from_a_limit_of_the_instance() {
    let lab = lab(Options { max_enis: 1, ..instant() }, "10.0.0.0/24", 0).await;
    let error = lab.cloud.call(lab.creation(Want::Addresses(1), "q")).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::AccountFull, "NetworkInterfaceLimitExceeded"), "{error}");
}

/// The call happened, its answer did not arrive: the error says so, nothing is repeated, and reading back finds it.
#[tokio::test]
async fn after_a_lost_reply_the_truth_can_be_read() {
    let lab = lab(instant(), "10.0.0.0/24", 0).await;
    let eni = lab.primary().await;
    let assign = CloudRequest::Assign { eni: eni.clone(), want: Want::Addresses(2) };
    for (fault, code, held) in [(Fault::BrokenConnection, "Connection", 2), (Fault::LostReply, "InternalError", 4)] {
        lab.fail_next("AssignPrivateIpAddresses", fault);
        let error = lab.cloud.call(assign.clone()).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, code), "{error}");
        assert!(error.kind.outcome_unknown());
        let CloudReply::Eni(view) = lab.cloud.call(CloudRequest::DescribeEni { eni: eni.clone() }).await.unwrap()
        else {
            panic!("not an ENI")
        };
        assert_eq!(view.slots.len(), held);
    }

    lab.fail_next("CreateNetworkInterface", Fault::BrokenConnection);
    lab.cloud.call(lab.creation(Want::Addresses(1), "same")).await.unwrap_err();
    let CloudReply::Created(created) = lab.cloud.call(lab.creation(Want::Addresses(1), "same")).await.unwrap() else {
        panic!()
    };
    let held = lab.ec2.view(wall_clock()).enis.len();
    assert_eq!(held, 2, "the repeated create found {} and made no other", created.id);

    lab.fail_next("AssignPrivateIpAddresses", Fault::Delay { ms: 20_000 });
    let error = lab.cloud.call(assign).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Timeout"), "{error}");
}

#[tokio::test]
async fn throttling_reaches_the_pool_at_once_for_mutations_and_late_for_reads() {
    let lab = lab(instant(), "10.0.0.0/24", 0).await;
    let eni = lab.primary().await;
    let empty = Bucket { burst: 0, per_second: 0 };
    let nothing = Buckets { non_mutating: empty, unfiltered: empty, mutating: empty, actions: BTreeMap::new() };
    lab.ec2.set_throttle(Some(nothing));
    let before = lab.ec2.calls();
    let assign = CloudRequest::Assign { eni: eni.clone(), want: Want::Addresses(1) };
    let error = lab.cloud.call(assign).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Throttled, "RequestLimitExceeded"), "{error}");
    let error = lab.cloud.call(CloudRequest::DescribeEni { eni }).await.unwrap_err();
    assert_eq!(error.kind, Kind::Throttled, "{error}");
    let tried = |action: &str| {
        let errors = |calls: &BTreeMap<String, lab_ec2::CallCount>| calls.get(action).map_or(0, |count| count.errors);
        errors(&lab.ec2.calls()) - errors(&before)
    };
    assert_eq!((tried("AssignPrivateIpAddresses"), tried("DescribeNetworkInterfaces")), (1, 3));
}
