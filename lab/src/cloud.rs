//! The lab's account: one VPC in two zones with a way to the internet, a second VPC peered with it, and their machines.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use flatwire_core::ids::{InstanceId, SubnetId, Time, VpcId};
use ipnet::{Ipv4Net, Ipv6Net};
use lab_ec2::{ApiError, Ec2, Options, RunInstance, View, wall_clock};

use crate::api::Credentials;
use crate::ctl::{NodeSpec, Spec};
use crate::error::{Error, Result};

const VPC: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 16);
/// Nodes take turns; small enough to read, large enough for several hundred pods in prefixes.
const SUBNETS: [(Ipv4Net, &str); 2] = [
    (Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 20), "a"),
    (Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 16, 0), 20), "b"),
];
pub const PEER_VPC: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 99, 0, 0), 16);
const PEER_SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 99, 0, 0), 24);
const PEER_TYPE: &str = "t3.micro";

pub struct Cloud {
    ec2: Arc<Ec2>,
    pub vpc: VpcId,
    pub peer_vpc: VpcId,
    pub credentials: Credentials,
    /// Addresses of IPv6 that a machine is launched with.
    ipv6_addresses: u32,
    subnets: Vec<SubnetId>,
    peer_subnet: SubnetId,
}

impl Cloud {
    pub fn build(spec: &Spec) -> Result<Self> {
        let ec2 = Ec2::new(Options {
            region: spec.region.clone(),
            seed: spec.seed,
            delays: spec.delays,
            ..Options::default()
        });
        let now = wall_clock();
        let vpc = ec2.create_vpc(now, VPC, "lab").map_err(refused)?;
        ec2.create_internet_gateway(now, &vpc).map_err(refused)?;
        let mut blocks = blocks(&ec2, spec, &vpc)?;
        let mut subnets = Vec::new();
        for (cidr, zone) in SUBNETS {
            let zone = format!("{}{zone}", spec.region);
            let tags = BTreeMap::from([("Name".to_owned(), format!("lab-{zone}"))]);
            let subnet = ec2.create_subnet(now, &vpc, cidr, Some(&zone), tags).map_err(refused)?;
            if let Some(block) = blocks.next() {
                ec2.give_subnet_ipv6(now, &subnet, block).map_err(refused)?;
            }
            subnets.push(subnet);
        }
        let peer_vpc = ec2.create_vpc(now, PEER_VPC, "peer").map_err(refused)?;
        let tags = BTreeMap::from([("Name".to_owned(), "peer".to_owned())]);
        let peer_subnet = ec2.create_subnet(now, &peer_vpc, PEER_SUBNET, None, tags).map_err(refused)?;
        if let Some(block) = self::blocks(&ec2, spec, &peer_vpc)?.next() {
            ec2.give_subnet_ipv6(now, &peer_subnet, block).map_err(refused)?;
        }
        ec2.peer_vpcs(now, &vpc, &peer_vpc).map_err(refused)?;
        // Who wants groups that keep somebody out makes them.
        for vpc in [&vpc, &peer_vpc] {
            ec2.open_default_group(now, vpc).map_err(refused)?;
        }
        let admin = ec2.admin();
        let credentials = Credentials { access_key_id: admin.access_key, secret_access_key: admin.secret };
        let ipv6_addresses = u32::from(spec.ipv6);
        Ok(Self { ec2: Arc::new(ec2), vpc, peer_vpc, credentials, ipv6_addresses, subnets, peer_subnet })
    }

    /// A node with a public address, in the zone whose turn it is.
    pub fn launch_node(&self, name: &str, spec: &NodeSpec, turn: usize) -> Result<InstanceId> {
        if spec.ipv6_prefixes > 0 && self.ipv6_addresses == 0 {
            return Err(Error::refused(format!(
                "{name} is to have /80s, and this lab has no IPv6; start it with --ipv6"
            )));
        }
        let subnet = self.subnets.get(turn % self.subnets.len()).expect("invariant: a remainder is in range");
        let run = RunInstance {
            name: name.to_owned(),
            ipv4_prefix_count: spec.prefixes,
            ipv6_address_count: self.ipv6_addresses,
            ipv6_prefix_count: spec.ipv6_prefixes,
            public_ip: true,
            ..RunInstance::new(spec.instance_type.as_str(), subnet.clone())
        };
        self.ec2.run_instance(self.now(), &run).map_err(refused)
    }

    pub fn launch_peer(&self, name: &str) -> Result<InstanceId> {
        let run = RunInstance {
            name: name.to_owned(),
            ipv6_address_count: self.ipv6_addresses,
            ..RunInstance::new(PEER_TYPE, self.peer_subnet.clone())
        };
        self.ec2.run_instance(self.now(), &run).map_err(refused)
    }

    pub fn terminate(&self, instance: &InstanceId) -> Result<()> {
        self.ec2.terminate_instance(self.now(), instance).map_err(refused)
    }

    /// The live lab runs on this machine's clock: signatures carry it, and so do ledgers.
    pub fn now(&self) -> Time {
        wall_clock()
    }

    pub fn advance(&self) {
        self.ec2.advance(self.now());
    }

    pub fn view(&self) -> View {
        self.ec2.view(self.now())
    }

    pub fn version(&self) -> u64 {
        self.ec2.version()
    }

    pub fn next_transition(&self) -> Option<Time> {
        self.ec2.next_transition()
    }

    pub fn on_change(&self, hook: impl Fn() + Send + Sync + 'static) {
        self.ec2.on_change(Box::new(hook));
    }

    /// Calls by action, those refused included.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        self.ec2.calls().into_iter().map(|(action, count)| (action, count.ok + count.errors)).collect()
    }

    pub fn api(&self) -> axum::Router {
        lab_ec2::router(Arc::clone(&self.ec2), wall_clock)
    }

    pub fn imds(&self, identify: impl Fn(SocketAddr) -> Option<InstanceId> + Send + Sync + 'static) -> axum::Router {
        lab_ec2::imds_router(Arc::clone(&self.ec2), wall_clock, Arc::new(identify))
    }
}

/// Gives the VPC its IPv6 block if the lab is to have IPv6; the /64s of it, in order.
fn blocks(ec2: &Ec2, spec: &Spec, vpc: &VpcId) -> Result<impl Iterator<Item = Ipv6Net> + use<>> {
    let block = spec.ipv6.then(|| ec2.give_vpc_ipv6(wall_clock(), vpc)).transpose().map_err(refused)?;
    Ok(block.into_iter().flat_map(|block| block.subnets(64)).flatten())
}

fn refused(error: ApiError) -> Error {
    Error::Ec2 { action: "set-up".into(), code: error.code.clone(), message: error.message.clone() }
}
