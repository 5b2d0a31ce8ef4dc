//! What one call is about: whose pod, the names of its links, and the two ways to learn its interfaces: from ipamd's
//! answer (ADD) and from the result an ADD wrote earlier (DEL, CHECK), be it ours or the add-on's.

use std::net::IpAddr;

use flatwire_kernel::pod::{gateway, host_if_name};
use flatwire_proto::IpAllocationMetadata;
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::input::Call;
use crate::spec::{self, AddResult, Interface, Ip, MAX_VETH_PREFIX, Route};
use crate::wiring::wiring_of;

/// Instances have at most a few dozen network cards.
pub const MAX_INTERFACES: usize = 64;
/// Length of the hash in the name of a host interface.
const HASH_LEN: usize = 11;
/// The interface kubelet and its runtimes always ask for. A pod has one attachment of this name.
const PRIMARY_IF: &str = "eth0";
/// Link scope in the numbers of rtnetlink, which section 5 uses.
const SCOPE_LINK: u8 = 253;

/// The two words the names of a pod's host interfaces are hashed from.
///
/// A pod of Kubernetes is named by namespace and name, as the add-on does it, because the network policy agent looks for
/// exactly that link. Everything else (podman, cnitool, a second attachment of a pod through multus) is named by
/// container id and interface, so that two attachments never claim one link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    first: String,
    second: String,
}

impl Names {
    pub fn of(call: &Call) -> Self {
        let args = &call.args;
        if call.if_name == PRIMARY_IF && !args.pod_name.is_empty() && !args.pod_namespace.is_empty() {
            Self { first: args.pod_namespace.clone(), second: args.pod_name.clone() }
        } else {
            Self { first: call.container_id.clone(), second: call.if_name.clone() }
        }
    }

    /// The same names for an attachment that GC names.
    pub fn of_stale(stale: &flatwire_proto::StaleAttachment) -> Self {
        if stale.if_name == PRIMARY_IF && !stale.pod_name.is_empty() && !stale.pod_namespace.is_empty() {
            Self { first: stale.pod_namespace.clone(), second: stale.pod_name.clone() }
        } else {
            Self { first: stale.container_id.clone(), second: stale.if_name.clone() }
        }
    }

    pub fn host_if(&self, prefix: &str, index: u8) -> String {
        host_if_name(prefix, &self.first, &self.second, u32::from(index))
    }

    /// The name of the entry in a result that stands for no interface but carries the device number.
    fn dummy(&self, prefix: &str) -> String {
        let host_if = self.host_if(prefix, 0);
        format!("dummy{}", host_if.strip_prefix(prefix).unwrap_or(&host_if))
    }
}

/// How messages call the pod.
pub fn title(call: &Call) -> String {
    if call.args.pod_name.is_empty() {
        format!("container {} interface {}", call.container_id, call.if_name)
    } else {
        format!("pod {}/{}", call.args.pod_namespace, call.args.pod_name)
    }
}

pub fn pod_if(if_name: &str, index: u8) -> String {
    if index == 0 { if_name.to_owned() } else { format!("mNicIf{index}") }
}

/// Which gateway, and above 0 which routing table of the pod, an interface gets. The first interface of an attachment that
/// is numbered by its runtime (`eth1` of podman, `net1` of multus) stands beside a first one that has the default route of
/// the pod, so it takes the table of its number; any other has the pod to itself.
pub fn gateway_index(if_name: &str, position: u8) -> u8 {
    let number = ["eth", "net"].into_iter().find_map(|word| if_name.strip_prefix(word)?.parse::<u8>().ok());
    number.filter(|number| usize::from(*number) < MAX_INTERFACES).unwrap_or(0).saturating_add(position)
}

/// One interface of a pod as ipamd granted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    pub gateway_index: u8,
    pub host_if: String,
    pub pod_if: String,
    pub address: IpAddr,
    /// Of the other family. Behind an IPv6 address an IPv4 one serves egress only, and is not told as the pod's.
    pub second: Option<IpAddr>,
    pub table: i32,
    pub device: i32,
}

