//! The state as plain data: what the fabric, IMDS and tests look at. A view is a copy and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flatwire_core::ids::{
    AttachmentId, DeviceIndex, EniId, InstanceId, MacAddress, SecurityGroupId, SubnetId, Time, VpcId,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub type Tags = BTreeMap<String, String>;

/// Everything at one moment, without any lag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    pub now: Time,
    /// Of `Ec2::version` at that moment.
    pub version: u64,
    pub vpcs: Vec<VpcView>,
    /// Active peering connections.
    pub peerings: Vec<(VpcId, VpcId)>,
    pub subnets: Vec<SubnetInfo>,
    /// Terminated instances stay in sight for a while, as they do in EC2.
    pub instances: Vec<InstanceInfo>,
    pub enis: Vec<EniInfo>,
    pub security_groups: Vec<SecurityGroupInfo>,
}

impl View {
    pub fn eni(&self, id: &EniId) -> Option<&EniInfo> {
        self.enis.iter().find(|eni| eni.id == *id)
    }

    pub fn instance(&self, id: &InstanceId) -> Option<&InstanceInfo> {
        self.instances.iter().find(|instance| instance.id == *id)
    }

    pub fn subnet(&self, id: &SubnetId) -> Option<&SubnetInfo> {
        self.subnets.iter().find(|subnet| subnet.id == *id)
    }

    /// The ENIs of one instance, attaching and detaching ones included, by card and device.
    pub fn enis_of(&self, instance: &InstanceId) -> Vec<&EniInfo> {
        let mut enis: Vec<_> = self.enis.iter().filter(|eni| eni.is_on(instance)).collect();
        enis.sort_by_key(|eni| eni.attachment.as_ref().map(|a| (a.card, a.device)));
        enis
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpcView {
    pub id: VpcId,
    pub cidrs: Vec<Ipv4Net>,
    pub ipv6: Option<Ipv6Net>,
    /// An internet gateway is attached.
    pub internet_gateway: bool,
    pub tags: Tags,
}

impl VpcView {
    /// Its blocks of both families.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> {
        self.cidrs.iter().copied().map(IpNet::V4).chain(self.ipv6.map(IpNet::V6))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetInfo {
    pub id: SubnetId,
    pub vpc: VpcId,
    pub cidr: Ipv4Net,
    pub ipv6: Option<Ipv6Net>,
    pub availability_zone: String,
    pub availability_zone_id: String,
    /// As `AvailableIpAddressCount` shows it.
    pub free_addresses: u32,
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    pub id: InstanceId,
    pub instance_type: String,
    pub state: InstanceState,
    pub subnet: SubnetId,
    pub vpc: VpcId,
    pub availability_zone: String,
    pub image: String,
    pub tags: Tags,
    /// `HttpPutResponseHopLimit`: how many hops a token answer of IMDS travels.
    pub hop_limit: u32,
    /// Name of the instance role whose credentials IMDS hands out.
    pub role: Option<String>,
    pub launched_at: Time,
    pub user_data: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum InstanceState {
    Pending,
    Running,
    ShuttingDown,
    Terminated,
}

impl InstanceState {
    /// EC2's number for the state.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Pending => 0,
            Self::Running => 16,
            Self::ShuttingDown => 32,
            Self::Terminated => 48,
        }
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
        })
    }
}

/// How an instance hears from its metadata service that it will be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The spot market wants it back: two minutes of notice.
    Spot,
    /// Its Auto Scaling group ends it.
    ScaleIn,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniInfo {
    pub id: EniId,
    pub mac: MacAddress,
    pub vpc: VpcId,
    pub subnet: SubnetId,
    pub availability_zone: String,
    pub primary_ipv4: Ipv4Addr,
    pub secondary: BTreeSet<Ipv4Addr>,
    pub prefixes: BTreeSet<Ipv4Net>,
    pub ipv6: BTreeSet<Ipv6Addr>,
    /// Each a /80.
    pub ipv6_prefixes: BTreeSet<Ipv6Net>,
    /// Public address by the private one it stands for.
    pub public: BTreeMap<Ipv4Addr, Ipv4Addr>,
    pub security_groups: Vec<SecurityGroupId>,
    pub source_dest_check: bool,
    pub tags: Tags,
    pub description: String,
    pub status: EniStatus,
    pub attachment: Option<AttachmentInfo>,
    /// `interface`, `trunk`, `efa`, …, as it was asked for.
    pub interface_type: String,
    pub created_at: Time,
}

impl EniInfo {
    /// Slots in use: the primary address, each secondary address and each prefix take one.
    pub fn slots(&self) -> u32 {
        u32::try_from(1 + self.secondary.len() + self.prefixes.len()).unwrap_or(u32::MAX)
    }

    /// Slots of its own kind in use: each IPv6 address and each /80 takes one.
    pub fn ipv6_slots(&self) -> u32 {
        u32::try_from(self.ipv6.len() + self.ipv6_prefixes.len()).unwrap_or(u32::MAX)
    }

    pub fn is_on(&self, instance: &InstanceId) -> bool {
        self.attachment.as_ref().is_some_and(|attachment| attachment.instance == *instance)
    }

    /// True where the ENI holds the address in any way.
    pub fn holds(&self, address: impl Into<IpAddr>) -> bool {
        let address = address.into();
        self.nets().any(|net| net.contains(&address))
    }

    /// Everything it holds, of both families: each address, and each prefix whole.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> {
        let ipv4 = self.secondary.iter().chain([&self.primary_ipv4]).map(|address| Ipv4Net::from(*address));
        let ipv6 = self.ipv6.iter().map(|address| Ipv6Net::from(*address));
        let ipv4 = ipv4.chain(self.prefixes.iter().copied()).map(IpNet::V4);
        ipv4.chain(ipv6.chain(self.ipv6_prefixes.iter().copied()).map(IpNet::V6))
    }

    /// The guest sees the ENI's link.
    pub fn link_is_up(&self, now: Time) -> bool {
        self.attachment.as_ref().is_some_and(|a| a.link_at <= now && a.state != AttachmentState::Detaching)
    }
}

/// Of the ENI itself; how it hangs on an instance is in `AttachmentState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EniStatus {
    Pending,
    Available,
    InUse,
}

impl fmt::Display for EniStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Available => "available",
            Self::InUse => "in-use",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentInfo {
    pub id: AttachmentId,
    pub instance: InstanceId,
    pub device: DeviceIndex,
    pub card: u32,
    pub state: AttachmentState,
    pub delete_on_termination: bool,
    /// When the attachment was asked for.
    pub attached_at: Time,
    /// When the guest's link appears, which is not when the API says `attached`.
    pub link_at: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AttachmentState {
    Attaching,
    Attached,
    Detaching,
}

impl fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityGroupInfo {
    pub id: SecurityGroupId,
    pub vpc: VpcId,
    pub name: String,
    pub rules: Vec<RuleInfo>,
    pub tags: Tags,
}

/// One rule of a security group: one protocol, one port range, one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleInfo {
    pub id: String,
    pub egress: bool,
    /// `-1` for all, or `tcp`, `udp`, `icmp`, a number.
    pub protocol: String,
    /// Ports, or type and code of ICMP; absent where the protocol is all.
    pub from: Option<i32>,
    pub to: Option<i32>,
    pub peer: RulePeer,
    pub description: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RulePeer {
    Ipv4(Ipv4Net),
    Ipv6(Ipv6Net),
    Group(SecurityGroupId),
    PrefixList(String),
}
