//! Machines for measuring the path: an account of its own, the lab's fabric, and bare nodes on it. No daemon and no pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use flatwire_core::ids::{DeviceIndex, InstanceId, MacAddress, RouteTable, SubnetId};
use flatwire_core::netplan::{EniPlan, NodePlan, PrimaryPlan};
use ipnet::{IpNet, Ipv4Net};
use lab_ec2::{ApiError, Delays, Ec2, EniInfo, Options, RunInstance, Tags, wall_clock};

use crate::error::{Error, Result};
use crate::fabric::{Fabric, Guest, VPC_MTU, plan};
use crate::ns::{Place, sysctl};

const VPC: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 16);
/// Enough slots for 47 prefixes, which is 752 pods, on two secondary ENIs.
const INSTANCE_TYPE: &str = "m5.4xlarge";
const SECONDARY_ENIS: u32 = 2;
const PREFIXES_PER_ENI: u32 = 29;
const PODS_PER_PREFIX: usize = 16;

/// One node: its namespace, its ENIs, and the addresses EC2 routes to it.
pub struct Machine {
    pub guest: Guest,
    pub primary: EniInfo,
    pub secondary: Vec<EniInfo>,
    /// Where the far ends of pods are that only fill the node up.
    pub crowd: Guest,
}

/// Stays while anybody measures: the fabric holds the routers.
pub struct Site {
    ec2: Ec2,
    subnet: SubnetId,
    fabric: Fabric,
    guests: BTreeMap<InstanceId, Guest>,
}

impl Site {
    pub async fn new() -> Result<Self> {
        let ec2 = Ec2::new(Options { delays: Delays::NONE, throttle: None, ..Options::default() });
        let now = wall_clock();
        let vpc = ec2.create_vpc(now, VPC, "bench").map_err(refused)?;
        // Nobody is kept out: what is measured is the way, not the guards.
        ec2.open_default_group(now, &vpc).map_err(refused)?;
        let subnet = ec2.create_subnet(now, &vpc, VPC, None, Tags::new()).map_err(refused)?;
        Ok(Self { ec2, subnet, fabric: Fabric::new().await?, guests: BTreeMap::new() })
    }

    /// Launches a node with addresses for so many pods on its secondary ENIs, and a /28 on its primary one.
    pub async fn launch(&mut self, pods: usize) -> Result<InstanceId> {
        let now = wall_clock();
        let run = RunInstance { ipv4_prefix_count: 1, ..RunInstance::new(INSTANCE_TYPE, self.subnet.clone()) };
        let id = self.ec2.run_instance(now, &run).map_err(refused)?;
        let mut left = u32::try_from(pods.div_ceil(PODS_PER_PREFIX)).unwrap_or(u32::MAX);
        for device in 1..=SECONDARY_ENIS {
            let eni = self.ec2.create_eni(now, &self.subnet, &[], "pods", Tags::new()).map_err(refused)?;
            self.ec2.attach_eni(now, &eni, &id, DeviceIndex(device), 0).map_err(refused)?;
            let here = left.min(PREFIXES_PER_ENI);
            if here > 0 {
                self.ec2.assign_prefixes(now, &eni, here).map_err(refused)?;
            }
            left -= here;
        }
        let place = Place::new()?;
        place.run(as_a_node)??;
        self.guests.insert(id.clone(), Guest::at(place).await?);
        Ok(id)
    }

    /// Lays the cables of everything launched so far.
    pub async fn connect(&mut self) -> Result<()> {
        let view = self.ec2.view(wall_clock());
        match self.fabric.follow(&plan(&view), &self.guests).await.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub async fn machine(&self, id: &InstanceId) -> Result<Machine> {
        let view = self.ec2.view(wall_clock());
        let mut enis = view.enis_of(id).into_iter().cloned();
        let missing = || Error::refused(format!("{id} has no links"));
        let crowd = Place::new()?;
        crowd.run(without_ipv6)??;
        Ok(Machine {
            guest: self.guests.get(id).cloned().ok_or_else(missing)?,
            primary: enis.next().ok_or_else(missing)?,
            secondary: enis.collect(),
            crowd: Guest::at(crowd).await?,
        })
    }
}

impl Machine {
    /// Every address for pods, each with the table of its ENI, in the order they are given out.
    pub fn pod_addresses(&self) -> Vec<(Ipv4Addr, RouteTable)> {
        let enis = self.secondary.iter().zip(2u32..);
        enis.flat_map(|(eni, table)| eni.prefixes.iter().map(move |prefix| (*prefix, RouteTable(table))))
            .flat_map(|(prefix, table)| each(prefix).map(move |address| (address, table)))
            .collect()
    }

    /// The prefix of the primary ENI, for pods behind a bridge.
    pub fn bridged(&self) -> Result<Ipv4Net> {
        self.primary.prefixes.first().copied().ok_or_else(|| Error::refused("the primary ENI has no prefix"))
    }

    /// What ipamd would have the kernel be with so many pods.
    pub fn plan(&self, pods: usize) -> NodePlan {
        let mut prefixes_left = pods.div_ceil(PODS_PER_PREFIX);
        let enis = (self.secondary.iter().zip(1u32..))
            .map(|(eni, number)| {
                let sources: BTreeSet<IpNet> =
                    eni.prefixes.iter().take(prefixes_left).map(|prefix| IpNet::V4(*prefix)).collect();
                prefixes_left -= sources.len();
                EniPlan {
                    id: eni.id.clone(),
                    mac: eni.mac,
                    address: eni.primary_ipv4,
                    subnet: VPC,
                    table: RouteTable(number + 1),
                    mark: number,
                    sources,
                }
            })
            .collect();
        let EniInfo { id, mac, primary_ipv4: address, .. } = &self.primary;
        let primary = PrimaryPlan { id: id.clone(), mac: *mac, address: *address };
        NodePlan { enis, vpc: vec![VPC.into()], mtu: VPC_MTU, ..NodePlan::new(primary) }
    }
}

/// Every address of a prefix.
fn each(prefix: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let base = u32::from(prefix.network());
    (0..16u32).map(move |offset| Ipv4Addr::from(base + offset))
}

/// A MAC that nobody else here has.
pub fn mac(kind: u8, number: u16) -> MacAddress {
    let [high, low] = number.to_be_bytes();
    MacAddress([0x02, 0xbe, kind, 0, high, low])
}

/// As the lab sets up a machine, without IPv6, whose chatter on hundreds of new links would be measured too.
fn as_a_node() -> Result<()> {
    without_ipv6()?;
    for (key, value) in
        [("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/rp_filter", "0"), ("net/ipv4/conf/default/rp_filter", "2")]
    {
        sysctl(key, value)?;
    }
    Ok(())
}

pub fn without_ipv6() -> Result<()> {
    match sysctl("net/ipv6/conf/default/disable_ipv6", "1") {
        // A kernel without IPv6 has none to switch off.
        Err(_) if !std::path::Path::new("/proc/sys/net/ipv6").exists() => Ok(()),
        other => other,
    }
}

fn refused(error: ApiError) -> Error {
    Error::Ec2 { action: "set-up".into(), code: error.code.clone(), message: error.message.clone() }
}
