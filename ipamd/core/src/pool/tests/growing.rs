//! Taking addresses, and giving them to pods.

use std::collections::BTreeSet;

use super::*;

#[test]
fn a_node_launched_with_prefixes_serves_110_pods_with_zero_ec2_calls() {
    let prefixes: Vec<String> = (0..8).map(|n| format!("10.0.2.{}/28", n * 16)).collect();
    let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    let mut w = World::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true")], &prefixes);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..110).map(|n| w.add(n)).collect();
    for request in requests {
        w.added(request);
    }
    w.distinct();
    assert_eq!(w.ec2_calls(), 0, "{:?}", w.calls);
}

#[test]
fn a_burst_on_an_empty_node_takes_few_calls_and_serves_everyone() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..20).map(|n| w.add(n)).collect();
    w.run(2_000);
    for request in requests {
        w.added(request);
    }
    w.distinct();
    // 9 slots on the primary; the rest on further ENIs with their addresses in the creating call.
    let enis = w.pool.ledger().enis.len();
    assert_eq!(enis, 3);
    let devices: BTreeSet<_> = w.pool.ledger().enis.values().map(|e| e.device.0).collect();
    assert_eq!(devices, [0, 1, 2].into());
    assert!(w.pool.ledger().enis.values().all(|e| e.progress == crate::ledger::Progress::Settled));
}

#[test]
fn no_address_is_served_before_its_enis_routes_stand() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &[]);
    w.links_hidden = true;
    w.step(Event::Tick);
    let requests: Vec<_> = (0..12).map(|n| w.add(n)).collect();
    w.run(3_000);
    let served = |w: &World| requests.iter().filter(|r| w.answers.contains_key(r)).count();
    assert_eq!(served(&w), 9, "only what the primary holds");
    let why = w.pool.why_no_address(w.now, w.now);
    assert_eq!(why.reason, Reason::Attaching);
    w.links_hidden = false;
    w.run(1_000);
    assert_eq!(served(&w), 12);
    w.distinct();
}

#[test]
fn the_same_sandbox_gets_the_same_address_and_deletes_any_number_of_times() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let (a, b) = (w.add(1), w.add(1));
    assert_eq!(w.added(a), w.added(b));
    let (d, e) = (w.del(1), w.del(1));
    assert!(matches!(w.answers[&d], Answer::Deleted(_)));
    assert_eq!(w.answers[&e], Answer::Unknown);
}

#[test]
fn a_restart_serves_from_the_ledger_before_ec2_answers_and_keeps_the_cool_down() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..12).map(|n| w.add(n)).collect();
    w.run(2_000);
    for request in &requests {
        w.added(*request);
    }
    let freed = w.added(requests[3]).address;
    w.del(3);
    let pods = w.pool.ledger().pods.clone();
    w.faults = vec![
        ("ImdsRead", CloudErrorKind::Transient, "Timeout"),
        ("DescribeNetworkInterfaces", CloudErrorKind::Transient, "Timeout"),
    ];
    w.restart();
    assert_eq!(w.pool.ledger().pods, pods);
    let next = w.add(40);
    let got = w.added(next).address;
    assert_ne!(got, freed, "a cooling address must rest across a restart");
    w.distinct();
    w.run(40_000);
    assert!(w.pool.status(w.now).enis.iter().all(|eni| eni.missing.is_empty()));
}

#[test]
fn a_lost_reply_to_assign_is_read_back_and_adopted_not_asked_twice() {
    let mut w = World::new("m5.large", &[], &[]);
    w.lose.push("AssignPrivateIpAddresses");
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(5_000);
    w.added(request);
    let asked = w.calls.iter().filter(|c| *c == "AssignPrivateIpAddresses").count();
    let held: usize = w.pool.ledger().slots.values().map(BTreeSet::len).sum();
    let true_slots: usize = w.enis.values().map(|e| e.slots.len()).sum();
    assert_eq!(held, true_slots, "everything EC2 gave is known");
    assert!(asked <= 2, "{:?}", w.calls);
}

#[test]
fn a_crash_between_create_and_attach_leaves_no_eni_behind() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "12")], &[]);
    w.lose.push("CreateNetworkInterface");
    w.step(Event::Tick);
    assert_eq!(w.enis.len(), 2, "EC2 made the ENI, the answer was lost");
    w.restart();
    w.run(60_000);
    let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) =
        (w.pool.ledger().enis.keys().cloned().collect(), w.enis.keys().cloned().collect());
    assert_eq!(ours, theirs);
    assert!(w.enis.values().all(|e| e.attachment.is_some()));
}

