//! Objects of the API server, with the members that are read and no others. A member that is absent is its default: the
//! server leaves empty ones out.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Which extended resource of a node counts pods' addresses.
pub const RESOURCE: &str = "flatwire.io/pod-addresses";
/// The condition of a node that is short of them, in the manner of `MemoryPressure`.
pub const CONDITION: &str = "PodAddressPressure";
/// The add-on's annotation of a pod with its address.
pub const POD_IPS: &str = "vpc.amazonaws.com/pod-ips";
/// A label or annotation of a node with this prefix is a setting of ours.
pub const PREFIX: &str = "flatwire.io/";

/// Something with a name that can be kept.
pub trait Object: for<'de> Deserialize<'de> + Send + 'static {
    fn uid(&self) -> &str;
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Meta {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Meta,
    pub spec: NodeSpec,
    pub status: NodeStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    pub unschedulable: bool,
    pub taints: Vec<Taint>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Taint {
    pub key: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    pub capacity: Quantities,
    pub allocatable: Quantities,
    pub conditions: Vec<Condition>,
}

/// The two quantities that are read of a node's many.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Quantities {
    pub pods: Option<String>,
    #[serde(rename = "flatwire.io/pod-addresses")]
    pub addresses: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub reason: String,
}

/// A pod as it is sent; `mirror` keeps less of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Pod {
    pub metadata: Meta,
    pub spec: PodSpec,
    pub status: PodStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    pub host_network: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    pub phase: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EniConfigObject {
    pub metadata: Meta,
    pub spec: EniConfigSpec,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EniConfigSpec {
    pub subnet: String,
    /// People write `null` too.
    pub security_groups: Option<Vec<String>>,
}

impl Object for Node {
    fn uid(&self) -> &str {
        &self.metadata.uid
    }
}

impl Object for Pod {
    fn uid(&self) -> &str {
        &self.metadata.uid
    }
}

impl Object for EniConfigObject {
    fn uid(&self) -> &str {
        &self.metadata.uid
    }
}

/// What is around the items of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ListFrame {
    pub metadata: ListMeta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ListMeta {
    pub resource_version: String,
}

/// One line of a watch, read for its type and where the watch stands after it.
#[derive(Debug, Deserialize)]
pub struct WatchLine {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub object: LineObject,
}

/// Of an event's object what every kind has, and of an error's its code and words.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct LineObject {
    pub metadata: ListMeta,
    pub code: u16,
    pub message: String,
}

/// The same line, read for its object.
#[derive(Debug, Deserialize)]
pub struct Carrier<T> {
    pub object: T,
}

/// What the server says of a call that failed.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    pub message: String,
}
