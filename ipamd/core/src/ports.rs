//! The ports of the core: what it may wish from the world outside, and the facts that come back.
//!
//! `Cloud` is EC2 and IMDS, `Kernel` the node's links, routes, rules and nftables, `Ledger` the journal. Each has a real
//! body (`ipamd/cloud`, `ipamd/kernel`, `ipamd/store`), an in-memory one (`lab`), and can be wrapped by a decorator that
//! injects faults. Requests and replies are plain data, so a wish can be printed, counted, recorded and replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::ids::{AttachmentId, DeviceIndex, EniId, InstanceId, MacAddress, SecurityGroupId, SubnetId, VpcId};
use crate::netplan::{Look, NodePlan};

/// EC2 and IMDS.
pub trait Cloud: Send + Sync + 'static {
    /// Carries out one request. Bounded in time by the body: it answers with `Transient` rather than hanging.
    fn call(&self, request: CloudRequest) -> impl Future<Output = Result<CloudReply, CloudError>> + Send;
}

/// What the core can ask of EC2 and IMDS. Every variant is one action, named after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CloudRequest {
    /// IMDSv2: who this node is, and its ENIs as the metadata service shows them. Costs no EC2 call; may lag EC2.
    ReadMetadata,
    /// EC2 DescribeInstanceTypes for one type.
    DescribeInstanceType { instance_type: String },
    /// EC2 DescribeNetworkInterfaces, filter attachment.instance-id, all pages.
    DescribeNode { instance: InstanceId },
    /// EC2 DescribeNetworkInterfaces by id: the read-back after a mutation whose reply was lost.
    DescribeEni { eni: EniId },
    /// EC2 DescribeNetworkInterfaces, filters status=available, vpc-id, tag-key `node.k8s.amazonaws.com/instance_id` and
    /// one per tag given, all pages: ENIs an IPAM made that belong to no instance.
    DescribeUnattached { vpc: VpcId, tags: BTreeMap<String, String> },
    /// EC2 DescribeSubnets, filters vpc-id and availability-zone, all pages.
    DescribeSubnets { vpc: VpcId, availability_zone: String },
    /// EC2 CreateNetworkInterface, with its addresses and tags in the one call.
    CreateEni {
        subnet: SubnetId,
        security_groups: Vec<SecurityGroupId>,
        want: Want,
        /// With a /80 of its own.
        ipv6_prefix: bool,
        description: String,
        tags: BTreeMap<String, String>,
        /// Idempotency token: the same token gives the same ENI.
        client_token: String,
    },
    /// EC2 AttachNetworkInterface.
    AttachEni { eni: EniId, instance: InstanceId, device: DeviceIndex, card: u32 },
    /// EC2 ModifyNetworkInterfaceAttribute (Attachment.DeleteOnTermination = true).
    SetDeleteOnTermination { eni: EniId, attachment: AttachmentId },
    /// EC2 AssignPrivateIpAddresses. Has no client token: after a lost reply, read back and adopt.
    Assign { eni: EniId, want: Want },
    /// EC2 AssignIpv6Addresses for one /80, this very one where it is named. Has no client token either.
    AssignIpv6Prefix { eni: EniId, prefix: Option<Ipv6Net> },
    /// EC2 AssignPrivateIpAddresses with the addresses and prefixes named, never with AllowReassignment: gives an ENI back
    /// what it lost while a pod lived there.
    AssignNamed { eni: EniId, slots: BTreeSet<IpNet> },
    /// EC2 UnassignPrivateIpAddresses.
    Unassign { eni: EniId, slots: BTreeSet<IpNet> },
    /// EC2 DetachNetworkInterface, never with Force.
    DetachEni { eni: EniId, attachment: AttachmentId },
    /// EC2 DeleteNetworkInterface.
    DeleteEni { eni: EniId },
    /// EC2 ModifyNetworkInterfaceAttribute (Groups).
    SetSecurityGroups { eni: EniId, security_groups: Vec<SecurityGroupId> },
    /// EC2 CreateTags on one ENI.
    TagEni { eni: EniId, tags: BTreeMap<String, String> },
}