#[test]
fn what_the_journal_could_not_take_was_never_promised() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    let first = w.add(1);
    w.added(first);
    w.journal_broken = true;
    let second = w.add(2);
    assert!(!w.answers.contains_key(&second));
    assert_eq!(w.pool.ledger().pods.len(), 1);
    let deleted = w.del(1);
    assert!(!w.answers.contains_key(&deleted));
    assert_eq!(w.pool.ledger().pods.len(), 1, "a release that is not written has not happened");
    w.journal_broken = false;
    let third = w.add(3);
    w.added(third);
    assert_eq!(w.pool.ledger(), &LedgerState::replay(&w.journal));
}

#[test]
fn a_failure_names_its_cause() {
    let cases: [(&str, CloudErrorKind, &str, Reason); 5] = [
        (
            "AssignPrivateIpAddresses",
            CloudErrorKind::SubnetEmpty,
            "InsufficientFreeAddressesInSubnet",
            Reason::SubnetEmpty,
        ),
        ("AssignPrivateIpAddresses", CloudErrorKind::Throttled, "RequestLimitExceeded", Reason::Throttled),
        ("AssignPrivateIpAddresses", CloudErrorKind::Denied, "UnauthorizedOperation", Reason::Denied),
        ("AssignPrivateIpAddresses", CloudErrorKind::Transient, "InternalError", Reason::CloudUnavailable),
        ("CreateNetworkInterface", CloudErrorKind::AccountFull, "NetworkInterfaceLimitExceeded", Reason::InstanceLimit),
    ];
    for (action, kind, code, reason) in cases {
        let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &[]);
        w.faults = vec![(action, kind, code); 60];
        if kind != CloudErrorKind::AccountFull {
            w.faults.extend(vec![("CreateNetworkInterface", kind, code); 60]);
        }
        w.step(Event::Tick);
        let requests: Vec<_> = (0..12).map(|n| w.add(n)).collect();
        w.run(20_000);
        let failure = w.failure(*requests.last().unwrap());
        assert_eq!(failure.reason, reason, "{}", failure.message);
        assert!(failure.retryable);
    }
}

#[test]
fn a_full_instance_says_so() {
    let mut w = World::new("t3.nano", &[], &[]);
    w.step(Event::Tick);
    let requests: Vec<_> = (0..4).map(|n| w.add(n)).collect();
    w.run(20_000);
    let served = requests.iter().filter(|r| matches!(w.answers.get(r), Some(Answer::Added(_)))).count();
    assert_eq!(served, 2, "two ENIs of two addresses, one of each its own");
    let failure = w.failure(*requests.last().unwrap());
    assert_eq!(failure.reason, Reason::InstanceLimit, "{}", failure.message);
    assert!(failure.message.contains("t3.nano"), "{}", failure.message);
    let said = w.notes.iter().filter(|n| matches!(n, Note::CannotGrow { .. })).count();
    assert!((1..4).contains(&said), "said once per cause and not at every look: {said}");
}

#[test]
fn the_cool_down_yields_rather_than_failing_a_pod() {
    let mut w = World::new("t3.nano", &[], &[]);
    w.step(Event::Tick);
    let (a, b) = (w.add(1), w.add(2));
    w.run(5_000);
    let first = w.added(a).address;
    w.added(b);
    w.del(1);
    w.now = w.now.plus_ms(1_000);
    w.del(2);
    let c = w.add(3);
    assert_eq!(w.added(c).address, first, "the one that rested longest");
    assert!(w.notes.iter().any(|n| matches!(n, Note::CooldownYielded { .. })));
}

#[test]
fn gc_names_what_the_runtime_no_longer_lists_and_nothing_of_other_networks() {
    let mut w = World::new("m5.large", &[], &["10.0.3.0/28"]);
    w.step(Event::Tick);
    for n in 0..3 {
        w.add(n);
    }
    let request = w.request();
    let valid = [("c1".to_owned(), "eth0".to_owned())].into();
    w.step(Event::Gc { request, network: "other".into(), valid });
    assert_eq!(w.answers[&request], Answer::Stale(Vec::new()));
    let request = w.request();
    let valid = [("c1".to_owned(), "eth0".to_owned())].into();
    w.step(Event::Gc { request, network: "aws-cni".into(), valid });
    let Answer::Stale(stale) = &w.answers[&request] else { panic!("{:?}", w.answers[&request]) };
    let stale: Vec<_> = stale.iter().map(|a| a.sandbox.container_id.clone()).collect();
    assert_eq!(stale, ["c0", "c2"]);
    assert_eq!(w.pool.ledger().pods.len(), 3, "nothing is released before the kernel is clean");
}

