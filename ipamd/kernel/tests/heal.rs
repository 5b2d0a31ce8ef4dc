//! Healing: that changes are heard, that what others undo is put back and what is not ours to judge is left, and that a
//! pod's end ends its routes and connections whatever is put back meanwhile.

mod common;

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{add_netns, await_carrier, exchange, in_testbed, ip, sh, udp_in, v4};
use flatwire_core::ids::{EniId, RouteTable};
use flatwire_core::naming::mac;
use flatwire_core::netplan::{EniPlan, Look, NodePlan, PodPlan, PrimaryPlan};
use flatwire_core::ports::{Kernel, Repair, RepairKind};
use flatwire_kernel::netns::in_netns;
use flatwire_kernel::pod::{PodUnwiring, PodWiring, host_if_name, unwire, wire};
use flatwire_kernel::{Netns, NodeKernel};

const MAC_0: &str = "02:00:00:00:00:10";
const MAC_1: &str = "02:00:00:00:00:20";
const DEADLINE: Duration = Duration::from_secs(5);
/// Nothing is heard for this long: nothing will be.
const SILENCE: Duration = Duration::from_millis(300);

/// A node with two ENIs, each with a router behind it that has 10.0.9.9.
fn node() -> Netns {
    let (_, r1) = add_netns("r1");
    add_netns("r2");
    sh(&format!(
        "ip link set lo up
         ip link add eth0 address {MAC_0} type veth peer name e netns r1
         ip link add eth1 address {MAC_1} type veth peer name e netns r2
         ip link set eth0 up
         ip addr add 10.0.0.10/24 dev eth0
         ip route add default via 10.0.0.1 dev eth0 proto dhcp src 10.0.0.10 metric 512
         ip route add 10.0.0.2 via 10.0.0.1 dev eth0 proto dhcp
         for r in r1 r2; do ip -n $r link set lo up; ip -n $r link set e up; ip -n $r addr add 10.0.9.9/32 dev lo; done
         ip -n r1 addr add 10.0.0.1/24 dev e; ip -n r2 addr add 10.0.1.1/24 dev e
         ip -n r1 neigh add 10.0.0.11 lladdr {MAC_0} dev e; ip -n r1 neigh add 10.0.0.10 lladdr {MAC_0} dev e"
    ));
    for (netns, link) in [(None, "eth0"), (Some("r1"), "e")] {
        await_carrier(netns, link);
    }
    r1
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
            sources: ["10.0.1.21/32"].into_iter().map(|s| s.parse().expect("a net")).collect(),
        }],
        vpc: vec!["10.0.0.0/24".parse().expect("a net")],
        mtu: 1500,
        ..NodePlan::new(primary)
    }
}

async fn pod(name: &str, address: &str) -> (PodWiring, Netns) {
    let (netns, opened) = add_netns(name);
    let wiring = PodWiring {
        netns,
        pod_if: "eth0".to_owned(),
        host_if: host_if_name("eni", "default", name, 0),
        mtu: 1500,
        address: v4(address),
        second: None,
        gateway_index: 0,
        seed: name.to_owned(),
    };
    wire(&wiring).await.expect("wiring");
    (wiring, opened)
}

fn gone(wiring: &PodWiring) -> PodUnwiring {
    PodUnwiring {
        netns: None::<PathBuf>,
        pod_if: wiring.pod_if.clone(),
        host_if: wiring.host_if.clone(),
        addresses: vec![wiring.address],
    }
}

/// As `gone`, by a runtime that names the namespace.
fn ended(wiring: &PodWiring) -> PodUnwiring {
    PodUnwiring { netns: Some(wiring.netns.clone()), ..gone(wiring) }
}

/// The pod as the ledger has it, by its MAC alone.
fn known(wiring: &PodWiring) -> PodPlan {
    PodPlan { address: wiring.address, link: wiring.host_if.clone(), mac: mac(&wiring.seed, "host"), settled: false }
}

fn pods(pods: impl IntoIterator<Item = PodPlan>) -> Look {
    Look { pods: pods.into_iter().collect(), ..Look::default() }
}

async fn repairs(kernel: &NodeKernel, look: &Look) -> Vec<Repair> {
    kernel.apply(&plan(), look).await.expect("the node is programmed").repaired
}

fn texts(repairs: &[Repair]) -> Vec<&str> {
    repairs.iter().map(|repair| repair.text.as_str()).collect()
}

async fn within<T>(time: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(time, work).await.ok()
}

