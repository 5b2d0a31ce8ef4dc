//! Programming a node, seen with iproute2's and nft's eyes, and by where packets come out.
//!
//! ```text
//!  pod-a 10.0.0.11 ─┐            ┌ eth0 10.0.0.10 ── r1 10.0.0.1 ┐   both routers also are
//!                   ├── the node ┤                               ├── 10.0.9.9  (in the VPC)
//!  pod-b 10.0.1.21 ─┘            └ eth1 10.0.1.20 ── r2 10.0.1.1 ┘   198.51.100.1 (outside)
//! ```

mod common;

use std::net::UdpSocket;

use common::{add_netns, await_carrier, exchange, in_testbed, ip, sh, udp, udp_in, v4};
use flatwire_core::ids::{EniId, RouteTable};
use flatwire_core::netplan::{EniPlan, Look, NodePlan, PrimaryPlan, Snat};
use flatwire_core::ports::{Kernel, Repair};
use flatwire_kernel::pod::{PodWiring, host_if_name, unwire, wire};
use flatwire_kernel::{Netns, NodeKernel};

const MAC_0: &str = "02:00:00:00:00:10";
const MAC_1: &str = "02:00:00:00:00:20";

struct Vpc {
    r1: Netns,
    r2: Netns,
}

/// The two links of the node and what is behind them. The second has another name than anybody expects.
fn vpc() -> Vpc {
    let (_, r1) = add_netns("r1");
    let (_, r2) = add_netns("r2");
    sh(&format!(
        "ip link set lo up
         ip link add eth0 address {MAC_0} type veth peer name e netns r1
         ip link add late7 address {MAC_1} type veth peer name e netns r2
         ip link set eth0 up
         ip addr add 10.0.0.10/24 dev eth0
         ip route add default via 10.0.0.1
         ip -n r1 addr add 10.0.0.1/24 dev e; ip -n r2 addr add 10.0.1.1/24 dev e
         for r in r1 r2; do
           ip netns exec $r sh -c 'echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 0 > /proc/sys/net/ipv4/conf/e/rp_filter'
           ip -n $r link set lo up; ip -n $r link set e up
           ip -n $r addr add 10.0.9.9/32 dev lo; ip -n $r addr add 198.51.100.1/32 dev lo; ip -n $r addr add 10.0.0.2/32 dev lo
         done
         ip -n r1 neigh add 10.0.0.11 lladdr {MAC_0} dev e
         ip -n r2 neigh add 10.0.1.20 lladdr {MAC_1} dev e
         ip -n r2 neigh add 10.0.1.21 lladdr {MAC_1} dev e"
    ));
    Vpc { r1, r2 }
}

fn plan() -> NodePlan {
    let primary = PrimaryPlan {
        id: EniId::new("eni-0").expect("an id"),
        mac: MAC_0.parse().expect("a MAC"),
        address: "10.0.0.10".parse().expect("an address"),
    };
    NodePlan {
        enis: vec![EniPlan {
            id: EniId::new("eni-1").expect("an id"),
            mac: MAC_1.parse().expect("a MAC"),
            address: "10.0.1.20".parse().expect("an address"),
            subnet: "10.0.1.0/24".parse().expect("a subnet"),
            table: RouteTable(2),
            mark: 1,
            sources: ["10.0.1.21/32", "10.0.1.32/28"].into_iter().map(|s| s.parse().expect("a net")).collect(),
        }],
        vpc: vec!["10.0.0.0/16".parse().expect("a net")],
        exclude_snat: vec!["192.168.0.0/24".parse().expect("a net")],
        ..NodePlan::new(primary)
    }
}

/// A pod on a node whose links are up.
async fn pod(name: &str, address: &str) -> (PodWiring, Netns) {
    for (netns, link) in [(None, "eth0"), (None, "late7"), (Some("r1"), "e"), (Some("r2"), "e")] {
        await_carrier(netns, link);
    }
    let (netns, opened) = add_netns(name);
    let wiring = PodWiring {
        netns,
        pod_if: "eth0".to_owned(),
        host_if: host_if_name("eni", "default", name, 0),
        mtu: 9001,
        address: v4(address),
        second: None,
        gateway_index: 0,
        seed: name.to_owned(),
    };
    wire(&wiring).await.expect("wiring");
    (wiring, opened)
}