#[test]
fn a_fragmented_subnet_falls_back_to_single_addresses_and_comes_back_to_prefixes() {
    let mut w = World::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true")], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::Fragmented, "InsufficientCidrBlocks")];
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(5_000);
    w.added(request);
    let slots = |w: &World| w.pool.ledger().slots.values().flatten().map(crate::pick::size).collect::<BTreeSet<_>>();
    let primary = w.pool.ledger().slots[&EniId::new("eni-primary").unwrap()].clone();
    assert!(primary.iter().all(|slot| crate::pick::size(slot) == 1), "single addresses while there is no /28");
    w.run(1_000_000);
    for n in 10..60 {
        w.add(n);
    }
    w.run(5_000);
    assert!(slots(&w).contains(&16), "prefixes again");
}

#[test]
fn an_address_imds_shows_after_a_restart_waits_for_ec2() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "1")], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    // Something EC2 has taken back already still stands in IMDS.
    let primary = EniId::new("eni-primary").unwrap();
    w.enis.get_mut(&primary).unwrap().slots.insert("10.0.3.9/32".parse().unwrap());
    w.faults = vec![("DescribeNetworkInterfaces", CloudErrorKind::Transient, "Timeout"); 3];
    w.restart();
    let rows = w.pool.status(w.now).enis;
    assert_eq!(rows[0].quarantined, ["10.0.3.9/32"]);
    let a = w.add(1);
    assert_eq!(w.added(a).address.to_string(), "10.0.3.1");
    w.run(60_000);
    assert!(w.pool.status(w.now).enis[0].quarantined.is_empty(), "EC2 has confirmed it");
}

#[test]
fn an_address_ec2_no_longer_shows_is_fenced_and_not_forgotten() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32"]);
    w.step(Event::Tick);
    let a = w.add(1);
    let held = w.added(a).address;
    let primary = EniId::new("eni-primary").unwrap();
    w.enis.get_mut(&primary).unwrap().slots.remove(&IpNet::from(held));
    w.restart();
    assert_eq!(w.pool.ledger().pods[&sandbox(1)].address, held, "an orphan is kept");
    w.del(1);
    for n in 2..9 {
        w.add(n);
    }
    w.run(60_000);
    assert!(w.pool.ledger().pods.values().all(|a| a.address != held), "never reused until EC2 shows it again");
}

#[test]
fn max_eni_and_foreign_enis_bound_growth() {
    let mut w = World::new("m5.large", &[("MAX_ENI", "2")], &[]);
    w.step(Event::Tick);
    for n in 0..30 {
        w.add(n);
    }
    w.run(20_000);
    assert_eq!(w.pool.ledger().enis.len(), 2);
}

#[test]
fn a_taken_device_index_is_learnt_and_the_next_one_used() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "10")], &[]);
    w.faults = vec![("AttachNetworkInterface", CloudErrorKind::DeviceTaken, "InvalidParameterValue")];
    w.step(Event::Tick);
    w.run(10_000);
    let devices: Vec<_> = w.pool.ledger().enis.values().map(|e| e.device.0).filter(|d| *d > 0).collect();
    assert_eq!(devices, [2]);
}

#[test]
fn an_instance_that_holds_fewer_enis_than_its_table_says_is_learnt_and_the_eni_deleted() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "10")], &[]);
    w.faults = vec![("AttachNetworkInterface", CloudErrorKind::InstanceFull, "AttachmentLimitExceeded")];
    w.step(Event::Tick);
    w.run(120_000);
    assert_eq!(w.enis.len(), 1, "the ENI that found no place is gone");
    assert_eq!(w.pool.ledger().enis.len(), 1);
}

#[test]
fn an_instance_full_of_others_enis_has_its_own_limit_again_when_they_are_known() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "10"), ("MANAGE_UNTAGGED_ENI", "false")], &[]);
    w.step(Event::Tick);
    w.run(2_000);
    let primary = w.enis[&EniId::new("eni-primary").unwrap()].clone();
    let operators = EniView { id: EniId::new("eni-op").unwrap(), device: DeviceIndex(2), ..primary };
    w.enis.insert(operators.id.clone(), operators);
    w.faults = vec![("AttachNetworkInterface", CloudErrorKind::InstanceFull, "AttachmentLimitExceeded")];
    for n in 0..12 {
        w.add(n);
    }
    w.run(120_000);
    assert_eq!(w.pool.status(w.now).max_enis, 3, "the table was right");
}

