//! VPCs, subnets, CIDR reservations, internet gateways and peerings.

use std::collections::BTreeMap;

use flatwire_core::ids::{SecurityGroupId, SubnetId, VpcId};
use ipnet::{Ipv4Net, Ipv6Net};

use super::State;
use super::pool::{AddressPool, ReservationKind};
use crate::error::{ApiError, Kind};
use crate::view::{SubnetInfo, Tags};

/// IPv4 CIDR blocks a VPC may have.
const CIDRS_MAX: usize = 5;
/// Subnets a VPC may have.
const SUBNETS_MAX: usize = 200;

#[derive(Debug, Clone)]
pub(crate) struct Vpc {
    pub(crate) id: VpcId,
    /// The first is the VPC's own, the others were associated later.
    pub(crate) cidrs: Vec<CidrAssociation>,
    pub(crate) ipv6: Option<Ipv6Net>,
    pub(crate) default_group: SecurityGroupId,
    pub(crate) dhcp_options: String,
    pub(crate) tags: Tags,
}

#[derive(Debug, Clone)]
pub(crate) struct CidrAssociation {
    pub(crate) id: String,
    pub(crate) cidr: Ipv4Net,
}

#[derive(Debug, Clone)]
pub(crate) struct Subnet {
    pub(crate) id: SubnetId,
    pub(crate) vpc: VpcId,
    pub(crate) cidr: Ipv4Net,
    pub(crate) ipv6: Option<Ipv6Net>,
    pub(crate) zone: Zone,
    pub(crate) pool: AddressPool,
    pub(crate) reservations: BTreeMap<String, Reservation>,
    pub(crate) public_on_launch: bool,
    pub(crate) tags: Tags,
}

impl Subnet {
    pub(crate) fn info(&self) -> SubnetInfo {
        SubnetInfo {
            id: self.id.clone(),
            vpc: self.vpc.clone(),
            cidr: self.cidr,
            ipv6: self.ipv6,
            availability_zone: self.zone.name.clone(),
            availability_zone_id: self.zone.id.clone(),
            free_addresses: self.pool.available(),
            tags: self.tags.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) id: String,
    pub(crate) cidr: Ipv4Net,
    pub(crate) kind: ReservationKind,
    pub(crate) description: String,
    pub(crate) tags: Tags,
}

#[derive(Debug, Clone)]
pub(crate) struct Gateway {
    pub(crate) id: String,
    pub(crate) vpc: Option<VpcId>,
    pub(crate) tags: Tags,
}

#[derive(Debug, Clone)]
pub(crate) struct Peering {
    pub(crate) id: String,
    pub(crate) requester: VpcId,
    pub(crate) accepter: VpcId,
    pub(crate) status: PeeringStatus,
    pub(crate) tags: Tags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeeringStatus {
    PendingAcceptance,
    Active,
    Deleted,
}

impl PeeringStatus {
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::PendingAcceptance => "pending-acceptance",
            Self::Active => "active",
            Self::Deleted => "deleted",
        }
    }
}

/// An availability zone: `us-east-1a`, `use1-az1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Zone {
    pub(crate) name: String,
    pub(crate) id: String,
}

/// The zones of a region. The short form of a region in zone ids is its words' initials and its number.
pub(crate) fn zones(region: &str) -> Vec<Zone> {
    let short: String = region
        .split('-')
        .enumerate()
        .map(|(n, word)| match word {
            "northeast" => "ne",
            "northwest" => "nw",
            "southeast" => "se",
            "southwest" => "sw",
            _ if n == 0 => word,
            _ => word.get(..1).unwrap_or(""),
        })
        .collect();
    let zone =
        |(letter, number): (char, u32)| Zone { name: format!("{region}{letter}"), id: format!("{short}-az{number}") };
    [('a', 1), ('b', 2), ('c', 3), ('d', 4)].into_iter().map(zone).collect()
}

impl State {
    pub(crate) fn vpc(&self, id: &VpcId) -> Result<&Vpc, ApiError> {
        self.vpcs.get(id).ok_or_else(|| Kind::Vpc.not_found(id))
    }

    pub(crate) fn subnet(&self, id: &SubnetId) -> Result<&Subnet, ApiError> {
        self.subnets.get(id).ok_or_else(|| Kind::Subnet.not_found(id))
    }

