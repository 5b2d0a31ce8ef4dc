//! What requests ask of IPv6, its two actions, and how answers show it.

use std::net::Ipv6Addr;

use flatwire_core::ids::{EniId, SubnetId, VpcId};
use ipnet::Ipv6Net;

use super::Call;
use crate::error::{ApiError, Kind};
use crate::params::Reader;
use crate::state::State;
use crate::state::ipv6::{Taken6, Wanted6};
use crate::view::EniInfo;
use crate::xml::Xml;

/// What a new ENI is to hold: CreateNetworkInterface and each interface of RunInstances spell it alike.
pub(super) fn wanted(p: &Reader<'_>) -> Result<Wanted6, ApiError> {
    let mut wanted = counted(p)?;
    for entry in p.structs("Ipv6Addresses")? {
        wanted.addresses.push(address(entry.required("Ipv6Address")?)?);
    }
    for entry in p.structs("Ipv6Prefix")? {
        wanted.prefixes.push(prefix(entry.required("Ipv6Prefix")?)?);
    }
    exclusive(wanted)
}

fn counted(p: &Reader<'_>) -> Result<Wanted6, ApiError> {
    let (count, prefix_count) = (p.count("Ipv6AddressCount")?.unwrap_or(0), p.count("Ipv6PrefixCount")?.unwrap_or(0));
    Ok(Wanted6 { count, prefix_count, ..Wanted6::default() })
}

fn exclusive(wanted: Wanted6) -> Result<Wanted6, ApiError> {
    let twice =
        (!wanted.addresses.is_empty() && wanted.count > 0) || (!wanted.prefixes.is_empty() && wanted.prefix_count > 0);
    if twice {
        return Err(ApiError::combination(
            "IPv6 addresses or prefixes and their count exclude each other in one request.",
        ));
    }
    Ok(wanted)
}

fn address(text: &str) -> Result<Ipv6Addr, ApiError> {
    text.parse().map_err(|_| ApiError::bad_value("ipv6Address", text))
}

pub(super) fn prefix(text: &str) -> Result<Ipv6Net, ApiError> {
    text.parse().map_err(|_| ApiError::value(format!("The prefix {text} is not valid.")))
}

/// The lists of AssignIpv6Addresses and UnassignIpv6Addresses.
fn named(p: &Reader<'_>) -> Result<(Vec<Ipv6Addr>, Vec<Ipv6Net>), ApiError> {
    let addresses = p.list("Ipv6Addresses")?.into_iter().map(address).collect::<Result<_, _>>()?;
    let prefixes = p.list("Ipv6Prefix")?.into_iter().map(prefix).collect::<Result<_, _>>()?;
    Ok((addresses, prefixes))
}

pub(super) fn assign(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: EniId = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let (addresses, prefixes) = named(p)?;
    let wanted = exclusive(Wanted6 { addresses, prefixes, ..counted(p)? })?;
    p.end()?;
    if wanted.slots() == 0 {
        return Err(ApiError::missing("Ipv6AddressCount"));
    }
    let taken = state.assign_ipv6(call.now, &id, &wanted)?;
    let mut xml = Xml::new();
    xml.leaf("networkInterfaceId", &id)
        .texts("assignedIpv6Addresses", &taken.addresses)
        .texts("assignedIpv6PrefixSet", &taken.prefixes);
    Ok(xml)
}

pub(super) fn unassign(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: EniId = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let (addresses, prefixes) = named(p)?;
    p.end()?;
    let gone = Taken6 { addresses: addresses.into_iter().collect(), prefixes: prefixes.into_iter().collect() };
    if gone == Taken6::default() {
        return Err(ApiError::missing("Ipv6Addresses"));
    }
    state.unassign_ipv6(call.now, &id, &gone)?;
    let mut xml = Xml::new();
    xml.leaf("networkInterfaceId", &id)
        .texts("unassignedIpv6Addresses", &gone.addresses)
        .texts("unassignedIpv6PrefixSet", &gone.prefixes);
    Ok(xml)
}

/// Gives a subnet its /64.
pub(super) fn associate_subnet(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SubnetId = p.required_id(Kind::Subnet, "SubnetId")?;
    let net = prefix(p.required("Ipv6CidrBlock")?)?;
    p.end()?;
    state.give_subnet_ipv6(&id, net)?;
    let mut xml = Xml::new();
    xml.leaf("subnetId", &id).element("ipv6CidrBlockAssociation", |xml| write_block(xml, id.as_str(), &net));
    Ok(xml)
}

/// The VPC's /56, once it has one.
pub(super) fn write_vpc(xml: &mut Xml, id: &VpcId, block: Option<Ipv6Net>) {
    xml.list("ipv6CidrBlockAssociationSet", block, |xml, net| write_block(xml, id.as_str(), &net));
}

pub(super) fn write_subnet(xml: &mut Xml, id: &SubnetId, block: Option<Ipv6Net>) {
    xml.list("ipv6CidrBlockAssociationSet", block, |xml, net| write_block(xml, id.as_str(), &net));
}

/// An association's id follows from its owner's: there is one each.
pub(super) fn write_block(xml: &mut Xml, owner: &str, net: &Ipv6Net) {
    let (kind, rest) = owner.split_once('-').unwrap_or(("", owner));
    xml.leaf("associationId", format!("{kind}-cidr-assoc-{rest}")).leaf("ipv6CidrBlock", net);
    xml.element("ipv6CidrBlockState", |xml| {
        xml.leaf("state", "associated");
    });
}

pub(super) fn write_eni(xml: &mut Xml, eni: &EniInfo) {
    xml.list("ipv6AddressesSet", &eni.ipv6, |xml, address| {
        xml.leaf("ipv6Address", address).leaf("isPrimaryIpv6", false);
    });
    if !eni.ipv6_prefixes.is_empty() {
        xml.list("ipv6PrefixSet", &eni.ipv6_prefixes, |xml, prefix| {
            xml.leaf("ipv6Prefix", prefix);
        });
    }
}
