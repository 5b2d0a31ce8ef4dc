//! The lab itself: that its network does what EC2 says and nothing else, and that it leaves nothing behind.
//!
//! Machines are configured by hand here, with `ip`; no ipamd runs. Needs root, or a kernel that lets users make user
//! namespaces; without either these tests fail and say so.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError, RwLock};

use flatwire_tests::{binary, change_group, closed_group, eventually, name_of};
use lab::api::element;
use lab::boot;
use lab::client::Lab;
use lab::ctl::{Delays, Drops, Info, NodeInfo, Probe, QUICK, Request, Spec};
use serde_json::Value;

/// A lab of two machines without ipamd, with a name of its own.
fn spec() -> Spec {
    let nodes = vec!["m5.large".parse().unwrap(), "m5.large".parse().unwrap()];
    Spec { name: name_of("test"), nodes, daemons: false, ..Spec::default() }
}

/// `lab clean` looks at every lab of the machine: no lab may be on its way up meanwhile.
static CLEANING: RwLock<()> = RwLock::new(());
/// Two tests leave a dead lab's folder behind on purpose; each must find its own.
static DEAD_LABS: Mutex<()> = Mutex::new(());

fn start(spec: &Spec) -> Lab {
    let _nobody_cleans = CLEANING.read().unwrap_or_else(PoisonError::into_inner);
    flatwire_tests::start(spec)
}

fn node(lab: &mut Lab, name: &str) -> NodeInfo {
    let info: Info = lab.ask(&Request::Info).unwrap();
    info.nodes.into_iter().find(|node| node.name == name).expect("the machine is there")
}

fn drops(lab: &mut Lab) -> Drops {
    lab.status().unwrap().drops
}

fn probe(lab: &mut Lab, from: &str, to: &str) -> Probe {
    lab.probe(from, &[to]).unwrap().remove(0)
}

fn answers(lab: &mut Lab, from: &str, to: &str) -> bool {
    let probe = probe(lab, from, to);
    assert_eq!(probe.rtt_us.is_some(), probe.seen.is_some(), "echo and UDP disagree: {probe:?}");
    probe.seen.is_some()
}

/// What EC2 has assigned anew to the ENI.
fn assign(lab: &Lab, eni: &str) -> String {
    let parameters = [("NetworkInterfaceId", eni), ("SecondaryPrivateIpAddressCount", "1")];
    let answer = lab.ec2().call("AssignPrivateIpAddresses", &parameters).unwrap();
    element(&answer, "privateIpAddress").expect("the answer names the address")
}

fn unassign(lab: &Lab, eni: &str, address: &str) {
    let parameters = [("NetworkInterfaceId", eni), ("PrivateIpAddress.1", address)];
    lab.ec2().call("UnassignPrivateIpAddresses", &parameters).unwrap();
}

/// A second ENI on the machine; its id. It is on its way when this returns.
fn attach(lab: &mut Lab, name: &str) -> String {
    let node = node(lab, name);
    let subnet = node.enis[0].subnet.clone();
    let created = lab.ec2().call("CreateNetworkInterface", &[("SubnetId", &subnet)]).unwrap();
    let eni = element(&created, "networkInterfaceId").unwrap();
    let parameters = [("NetworkInterfaceId", eni.as_str()), ("InstanceId", &node.instance), ("DeviceIndex", "1")];
    lab.ec2().call("AttachNetworkInterface", &parameters).unwrap();
    eni
}

fn ip_json(lab: &Lab, place: &str, arguments: &[&str]) -> Value {
    let command: Vec<&str> = ["ip", "-j"].iter().chain(arguments).copied().collect();
    serde_json::from_str(&lab.run(place, &command).unwrap()).unwrap()
}

/// One HTTP request from inside a place, by bash alone.
fn http(lab: &Lab, place: &str, host: &str, request: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/{host}/80; printf '%b' '{request}\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
         timeout 5 cat <&3"
    );
    lab.run(place, &["bash", "-c", &script]).unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

