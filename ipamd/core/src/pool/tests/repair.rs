//! Restart, repair, audit and explain: three views that disagree, and what is done about it.

use super::*;
use crate::audit::FindingKind;
use crate::naming::{host_if_name, host_mac_of};

fn audit(w: &mut World) -> crate::audit::AuditReport {
    let request = w.request();
    w.step(Event::Audit { request });
    w.run(30_000);
    match w.answers.get(&request) {
        Some(Answer::Audited(report)) => report.clone(),
        other => panic!("no audit: {other:?}"),
    }
}

fn texts(explanation: &Explanation) -> String {
    explanation.lines.iter().map(|line| format!("{}\n", line.text)).collect()
}

fn named(n: u32) -> PodName {
    PodName { namespace: "shop".into(), name: format!("cart-{n}") }
}

impl World {
    fn add_named(&mut self, n: u32) -> RequestId {
        let request = self.request();
        self.step(Event::Add { request, sandbox: sandbox(n), pod: named(n), patience_ms: None });
        request
    }
}

#[test]
fn a_quiet_node_audits_clean() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    let request = w.add(1);
    w.added(request);
    let report = audit(&mut w);
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn an_audit_asked_while_others_read_has_readings_of_its_own() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    w.run(1_000);
    let (first, second) = (w.request(), w.request());
    let under_way = w.pool.step(Event::Audit { request: first }, w.now);
    w.now = w.now.plus_ms(10);
    w.step(Event::Audit { request: second });
    for command in under_way {
        match command {
            Command::Cloud { op, request } => {
                let result = w.cloud(request);
                w.step(Event::Cloud { op, result });
            }
            Command::Kernel { op, plan, .. } => {
                let result = Ok((w.kernel(&plan), w.pods_seen()));
                w.step(Event::Kernel { op, result });
            }
            _ => {}
        }
    }
    w.run(1_000);
    for request in [first, second] {
        let answer = w.answers.get(&request);
        assert!(matches!(answer, Some(Answer::Audited(report)) if report.is_clean()), "{answer:?}");
    }
}

#[test]
fn an_audit_without_ec2_says_so_and_is_not_clean() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    w.faults.extend((0..500).map(|_| ("DescribeNetworkInterfaces", CloudErrorKind::Transient, "Timeout")));
    let report = audit(&mut w);
    assert_eq!(report.cloud_read_at, None);
    assert!(!report.is_clean() && report.kernel_read_at.is_some());
}

#[test]
fn every_difference_is_found_and_named() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    let request = w.add_named(1);
    let address = w.added(request).address;
    w.run(1_000);
    w.unplugged.insert(sandbox(1));
    w.pod_routes.insert(if address.to_string() == "10.0.3.1" { "10.0.3.2" } else { "10.0.3.1" }.parse().unwrap());
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().slots.clear();
    let kinds: BTreeSet<FindingKind> = audit(&mut w).findings.into_iter().map(|finding| finding.kind).collect();
    for kind in [FindingKind::PodNotWired, FindingKind::RouteWithoutPod, FindingKind::PodAddressNotInCloud] {
        assert!(kinds.contains(&kind), "{kind:?} in {kinds:?}");
    }
}

#[test]
fn a_sandbox_whose_namespace_is_gone_is_released_after_grace_and_a_second_look() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let request = w.add_named(1);
    w.added(request);
    w.run(1_000);
    w.unplugged.insert(sandbox(1));
    w.run(pods::UNWIRED_GRACE_MS - 20_000);
    assert_eq!(w.pool.ledger().pods.len(), 1, "it may still be being wired");
    w.run(90_000);
    assert_eq!(w.pool.ledger().pods.len(), 0);
    assert!(w.notes.iter().any(|note| matches!(note, Note::SandboxGone { .. })));
}

#[test]
fn a_dead_sandbox_is_released_while_the_next_one_of_its_pod_waits_under_its_name() {
    for (whose, left) in [(sandbox(2), 0), (sandbox(1), 1)] {
        let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
        w.step(Event::Tick);
        let request = w.add_named(1);
        let pod = w.added(request).pod;
        w.unplugged.insert(sandbox(1));
        // Its own link, taken down, keeps it; the next sandbox's, which is not up yet, does not.
        w.down.insert(host_if_name("eni", &pod.namespace, &pod.name, 0), host_mac_of(&whose));
        w.run(pods::UNWIRED_GRACE_MS + 90_000);
        assert_eq!(w.pool.ledger().pods.len(), left, "the link of {whose}");
        let told = audit(&mut w).findings.iter().any(|finding| finding.text.contains("has its link"));
        assert_eq!(told, left == 1);
    }
}

