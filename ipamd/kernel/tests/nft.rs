//! The nftables tables, seen with nft's eyes and by what passes through them.

mod common;

use std::path::Path;

use common::{add_netns, await_carrier, exchange, in_testbed, sh, udp_in, v4};
use flatwire_core::families::Families;
use flatwire_core::ids::{EniId, RouteTable};
use flatwire_core::netplan::{EniPlan, Look, NodePlan, PortChoice, PrimaryPlan, Snat};
use flatwire_core::ports::Kernel;
use flatwire_kernel::nft::{Chain, Family, Hook, Map, Nft, Ports, Rule, Set, Table};
use flatwire_kernel::{NodeKernel, Route};
use ipnet::Ipv4Net;
use serde_json::Value;

fn plan(enis: Vec<EniPlan>) -> NodePlan {
    let primary = PrimaryPlan {
        id: EniId::new("eni-0").expect("an id"),
        mac: "02:00:00:00:00:10".parse().expect("a MAC"),
        address: "10.0.0.10".parse().expect("an address"),
    };
    NodePlan {
        enis,
        vpc: vec!["10.0.0.0/16".parse().expect("a net")],
        exclude_snat: vec!["100.64.0.0/10".parse().expect("a net")],
        mtu: 1500,
        ..NodePlan::new(primary)
    }
}

fn eni(number: u32, sources: &[&str]) -> EniPlan {
    EniPlan {
        id: EniId::new(format!("eni-{number}")).expect("an id"),
        mac: format!("02:00:00:00:01:{number:02x}").parse().expect("a MAC"),
        address: format!("10.0.{number}.20").parse().expect("an address"),
        subnet: format!("10.0.{number}.0/24").parse().expect("a subnet"),
        table: RouteTable(number + 1),
        mark: number,
        sources: sources.iter().map(|source| source.parse().expect("a net")).collect(),
    }
}

/// The ruleset as nft tells it in JSON, one object a line, without handles.
fn listing() -> String {
    let listed: Value = serde_json::from_str(&sh("nft -j -s list ruleset")).expect("nft prints JSON");
    let mut text = String::new();
    for object in listed["nftables"].as_array().expect("a list") {
        if object.get("metainfo").is_some() {
            continue;
        }
        let mut object = object.clone();
        for inner in object.as_object_mut().expect("an object").values_mut() {
            inner.as_object_mut().expect("an object").remove("handle");
        }
        text.push_str(&object.to_string());
        text.push('\n');
    }
    text
}

/// `FLATWIRE_BLESS=1` writes what is found as what is expected.
fn golden(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.jsonl"));
    let found = listing();
    if std::env::var_os("FLATWIRE_BLESS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(&path, &found).expect("a golden file");
    }
    let expected = std::fs::read_to_string(&path).expect("the golden file");
    assert_eq!(found, expected, "{name}");
}