/// Rules, routes, addresses and the ruleset as the tools print them, without what counts, and without the flag by which
/// our addresses differ from those that somebody else gave to an ENI.
fn node_snapshot() -> String {
    let ruleset = sh("nft -s list ruleset");
    let routes = sh("ip -4 route show table all | sort");
    format!(
        "{}--\n{routes}--\n{}--\n{ruleset}",
        sh("ip rule"),
        sh("ip -4 -o addr | sort").replace(" noprefixroute", "")
    )
}

#[test]
fn a_programmed_node_has_the_shape_of_the_design() {
    in_testbed(|| async {
        vpc();
        sh("ip rule add pref 512 to 10.0.1.99 lookup main; ip rule add pref 1536 from 10.0.1.99 lookup 2");
        let kernel = NodeKernel::open().unwrap();
        let report = kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert_eq!(report.programmed.iter().map(|id| id.as_str()).collect::<Vec<_>>(), ["eni-0", "eni-1"]);
        assert!(report.missing_links.is_empty());
        assert!(report.repaired.len() > 8, "{:#?}", report.repaired);

        let mut rules: Vec<&str> = Vec::new();
        let text = sh("ip rule").replace('\t', " ");
        rules.extend(text.lines().map(str::trim));
        for wanted in [
            "512: from all lookup main suppress_prefixlength 31 suppress_ifgroup default proto 70",
            "512: from all to 10.0.1.99 lookup main",
            "1024: from all fwmark 0x80/0x80 lookup main proto 70",
            "1536: from all fwmark 0x1/0x7f lookup 2 proto 70",
            "1536: from 10.0.1.99 lookup 2",
            "32765: from 10.0.1.20 lookup 2 proto 70",
        ] {
            assert!(rules.contains(&wanted), "{wanted} in {rules:#?}");
        }
        assert_eq!(rules.len(), 9);
        assert_eq!(ip("route show table 2 default")[0]["gateway"], "10.0.1.1");
        assert_eq!(ip("route show table 2 10.0.1.1")[0]["scope"], "link");
        assert!(ip("route show 10.0.1.0/24").is_empty(), "the ENI's subnet is not in main");
        for (link, address) in [("eth0", "10.0.0.10"), ("late7", "10.0.1.20")] {
            let shown = &ip(&format!("-4 addr show {link}"))[0];
            assert_eq!((shown["mtu"].as_u64(), &shown["addr_info"][0]["local"]), (Some(9001), &address.into()));
            let rp_filter = std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{link}/rp_filter")).unwrap();
            assert_eq!(rp_filter.trim(), "2");
        }
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");

        let links = kernel.links().await.unwrap();
        let late = links.iter().find(|l| l.link.name == "late7").unwrap();
        assert_eq!((late.link.mac, late.link.mtu, late.link.up), (MAC_1.parse().ok(), 9001, true));
    });
}

#[test]
fn a_second_run_changes_nothing() {
    in_testbed(|| async {
        vpc();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let before = node_snapshot();
        for _ in 0..2 {
            assert_eq!(kernel.apply(&plan(), &Look::default()).await.unwrap().repaired, []);
        }
        // A restarted daemon knows nothing of the first.
        let restarted = NodeKernel::open().unwrap();
        assert_eq!(restarted.apply(&plan(), &Look::default()).await.unwrap().repaired, []);
        assert_eq!(node_snapshot(), before);
    });
}