#[test]
fn an_eni_that_a_reading_does_not_show_keeps_its_place_for_a_while() {
    let mut w = World::new("m5.large", &[("MAX_ENI", "2")], &[]);
    w.step(Event::Tick);
    (0..12).for_each(|n| _ = w.add(n));
    w.run(2_000);
    assert_eq!(w.enis.len(), 2);
    let second = w.enis.values_mut().find(|eni| eni.device != DeviceIndex::PRIMARY).unwrap();
    let attachment = second.attachment.take();
    let audit = w.request();
    w.step(Event::Audit { request: audit });
    (12..20).for_each(|n| _ = w.add(n));
    w.run(20_000);
    assert_eq!(w.enis.len(), 2, "the reading was older than the ENI");
    assert!(attachment.is_some());
}

#[test]
fn a_limit_learnt_from_an_old_reading_is_unlearned_by_a_new_one() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::EniFull, "PrivateIpAddressLimitExceeded")];
    w.step(Event::Tick);
    w.run(5_000);
    let most = |w: &World| w.pool.status(w.now).max_addresses;
    assert_eq!(most(&w), 3, "one slot on each of three ENIs");
    let primary = EniId::new("eni-primary").unwrap();
    w.give(&primary, Want::Addresses(8));
    let audit = w.request();
    w.step(Event::Audit { request: audit });
    w.run(5_000);
    assert_eq!(most(&w), 27);
}

#[test]
fn what_was_denied_once_is_tried_again() {
    let mut w = World::new("m5.large", &[], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::Denied, "UnauthorizedOperation")];
    w.step(Event::Tick);
    w.run(30_000);
    let request = w.add(1);
    w.run(1_000);
    w.added(request);
}

#[test]
fn metadata_that_could_not_be_read_once_is_read_again() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    w.run(1_000);
    w.faults = vec![("ImdsRead", CloudErrorKind::Transient, "Timeout")];
    w.run(200_000);
    assert!(w.faults.is_empty());
    let reads = |w: &World| w.calls.iter().filter(|call| *call == "ImdsRead").count();
    let before = reads(&w);
    w.run(200_000);
    assert!(reads(&w) >= before + 2, "every minute again");
}

#[test]
fn a_subnet_without_blocks_for_single_addresses_is_let_rest() {
    let mut w = World::new("m5.large", &[], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::Fragmented, "InvalidParameterValue"); 100];
    w.step(Event::Tick);
    w.run(60_000);
    let asked = w.calls.iter().filter(|call| *call == "AssignPrivateIpAddresses").count();
    assert!(asked <= 6, "{asked} times within a minute");
}

#[test]
fn a_subnet_too_empty_for_a_prefix_is_asked_for_single_addresses() {
    let mut w = World::new("m5.large", &[("ENABLE_PREFIX_DELEGATION", "true")], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet")];
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(10_000);
    w.added(request);
}

#[test]
fn an_address_with_a_pod_route_is_in_use_whatever_the_ledger_says() {
    let mut w = World::new("t3.nano", &[("MAX_ENI", "1")], &["10.0.3.1/32", "10.0.3.2/32"]);
    let wired: IpAddr = "10.0.3.1".parse().unwrap();
    w.pod_routes.insert(wired);
    w.step(Event::Tick);
    let (a, b) = (w.add(1), w.add(2));
    w.run(30_000);
    assert_eq!(w.added(a).address.to_string(), "10.0.3.2");
    assert!(matches!(w.answers[&b], Answer::Failed(_)));
    w.pod_routes.clear();
    w.run(20_000);
    let c = w.add(3);
    assert_eq!(w.added(c).address, wired, "free once the kernel agrees");
}

#[test]
fn an_address_gained_on_the_primary_is_served_at_once() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::Tick);
    // More than the head-room: some of these wait for the next call, and for nothing after it.
    let requests: Vec<_> = (0..9).map(|n| w.add(n)).collect();
    for request in requests {
        w.added(request);
    }
}

#[test]
fn a_sandbox_that_asks_twice_while_nothing_is_free_gets_one_address() {
    let mut w = World::new("m5.large", &[("MAX_ENI", "1")], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::Transient, "Timeout"); 2];
    w.step(Event::Tick);
    let (a, b) = (w.add(1), w.add(1));
    assert!(!w.answers.contains_key(&a), "it waits");
    w.run(10_000);
    assert_eq!(w.added(a), w.added(b));
    assert_eq!(w.journal.iter().filter(|r| matches!(r, Record::Allocated(_))).count(), 1);
}

