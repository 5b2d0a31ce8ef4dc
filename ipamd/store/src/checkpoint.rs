//! The add-on's own state file, `ipam.json` (`vpc-cni-ipam/1`), written beside the journal.
//!
//! It is there so that a rollback to the add-on finds every pod. It is read only where there is no ledger: after the
//! add-on, or after a ledger that was lost.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use flatwire_core::ids::{PodName, SandboxId, Time};
use flatwire_core::ledger::LedgerState;
use flatwire_core::pool::ImportedPod;
use serde::{Deserialize, Serialize};

use crate::{StoreError, io_error, replace};

const VERSION: &str = "vpc-cni-ipam/1";
/// A pod takes a few hundred bytes, and a node has hundreds of pods.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const NANOS_PER_MS: u64 = 1_000_000;

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
                allocation_timestamp: a.at.0.saturating_mul(NANOS_PER_MS),
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

/// As the add-on writes it. What is not named here is of no use to us; what may be missing was missing in some release.
#[derive(Deserialize)]
struct Found {
    version: String,
    #[serde(default)]
    allocations: Option<Vec<FoundEntry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FoundEntry {
    network_name: String,
    #[serde(rename = "containerID")]
    container_id: String,
    if_name: String,
    #[serde(default)]
    ipv4: String,
    #[serde(default)]
    ipv6: String,
    #[serde(default)]
    allocation_timestamp: i64,
    #[serde(default)]
    metadata: FoundMetadata,
}

/// The number of interfaces is not read: absent means one, and a pod with more has an entry for each address.
#[derive(Default, Deserialize)]
struct FoundMetadata {
    #[serde(default, rename = "k8sPodNamespace")]
    namespace: String,
    #[serde(default, rename = "k8sPodName")]
    name: String,
}

/// The pods in the file. A missing file is a fresh node. All or nothing: a file that says one thing wrong may say others.
pub fn read(path: &Path) -> Result<Vec<ImportedPod>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("open", path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    parse(&bytes).map_err(|why| StoreError::Checkpoint { path: path.to_owned(), why })
}

fn parse(bytes: &[u8]) -> Result<Vec<ImportedPod>, String> {
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_BYTES {
        return Err(format!("it is larger than {MAX_BYTES} bytes"));
    }
    let found: Found = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if found.version != VERSION {
        return Err(format!("its version is {:?} and not {VERSION:?}", found.version));
    }
    let mut pods = Vec::new();
    let (mut addresses, mut sandboxes) = (BTreeSet::new(), BTreeSet::new());
    for entry in found.allocations.unwrap_or_default() {
        let pod = entry.pod()?;
        if !addresses.insert(pod.address) {
            return Err(format!("two of its entries have the address {}", pod.address));
        }
        if !sandboxes.insert(pod.sandbox.clone()) {
            return Err(format!("two of its entries are of the sandbox {}", pod.sandbox));
        }
        pods.push(pod);
    }
    Ok(pods)
}

impl FoundEntry {
    fn pod(self) -> Result<ImportedPod, String> {
        let sandbox = SandboxId { network: self.network_name, container_id: self.container_id, if_name: self.if_name };
        let bad = |text: &str| format!("{text:?} of the sandbox {sandbox} is no address");
        let address = match (self.ipv4.as_str(), self.ipv6.as_str()) {
            (v4, "") if !v4.is_empty() => IpAddr::V4(v4.parse::<Ipv4Addr>().map_err(|_| bad(v4))?),
            ("", v6) if !v6.is_empty() => IpAddr::V6(v6.parse::<Ipv6Addr>().map_err(|_| bad(v6))?),
            ("", "") => return Err(format!("the sandbox {sandbox} has no address")),
            _ => return Err(format!("the sandbox {sandbox} has two addresses")),
        };
        let at = u64::try_from(self.allocation_timestamp).unwrap_or(0) / NANOS_PER_MS;
        let pod = PodName { namespace: self.metadata.namespace, name: self.metadata.name };
        Ok(ImportedPod { sandbox, pod, address, at: Time(at) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::ids::{DeviceIndex, EniId, RouteTable};
    use flatwire_core::ledger::{Allocation, Record};

    #[test]
    fn the_file_is_the_add_ons_to_the_letter() {
        let state = LedgerState::replay(&[Record::Allocated(Allocation {
            sandbox: SandboxId { network: "aws-cni".into(), container_id: "f1c8".into(), if_name: "eth0".into() },
            pod: PodName { namespace: "default".into(), name: "sample-pod-1".into() },
            address: "10.0.17.25".parse().unwrap(),
            second: None,
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

    fn entry(more: &str) -> String {
        format!(r#"{{"networkName":"aws-cni","containerID":"f1c8","ifName":"eth0",{more}}}"#)
    }

    fn file(entries: &[String]) -> String {
        format!(r#"{{"version":"vpc-cni-ipam/1","allocations":[{}]}}"#, entries.join(","))
    }

    #[test]
    fn a_missing_file_is_a_fresh_node() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("ipam.json")).unwrap(), Vec::new());
    }

    #[test]
    fn files_of_every_release_are_read() {
        let names = r#""metadata":{"k8sPodNamespace":"default","k8sPodName":"sample-pod-1""#;
        let v4 = r#""ipv4":"10.0.17.25","allocationTimestamp":1724198400123456789"#;
        let v6 = r#""ipv6":"2600:1f13::1","allocationTimestamp":1724198400123456790"#;
        let table = [
            ("1.20 and later", format!("{v4},{names},\"interfacesCount\":1}}"), "10.0.17.25", "default/sample-pod-1"),
            ("before 1.20", format!("{v4},{names}}}"), "10.0.17.25", "default/sample-pod-1"),
            ("IPv6", format!("{v6},{names}}}"), "2600:1f13::1", "default/sample-pod-1"),
            ("moved from another runtime, without names", format!("{v4},\"metadata\":{{}}"), "10.0.17.25", "/"),
            ("without metadata", v4.to_owned(), "10.0.17.25", "/"),
            ("with more than we know", format!("{v4},\"releasedAt\":7"), "10.0.17.25", "/"),
        ];
        for (release, more, address, pod) in table {
            let pods = parse(file(&[entry(&more)]).as_bytes()).unwrap_or_else(|why| panic!("{release}: {why}"));
            let [found] = &pods[..] else { panic!("{release}: {pods:?}") };
            assert_eq!(
                (found.address.to_string().as_str(), found.pod.to_string().as_str()),
                (address, pod),
                "{release}"
            );
            assert_eq!(found.at, Time(1_724_198_400_123), "{release}");
            assert_eq!(found.sandbox.to_string(), "aws-cni/f1c8/eth0");
        }
        for empty in [r#"{"version":"vpc-cni-ipam/1","allocations":null}"#, &file(&[])] {
            assert_eq!(parse(empty.as_bytes()), Ok(Vec::new()));
        }
    }

    #[test]
    fn a_file_that_cannot_be_trusted_is_refused_with_its_name_the_reason_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipam.json");
        let other = r#"{"networkName":"aws-cni","containerID":"09ab","ifName":"eth0","ipv4":"10.0.17.25"}"#.to_owned();
        let table = [
            (String::new(), "EOF"),
            ("{".to_owned(), "EOF"),
            ("[]".to_owned(), "invalid"),
            (r#"{"version":"vpc-cni-ipam/2","allocations":[]}"#.to_owned(), "vpc-cni-ipam/2"),
            (r#"{"allocations":[]}"#.to_owned(), "version"),
            (file(&[entry(r#""ipv4":"10.0.17.256""#)]), "10.0.17.256"),
            (file(&[entry(r#""ipv4":"2600::1""#)]), "2600::1"),
            (file(&[entry(r#""metadata":{}"#)]), "no address"),
            (file(&[entry(r#""ipv4":"10.0.17.25","ipv6":"2600::1""#)]), "two addresses"),
            (file(&[entry(r#""ipv4":"10.0.17.25""#), other]), "two of its entries have the address 10.0.17.25"),
            (file(&[entry(r#""ipv4":"10.0.17.25""#), entry(r#""ipv4":"10.0.17.26""#)]), "aws-cni/f1c8/eth0"),
        ];
        for (text, reason) in table {
            std::fs::write(&path, &text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(
                error.contains(reason) && error.contains("ipam.json") && error.contains("pod route"),
                "{text}: {error}"
            );
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "a refused file is left as it is");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(read(&path), Err(StoreError::Io { .. })));
    }
}
