//! Names and addresses that are computed, not chosen: the same input always gives the same link name and MAC.

use crate::ids::{MacAddress, PodName, SandboxId};
use sha1::{Digest, Sha1};

/// Name of a pod's host interface: the prefix and 11 hex digits of SHA-1 over `namespace.pod`, or `namespace.pod.index`
/// for its further interfaces. The add-on's rule; its network policy agent finds pods by it.
pub fn host_if_name(prefix: &str, namespace: &str, pod: &str, index: u32) -> String {
    let mut hash = Sha1::new();
    hash.update(namespace);
    hash.update(".");
    hash.update(pod);
    if index > 0 {
        hash.update(format!(".{index}"));
    }
    let mut name = prefix.to_owned();
    for byte in hash.finalize().iter().take(6) {
        name.push_str(&format!("{byte:02x}"));
    }
    // Six bytes are twelve digits, one too many.
    name.pop();
    name
}

/// Name of the host interface of a sandbox of the ledger: by its pod, or by the sandbox itself where it is not a pod's first
/// interface. The rule by which the plugin names it.
pub fn host_if_of(prefix: &str, sandbox: &SandboxId, pod: &PodName) -> String {
    if sandbox.if_name == "eth0" && !pod.namespace.is_empty() && !pod.name.is_empty() {
        host_if_name(prefix, &pod.namespace, &pod.name, 0)
    } else {
        host_if_name(prefix, &sandbox.container_id, &sandbox.if_name, 0)
    }
}

/// What the MACs of a sandbox's interface are derived from.
pub fn seed(container_id: &str, pod_if: &str) -> String {
    format!("{container_id}/{pod_if}")
}

/// The MAC of a sandbox's host link, where our plugin made it.
pub fn host_mac_of(sandbox: &SandboxId) -> MacAddress {
    mac(&seed(&sandbox.container_id, &sandbox.if_name), "host")
}

/// A locally administered unicast MAC for one end of a sandbox's veth.
pub fn mac(seed: &str, end: &str) -> MacAddress {
    let mut hash = Sha1::new();
    hash.update(end);
    hash.update([0]);
    hash.update(seed);
    let mut bytes = [0; 6];
    for (byte, digest) in bytes.iter_mut().zip(hash.finalize()) {
        *byte = digest;
    }
    bytes[0] = (bytes[0] | 0x02) & 0xfe;
    MacAddress(bytes)
}

#[cfg(test)]
mod tests {
    use super::{host_if_name, mac};

    #[test]
    fn host_names_are_the_add_ons() {
        assert_eq!(host_if_name("eni", "default", "sample-pod-1", 0), "eni5f6d6b7710e");
        assert_eq!(host_if_name("eni", "default", "sample-pod-1", 1), "eni204015da5bb");
        assert_eq!(host_if_name("abcd", "n", "p", 7).len(), 15);
    }

    #[test]
    fn macs_are_stable_local_unicast_and_differ_by_end() {
        let (host, pod) = (mac("sandbox-1", "host"), mac("sandbox-1", "pod"));
        assert_eq!(host, mac("sandbox-1", "host"));
        assert_ne!(host, pod);
        assert_ne!(host, mac("sandbox-2", "host"));
        for mac in [host, pod] {
            assert_eq!(mac.0[0] & 0x03, 0x02, "{mac}");
        }
    }
}