impl Granted {
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [self.address].into_iter().chain(self.second)
    }
}

/// The addresses of an entry of ipamd's, as they stand there, the pod's own first.
fn texts(entry: &IpAllocationMetadata) -> impl Iterator<Item = &str> {
    let all = [&entry.ipv4_addr, &entry.ipv6_addr, &entry.egress_ipv4_addr];
    all.into_iter().map(String::as_str).filter(|text| !text.is_empty())
}

/// Every address of an entry of ipamd's; what is none is left out.
pub fn addresses(entry: &IpAllocationMetadata) -> Vec<IpAddr> {
    texts(entry).filter_map(|text| text.parse().ok()).collect()
}

/// Turns ipamd's answer into interfaces. An address that does not parse is an error: it cannot be wired.
pub fn granted(call: &Call, prefix: &str, metadata: &[IpAllocationMetadata]) -> Result<Vec<Granted>, Failure> {
    let nonsense = |problem: String| Failure::Nonsense { call: "AddNetwork", problem };
    if metadata.is_empty() {
        return Err(nonsense("success but no address".into()));
    }
    if metadata.len() > MAX_INTERFACES {
        return Err(nonsense(format!("{} interfaces, more than the {MAX_INTERFACES} a pod may have", metadata.len())));
    }
    let names = Names::of(call);
    let one = |(position, entry): (u8, &IpAllocationMetadata)| {
        let parse = |text: &str| text.parse().map_err(|_| nonsense(format!("{text:?}, which is not an address")));
        let mut given = texts(entry).map(parse);
        let address = given.next().unwrap_or_else(|| Err(nonsense("an interface without an address".into())))?;
        let second = given.next().transpose()?;
        Ok(Granted {
            gateway_index: gateway_index(&call.if_name, position),
            host_if: names.host_if(prefix, position),
            pod_if: pod_if(&call.if_name, position),
            address,
            second,
            table: entry.route_table_id,
            device: entry.device_number,
        })
    };
    (0..=u8::MAX).zip(metadata).map(one).collect()
}

/// The result of an ADD: per interface a host entry and a container entry.
///
/// For a pod of Kubernetes the `mac` of the latter is the route table, and a last entry's `sandbox` the device number: every
/// released add-on finds its way back from these. Anybody else is told the MAC, which podman insists on, and no such entry.
pub fn result(call: &Call, prefix: &str, mtu: u32, granted: &[Granted]) -> AddResult {
    let sandbox = call.netns.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let of_kubernetes = !call.args.pod_namespace.is_empty();
    let mut result = AddResult { dns: call.conf.dns().cloned(), ..AddResult::default() };
    for (position, one) in granted.iter().enumerate() {
        let host = Interface { name: one.host_if.clone(), mtu: Some(mtu), ..Interface::default() };
        let inside = Interface {
            name: one.pod_if.clone(),
            mac: if of_kubernetes {
                one.table.to_string()
            } else {
                wiring_of(call, one, mtu).macs().pod_mac.to_string()
            },
            mtu: Some(mtu),
            sandbox: sandbox.clone(),
        };
        result.interfaces.extend([host, inside]);
        // Beyond the first the routes sit in a table of the pod's own.
        let table = (one.gateway_index > 0).then(|| u32::from(one.gateway_index));
        for address in [one.address].into_iter().chain(one.second.filter(IpAddr::is_ipv6)) {
            result.ips.push(Ip { interface: 2 * position + 1, address });
            let gateway = gateway(address, one.gateway_index);
            let everything = if address.is_ipv6() { "::/0" } else { "0.0.0.0/0" };
            result.routes.push(Route { dst: spec::cidr(gateway), gateway: None, table, scope: Some(SCOPE_LINK) });
            result.routes.push(Route { dst: everything.into(), gateway: Some(gateway), table, scope: None });
        }
    }
    if of_kubernetes {
        let device = granted.first().map(|one| one.device).unwrap_or_default();
        result.interfaces.push(Interface {
            name: Names::of(call).dummy(prefix),
            mac: "0".into(),
            mtu: None,
            sandbox: device.to_string(),
        });
    }
    result
}