    pub(crate) fn create_vpc(&mut self, cidr: Ipv4Net, tags: Tags) -> Result<VpcId, ApiError> {
        let cidr = block_of("InvalidVpc.Range", cidr)?;
        let id = VpcId::new(self.fresh_id(Kind::Vpc)).expect("invariant: fresh ids are well formed");
        let default_group = self.default_group(&id);
        let first = CidrAssociation { id: format!("vpc-cidr-assoc-{}", self.rng.hex17()), cidr };
        let dhcp_options = format!("dopt-{}", self.rng.hex17());
        self.vpcs.insert(
            id.clone(),
            Vpc { id: id.clone(), cidrs: vec![first], ipv6: None, default_group, dhcp_options, tags },
        );
        self.changed();
        Ok(id)
    }

    pub(crate) fn associate_cidr(&mut self, vpc: &VpcId, cidr: Ipv4Net) -> Result<CidrAssociation, ApiError> {
        let cidr = block_of("InvalidVpc.Range", cidr)?;
        let known = self.vpc(vpc)?;
        if known.cidrs.len() >= CIDRS_MAX {
            return Err(ApiError::new(
                "CidrLimitExceeded",
                format!("This network '{vpc}' has met its maximum number of allowed CIDRs: {CIDRS_MAX}"),
            ));
        }
        if known.cidrs.iter().any(|other| overlap(other.cidr, cidr)) {
            return Err(ApiError::new(
                "InvalidVpc.Range",
                format!("The CIDR '{cidr}' conflicts with another CIDR of the VPC."),
            ));
        }
        let association = CidrAssociation { id: format!("vpc-cidr-assoc-{}", self.rng.hex17()), cidr };
        if let Some(vpc) = self.vpcs.get_mut(vpc) {
            vpc.cidrs.push(association.clone());
        }
        self.changed();
        Ok(association)
    }

    pub(crate) fn delete_vpc(&mut self, id: &VpcId) -> Result<(), ApiError> {
        let default_group = self.vpc(id)?.default_group.clone();
        let busy = self.subnets.values().any(|subnet| subnet.vpc == *id)
            || self.gateways.values().any(|gateway| gateway.vpc.as_ref() == Some(id))
            || self.groups.values().any(|group| group.vpc == *id && group.id != default_group);
        if busy {
            return Err(ApiError::dependency("vpc", id));
        }
        self.groups.remove(&default_group);
        for peering in self.peerings.values_mut().filter(|p| p.requester == *id || p.accepter == *id) {
            peering.status = PeeringStatus::Deleted;
        }
        self.vpcs.remove(id);
        self.changed();
        Ok(())
    }

    pub(crate) fn create_subnet(
        &mut self,
        vpc: &VpcId,
        cidr: Ipv4Net,
        zone: Option<&str>,
        tags: Tags,
    ) -> Result<SubnetId, ApiError> {
        let cidr = block_of("InvalidSubnet.Range", cidr)?;
        let known = self.vpc(vpc)?;
        if !known.cidrs.iter().any(|association| association.cidr.contains(&cidr)) {
            return Err(ApiError::new("InvalidSubnet.Range", format!("The CIDR '{cidr}' is invalid.")));
        }
        let siblings = || self.subnets.values().filter(|subnet| subnet.vpc == *vpc);
        if siblings().any(|subnet| overlap(subnet.cidr, cidr)) {
            return Err(ApiError::new(
                "InvalidSubnet.Conflict",
                format!("The CIDR '{cidr}' conflicts with another subnet"),
            ));
        }
        if siblings().count() >= SUBNETS_MAX {
            return Err(ApiError::new("SubnetLimitExceeded", "The maximum number of subnets has been reached."));
        }
        let mut zones = zones(&self.options.region);
        let zone = match zone {
            None => zones.swap_remove(0),
            Some(wanted) => {
                zones.into_iter().find(|zone| zone.name == wanted || zone.id == wanted).ok_or_else(|| {
                    ApiError::value(format!(
                        "Value ({wanted}) for parameter availabilityZone is invalid. Subnets can currently only be \
                         created in the following availability zones of {}.",
                        self.options.region
                    ))
                })?
            }
        };
        let id = SubnetId::new(self.fresh_id(Kind::Subnet)).expect("invariant: fresh ids are well formed");
        let subnet = Subnet {
            id: id.clone(),
            vpc: vpc.clone(),
            cidr,
            ipv6: None,
            zone,
            pool: AddressPool::new(cidr),
            reservations: BTreeMap::new(),
            public_on_launch: false,
            tags,
        };
        self.subnets.insert(id.clone(), subnet);
        self.changed();
        Ok(id)
    }

