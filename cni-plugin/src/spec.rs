//! The types of CNI: versions, the network configuration, CNI_ARGS, and what goes to standard output.
//!
//! Nothing here reads a file or the environment. Field names and shapes are those of the CNI specification (sections 1, 2
//! and 5 of 1.1.0, and the result types of the versions before); the encoding of a pod in an ADD result is the one the EKS
//! add-on writes, because runtimes keep it and hand it back on DEL, possibly to the other implementation.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// Kernel limit on an interface name (IFNAMSIZ without the closing zero).
pub const MAX_IF_NAME: usize = 15;
/// The hash behind the prefix of a host interface takes 11 of the 15 characters.
pub const MAX_VETH_PREFIX: usize = 4;
/// The smallest MTU IPv4 allows for a host, and the largest a VPC carries.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 576..=9001;
/// Capabilities whose values this plugin would have to obey and cannot: the address and the MAC of a pod are not for the
/// caller to choose.
const REFUSED_CAPABILITIES: [&str; 4] = ["ips", "mac", "ipRanges", "infinibandGUID"];
/// Pod annotation with which a pod of the add-on asks for one interface per network card.
const NIC_ANNOTATION: &str = "k8s.amazonaws.com/nicConfig";
const NIC_ANNOTATION_VALUE: &str = "multi-nic-attachment";

/// A published version of the specification, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CniVersion {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl CniVersion {
    pub const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const NEWEST: Self = Self::V1_1_0;

    pub fn text(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.text() == text)
    }
}

/// One plugin configuration as it arrives on standard input. The whole object is kept, unknown keys included; a key is
/// looked at when a verb needs it, so that DEL does not fail on a setting that only ADD uses.
#[derive(Debug, Clone)]
pub struct NetConf {
    pub version: CniVersion,
    pub name: String,
    keys: Map<String, Value>,
}

/// A live attachment as GC lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

impl NetConf {
    pub fn decode(bytes: &[u8]) -> Result<Self, Failure> {
        let keys = decode_object(bytes)?;
        let version = match keys.get("cniVersion") {
            // Configurations older than the key are version 0.1.0.
            None => CniVersion::V0_1_0,
            Some(Value::String(text)) if text.is_empty() => CniVersion::V0_1_0,
            Some(Value::String(text)) => {
                CniVersion::parse(text).ok_or_else(|| Failure::Version { given: text.clone() })?
            }
            Some(other) => {
                return Err(Failure::Decode { problem: format!("cniVersion is {}, not a text", kind_of(other)) });
            }
        };
        let name = match keys.get("name") {
            Some(Value::String(name)) if is_identifier(name) => name.clone(),
            None => return Err(Failure::config("name", "is missing")),
            Some(other) => {
                return Err(Failure::config("name", &format!("is {other}, which is not a valid network name")));
            }
        };
        Ok(Self { version, name, keys })
    }

    pub fn veth_prefix(&self) -> Result<&str, Failure> {
        let prefix = self.text("vethPrefix")?.unwrap_or("eni");
        let usable = prefix.chars().all(|c| c.is_ascii_graphic() && !"/:%".contains(c));
        if prefix.is_empty() || prefix.len() > MAX_VETH_PREFIX || !usable {
            return Err(Failure::config(
                "vethPrefix",
                &format!("is {prefix:?}, but must be 1 to {MAX_VETH_PREFIX} characters that may stand in a link name"),
            ));
        }
        Ok(prefix)
    }

    /// The MTU of the pod's interface. The add-on's template writes it as a text.
    pub fn mtu(&self) -> Result<u32, Failure> {
        let number = match self.keys.get("mtu") {
            None => Some(*MTU_RANGE.end()),
            Some(Value::String(text)) if text.is_empty() => Some(*MTU_RANGE.end()),
            Some(Value::String(text)) => text.parse().ok(),
            Some(value) => value.as_u64().and_then(|number| u32::try_from(number).ok()),
        };
        number.filter(|number| MTU_RANGE.contains(number)).ok_or_else(|| {
            let given = self.keys.get("mtu").map(Value::to_string).unwrap_or_default();
            let (low, high) = (MTU_RANGE.start(), MTU_RANGE.end());
            Failure::config("mtu", &format!("is {given}, but must be a number from {low} to {high}"))
        })
    }