/// Looks for as long as something is heard; how often that was.
async fn looks_until_silence(kernel: &NodeKernel) -> usize {
    let mut looks = 0;
    while within(SILENCE, kernel.changed()).await.is_some() {
        kernel.apply(&plan(), &Look::default()).await.expect("the node is programmed");
        looks += 1;
        assert!(looks < 10, "our own changes are heard without end");
    }
    looks
}

#[test]
fn every_change_that_matters_is_heard_and_our_own_do_not_go_on() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        looks_until_silence(&kernel).await;
        for change in [
            "ip rule del pref 512",
            "ip rule add pref 99 lookup main",
            "ip route flush table 2",
            "ip route replace table 2 default via 10.0.1.7 dev eth1 onlink",
            "ip route del default",
            "ip link set eth1 mtu 1400",
            "ip link set eth1 down",
            "ip link set eth1 name renamed && ip link set renamed name eth1",
            "ip addr del 10.0.1.20/24 dev eth1",
            "ip addr add 10.0.1.21/32 dev eth1",
            "nft flush ruleset",
            "nft delete table ip flatwire",
            "nft flush chain ip flatwire steer",
            "nft delete element ip flatwire pod-eni '{ 10.0.1.21 }'",
            "echo 1 > /proc/sys/net/ipv4/conf/eth1/rp_filter",
            "echo 0 > /proc/sys/net/ipv4/ip_forward",
        ] {
            sh(change);
            within(DEADLINE, kernel.changed()).await.unwrap_or_else(|| panic!("not heard: {change}")).unwrap();
            kernel.apply(&plan(), &Look::default()).await.unwrap();
            assert!(looks_until_silence(&kernel).await <= 2, "{change}");
        }
    });
}

#[test]
fn pods_that_come_and_tables_of_others_are_not_heard() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        looks_until_silence(&kernel).await;
        pod("a", "10.0.0.11").await;
        sh("nft add table ip kube-proxy; nft add chain ip kube-proxy c; nft add rule ip kube-proxy c accept");
        assert!(within(SILENCE, kernel.changed()).await.is_none());
    });
}

#[test]
fn a_loss_of_events_is_a_reason_to_look() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        looks_until_silence(&kernel).await;
        // More than the socket holds, none of which matters by itself.
        sh("for i in $(seq 1 2000); do echo \"route add 10.9.$((i / 250)).$((i % 250)) dev lo proto 70\"; done | ip -b -
            for i in $(seq 1 2000); do echo \"route replace 10.9.$((i / 250)).$((i % 250)) dev lo proto 70\"; done | ip -b -");
        within(DEADLINE, kernel.changed()).await.expect("the loss is heard").unwrap();
    });
}

#[test]
fn a_pods_host_route_is_put_back_only_by_its_own_link() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        let (a, _netns) = pod("a", "10.0.0.11").await;
        let route = || ip("route show 10.0.0.11");
        assert_eq!(
            texts(&repairs(&kernel, &pods([known(&a)])).await[..]).iter().filter(|t| t.contains("pod")).count(),
            0
        );

        sh("ip route del 10.0.0.11");
        let told = repairs(&kernel, &pods([known(&a)])).await;
        assert_eq!(texts(&told), [format!("host route of pod 10.0.0.11 by {} put back", a.host_if)]);
        assert_eq!((told[0].kind, told[0].undone), (RepairKind::PodRoute, true));
        assert_eq!((&route()[0]["dev"], &route()[0]["scope"]), (&a.host_if.clone().into(), &"link".into()));
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await, []);
        // Somebody leads it elsewhere.
        sh("ip route replace 10.0.0.11 dev lo");
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await.len(), 1);
        assert_eq!(route()[0]["dev"], a.host_if.clone());

        // ADD of the pod's next sandbox: the ledger has it already, the link is still its predecessor's.
        let next = PodPlan { address: v4("10.0.0.12"), mac: mac("next", "host"), ..known(&a) };
        assert_eq!(repairs(&kernel, &pods([next.clone()])).await, []);
        assert!(ip("route show 10.0.0.12").is_empty());
        // A pod of the add-on has no MAC of ours; its name is enough, but not against a route of somebody else's.
        let settled = PodPlan { settled: true, ..next };
        sh("ip route add 10.0.0.12 dev lo");
        assert_eq!(repairs(&kernel, &pods([settled.clone()])).await, []);
        sh("ip route del 10.0.0.12");
        assert_eq!(repairs(&kernel, &pods([settled.clone()])).await.len(), 1);
        sh("ip route del 10.0.0.12");

        // A link that is down is being made, or taken away by somebody: the route waits.
        sh(&format!("ip link set {} down", a.host_if));
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await, []);
        sh(&format!("ip link set {} up", a.host_if));
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await.len(), 1);

        // DEL: the kernel is ahead of the ledger. Even a route that is put back in the middle goes with the link.
        sh("ip route del 10.0.0.11");
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await.len(), 1);
        unwire(&gone(&a)).await.unwrap();
        assert_eq!(repairs(&kernel, &pods([known(&a)])).await, []);
        assert!(route().is_empty(), "no route without a pod");
        // A link of that name that is nobody's pod is not one.
        sh(&format!(
            "ip link add {} address {} type veth peer name x; ip link set {0} up; ip link set x up",
            a.host_if,
            known(&a).mac
        ));
        assert!(repairs(&kernel, &pods([known(&a)])).await.iter().all(|r| r.kind != RepairKind::PodRoute));
        assert!(route().is_empty());
    });
}

