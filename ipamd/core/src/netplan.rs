//! The data path of the node as data: what links, addresses, tables, rules and nftables sets should be. Core computes it,
//! `ipamd/kernel` makes it so; neither does the other's work.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::ids::{EniId, MacAddress, RouteTable};

/// Rule priorities, shared with the add-on so that both layouts can stand side by side during a take-over.
pub mod priority {
    /// `lookup main suppress_prefixlength 31 suppress_ifgroup default`: finds every pod's /32 with one rule. The host ends
    /// of pods are in a link group of their own, because main holds /32 routes that are not pods' too: DHCP clients add
    /// one per DNS server, by the primary ENI, and a pod of another ENI must not take it.
    pub const TO_PODS: u32 = 512;
    /// `fwmark 0x80/0x80 lookup main`: what leaves by the primary ENI because it is, or was, translated there.
    pub const TO_PRIMARY: u32 = 1024;
    /// `fwmark <eni>/0x7f lookup <table>`: source routing, one rule per secondary ENI.
    pub const FROM_PODS: u32 = 1536;
    /// `from <eni address> lookup <table>`: the ENI's own address.
    pub const FROM_ENI: u32 = 32_765;
}

/// The mark that steers a packet to the primary ENI; also kept in the connection's mark. The add-on's value.
pub const PRIMARY_MARK: u32 = 0x80;

/// The bits that name a secondary ENI. Clear of kube-proxy (0x4000, 0x8000), Calico (0xffff0000) and the add-on (0x80).
pub const ENI_MARK_MASK: u32 = 0x7f;

/// Everything ipamd keeps in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    pub primary: PrimaryPlan,
    /// Secondary ENIs, by device number.
    pub enis: Vec<EniPlan>,
    /// Host ends of pods' veths start with this (4 characters at most).
    pub veth_prefix: String,
    /// What leaves a pod for these is never translated: the VPC's CIDRs and the exclusions.
    pub no_snat: Vec<Ipv4Net>,
    pub snat: Snat,
    /// Keep replies of connections that entered by the primary ENI to a node address on the primary ENI.
    pub node_port: bool,
    /// MTU of every ENI, the primary included, in bytes.
    pub mtu: u32,
    /// What else is to be known at this look. Looks differ in it without the plan being another one.
    pub look: Look,
}

/// What changes from look to look.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Pods of the ledger: where a pod's link stands without its host route, the route is put back.
    pub pods: Vec<PodPlan>,
    /// Addresses that pods have left since the last look: what the kernel remembers of their connections is forgotten,
    /// so that the next pod does not inherit it.
    pub left: BTreeSet<IpAddr>,
    /// Objects that somebody else keeps changing back, as `Repair` names them: not touched this time.
    pub let_be: BTreeSet<String>,
}

/// A pod as far as its host route is concerned.
///
/// The ledger alone must not make a route: on ADD it is ahead of the kernel (the pod has no link yet, or one of the same
/// name is its predecessor's), on DEL it is behind (route and link are gone, the release is on its way). So a route is put
/// back only by a link that is there, up, leads into another namespace, and is this very sandbox's, which its MAC proves.
/// The route then cannot outlive the sandbox either: it goes with the link, whoever takes that away, and whenever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPlan {
    pub address: IpAddr,
    /// Name of the host link.
    pub link: String,
    /// The host link's MAC, where our plugin made it.
    pub mac: MacAddress,
    /// The link's name is proof enough: no other sandbox has it, and this one is long past its ADD. Pods that the add-on
    /// wired have no MAC of ours.
    pub settled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimaryPlan {
    pub id: EniId,
    pub mac: MacAddress,
    pub address: Ipv4Addr,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniPlan {
    pub id: EniId,
    pub mac: MacAddress,
    pub address: Ipv4Addr,
    pub subnet: Ipv4Net,
    pub table: RouteTable,
    /// Value under `ENI_MARK_MASK`.
    pub mark: u32,
    /// Addresses and prefixes whose packets must leave by this ENI.
    pub sources: BTreeSet<IpNet>,
}

impl EniPlan {
    /// The VPC router's address on the ENI's subnet: base + 1.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()).wrapping_add(1))
    }
}

/// Source translation of what leaves the VPC (AWS_VPC_K8S_CNI_EXTERNALSNAT, AWS_VPC_K8S_CNI_RANDOMIZESNAT).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Snat {
    /// Somebody else translates (a NAT gateway); nothing is marked or translated here.
    External,
    /// To the primary ENI's address.
    ToPrimary(PortChoice),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortChoice {
    /// `prng`: fully random.
    FullyRandom,
    /// `hashrandom`.
    Random,
    /// `none`: keep the source port where it is free.
    Keep,
}