    /// Checks the keys that only matter when a pod is set up.
    pub fn check_for_add(&self) -> Result<(), Failure> {
        if let Some(mode) = self.text("podSGEnforcingMode")?
            && !["", "strict", "standard"].contains(&mode)
        {
            let problem = format!("is {mode:?}, but must be \"strict\" or \"standard\"");
            return Err(Failure::config("podSGEnforcingMode", &problem));
        }
        let runtime = self.object("runtimeConfig")?;
        for key in REFUSED_CAPABILITIES {
            match runtime.and_then(|keys| keys.get(key)) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    return Err(Failure::UnsupportedField {
                        key: format!("runtimeConfig.{key}"),
                        value: value.to_string(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether the pod's annotations, when the runtime passes them, ask for one interface per network card.
    pub fn wants_multi_nic(&self) -> bool {
        let annotations = self.keys.get("runtimeConfig").and_then(|c| c.get("io.kubernetes.cri.pod-annotations"));
        annotations.and_then(|a| a.get(NIC_ANNOTATION)).and_then(Value::as_str) == Some(NIC_ANNOTATION_VALUE)
    }

    pub fn ipamd_socket(&self) -> Result<PathBuf, Failure> {
        self.path("ipamdSocket", "/var/run/aws-node/ipamd.sock")
    }

    pub fn npa_socket(&self) -> Result<PathBuf, Failure> {
        self.path("npaSocket", "/var/run/aws-node/npa.sock")
    }

    pub fn release_queue_dir(&self) -> Result<PathBuf, Failure> {
        self.path("releaseQueueDir", "/var/run/aws-node/releases")
    }

    /// The log settings never fail a verb: a wrong type counts as absent.
    pub fn log_file(&self) -> Option<&str> {
        self.keys.get("pluginLogFile").and_then(Value::as_str).filter(|path| !path.is_empty())
    }

    pub fn log_level(&self) -> Option<&str> {
        self.keys.get("pluginLogLevel").and_then(Value::as_str)
    }

    pub fn dns(&self) -> Option<&Map<String, Value>> {
        self.keys.get("dns").and_then(Value::as_object).filter(|dns| !dns.is_empty())
    }

    pub fn prev_result(&self) -> Result<Option<&Map<String, Value>>, Failure> {
        self.object("prevResult")
    }

    /// The list under `cni.dev/valid-attachments`. A missing list is not an empty one: without it nothing may be taken
    /// for stale. `null` is how a Go runtime writes an empty list. The older name of the key is what libcni sends beside.
    pub fn valid_attachments(&self) -> Result<Vec<ValidAttachment>, Failure> {
        const KEY: &str = "cni.dev/valid-attachments";
        let list = self.keys.get(KEY).or_else(|| self.keys.get("cni.dev/attachments"));
        match list {
            None => Err(Failure::config(KEY, "is missing, so nothing can be told to be stale")),
            Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|e| Failure::config(KEY, &format!("is not a list of attachments: {e}"))),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, Failure> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Failure::config(key, &format!("is {}, not a text", kind_of(other)))),
        }
    }

    fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>, Failure> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => Err(Failure::config(key, &format!("is {}, not an object", kind_of(other)))),
        }
    }

    fn path(&self, key: &str, default: &str) -> Result<PathBuf, Failure> {
        let path = PathBuf::from(self.text(key)?.filter(|text| !text.is_empty()).unwrap_or(default));
        if path.is_absolute() { Ok(path) } else { Err(Failure::config(key, "is not an absolute path")) }
    }
}

/// The version an answer has to be in, as far as the configuration tells: an error about it is still read in its version.
pub fn version_of(stdin: &[u8]) -> CniVersion {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Only {
        #[serde(default)]
        cni_version: String,
    }
    match serde_json::from_slice::<Only>(stdin) {
        Ok(only) if only.cni_version.is_empty() => CniVersion::V0_1_0,
        Ok(only) => CniVersion::parse(&only.cni_version).unwrap_or(CniVersion::NEWEST),
        Err(_) => CniVersion::NEWEST,
    }
}

fn decode_object(bytes: &[u8]) -> Result<Map<String, Value>, Failure> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::Decode { problem: "standard input is empty".into() });
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(other) => Err(Failure::Decode { problem: format!("it is {}, not an object", kind_of(&other)) }),
        Err(error) => Err(Failure::Decode { problem: error.to_string() }),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Container ids and network names: a letter or digit, then letters, digits, `_`, `.` and `-` (sections 1 and 2).
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// What is wrong with an interface name, if anything. The rules are the kernel's; `%` is refused because the kernel would
/// take it for a pattern and pick another name.
pub fn interface_name_problem(name: &str) -> Option<String> {
    if name.len() > MAX_IF_NAME {
        return Some(format!("is {name:?}, longer than the {MAX_IF_NAME} characters the kernel allows"));
    }
    let bad = |c: char| "/:%".contains(c) || c.is_whitespace() || c.is_control();
    if name.is_empty() || name == "." || name == ".." || name.chars().any(bad) {
        return Some(format!("is {name:?}, which is not an interface name"));
    }
    None
}