/// The name of a golden file, and what makes its plan.
type Variant = (&'static str, fn(&mut NodePlan));

#[test]
fn the_nodes_table_is_the_golden_one() {
    let variants: [Variant; 5] = [
        ("to-primary", |_| {}),
        ("external", |plan| {
            plan.snat = Snat::External;
            plan.node_port = false;
        }),
        ("exclude-all", |plan| {
            plan.snat = Snat::ToPrimary(PortChoice::Keep);
            plan.exclude_snat = vec!["0.0.0.0/0".parse().expect("a net")];
            plan.enis.clear();
        }),
        ("dual-stack", |plan| {
            plan.families = Families::Dual;
            plan.vpc.push("2001:db8::/56".parse().expect("a net"));
            plan.block_imds = true;
            for (eni, prefix) in plan.enis.iter_mut().zip(["2001:db8:0:1:a::/80", "2001:db8:0:1:b::/80"]) {
                eni.sources.insert(prefix.parse().expect("a net"));
            }
        }),
        ("ipv6-with-egress", |plan| {
            plan.families = Families::V6 { egress: true };
            plan.enis.clear();
        }),
    ];
    for (name, change) in variants {
        std::thread::scope(|scope| {
            let case = scope.spawn(|| {
                in_testbed(|| async {
                    sh("ip link add ens5 address 02:00:00:00:00:10 type veth peer name x");
                    let mut plan = plan(vec![
                        eni(1, &["10.0.1.21/32", "10.0.1.22/32", "10.0.1.32/28"]),
                        eni(2, &["10.0.2.0/28", "10.0.2.16/28", "10.0.2.200/32"]),
                    ]);
                    change(&mut plan);
                    NodeKernel::open().unwrap().apply(&plan, &Look::default()).await.unwrap();
                    golden(name);
                });
            });
            case.join().unwrap_or_else(|_| panic!("{name}"));
        });
    }
}

#[test]
fn every_kind_of_port_choice_is_told_to_the_kernel() {
    in_testbed(|| async {
        let nft = Nft::open().unwrap();
        for (ports, text) in [
            (Ports::Keep, "snat to 10.0.0.10\n"),
            (Ports::Random, "snat to 10.0.0.10 random\n"),
            (Ports::FullyRandom, "snat to 10.0.0.10 fully-random\n"),
        ] {
            let chain =
                Chain::nat("out", Hook::Postrouting, 100).rule(Rule::new().snat("10.0.0.10".parse().unwrap(), ports));
            nft.replace(&Table::new(Family::Ip, "t").chain(chain)).await.unwrap();
            assert!(sh("nft list table ip t").contains(text), "{}", sh("nft list table ip t"));
        }
    });
}

#[test]
fn a_full_instance_fits_into_one_transaction() {
    in_testbed(|| async {
        sh("ip link add ens5 address 02:00:00:00:00:10 type veth peer name x");
        // 15 ENIs with 200 single addresses each, every other one, so that none merge: 6000 interval ends.
        let enis = (1..=15).map(|number| {
            let mut plan = eni(number, &[]);
            plan.sources = (0..200u32)
                .map(|n| format!("10.{number}.{}.{}/32", n / 100, (n % 100) * 2).parse().expect("a net"))
                .collect();
            plan
        });
        let plan = plan(enis.collect());
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan, &Look::default()).await.unwrap();
        let listed: Value = serde_json::from_str(&sh("nft -j list map ip flatwire pod-eni")).unwrap();
        let elements = listed["nftables"][1]["map"]["elem"].as_array().unwrap().len();
        assert_eq!(elements, 3000);
        assert!(kernel.apply(&plan, &Look::default()).await.unwrap().repaired.is_empty());
    });
}

#[test]
fn a_refused_table_leaves_the_old_one() {
    in_testbed(|| async {
        let nft = Nft::open().unwrap();
        let good = Table::new(Family::Ip, "t").chain(Chain::regular("c").rule(Rule::new().counter().accept()));
        nft.replace(&good).await.unwrap();
        let before = listing();
        let bad = Table::new(Family::Ip, "t").chain(Chain::regular("c").rule(Rule::new().source_in("nowhere")));
        let error = nft.replace(&bad).await.unwrap_err();
        assert_eq!(error.to_string(), "could not add rule 1 of nftables chain t c");
        assert_eq!(listing(), before);
        assert!(nft.has_digest(&good).await.unwrap());
        assert!(!nft.has_digest(&bad).await.unwrap());
        for _ in 0..2 {
            nft.remove(Family::Ip, "t").await.unwrap();
            assert_eq!(listing(), "");
        }
    });
}

