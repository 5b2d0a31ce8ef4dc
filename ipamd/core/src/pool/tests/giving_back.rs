//! Giving back: what goes, behind which fences, and what a crash, a lost answer or a refusal in between leaves.

use std::sync::Arc;

use super::*;
use crate::ledger::{EniRecord, Progress};
use crate::release::{ENI_IDLE_MS, SLOT_IDLE_MS};

const LONG: u64 = 3 * ENI_IDLE_MS;

/// A node that served a burst on its primary and one more ENI, and whose pods are all gone but one.
fn after_a_burst(vars: &[(&str, &str)]) -> World {
    let mut w = World::new("m5.large", vars, &[]);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..14).map(|n| w.add(n)).collect();
    w.run(5_000);
    requests.into_iter().for_each(|request| drop(w.added(request)));
    for n in 1..14 {
        w.del(n);
    }
    w
}

fn held(w: &World) -> usize {
    w.pool.ledger().slots.values().map(BTreeSet::len).sum()
}

fn in_ec2(w: &World) -> usize {
    w.enis.values().map(|eni| eni.slots.len()).sum()
}

fn count(w: &World, action: &str) -> usize {
    w.calls.iter().filter(|call| *call == action).count()
}

#[test]
fn what_idles_beyond_the_target_goes_back_and_the_eni_with_it() {
    let mut w = after_a_burst(&[]);
    assert!(held(&w) >= 16);
    w.run(LONG);
    assert_eq!(w.enis.len(), 1, "the second ENI was detached and deleted");
    assert!(held(&w) <= 12, "a batch more than the goal of 8 may stay: {}", held(&w));
    assert_eq!(held(&w), in_ec2(&w));
    let calls = w.calls.len();
    w.run(4 * LONG);
    let quiet = |call: &&String| matches!(call.as_str(), "ImdsRead" | "DescribeNetworkInterfaces");
    let more: Vec<&String> = w.calls[calls..].iter().filter(|call| !quiet(call)).collect();
    assert_eq!(more, Vec::<&String>::new(), "at rest nothing changes in EC2");
}

#[test]
fn an_eni_is_forgotten_although_a_pod_has_one_of_its_addresses_from_another() {
    let mut w = after_a_burst(&[("MINIMUM_IP_TARGET", "14")]);
    let primary = EniId::new("eni-primary").unwrap();
    let taken = w.enis.keys().find(|id| **id != primary).cloned().unwrap();
    let moved = *w.enis[&taken].slots.first().unwrap();
    w.enis.remove(&taken);
    w.enis.get_mut(&primary).unwrap().slots.insert(moved);
    w.run(120_000);
    let lives = |w: &World| w.pool.ledger().pods.values().any(|a| IpNet::from(a.address) == moved && a.eni == primary);
    let mut number = 20;
    while !lives(&w) {
        let request = w.add(number);
        w.run(1_000);
        w.added(request);
        number += 1;
    }
    w.run(LONG);
    assert!(lives(&w) && !w.pool.ledger().enis.contains_key(&taken), "{:?}", w.pool.ledger().enis.keys());
}

#[test]
fn the_add_ons_whole_eni_target_gives_back_whole_enis_only() {
    let mut w = after_a_burst(&[("WARM_ENI_TARGET", "0")]);
    w.run(LONG);
    assert_eq!((w.enis.len(), count(&w, "UnassignPrivateIpAddresses")), (1, 0));
}

#[test]
fn nothing_goes_back_while_an_operator_or_the_node_says_so() {
    let level = |level| NodeState { level, ..NodeState::default() };
    let cordoned = NodeState { unschedulable: true, ..NodeState::default() };
    for state in [level(Level::NoRelease), level(Level::NoCloud), cordoned] {
        let mut w = after_a_burst(&[]);
        w.step(Event::NodeState(state.clone()));
        let (before, calls) = (in_ec2(&w), w.calls.len());
        w.run(LONG);
        assert_eq!(in_ec2(&w), before, "{state:?}");
        let ec2 = w.calls[calls..].iter().filter(|call| *call != "ImdsRead").count();
        assert!(state.level != Level::NoCloud || ec2 == 0, "no-cloud calls nobody");
        w.step(Event::NodeState(NodeState::default()));
        w.run(LONG);
        assert!(in_ec2(&w) < before, "lifted: {state:?}");
    }
}