/// The pairs of CNI_ARGS, in any order; keys this plugin does not know are left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs {
    pub pod_name: String,
    pub pod_namespace: String,
    pub infra_container_id: String,
    pub pod_uid: String,
}

impl CniArgs {
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let mut pairs = BTreeMap::new();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| Failure::environment("CNI_ARGS", format!("holds {pair:?}, which is not KEY=VALUE")))?;
            pairs.insert(key, value);
        }
        let get = |key: &str| pairs.get(key).copied().unwrap_or_default().to_owned();
        Ok(Self {
            pod_name: get("K8S_POD_NAME"),
            pod_namespace: get("K8S_POD_NAMESPACE"),
            infra_container_id: get("K8S_POD_INFRA_CONTAINER_ID"),
            pod_uid: get("K8S_POD_UID"),
        })
    }
}

/// The ADD result before it is written in the words of one version.
#[derive(Debug, Clone, Default)]
pub struct AddResult {
    pub interfaces: Vec<Interface>,
    pub ips: Vec<Ip>,
    pub routes: Vec<Route>,
    pub dns: Option<Map<String, Value>>,
}

/// Section 5, `interfaces`. `mtu` appears in 1.1.0 only.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Interface {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

#[derive(Debug, Clone)]
pub struct Ip {
    pub interface: usize,
    pub address: IpAddr,
}

/// A route inside the pod. `table` and `scope` can only be told in 1.1.0; before, a route that needs them is left out.
#[derive(Debug, Clone)]
pub struct Route {
    pub dst: String,
    pub gateway: Option<IpAddr>,
    pub table: Option<u32>,
    pub scope: Option<u8>,
}

impl AddResult {
    /// Writes the result in the words of `version`. With the result of an earlier plugin in the chain, that one is passed
    /// on untouched and ours is added behind it.
    pub fn encode(&self, version: CniVersion, previous: Option<&Map<String, Value>>) -> Value {
        if version <= CniVersion::V0_2_0 {
            return self.encode_0_2(version);
        }
        let mut out = previous.cloned().unwrap_or_default();
        out.insert("cniVersion".into(), version.text().into());
        let offset = append(&mut out, "interfaces", self.interfaces.iter().map(|i| interface_json(i, version)));
        append(&mut out, "ips", self.ips.iter().map(|ip| ip_json(ip, offset, version)));
        append(&mut out, "routes", self.routes.iter().filter_map(|route| route_json(route, version)));
        match (&self.dns, out.contains_key("dns")) {
            (Some(dns), false) => drop(out.insert("dns".into(), dns.clone().into())),
            // Up to 0.4.0 the reference library always writes the key, and so does the add-on.
            (None, false) if version <= CniVersion::V0_4_0 => drop(out.insert("dns".into(), json!({}))),
            _ => {}
        }
        Value::Object(out)
    }