/// DEL races with repairs: whatever the interleaving, nothing is left.
#[test]
fn a_del_under_repairs_leaves_no_route() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        let mut wired = Vec::new();
        for n in 1..=30 {
            wired.push(pod(&format!("p{n}"), &format!("10.0.0.{}", 100 + n)).await);
        }
        let look = pods(wired.iter().map(|(wiring, _)| known(wiring)));
        kernel.apply(&plan(), &look).await.unwrap();
        let done = AtomicBool::new(false);
        let here = Netns::current().unwrap();
        std::thread::scope(|scope| {
            let taking_down = scope.spawn(|| {
                let work = || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                    let down = |(wiring, _): &(PodWiring, Netns)| runtime.block_on(unwire(&ended(wiring)));
                    wired.iter().try_for_each(down).map_err(std::io::Error::other)
                };
                let taken = in_netns(&here, work);
                done.store(true, Ordering::Relaxed);
                taken.expect("every pod is taken down");
            });
            // Each time there is something to put back.
            let flushing = scope.spawn(|| {
                let work = || {
                    while !done.load(Ordering::Relaxed) {
                        Command::new("ip").args(["route", "flush", "table", "main", "proto", "70"]).output()?;
                    }
                    Ok(())
                };
                in_netns(&here, work).expect("ip runs");
            });
            let repairing = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                while !done.load(Ordering::Relaxed) {
                    runtime.block_on(kernel.apply(&plan(), &look)).expect("the node is programmed");
                }
            });
            for thread in [taking_down, flushing, repairing] {
                thread.join().expect("no thread panicked");
            }
        });
        kernel.apply(&plan(), &look).await.unwrap();
        let left: Vec<_> =
            ip("route").into_iter().filter(|r| r["dev"].as_str().is_some_and(|d| d.starts_with("eni"))).collect();
        assert!(left.is_empty(), "{left:?}");
    });
}

#[test]
fn what_is_let_be_stays_as_it_is_and_counts_when_it_is_put_right_later() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        let report = kernel.apply(&plan(), &Look::default()).await.unwrap();
        assert_eq!(report.programmed.len(), 2);
        assert!(report.repaired.iter().all(|repair| !repair.undone), "a first run undoes nobody's deed");
        for (change, object, serves) in [
            ("ip rule del pref 1536", "rule 1536: fwmark 0x1/0x7f lookup 2", 1),
            ("ip rule del pref 512", "rule 512: lookup main suppress_prefixlength 31 suppress_ifgroup 0", 1),
            ("nft flush ruleset", "nftables table flatwire", 1),
            ("ip addr del 10.0.1.20/24 dev eth1", "address 10.0.1.20/24 of eth1", 1),
            ("ip link set eth1 mtu 1400", "MTU of eth1", 2),
            ("echo 1 > /proc/sys/net/ipv4/conf/eth1/rp_filter", "sysctl net/ipv4/conf/eth1/rp_filter", 2),
        ] {
            sh(change);
            let let_be = BTreeSet::from([object.to_owned()]);
            let report = kernel.apply(&plan(), &Look { let_be, ..Look::default() }).await.unwrap();
            assert!(report.repaired.iter().all(|repair| repair.object != object), "{change}: {:#?}", report.repaired);
            assert_eq!(
                report.programmed.len(),
                serves,
                "{change}: no pod is to be placed where its way out is missing"
            );
            let later = repairs(&kernel, &Look::default()).await;
            assert!(later.iter().any(|r| r.object == object && r.undone), "{change}: {later:#?}");
            assert_eq!(kernel.apply(&plan(), &Look::default()).await.unwrap().programmed.len(), 2);
        }
    });
}

