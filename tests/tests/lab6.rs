//! The lab's IPv6: that its network does with it what EC2 says and nothing else, beside IPv4 and without translation.
//!
//! Machines are configured by hand here, with `ip`; no ipamd runs. Needs root, or a kernel that lets users make user
//! namespaces; without either these tests fail and say so.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::net::{IpAddr, Ipv6Addr};
use std::process::{Command, Stdio};

use flatwire_tests::{binary, change_group, closed_group, name_of, start};
use ipnet::Ipv6Net;
use lab::api::element;
use lab::client::Lab;
use lab::ctl::{Drops, Info, NodeInfo, NodeSpec, Probe, Request, Spec};
use lab::fabric::{INTERNET_SERVER6, ROUTER6};
use serde_json::Value;

/// A dual-stack lab of two machines without ipamd, the second with a /80 from its launch.
fn spec() -> Spec {
    let nodes = vec!["m5.large".parse().unwrap(), "m5.large:0:1".parse().unwrap()];
    Spec { name: name_of("test6"), nodes, daemons: false, ipv6: true, ..Spec::default() }
}

fn node(lab: &mut Lab, name: &str) -> NodeInfo {
    let info: Info = lab.ask(&Request::Info).unwrap();
    info.nodes.into_iter().find(|node| node.name == name).expect("the machine is there")
}

fn drops(lab: &mut Lab) -> Drops {
    lab.status().unwrap().drops
}

fn probe(lab: &mut Lab, from: &str, to: &str) -> Probe {
    lab.probe6(from, &[to]).unwrap().remove(0)
}

/// Echo, UDP and TCP, each answered or not.
fn heard(lab: &mut Lab, from: &str, to: &str) -> (bool, bool, bool) {
    let Probe { rtt_us, seen, seen_tcp, .. } = probe(lab, from, to);
    (rtt_us.is_some(), seen.is_some(), seen_tcp.is_some())
}

const ALL: (bool, bool, bool) = (true, true, true);
const NOTHING: (bool, bool, bool) = (false, false, false);

/// A /80 that EC2 has assigned anew to the ENI.
fn assign(lab: &Lab, eni: &str) -> Ipv6Net {
    let parameters = [("NetworkInterfaceId", eni), ("Ipv6PrefixCount", "1")];
    let answer = lab.ec2().call("AssignIpv6Addresses", &parameters).unwrap();
    let set = element(&answer, "assignedIpv6PrefixSet").expect("the answer names the prefix");
    element(&set, "item").unwrap().parse().unwrap()
}

fn change(lab: &Lab, action: &str, eni: &str, prefix: Ipv6Net) {
    lab.ec2().call(action, &[("NetworkInterfaceId", eni), ("Ipv6Prefix.1", &prefix.to_string())]).unwrap();
}

fn nth(prefix: Ipv6Net, number: u128) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(prefix.network()) + number)
}

fn ip(lab: &Lab, place: &str, command: &str) -> String {
    let words: Vec<&str> = ["ip", "-6"].into_iter().chain(command.split(' ')).collect();
    lab.run(place, &words).unwrap()
}

/// The machine has the address from now on; without detection, as until that is over nothing may be sent from it.
fn hold(lab: &Lab, node: &str, address: Ipv6Addr) {
    ip(lab, node, &format!("address add {address}/128 dev lo nodad"));
}

fn ip_json(lab: &Lab, place: &str, command: &str) -> Value {
    serde_json::from_str(&ip(lab, place, &format!("-j {command}"))).unwrap()
}