    /// Before 0.3.0 a result holds one address of each family and no interfaces.
    fn encode_0_2(&self, version: CniVersion) -> Value {
        let mut out = Map::new();
        out.insert("cniVersion".into(), version.text().into());
        for (key, v6) in [("ip4", false), ("ip6", true)] {
            if let Some(ip) = self.ips.iter().find(|ip| ip.address.is_ipv6() == v6) {
                let of_family = |route: &&Route| route.gateway.is_some_and(|gateway| gateway.is_ipv6() == v6);
                let routes: Vec<Value> =
                    self.routes.iter().filter(of_family).filter_map(|r| route_json(r, version)).collect();
                let mut entry = Map::new();
                entry.insert("ip".into(), cidr(ip.address).into());
                if !routes.is_empty() {
                    entry.insert("routes".into(), routes.into());
                }
                out.insert(key.into(), entry.into());
            }
        }
        out.insert("dns".into(), self.dns.clone().unwrap_or_default().into());
        Value::Object(out)
    }
}

/// Appends to the list under `key` and says how long it was before. An empty list is not written, as the reference
/// library does it.
fn append(out: &mut Map<String, Value>, key: &str, items: impl Iterator<Item = Value>) -> usize {
    let mut list = match out.remove(key) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let before = list.len();
    list.extend(items);
    if !list.is_empty() {
        out.insert(key.into(), list.into());
    }
    before
}

fn interface_json(interface: &Interface, version: CniVersion) -> Value {
    let mtu = interface.mtu.filter(|_| version >= CniVersion::V1_1_0);
    json!(Interface { mtu, ..interface.clone() })
}

fn ip_json(ip: &Ip, offset: usize, version: CniVersion) -> Value {
    let mut out = json!({ "interface": ip.interface + offset, "address": cidr(ip.address) });
    if version < CniVersion::V1_0_0 {
        out["version"] = if ip.address.is_ipv6() { "6" } else { "4" }.into();
    }
    out
}

fn route_json(route: &Route, version: CniVersion) -> Option<Value> {
    let mut out = json!({ "dst": route.dst });
    if let Some(gateway) = route.gateway {
        out["gw"] = gateway.to_string().into();
    }
    if version >= CniVersion::V1_1_0 {
        if let Some(table) = route.table {
            out["table"] = table.into();
        }
        if let Some(scope) = route.scope {
            out["scope"] = scope.into();
        }
    } else if route.table.is_some() || route.scope.is_some() {
        return None;
    }
    Some(out)
}

pub fn cidr(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv6() { 128 } else { 32 })
}

/// Section 5, `Error`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorObject<'a> {
    pub cni_version: &'a str,
    pub code: u32,
    pub msg: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
}

