//! How commands speak with a running lab: one JSON object per line over a unix socket, one answer per request.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
pub use lab_ec2::Delays;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::Credentials;
use crate::error::{Doing, Error, Result};

/// What a lab is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    pub name: String,
    pub nodes: Vec<NodeSpec>,
    pub region: String,
    pub seed: u64,
    pub delays: Delays,
    /// Both VPCs have an IPv6 block, their subnets a /64 of it, and their machines an address.
    #[serde(default)]
    pub ipv6: bool,
    /// Where `ipamd` and `aws-cni` are; beside the lab's own program if not given.
    pub bin_dir: Option<PathBuf>,
    /// Where the nodes' files (ledger, logs, CNI configuration) are kept; in memory, gone with the lab, if not given.
    pub keep: Option<PathBuf>,
    /// For every ipamd, beside what the lab sets itself.
    pub env: BTreeMap<String, String>,
    /// Start ipamd on every node.
    pub daemons: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            name: "default".into(),
            nodes: Vec::new(),
            region: "eu-central-1".into(),
            seed: 1,
            delays: QUICK,
            ipv6: false,
            bin_dir: None,
            keep: None,
            env: BTreeMap::new(),
            daemons: true,
        }
    }
}

/// How long EC2 takes in a lab: short enough to watch, in EC2's order.
pub const QUICK: Delays = Delays {
    eni_pending_ms: 100,
    attach_ms: 300,
    link_ms: 400,
    detach_ms: 300,
    run_ms: 200,
    terminate_ms: 200,
    imds_lag_ms: 300,
};

/// One machine: its type and the prefixes its primary ENI is launched with, /28s and, after a second colon, /80s:
/// `m5.large:1`, `m5.large:0:1`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    pub instance_type: String,
    pub prefixes: u32,
    #[serde(default)]
    pub ipv6_prefixes: u32,
    /// For this node's ipamd only.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

