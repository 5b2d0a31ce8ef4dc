//! What things cost here. Not a judgement: run by hand, `cargo test --release -- --ignored --nocapture`.

mod common;

use std::time::{Duration, Instant};

use common::{add_netns, in_testbed, sh};
use flatwire_core::ids::{EniId, RouteTable};
use flatwire_core::netplan::{EniPlan, Look, NodePlan, PrimaryPlan};
use flatwire_core::ports::Kernel;
use flatwire_kernel::NodeKernel;
use flatwire_kernel::pod::{Expected, PodUnwiring, PodWiring, check, host_if_name, unwire, wire};

fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what:<40} p50 {:>9.3?}  p95 {:>9.3?}  max {:>9.3?}", at(50), at(95), at(100));
}

#[test]
#[ignore = "prints timings"]
fn pods() {
    in_testbed(|| async {
        sh("ip link set lo up");
        let pods: Vec<PodWiring> = (0..200u32)
            .map(|n| PodWiring {
                netns: add_netns(&format!("pod{n}")).0,
                pod_if: "eth0".to_owned(),
                host_if: host_if_name("eni", "default", &format!("pod{n}"), 0),
                mtu: 9001,
                address: std::net::Ipv4Addr::from(0x0a00_0100 + n).into(),
                second: None,
                gateway_index: 0,
                seed: format!("pod{n}"),
            })
            .collect();
        let (mut wired, mut checked, mut unwired) = (Vec::new(), Vec::new(), Vec::new());
        for pod in &pods {
            let start = Instant::now();
            wire(pod).await.unwrap();
            wired.push(start.elapsed());
        }
        for pod in &pods {
            let start = Instant::now();
            assert!(check(pod, &Expected::of(pod)).await.unwrap().is_empty());
            checked.push(start.elapsed());
        }
        for pod in &pods {
            let (host_if, addresses) = (pod.host_if.clone(), vec![pod.address]);
            let unwiring =
                PodUnwiring { netns: Some(pod.netns.clone()), pod_if: pod.pod_if.clone(), host_if, addresses };
            let start = Instant::now();
            unwire(&unwiring).await.unwrap();
            unwired.push(start.elapsed());
        }
        tell("wire", wired);
        tell("check", checked);
        tell("unwire", unwired);
    });
}

#[test]
#[ignore = "prints timings"]
fn node() {
    in_testbed(|| async {
        sh("ip link add ens5 address 02:00:00:00:00:10 type veth peer name x");
        for per_eni in [0u32, 14, 49, 200] {
            let enis = (1..=15u32).map(|number| {
                sh(&format!(
                    "ip link show e{number} >/dev/null 2>&1 || \
                     ip link add e{number} address 02:00:00:00:01:{number:02x} type veth peer name x{number}"
                ));
                EniPlan {
                    id: EniId::new(format!("eni-{number}")).expect("an id"),
                    mac: format!("02:00:00:00:01:{number:02x}").parse().expect("a MAC"),
                    address: format!("10.{number}.255.20").parse().expect("an address"),
                    subnet: format!("10.{number}.0.0/16").parse().expect("a subnet"),
                    table: RouteTable(number + 1),
                    mark: number,
                    sources: (0..per_eni)
                        .map(|n| format!("10.{number}.{}.{}/32", n / 100, (n % 100) * 2).parse().expect("a net"))
                        .collect(),
                }
            });
            let primary = PrimaryPlan {
                id: EniId::new("eni-0").expect("an id"),
                mac: "02:00:00:00:00:10".parse().expect("a MAC"),
                address: "10.0.0.10".parse().expect("an address"),
            };
            let vpc = vec!["10.0.0.0/8".parse().expect("a net")];
            let plan = NodePlan { enis: enis.collect(), vpc, mtu: 1500, ..NodePlan::new(primary) };
            let kernel = NodeKernel::open().unwrap();
            let start = Instant::now();
            kernel.apply(&plan, &Look::default()).await.unwrap();
            let first = start.elapsed();
            let mut idle = Vec::new();
            for _ in 0..20 {
                let start = Instant::now();
                assert!(kernel.apply(&plan, &Look::default()).await.unwrap().repaired.is_empty());
                idle.push(start.elapsed());
            }
            println!("15 ENIs of {per_eni} addresses: changed {first:.3?}");
            tell("  nothing to do", idle);
            sh("nft delete table ip flatwire");
            let start = Instant::now();
            assert!(!kernel.apply(&plan, &Look::default()).await.unwrap().repaired.is_empty());
            println!("  nftables table put back in {:.3?}", start.elapsed());
            sh("nft add table ip other; nft delete table ip other");
            let start = Instant::now();
            assert!(kernel.apply(&plan, &Look::default()).await.unwrap().repaired.is_empty());
            println!("  verified after somebody's change in {:.3?}", start.elapsed());
        }
    });
}
