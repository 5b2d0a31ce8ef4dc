//! Pods with addresses of both families, and with IPv6 only.

use super::*;
use crate::families::{EGRESS, Families};

const DUAL: (&str, &str) = ("ENABLE_IPv6", "true");
const NO_V4: (&str, &str) = ("ENABLE_IPv4", "false");

fn prefix_of(world: &World, eni: &EniId) -> Ipv6Net {
    let slots = &world.enis[eni].slots;
    slots.iter().find_map(|slot| if let IpNet::V6(net) = slot { Some(*net) } else { None }).expect("it has a /80")
}

#[test]
fn a_dual_stack_pod_has_an_address_of_each_family_of_one_eni() {
    let mut w = World::new("m5.large", &[DUAL, ("MINIMUM_IP_TARGET", "12")], &[]);
    w.step(Event::Tick);
    w.run(2_000);
    let requests: Vec<RequestId> = (0..12).map(|n| w.add(n)).collect();
    w.run(5_000);
    let mut seconds = BTreeSet::new();
    let mut enis = BTreeSet::new();
    for request in requests {
        let pod = w.added(request);
        let second = pod.second.expect("a second address");
        assert_eq!(Families::Dual.first(prefix_of(&w, &pod.eni), second), Some(pod.address), "of the pod's own ENI");
        seconds.insert(second);
        enis.insert(pod.eni);
    }
    assert_eq!((seconds.len(), enis.len()), (12, 2));
    let asked = w.calls.iter().filter(|call| *call == "AssignIpv6Addresses").count();
    assert_eq!(asked, 1, "the primary's; a new ENI comes with its own: {:?}", w.calls);
    // EC2, ledger and kernel agree, second addresses and all.
    let audit = w.request();
    w.step(Event::Audit { request: audit });
    w.run(1_000);
    assert!(matches!(&w.answers[&audit], Answer::Audited(report) if report.is_clean()), "{:?}", w.answers[&audit]);
    // After a restart everybody has what they had.
    let before = w.pool.ledger().pods.clone();
    w.restart();
    assert_eq!(w.pool.ledger().pods, before);
}

#[test]
fn what_the_metadata_shows_at_the_first_boot_needs_no_call() {
    let mut w = World::new("m5.large", &[DUAL], &["10.0.16.0/28", "2600:1f13:0:1:2::/80"]);
    w.step(Event::Tick);
    let request = w.add(1);
    assert_eq!(w.added(request).second.unwrap().to_string(), "2600:1f13:0:1:2:0:a00:1000");
    assert!(!w.calls.iter().any(|call| call == "AssignIpv6Addresses"), "{:?}", w.calls);
}

#[test]
fn without_a_slash_80_a_dual_stack_pod_waits_and_is_told_why() {
    let mut w = World::new("m5.large", &[DUAL], &["10.0.16.0/28"]);
    w.faults = vec![("AssignIpv6Addresses", CloudErrorKind::Denied, "UnauthorizedOperation")];
    w.step(Event::Tick);
    w.run(2_000);
    let request = w.request();
    let pod = PodName::default();
    w.step(Event::Add { request, sandbox: sandbox(1), pod, patience_ms: Some(3_000) });
    w.run(4_000);
    let failure = w.failure(request);
    assert_eq!(failure.reason, Reason::Denied);
    assert!(failure.message.contains("ec2:AssignIpv6Addresses"), "{}", failure.message);
    w.run(20_000);
    let request = w.add(2);
    assert!(w.added(request).second.is_some(), "tried again, and then given");
}

#[test]
fn a_lost_answer_is_read_back_and_no_second_prefix_is_asked_for() {
    let mut w = World::new("m5.large", &[DUAL], &["10.0.16.0/28"]);
    w.lose = vec!["AssignIpv6Addresses"];
    w.step(Event::Tick);
    w.run(10_000);
    let primary = EniId::new("eni-primary").unwrap();
    assert_eq!(w.enis[&primary].slots.iter().filter(|slot| matches!(slot, IpNet::V6(_))).count(), 1);
    let request = w.add(1);
    assert!(w.added(request).second.is_some());
}

#[test]
fn a_prefix_lost_under_a_pod_is_given_back_by_name_and_serves_nobody_new_meanwhile() {
    let mut w = World::new("m5.large", &[DUAL, ("MAX_ENI", "1")], &["10.0.16.0/28"]);
    w.step(Event::Tick);
    w.run(2_000);
    let primary = EniId::new("eni-primary").unwrap();
    let request = w.add(1);
    let second = w.added(request).second.unwrap();
    let prefix = IpNet::V6(prefix_of(&w, &primary));
    w.enis.get_mut(&primary).unwrap().slots.remove(&prefix);
    let audit = w.request();
    w.step(Event::Audit { request: audit });
    w.run(1_000);
    let late = w.add(2);
    assert!(!w.answers.contains_key(&late), "no pod is placed on a /80 that EC2 does not show");
    w.run(200_000);
    assert!(w.enis[&primary].slots.contains(&prefix), "the same one: {:?}", w.enis[&primary].slots);
    let request = w.add(3);
    let third = w.added(request).second.unwrap();
    assert!(prefix.contains(&third) && third != second);
}

#[test]
fn a_pod_with_ipv6_only_has_one_of_the_primarys_slash_80_and_a_way_to_ipv4() {
    let mut w = World::new("m5.large", &[DUAL, NO_V4], &["10.0.16.0/28"]);
    w.step(Event::Tick);
    w.run(2_000);
    let primary = EniId::new("eni-primary").unwrap();
    let prefix = IpNet::V6(prefix_of(&w, &primary));
    let requests: Vec<RequestId> = (0..40).map(|n| w.add(n)).collect();
    for request in requests {
        let pod = w.added(request);
        assert!(prefix.contains(&pod.address) && pod.eni == primary, "{pod:?}");
        assert!(matches!(pod.second, Some(IpAddr::V4(v4)) if EGRESS.contains(&v4)), "{pod:?}");
    }
    w.distinct();
    // More pods than IPv4 has room for, and nothing but the one /80 was asked for.
    let asked: Vec<_> =
        w.calls.iter().filter(|call| call.starts_with("Assign") || call.starts_with("Create")).collect();
    assert_eq!(asked, ["AssignIpv6Addresses"]);
    let freed = w.pool.ledger().pods[&sandbox(0)].address;
    w.del(0);
    let request = w.add(100);
    assert_ne!(w.added(request).address, freed, "it cools");
    w.run(400_000);
    assert!(w.enis[&primary].slots.contains(&prefix) && w.enis[&primary].slots.len() == 2, "nothing is given back");
    let status = w.pool.status(w.now);
    assert_eq!((status.counts.assigned, status.failure), (40, None));
}

#[test]
fn a_node_of_ipv4_pods_knows_nothing_of_ipv6() {
    let mut w = World::new("m5.large", &[], &["10.0.16.0/28", "2600:1f13:0:1:2::/80"]);
    w.step(Event::Tick);
    w.run(2_000);
    let request = w.add(1);
    assert_eq!(w.added(request).second, None);
    assert!(w.pool.ledger().slots.values().flatten().all(|slot| matches!(slot, IpNet::V4(_))));
}