    pub(crate) fn delete_subnet(&mut self, id: &SubnetId) -> Result<(), ApiError> {
        self.subnet(id)?;
        if self.enis().values().any(|eni| eni.subnet == *id) {
            return Err(ApiError::dependency("subnet", id));
        }
        self.subnets.remove(id);
        self.changed();
        Ok(())
    }

    pub(crate) fn create_reservation(
        &mut self,
        subnet: &SubnetId,
        cidr: Ipv4Net,
        kind: ReservationKind,
        description: String,
        tags: Tags,
    ) -> Result<Reservation, ApiError> {
        let known = self.subnet(subnet)?;
        if cidr.trunc() != cidr || !known.cidr.contains(&cidr) {
            return Err(ApiError::value(format!("The CIDR block {cidr} is not a range of the subnet {}.", known.cidr)));
        }
        if known.reservations.values().any(|other| overlap(other.cidr, cidr)) {
            return Err(ApiError::value(format!("The CIDR block {cidr} overlaps another reservation of the subnet.")));
        }
        let reservation = Reservation { id: self.fresh_id(Kind::Reservation), cidr, kind, description, tags };
        if let Some(subnet) = self.subnets.get_mut(subnet) {
            subnet.reservations.insert(reservation.id.clone(), reservation.clone());
            subnet.pool.reserve(subnet.reservations.values().map(|r| (r.cidr, r.kind)));
        }
        self.changed();
        Ok(reservation)
    }

    pub(crate) fn delete_reservation(&mut self, id: &str) -> Result<(SubnetId, Reservation), ApiError> {
        let subnet = self.subnets.values_mut().find(|subnet| subnet.reservations.contains_key(id));
        let removed = subnet.and_then(|subnet| {
            let reservation = subnet.reservations.remove(id)?;
            subnet.pool.reserve(subnet.reservations.values().map(|r| (r.cidr, r.kind)));
            Some((subnet.id.clone(), reservation))
        });
        self.changed();
        removed.ok_or_else(|| Kind::Reservation.not_found(id))
    }

    pub(crate) fn create_gateway(&mut self, tags: Tags) -> String {
        let id = self.fresh_id(Kind::Gateway);
        self.gateways.insert(id.clone(), Gateway { id: id.clone(), vpc: None, tags });
        self.changed();
        id
    }

    pub(crate) fn gateway(&self, id: &str) -> Result<&Gateway, ApiError> {
        self.gateways.get(id).ok_or_else(|| Kind::Gateway.not_found(id))
    }

    pub(crate) fn attach_gateway(&mut self, id: &str, vpc: &VpcId) -> Result<(), ApiError> {
        self.vpc(vpc)?;
        if let Some(other) = &self.gateway(id)?.vpc {
            return Err(ApiError::new(
                "Resource.AlreadyAssociated",
                format!("resource {id} is already attached to network {other}"),
            ));
        }
        if self.gateways.values().any(|gateway| gateway.vpc.as_ref() == Some(vpc)) {
            return Err(ApiError::value(format!("Network {vpc} already has an internet gateway attached")));
        }
        if let Some(gateway) = self.gateways.get_mut(id) {
            gateway.vpc = Some(vpc.clone());
        }
        self.changed();
        Ok(())
    }

    pub(crate) fn detach_gateway(&mut self, id: &str, vpc: &VpcId) -> Result<(), ApiError> {
        if self.gateway(id)?.vpc.as_ref() != Some(vpc) {
            return Err(ApiError::new(
                "Gateway.NotAttached",
                format!("resource {id} is not attached to network {vpc}"),
            ));
        }
        if self.enis().values().any(|eni| eni.vpc == *vpc && !eni.public.is_empty()) {
            return Err(ApiError::new(
                "DependencyViolation",
                format!(
                    "Network {vpc} has some mapped public address(es). Please unmap those public address(es) before \
                     detaching the gateway."
                ),
            ));
        }
        if let Some(gateway) = self.gateways.get_mut(id) {
            gateway.vpc = None;
        }
        self.changed();
        Ok(())
    }