#[test]
fn the_fabric_forwards_what_ec2_has_assigned_and_nothing_else() {
    let mut lab = start(&spec());
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let address = assign(&lab, &eni);

    // Routed to the machine at once, but nobody there has it yet.
    assert!(!answers(&mut lab, "node-2", &address));
    lab.run("node-1", &["ip", "address", "add", &format!("{address}/32"), "dev", "lo"]).unwrap();
    let own = node(&mut lab, "node-2").address.map(IpAddr::from);
    let seen = probe(&mut lab, "node-2", &address);
    assert_eq!((seen.seen, seen.seen_tcp), (own, own), "{seen:?}");
    let peer = node(&mut lab, "peer").address.map(IpAddr::from);
    assert_eq!(probe(&mut lab, "peer", &address).seen, peer);

    let before = drops(&mut lab);
    unassign(&lab, &eni, &address);
    assert!(!answers(&mut lab, "node-2", &address), "unassigned, and the machine still has it");
    assert!(drops(&mut lab).unassigned > before.unassigned);

    let parameters = [("NetworkInterfaceId", eni.as_str()), ("PrivateIpAddress.1", address.as_str())];
    lab.ec2().call("AssignPrivateIpAddresses", &parameters).unwrap();
    assert!(answers(&mut lab, "node-2", &address), "assigned again");
}

#[test]
fn a_prefix_is_routed_whole() {
    let mut lab = start(&spec());
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let answer = lab
        .ec2()
        .call("AssignPrivateIpAddresses", &[("NetworkInterfaceId", eni.as_str()), ("Ipv4PrefixCount", "1")])
        .unwrap();
    let prefix: ipnet::Ipv4Net = element(&answer, "ipv4Prefix").unwrap().parse().unwrap();
    for address in [prefix.network(), prefix.broadcast()] {
        lab.run("node-1", &["ip", "address", "add", &format!("{address}/32"), "dev", "lo"]).unwrap();
        assert!(answers(&mut lab, "node-2", &address.to_string()), "{address} of {prefix}");
    }
}