/// A plugin that wires the pod with `ip`, with the IPv6 address it finds in /run/address.
const PLUGIN: &str = r#"#!/bin/bash
set -e
[ "$CNI_COMMAND" = ADD ] || exit 0
address=$(cat /run/address)
pod=${CNI_NETNS##*/}
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
ip link add pod0 mtu 9001 type veth peer name eth0 mtu 9001 netns "$pod"
ip link set pod0 up
ip address add fe80::1/64 dev pod0 nodad
ip route add "$address" dev pod0
ip -n "$pod" link set eth0 up
ip -n "$pod" address add "$address/128" dev eth0 nodad
ip -n "$pod" route add default via fe80::1 dev eth0
echo '{"cniVersion":"1.0.0","ips":[{"address":"'"$address"'/128"}]}'
"#;

#[test]
fn a_prefix_is_routed_while_it_is_assigned_and_seen_untranslated_everywhere() {
    let mut lab = start(&spec());
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let prefix = assign(&lab, &eni);
    // The first and the last address of it: the whole prefix is routed.
    let (first, last) = (prefix.network(), prefix.broadcast());
    assert_eq!(heard(&mut lab, "node-2", &first.to_string()), NOTHING, "nobody there has it yet");
    for address in [first, last] {
        hold(&lab, "node-1", address);
        for (from, own) in [
            ("node-2", node(&mut lab, "node-2").ipv6.unwrap()),
            ("peer", node(&mut lab, "peer").ipv6.unwrap()),
            ("internet", INTERNET_SERVER6),
        ] {
            let probe = probe(&mut lab, from, &address.to_string());
            let own = Some(IpAddr::from(own));
            assert!(probe.rtt_us.is_some(), "{probe:?}");
            assert_eq!((probe.seen, probe.seen_tcp), (own, own), "{probe:?}");
        }
    }
    // Outward, from an address inside it.
    ip(&lab, "node-1", &format!("route replace default via {ROUTER6} dev eth0 src {first}"));
    for to in ["node-2", "peer", "internet"] {
        assert_eq!(probe(&mut lab, "node-1", to).seen, Some(first.into()), "{to}");
    }

    let before = drops(&mut lab);
    change(&lab, "UnassignIpv6Addresses", &eni, prefix);
    assert_eq!(heard(&mut lab, "node-2", &first.to_string()), NOTHING, "unassigned, and the machine still has it");
    assert_eq!(heard(&mut lab, "internet", &first.to_string()), NOTHING);
    assert_eq!(heard(&mut lab, "node-1", "node-2"), NOTHING, "nor may it be spoken from");
    let after = drops(&mut lab);
    assert!(after.unassigned > before.unassigned && after.spoofed > before.spoofed, "{before:?} {after:?}");

    change(&lab, "AssignIpv6Addresses", &eni, prefix);
    assert_eq!(heard(&mut lab, "node-2", &last.to_string()), ALL, "assigned again");
    assert_eq!(heard(&mut lab, "node-1", "internet"), ALL);
}

#[test]
fn pods_speak_from_their_nodes_prefixes_and_learn_how_much_the_way_out_carries() {
    let programs = tempfile::tempdir().unwrap();
    for (name, text) in [("aws-cni", PLUGIN), ("ipamd", "#!/bin/sh\n")] {
        let path = programs.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut lab = start(&Spec { bin_dir: Some(programs.path().to_owned()), ..spec() });
    let second = node(&mut lab, "node-2").enis[0].clone();
    assert_eq!(second.ipv6_prefixes.len(), 1, "from its launch");
    let first = node(&mut lab, "node-1").enis[0].id.clone();
    let here = nth(assign(&lab, &first), 7);
    let there = nth(second.ipv6_prefixes[0], 7);
    for (node, address) in [("node-1", here), ("node-2", there)] {
        lab.run(node, &["sh", "-c", &format!("echo {address} > /run/address")]).unwrap();
        assert_eq!(lab.pod_add(node, "web").unwrap().addresses, [IpAddr::from(address)]);
    }
    for (from, to, own) in [
        ("node-1/web", "node-2/web", here),
        ("node-2/web", "node-1/web", there),
        ("node-1/web", "internet", here),
        ("node-1/web", "peer", here),
        ("internet", "node-1/web", INTERNET_SERVER6),
        ("peer", "node-1/web", node(&mut lab, "peer").ipv6.unwrap()),
    ] {
        let probe = probe(&mut lab, from, to);
        assert!(probe.rtt_us.is_some(), "{probe:?}");
        assert_eq!((probe.seen, probe.seen_tcp), (Some(own.into()), Some(own.into())), "{probe:?}");
    }

    // More at once than the way out carries: the router says so, by an address that a pod hears, and the pod follows.
    let mtu = |lab: &Lab, to: Ipv6Addr| {
        let route = ip(lab, "node-1/web", &format!("route get {to}"));
        route.split_once("mtu ").map(|(_, rest)| rest.split(' ').next().unwrap().to_owned())
    };
    for (to, known) in [(INTERNET_SERVER6, Some("1500".to_owned())), (there, None)] {
        assert_eq!(mtu(&lab, to), None);
        let ask = format!(
            "exec 3<>/dev/udp/{to}/7777; for try in 1 2 3; do head -c 8000 /dev/zero >&3; \
             timeout 1 head -c {} <&3 && exit 0; done; exit 1",
            here.to_string().len()
        );
        assert_eq!(lab.run("node-1/web", &["bash", "-c", &ask]).unwrap(), here.to_string(), "{to} answers");
        assert_eq!(mtu(&lab, to), known, "{to}");
    }
}

#[test]
fn a_source_that_the_eni_does_not_hold_is_dropped_and_counted() {
    let mut lab = start(&spec());
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    assert_eq!(heard(&mut lab, "node-1", "node-2"), ALL);
    // Neighbour discovery and whatever else a link's own address says has not been counted.
    assert_eq!(drops(&mut lab), Drops::default());

    let stolen = nth(node(&mut lab, "node-2").enis[0].ipv6_prefixes[0], 9);
    hold(&lab, "node-1", stolen);
    ip(&lab, "node-1", &format!("route replace default via {ROUTER6} dev eth0 src {stolen}"));
    for to in ["node-2", "internet", "peer"] {
        assert_eq!(heard(&mut lab, "node-1", to), NOTHING, "{to}");
    }
    let counted = node(&mut lab, "node-1").enis[0].spoofed;
    assert!(counted > 0, "the drop is counted for the ENI it came from");
    assert_eq!(drops(&mut lab).spoofed, counted);

    let parameters = [("NetworkInterfaceId", eni.as_str()), ("SourceDestCheck.Value", "false")];
    lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
    assert_eq!(heard(&mut lab, "node-1", "node-2"), NOTHING, "the way back leads to its owner");
    assert_eq!(drops(&mut lab).spoofed, counted, "unchecked, and nothing is added");
}

#[test]
fn security_groups_let_in_what_their_ipv6_rules_say() {
    let mut lab = start(&spec());
    let (own, other) = (node(&mut lab, "node-1"), node(&mut lab, "node-2"));
    let group = closed_group(&lab, "web");
    let join = |lab: &Lab, eni: &str| {
        let parameters = [("NetworkInterfaceId", eni), ("SecurityGroupId.1", group.as_str())];
        lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
    };
    join(&lab, &own.enis[0].id);
    assert_eq!(heard(&mut lab, "node-2", "node-1"), NOTHING);
    assert!(drops(&mut lab).denied > 0);
    for to in ["node-2", "internet"] {
        assert_eq!(heard(&mut lab, "node-1", to), ALL, "what it began is answered by {to}");
    }
    // Everything of IPv4 lets in nothing of IPv6.
    let ipv4 = [("IpProtocol", "-1"), ("IpRanges.1.CidrIp", "0.0.0.0/0")];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &ipv4);
    assert!(lab.probe("node-2", &["node-1"]).unwrap()[0].seen.is_some());
    assert_eq!(heard(&mut lab, "node-2", "node-1"), NOTHING);

    // A range of addresses and of ports; the other machine is of the VPC's block, the peer is not.
    let block = lab.info().vpc.ipv6.unwrap().to_string();
    let tcp = [("IpProtocol", "tcp"), ("FromPort", "7777"), ("ToPort", "7777"), ("Ipv6Ranges.1.CidrIpv6", &block)];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &tcp);
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (false, false, true));
    assert_eq!(heard(&mut lab, "peer", "node-1"), NOTHING);

    // Echoes, from anywhere.
    let echoes = [("IpProtocol", "icmpv6"), ("FromPort", "128"), ("ToPort", "-1"), ("Ipv6Ranges.1.CidrIpv6", "::/0")];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &echoes);
    assert_eq!(heard(&mut lab, "peer", "node-1"), (true, false, false));

    // Members reach each other, from their prefixes too.
    let members = [("IpProtocol", "-1"), ("Groups.1.GroupId", group.as_str())];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &members);
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (true, false, true), "not a member");
    join(&lab, &other.enis[0].id);
    assert_eq!(heard(&mut lab, "node-2", "node-1"), ALL);
    let inside = nth(other.enis[0].ipv6_prefixes[0], 3);
    hold(&lab, "node-2", inside);
    ip(&lab, "node-2", &format!("route replace default via {ROUTER6} dev eth0 src {inside}"));
    assert_eq!(probe(&mut lab, "node-2", "node-1").seen, Some(inside.into()));

    // What may not begin here; what began elsewhere is answered.
    let everything = [("IpProtocol", "-1"), ("Ipv6Ranges.1.CidrIpv6", "::/0")];
    change_group(&lab, "RevokeSecurityGroupEgress", &group, &everything);
    assert_eq!(heard(&mut lab, "node-1", "peer"), NOTHING);
    assert_eq!(heard(&mut lab, "peer", "node-1"), (true, false, false));
}