#[test]
fn records_that_failed_together_are_taken_back_last_first() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32", "10.0.3.2/32", "10.0.3.3/32"]);
    w.step(Event::Tick);
    let first = w.add(1);
    let held = w.added(first);
    // One batch: the sandbox is released and asks again.
    let mut records = Vec::new();
    for event in [
        Event::Del { request: RequestId(900), sandbox: sandbox(1) },
        Event::Add { request: RequestId(901), sandbox: sandbox(1), pod: PodName::default(), patience_ms: None },
    ] {
        for command in w.pool.step(event, w.now) {
            if let Command::Persist(more) = command {
                records.extend(more);
            }
        }
    }
    assert_ne!(w.pool.ledger().pods[&sandbox(1)].address, held.address);
    w.pool.persist_failed(records);
    assert_eq!(w.pool.ledger().pods[&sandbox(1)], held, "as the journal has it");
}

#[test]
fn a_node_without_its_primary_link_serves_nothing() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    // The same ledger on another machine: the kernel does not find the primary's link, and IMDS is slow.
    w.pool = Pool::new(settings(&[]), LedgerState::replay(&w.journal), 9, w.now);
    let mut served = Vec::new();
    let add = Event::Add { request: RequestId(7), sandbox: sandbox(7), pod: PodName::default(), patience_ms: None };
    for event in [Event::Tick, add] {
        for command in w.pool.step(event, w.now) {
            if let Command::Kernel { op, plan, .. } = command {
                let missing_links = [plan.primary.id.clone()].into();
                let report = KernelReport { missing_links, ..KernelReport::default() };
                let result = Ok((report, PodsSeen::default()));
                served.extend(w.pool.step(Event::Kernel { op, result }, w.now));
            } else {
                served.push(command);
            }
        }
    }
    assert!(!served.iter().any(|c| matches!(c, Command::Reply { .. })), "{served:?}");
}

#[test]
fn a_waiting_pod_on_a_full_node_costs_no_time() {
    let mut w = World::new("t3.nano", &[("MAX_ENI", "1"), ("IP_COOLDOWN_PERIOD", "1")], &[]);
    w.step(Event::Tick);
    w.add(1);
    w.run(2_000);
    // An address was freed long ago and is used again.
    w.del(1);
    w.run(5_000);
    w.add(2);
    w.run(2_000);
    w.add(3);
    let (deadline, _) = w.pool.poll_deadline().unwrap();
    assert!(deadline > w.now, "nothing is due, so nothing may be asked for at once");
}