#[test]
fn a_source_that_the_eni_does_not_hold_is_dropped_and_counted() {
    let mut lab = start(&spec());
    let eni = attach(&mut lab, "node-1");
    lab.settle().unwrap();
    let own = node(&mut lab, "node-1");
    let second = own.enis.iter().find(|one| one.id == eni).unwrap().primary;
    let target = node(&mut lab, "node-2").address.unwrap().to_string();
    assert!(answers(&mut lab, "node-1", "node-2"));
    assert_eq!(drops(&mut lab).spoofed, 0);

    // The second ENI's address is this machine's, but not on the ENI the packet leaves by.
    lab.run("node-1", &["ip", "address", "add", &format!("{second}/32"), "dev", "lo"]).unwrap();
    let wrong_way = ["ip", "route", "replace", &target, "via", "10.0.0.1", "dev", "eth0", "src", &second.to_string()];
    lab.run("node-1", &wrong_way).unwrap();
    assert!(!answers(&mut lab, "node-1", "node-2"));
    let dropped = node(&mut lab, "node-1").enis[0].spoofed;
    assert!(dropped > 0, "the drop is counted for the ENI it came from");

    // By its own ENI the same packet passes.
    for command in [
        "ip link set eth1 up",
        "ip route replace 10.0.0.1/32 dev eth1 table 2",
        "ip route replace default via 10.0.0.1 dev eth1 table 2",
    ] {
        lab.run("node-1", &command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    lab.run("node-1", &["ip", "rule", "add", "from", &second.to_string(), "lookup", "2"]).unwrap();
    lab.run("node-1", &["ip", "rule", "add", "to", &target, "lookup", "2"]).unwrap();
    assert_eq!(probe(&mut lab, "node-1", "node-2").seen, Some(second.into()));
    assert_eq!(node(&mut lab, "node-1").enis[0].spoofed, dropped);
}

#[test]
fn without_the_source_check_an_eni_sends_what_it_likes() {
    let mut lab = start(&spec());
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let target = node(&mut lab, "node-2").address.unwrap().to_string();
    lab.run("node-1", &["ip", "address", "add", "10.0.9.9/32", "dev", "lo"]).unwrap();
    let spoofing = ["ip", "route", "replace", &target, "via", "10.0.0.1", "dev", "eth0", "src", "10.0.9.9"];
    lab.run("node-1", &spoofing).unwrap();
    assert!(!answers(&mut lab, "node-1", "node-2"));
    let before = drops(&mut lab);
    assert!(before.spoofed > 0);

    let parameters = [("NetworkInterfaceId", eni.as_str()), ("SourceDestCheck.Value", "false")];
    lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
    assert!(!answers(&mut lab, "node-1", "node-2"), "the way back leads to nobody");
    let after = drops(&mut lab);
    assert_eq!(after.spoofed, before.spoofed, "what was counted stays, and nothing is added");
    assert!(after.unassigned > before.unassigned, "the answers went to nobody");
}

#[test]
fn a_link_appears_after_the_api_says_attached_and_it_is_bare() {
    let delays = Delays { attach_ms: 50, link_ms: 1500, detach_ms: 50, ..QUICK };
    let mut lab = start(&Spec { delays, ..spec() });
    let eni = attach(&mut lab, "node-1");
    eventually("EC2 says attached", || {
        node(&mut lab, "node-1").enis.iter().any(|one| one.id == eni && one.status == "attached")
    });
    let links = |lab: &Lab| {
        let all = ip_json(lab, "node-1", &["address"]);
        all.as_array().unwrap().iter().find(|link| link["ifname"] == "eth1").cloned()
    };
    assert_eq!(links(&lab), None, "the link is late");
    lab.settle().unwrap();
    let link = links(&lab).expect("the link is there once the cloud has settled");
    let mac = node(&mut lab, "node-1").enis.iter().find(|one| one.id == eni).unwrap().mac.clone();
    assert_eq!(link["address"], mac);
    assert_eq!(link["operstate"], "DOWN");
    assert_eq!(link["addr_info"].as_array().unwrap().len(), 0);
    assert_eq!(link["mtu"], 9001);

    let view = lab.view().unwrap();
    let attachment = view.enis.iter().find(|one| one.id.as_str() == eni).unwrap().attachment.clone().unwrap();
    lab.ec2().call("DetachNetworkInterface", &[("AttachmentId", attachment.id.as_str())]).unwrap();
    assert_eq!(links(&lab), None, "a detached ENI's link is gone");
}

#[test]
fn the_primary_eni_is_configured_as_dhcp_would() {
    let mut lab = start(&spec());
    let node = node(&mut lab, "node-1");
    let addresses = ip_json(&lab, "node-1", &["-4", "address", "show", "eth0"]);
    let address = &addresses[0]["addr_info"][0];
    assert_eq!((&address["local"], &address["prefixlen"]), (&node.address.unwrap().to_string().into(), &20.into()));
    let routes = ip_json(&lab, "node-1", &["route", "show", "default"]);
    assert_eq!((&routes[0]["gateway"], &routes[0]["dev"]), (&"10.0.0.1".into(), &"eth0".into()));
}

#[test]
fn packets_are_large_inside_the_vpc_and_small_on_the_way_out() {
    let lab = start(&spec());
    let links = ip_json(&lab, "vpc", &["link"]);
    for link in links.as_array().unwrap() {
        let name = link["ifname"].as_str().unwrap();
        let expected = match name {
            "lo" => continue,
            "igw" => 1500,
            _ => 9001,
        };
        assert_eq!(link["mtu"], expected, "{name}");
    }
    assert_eq!(ip_json(&lab, "node-1", &["link", "show", "eth0"])[0]["mtu"], 9001);
}

#[test]
fn imds_answers_its_caller_and_only_with_a_token() {
    let mut lab = start(&spec());
    let imds = "169.254.169.254";
    let refused = http(&lab, "node-1", imds, "GET /latest/meta-data/instance-id HTTP/1.1");
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    for name in ["node-1", "node-2", "peer"] {
        let ask = "PUT /latest/api/token HTTP/1.1\\r\\nX-aws-ec2-metadata-token-ttl-seconds: 60\\r\\nContent-Length: 0";
        let token = http(&lab, name, imds, ask);
        let ask = format!(
            "GET /latest/meta-data/instance-id HTTP/1.1\\r\\nX-aws-ec2-metadata-token: {}",
            body(&token).trim()
        );
        assert_eq!(body(&http(&lab, name, imds, &ask)).trim(), node(&mut lab, name).instance);
    }
}

#[test]
fn imds_travels_as_many_hops_as_the_instance_allows() {
    let mut lab = start(&spec());
    for hops in ["1", "2"] {
        // An instance that somebody launches through the API is a machine like any other, named by its tag.
        let name = format!("hops-{hops}");
        let subnet = node(&mut lab, "node-1").enis[0].subnet.clone();
        let parameters = [
            ("ImageId", "ami-00000000"),
            ("InstanceType", "m5.large"),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("SubnetId", subnet.as_str()),
            ("MetadataOptions.HttpPutResponseHopLimit", hops),
            ("TagSpecification.1.ResourceType", "instance"),
            ("TagSpecification.1.Tag.1.Key", "Name"),
            ("TagSpecification.1.Tag.1.Value", &name),
        ];
        lab.ec2().call("RunInstances", &parameters).unwrap();
        lab.settle().unwrap();
        assert!(answers(&mut lab, "node-1", &name));

        // One more hop: a namespace behind the machine, with an address of its own.
        let eni = node(&mut lab, &name).enis[0].id.clone();
        let address = assign(&lab, &eni);
        let script = format!(
            "ip netns add inner && ip link add v0 type veth peer name eth0 netns inner && ip link set v0 up && \
             ip route add {address} dev v0 && echo 1 > /proc/sys/net/ipv4/conf/v0/proxy_arp && \
             ip -n inner link set eth0 up && ip -n inner address add {address}/32 dev eth0 && \
             ip -n inner route add 169.254.1.1 dev eth0 && ip -n inner route add default via 169.254.1.1"
        );
        lab.run(&name, &["sh", "-c", &script]).unwrap();
        let ask = "exec 3<>/dev/tcp/169.254.169.254/80; printf 'PUT /latest/api/token HTTP/1.1\\r\\nHost: imds\\r\\n\
                   X-aws-ec2-metadata-token-ttl-seconds: 60\\r\\nConnection: close\\r\\n\\r\\n' >&3; timeout 1 cat <&3";
        let inside = lab.exec(&name, &["ip", "netns", "exec", "inner", "bash", "-c", ask]).unwrap();
        let heard = String::from_utf8_lossy(&inside.stdout).starts_with("HTTP/1.1 200");
        assert_eq!(heard, hops == "2", "{hops} hops: {inside:?}");
    }
}

#[test]
fn a_peered_vpc_is_reached_only_while_the_peering_is_active() {
    let mut lab = start(&spec());
    assert!(answers(&mut lab, "node-1", "peer") && answers(&mut lab, "peer", "node-1"));
    let listed = lab.ec2().call("DescribeVpcPeeringConnections", &[]).unwrap();
    let peering = element(&listed, "vpcPeeringConnectionId").unwrap();
    lab.ec2().call("DeleteVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]).unwrap();
    assert!(!answers(&mut lab, "node-1", "peer") && !answers(&mut lab, "peer", "node-1"));

    let (vpc, other) = (lab.info().vpc.id.clone(), lab.info().peer.id.clone());
    let asked = lab.ec2().call("CreateVpcPeeringConnection", &[("VpcId", &vpc), ("PeerVpcId", &other)]).unwrap();
    assert!(!answers(&mut lab, "node-1", "peer"), "asked for, not accepted");
    let peering = element(&asked, "vpcPeeringConnectionId").unwrap();
    lab.ec2().call("AcceptVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]).unwrap();
    assert!(answers(&mut lab, "node-1", "peer") && answers(&mut lab, "peer", "node-1"));
}

#[test]
fn the_api_is_there_for_nodes_and_wants_a_signature() {
    let lab = start(&spec());
    let unsigned = http(&lab, "node-1", "169.254.169.250", "GET /?Action=DescribeVpcs&Version=2016-11-15 HTTP/1.1");
    assert!(unsigned.contains("<Code>"), "{unsigned}");
    let signed = lab.ec2().call("DescribeVpcs", &[]).unwrap();
    assert!(signed.contains(&lab.info().vpc.id));
}

#[test]
fn the_internet_sees_public_addresses_and_nothing_private() {
    let mut lab = start(&spec());
    let public = node(&mut lab, "node-1").public;
    assert!(public.is_some());
    assert_eq!(probe(&mut lab, "node-1", "internet").seen, public.map(IpAddr::from));
    let server = lab.info().internet_server;
    assert_eq!(probe(&mut lab, "internet", "node-1").seen, Some(server.into()));

    // The peer has no public address, and its VPC no gateway.
    assert!(!answers(&mut lab, "peer", "internet"));
    // A secondary address without a public one does not leave, and is counted.
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let address = assign(&lab, &eni);
    lab.run("node-1", &["ip", "address", "add", &format!("{address}/32"), "dev", "lo"]).unwrap();
    let server = server.to_string();
    lab.run("node-1", &["ip", "route", "add", &server, "via", "10.0.0.1", "dev", "eth0", "src", &address]).unwrap();
    assert!(!answers(&mut lab, "node-1", "internet"));
    assert!(drops(&mut lab).no_public > 0);
}

#[test]
fn security_groups_let_in_what_their_rules_say_and_changes_take_effect() {
    let mut lab = start(&spec());
    let (own, other) = (node(&mut lab, "node-1"), node(&mut lab, "node-2"));
    let group = closed_group(&lab, "web");
    let parameters = [("NetworkInterfaceId", own.enis[0].id.as_str()), ("SecurityGroupId.1", group.as_str())];
    lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
    let heard = |lab: &mut Lab, from: &str, to: &str| {
        let Probe { rtt_us, seen, seen_tcp, .. } = probe(lab, from, to);
        (rtt_us.is_some(), seen.is_some(), seen_tcp.is_some())
    };
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (false, false, false));
    assert!(drops(&mut lab).denied > 0);
    assert_eq!(heard(&mut lab, "node-1", "node-2"), (true, true, true), "what it began is answered");
    assert_eq!(heard(&mut lab, "node-1", "internet"), (true, true, true));

    // Only the group of the other machine, and only echoes.
    let default = lab.view().unwrap().enis.iter().find(|eni| eni.id.as_str() == other.enis[0].id).unwrap().clone();
    let members = default.security_groups[0].to_string();
    let echoes = [("IpProtocol", "icmp"), ("FromPort", "8"), ("ToPort", "-1"), ("Groups.1.GroupId", members.as_str())];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &echoes);
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (true, false, false));
    assert_eq!(heard(&mut lab, "peer", "node-1"), (false, false, false), "not a member");

    let tcp = [("IpProtocol", "tcp"), ("FromPort", "1"), ("ToPort", "65535"), ("IpRanges.1.CidrIp", "10.99.0.0/16")];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &tcp);
    assert_eq!(heard(&mut lab, "peer", "node-1"), (false, false, true));
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (true, false, false));

    let everything = [("IpProtocol", "-1"), ("IpRanges.1.CidrIp", "0.0.0.0/0")];
    change_group(&lab, "AuthorizeSecurityGroupIngress", &group, &everything);
    assert_eq!(heard(&mut lab, "peer", "node-1"), (true, true, true));
    change_group(&lab, "RevokeSecurityGroupEgress", &group, &everything);
    assert_eq!(heard(&mut lab, "node-1", "peer"), (false, false, false), "nothing may begin here");
    assert_eq!(heard(&mut lab, "node-2", "node-1"), (true, true, true), "and what began elsewhere is answered");
}

