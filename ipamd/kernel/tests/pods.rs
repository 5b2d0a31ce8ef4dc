//! What the kernel shows of pods: the veto against giving an address twice, and the sign that a sandbox is dead.

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::{add_netns, in_testbed, sh, v4};
use flatwire_core::ports::Kernel;
use flatwire_kernel::pod::{PodWiring, host_if_name, wire};
use flatwire_kernel::{Netns, NodeKernel};

async fn routes(kernel: &NodeKernel) -> Vec<String> {
    kernel.pods().await.expect("a reading").routes.iter().map(ToString::to_string).collect()
}

async fn links(kernel: &NodeKernel) -> BTreeSet<String> {
    kernel.pods().await.expect("a reading").links
}

async fn down(kernel: &NodeKernel) -> BTreeSet<String> {
    kernel.pods().await.expect("a reading").down.into_keys().collect()
}

async fn pod(name: &str, address: IpAddr) -> (String, Netns) {
    let (netns, opened) = add_netns(name);
    let host_if = host_if_name("eni", "default", name, 0);
    let wiring = PodWiring {
        netns,
        pod_if: "eth0".to_owned(),
        host_if: host_if.clone(),
        mtu: 9001,
        address,
        second: None,
        gateway_index: 0,
        seed: name.to_owned(),
    };
    wire(&wiring).await.expect("wiring");
    (host_if, opened)
}

#[test]
fn a_pod_is_seen_by_route_and_link_and_both_die_with_its_namespace() {
    in_testbed(|| async {
        let kernel = NodeKernel::open().expect("a kernel");
        assert_eq!(kernel.pods().await.expect("a reading"), Default::default());
        let (a, a_netns) = pod("a", v4("10.0.1.21")).await;
        let (b, _b_netns) = pod("b", v4("10.0.1.22")).await;
        assert_eq!(routes(&kernel).await, ["10.0.1.21", "10.0.1.22"]);
        assert_eq!(links(&kernel).await, BTreeSet::from([a.clone(), b.clone()]));

        // Somebody flushed a route: the pod lives, and its link says so.
        sh(&format!("ip route del 10.0.1.22 dev {b}"));
        assert_eq!(routes(&kernel).await, ["10.0.1.21"]);
        assert_eq!(links(&kernel).await, BTreeSet::from([a, b.clone()]));

        // The runtime died with the sandbox: no DEL, and nothing of it left.
        drop(a_netns);
        sh("ip netns del a");
        let deadline = Instant::now() + Duration::from_secs(10);
        while links(&kernel).await != BTreeSet::from([b.clone()]) {
            assert!(Instant::now() < deadline, "the link outlives its namespace");
        }
        assert_eq!(routes(&kernel).await, Vec::<String>::new());
    });
}

/// A veto by a route that is no pod's would keep an address from pods for ever; a pod's route overlooked would give it to two.
#[test]
fn only_host_routes_of_main_to_a_veth_are_pods() {
    in_testbed(|| async {
        sh("set -e; ip link set lo up
            ip link add eniabc type veth peer name x; ip link set eniabc up
            ip link add bridge0 type bridge; ip link set bridge0 up; ip addr add 10.9.0.1/24 dev bridge0
            ip addr add 10.8.0.1/24 dev eniabc");
        let kernel = NodeKernel::open().expect("a kernel");
        assert_eq!(routes(&kernel).await, Vec::<String>::new());
        for other in [
            "10.0.1.1 dev bridge0",
            "10.0.1.2 via 10.9.0.2 dev bridge0",
            "10.0.1.3 via 10.8.0.2 dev eniabc",
            "10.0.1.4 dev eniabc table 2",
            "10.0.1.6/31 dev eniabc",
            "10.0.2.0/24 dev eniabc",
            "169.254.1.1 dev eniabc",
            "blackhole 10.0.1.9",
            "unreachable 10.0.1.10",
        ] {
            sh(&format!("ip route add {other}"));
            assert_eq!(routes(&kernel).await, Vec::<String>::new(), "{other}");
        }
        for other in ["2001:db8::1 dev bridge0", "2001:db8:1::/80 dev eniabc", "fe80::7 dev eniabc"] {
            sh(&format!("ip -6 route add {other}"));
            assert_eq!(routes(&kernel).await, Vec::<String>::new(), "{other}");
        }
        sh("ip route add 10.0.1.30 dev eniabc metric 5; ip -6 route add 2001:db8::30 dev eniabc");
        assert_eq!(routes(&kernel).await, ["10.0.1.30", "2001:db8::30"]);
        let [host, other] = ["eniabc", "x"].map(str::to_owned);
        assert_eq!(links(&kernel).await, BTreeSet::from([host.clone()]), "no other link");
        assert_eq!(down(&kernel).await, BTreeSet::from([other.clone()]), "the other end, while it is here");
        // A link that is down takes its routes along, as the kernel does for everything IPv4.
        sh("ip link set eniabc down");
        assert_eq!(routes(&kernel).await, Vec::<String>::new());
        assert_eq!(links(&kernel).await, BTreeSet::new());
        assert_eq!(down(&kernel).await, BTreeSet::from([host, other]));
    });
}