impl CloudRequest {
    /// The EC2 action (or `ImdsRead`), as it stands in IAM policies, metrics and messages.
    pub fn action(&self) -> &'static str {
        match self {
            Self::ReadMetadata => "ImdsRead",
            Self::DescribeInstanceType { .. } => "DescribeInstanceTypes",
            Self::DescribeNode { .. } | Self::DescribeEni { .. } | Self::DescribeUnattached { .. } => {
                "DescribeNetworkInterfaces"
            }
            Self::DescribeSubnets { .. } => "DescribeSubnets",
            Self::CreateEni { .. } => "CreateNetworkInterface",
            Self::AttachEni { .. } => "AttachNetworkInterface",
            Self::SetDeleteOnTermination { .. } | Self::SetSecurityGroups { .. } => "ModifyNetworkInterfaceAttribute",
            Self::Assign { .. } | Self::AssignNamed { .. } => "AssignPrivateIpAddresses",
            Self::AssignIpv6Prefix { .. } => "AssignIpv6Addresses",
            Self::Unassign { .. } => "UnassignPrivateIpAddresses",
            Self::DetachEni { .. } => "DetachNetworkInterface",
            Self::DeleteEni { .. } => "DeleteNetworkInterface",
            Self::TagEni { .. } => "CreateTags",
        }
    }
}

/// How much to take, in ENI slots: a slot holds one address or, with prefix delegation, one /28.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Want {
    Addresses(u32),
    Prefixes(u32),
}

impl Want {
    pub fn slots(self) -> u32 {
        match self {
            Self::Addresses(n) | Self::Prefixes(n) => n,
        }
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses(1) => f.write_str("1 address"),
            Self::Addresses(n) => write!(f, "{n} addresses"),
            Self::Prefixes(1) => f.write_str("1 prefix"),
            Self::Prefixes(n) => write!(f, "{n} prefixes"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CloudReply {
    /// To `ReadMetadata`.
    Metadata(Metadata),
    /// To `DescribeInstanceType`.
    InstanceType(InstanceLimits),
    /// To `DescribeNode`: every ENI attached (or attaching) to the instance. To `DescribeUnattached`: what was found.
    Enis(Vec<EniView>),
    /// To `DescribeEni`.
    Eni(EniView),
    /// To `DescribeSubnets`.
    Subnets(Vec<SubnetView>),
    /// To `CreateEni`: the new ENI with what it holds.
    Created(EniView),
    /// To `AttachEni`.
    Attached { attachment: AttachmentId },
    /// To `Assign`: only what is new, /32s or /28s. To `AssignIpv6Prefix`: the /80.
    Assigned(BTreeSet<IpNet>),
    /// To the requests that return nothing.
    Done,
}

/// The node as IMDSv2 shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    pub instance: InstanceId,
    pub instance_type: String,
    pub region: String,
    pub availability_zone: String,
    pub vpc: VpcId,
    /// MAC of the primary ENI.
    pub primary_mac: MacAddress,
    pub primary_ipv4: Ipv4Addr,
    /// All CIDRs of the VPC, of both families.
    pub vpc_cidrs: Vec<IpNet>,
    pub enis: Vec<EniView>,
    /// The instance is about to be taken away: a spot interruption or a scale-in has been announced.
    pub terminating: bool,
}

/// One ENI as EC2 or IMDS shows it. IMDS knows neither tags, description nor attachment id: those are `None` or empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniView {
    pub id: EniId,
    pub mac: MacAddress,
    pub device: DeviceIndex,
    pub card: u32,
    pub subnet: SubnetId,
    /// Known to IMDS; EC2 shows only the subnet's id, so `None` there.
    pub subnet_cidr: Option<Ipv4Net>,
    /// The ENI's own address, never given to a pod; 0.0.0.0 for an ENI without IPv4 (EFA-only, IPv6-only), which still
    /// takes a device index.
    pub primary_ipv4: Ipv4Addr,
    /// What each further slot holds: /32 secondary addresses, /28 prefixes, and IPv6 /80 prefixes.
    pub slots: BTreeSet<IpNet>,
    pub security_groups: Vec<SecurityGroupId>,
    pub attachment: Option<AttachmentId>,
    pub status: EniStatus,
    pub description: String,
    pub tags: BTreeMap<String, String>,
    pub kind: EniKind,
}

/// Where an ENI is on its way on to, or off, an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniStatus {
    Available,
    Attaching,
    Attached,
    Detaching,
}

/// Interface types that matter to an IPAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniKind {
    Interface,
    Trunk,
    /// Elastic Fabric Adapter, with or without an IP stack.
    Efa,
    Other,
}

/// What an instance type can carry (EC2 DescribeInstanceTypes, NetworkInfo).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLimits {
    pub instance_type: String,
    /// ENIs on the default network card, the primary included.
    pub max_enis: u32,
    /// IPv4 slots of an ENI, its own primary address included.
    pub ipv4_per_eni: u32,
    pub ipv6_per_eni: u32,
    /// Nitro or bare metal: only these take prefixes.
    pub prefixes: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetView {
    pub id: SubnetId,
    pub cidr: Ipv4Net,
    pub free_addresses: u32,
    pub tags: BTreeMap<String, String>,
}