#[test]
fn a_machine_comes_with_its_address_and_the_router_and_waits_for_neither() {
    let mut lab = start(&spec());
    let own = node(&mut lab, "node-1");
    let address = own.ipv6.expect("launched with one");
    let shown = ip_json(&lab, "node-1", "address show dev eth0 scope global");
    let shown = &shown[0]["addr_info"][0];
    assert_eq!((&shown["local"], &shown["prefixlen"]), (&address.to_string().into(), &128.into()));
    assert_eq!(shown["tentative"], Value::Null);
    let routes = ip_json(&lab, "node-1", "route show default");
    assert_eq!(
        (&routes[0]["gateway"], &routes[0]["dev"], &routes[0]["protocol"]),
        (&ROUTER6.to_string().into(), &"eth0".into(), &"ra".into())
    );
    assert_eq!(routes.as_array().unwrap().len(), 1);
    for (key, value) in [("accept_ra", "0"), ("forwarding", "0")] {
        let path = format!("/proc/sys/net/ipv6/conf/eth0/{key}");
        assert_eq!(lab.run("node-1", &["cat", &path]).unwrap().trim(), value, "{key}");
    }
    // The router knows every machine for good, and is on every ENI's link at one address.
    let neighbours = ip_json(&lab, "vpc", "neighbour show nud permanent");
    let macs: Vec<&Value> = neighbours.as_array().unwrap().iter().map(|one| &one["lladdr"]).collect();
    for name in ["node-1", "node-2"] {
        assert!(macs.contains(&&Value::from(node(&mut lab, name).enis[0].mac.clone())), "{name}: {macs:?}");
    }
    ip(&lab, "node-1", &format!("route get {ROUTER6} dev eth0"));
    assert_eq!(heard(&mut lab, "node-1", "node-2"), ALL);
    let seen = |lab: &mut Lab, from: &str, to: &str| probe(lab, from, to).seen;
    assert_eq!(seen(&mut lab, "node-1", "internet"), Some(address.into()), "no translation on the way out");
    assert_eq!(seen(&mut lab, "internet", "node-1"), Some(INTERNET_SERVER6.into()), "nor on the way in");

    // A second ENI appears bare, and its router answers as soon as the link is up.
    let eni = lab.ec2().call("CreateNetworkInterface", &[("SubnetId", &own.enis[0].subnet)]).unwrap();
    let eni = element(&eni, "networkInterfaceId").unwrap();
    let attach = [("NetworkInterfaceId", eni.as_str()), ("InstanceId", &own.instance), ("DeviceIndex", "1")];
    lab.ec2().call("AttachNetworkInterface", &attach).unwrap();
    lab.settle().unwrap();
    let inside = nth(assign(&lab, &eni), 5);
    assert_eq!(ip_json(&lab, "node-1", "address show dev eth1").as_array().unwrap().len(), 0);
    let to = node(&mut lab, "node-2").ipv6.unwrap();
    for command in [
        "link set eth1 up",
        &format!("address add {inside}/128 dev lo nodad"),
        &format!("route add default via {ROUTER6} dev eth1 src {inside} table 2"),
        &format!("rule add from {inside} lookup 2"),
        &format!("rule add to {to} lookup 2"),
    ] {
        ip(&lab, "node-1", command);
    }
    assert_eq!(seen(&mut lab, "node-1", "node-2"), Some(inside.into()), "by its own ENI");
    assert_eq!(heard(&mut lab, "node-2", &inside.to_string()), ALL);
}