#[test]
fn a_machine_can_come_later_and_go() {
    let mut lab = start(&spec());
    let name: String = lab.ask(&Request::NodeAdd { spec: "t3.small".parse().unwrap() }).unwrap();
    assert!(answers(&mut lab, "node-1", &name));
    let address = node(&mut lab, &name).address.unwrap().to_string();
    lab.ask::<()>(&Request::NodeRemove { node: name.clone() }).unwrap();
    assert!(!answers(&mut lab, "node-1", &address));
    assert!(lab.probe("node-1", &[name.as_str()]).is_err());
}

#[test]
fn a_node_writes_for_itself_alone() {
    let lab = start(&spec());
    let marker = format!("/etc/{}", lab.name());
    lab.run("node-1", &["touch", &marker]).unwrap();
    assert!(lab.run("node-1", &["ls", &marker]).is_ok());
    assert!(lab.run("node-2", &["ls", &marker]).is_err());
    assert!(!Path::new(&marker).exists(), "this machine's own /etc is untouched");
    let output = lab.exec("node-1", &["sh", "-c", "exit 7"]).unwrap();
    assert_eq!(output.status.code(), Some(7));
}

/// A plugin that notes how it is called and wires the pod with `ip`, with the address it finds in /run/address.
const SPY: &str = r#"#!/bin/bash
input=$(cat)
echo "$CNI_COMMAND|$CNI_CONTAINERID|$CNI_NETNS|$CNI_IFNAME|$CNI_PATH|$CNI_ARGS|$(tr -d '\n' <<<"$input")" >> /var/log/spy
address=$(cat /run/address)
pod=${CNI_NETNS##*/}
if [ "$address" = none ]; then
  echo '{"code":11,"msg":"nothing left","details":"the subnet is empty"}'; exit 1
fi
if [ "$CNI_COMMAND" = ADD ]; then
  set -e
  ip link add pod0 type veth peer name eth0 netns "$pod"
  ip link set pod0 up
  ip -n "$pod" link set eth0 up
  ip -n "$pod" address add "$address/32" dev eth0
  ip -n "$pod" route add 169.254.1.1 dev eth0
  ip -n "$pod" route add default via 169.254.1.1
  echo 1 > /proc/sys/net/ipv4/conf/pod0/proxy_arp
  ip route add "$address" dev pod0
  echo '{"cniVersion":"1.0.0","ips":[{"address":"'"$address"'/32"}]}'
fi
"#;

#[test]
fn pods_are_wired_by_the_nodes_plugin_as_a_runtime_would_call_it() {
    let programs = tempfile::tempdir().unwrap();
    for (name, text) in [("aws-cni", SPY), ("ipamd", "#!/bin/sh\n")] {
        let path = programs.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut lab = start(&Spec { bin_dir: Some(programs.path().to_owned()), ..spec() });
    let eni = node(&mut lab, "node-1").enis[0].id.clone();
    let address = assign(&lab, &eni);
    lab.run("node-1", &["sh", "-c", &format!("echo {address} > /run/address")]).unwrap();

    let pod = lab.pod_add("node-1", "web").unwrap();
    assert_eq!(pod.address.to_string(), address);
    for from in ["node-1/web", "node-2", "peer"] {
        let to = if from == "node-1/web" { "node-2" } else { "node-1/web" };
        assert!(answers(&mut lab, from, to), "{from} to {to}");
    }
    assert_eq!(probe(&mut lab, "node-1/web", "peer").seen, Some(pod.address));
    assert!(lab.run("node-1/web", &["ip", "route"]).unwrap().contains("169.254.1.1"));
    lab.pod_del("node-1", "web").unwrap();
    assert!(lab.run("node-1", &["ls", &pod.netns]).is_err(), "the namespace's name is gone");
    // The namespace itself goes in the kernel's own time.
    eventually("the pod is silent", || probe(&mut lab, "node-2", &address).rtt_us.is_none());

    lab.run("node-1", &["sh", "-c", "echo none > /run/address"]).unwrap();
    let refused = lab.pod_add("node-1", "db").unwrap_err().to_string();
    assert!(refused.contains("code 11") && refused.contains("nothing left; the subnet is empty"), "{refused}");

    let calls = lab.run("node-1", &["cat", "/var/log/spy"]).unwrap();
    let calls: Vec<Vec<&str>> = calls.lines().map(|line| line.splitn(7, '|').collect()).collect();
    let verbs: Vec<&str> = calls.iter().map(|call| call[0]).collect();
    assert_eq!(verbs, ["ADD", "DEL", "ADD", "DEL"], "a failed ADD is followed by DEL");
    for call in &calls {
        assert_eq!(call[1].len(), 64);
        assert!(call[2].starts_with("/var/run/netns/cni-"));
        assert_eq!((call[3], call[4]), ("eth0", "/opt/cni/bin:/usr/lib/cni"));
        for part in ["K8S_POD_NAMESPACE=default", "K8S_POD_UID=", "K8S_POD_INFRA_CONTAINER_ID=", "IgnoreUnknown=1"] {
            assert!(call[5].contains(part), "{}", call[5]);
        }
    }
    let input = |index: usize| serde_json::from_str::<Value>(calls[index][6]).unwrap();
    assert_eq!(input(0)["name"], "aws-cni");
    assert_eq!(input(0)["type"], "aws-cni");
    assert_eq!(input(0)["prevResult"], Value::Null);
    assert_eq!(input(1)["prevResult"]["ips"][0]["address"], format!("{address}/32"));
}

/// What the lab must not change: links, addresses, routes, rules and nftables of this machine.
fn machine() -> Vec<String> {
    let commands = [
        "ip -o link",
        "ip -o address",
        "ip route show table all",
        "ip rule",
        "nft list ruleset",
        "cat /proc/self/mountinfo",
    ];
    let said = commands.map(|command| {
        let parts: Vec<&str> = command.split(' ').collect();
        Command::new(parts[0]).args(&parts[1..]).output().expect("ip, nft and cat are there").stdout
    });
    // Remaining lifetimes of addresses change by themselves.
    let still = said.map(|text| String::from_utf8_lossy(&text).replace(char::is_numeric, "#"));
    still.to_vec()
}

/// Ids of processes with such a command line, as `/proc` has it: arguments end with a zero byte.
fn processes(fits: impl Fn(&str) -> bool) -> Vec<String> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        fits(&String::from_utf8_lossy(&line))
    })
    .map(|entry| entry.file_name().to_string_lossy().into_owned())
    .filter(|pid| *pid != std::process::id().to_string())
    .collect()
}