#[test]
fn a_slot_lost_under_a_running_pod_is_assigned_again_by_name() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let request = w.add(1);
    let address = w.added(request).address;
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().slots.remove(&IpNet::from(address));
    assert!(!audit(&mut w).is_clean());
    w.run(300_000);
    assert!(w.enis.values().any(|eni| eni.slots.contains(&IpNet::from(address))), "EC2 routes it here again");
    assert!(audit(&mut w).is_clean());
    assert!(w.notes.iter().any(|note| matches!(note, Note::Reconciled { .. })), "not in silence");
}

#[test]
fn a_slot_lost_on_a_node_that_never_restarted_is_noticed_by_the_metadata() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let request = w.add(1);
    let slot = IpNet::from(w.added(request).address);
    w.run(READINGS_LAG_MS);
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().slots.remove(&slot);
    w.run(300_000);
    assert!(w.enis.values().any(|eni| eni.slots.contains(&slot)), "EC2 routes it here again");
}

#[test]
fn a_node_that_never_restarted_asks_ec2_all_the_same() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    w.calls.clear();
    w.run(VERIFY_EVERY_MS + 1_000);
    assert!(w.calls.iter().any(|call| call == "DescribeNetworkInterfaces"), "{:?}", w.calls);
}

#[test]
fn what_ec2_no_longer_shows_is_believed_after_two_readings_and_only_without_pods() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().slots.remove(&"10.0.3.2/32".parse().unwrap());
    let report = audit(&mut w);
    assert_eq!(report.findings.len(), 1, "{report:?}");
    let held = |w: &World| w.pool.ledger().slots.values().flatten().any(|s| s.to_string() == "10.0.3.2/32");
    assert!(held(&w), "one reading is not enough to forget");
    w.run(200_000);
    assert!(!held(&w));
    assert!(audit(&mut w).is_clean());
}

#[test]
fn pods_of_another_ipam_are_taken_over_and_none_is_dropped() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    let imported = |n: u32, address: &str| ImportedPod {
        sandbox: sandbox(n),
        pod: named(n),
        address: address.parse().unwrap(),
        at: Time(5),
    };
    w.step(Event::Import(vec![imported(1, "10.0.3.1"), imported(2, "10.0.99.9")]));
    assert_eq!(w.pool.ledger().pods.len(), 2, "the one no ENI shows is kept as an orphan");
    let request = w.add(3);
    w.run(1_000);
    assert_ne!(w.added(request).address.to_string(), "10.0.3.1");
    let kinds: Vec<FindingKind> = audit(&mut w).findings.into_iter().map(|finding| finding.kind).collect();
    assert!(kinds.contains(&FindingKind::PodAddressNotHeld), "{kinds:?}");
}

#[test]
fn new_enis_go_to_the_tagged_subnet_with_most_room_and_never_to_an_excluded_one() {
    let mut w = World::new("m5.large", &[], &[]);
    w.subnets = vec![
        subnet("subnet-a", 100, &[("kubernetes.io/role/cni", "0")]),
        subnet("subnet-b", 50, &[("kubernetes.io/role/cni", "1")]),
        subnet("subnet-c", 500, &[("kubernetes.io/role/cni", "1")]),
        subnet("subnet-d", 9_000, &[]),
    ];
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(5_000);
    let allocation = w.added(request);
    assert_eq!(w.enis[&allocation.eni].subnet.as_str(), "subnet-c");
}