/// The answer to VERSION: the version asked in, and the list. Standard input may be empty, since a prober may send none.
pub fn version_answer(stdin: &[u8]) -> Result<Value, Failure> {
    let asked = if stdin.iter().all(u8::is_ascii_whitespace) {
        None
    } else {
        decode_object(stdin)?.get("cniVersion").and_then(Value::as_str).map(str::to_owned)
    };
    let asked = asked.filter(|text| !text.is_empty()).unwrap_or_else(|| CniVersion::NEWEST.text().into());
    Ok(json!({ "cniVersion": asked, "supportedVersions": CniVersion::ALL.map(CniVersion::text) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(keys: Value) -> NetConf {
        let mut conf = json!({ "cniVersion": "1.1.0", "name": "aws-cni", "type": "aws-cni" });
        conf.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        NetConf::decode(conf.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn mtu_is_a_text_or_a_number_within_the_range() {
        let table = [
            (json!({}), Some(9001)),
            (json!({"mtu": ""}), Some(9001)),
            (json!({"mtu": "1500"}), Some(1500)),
            (json!({"mtu": 576}), Some(576)),
            (json!({"mtu": 9001}), Some(9001)),
            (json!({"mtu": 575}), None),
            (json!({"mtu": "9002"}), None),
            (json!({"mtu": -1}), None),
            (json!({"mtu": 1500.5}), None),
            (json!({"mtu": "__MTU__"}), None),
            (json!({"mtu": null}), None),
            (json!({"mtu": [1500]}), None),
        ];
        for (keys, mtu) in table {
            let read = conf(keys.clone()).mtu();
            assert_eq!(read.as_ref().ok().copied(), mtu, "{keys}");
            assert!(read.err().is_none_or(|failure| failure.code() == 7 && failure.to_string().contains("mtu")));
        }
    }

    #[test]
    fn the_veth_prefix_leaves_room_for_the_hash() {
        let table = [
            (json!({}), Some("eni")),
            (json!({"vethPrefix": "abcd"}), Some("abcd")),
            (json!({"vethPrefix": "x"}), Some("x")),
            (json!({"vethPrefix": "abcde"}), None),
            (json!({"vethPrefix": ""}), None),
            (json!({"vethPrefix": "a/b"}), None),
            (json!({"vethPrefix": "é"}), None),
            (json!({"vethPrefix": 5}), None),
        ];
        for (keys, prefix) in table {
            assert_eq!(conf(keys.clone()).veth_prefix().ok(), prefix, "{keys}");
        }
    }

    #[test]
    fn values_the_vpc_decides_cannot_be_asked_for() {
        let failure = conf(json!({"runtimeConfig": {"ips": ["10.0.0.9/32"]}})).check_for_add().unwrap_err();
        assert_eq!(failure.code(), 2);
        let text = failure.to_string();
        assert!(text.contains("runtimeConfig.ips") && text.contains("10.0.0.9/32"), "{text}");
        assert!(conf(json!({"runtimeConfig": {"portMappings": [{"HostPort": 80}]}})).check_for_add().is_ok());
        assert_eq!(conf(json!({"podSGEnforcingMode": "lax"})).check_for_add().unwrap_err().code(), 7);
        assert!(conf(json!({"podSGEnforcingMode": "standard"})).check_for_add().is_ok());
    }

    #[test]
    fn a_missing_list_of_attachments_is_not_an_empty_one() {
        assert_eq!(conf(json!({})).valid_attachments().unwrap_err().code(), 7);
        assert_eq!(conf(json!({"cni.dev/valid-attachments": {"a": 1}})).valid_attachments().unwrap_err().code(), 7);
        assert_eq!(conf(json!({"cni.dev/valid-attachments": null})).valid_attachments().unwrap(), []);
        let one = [ValidAttachment { container_id: "c".into(), ifname: "eth0".into() }];
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let keys = json!({ key: [{"containerID": "c", "ifname": "eth0"}] });
            assert_eq!(conf(keys).valid_attachments().unwrap(), one);
        }
    }

    #[test]
    fn the_annotation_for_several_cards_is_seen() {
        let with = |value: &str| {
            conf(
                json!({"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"k8s.amazonaws.com/nicConfig": value}}}),
            )
            .wants_multi_nic()
        };
        assert!(with("multi-nic-attachment"));
        assert!(!with("other"));
        assert!(!conf(json!({"runtimeConfig": []})).wants_multi_nic());
    }

    #[test]
    fn cni_args_come_in_any_order() {
        let expected = CniArgs {
            pod_name: "p".into(),
            pod_namespace: "n".into(),
            infra_container_id: "i".into(),
            pod_uid: "u".into(),
        };
        for text in [
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=n;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=i;K8S_POD_UID=u",
            "K8S_POD_UID=u;K8S_POD_INFRA_CONTAINER_ID=i;MAC=02:00:00:00:00:01;K8S_POD_NAME=p;;K8S_POD_NAMESPACE=n;",
        ] {
            assert_eq!(CniArgs::parse(text).unwrap(), expected);
        }
        assert_eq!(CniArgs::parse("").unwrap(), CniArgs::default());
        assert!(CniArgs::parse("IgnoreUnknown=1;oops").unwrap_err().to_string().contains("oops"));
    }

    #[test]
    fn version_answers_in_the_version_asked() {
        let all = json!(["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        for (stdin, version) in [
            (r#"{"cniVersion":"0.3.1"}"#, "0.3.1"),
            (r#"{"cniVersion":"9.9.9"}"#, "9.9.9"),
            ("{}", "1.1.0"),
            ("", "1.1.0"),
        ] {
            let answer = version_answer(stdin.as_bytes()).unwrap();
            assert_eq!(answer, json!({"cniVersion": version, "supportedVersions": all}));
        }
        assert_eq!(version_answer(b"nonsense").unwrap_err().code(), 6);
    }
}
