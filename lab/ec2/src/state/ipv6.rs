//! IPv6: a /56 of a VPC, a /64 of a subnet, and what ENIs hold of it: addresses, and /80 prefixes.
//!
//! A /64 has so many addresses that nothing of it is kept in a map: who holds what is asked of the ENIs.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use flatwire_core::ids::{EniId, SubnetId, Time, VpcId};
use flatwire_core::limits;
use ipnet::Ipv6Net;

use super::State;
use crate::error::ApiError;

/// Of the range for documentation (RFC 3849), as the public IPv4 addresses are of theirs.
const ACCOUNT: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32);
pub(crate) const VPC_LEN: u8 = 56;
pub(crate) const SUBNET_LEN: u8 = 64;
pub(crate) const PREFIX_LEN: u8 = 80;
/// The first four addresses of a subnet and the last one belong to AWS.
const RESERVED_AT_START: u128 = 4;
/// IPv6 slots of an ENI that hangs on no instance: as many as the largest type gives.
const DETACHED_SLOTS_MAX: u32 = 64;
/// Random picks that may hit something taken before a subnet counts as full.
const TRIES: u32 = 1_000;

/// What is asked for. Addresses and their count exclude each other, and so do prefixes and theirs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted6 {
    pub(crate) addresses: Vec<Ipv6Addr>,
    pub(crate) count: u32,
    pub(crate) prefixes: Vec<Ipv6Net>,
    pub(crate) prefix_count: u32,
}