#[test]
fn a_router_drops_foreign_sources_and_translates_one_to_one() {
    in_testbed(|| async {
        let (_, router) = add_netns("router");
        let (_, node) = add_netns("node");
        let (_, world) = add_netns("world");
        sh("ip link add eth0 netns node type veth peer name node0 netns router
            ip link add eth0 netns world type veth peer name edge netns router
            for ns in router node world; do ip -n $ns link set lo up; done
            ip -n node link set eth0 up; ip -n world link set eth0 up
            ip -n router link set node0 up; ip -n router link set edge up
            ip -n node addr add 10.0.0.5/32 dev eth0; ip -n node addr add 10.0.0.66/32 dev eth0
            ip -n node route add default dev eth0
            ip -n world addr add 198.51.100.1/32 dev eth0; ip -n router addr add 198.51.100.254/32 dev edge; ip -n world route add default via 198.51.100.254 dev eth0 onlink
            ip -n router addr add 10.0.0.1/32 dev node0
            for key in net.ipv4.conf.node0.proxy_arp net.ipv4.conf.edge.proxy_arp net.ipv4.ip_forward; do
              ip netns exec router sysctl -qw $key=1; done
            for key in all node0 edge; do ip netns exec router sysctl -qw net.ipv4.conf.$key.rp_filter=0; done");
        for (netns, link) in [("node", "eth0"), ("world", "eth0"), ("router", "node0"), ("router", "edge")] {
            await_carrier(Some(netns), link);
        }
        let nl = flatwire_kernel::Netlink::in_namespace(&router).unwrap();
        // Only the first of the node's two addresses is assigned.
        nl.route("node0", &Route::to_host(v4("10.0.0.5"))).await.unwrap();
        nl.route("edge", &Route::to("0.0.0.0/0".parse().unwrap())).await.unwrap();
        let (private, public) = ("10.0.0.5".parse().unwrap(), "203.0.113.5".parse().unwrap());
        let vpc: Ipv4Net = "10.0.0.0/16".parse().unwrap();
        let table = Table::new(Family::Ip, "fabric")
            .set(Set::addresses("vpc").networks([vpc]))
            .map(Map::to_addresses("to-public", [(private, public)]))
            .map(Map::to_addresses("to-private", [(public, private)]))
            .chain(
                Chain::filter("arrive", Hook::Prerouting, -150)
                    .rule(Rule::new().iifname("node0").fib_source_not_by_input().counter().drop()),
            )
            .chain(
                Chain::nat("in", Hook::Prerouting, -100)
                    .rule(Rule::new().iifname("edge").dnat_by_destination("to-private")),
            )
            .chain(
                Chain::nat("out", Hook::Postrouting, 100)
                    .rule(Rule::new().oifname("edge").source_in("vpc").snat_by_source("to-public")),
            );
        Nft::in_namespace(&router).unwrap().replace(&table).await.unwrap();

        let assigned = udp_in(&node, v4("10.0.0.5"), 700);
        let foreign = udp_in(&node, v4("10.0.0.66"), 700);
        let outside = udp_in(&world, v4("198.51.100.1"), 53);
        foreign.send_to(b"dropped", (v4("198.51.100.1"), 53)).unwrap();
        // What is heard first is what was sent second.
        assert_eq!(exchange(&assigned, &outside).ip(), v4("203.0.113.5"));
        let counted = sh("ip netns exec router nft list chain ip fabric arrive");
        assert!(counted.contains("counter packets 1 "), "{counted}");
        let caller = udp_in(&world, v4("198.51.100.1"), 4000);
        caller.send_to(b"hello", (v4("203.0.113.5"), 700)).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(assigned.recv_from(&mut buffer).unwrap().1.ip(), v4("198.51.100.1"));
    });
}

/// What `ip` and nft count of rules and of the elements of sets and maps.
fn counted() -> (usize, usize, usize) {
    let listed: Value = serde_json::from_str(&sh("nft -j list ruleset")).expect("nft prints JSON");
    let objects = listed["nftables"].as_array().expect("a list");
    let rules = objects.iter().filter(|object| object.get("rule").is_some()).count();
    let elements = |object: &Value| {
        ["set", "map"].iter().filter_map(|kind| object[*kind]["elem"].as_array()).map(Vec::len).sum::<usize>()
    };
    let policy: Value = serde_json::from_str(&sh("ip -j rule")).expect("ip prints JSON");
    (policy.as_array().expect("a list").len(), rules, objects.iter().map(elements).sum())
}

#[test]
fn rules_are_as_many_with_500_pods_as_with_10() {
    in_testbed(|| async {
        sh("ip link add ens5 address 02:00:00:00:00:10 type veth peer name x");
        for number in [1, 2] {
            sh(&format!("ip link add ens{number}x address 02:00:00:00:01:{number:02x} type veth peer name y{number}"));
        }
        let kernel = NodeKernel::open().unwrap();
        let mut counts = Vec::new();
        for pods in [10u32, 500] {
            // Every other address, so that no two are one element.
            let enis = [1, 2].map(|number| {
                let mut eni = eni(number, &[]);
                eni.sources = (0..pods / 2)
                    .map(|n| format!("10.0.{}.{}/32", number * 10 + n / 100, n % 100 * 2).parse().expect("a net"))
                    .collect();
                eni
            });
            kernel.apply(&plan(enis.to_vec()), &Look::default()).await.unwrap();
            counts.push(counted());
        }
        let [(policy, rules, few), (policy_then, rules_then, many)] = [counts[0], counts[1]];
        assert_eq!((policy_then, rules_then), (policy, rules), "{counts:?}");
        assert_eq!(many - few, 490, "an element a pod, and nothing else: {counts:?}");
        // Three of the kernel's own, two of the node, two per secondary ENI.
        assert_eq!(policy, 3 + 2 + 2 * 2, "{}", sh("ip rule"));
    });
}