#[test]
fn what_others_flush_is_put_back_and_told() {
    let tamperings = [
        ("ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default", "rule 512:"),
        ("ip rule del pref 1536", "rule 1536: fwmark 0x1/0x7f lookup 2 added"),
        ("ip route flush table 2", "route default via 10.0.1.1 table 2 set"),
        ("ip route replace table 2 default via 10.0.0.1", "route default via 10.0.1.1 table 2 set"),
        ("ip addr flush dev late7; ip route flush table 2", "address 10.0.1.20/24 added to late7"),
        ("ip link set late7 down", "interface late7 brought up"),
        ("ip link set eth0 mtu 1500", "MTU of eth0 set from 1500 to 9001"),
        ("nft flush ruleset", "nftables table flatwire had been changed or removed"),
        ("nft delete table ip flatwire; nft add table ip flatwire", "nftables table flatwire had been changed"),
        ("nft flush chain ip flatwire steer", "nftables table flatwire had been changed"),
        ("nft insert rule ip flatwire source-nat accept", "nftables table flatwire had been changed"),
        ("nft delete element ip flatwire no-snat '{ 192.168.0.0/24 }'", "nftables table flatwire had been changed"),
        ("nft delete element ip flatwire pod-eni '{ 10.0.1.32/28 }'", "nftables table flatwire had been changed"),
        ("nft add chain ip flatwire source-nat '{ policy drop; }'", "nftables table flatwire had been changed"),
        ("echo 0 > /proc/sys/net/ipv4/ip_forward", "sysctl net/ipv4/ip_forward set to 1"),
        ("echo 1 > /proc/sys/net/ipv4/conf/late7/rp_filter", "sysctl net/ipv4/conf/late7/rp_filter set to 2"),
        ("ip addr add 10.0.1.33/24 dev late7", "pod address 10.0.1.33/24 removed from late7"),
        (
            "ip addr del 10.0.1.20/24 dev late7; ip addr add 10.0.1.20/24 dev late7",
            "route 10.0.1.0/24 by late7 removed",
        ),
        ("ip rule add pref 1536 fwmark 0x5/0x7f lookup 6 protocol 70", "rule 1536: fwmark 0x5/0x7f lookup 6 deleted"),
    ];
    for (tampering, sentence) in tamperings {
        std::thread::scope(|scope| {
            let case = scope.spawn(|| {
                in_testbed(|| async {
                    vpc();
                    let kernel = NodeKernel::open().unwrap();
                    kernel.apply(&plan(), &Look::default()).await.unwrap();
                    let before = node_snapshot();
                    sh(tampering);
                    let repaired = kernel.apply(&plan(), &Look::default()).await.unwrap().repaired;
                    assert!(
                        repaired.iter().any(|r| r.text.contains(sentence) && r.undone),
                        "{tampering}: {repaired:#?}"
                    );
                    assert_eq!(node_snapshot(), before, "{tampering}");
                    assert_eq!(kernel.apply(&plan(), &Look::default()).await.unwrap().repaired, [], "{tampering}");
                });
            });
            case.join().unwrap_or_else(|_| panic!("{tampering}"));
        });
    }
}