#[test]
fn a_slot_with_a_pod_route_is_never_given_back_although_no_sandbox_is_known() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32", "10.0.3.3/32"]);
    w.pod_routes.insert("10.0.3.2".parse().unwrap());
    w.step(Event::Tick);
    w.run(LONG);
    assert!(count(&w, "UnassignPrivateIpAddresses") > 0);
    let left: Vec<String> = w.enis.values().flat_map(|e| e.slots.iter().map(ToString::to_string)).collect();
    assert!(left.contains(&"10.0.3.2/32".to_owned()), "{left:?}");
}

/// Runs until something is fenced: the record is written, EC2 not called. Its slots, and the reading of the kernel that is due.
fn up_to_the_fence(w: &mut World) -> (BTreeSet<IpNet>, OpId, Arc<NodePlan>) {
    loop {
        let (at, _) = w.pool.poll_deadline().unwrap();
        w.now = w.now.max(at);
        let commands = w.pool.step(Event::Tick, w.now);
        let fenced = commands.iter().find_map(|command| match command {
            Command::Persist(records) => records.iter().find_map(|record| match record {
                Record::Releasing { slots, .. } => Some(slots.clone()),
                _ => None,
            }),
            _ => None,
        });
        let kernel = commands.iter().find_map(|command| match command {
            Command::Kernel { op, plan, .. } => Some((*op, plan.clone())),
            _ => None,
        });
        for command in commands {
            if let Command::Cloud { op, request } = command {
                let result = w.cloud(request);
                w.step(Event::Cloud { op, result });
            }
        }
        match (fenced, kernel) {
            (Some(slots), Some((op, plan))) => return (slots, op, plan),
            (_, Some((op, plan))) => {
                let result = Ok((w.kernel(&plan), w.pods_seen()));
                w.step(Event::Kernel { op, result });
            }
            _ => {}
        }
    }
}

#[test]
fn a_route_that_appears_behind_the_fence_calls_the_release_off() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    let (slots, op, plan) = up_to_the_fence(&mut w);
    w.pod_routes.insert(slots.first().unwrap().network());
    let result = Ok((w.kernel(&plan), w.pods_seen()));
    w.step(Event::Kernel { op, result });
    w.run(2 * SLOT_IDLE_MS);
    assert_eq!(count(&w, "UnassignPrivateIpAddresses"), 0);
    assert!(w.notes.iter().any(|note| matches!(note, Note::Kept { .. })), "said so: {slots:?}");
    assert!(w.pool.ledger().releasing.is_empty());
}

#[test]
fn what_is_about_to_go_serves_before_a_cool_down_is_cut() {
    // All that the instance can have, so that nothing else can come; one of it cools for as long as this takes.
    let slots: Vec<String> = (1..10).map(|n| format!("10.0.3.{n}/32")).collect();
    let slots: Vec<&str> = slots.iter().map(String::as_str).collect();
    let vars = [("WARM_IP_TARGET", "1"), ("MAX_ENI", "1"), ("IP_COOLDOWN_PERIOD", "36000")];
    let mut w = World::new("m5.large", &vars, &slots);
    w.step(Event::Tick);
    let first = w.add(0);
    w.added(first);
    w.del(0);
    let (going, ..) = up_to_the_fence(&mut w);
    let rested = u32::try_from(slots.len() - going.len()).unwrap() - 1;
    let given: Vec<_> = (1..=rested).map(|n| w.add(n)).collect();
    given.into_iter().for_each(|request| drop(w.added(request)));
    let last = w.add(rested + 1);
    let address = IpNet::from(w.added(last).address);
    assert!(going.contains(&address), "{address} was cooling, and could have stayed: {going:?}");
    assert!(!w.notes.iter().any(|note| matches!(note, Note::CooldownYielded { .. })));
}

#[test]
fn a_lost_answer_to_unassign_keeps_the_fence_until_ec2_has_spoken() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.lose.push("UnassignPrivateIpAddresses");
    w.step(Event::Tick);
    w.run(LONG);
    assert_eq!((held(&w), in_ec2(&w)), (1, 1));
    assert!(w.pool.ledger().releasing.is_empty());
}

