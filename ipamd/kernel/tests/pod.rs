//! Wiring pods, seen with iproute2's eyes.

mod common;

use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;

use common::{add_netns, exchange, in_testbed, ip, sh, snapshot, udp, udp_in, v4};
use flatwire_kernel::KernelError;
use flatwire_kernel::pod::{PodUnwiring, PodWiring, host_if_name, unwire, wire};

fn wiring(netns: &Path, pod: &str, address: &str) -> PodWiring {
    PodWiring {
        netns: netns.to_owned(),
        pod_if: "eth0".to_owned(),
        host_if: host_if_name("eni", "default", pod, 0),
        mtu: 9001,
        address: address.parse().expect("an address"),
        second: None,
        gateway_index: 0,
        seed: format!("sandbox of {pod}"),
    }
}

fn unwiring(wiring: &PodWiring) -> PodUnwiring {
    PodUnwiring {
        netns: Some(wiring.netns.clone()),
        pod_if: wiring.pod_if.clone(),
        host_if: wiring.host_if.clone(),
        addresses: vec![wiring.address],
    }
}

#[test]
fn a_wired_pod_has_the_add_ons_shape() {
    in_testbed(|| async {
        let (path, _) = add_netns("pod");
        let wiring = wiring(&path, "a", "10.0.1.7");
        let wired = wire(&wiring).await.unwrap();

        let link = &ip("-n pod -d link show eth0")[0];
        assert_eq!(link["mtu"], 9001);
        assert_eq!(link["address"], wired.pod_mac.to_string());
        assert_eq!(link["linkinfo"]["info_kind"], "veth");
        assert!(link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"));
        let addresses = &ip("-n pod -4 addr show eth0")[0]["addr_info"];
        assert_eq!(addresses.as_array().unwrap().len(), 1);
        assert_eq!((addresses[0]["local"].as_str(), addresses[0]["prefixlen"].as_u64()), (Some("10.0.1.7"), Some(32)));
        let mut routes: Vec<String> =
            sh("ip -n pod route").lines().map(|line| line.trim().replace(" proto 70", "")).collect();
        routes.sort();
        assert_eq!(routes, ["169.254.1.1 dev eth0 scope link", "default via 169.254.1.1 dev eth0"]);
        let neighbour = &ip("-n pod neigh show 169.254.1.1")[0];
        assert_eq!(neighbour["lladdr"], wired.host_mac.to_string());
        assert_eq!(neighbour["state"][0], "PERMANENT");

        let host = &ip(&format!("link show {}", wiring.host_if))[0];
        assert_eq!((host["mtu"].as_u64(), &host["address"]), (Some(9001), &wired.host_mac.to_string().into()));
        assert!(host["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"));
        let route = &ip("route show 10.0.1.7")[0];
        assert_eq!((&route["dev"], &route["scope"]), (&wiring.host_if.clone().into(), &"link".into()));
        assert_eq!(route["protocol"], "70");
        for (name, value) in [("accept_ra", "0"), ("accept_redirects", "1"), ("forwarding", "0")] {
            let path = format!("/proc/sys/net/ipv6/conf/{}/{name}", wiring.host_if);
            assert_eq!(std::fs::read_to_string(path).unwrap().trim(), value, "{name}");
        }
        assert_eq!(ip("rule").len(), 3, "no rule per pod");
    });
}

#[test]
fn two_pods_and_their_node_talk() {
    in_testbed(|| async {
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; ip link set lo up; ip addr add 10.0.0.10/32 dev lo");
        let (path_a, a) = add_netns("a");
        let (path_b, b) = add_netns("b");
        wire(&wiring(&path_a, "a", "10.0.1.7")).await.unwrap();
        wire(&wiring(&path_b, "b", "10.0.1.8")).await.unwrap();

        let (in_a, in_b) = (udp_in(&a, v4("10.0.1.7"), 700), udp_in(&b, v4("10.0.1.8"), 800));
        assert_eq!(exchange(&in_a, &in_b).ip(), v4("10.0.1.7"), "no translation between pods");
        assert_eq!(exchange(&in_b, &in_a).ip(), v4("10.0.1.8"));
        let on_node = udp(v4("10.0.0.10"), 900).unwrap();
        exchange(&on_node, &in_a);
        exchange(&in_b, &on_node);
    });
}

#[test]
fn a_second_interface_routes_in_a_table_of_its_own() {
    in_testbed(|| async {
        let (path, _) = add_netns("pod");
        let first = wiring(&path, "a", "10.0.1.7");
        wire(&first).await.unwrap();
        let second = PodWiring {
            pod_if: "mNicIf1".to_owned(),
            host_if: host_if_name("eni", "default", "a", 1),
            gateway_index: 1,
            ..wiring(&path, "a", "10.0.2.7")
        };
        wire(&second).await.unwrap();
        assert_eq!(ip("-n pod route show table 1").len(), 2);
        assert_eq!(ip("-n pod route show table 1 default")[0]["gateway"], "169.254.1.2");
        assert_eq!(ip("-n pod route show default")[0]["dev"], "eth0");
        let rule = &ip("-n pod rule show pref 1")[0];
        assert_eq!((&rule["src"], &rule["table"]), (&"10.0.2.7".into(), &"1".into()));
        for wiring in [&first, &second] {
            let expected = flatwire_kernel::pod::Expected::of(wiring);
            assert_eq!(flatwire_kernel::pod::check(wiring, &expected).await.unwrap(), Vec::<String>::new());
        }
    });
}

#[test]
fn an_ipv6_pod_needs_no_detection_and_no_ipv6_at_start() {
    in_testbed(|| async {
        let (path, netns) = add_netns("pod");
        sh("ip netns exec pod sh -c 'echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6'");
        let wiring = wiring(&path, "a", "2001:db8::7");
        wire(&wiring).await.unwrap();
        let address = &ip("-n pod -6 addr show eth0 scope global")[0]["addr_info"][0];
        assert_eq!(address["local"], "2001:db8::7");
        assert!(address["tentative"].is_null());
        // Bound at once, with no wait for anything.
        udp_in(&netns, wiring.address, 700);
        assert_eq!(ip("-n pod -6 route show default")[0]["gateway"], "fe80::1");
        assert_eq!(ip("-6 route show 2001:db8::7")[0]["dev"], wiring.host_if);
        unwire(&unwiring(&wiring)).await.unwrap();
        assert!(ip("-6 route show 2001:db8::7").is_empty());
    });
}

/// A situation, what is asked for in it, and what the error must be.
type Failure = (&'static str, &'static str, fn(&mut PodWiring), fn(&KernelError) -> bool);

#[test]
fn a_wiring_that_fails_leaves_nothing() {
    let failures: &[Failure] = &[
        (
            "no such namespace",
            "true",
            |w| w.netns = "/run/netns/none".into(),
            |e| matches!(e, KernelError::NetnsMissing { .. }),
        ),
        (
            "an ordinary file",
            "touch /run/netns/file",
            |w| w.netns = "/run/netns/file".into(),
            |e| matches!(e, KernelError::NotANetns { .. }),
        ),
        (
            "a namespace of another type",
            "true",
            |w| w.netns = "/proc/self/ns/uts".into(),
            |e| matches!(e, KernelError::NotANetns { .. }),
        ),
        (
            "the node's own namespace",
            "true",
            |w| w.netns = "/proc/thread-self/ns/net".into(),
            |e| matches!(e, KernelError::BadInput { .. }),
        ),
        (
            "name too long",
            "true",
            |w| w.host_if = "sixteen-bytes-xx".into(),
            |e| matches!(e, KernelError::BadName { .. }),
        ),
        (
            "name taken in the pod",
            "ip -n pod link add eth0 type bridge",
            |_| {},
            |e| matches!(e, KernelError::PodInterfaceTaken { name, .. } if name == "eth0"),
        ),
        (
            "name taken on the host by a bridge",
            "ip link add taken type bridge",
            |w| w.host_if = "taken".into(),
            |e| matches!(e, KernelError::HostInterfaceTaken { kind, .. } if kind == "bridge"),
        ),
        (
            "name taken on the host by a veth that stays on the host",
            "ip link add taken type veth peer name other",
            |w| w.host_if = "taken".into(),
            |e| matches!(e, KernelError::HostInterfaceTaken { .. }),
        ),
        ("unspecified address", "true", |w| w.address = v4("0.0.0.0"), |e| matches!(e, KernelError::BadInput { .. })),
        ("multicast address", "true", |w| w.address = v4("224.0.0.1"), |e| matches!(e, KernelError::BadInput { .. })),
        (
            "MTU below the kernel's least",
            "true",
            |w| w.mtu = 12,
            |e| matches!(e, KernelError::Refused { operation, .. } if operation.contains("create the veth pair")),
        ),
        (
            "a default route is there already",
            "ip -n pod link set lo up; ip -n pod route add default dev lo",
            |_| {},
            |e| matches!(e, KernelError::Refused { operation, .. } if operation.contains("default via 169.254.1.1")),
        ),
        (
            "an address the kernel refuses on the pod's side",
            "true",
            |w| w.address = "fe80::1".parse::<IpAddr>().expect("an address"),
            |e| matches!(e, KernelError::Refused { .. }),
        ),
    ];
    for (situation, arrange, ask, expected) in failures {
        // A namespace of its own for each, on a thread of its own.
        std::thread::scope(|scope| {
            let case = scope.spawn(|| {
                in_testbed(|| async {
                    let (path, _) = add_netns("pod");
                    sh(arrange);
                    let mut wiring = wiring(&path, "a", "10.0.1.7");
                    ask(&mut wiring);
                    let before = (snapshot(None), snapshot(Some("pod")));
                    let error = wire(&wiring).await.expect_err(situation);
                    assert!(expected(&error), "{situation}: {error:?}");
                    assert_eq!((snapshot(None), snapshot(Some("pod"))), before, "{situation}");
                });
            });
            case.join().unwrap_or_else(|_| panic!("{situation}"));
        });
    }
}

/// The body of the next test, run by it as a child without privileges.
#[test]
#[ignore = "run by without_privileges_the_error_says_what_is_needed"]
fn unprivileged() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let error = runtime.block_on(wire(&wiring(Path::new("/run/netns/pod"), "a", "10.0.1.7"))).unwrap_err();
    assert!(matches!(error, KernelError::Denied { .. }), "{error:?}");
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

#[test]
fn without_privileges_the_error_says_what_is_needed() {
    in_testbed(|| async {
        add_netns("pod");
        let before = snapshot(None);
        let nobody = 65534;
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["unprivileged", "--exact", "--ignored"])
            .uid(nobody)
            .gid(nobody)
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
        assert_eq!(snapshot(None), before);
    });
}