#[test]
fn nothing_is_left_when_the_lab_is_killed() {
    let _alone = DEAD_LABS.lock().unwrap_or_else(PoisonError::into_inner);
    let before = machine();
    let spec = spec();
    let lab = start(&spec);
    let dir = boot::dir_of(&spec.name).unwrap();
    // Something of the user's own that runs inside and would run on.
    let mark = format!("86400.{}", std::process::id());
    let mut inside = Command::new(binary("lab"))
        .args(["exec", "--name", &spec.name, "node-1", "--", "sleep", &mark])
        .spawn()
        .unwrap();
    let sleeps = || !processes(|line| line == format!("sleep\0{mark}\0")).is_empty();
    eventually("the process inside runs", sleeps);

    let killed = Command::new("/bin/kill").args(["-9", &lab.pid().to_string()]).status().unwrap();
    assert!(killed.success());
    let all = || processes(|line| line.contains(&spec.name));
    eventually("every process of the lab is gone", || !sleeps() && all().iter().all(|pid| is_zombie(pid)));
    let _ = inside.wait();
    assert!(dir.exists(), "only the folder is left");
    drop(lab);
    assert_eq!(machine(), before);

    // The next start under the name sweeps it, and its orderly end removes it.
    let again = start(&spec);
    drop(again);
    assert!(!dir.exists());
    assert_eq!(machine(), before);
}