impl Wanted6 {
    pub(crate) fn slots(&self) -> u32 {
        let named = u32::try_from(self.addresses.len() + self.prefixes.len()).unwrap_or(u32::MAX);
        named.saturating_add(self.count).saturating_add(self.prefix_count)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Taken6 {
    pub(crate) addresses: BTreeSet<Ipv6Addr>,
    pub(crate) prefixes: BTreeSet<Ipv6Net>,
}

impl Taken6 {
    fn holds(&self, address: Ipv6Addr) -> bool {
        self.addresses.contains(&address) || self.prefixes.iter().any(|prefix| prefix.contains(&address))
    }

    fn overlaps(&self, prefix: Ipv6Net) -> bool {
        self.prefixes.contains(&prefix) || self.addresses.iter().any(|address| prefix.contains(address))
    }
}

pub(crate) fn no_ipv6() -> ApiError {
    ApiError::value("The specified subnet does not have an IPv6 CIDR block associated with it.")
}

impl State {
    /// AmazonProvidedIpv6CidrBlock: the next /56 of the account's.
    pub(crate) fn give_vpc_ipv6(&mut self, id: &VpcId) -> Result<Ipv6Net, ApiError> {
        if self.vpc(id)?.ipv6.is_some() {
            return Err(ApiError::new("InvalidVpcRange", format!("The VPC {id} has an IPv6 CIDR block already.")));
        }
        let given: BTreeSet<Ipv6Net> = self.vpcs.values().filter_map(|vpc| vpc.ipv6).collect();
        let mut free = ACCOUNT.subnets(VPC_LEN).map_err(|_| ApiError::internal())?.filter(|net| !given.contains(net));
        let net = free.next().ok_or_else(ApiError::internal)?;
        if let Some(vpc) = self.vpcs.get_mut(id) {
            vpc.ipv6 = Some(net);
        }
        self.let_ipv6_out(id)?;
        self.changed();
        Ok(net)
    }

    pub(crate) fn give_subnet_ipv6(&mut self, id: &SubnetId, net: Ipv6Net) -> Result<(), ApiError> {
        let subnet = self.subnet(id)?;
        let refused = |why: &str| ApiError::new("InvalidSubnet.Range", format!("The CIDR '{net}' is invalid: {why}"));
        if net.prefix_len() != SUBNET_LEN || net.trunc() != net {
            return Err(refused("it must be an aligned /64"));
        }
        if !self.vpc(&subnet.vpc)?.ipv6.is_some_and(|block| block.contains(&net)) {
            return Err(refused("it is not of the VPC's IPv6 CIDR block"));
        }
        let (vpc, taken) = (subnet.vpc.clone(), subnet.ipv6.is_some());
        if taken || self.subnets.values().any(|other| other.vpc == vpc && other.ipv6 == Some(net)) {
            return Err(ApiError::new(
                "InvalidSubnet.Conflict",
                format!("The CIDR '{net}' conflicts with another subnet"),
            ));
        }
        if let Some(subnet) = self.subnets.get_mut(id) {
            subnet.ipv6 = Some(net);
        }
        self.changed();
        Ok(())
    }

    /// Picks and checks what an ENI of this subnet is to hold; nothing has happened yet.
    pub(crate) fn take_ipv6(&mut self, subnet: &SubnetId, wanted: &Wanted6) -> Result<Taken6, ApiError> {
        if wanted.slots() == 0 {
            return Ok(Taken6::default());
        }
        let net = self.subnet(subnet)?.ipv6.ok_or_else(no_ipv6)?;
        let mut held = Taken6::default();
        for eni in self.enis().values().filter(|eni| eni.subnet == *subnet) {
            held.addresses.extend(&eni.ipv6);
            held.prefixes.extend(&eni.ipv6_prefixes);
        }
        let mut taken = Taken6::default();
        for address in &wanted.addresses {
            if !net.contains(address) || is_reserved(net, *address) {
                return Err(ApiError::value(format!(
                    "Address {address} does not fall within the subnet's address range"
                )));
            }
            if held.holds(*address) || taken.holds(*address) {
                return Err(ApiError::value(format!("[{address}] assigned, but move is not allowed.")));
            }
            taken.addresses.insert(*address);
        }
        for prefix in &wanted.prefixes {
            if prefix.prefix_len() != PREFIX_LEN || prefix.trunc() != *prefix || !net.contains(prefix) {
                return Err(ApiError::value(format!(
                    "The prefix {prefix} is not valid: it must be an aligned /{PREFIX_LEN} of {net}."
                )));
            }
            if held.overlaps(*prefix) || taken.overlaps(*prefix) || is_reserved(net, prefix.network()) {
                return Err(ApiError::value(format!("[{prefix}] assigned, but move is not allowed.")));
            }
            taken.prefixes.insert(*prefix);
        }
        for _ in 0..wanted.count {
            let free =
                |address: &Ipv6Addr| !is_reserved(net, *address) && !held.holds(*address) && !taken.holds(*address);
            let address = (0..TRIES).map(|_| self.random_in(net)).find(free).ok_or_else(ApiError::subnet_empty)?;
            taken.addresses.insert(address);
        }
        for _ in 0..wanted.prefix_count {
            let free = |p: &Ipv6Net| !held.overlaps(*p) && !taken.overlaps(*p) && !is_reserved(net, p.network());
            let prefix = (0..TRIES)
                .filter_map(|_| Ipv6Net::new(self.random_in(net), PREFIX_LEN).ok())
                .map(|prefix| prefix.trunc())
                .find(free)
                .ok_or_else(|| ApiError::value("There aren't sufficient free Ipv6 prefixes"))?;
            taken.prefixes.insert(prefix);
        }
        Ok(taken)
    }

    fn random_in(&mut self, net: Ipv6Net) -> Ipv6Addr {
        let random = u128::from(self.rng.next()) << 64 | u128::from(self.rng.next());
        let host = u128::MAX.checked_shr(u32::from(net.prefix_len())).unwrap_or(0);
        Ipv6Addr::from(u128::from(net.network()) | random & host)
    }

    /// AssignIpv6Addresses: what is new, and only that.
    pub(crate) fn assign_ipv6(&mut self, now: Time, id: &EniId, wanted: &Wanted6) -> Result<Taken6, ApiError> {
        let eni = self.eni(id)?;
        let (subnet, before) = (eni.subnet.clone(), eni.ipv6_slots());
        let limit = match &eni.attachment {
            None => DETACHED_SLOTS_MAX,
            Some(attachment) => {
                let host = self.instance(&attachment.instance)?;
                let kind = limits::lookup(&host.info.instance_type).ok_or_else(ApiError::internal)?;
                if (!wanted.prefixes.is_empty() || wanted.prefix_count > 0) && !kind.takes_prefixes() {
                    return Err(super::eni::no_prefixes(kind.name));
                }
                kind.ipv6_per_eni
            }
        };
        if before.saturating_add(wanted.slots()) > limit {
            return Err(super::eni::too_many_addresses());
        }
        let taken = self.take_ipv6(&subnet, wanted)?;
        self.change_eni(now, id, |eni| {
            eni.ipv6.extend(&taken.addresses);
            eni.ipv6_prefixes.extend(&taken.prefixes);
        });
        Ok(taken)
    }

    /// UnassignIpv6Addresses: all of it or nothing.
    pub(crate) fn unassign_ipv6(&mut self, now: Time, id: &EniId, gone: &Taken6) -> Result<(), ApiError> {
        let eni = self.eni(id)?;
        if !gone.addresses.is_subset(&eni.ipv6) || !gone.prefixes.is_subset(&eni.ipv6_prefixes) {
            return Err(ApiError::value(format!("Some of the specified addresses are not assigned to interface {id}")));
        }
        self.change_eni(now, id, |eni| {
            eni.ipv6.retain(|address| !gone.addresses.contains(address));
            eni.ipv6_prefixes.retain(|prefix| !gone.prefixes.contains(prefix));
        });
        Ok(())
    }
}

fn is_reserved(net: Ipv6Net, address: Ipv6Addr) -> bool {
    let offset = u128::from(address) - u128::from(net.network());
    offset < RESERVED_AT_START || address == net.broadcast()
}