    pub(crate) fn delete_gateway(&mut self, id: &str) -> Result<(), ApiError> {
        if self.gateway(id)?.vpc.is_some() {
            return Err(ApiError::dependency("internetGateway", id));
        }
        self.gateways.remove(id);
        self.changed();
        Ok(())
    }

    pub(crate) fn peering(&self, id: &str) -> Result<&Peering, ApiError> {
        self.peerings.get(id).ok_or_else(|| Kind::Peering.not_found(id))
    }

    pub(crate) fn request_peering(
        &mut self,
        requester: &VpcId,
        accepter: &VpcId,
        tags: Tags,
    ) -> Result<String, ApiError> {
        let (a, b) = (self.vpc(requester)?, self.vpc(accepter)?);
        if requester == accepter {
            return Err(ApiError::new("OperationNotPermitted", "A VPC cannot be peered with itself."));
        }
        let clash = a.cidrs.iter().any(|x| b.cidrs.iter().any(|y| overlap(x.cidr, y.cidr)));
        if clash {
            return Err(ApiError::new("OperationNotPermitted", "The CIDR blocks of the two VPCs overlap."));
        }
        let id = self.fresh_id(Kind::Peering);
        let peering = Peering {
            id: id.clone(),
            requester: requester.clone(),
            accepter: accepter.clone(),
            status: PeeringStatus::PendingAcceptance,
            tags,
        };
        self.peerings.insert(id.clone(), peering);
        self.changed();
        Ok(id)
    }

    pub(crate) fn accept_peering(&mut self, id: &str) -> Result<(), ApiError> {
        match self.peering(id)?.status {
            PeeringStatus::PendingAcceptance => {}
            PeeringStatus::Active => return Ok(()),
            PeeringStatus::Deleted => {
                return Err(ApiError::new(
                    "InvalidStateTransition",
                    format!("Invalid state transition for {id}, attempted to transition from deleted to active"),
                ));
            }
        }
        if let Some(peering) = self.peerings.get_mut(id) {
            peering.status = PeeringStatus::Active;
        }
        self.changed();
        Ok(())
    }

    pub(crate) fn delete_peering(&mut self, id: &str) -> Result<(), ApiError> {
        self.peering(id)?;
        if let Some(peering) = self.peerings.get_mut(id) {
            peering.status = PeeringStatus::Deleted;
        }
        self.changed();
        Ok(())
    }

    /// The name that the VPC's resolver would give a private address.
    pub(crate) fn private_dns(&self, address: std::net::Ipv4Addr) -> String {
        let host = address.to_string().replace('.', "-");
        match self.options.region.as_str() {
            "us-east-1" => format!("ip-{host}.ec2.internal"),
            region => format!("ip-{host}.{region}.compute.internal"),
        }
    }

    pub(crate) fn eni_limit_left(&self) -> bool {
        self.enis().len() < usize::try_from(self.options.max_enis).unwrap_or(usize::MAX)
    }

    pub(crate) fn set_public_on_launch(&mut self, id: &SubnetId, value: bool) -> Result<(), ApiError> {
        self.subnet(id)?;
        if let Some(subnet) = self.subnets.get_mut(id) {
            subnet.public_on_launch = value;
        }
        self.changed();
        Ok(())
    }
}

/// VPCs and subnets are /16 to /28; bits below the mask are cleared, as EC2 clears them.
fn block_of(code: &str, cidr: Ipv4Net) -> Result<Ipv4Net, ApiError> {
    if !(16..=28).contains(&cidr.prefix_len()) {
        return Err(ApiError::new(code, format!("The CIDR '{cidr}' is invalid.")));
    }
    Ok(cidr.trunc())
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_named_as_ec2_names_them() {
        let names = |region| zones(region).into_iter().map(|z| (z.name, z.id)).next().unwrap();
        assert_eq!(names("us-east-1"), ("us-east-1a".into(), "use1-az1".into()));
        assert_eq!(names("ap-southeast-2"), ("ap-southeast-2a".into(), "apse2-az1".into()));
        assert_eq!(names("eu-central-1"), ("eu-central-1a".into(), "euc1-az1".into()));
    }
}