/// A call that did not do what was asked, or may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("ec2 {action} failed: {code}: {message}")]
pub struct CloudError {
    pub kind: CloudErrorKind,
    pub action: String,
    /// EC2's error code, or `Timeout`, `Connection`, `Malformed`, `Credentials` where no code arrived.
    pub code: String,
    pub message: String,
    pub request_id: Option<String>,
}

/// What a failure means for the pool; the reaction hangs on this and on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum CloudErrorKind {
    /// The action's token bucket is empty.
    Throttled,
    /// The subnet has no free address left.
    SubnetEmpty,
    /// Free addresses, but no free aligned /28.
    Fragmented,
    /// The ENI holds as many addresses as its type permits.
    EniFull,
    /// The instance holds as many ENIs as its type permits.
    InstanceFull,
    /// The account's ENI quota in the region.
    AccountFull,
    /// The device index is taken.
    DeviceTaken,
    /// The object does not exist, or is not visible yet.
    NotFound,
    /// The object is in use or in transition.
    Busy,
    /// IAM denies the action.
    Denied,
    /// The request can never succeed as it stands.
    Invalid,
    /// No answer, a connection that broke, or an error on EC2's side: the call **may have happened**.
    Transient,
}

impl CloudErrorKind {
    /// From what EC2 answers. Unknown codes are `Transient`: they are retried within a budget, and shown.
    /// The codes and texts are listed in `docs/errors.md` with where they were seen.
    pub fn classify(action: &str, code: &str, message: &str) -> Self {
        let text = message.to_ascii_lowercase();
        match code {
            "RequestLimitExceeded" | "Throttling" | "ThrottlingException" | "SlowDown" | "EC2ThrottledException" => {
                Self::Throttled
            }
            "InsufficientFreeAddressesInSubnet" => Self::SubnetEmpty,
            "InsufficientCidrBlocks" => Self::Fragmented,
            "InvalidParameterValue" if text.contains("sufficient free ipv4") => Self::Fragmented,
            "InvalidParameterValue" if text.contains("already has an interface attached at device index") => {
                Self::DeviceTaken
            }
            "InvalidParameterValue" if text.contains("currently in use") => Self::Busy,
            "InvalidParameterValue"
                if action.starts_with("Unassign") && text.contains("are not assigned to interface") =>
            {
                Self::NotFound
            }
            "PrivateIpAddressLimitExceeded" | "InvalidInterface.IpAddressLimitExceeded" => Self::EniFull,
            "AttachmentLimitExceeded" => Self::InstanceFull,
            "NetworkInterfaceLimitExceeded" => Self::AccountFull,
            "InvalidNetworkInterface.InUse" | "IncorrectState" | "IncorrectInstanceState" => Self::Busy,
            _ if text.contains("is not 'running'") => Self::Busy,
            "UnauthorizedOperation"
            | "AccessDenied"
            | "AccessDeniedException"
            | "AuthFailure"
            | "Blocked"
            | "InvalidClientTokenId"
            | "SignatureDoesNotMatch"
            | "OptInRequired" => Self::Denied,
            "RequestExpired" | "ExpiredToken" => Self::Transient,
            _ if code.ends_with(".NotFound") => Self::NotFound,
            _ if code.ends_with(".Malformed") => Self::Invalid,
            "InvalidParameterValue"
            | "InvalidParameterCombination"
            | "InvalidParameter"
            | "InvalidInstanceType"
            | "MissingParameter"
            | "UnknownParameter"
            | "ValidationError"
            | "InvalidAction"
            | "OperationNotPermitted"
            | "UnsupportedOperation"
            | "IdempotentParameterMismatch"
            | "FilterLimitExceeded"
            | "TagLimitExceeded"
            | "DryRunOperation"
            | "Unsupported" => Self::Invalid,
            _ => Self::Transient,
        }
    }

    /// True where the call may have taken effect although it failed: read back before doing it again.
    pub fn outcome_unknown(self) -> bool {
        matches!(self, Self::Transient)
    }
}

/// The node's kernel, as far as the whole node is concerned; pods are wired by the plugin.
pub trait Kernel: Send + Sync + 'static {
    type Error: std::error::Error + Send + Sync + 'static;

    /// Makes links, addresses, tables, rules, sysctls and nftables what the plan says, and reports what it changed. An ENI of
    /// the plan whose link has not appeared yet is named in the report; the others are programmed all the same.
    fn apply(&self, plan: &NodePlan, look: &Look) -> impl Future<Output = Result<KernelReport, Self::Error>> + Send;

    /// Returns when something may have changed in the kernel that the plan speaks of, by whomever: a reason to look, and
    /// no more. A body that cannot tell never returns.
    fn changed(&self) -> impl Future<Output = Result<(), Self::Error>> + Send {
        std::future::pending()
    }

    /// The pods of this node as the kernel shows them.
    fn pods(&self) -> impl Future<Output = Result<PodsSeen, Self::Error>> + Send;
}