#[test]
fn what_is_not_ours_is_left_alone() {
    in_testbed(|| async {
        vpc();
        sh("ip rule add pref 512 to 10.0.1.99 lookup main
            ip rule add pref 1536 fwmark 0x9/0x7f lookup 77
            ip rule add pref 100 from 1.2.3.4 lookup 99
            ip route add table 99 default via 10.0.0.1
            ip route add table 2 10.7.0.0/16 via 10.0.0.1
            ip route add 10.8.0.0/16 via 10.0.0.1
            ip addr add 172.16.0.1/32 dev eth0
            nft add table ip other; nft add chain ip other c; nft add table ip aws-cni");
        let foreign = [
            "ip rule show pref 100",
            "ip rule show pref 512 to 10.0.1.99",
            "ip rule show fwmark 0x9",
            "ip route show table 99",
            "ip route show table 2 10.7.0.0/16",
            "ip route show 10.8.0.0/16",
            "ip addr show to 172.16.0.1",
            "nft list table ip other",
            "nft list table ip aws-cni",
        ]
        .map(|command| (command, sh(command)));
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let mut without = plan();
        without.enis.clear();
        kernel.apply(&without, &Look::default()).await.unwrap();
        sh("nft add rule ip other c accept; nft flush chain ip other c");
        assert_eq!(kernel.apply(&without, &Look::default()).await.unwrap().repaired, [], "others' nftables changes");
        kernel.clear().await.unwrap();
        for (command, before) in foreign {
            // The MTU of the link is in the listing of addresses.
            let after = sh(command).replace("mtu 9001", "mtu 1500");
            assert_eq!(after, before, "{command}");
        }
    });
}

#[test]
fn an_eni_that_leaves_the_plan_loses_its_rules_and_table() {
    in_testbed(|| async {
        vpc();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let mut without = plan();
        without.enis.clear();
        let repaired = kernel.apply(&without, &Look::default()).await.unwrap().repaired;
        let deleted = |r: &&Repair| r.text == "rule 1536: fwmark 0x1/0x7f lookup 2 deleted";
        let deleted = repaired.iter().find(deleted).unwrap_or_else(|| panic!("{repaired:#?}"));
        assert!(!deleted.undone, "wanted, and nobody's deed");
        assert_eq!(sh("ip route show table 2 2>/dev/null || true"), "");
        assert_eq!(sh("ip rule").lines().count(), 5);
        assert!(!sh("nft list table ip flatwire").contains("eni-1"));
    });
}

#[test]
fn a_link_that_comes_late_is_named_and_then_programmed() {
    in_testbed(|| async {
        vpc();
        sh("ip link del late7");
        let kernel = NodeKernel::open().unwrap();
        let report = kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert_eq!(report.missing_links.iter().map(|id| id.as_str()).collect::<Vec<_>>(), ["eni-1"]);
        assert_eq!(report.programmed.iter().map(|id| id.as_str()).collect::<Vec<_>>(), ["eni-0"]);
        sh(&format!("ip link add ens7 address {MAC_1} type veth peer name e netns r2; ip -n r2 link set e up"));
        let report = kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert!(report.missing_links.is_empty() && report.programmed.len() == 2, "{report:#?}");
        assert_eq!(ip("route show table 2 default")[0]["dev"], "ens7");
        // Gone again: it is named, and what stands of it is not torn down.
        sh("ip link del ens7");
        let report = kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert_eq!(report.missing_links.len(), 1);
        assert!(report.repaired.iter().all(|repair| !repair.undone), "nothing comes in by it any more: {report:#?}");
        assert_eq!(ip("rule show pref 1536").len(), 1);
    });
}

#[test]
fn plans_that_would_do_harm_are_refused() {
    in_testbed(|| async {
        vpc();
        let kernel = NodeKernel::open().unwrap();
        let harms: [fn(&mut NodePlan); 5] = [
            |plan| plan.veth_prefix.clear(),
            |plan| plan.enis[0].mark = 0,
            |plan| plan.enis[0].mark = 0x81,
            |plan| plan.enis[0].table = RouteTable::MAIN,
            |plan| plan.enis.push(plan.enis[0].clone()),
        ];
        let before = node_snapshot();
        for (position, harm) in harms.into_iter().enumerate() {
            let mut plan = plan();
            harm(&mut plan);
            assert!(kernel.apply(&plan, &Look::default()).await.is_err(), "harm {position}");
            assert_eq!(node_snapshot(), before);
        }
    });
}

/// Who hears on a port of an address that both routers have.
struct Ears {
    by_primary: UdpSocket,
    by_second: UdpSocket,
}

impl Ears {
    fn new(vpc: &Vpc, address: &str, port: u16) -> Self {
        Self { by_primary: udp_in(&vpc.r1, v4(address), port), by_second: udp_in(&vpc.r2, v4(address), port) }
    }

    /// Sends from a pod, and returns the source that was seen; the reply has to come back.
    fn heard_by_primary(&self, from: &UdpSocket) -> String {
        Self::heard(from, &self.by_primary, &self.by_second)
    }

    fn heard_by_second(&self, from: &UdpSocket) -> String {
        Self::heard(from, &self.by_second, &self.by_primary)
    }

    fn heard(from: &UdpSocket, here: &UdpSocket, not_here: &UdpSocket) -> String {
        let mut seen = None;
        // Twice: the first packet of a connection goes another way through the rules than those after it.
        for _ in 0..2 {
            let source = exchange(from, here);
            here.send_to(b"reply", source).expect("send");
            let mut buffer = [0; 16];
            let (length, _) = from.recv_from(&mut buffer).expect("the reply comes back");
            assert_eq!(&buffer[..length], b"reply");
            assert!(seen.is_none_or(|before| before == source), "one connection, one source");
            seen = Some(source);
        }
        not_here.set_nonblocking(true).expect("nonblocking");
        assert!(not_here.recv_from(&mut [0; 16]).is_err(), "and by no other way");
        seen.expect("seen").ip().to_string()
    }
}

#[test]
fn packets_leave_by_the_eni_of_their_pod_and_outside_ones_translated() {
    in_testbed(|| async {
        let vpc = vpc();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let (_, a) = pod("pod-a", "10.0.0.11").await;
        let (_, b) = pod("pod-b", "10.0.1.21").await;
        let (in_a, in_b) = (udp_in(&a, v4("10.0.0.11"), 700), udp_in(&b, v4("10.0.1.21"), 700));

        let in_vpc = Ears::new(&vpc, "10.0.9.9", 53);
        assert_eq!(in_vpc.heard_by_primary(&in_a), "10.0.0.11");
        assert_eq!(in_vpc.heard_by_second(&in_b), "10.0.1.21");
        let outside = Ears::new(&vpc, "198.51.100.1", 53);
        assert_eq!(outside.heard_by_primary(&in_a), "10.0.0.10");
        assert_eq!(outside.heard_by_primary(&in_b), "10.0.0.10");

        // Pods of one node, and the node itself, meet without leaving it.
        assert_eq!(exchange(&in_a, &in_b).ip(), v4("10.0.0.11"));
        assert_eq!(exchange(&in_b, &in_a).ip(), v4("10.0.1.21"));
        let on_node = udp(v4("10.0.0.10"), 800).unwrap();
        assert_eq!(exchange(&on_node, &in_b).ip(), v4("10.0.0.10"));
        assert_eq!(exchange(&in_b, &on_node).ip(), v4("10.0.1.21"));
    });
}

#[test]
fn a_host_route_of_the_nodes_own_does_not_catch_its_pods() {
    in_testbed(|| async {
        let vpc = vpc();
        // systemd-networkd routes to the DNS servers it learned by DHCP, and those are in the VPC.
        sh("ip route add 10.0.0.2 via 10.0.0.1 dev eth0 proto dhcp");
        NodeKernel::open().unwrap().apply(&plan(), &Look::default()).await.unwrap();
        let (_, b) = pod("pod-b", "10.0.1.21").await;
        let in_b = udp_in(&b, v4("10.0.1.21"), 700);
        let resolver = Ears::new(&vpc, "10.0.0.2", 53);
        assert_eq!(resolver.heard_by_second(&in_b), "10.0.1.21");
        let on_node = udp(v4("10.0.0.10"), 800).unwrap();
        assert_eq!(resolver.heard_by_primary(&on_node), "10.0.0.10");
    });
}

#[test]
fn whoever_calls_a_pod_from_outside_is_answered_by_the_same_eni() {
    in_testbed(|| async {
        let vpc = vpc();
        NodeKernel::open().unwrap().apply(&plan(), &Look::default()).await.unwrap();
        let (_, b) = pod("pod-b", "10.0.1.21").await;
        let in_b = udp_in(&b, v4("10.0.1.21"), 700);
        let caller = udp_in(&vpc.r2, v4("198.51.100.1"), 4000);
        assert_eq!(exchange(&caller, &in_b).ip(), v4("198.51.100.1"));
        assert_eq!(exchange(&in_b, &caller).to_string(), "10.0.1.21:700", "not translated, and by ENI 1");
    });
}

const PROXY: &str = "nft 'table ip proxy { chain pre { type nat hook prerouting priority dstnat;
    ip daddr 172.20.0.1 udp dport 53 dnat to 10.0.9.9:53
    ip daddr 172.20.0.2 udp dport 53 dnat to 198.51.100.1:53
    ip daddr 10.0.0.10 udp dport 30000 dnat to 10.0.1.21:700
    }
    }'";

