//! The add-on's state file, read back: what we write, what somebody damaged, and any bytes at all.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flatwire_core::ids::{DeviceIndex, EniId, PodName, RouteTable, SandboxId, Time};
use flatwire_core::ledger::{Allocation, LedgerState, Record};
use flatwire_core::pool::ImportedPod;
use flatwire_store::{StoreError, checkpoint};
use proptest::prelude::*;

fn read(bytes: &[u8]) -> Result<Vec<ImportedPod>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ipam.json");
    std::fs::write(&path, bytes).unwrap();
    let outcome = checkpoint::read(&path);
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "reading changes nothing");
    outcome.map_err(|error| {
        assert!(matches!(error, StoreError::Checkpoint { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("ipam.json") && text.contains("remove it"), "{text}");
        text
    })
}

/// Pods with texts of any kind, each with an address and a sandbox of its own.
fn state() -> impl Strategy<Value = LedgerState> {
    let pod = (any::<String>(), any::<String>(), any::<String>(), any::<bool>(), 0u64..2_000_000_000_000);
    prop::collection::vec(pod, 0..8).prop_map(|pods| {
        let allocation = |(n, (network, namespace, name, v4, at)): (u16, (String, String, String, bool, u64))| {
            let address = match v4 {
                true => IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + u32::from(n))),
                false => IpAddr::V6(Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(n))),
            };
            Record::Allocated(Allocation {
                sandbox: SandboxId { network, container_id: format!("c{n}"), if_name: "eth0".to_owned() },
                pod: PodName { namespace, name },
                address,
                second: None,
                eni: EniId::new("eni-1").unwrap(),
                device: DeviceIndex(0),
                table: RouteTable::MAIN,
                at: Time(at),
            })
        };
        let records: Vec<Record> = (0..).zip(pods).map(allocation).collect();
        LedgerState::replay(&records)
    })
}

/// Every pod once: no address and no sandbox may come twice out of a file, whatever is in it.
fn assert_each_once(pods: &[ImportedPod]) {
    assert_eq!(pods.iter().map(|pod| pod.address).collect::<BTreeSet<_>>().len(), pods.len());
    assert_eq!(pods.iter().map(|pod| &pod.sandbox).collect::<BTreeSet<_>>().len(), pods.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    /// A ledger that was lost comes back from the file that followed it.
    #[test]
    fn what_we_write_for_the_add_on_we_can_take_over(state in state()) {
        let pods = read(checkpoint::render(&state).as_bytes()).unwrap();
        let expected: Vec<ImportedPod> = state
            .pods
            .values()
            .map(|a| ImportedPod { sandbox: a.sandbox.clone(), pod: a.pod.clone(), address: a.address, at: a.at })
            .collect();
        prop_assert_eq!(pods, expected);
    }

    #[test]
    fn a_damaged_file_gives_each_pod_once_or_none(
        state in state(),
        blows in prop::collection::vec((any::<usize>(), any::<usize>(), prop::collection::vec(any::<u8>(), 0..3)), 1..4),
    ) {
        let mut bytes = checkpoint::render(&state).into_bytes();
        for (at, length, with) in blows {
            let at = at % (bytes.len() + 1);
            let end = (at + length % 40).min(bytes.len());
            bytes.splice(at..end, with);
        }
        if let Ok(pods) = read(&bytes) {
            assert_each_once(&pods);
        }
    }

    /// Entries out of a small box, so that many files are nearly right.
    #[test]
    fn files_that_are_nearly_right_are_read_as_they_stand_or_refused(
        version in prop::sample::select(vec!["vpc-cni-ipam/1", "vpc-cni-ipam/1", "vpc-cni-ipam/2"]),
        entries in prop::collection::vec(
            prop::collection::vec(prop::sample::select(vec![
                r#""networkName":"aws-cni""#, r#""networkName":"aws-cni""#, r#""containerID":"c1""#, r#""containerID":"c2""#,
                r#""ifName":"eth0""#, r#""ifName":"eth0""#, r#""ipv4":"10.0.0.1""#, r#""ipv4":"10.0.0.2""#,
                r#""ipv4":"10.0.0""#, r#""ipv6":"fd00::1""#, r#""ipv6":null"#, r#""allocationTimestamp":-5"#,
                r#""allocationTimestamp":1e99"#, r#""metadata":{}"#, r#""metadata":[]"#, r#""more":{"x":[1]}"#,
            ]), 2..7),
            0..4,
        ),
    ) {
        let body: Vec<String> = entries.iter().map(|members| format!("{{{}}}", members.join(","))).collect();
        let text = format!(r#"{{"version":"{version}","allocations":[{}]}}"#, body.join(","));
        if let Ok(pods) = read(text.as_bytes()) {
            prop_assert_eq!(version, "vpc-cni-ipam/1");
            prop_assert_eq!(pods.len(), entries.len(), "all or nothing");
            assert_each_once(&pods);
        }
    }

    #[test]
    fn any_bytes_at_all_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
    }
}