#[test]
fn the_nodes_own_way_out_is_put_back_as_it_was() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        let main = || sh("ip route | sort");
        let before = main();
        sh("ip route flush table main");
        let told = repairs(&kernel, &Look::default()).await;
        assert!(told.iter().all(|r| r.kind == RepairKind::NodeRoute && r.undone), "{told:#?}");
        assert!(
            texts(&told).contains(&"the node's route default via 10.0.0.1 by eth0 put back into table main"),
            "{told:#?}"
        );
        assert_eq!(main(), before);
        assert_eq!(repairs(&kernel, &Look::default()).await, []);
        // An ENI that was down has lost them likewise.
        sh("ip link set eth0 down");
        repairs(&kernel, &Look::default()).await;
        await_carrier(None, "eth0");
        repairs(&kernel, &Look::default()).await;
        assert_eq!(main(), before);

        // Not ours to judge: the default route is another one, or the address is given back.
        sh("ip route replace default via 10.0.0.3 dev eth0 metric 512");
        assert_eq!(repairs(&kernel, &Look::default()).await, []);
        sh("ip route del default; ip addr flush dev eth0");
        assert_eq!(repairs(&kernel, &Look::default()).await, []);
        assert_eq!(sh("ip route show default"), "");
    });
}

#[test]
fn a_renamed_link_is_followed_and_told() {
    in_testbed(|| async {
        node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        for (from, to, eni) in [("eth1", "ens6", "eni-1"), ("eth0", "ens5", "eni-0")] {
            sh(&format!(
                "ip link set {from} down; ip link set {from} name {to}; echo 1 > /proc/sys/net/ipv4/conf/{to}/rp_filter"
            ));
            let told = repairs(&kernel, &Look::default()).await;
            let renamed = told.iter().find(|r| r.object == format!("name of {eni}'s interface"));
            assert!(renamed.is_some_and(|r| r.undone && r.text.contains(to)), "{told:#?}");
            assert_eq!(
                ip(&format!("link show {to}"))[0]["flags"].as_array().map(|f| f.contains(&"UP".into())),
                Some(true)
            );
            assert_eq!(sh(&format!("cat /proc/sys/net/ipv4/conf/{to}/rp_filter")).trim(), "2");
        }
        assert_eq!(ip("route show table 2 default")[0]["dev"], "ens6");
        assert!(sh("nft list map ip flatwire eni-of-link").contains("ens5"));
    });
}

/// Lines of the connection table that name an address.
fn connections(address: IpAddr) -> usize {
    let table =
        std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").expect("the kernel shows its connections");
    table.lines().filter(|line| line.split_whitespace().any(|word| word.ends_with(&format!("={address}")))).count()
}

/// More connections than are sooner listed for one address.
const CROWD: u16 = 7_000;

#[test]
fn the_next_pod_inherits_no_connection() {
    in_testbed(|| async {
        let r1 = node();
        let kernel = NodeKernel::open().unwrap();
        kernel.apply(&plan(), &Look::default()).await.unwrap();
        sh("ip -n r1 route add default via 10.0.0.10");
        let (left, other) = (v4("10.0.0.11"), v4("10.0.0.13"));
        let (a, a_netns) = pod("a", "10.0.0.11").await;
        let (_b, b_netns) = pod("b", "10.0.0.13").await;
        let server = udp_in(&r1, v4("10.0.9.9"), 53);
        // Out, and translated to the node; in, as a server of the other pod.
        let in_a = udp_in(&a_netns, left, 700);
        assert_eq!(exchange(&in_a, &server).ip(), v4("10.0.0.10"), "translated");
        let in_b = udp_in(&b_netns, other, 700);
        assert_eq!(exchange(&in_b, &in_a).ip(), other);
        exchange(&in_b, &server);
        assert_eq!((connections(left), connections(other)), (2, 2));
        // Among so many the kernel is asked to choose.
        for port in 1_000..1_000 + CROWD {
            in_b.send_to(b"?", ("10.0.9.9", port)).unwrap();
        }
        let crowd = usize::from(CROWD);
        assert_eq!((connections(left), connections(other)), (2, 2 + crowd));

        drop((in_a, a_netns));
        sh("ip netns del a");
        unwire(&gone(&a)).await.unwrap();
        let look = Look { left: [left].into(), ..Look::default() };
        let report = kernel.apply(&plan(), &look).await.unwrap();
        assert_eq!(report.lacking, Vec::<String>::new());
        assert_eq!((connections(left), connections(other)), (0, 1 + crowd), "and nobody else's");

        // For many addresses everything is listed.
        let many: BTreeSet<IpAddr> = (1..=20).map(|n| v4(&format!("10.0.0.{n}"))).collect();
        kernel.apply(&plan(), &Look { left: many, ..Look::default() }).await.unwrap();
        assert_eq!(connections(other), 0);
    });
}