#[test]
fn services_are_judged_by_their_real_destination() {
    in_testbed(|| async {
        let vpc = vpc();
        sh(PROXY);
        NodeKernel::open().unwrap().apply(&plan(), &Look::default()).await.unwrap();
        let (_, b) = pod("pod-b", "10.0.1.21").await;
        let in_b = udp_in(&b, v4("10.0.1.21"), 700);
        let call = |service: &str, ear: &UdpSocket| {
            in_b.send_to(b"hello", (v4(service), 53)).unwrap();
            let mut buffer = [0; 16];
            let (_, source) = ear.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{service}: {e}"));
            ear.send_to(b"reply", source).unwrap();
            assert_eq!(in_b.recv_from(&mut buffer).unwrap().1.ip(), v4(service), "the reply is the service's");
            source.ip()
        };
        assert_eq!(call("172.20.0.1", &udp_in(&vpc.r2, v4("10.0.9.9"), 53)), v4("10.0.1.21"));
        assert_eq!(call("172.20.0.2", &udp_in(&vpc.r1, v4("198.51.100.1"), 53)), v4("10.0.0.10"));
    });
}

#[test]
fn a_node_port_is_answered_by_the_primary_eni() {
    in_testbed(|| async {
        let vpc = vpc();
        sh(PROXY);
        let kernel = NodeKernel::open().unwrap();
        for snat in [plan().snat, Snat::External] {
            kernel.apply(&NodePlan { snat, ..plan() }, &Look::default()).await.unwrap();
            let (wiring, b) = pod("pod-b", "10.0.1.21").await;
            let in_b = udp_in(&b, v4("10.0.1.21"), 700);
            let caller = udp_in(&vpc.r1, v4("198.51.100.1"), 4000);
            caller.send_to(b"hello", (v4("10.0.0.10"), 30_000)).unwrap();
            let mut buffer = [0; 16];
            let (_, source) = in_b.recv_from(&mut buffer).unwrap();
            assert_eq!(source.ip(), v4("198.51.100.1"), "the caller is seen");
            in_b.send_to(b"reply", source).unwrap();
            let (_, answered_by) = caller.recv_from(&mut buffer).unwrap();
            assert_eq!(answered_by.to_string(), "10.0.0.10:30000");
            sh("ip netns del pod-b");
            unwire(&flatwire_kernel::pod::PodUnwiring {
                netns: None,
                pod_if: wiring.pod_if,
                host_if: wiring.host_if,
                addresses: vec![wiring.address],
            })
            .await
            .unwrap();
        }
    });
}