fn is_zombie(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[test]
fn clean_removes_what_a_killed_lab_left_and_spares_the_living() {
    let _alone = DEAD_LABS.lock().unwrap_or_else(PoisonError::into_inner);
    let (dead, alive) = (spec(), spec());
    let killed = start(&dead);
    let mut living = start(&alive);
    assert!(Command::new("/bin/kill").args(["-9", &killed.pid().to_string()]).status().unwrap().success());
    drop(killed);
    let nobody_starts = CLEANING.write().unwrap_or_else(PoisonError::into_inner);
    let said = Command::new(binary("lab")).arg("clean").output().unwrap();
    drop(nobody_starts);
    assert!(String::from_utf8_lossy(&said.stdout).contains(&dead.name), "{said:?}");
    assert!(!boot::dir_of(&dead.name).unwrap().exists());
    assert!(answers(&mut living, "node-1", "node-2"));
}

#[test]
fn two_labs_live_side_by_side() {
    let (mut a, mut b) = (start(&spec()), start(&spec()));
    assert_ne!(a.info().endpoint, b.info().endpoint);
    // The same seed gives both the same addresses, and neither meets the other.
    assert_eq!(node(&mut a, "node-1").address, node(&mut b, "node-1").address);
    for lab in [&mut a, &mut b] {
        assert!(answers(lab, "node-1", "node-2"));
    }
    let eni = node(&mut a, "node-1").enis[0].id.clone();
    let address = assign(&a, &eni);
    a.run("node-1", &["ip", "address", "add", &format!("{address}/32"), "dev", "lo"]).unwrap();
    assert!(answers(&mut a, "node-2", &address));
    assert!(!answers(&mut b, "node-2", &address));
    let taken = Lab::start(&binary("lab"), &Spec { name: a.name().to_owned(), ..spec() });
    assert!(taken.err().is_some_and(|error| error.to_string().contains("up already")));
}
