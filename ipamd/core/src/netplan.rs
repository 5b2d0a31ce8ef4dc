//! The data path of the node as data: what links, addresses, tables, rules and nftables sets should be. Core computes it,
//! `ipamd/kernel` makes it so; neither does the other's work.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::families::Families;
use crate::ids::{EniId, MacAddress, RouteTable};
use crate::settings::Settings;

/// Rule priorities, shared with the add-on so that both layouts can stand side by side during a take-over.
pub mod priority {
    /// `lookup main suppress_prefixlength 31 suppress_ifgroup default`: finds every pod's /32 with one rule. The host ends
    /// of pods are in a link group of their own, because main holds /32 routes that are not pods' too: DHCP clients add
    /// one per DNS server, by the primary ENI, and a pod of another ENI must not take it.
    pub const TO_PODS: u32 = 512;
    /// `fwmark 0x80/0x80 lookup main`: what leaves by the primary ENI because it is, or was, translated there.
    pub const TO_PRIMARY: u32 = 1024;
    /// `to <cidr> lookup main`: destinations that only main knows the way to (AWS_EXTERNAL_SERVICE_CIDRS).
    pub const TO_EXTERNAL: u32 = 1535;
    /// `fwmark <eni>/0x7f lookup <table>`: source routing, one rule per secondary ENI.
    pub const FROM_PODS: u32 = 1536;
    /// `from <eni's IPv6 /80> lookup <table>`: source routing of IPv6, which needs no marks, because an ENI has one prefix.
    pub const FROM_IPV6: u32 = 1537;
    /// `from <eni address> lookup <table>`: the ENI's own address.
    pub const FROM_ENI: u32 = 32_765;
}

/// The bits of packets' and connections' marks that are ours.
///
/// What is others' is never touched: 0x4000 and 0x8000 are kube-proxy's, 0x2000 is the portmap plugin's, 0xffff0000
/// Calico's, 0x0f00 Cilium's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// Steers a packet to the primary ENI; also kept in the connection's mark (AWS_VPC_K8S_CNI_CONNMARK).
    pub primary: u32,
    /// The bits that name a secondary ENI.
    pub eni_mask: u32,
}

impl Marks {
    /// Bits that no kube-proxy and no usual policy engine uses.
    pub const FREE: u32 = 0x10ff;
    /// As many as name every ENI of the largest machine.
    const ENI_BITS: u32 = 7;
    /// As few as name every ENI of a network card.
    const LEAST_ENI_BITS: u32 = 5;

    /// With this mark for the primary ENI; `None` if it takes others' bits or leaves too few for the ENIs.
    pub fn new(primary: u32) -> Option<Self> {
        let mut eni_mask = 0u32;
        for bit in (0..u32::BITS).map(|shift| 1 << shift).filter(|bit| Self::FREE & !primary & bit != 0) {
            if eni_mask.count_ones() < Self::ENI_BITS {
                eni_mask |= bit;
            }
        }
        let good = primary != 0 && primary & !Self::FREE == 0 && eni_mask.count_ones() >= Self::LEAST_ENI_BITS;
        good.then_some(Self { primary, eni_mask })
    }

    /// All bits of ours.
    pub fn mask(self) -> u32 {
        self.primary | self.eni_mask
    }

    /// The mark of a secondary ENI: its number, its bits spread over those of the mask.
    pub fn of_eni(self, number: u32) -> u32 {
        let places = (0..u32::BITS).map(|shift| 1u32 << shift).filter(|bit| self.eni_mask & bit != 0);
        places.enumerate().filter(|(position, _)| number >> position & 1 == 1).fold(0, |mark, (_, bit)| mark | bit)
    }
}

/// The add-on's mark, 0x80, and the seven bits below it.
impl Default for Marks {
    fn default() -> Self {
        Self { primary: 0x80, eni_mask: 0x7f }
    }
}

/// The largest packets, in bytes, that ways out of the VPC are taken to carry. TCP between pods and the far side is
/// held to them, so that nothing hangs where the ICMP messages that would say so are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathMtus {
    /// To the internet, and wherever else nothing better is known.
    pub outside: u32,
    /// To private networks that are excluded from translation: peered VPCs, also of other regions, and transit gateways.
    pub peered: u32,
}

impl Default for PathMtus {
    fn default() -> Self {
        Self { outside: 1500, peered: 8500 }
    }
}