#[test]
fn a_restart_in_the_middle_of_a_release_hands_nothing_out_from_it() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    // The answer never comes and the daemon dies; EC2 has carried it out.
    w.lose.push("UnassignPrivateIpAddresses");
    w.faults.extend((0..200).map(|_| ("DescribeNetworkInterfaces", CloudErrorKind::Transient, "Timeout")));
    w.run(2 * SLOT_IDLE_MS);
    assert_eq!(in_ec2(&w), 1);
    w.restart();
    let (a, b) = (w.add(1), w.add(2));
    w.run(DEFAULT_PATIENCE_MS + 1_000);
    let routed: BTreeSet<IpAddr> = w.enis.values().flat_map(|e| e.slots.iter().map(IpNet::network)).collect();
    for request in [a, b] {
        if let Some(Answer::Added(allocation)) = w.answers.get(&request) {
            assert!(routed.contains(&allocation.address), "{} is not on the ENI any more", allocation.address);
        }
    }
}

#[test]
fn a_refused_release_is_called_off_and_not_repeated_hot() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.faults.extend((0..50).map(|_| ("UnassignPrivateIpAddresses", CloudErrorKind::Denied, "UnauthorizedOperation")));
    w.step(Event::Tick);
    w.run(600_000);
    assert!(w.pool.ledger().releasing.is_empty(), "what EC2 will not take back stays in use");
    assert!(count(&w, "UnassignPrivateIpAddresses") < 20, "{}", count(&w, "UnassignPrivateIpAddresses"));
}

#[test]
fn a_reading_that_lags_does_not_bring_back_what_was_given_up() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    w.run(2 * SLOT_IDLE_MS);
    assert_eq!(held(&w), 1);
    let gone: IpNet = w.pool.ledger().given_up.keys().next().copied().unwrap();
    // EC2's replica and IMDS still show it.
    w.enis.get_mut(&EniId::new("eni-primary").unwrap()).unwrap().slots.insert(gone);
    w.restart();
    w.run(60_000);
    assert_eq!(held(&w), 1, "not on the word of a reading");
    w.run(2 * READINGS_LAG_MS);
    assert!(w.notes.iter().any(|n| matches!(n, Note::Gained { slots, .. } if slots.contains(&gone))), "but for ever");
}

#[test]
fn a_node_that_fell_back_to_singles_returns_to_prefixes() {
    let mut w = World::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true")], &[]);
    w.faults.push(("AssignPrivateIpAddresses", CloudErrorKind::Fragmented, "InsufficientCidrBlocks"));
    w.step(Event::Tick);
    w.run(1_000);
    let request = w.add(1);
    w.run(1_000);
    w.added(request);
    let singles = |w: &World| w.pool.ledger().slots.values().flatten().filter(|slot| slot.prefix_len() == 32).count();
    assert!(singles(&w) > 0);
    w.del(1);
    w.run(2 * LONG);
    assert_eq!(singles(&w), 0, "prefixes came back and the single addresses went");
    assert!(w.pool.ledger().slots.values().flatten().any(|slot| slot.prefix_len() == 28));
}