#[test]
fn with_external_snat_nothing_is_translated_but_old_connections_live_on() {
    in_testbed(|| async {
        let vpc = vpc();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let (_, b) = pod("pod-b", "10.0.1.21").await;
        let old = udp_in(&b, v4("10.0.1.21"), 700);
        let outside = Ears::new(&vpc, "198.51.100.1", 53);
        assert_eq!(outside.heard_by_primary(&old), "10.0.0.10");

        kernel.apply(&NodePlan { snat: Snat::External, node_port: false, ..plan() }, &Look::default()).await.unwrap();
        let new = udp_in(&b, v4("10.0.1.21"), 701);
        let elsewhere = Ears::new(&vpc, "198.51.100.1", 54);
        assert_eq!(elsewhere.heard_by_second(&new), "10.0.1.21");
        assert_eq!(outside.heard_by_primary(&old), "10.0.0.10");

        // And a connection that began untranslated stays so when translation begins.
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert_eq!(elsewhere.heard_by_second(&new), "10.0.1.21");
    });
}

#[test]
fn pod_routes_are_a_veto_and_pods_of_the_add_on_count() {
    in_testbed(|| async {
        vpc();
        sh("ip route add 10.0.0.2 via 10.0.0.1 dev eth0 proto dhcp");
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert!(kernel.pods().await.unwrap().routes.is_empty());
        let (wiring, _netns) = pod("pod-b", "10.0.1.21").await;
        // As the add-on wires: no group, no protocol number, two rules.
        sh("ip link add eni0000000001 type veth peer name x; ip link set eni0000000001 up
            ip route add 10.0.1.33 dev eni0000000001
            ip rule add pref 512 to 10.0.1.33 lookup main; ip rule add pref 1536 from 10.0.1.33 lookup 2");
        let routes: Vec<String> = kernel.pods().await.unwrap().routes.iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["10.0.1.21", "10.0.1.33"]);
        let repaired = kernel.apply(&plan(), &Look::default()).await.unwrap().repaired;
        assert_eq!(
            repaired.iter().map(|r| r.text.as_str()).collect::<Vec<_>>(),
            ["interface eni0000000001 put into group 70"]
        );
        assert_eq!(ip(&format!("link show {}", wiring.host_if))[0]["group"], "70");
        assert_eq!(ip("link show eni0000000001")[0]["group"], "70");
    });
}

#[test]
fn a_cleared_node_has_nothing_left_over() {
    in_testbed(|| async {
        vpc();
        let kernel = NodeKernel::open().unwrap();
        assert_eq!(kernel.leftovers("eni").await.unwrap(), Vec::<String>::new());
        kernel.clear().await.unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let (wiring, _netns) = pod("pod-b", "10.0.1.21").await;
        let found = kernel.leftovers("eni").await.unwrap();
        for wanted in
            ["interface eni", "route 10.0.1.21/32", "route default via 10.0.1.1 table 2", "rule 512", "nftables table"]
        {
            assert!(found.iter().any(|text| text.starts_with(wanted)), "{wanted} in {found:#?}");
        }
        kernel.clear().await.unwrap();
        assert_eq!(kernel.leftovers("eni").await.unwrap().len(), 2, "the pod and its route");
        assert_eq!(sh("nft list ruleset"), "");
        assert_eq!(ip("rule").len(), 3);
        unwire(&flatwire_kernel::pod::PodUnwiring {
            netns: Some(wiring.netns),
            pod_if: wiring.pod_if,
            host_if: wiring.host_if,
            addresses: vec![wiring.address],
        })
        .await
        .unwrap();
        assert_eq!(kernel.leftovers("eni").await.unwrap(), Vec::<String>::new());
        for _ in 0..2 {
            kernel.clear().await.unwrap();
        }
    });
}
