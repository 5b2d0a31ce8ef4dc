//! The add-on's own state file, `ipam.json` (`vpc-cni-ipam/1`), written beside the journal.
//!
//! Flatwire never reads it back for itself; it is there so that a rollback to the add-on finds every pod.

use std::path::Path;

use flatwire_core::ledger::LedgerState;
use serde::Serialize;

use crate::{StoreError, replace};

const VERSION: &str = "vpc-cni-ipam/1";

#[derive(Serialize)]
struct Checkpoint<'l> {
    version: &'static str,
    allocations: Vec<Entry<'l>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'l> {
    network_name: &'l str,
    #[serde(rename = "containerID")]
    container_id: &'l str,
    if_name: &'l str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv4: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv6: Option<String>,
    /// Nanoseconds since the epoch.
    allocation_timestamp: u64,
    metadata: Metadata<'l>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'l> {
    #[serde(rename = "k8sPodNamespace", skip_serializing_if = "str::is_empty")]
    namespace: &'l str,
    #[serde(rename = "k8sPodName", skip_serializing_if = "str::is_empty")]
    name: &'l str,
    interfaces_count: u32,
}

/// The file's content, one trailing newline as the add-on writes it.
pub fn render(state: &LedgerState) -> String {
    let entry = |a: &'_ flatwire_core::ledger::Allocation| -> (Option<String>, Option<String>) {
        match a.address {
            std::net::IpAddr::V4(v4) => (Some(v4.to_string()), None),
            std::net::IpAddr::V6(v6) => (None, Some(v6.to_string())),
        }
    };
    let allocations = state
        .pods
        .values()
        .map(|a| {
            let (ipv4, ipv6) = entry(a);
            Entry {
                network_name: &a.sandbox.network,
                container_id: &a.sandbox.container_id,
                if_name: &a.sandbox.if_name,
                ipv4,
                ipv6,
                allocation_timestamp: a.at.0.saturating_mul(1_000_000),
                metadata: Metadata { namespace: &a.pod.namespace, name: &a.pod.name, interfaces_count: 1 },
            }
        })
        .collect();
    let checkpoint = Checkpoint { version: VERSION, allocations };
    let mut text = serde_json::to_string(&checkpoint).expect("invariant: a checkpoint always serialises");
    text.push('\n');
    text
}

/// Replaces the file, atomically.
pub fn write(path: &Path, state: &LedgerState) -> Result<(), StoreError> {
    replace(path, render(state).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::ids::{DeviceIndex, EniId, PodName, RouteTable, SandboxId, Time};
    use flatwire_core::ledger::{Allocation, Record};

    #[test]
    fn the_file_is_the_add_ons_to_the_letter() {
        let state = LedgerState::replay(&[Record::Allocated(Allocation {
            sandbox: SandboxId { network: "aws-cni".into(), container_id: "f1c8".into(), if_name: "eth0".into() },
            pod: PodName { namespace: "default".into(), name: "sample-pod-1".into() },
            address: "10.0.17.25".parse().unwrap(),
            eni: EniId::new("eni-1").unwrap(),
            device: DeviceIndex(0),
            table: RouteTable::MAIN,
            at: Time(1_724_198_400_123),
        })]);
        let expected = concat!(
            r#"{"version":"vpc-cni-ipam/1","allocations":[{"networkName":"aws-cni","containerID":"f1c8","ifName":"eth0","#,
            r#""ipv4":"10.0.17.25","allocationTimestamp":1724198400123000000,"#,
            r#""metadata":{"k8sPodNamespace":"default","k8sPodName":"sample-pod-1","interfacesCount":1}}]}"#,
            "\n"
        );
        assert_eq!(render(&state), expected);
    }
}