#[test]
fn a_node_full_of_idle_singles_makes_room_for_a_prefix() {
    let vars = [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1"), ("MAX_ENI", "1")];
    let mut w = World::new("m5.large", &vars, &[]);
    w.faults.push(("AssignPrivateIpAddresses", CloudErrorKind::Fragmented, "InsufficientCidrBlocks"));
    w.step(Event::Tick);
    w.run(1_000);
    let of = |w: &World, len| w.pool.ledger().slots.values().flatten().filter(|slot| slot.prefix_len() == len).count();
    assert_eq!((of(&w, 32), of(&w, 28)), (9, 0), "the one ENI is full of single addresses");
    w.run(2 * LONG);
    assert_eq!((of(&w, 32), of(&w, 28)), (0, 1), "as if there had been no shortage");
}

#[test]
fn leaked_enis_are_marked_first_and_deleted_later_and_only_ours() {
    let mut w = World::new("m5.large", &[("CLUSTER_NAME", "c1")], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let stray = |id: &str, tags: &[(&str, &str)], description: &str| EniView {
        id: EniId::new(id).unwrap(),
        attachment: None,
        status: EniStatus::Available,
        description: description.to_owned(),
        tags: tags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..w.enis[&EniId::new("eni-primary").unwrap()].clone()
    };
    let made = ("node.k8s.amazonaws.com/instance_id", "i-dead");
    let marked = ("node.k8s.amazonaws.com/collector", "i-9 1000");
    let strays = [
        stray("eni-leaked", &[made], "aws-K8S-i-dead"),
        stray("eni-marked", &[made, marked], "aws-K8S-i-dead"),
        stray("eni-terraform", &[], "bastion"),
    ];
    w.enis.extend(strays.map(|eni| (eni.id.clone(), eni)));
    w.run(600_000 + 3_600_000 + 60_000);
    let tags = |w: &World, id: &str| w.enis[&EniId::new(id).unwrap()].tags.clone();
    assert!(tags(&w, "eni-leaked").contains_key("node.k8s.amazonaws.com/collector"), "marked, not yet deleted");
    assert_eq!(tags(&w, "eni-marked")["node.k8s.amazonaws.com/collector"], "i-9 1000", "another node's, and fresh");
    w.run(3 * 3_600_000);
    let left: Vec<&str> = w.enis.keys().map(EniId::as_str).collect();
    assert_eq!(left, ["eni-primary", "eni-terraform"], "a mark too old to be anybody's is taken over");
}

#[test]
fn an_unattached_eni_whose_addresses_a_pod_uses_is_not_collected() {
    let mut w = World::new("m5.large", &[("CLUSTER_NAME", "c1")], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let lost = EniView {
        id: EniId::new("eni-lost").unwrap(),
        attachment: None,
        status: EniStatus::Available,
        description: "aws-K8S-i-1".to_owned(),
        tags: [("node.k8s.amazonaws.com/instance_id".to_owned(), "i-1".to_owned())].into(),
        slots: BTreeSet::from(["10.0.7.7/32".parse().unwrap()]),
        ..w.enis[&EniId::new("eni-primary").unwrap()].clone()
    };
    w.enis.insert(lost.id.clone(), lost.clone());
    w.pod_routes.insert("10.0.7.7".parse().unwrap());
    w.run(3 * 3_600_000);
    assert_eq!(w.enis.get(&lost.id), Some(&lost), "neither marked nor deleted");
    w.pod_routes.clear();
    w.calls.clear();
    w.run(5 * 3_600_000);
    assert!(!w.enis.contains_key(&lost.id));
}

/// As after an ENI was attached twice over its limit: EC2 says yes to a detachment before it has done it.
#[test]
fn an_eni_that_is_being_detached_keeps_its_place_until_it_is_deleted() {
    let mut w = after_a_burst(&[]);
    let before = w.pool.eni_room(w.now);
    let secondary = w.pool.ledger().enis.values().find(|eni| eni.device != DeviceIndex::PRIMARY).unwrap().clone();
    let (now, mut out) = (w.now, Out::default());
    let leaving = EniRecord { leaving: Some(now), progress: Progress::Created, ..secondary.clone() };
    w.pool.record(Record::Eni(leaving), &mut out);
    assert_eq!(w.pool.eni_room(now), before);
    let refused = |kind| CloudError {
        kind,
        action: "DeleteNetworkInterface".to_owned(),
        code: String::new(),
        message: String::new(),
        request_id: None,
    };
    let subject = || setback::Subject::Eni(secondary.id.clone());
    w.pool.set_back(subject(), String::new(), refused(CloudErrorKind::Busy), now, &mut out);
    assert_eq!(w.pool.eni_room(now), before, "it is still being detached");
    w.pool.set_back(subject(), String::new(), refused(CloudErrorKind::Denied), now, &mut out);
    assert_eq!(w.pool.eni_room(now), before + 1, "it hangs on nothing any more");
}

#[test]
fn a_slot_that_comes_back_is_served_only_after_the_kernel_was_told_again() {
    let mut w = after_a_burst(&[]);
    let offers = |w: &World, slot| w.pool.candidates(&BTreeMap::new()).iter().any(|candidate| candidate.slot == slot);
    let secondary = w.pool.ledger().enis.values().find(|eni| eni.device != DeviceIndex::PRIMARY).unwrap().id.clone();
    let slot = *w.pool.ledger().slots[&secondary].first().unwrap();
    assert!(offers(&w, slot));
    let (slots, now, mut out) = (BTreeSet::from([slot]), w.now, Out::default());
    w.pool.gave_up(&secondary, slots.clone(), now, &mut out);
    w.pool.gain(&secondary, slots, now, &mut out);
    assert!(!offers(&w, slot));
}