#[test]
fn a_stale_veth_of_the_same_pod_is_replaced() {
    in_testbed(|| async {
        let (old_path, _) = add_netns("old");
        let (new_path, _) = add_netns("new");
        wire(&wiring(&old_path, "a", "10.0.1.7")).await.unwrap();
        let new = PodWiring { seed: "another sandbox".to_owned(), ..wiring(&new_path, "a", "10.0.1.9") };
        let wired = wire(&new).await.unwrap();
        assert_eq!(ip(&format!("link show {}", new.host_if))[0]["address"], wired.host_mac.to_string());
        assert!(ip("route show 10.0.1.7").is_empty());
        assert_eq!(ip("-n old link").len(), 1, "only lo is left in the old sandbox");
    });
}

#[test]
fn taking_down_restores_the_node_and_is_idempotent() {
    in_testbed(|| async {
        let (path, _) = add_netns("pod");
        let before = (snapshot(None), snapshot(Some("pod")));
        let wiring = wiring(&path, "a", "10.0.1.7");
        wire(&wiring).await.unwrap();
        for _ in 0..3 {
            unwire(&unwiring(&wiring)).await.unwrap();
            assert_eq!((snapshot(None), snapshot(Some("pod"))), before);
        }
    });
}

#[test]
fn taking_down_takes_absence_for_done() {
    in_testbed(|| async {
        let (path, netns) = add_netns("pod");
        let wiring = wiring(&path, "a", "10.0.1.7");
        // Nothing was ever made, and nothing is known.
        unwire(&PodUnwiring::default()).await.unwrap();
        unwire(&unwiring(&wiring)).await.unwrap();
        let mut gone = unwiring(&wiring);
        gone.netns = Some("/run/netns/never".into());
        unwire(&gone).await.unwrap();

        // The last DEL comes with no namespace.
        wire(&wiring).await.unwrap();
        unwire(&PodUnwiring { netns: None, ..unwiring(&wiring) }).await.unwrap();
        assert!(ip("route show 10.0.1.7").is_empty());
        assert_eq!(ip("link").len(), 1);

        // The name of the namespace is gone while the namespace lives on, and its file is left.
        wire(&wiring).await.unwrap();
        sh("umount -l /run/netns/pod");
        unwire(&unwiring(&wiring)).await.unwrap();
        assert_eq!(ip("link").len(), 1);
        drop(netns);

        // The namespace took the veth with it before DEL came; it vanishes some time after its last user.
        let (path, netns) = add_netns("pod2");
        let wiring = PodWiring { netns: path, ..wiring };
        wire(&wiring).await.unwrap();
        drop(netns);
        sh("ip netns del pod2");
        unwire(&unwiring(&wiring)).await.unwrap();
        unwire(&PodUnwiring { netns: None, ..unwiring(&wiring) }).await.unwrap();
        assert!(ip("route show 10.0.1.7").is_empty());
    });
}