/// Everything ipamd keeps in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    pub primary: PrimaryPlan,
    /// Secondary ENIs, by device number.
    pub enis: Vec<EniPlan>,
    /// Host ends of pods' veths start with this (4 characters at most).
    pub veth_prefix: String,
    /// The VPC's CIDRs, of both families. What leaves a pod for these is never translated.
    pub vpc: Vec<IpNet>,
    /// Nor what leaves for these.
    pub exclude_snat: Vec<Ipv4Net>,
    /// Destinations that are looked up in main whatever the pod's ENI.
    pub external_services: Vec<Ipv4Net>,
    pub marks: Marks,
    pub families: Families,
    pub path_mtus: PathMtus,
    /// Keep pods away from the instance metadata.
    pub block_imds: bool,
    pub snat: Snat,
    /// Keep replies of connections that entered by an ENI to an address of the node on that ENI.
    pub node_port: bool,
    /// MTU of every ENI, the primary included, in bytes.
    pub mtu: u32,
}

impl NodePlan {
    /// A node with nothing but its primary ENI, everything else as where nothing is set.
    pub fn new(primary: PrimaryPlan) -> Self {
        Self {
            primary,
            enis: Vec::new(),
            veth_prefix: "eni".to_owned(),
            vpc: Vec::new(),
            exclude_snat: Vec::new(),
            external_services: Vec::new(),
            marks: Marks::default(),
            families: Families::V4,
            path_mtus: PathMtus::default(),
            block_imds: false,
            snat: Snat::ToPrimary(PortChoice::FullyRandom),
            node_port: true,
            mtu: 9001,
        }
    }

    pub fn with_settings(self, settings: &Settings) -> Self {
        Self {
            veth_prefix: settings.veth_prefix.clone(),
            exclude_snat: settings.exclude_snat.clone(),
            external_services: settings.external_services.clone(),
            marks: settings.marks,
            families: settings.families,
            path_mtus: settings.path_mtus,
            block_imds: settings.block_imds,
            snat: match (settings.families, settings.snat) {
                // Nobody else can translate what only this node knows.
                (Families::V6 { egress: true }, Snat::External) => Snat::ToPrimary(PortChoice::FullyRandom),
                (_, snat) => snat,
            },
            node_port: settings.node_port,
            mtu: settings.mtu,
            ..self
        }
    }
}

/// What is to be known at one look at the kernel, beside the plan.
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
/// The ledger alone must not make a route: on ADD it is ahead of the kernel (the pod's link is not up yet, or one of the
/// same name is its predecessor's), on DEL it is behind (route and link are gone, the release is on its way). So a route is put
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
    /// Value under `Marks::eni_mask`.
    pub mark: u32,
    /// Addresses and prefixes whose packets must leave by this ENI.
    pub sources: BTreeSet<IpNet>,
}

/// The VPC router on every link, link-local as IPv6 has it.
pub const IPV6_ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);

impl EniPlan {
    /// Its IPv6 prefix, and what pods still have of one that is lost.
    pub fn ipv6_sources(&self) -> impl Iterator<Item = IpNet> {
        self.sources.iter().filter(|source| matches!(source, IpNet::V6(_))).copied()
    }

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Marks;

    #[test]
    fn the_bits_of_enis_stay_clear_of_everybody_elses() {
        let kube_proxy = 0x4000 | 0x8000;
        let (portmap, calico, cilium) = (0x2000, 0xffff_0000, 0x0f00);
        assert_eq!(Marks::new(0x80), Some(Marks::default()));
        for primary in [0x80, 0x1, 0x10, 0x1000, 0x81, 0x7] {
            let marks = Marks::new(primary).unwrap();
            assert_eq!(marks.primary, primary);
            assert_eq!(marks.eni_mask & (primary | kube_proxy | portmap | calico | cilium), 0, "{primary:#x}");
            let named: BTreeSet<u32> = (1..=16).map(|number| marks.of_eni(number)).collect();
            assert_eq!(named.len(), 16, "{primary:#x}: {named:x?}");
            assert!(named.iter().all(|mark| *mark != 0 && mark & !marks.eni_mask == 0), "{primary:#x}: {named:x?}");
        }
        for refused in [0, 0x2000, 0x4000, 0x8000, 0x100, 0x1_0000, 0x8000_0080, 0xff, 0x3f] {
            assert_eq!(Marks::new(refused), None, "{refused:#x}");
        }
    }
}