#[test]
fn steady_traffic_is_counted_over_ipv6() {
    let mut lab = start(&spec());
    let to = node(&mut lab, "node-2").ipv6.unwrap();
    let program = binary("lab").display().to_string();
    let mut echo = Command::new(&program)
        .args(["exec", "--name", lab.name(), "node-2", "--", &program, "__traffic", "echo"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for kind in ["ping", "stream"] {
        // Asked again and again until something has come back; a stream may have to wait for the echo to be there.
        let script = format!(
            "for try in {{1..100}}; do \
               for ask in {{1..40}}; do echo; sleep 0.05; done | {program} __traffic {kind} {to} | \
                 grep -m 1 '\"back\":[1-9].*\"broken\":false' && exit 0; sleep 0.05; done; exit 1"
        );
        lab.run("node-1", &["bash", "-c", &script]).unwrap();
    }
    drop(echo.stdin.take());
    assert!(echo.wait().unwrap().success());
}

#[test]
fn a_peered_vpc_is_reached_over_ipv6_only_while_the_peering_is_active() {
    let mut lab = start(&spec());
    assert_eq!(heard(&mut lab, "node-1", "peer"), ALL);
    assert_eq!(heard(&mut lab, "peer", "internet"), NOTHING, "its VPC has no gateway");
    assert_eq!(heard(&mut lab, "internet", "peer"), NOTHING);
    let listed = lab.ec2().call("DescribeVpcPeeringConnections", &[]).unwrap();
    let peering = element(&listed, "vpcPeeringConnectionId").unwrap();
    lab.ec2().call("DeleteVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]).unwrap();
    assert_eq!(heard(&mut lab, "node-1", "peer"), NOTHING);
    assert_eq!(heard(&mut lab, "peer", "node-1"), NOTHING);
}

#[test]
fn without_being_asked_for_there_is_no_ipv6() {
    let mut lab = start(&Spec { ipv6: false, nodes: vec!["m5.large".parse().unwrap()], ..spec() });
    assert_eq!((lab.info().vpc.ipv6, node(&mut lab, "node-1").ipv6), (None, None));
    assert_eq!(ip_json(&lab, "node-1", "route show default").as_array().unwrap().len(), 0);
    let refused = lab.probe6("internet", &["node-1"]).unwrap_err().to_string();
    assert!(refused.contains("node-1 has no IPv6 address") && refused.contains("--ipv6"), "{refused}");
    let prefixed: NodeSpec = "m5.large:0:1".parse().unwrap();
    let refused = lab.ask::<String>(&Request::NodeAdd { spec: prefixed }).unwrap_err().to_string();
    assert!(refused.contains("node-2") && refused.contains("--ipv6"), "{refused}");
    // A link's own address has reached the router by now, and that is no drop.
    assert!(lab.probe("node-1", &["peer"]).unwrap()[0].seen.is_some());
    assert_eq!(drops(&mut lab), Drops::default());
}