#[test]
fn a_late_del_leaves_the_next_sandbox_alone() {
    in_testbed(|| async {
        let (old_path, _) = add_netns("old");
        let (new_path, _) = add_netns("new");
        let old = wiring(&old_path, "web-0", "10.0.1.7");
        wire(&old).await.unwrap();
        // The same pod again, in another sandbox with another address; the old address went to another pod.
        let new = PodWiring { seed: "second".to_owned(), ..wiring(&new_path, "web-0", "10.0.1.8") };
        wire(&new).await.unwrap();
        let (heir_path, _) = add_netns("heir");
        let heir = wiring(&heir_path, "heir", "10.0.1.7");
        wire(&heir).await.unwrap();
        sh("ip rule add to 10.0.1.7 lookup main pref 512; ip rule add from 10.0.1.7 lookup 2 pref 1536");
        let before = snapshot(None);
        for netns in [Some(old_path), None, Some("/run/netns/gone".into())] {
            unwire(&PodUnwiring { netns, ..unwiring(&old) }).await.unwrap();
            assert_eq!(snapshot(None), before);
        }
    });
}

#[test]
fn taking_down_removes_the_add_ons_rules_of_the_pod_and_no_others() {
    in_testbed(|| async {
        let (path, _) = add_netns("pod");
        let wiring = wiring(&path, "a", "10.0.1.7");
        sh("ip rule add pref 512 to 10.0.1.8 lookup main
            ip rule add pref 1536 from 10.0.1.8 lookup 2
            ip rule add pref 700 to 10.0.1.7 lookup main
            ip rule add pref 512 lookup main suppress_prefixlength 31");
        let before = snapshot(None);
        wire(&wiring).await.unwrap();
        sh("ip rule add pref 512 to 10.0.1.7 lookup main
            ip rule add pref 1536 from 10.0.1.7 lookup 2
            ip rule add pref 1536 from 10.0.1.7 lookup 3");
        unwire(&unwiring(&wiring)).await.unwrap();
        assert_eq!(snapshot(None), before);
    });
}

#[test]
fn pods_come_and_go_side_by_side() {
    in_testbed(|| async {
        let before = snapshot(None);
        let pods: Vec<PodWiring> = (0..24u8)
            .map(|n| wiring(&add_netns(&format!("pod{n}")).0, &format!("pod{n}"), &format!("10.0.1.{n}")))
            .collect();
        // As many plugin processes would: each with a runtime of its own, in the same namespaces.
        let each = |work: fn(&PodWiring, &tokio::runtime::Runtime)| {
            std::thread::scope(|scope| {
                for part in pods.chunks(4) {
                    scope.spawn(move || {
                        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                        part.iter().for_each(|pod| work(pod, &runtime));
                    });
                }
            });
        };
        for _ in 0..3 {
            each(|pod, runtime| assert_eq!(runtime.block_on(wire(pod)).unwrap(), pod.macs()));
            assert_eq!(ip("route").len(), pods.len());
            each(|pod, runtime| runtime.block_on(unwire(&unwiring(pod))).unwrap());
            assert_eq!(snapshot(None), before);
        }
    });
}

#[test]
fn taking_down_spares_a_link_that_is_no_veth() {
    in_testbed(|| async {
        let (path, _) = add_netns("pod");
        let wiring = wiring(&path, "a", "10.0.1.7");
        sh(&format!("ip link add {0} type bridge; ip link set {0} up; ip route add 10.0.1.7 dev {0}", wiring.host_if));
        let before = snapshot(None);
        unwire(&unwiring(&wiring)).await.unwrap();
        assert_eq!(snapshot(None), before);
    });
}

#[test]
fn the_first_packet_of_a_new_pod_is_not_lost() {
    in_testbed(|| async {
        sh("ip link set lo up; ip addr add 10.0.0.10/32 dev lo");
        let on_node = udp(v4("10.0.0.10"), 900).unwrap();
        for n in 1..40u8 {
            let (path, netns) = add_netns(&format!("pod{n}"));
            let wiring = wiring(&path, &format!("pod{n}"), &format!("10.0.1.{n}"));
            wire(&wiring).await.unwrap();
            exchange(&udp_in(&netns, wiring.address, 700), &on_node);
        }
    });
}
