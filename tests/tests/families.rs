//! Pods of both families, and of IPv6 alone, on nodes of the lab: whom they reach, and whom the far side sees.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flatwire_core::families::EGRESS;
use flatwire_tests::{found, name_of, programs};
use lab::client::Lab;
use lab::ctl::{DaemonAction, Info, NodeInfo, NodeSpec, PodInfo, Probe, Request, Spec};
use lab::fabric::{EC2_INSIDE, IMDS};
use serde_json::{Value, json};

/// Three addresses on its primary ENI, so that a fourth pod is on another.
const NODE_TYPE: &str = "t3.small";
const PODS: usize = 5;
const DUAL: &[(&str, &str)] = &[("ENABLE_IPv6", "true"), ("MINIMUM_IP_TARGET", "5")];
const V6_ONLY: &[(&str, &str)] = &[("ENABLE_IPv6", "true"), ("ENABLE_IPv4", "false")];

fn start(env: &[(&str, &str)]) -> Lab {
    start_each([env, env])
}

fn start_each(env: [&[(&str, &str)]; 2]) -> Lab {
    let variables = |env: &[(&str, &str)]| -> BTreeMap<String, String> {
        env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let node = |env| NodeSpec { instance_type: NODE_TYPE.to_owned(), env: variables(env), ..NodeSpec::default() };
    let nodes = env.into_iter().map(node).collect();
    let name = name_of("families");
    flatwire_tests::start(&Spec { name, nodes, ipv6: true, bin_dir: Some(programs()), ..Spec::default() })
}

fn machine(lab: &mut Lab, name: &str) -> NodeInfo {
    let info: Info = lab.ask(&Request::Info).unwrap();
    info.nodes.into_iter().find(|node| node.name == name).expect("the machine is there")
}

fn place(pod: &PodInfo) -> String {
    format!("{}/{}", pod.node, pod.name)
}

fn pods(lab: &mut Lab, node: &str) -> Vec<PodInfo> {
    let add = |lab: &mut Lab, name: &str| {
        found(60, "a pod", || lab.pod_add(node, name).map_err(|error| lab::error::chain(&error)))
    };
    (0..PODS).map(|number| add(lab, &format!("pod-{number}"))).collect()
}

fn address(pod: &PodInfo, v6: bool) -> Option<IpAddr> {
    pod.addresses.iter().copied().find(|address| address.is_ipv6() == v6)
}

/// Echo, UDP and TCP arrive, and the far side sees who called.
fn reaches(lab: &mut Lab, v6: bool, from: &str, to: &str, seen_as: Option<IpAddr>) {
    let probe = if v6 { lab.probe6(from, &[to]) } else { lab.probe(from, &[to]) }.unwrap().remove(0);
    let Probe { rtt_us, seen, seen_tcp, .. } = &probe;
    assert!(rtt_us.is_some() && seen.is_some(), "{probe:?}");
    assert_eq!((seen, seen_tcp), (&seen_as, &seen_as), "{probe:?}");
}

/// What `ip` says on the node, and our part of its ruleset.
fn ip(lab: &Lab, node: &str, command: &str) -> Value {
    let words: Vec<&str> = ["ip", "-j"].into_iter().chain(command.split(' ')).collect();
    serde_json::from_str(&lab.run(node, &words).unwrap()).unwrap_or(Value::Null)
}

fn our_rules(lab: &Lab, node: &str) -> usize {
    ip(lab, node, "-6 rule show").as_array().unwrap().iter().filter(|rule| rule["protocol"] == "70").count()
}

#[test]
fn dual_stack_pods_of_every_eni_reach_each_other_the_nodes_the_internet_and_the_peer_in_both_families() {
    let mut lab = start(DUAL);
    let all: Vec<PodInfo> = ["node-1", "node-2"].into_iter().flat_map(|node| pods(&mut lab, node)).collect();
    let distinct: BTreeSet<IpAddr> = all.iter().flat_map(|pod| pod.addresses.clone()).collect();
    assert_eq!(distinct.len(), 2 * all.len(), "an address of each family, and nobody else's");
    for node in ["node-1", "node-2"] {
        let enis = machine(&mut lab, node).enis;
        assert!(enis.len() > 1 && enis.iter().all(|eni| eni.ipv6_prefixes.len() == 1), "{enis:?}");
        for pod in all.iter().filter(|pod| pod.node == node) {
            let (v4, v6) = (pod.ipv4().unwrap(), address(pod, true).unwrap());
            let on = enis.iter().find(|eni| eni.secondary.contains(&v4)).unwrap();
            assert!(matches!(v6, IpAddr::V6(v6) if on.ipv6_prefixes[0].contains(&v6)), "{pod:?} is on one ENI");
        }
    }
    let public = |lab: &mut Lab, node: &str| machine(lab, node).public.map(IpAddr::from);
    let (ends, peer) = ([&all[0], &all[PODS - 1], &all[PODS], &all[2 * PODS - 1]], machine(&mut lab, "peer"));
    for pod in ends {
        let own = place(pod);
        for v6 in [false, true] {
            let itself = address(pod, v6);
            for other in ends.iter().filter(|other| ***other != *pod) {
                reaches(&mut lab, v6, &own, &place(other), itself);
            }
            for node in ["node-1", "node-2"] {
                reaches(&mut lab, v6, &own, node, itself);
                let caller = machine(&mut lab, node);
                let caller = if v6 { caller.ipv6.map(IpAddr::from) } else { caller.address.map(IpAddr::from) };
                reaches(&mut lab, v6, node, &own, caller);
            }
            let outside = if v6 { itself } else { public(&mut lab, &pod.node) };
            reaches(&mut lab, v6, &own, "internet", outside);
            let translated = if v6 { itself } else { machine(&mut lab, &pod.node).address.map(IpAddr::from) };
            reaches(&mut lab, v6, &own, "peer", translated);
        }
        // Nothing of IPv6 is translated, so who is outside may call.
        reaches(&mut lab, true, "internet", &own, Some(lab::fabric::INTERNET_SERVER6.into()));
        reaches(&mut lab, true, "peer", &own, peer.ipv6.map(IpAddr::from));
    }
    assert_eq!(lab.status().unwrap().drops.spoofed, 0);
    // Whatever the number of pods: two rules of the node and two for its further ENI.
    assert_eq!(our_rules(&lab, "node-1"), 4);

    let ipamd = lab.ipamd().unwrap();
    let (ec2, imds) =
        (format!("AWS_EC2_ENDPOINT=http://{EC2_INSIDE}"), format!("AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{IMDS}"));
    let audit = lab.run("node-1", &["env", &ec2, &imds, &ipamd, "audit"]).unwrap();
    assert!(audit.contains("audit: clean"), "{audit}");
    for pod in all {
        lab.pod_check(&pod.node, &pod.name).unwrap();
        lab.pod_del(&pod.node, &pod.name).unwrap();
    }
    let left = ip(&lab, "node-1", "-6 route show proto 70");
    assert_eq!(left, json!([]), "routes of pods that are gone");
}

#[test]
fn segments_are_held_to_the_way_out_in_ipv6_too_and_the_metadata_is_closed_where_asked() {
    let wide = [DUAL, &[("FLATWIRE_OUTSIDE_MTU", "9001"), ("FLATWIRE_BLOCK_IMDS", "true")]].concat();
    let mut lab = start_each([DUAL, &wide]);
    let widen = "for l in $(ip -o link | grep -o 'vpc-[^@:]*'); do ip link set $l mtu 9001; done; true";
    lab.run("internet", &["sh", "-c", widen]).unwrap();
    let [held, free] = ["node-1", "node-2"].map(|node| pods(&mut lab, node).remove(PODS - 1));
    let inside = address(&free, true).unwrap().to_string();
    let outside = lab::fabric::INTERNET_SERVER6.to_string();
    let serve = "import socket\ns = socket.create_server(('::', 9002), family=socket.AF_INET6); s.settimeout(30)\n\
                 c, _ = s.accept(); print(c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))";
    let call = "import socket, sys, time\n\
                for _ in range(200):\n\
                \x20try: c = socket.create_connection((sys.argv[1], 9002), 5); break\n\
                \x20except OSError: time.sleep(0.05)\n\
                print(c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))";
    for (from, at, to, is_held) in [
        (&held, "internet".to_owned(), &outside, true),
        (&free, "internet".to_owned(), &outside, false),
        (&held, place(&free), &inside, false),
    ] {
        let told = std::thread::scope(|scope| {
            let server = scope.spawn(|| lab.run(&at, &["python3", "-c", serve]).unwrap());
            let client = lab.run(&place(from), &["python3", "-c", call, to]).unwrap();
            [client, server.join().unwrap()]
        });
        for segment in told {
            let segment: u32 = segment.trim().parse().unwrap();
            assert_eq!(segment <= 1440, is_held, "{} → {at}: {segment}", place(from));
        }
    }
    let ask = "import socket\nsocket.create_connection(('fd00:ec2::254', 80), 3)";
    for (pod, closed) in [(&held, false), (&free, true)] {
        let said = lab.exec(&place(pod), &["python3", "-c", ask]).unwrap();
        let complaint = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(complaint.contains("Permission denied"), closed, "{}: {complaint}", place(pod));
    }
}

#[test]
fn pods_with_ipv6_alone_reach_everybody_ipv4_included_and_nobody_calls_them_by_that() {
    let mut lab = start(V6_ONLY);
    let all: Vec<PodInfo> = ["node-1", "node-2"].into_iter().flat_map(|node| pods(&mut lab, node)).collect();
    for pod in &all {
        assert!(pod.addresses.len() == 1 && pod.addresses[0].is_ipv6(), "{pod:?}");
    }
    for node in ["node-1", "node-2"] {
        let enis = machine(&mut lab, node).enis;
        assert_eq!((enis.len(), enis[0].ipv6_prefixes.len()), (1, 1), "one /80 is enough: {enis:?}");
    }
    for (pod, other) in [(&all[0], &all[1]), (&all[0], &all[PODS]), (&all[PODS], &all[0])] {
        let (own, itself) = (place(pod), address(pod, true));
        reaches(&mut lab, true, &own, &place(other), itself);
        for to in ["node-1", "node-2", "internet", "peer"] {
            reaches(&mut lab, true, &own, to, itself);
        }
        for from in ["internet", "peer", "node-1", "node-2"] {
            let probe = lab.probe6(from, &[&own]).unwrap().remove(0);
            assert!(probe.rtt_us.is_some() && probe.seen.is_some() && probe.seen_tcp.is_some(), "{probe:?}");
        }
        // IPv4: as the node, the VPC included.
        let node = machine(&mut lab, &pod.node);
        let elsewhere = if pod.node == "node-1" { "node-2" } else { "node-1" };
        reaches(&mut lab, false, &own, "internet", node.public.map(IpAddr::from));
        for to in [elsewhere, "peer"] {
            reaches(&mut lab, false, &own, to, node.address.map(IpAddr::from));
        }
        let itself = lab.probe(&own, &[pod.node.as_str()]).unwrap().remove(0);
        assert!(matches!(itself.seen, Some(IpAddr::V4(v4)) if EGRESS.contains(&v4)), "{itself:?}");
    }
    // The address for egress is the node's own affair: a pod beside it cannot call it.
    let text = lab.run(&place(&all[1]), &["ip", "-j", "-4", "addr", "show", "eth0"]).unwrap();
    let shown: Value = serde_json::from_str(&text).unwrap();
    let egress = shown[0]["addr_info"][0]["local"].as_str().unwrap().to_owned();
    let probe = lab.probe(&place(&all[0]), &[egress.as_str()]).unwrap().remove(0);
    assert_eq!((probe.seen, probe.seen_tcp), (None, None), "{probe:?}");
    let probe = lab.probe("node-1", &[egress.as_str()]).unwrap().remove(0);
    assert!(probe.seen.is_some(), "the node itself may: {probe:?}");
    for pod in &all {
        lab.pod_check(&pod.node, &pod.name).unwrap();
    }
}

#[test]
fn ipv6_that_others_flush_is_put_back_and_outlives_the_daemon() {
    let mut lab = start(DUAL);
    let all = pods(&mut lab, "node-1");
    let last = all.last().unwrap().clone();
    let itself = address(&last, true);
    let before = our_rules(&lab, "node-1");
    for harm in ["ip -6 rule flush", "ip -6 route flush table 2", "nft flush ruleset", "ip -6 route flush proto 70"] {
        // What is the kernel's own comes back by nobody else's hand.
        let script = format!("{harm}; ip -6 rule add pref 32766 lookup main; true");
        lab.run("node-1", &["sh", "-c", &script]).unwrap();
        found(60, harm, || {
            let probe = lab.probe6(&place(&last), &["internet"]).unwrap().remove(0);
            let stands = our_rules(&lab, "node-1") == before;
            if probe.seen == itself && stands { Ok(()) } else { Err(format!("{probe:?}, rules stand: {stands}")) }
        });
    }
    lab.daemon("node-1", DaemonAction::Kill).unwrap();
    lab.daemon("node-1", DaemonAction::Start).unwrap();
    reaches(&mut lab, true, &place(&last), "internet", itself);
}