impl std::str::FromStr for NodeSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.splitn(3, ':');
        let instance_type = parts.next().unwrap_or_default().to_owned();
        if instance_type.is_empty() {
            return Err(Error::refused(format!("{text:?} names no instance type")));
        }
        let mut count = || match parts.next() {
            None => Ok(0),
            Some(count) => {
                count.parse().map_err(|_| Error::refused(format!("{text:?}: {count:?} is not a number of prefixes")))
            }
        };
        let (prefixes, ipv6_prefixes) = (count()?, count()?);
        Ok(Self { instance_type, prefixes, ipv6_prefixes, env: BTreeMap::new() })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// The lab ends when the connection that said this is closed.
    Hold,
    Info,
    Status,
    /// EC2's state as it is, to judge by.
    View,
    /// Wait until the cloud has nothing under way and the fabric shows all of it.
    Settle,
    /// How to step into a node, a pod (`node-1/web`), `internet`, `peer`, or a VPC's router (`vpc`, `peer-vpc`).
    Enter {
        place: String,
    },
    NodeAdd {
        spec: NodeSpec,
    },
    NodeRemove {
        node: String,
    },
    Daemon {
        node: String,
        action: DaemonAction,
    },
    PodAdd {
        node: String,
        name: String,
    },
    /// With what the kubelet tells plugins that declare a capability: portMappings, bandwidth.
    PodAddWith {
        node: String,
        name: String,
        capabilities: BTreeMap<String, serde_json::Value>,
    },
    /// CHECK by every plugin of the pod's chain.
    PodCheck {
        node: String,
        name: String,
    },
    PodDel {
        node: String,
        name: String,
    },
    Pods,
    /// From one place to several, or to bare addresses: ICMP echo for the time, UDP and TCP for the source the far side
    /// saw. Places are asked by IPv4 where they have it, unless IPv6 is wanted.
    Probe {
        from: String,
        to: Vec<String>,
        #[serde(default)]
        ipv6: bool,
    },
    /// From one place to reflectors behind any address and port, several packets each way.
    Call {
        from: String,
        to: Vec<SocketAddr>,
    },
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DaemonAction {
    /// Start it and wait until it serves.
    Start,
    /// SIGTERM, and wait for its end.
    Stop,
    /// SIGKILL.
    Kill,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ok(serde_json::Value),
    Error(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    pub name: String,
    /// EC2's API on the machine's loopback address.
    pub endpoint: SocketAddr,
    pub region: String,
    pub credentials: Credentials,
    pub vpc: VpcInfo,
    pub peer: VpcInfo,
    pub internet_server: Ipv4Addr,
    pub internet_server6: Ipv6Addr,
    /// The ipamd that nodes run, which is also the operator's command line.
    pub ipamd: Option<PathBuf>,
    pub nodes: Vec<NodeInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VpcInfo {
    pub id: String,
    pub cidrs: Vec<Ipv4Net>,
    pub ipv6: Option<Ipv6Net>,
    pub subnets: Vec<SubnetInfo>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SubnetInfo {
    pub id: String,
    pub cidr: Ipv4Net,
    pub ipv6: Option<Ipv6Net>,
    pub availability_zone: String,
    pub free_addresses: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeInfo {
    pub name: String,
    pub instance: String,
    pub instance_type: String,
    pub availability_zone: String,
    /// Address of the primary ENI, and its public address if it has one.
    pub address: Option<Ipv4Addr>,
    pub public: Option<Ipv4Addr>,
    /// IPv6 address of the primary ENI, if it has one.
    pub ipv6: Option<Ipv6Addr>,
    pub enis: Vec<EniInfo>,
    /// "serving", "starting", "stopped", or "none" for a machine without ipamd.
    pub daemon: String,
    pub pods: Vec<PodInfo>,
    /// Where the node's files are, as seen inside the lab (or on this machine with `--keep`).
    pub files: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EniInfo {
    pub id: String,
    pub device: u32,
    pub mac: String,
    pub subnet: String,
    pub primary: Ipv4Addr,
    pub secondary: Vec<Ipv4Addr>,
    pub prefixes: Vec<Ipv4Net>,
    pub ipv6: Vec<Ipv6Addr>,
    pub ipv6_prefixes: Vec<Ipv6Net>,
    pub status: String,
    /// Name of its link on the node, once it has appeared.
    pub link: Option<String>,
    /// Packets that carried a source address this ENI does not hold.
    pub spoofed: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodInfo {
    pub node: String,
    pub name: String,
    /// The first of `addresses`.
    pub address: IpAddr,
    /// In the plugin's order.
    pub addresses: Vec<IpAddr>,
    pub netns: String,
    /// How long the plugin took, in milliseconds.
    pub add_ms: f64,
}

impl PodInfo {
    /// Its IPv4 address, if it has one.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub info: Info,
    /// EC2 calls by action since the lab began.
    pub calls: BTreeMap<String, u64>,
    pub drops: Drops,
    /// Milliseconds the fabric took to follow the last change of the cloud.
    pub fabric_ms: f64,
}

/// Packets the fabric dropped without a word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops {
    /// The source address is not assigned to the ENI the packet came from.
    pub spoofed: u64,
    /// The destination is assigned to nobody.
    pub unassigned: u64,
    /// Bound for the internet from an address without a public one.
    pub no_public: u64,
    /// No rule of the ENI's security groups allows it.
    pub denied: u64,
}

/// How another process steps into a place: descriptors of the world's process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entrance {
    pub net_fd: i32,
    pub mnt_fd: Option<i32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Probe {
    pub from: String,
    pub to: String,
    pub target: IpAddr,
    /// Time of an ICMP echo, in microseconds; none came back if absent.
    pub rtt_us: Option<u64>,
    /// The source address the far side saw over UDP; nothing came back if absent.
    pub seen: Option<IpAddr>,
    /// Likewise over TCP.
    pub seen_tcp: Option<IpAddr>,
}

/// Whom the far side saw, over each protocol; absent if no answer came, or not each time the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Called {
    pub udp: Option<IpAddr>,
    pub tcp: Option<IpAddr>,
}

/// A connection to a running lab.
pub struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    pub fn connect(dir: &Path) -> Result<Self> {
        let path = dir.join("control.sock");
        let stream = UnixStream::connect(&path).doing(|| format!("reach the lab at {}; is it up?", path.display()))?;
        // Longer than anything a lab does; a world that is stuck is told of rather than waited for.
        stream.set_read_timeout(Some(Duration::from_secs(180))).doing(|| "limit the wait for the lab".into())?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let mut line = serde_json::to_string(request).doing(|| "the request".into())?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).doing(|| "speak with the lab".into())?;
        let mut line = String::new();
        self.stream.read_line(&mut line).doing(|| "hear from the lab".into())?;
        if line.is_empty() {
            return Err(Error::refused("the lab ended before it answered"));
        }
        match serde_json::from_str(&line).doing(|| "the lab's answer".into())? {
            Answer::Ok(value) => serde_json::from_value(value).doing(|| "the lab's answer".into()),
            Answer::Error(text) => Err(Error::Refused(text)),
        }
    }
}

/// One line of answer, as the world sends it.
pub fn answer(result: Result<serde_json::Value>) -> String {
    let answer = match result {
        Ok(value) => Answer::Ok(value),
        Err(error) => Answer::Error(crate::error::chain(&error)),
    };
    let mut line = serde_json::to_string(&answer).expect("invariant: an answer is JSON");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_written_as_type_and_prefixes() {
        let node: NodeSpec = "m5.large:2".parse().unwrap();
        assert_eq!((node.instance_type.as_str(), node.prefixes), ("m5.large", 2));
        assert_eq!("t3.medium".parse::<NodeSpec>().unwrap().prefixes, 0);
        let both: NodeSpec = "m5.large:1:3".parse().unwrap();
        assert_eq!((both.prefixes, both.ipv6_prefixes), (1, 3));
        assert!("m5.large:1:1:1".parse::<NodeSpec>().is_err());
        assert!("m5.large:x".parse::<NodeSpec>().is_err());
        assert!(":1".parse::<NodeSpec>().is_err());
    }
}