/// One interface of a pod as an earlier ADD wrote it down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub position: u8,
    pub host_if: Option<String>,
    pub pod_if: String,
    pub mtu: Option<u32>,
    pub addresses: Vec<IpAddr>,
}

/// Finds our interfaces in a result, among whatever other plugins of the chain have added. What does not look like ours
/// is left out, because the caller is going to delete links by these names.
pub fn attached(result: &Map<String, Value>, if_name: &str) -> Vec<Attached> {
    let interfaces = list(result, "interfaces");
    let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut found = Vec::new();
    for position in (0..=u8::MAX).take(MAX_INTERFACES) {
        let wanted = pod_if(if_name, position);
        let inside = |entry: &&Value| text(entry, "name") == wanted && !text(entry, "sandbox").is_empty();
        let Some((at, entry)) = interfaces.iter().enumerate().find(|(_, entry)| inside(entry)) else { break };
        let before = at.checked_sub(1).and_then(|before| interfaces.get(before));
        let host_if = before
            .filter(|entry| text(entry, "sandbox").is_empty())
            .map(|entry| text(entry, "name"))
            .filter(|name| is_host_if(name));
        let mtu = entry.get("mtu").and_then(Value::as_u64).and_then(|mtu| u32::try_from(mtu).ok());
        let addresses = list(result, "ips").iter().filter(|ip| points_to(ip, at)).filter_map(address_of).collect();
        found.push(Attached { position, host_if, pod_if: wanted, mtu, addresses });
    }
    found
}

fn list<'a>(result: &'a Map<String, Value>, key: &str) -> &'a [Value] {
    result.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn points_to(ip: &Value, position: usize) -> bool {
    ip.get("interface").and_then(Value::as_u64).and_then(|at| usize::try_from(at).ok()) == Some(position)
}

fn address_of(ip: &Value) -> Option<IpAddr> {
    ip.get("address")?.as_str()?.split('/').next()?.parse().ok()
}

/// A prefix of one to four characters and the hash: never the name of a link that is not a pod's.
fn is_host_if(name: &str) -> bool {
    let Some(split) = name.len().checked_sub(HASH_LEN) else { return false };
    (1..=MAX_VETH_PREFIX).contains(&split)
        && name.get(split..).is_some_and(is_hash)
        && spec::interface_name_problem(name).is_none()
}

