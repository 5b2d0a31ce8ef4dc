//! CHECK names what somebody did to a pod's wiring.

mod common;

use common::{add_netns, in_testbed, sh};
use flatwire_kernel::pod::{Expected, PodWiring, check, wire};

#[test]
fn every_kind_of_tampering_is_named() {
    // What somebody does, and what the sentences must say between them.
    let table = [
        ("true", vec![]),
        ("ip -n pod link set eth0 down", vec!["pod interface eth0 is down", "lacks the route", "permanent neighbour"]),
        ("ip -n pod link set eth0 mtu 1400", vec!["pod interface eth0 has MTU 1400 and not 9001"]),
        ("ip -n pod link set eth0 address 02:00:00:00:00:01", vec!["pod interface eth0 has MAC 02:00:00:00:00:01"]),
        ("ip -n pod addr flush dev eth0", vec!["lacks its address 10.0.1.7"]),
        ("ip -n pod addr add 10.9.9.9/32 dev eth0", vec![]),
        ("ip -n pod route del default", vec!["lacks the route `default via 169.254.1.1`"]),
        ("ip -n pod route del 169.254.1.1", vec!["lacks the route `169.254.1.1/32`"]),
        ("ip -n pod neigh del 169.254.1.1 dev eth0", vec!["lacks the permanent neighbour 169.254.1.1"]),
        (
            "ip -n pod neigh replace 169.254.1.1 lladdr 02:00:00:00:00:02 dev eth0",
            vec!["the pod's neighbour 169.254.1.1 is 02:00:00:00:00:02 and not"],
        ),
        ("ip link set eni-a down", vec!["host interface eni-a is down", "no route to 10.0.1.7"]),
        ("ip link set eni-a mtu 1500", vec!["host interface eni-a has MTU 1500"]),
        (
            "ip link set eni-a address 02:00:00:00:00:03",
            vec!["host interface eni-a has MAC 02:00:00:00:00:03", "the pod's neighbour"],
        ),
        ("ip route del 10.0.1.7", vec!["no route to 10.0.1.7"]),
        (
            "ip link add other type veth peer name rehto; ip link set other up; ip route replace 10.0.1.7 dev other",
            vec!["leads to other and not to eni-a"],
        ),
        (
            "ip link del eni-a",
            vec!["host interface eni-a is missing", "no route to", "eth0 is missing in /run/netns/pod"],
        ),
        (
            "ip link del eni-a; ip link add eni-a type bridge",
            vec!["eni-a is not a veth", "no route", "eth0 is missing"],
        ),
        (
            "ip link del eni-a; ip link add eni-a type veth peer name p1; ip -n pod link add eth0 type veth peer name p2",
            vec!["not ends of one veth", "lacks its address"],
        ),
        ("ip netns del pod", vec!["does not exist: the sandbox is gone"]),
    ];
    for (tampering, sentences) in table {
        std::thread::scope(|scope| {
            let case = scope.spawn(|| in_testbed(|| tampered(tampering, &sentences)));
            case.join().unwrap_or_else(|_| panic!("{tampering}"));
        });
    }
}

async fn tampered(tampering: &str, sentences: &[&str]) {
    let (path, _netns) = add_netns("pod");
    let wiring = PodWiring {
        netns: path,
        pod_if: "eth0".to_owned(),
        host_if: "eni-a".to_owned(),
        mtu: 9001,
        address: "10.0.1.7".parse().expect("an address"),
        second: None,
        gateway_index: 0,
        seed: "sandbox".to_owned(),
    };
    wire(&wiring).await.expect("wiring");
    sh(tampering);
    let found = check(&wiring, &Expected::of(&wiring)).await.expect("readable");
    for sentence in sentences {
        assert!(found.iter().any(|text| text.contains(sentence)), "{tampering}: {sentence:?} is not in {found:#?}");
    }
    assert_eq!(found.is_empty(), sentences.is_empty(), "{tampering}: {found:#?}");
}