#[test]
fn a_reading_older_than_an_answer_takes_nothing_away() {
    let mut w = World::new("m5.large", &[("WARM_IP_TARGET", "1")], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    w.faults = vec![("DescribeNetworkInterfaces", CloudErrorKind::Transient, "Timeout")];
    w.restart();
    w.run(200);
    let primary = EniId::new("eni-primary").unwrap();
    let before = w.enis[&primary].clone();
    // The question is put; before its answer arrives, an address is assigned and that answer is in.
    w.now = w.now.plus_ms(5_000);
    let commands = w.pool.step(Event::Tick, w.now);
    let asked = commands.iter().find_map(|c| match c {
        Command::Cloud { op, request: CloudRequest::DescribeNode { .. } } => Some(*op),
        _ => None,
    });
    let asked = asked.expect("EC2 is asked again");
    w.now = w.now.plus_ms(10);
    let mut out = Out::default();
    let gained: BTreeSet<IpNet> = ["10.0.3.77/32".parse().unwrap()].into();
    w.pool.gain(&primary, gained, w.now, &mut out);
    w.pool.step(Event::Cloud { op: asked, result: Ok(CloudReply::Enis(vec![before])) }, w.now);
    assert!(w.pool.status(w.now).enis[0].missing.is_empty());
}

/// Calls of one action.
fn count(w: &World, action: &str) -> usize {
    w.calls.iter().filter(|call| *call == action).count()
}

#[test]
fn head_room_waits_for_a_quiet_hour_where_it_would_take_an_eni_of_its_own() {
    let mut w = World::new("m5.large", &[], &[]);
    w.step(Event::NodeState(NodeState { scheduled_pods: Some(16), ..NodeState::default() }));
    let requests: Vec<_> = (0..16).map(|n| w.add(n)).collect();
    w.run(5_000);
    for request in requests {
        w.added(request);
    }
    assert_eq!((count(&w, "AssignPrivateIpAddresses"), count(&w, "CreateNetworkInterface")), (1, 1), "{:?}", w.calls);
    let held: usize = w.pool.ledger().slots.values().map(BTreeSet::len).sum();
    assert_eq!(held, 18, "the ENI that is made anyway is made full");
    w.run(1_300_000);
    assert_eq!(count(&w, "CreateNetworkInterface"), 2, "the head-room comes when nobody needs the calls more");
}

#[test]
fn a_throttled_assign_is_waited_for_and_no_eni_made_in_its_place() {
    let mut w = World::new("m5.large", &[], &[]);
    w.faults = vec![("AssignPrivateIpAddresses", CloudErrorKind::Throttled, "RequestLimitExceeded"); 4];
    w.step(Event::NodeState(NodeState { scheduled_pods: Some(8), ..NodeState::default() }));
    w.run(60_000);
    assert_eq!((count(&w, "AssignPrivateIpAddresses"), count(&w, "CreateNetworkInterface")), (5, 0), "{:?}", w.calls);
}

#[test]
fn a_throttled_attach_keeps_the_pace_of_its_bucket() {
    let mut w = World::new("m5.large", &[], &[]);
    w.faults = vec![("AttachNetworkInterface", CloudErrorKind::Throttled, "RequestLimitExceeded"); 3];
    w.step(Event::NodeState(NodeState { scheduled_pods: Some(16), ..NodeState::default() }));
    // Half a call at 2.5, 1.25 and 0.6 a second, and up to one call more: less than six seconds in all.
    w.run(6_000);
    assert_eq!(count(&w, "AttachNetworkInterface"), 4, "{:?}", w.calls);
}

#[test]
fn a_subnet_that_cannot_give_all_is_asked_for_less_and_soon() {
    let mut w = World::new("m5.large", &[], &[]);
    let empty = ("AssignPrivateIpAddresses", CloudErrorKind::SubnetEmpty, "InsufficientFreeAddressesInSubnet");
    w.faults = vec![empty, empty];
    w.step(Event::Tick);
    let request = w.add(1);
    w.run(15_000);
    let asked: Vec<&str> = w
        .notes
        .iter()
        .filter_map(|note| match note {
            Note::Grow { step, .. } => step.strip_prefix("assign ")?.split_once(' ').map(|(count, _)| count),
            _ => None,
        })
        .collect();
    assert_eq!(asked.get(..3), Some(["4", "2", "1"].as_slice()), "{asked:?}");
    w.added(request);
}

#[test]
fn pods_that_wait_do_not_wait_for_readings_that_ec2_keeps_refusing() {
    let mut w = World::new("m5.large", &[], &["10.0.3.1/32"]);
    w.step(Event::Tick);
    let first = w.add(1);
    w.added(first);
    w.restart();
    w.faults.extend((0..500).map(|_| (grow::DESCRIBE, CloudErrorKind::Throttled, "RequestLimitExceeded")));
    w.step(Event::Tick);
    let pods: Vec<RequestId> = (2..6).map(|n| w.add(n)).collect();
    w.run(30_000);
    for pod in pods {
        w.added(pod);
    }
    w.distinct();
}

#[test]
fn an_address_freed_since_the_kernel_was_read_waits_for_the_next_look() {
    let mut w = World::new("m5.large", &[("IP_COOLDOWN_PERIOD", "0"), ("MAX_ENI", "1")], &["10.0.3.1/32"]);
    w.faults.extend((0..500).map(|_| ("AssignPrivateIpAddresses", CloudErrorKind::Denied, "UnauthorizedOperation")));
    w.step(Event::Tick);
    let first = w.add(1);
    let held = w.added(first).address;
    // Its DEL comes although the pod runs on.
    w.pod_routes.insert(held);
    w.now = w.now.plus_ms(1_000);
    w.del(1);
    let second = w.add(2);
    assert!(!w.answers.contains_key(&second), "{:?}", w.answers.get(&second));
    w.pod_routes.clear();
    w.run(12_000);
    assert_eq!(w.added(second).address, held);

    // A pod that waits does not wait for the pace at which connections are forgotten.
    for n in 2..5 {
        w.del(n);
        let next = w.add(n + 1);
        w.run(FORGET_SPACING_MS / 10);
        assert_eq!(w.added(next).address, held);
    }
}