/// What the kernel shows of pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodsSeen {
    /// Addresses with a /32 route to a veth in the main table. The kernel's veto: an address in this set is in use,
    /// whatever anybody else says.
    pub routes: BTreeSet<IpAddr>,
    /// Names of the veths that are up. A pod's dies with its network namespace.
    pub links: BTreeSet<String>,
    /// The others, with their MACs: somebody took them down, or they wait for an address and are not their pod's yet.
    #[serde(default)]
    pub down: BTreeMap<String, MacAddress>,
}

impl PodsSeen {
    /// Whether a link of this name can be that of the sandbox whose MAC this is. One that is down tells by its MAC whose it
    /// is: a pod's next sandbox waits for its address under the same name.
    pub fn has_link(&self, name: &str, mac: MacAddress) -> bool {
        self.links.contains(name) || self.down.get(name) == Some(&mac)
    }
}

/// What `Kernel::apply` found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelReport {
    /// ENIs whose link is there and whose table and rules stand.
    pub programmed: BTreeSet<EniId>,
    /// ENIs whose link has not appeared.
    pub missing_links: BTreeSet<EniId>,
    /// What was not as planned and was put right.
    pub repaired: Vec<Repair>,
    /// What this kernel cannot do, a sentence each; said once.
    pub lacking: Vec<String>,
}

/// Something in the kernel that was not as planned and was put right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    pub kind: RepairKind,
    /// What it is: the same text each time, so that repeated repairs of one thing are known as such.
    pub object: String,
    /// One sentence.
    pub text: String,
    /// It was as planned at the last look, so somebody has changed it since. Otherwise the plan is what is new.
    pub undone: bool,
}

/// Kinds of things in the kernel; also metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepairKind {
    Link,
    Address,
    /// Of an ENI's table.
    Route,
    Rule,
    Nftables,
    Sysctl,
    /// The host route of a pod.
    PodRoute,
    /// The node's own way out by the primary ENI, which its DHCP client made.
    NodeRoute,
}

impl RepairKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Address => "address",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Nftables => "nftables",
            Self::Sysctl => "sysctl",
            Self::PodRoute => "pod_route",
            Self::NodeRoute => "node_route",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::CloudErrorKind as K;

    #[test]
    fn every_known_ec2_error_has_its_class() {
        let table = [
            ("AssignPrivateIpAddresses", "RequestLimitExceeded", "Request limit exceeded.", K::Throttled),
            ("AssignPrivateIpAddresses", "PrivateIpAddressLimitExceeded", "Number of private addresses…", K::EniFull),
            ("CreateNetworkInterface", "InsufficientFreeAddressesInSubnet", "The specified subnet…", K::SubnetEmpty),
            ("CreateNetworkInterface", "InsufficientCidrBlocks", "…enough free cidr blocks…", K::Fragmented),
            (
                "CreateNetworkInterface",
                "InvalidParameterValue",
                "There aren't sufficient free Ipv4 addresses or prefixes",
                K::Fragmented,
            ),
            ("AttachNetworkInterface", "AttachmentLimitExceeded", "Interface count 9 exceeds…", K::InstanceFull),
            (
                "AttachNetworkInterface",
                "InvalidParameterValue",
                "Instance 'i-1' already has an interface attached at device index '1'.",
                K::DeviceTaken,
            ),
            ("DeleteNetworkInterface", "InvalidParameterValue", "…'eni-1' is currently in use.", K::Busy),
            ("DeleteNetworkInterface", "InvalidNetworkInterfaceID.NotFound", "", K::NotFound),
            ("AttachNetworkInterface", "IncorrectState", "Instance 'i-1' is not 'running'.", K::Busy),
            ("AttachNetworkInterface", "InvalidParameterValue", "Instance 'i-1' is not 'running'.", K::Busy),
            ("DescribeInstanceTypes", "InvalidInstanceType", "", K::Invalid),
            ("DescribeNetworkInterfaces", "OperationNotPermitted", "", K::Invalid),
            ("DescribeNetworkInterfaces", "InvalidPaginationToken", "", K::Transient),
            ("CreateNetworkInterface", "InvalidSubnetID.Malformed", "", K::Invalid),
            ("UnassignPrivateIpAddresses", "UnauthorizedOperation", "", K::Denied),
            ("UnassignPrivateIpAddresses", "ExpiredToken", "", K::Transient),
            ("UnassignPrivateIpAddresses", "SomethingNew", "", K::Transient),
        ];
        for (action, code, message, kind) in table {
            assert_eq!(K::classify(action, code, message), kind, "{code}");
        }
    }
}