fn is_hash(text: &str) -> bool {
    text.len() == HASH_LEN && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::input::tests::{read, sample};
    use crate::spec::CniVersion;

    fn conf() -> Value {
        json!({ "cniVersion": "0.4.0", "name": "aws-cni", "type": "aws-cni" })
    }

    fn metadata(address: &str, table: i32, device: i32) -> IpAllocationMetadata {
        let v6 = address.contains(':');
        IpAllocationMetadata {
            ipv4_addr: if v6 { String::new() } else { address.into() },
            ipv6_addr: if v6 { address.into() } else { String::new() },
            device_number: device,
            route_table_id: table,
            egress_ipv4_addr: String::new(),
        }
    }

    fn encoded(version: CniVersion, metadata: &[IpAllocationMetadata]) -> Value {
        let call = sample("ADD", &conf());
        let granted = granted(&call, "eni", metadata).unwrap();
        result(&call, "eni", 8951, &granted).encode(version, None)
    }

    /// The add-on's own example, byte for byte but for the routes, which the add-on leaves out.
    #[test]
    fn the_result_is_the_add_ons() {
        let mut result = encoded(CniVersion::V0_4_0, &[metadata("10.0.17.25", 2, 1)]);
        let routes = result.as_object_mut().unwrap().remove("routes");
        assert_eq!(routes, Some(json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}])));
        let expected = json!({
            "cniVersion": "0.4.0",
            "interfaces": [
                {"name": "eni5f6d6b7710e"},
                {"name": "eth0", "mac": "2", "sandbox": "/var/run/netns/cni-1"},
                {"name": "dummy5f6d6b7710e", "mac": "0", "sandbox": "1"}
            ],
            "ips": [{"version": "4", "interface": 1, "address": "10.0.17.25/32"}],
            "dns": {}
        });
        assert_eq!(result, expected);
    }

    /// podman reads a result's MAC and refuses what is none.
    #[test]
    fn a_container_that_is_no_pod_of_kubernetes_is_told_its_mac() {
        let mut call = sample("ADD", &conf());
        call.args.pod_namespace.clear();
        let granted = granted(&call, "eni", &[metadata("10.0.17.25", 2, 1)]).unwrap();
        let result = result(&call, "eni", 8951, &granted).encode(CniVersion::V0_4_0, None);
        let interfaces = result["interfaces"].as_array().unwrap();
        let mac = interfaces[1]["mac"].as_str().unwrap();
        assert!(interfaces.len() == 2 && mac.len() == 17 && mac.split(':').count() == 6, "{result}");
        let read = attached(result.as_object().unwrap(), "eth0");
        assert_eq!((read.len(), read[0].pod_if.as_str(), read[0].addresses.len()), (1, "eth0", 1));
    }

    #[test]
    fn every_version_in_its_own_words() {
        for version in CniVersion::ALL {
            let result = encoded(version, &[metadata("10.0.17.25", 254, 0)]);
            assert_eq!(result["cniVersion"], version.text());
            if version <= CniVersion::V0_2_0 {
                assert_eq!(result["ip4"]["ip"], "10.0.17.25/32");
                assert_eq!(result["ip4"]["routes"], json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]));
                assert!(
                    result.get("interfaces").is_none() && result.get("ips").is_none() && result.get("ip6").is_none()
                );
                continue;
            }
            assert_eq!(result["ips"][0].get("version").is_some(), version < CniVersion::V1_0_0);
            assert_eq!(result.get("dns").is_some(), version < CniVersion::V1_0_0);
            assert_eq!(result["interfaces"][0].get("mtu"), (version >= CniVersion::V1_1_0).then_some(&json!(8951)));
            assert_eq!(result["interfaces"][1]["mac"], "254");
            assert_eq!(result["interfaces"][2].get("mtu"), None);
            let link_route = json!({"dst": "169.254.1.1/32", "scope": 253});
            assert_eq!(result["routes"][0] == link_route, version >= CniVersion::V1_1_0);
        }
    }

    #[test]
    fn ipv6_and_several_interfaces() {
        let result = encoded(CniVersion::V1_1_0, &[metadata("2001:db8::7", 254, 0), metadata("2001:db8:1::7", 2, 1)]);
        let names: Vec<&str> =
            result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["eni5f6d6b7710e", "eth0", "eni204015da5bb", "mNicIf1", "dummy5f6d6b7710e"]);
        assert_eq!(result["ips"][1], json!({"interface": 3, "address": "2001:db8:1::7/128"}));
        assert_eq!(result["routes"][3], json!({"dst": "::/0", "gw": "fe80::2", "table": 1}));
        // A route in a table of its own cannot be told before 1.1.0, and told without the table it would be a lie.
        let older = encoded(CniVersion::V1_0_0, &[metadata("2001:db8::7", 254, 0), metadata("2001:db8:1::7", 2, 1)]);
        assert_eq!(older["routes"], json!([{"dst": "::/0", "gw": "fe80::1"}]));
    }

    #[test]
    fn a_result_behind_another_plugin_keeps_the_others() {
        let call = sample("ADD", &conf());
        let previous = json!({
            "cniVersion": "0.4.0",
            "interfaces": [{"name": "br0"}, {"name": "net1", "sandbox": "/var/run/netns/cni-1"}],
            "ips": [{"version": "4", "interface": 1, "address": "192.168.0.2/24"}],
            "routes": [{"dst": "192.168.0.0/16"}],
            "dns": {"nameservers": ["192.168.0.1"]},
            "other": {"kept": true}
        });
        let granted = granted(&call, "eni", &[metadata("10.0.17.25", 254, 0)]).unwrap();
        let merged = result(&call, "eni", 9001, &granted).encode(CniVersion::V0_4_0, previous.as_object());
        assert_eq!(merged["interfaces"].as_array().unwrap().len(), 5);
        assert_eq!(merged["interfaces"][0], previous["interfaces"][0]);
        assert_eq!(merged["ips"][0], previous["ips"][0]);
        assert_eq!(merged["ips"][1]["interface"], 3);
        assert_eq!((&merged["dns"], &merged["other"]), (&previous["dns"], &previous["other"]));
        // And DEL finds its own part of it again.
        let found = attached(merged.as_object().unwrap(), "eth0");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].host_if.as_deref(), Some("eni5f6d6b7710e"));
        assert_eq!(found[0].addresses, ["10.0.17.25".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn what_was_written_is_found_again_in_every_version() {
        let metadata = [metadata("10.0.17.25", 254, 0), metadata("10.1.17.25", 2, 1)];
        for version in [CniVersion::V0_3_0, CniVersion::V0_4_0, CniVersion::V1_0_0, CniVersion::V1_1_0] {
            let found = attached(encoded(version, &metadata).as_object().unwrap(), "eth0");
            assert_eq!(found.len(), 2);
            assert_eq!(found[1].pod_if, "mNicIf1");
            assert_eq!(found[1].host_if.as_deref(), Some("eni204015da5bb"));
            assert_eq!(found[1].addresses, ["10.1.17.25".parse::<IpAddr>().unwrap()]);
        }
    }

    #[test]
    fn links_that_cannot_be_a_pods_are_never_taken_from_a_result() {
        for host in ["eth0", "lo", "docker0", "eni5f6d6b7710g", "5f6d6b7710e", "toolong5f6d6b7710e"] {
            let result = json!({
                "interfaces": [{"name": host}, {"name": "eth0", "sandbox": "/x"}],
                "ips": [{"interface": 1, "address": "10.0.0.1/32"}]
            });
            let found = attached(result.as_object().unwrap(), "eth0");
            assert_eq!(found[0].host_if, None, "{host}");
        }
        let host_side_only = json!({ "interfaces": [{"name": "eth0"}] });
        assert_eq!(attached(host_side_only.as_object().unwrap(), "eth0"), []);
    }

    #[test]
    fn links_are_named_by_the_pod_or_by_the_sandbox() {
        let conf = conf().to_string();
        let name = |overrides: &[(&str, &str)]| Names::of(&read(overrides, conf.as_bytes()).unwrap()).host_if("eni", 0);
        assert_eq!(name(&[]), "eni5f6d6b7710e");
        assert_eq!(name(&[("CNI_CONTAINERID", "other")]), "eni5f6d6b7710e");
        let podman = [("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=web")];
        let table = [
            name(&[]),
            name(&[("CNI_IFNAME", "net1")]),
            name(&podman),
            name(&[podman[0], ("CNI_CONTAINERID", "other")]),
            name(&[podman[0], ("CNI_IFNAME", "eth1")]),
        ];
        for (position, name) in table.iter().enumerate() {
            assert!(is_host_if(name));
            assert!(!table[..position].contains(name), "{table:?}");
        }
    }

    #[test]
    fn answers_without_a_usable_address_are_refused() {
        let call = sample("ADD", &conf());
        let many = vec![metadata("10.0.0.1", 254, 0); MAX_INTERFACES + 1];
        for entries in [vec![], vec![metadata("", 254, 0)], vec![metadata("10.0.0.256", 254, 0)], many] {
            assert_eq!(granted(&call, "eni", &entries).unwrap_err().code(), 109);
        }
    }
}