#[test]
fn an_empty_subnet_gives_way_to_its_sibling() {
    let mut w = World::new("m5.large", &[], &[]);
    w.subnets = vec![subnet("subnet-a", 100, &[]), subnet("subnet-b", 50, &[("kubernetes.io/role/cni", "1")])];
    let empty = ("AssignPrivateIpAddresses", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet");
    w.faults.extend((0..4).map(|_| empty));
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(5_000);
    let allocation = w.added(request);
    assert_eq!(w.enis[&allocation.eni].subnet.as_str(), "subnet-b");
}

#[test]
fn a_subnet_with_less_than_was_asked_for_gives_what_it_has() {
    let mut w = World::new("m5.4xlarge", &[("WARM_ENI_TARGET", "1")], &[]);
    let empty = ("AssignPrivateIpAddresses", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet");
    w.faults.extend((0..3).map(|_| empty));
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(5_000);
    w.added(request);
    assert!(w.notes.iter().any(|note| matches!(note, Note::AskedTooMuch { .. })));
}

#[test]
fn custom_networking_uses_the_eni_config_and_never_the_primary() {
    let vars = [("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")];
    let mut w = World::new("m5.large", &vars, &["10.0.3.1/32"]);
    w.subnets.push(subnet("subnet-pods", 500, &[]));
    w.step(Event::Tick);
    let refused = w.add(1);
    w.run(DEFAULT_PATIENCE_MS + 1_000);
    let failure = w.failure(refused);
    assert!(failure.message.contains("ENIConfig"), "{}", failure.message);
    let config = EniConfig {
        subnet: SubnetId::new("subnet-pods").unwrap(),
        security_groups: vec![SecurityGroupId::new("sg-pods").unwrap()],
    };
    w.step(Event::NodeState(NodeState { eni_config: Some(config), ..NodeState::default() }));
    let request = w.add(2);
    w.run(5_000);
    let allocation = w.added(request);
    let eni = &w.enis[&allocation.eni];
    assert_eq!((eni.subnet.as_str(), eni.security_groups[0].as_str()), ("subnet-pods", "sg-pods"));
    assert_ne!(allocation.device, DeviceIndex::PRIMARY);
}

#[test]
fn groups_of_the_node_are_followed_on_enis_we_made_and_on_no_others() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..12).map(|n| w.add(n)).collect();
    w.run(5_000);
    requests.into_iter().for_each(|request| drop(w.added(request)));
    let theirs = EniView {
        id: EniId::new("eni-theirs").unwrap(),
        device: DeviceIndex(5),
        mac: "02:00:00:00:00:77".parse().unwrap(),
        slots: BTreeSet::new(),
        security_groups: vec![SecurityGroupId::new("sg-theirs").unwrap()],
        ..w.enis[&EniId::new("eni-primary").unwrap()].clone()
    };
    w.enis.insert(theirs.id.clone(), theirs);
    let new = SecurityGroupId::new("sg-new").unwrap();
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().security_groups = vec![new.clone()];
    w.run(3 * METADATA_EVERY_MS);
    for eni in w.enis.values().filter(|eni| eni.id.as_str() != "eni-theirs") {
        assert_eq!(eni.security_groups, std::slice::from_ref(&new), "{}", eni.id);
    }
    assert_eq!(w.enis[&EniId::new("eni-theirs").unwrap()].security_groups[0].as_str(), "sg-theirs");
}

#[test]
fn a_node_that_is_cordoned_takes_only_what_waiting_pods_need() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "5")], &["10.0.3.1/32"]);
    w.step(Event::NodeState(NodeState { unschedulable: true, ..NodeState::default() }));
    w.run(60_000);
    assert_eq!(w.pool.ledger().slots.values().flatten().count(), 1, "nothing is warmed for nobody");
    let requests = [w.add(1), w.add(2)];
    w.run(5_000);
    requests.into_iter().for_each(|request| drop(w.added(request)));
}

#[test]
fn scheduled_pods_are_demand_before_they_ask() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::NodeState(NodeState { scheduled_pods: Some(20), ..NodeState::default() }));
    w.run(10_000);
    assert!(w.pool.ledger().slots.values().flatten().count() >= 20);
    let calls = w.calls.len();
    let requests: Vec<_> = (0..20).map(|n| w.add(n)).collect();
    requests.into_iter().for_each(|request| drop(w.added(request)));
    assert!(!w.calls[calls..].iter().any(|call| call == "CreateNetworkInterface"), "they were ready");
}

#[test]
fn explain_says_why_from_what_was_recorded() {
    let mut w = World::new("m5.large", &[], &[]);
    let empty = ("AssignPrivateIpAddresses", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet");
    w.faults.extend((0..40).map(|_| empty));
    let empty = ("CreateNetworkInterface", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet");
    w.faults.extend((0..40).map(|_| empty));
    w.step(Event::Tick);
    let request = w.add_named(1);
    w.run(DEFAULT_PATIENCE_MS + 1_000);
    let failure = w.failure(request);
    assert!(failure.message.contains("subnet-a has no free address"), "{}", failure.message);
    assert!(failure.message.contains("60000 free by EC2's count"), "{}", failure.message);
    let why = texts(&w.pool.explain(&Question::Pod(named(1)), w.now));
    assert!(why.contains("subnet-a has no free address"), "{why}");
    w.faults.clear();
    w.run(300_000);
    let request = w.add_named(2);
    w.run(20_000);
    let allocation = w.added(request);
    let why = texts(&w.pool.explain(&Question::Pod(named(2)), w.now));
    assert!(why.contains(&allocation.address.to_string()) && why.contains("gained"), "{why}");
    let why = texts(&w.pool.explain(&Question::Eni(allocation.eni.clone()), w.now));
    assert!(why.contains("in service"), "{why}");
    let why = texts(&w.pool.explain(&Question::Target, w.now));
    assert!(why.contains("demand: 1 pods"), "{why}");
    let unknown = Question::Address("192.0.2.1".parse().unwrap());
    assert!(texts(&w.pool.explain(&unknown, w.now)).contains("in no slot of this node"));
}
