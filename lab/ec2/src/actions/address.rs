//! The actions on public addresses.

use std::net::Ipv4Addr;

use flatwire_core::ids::{EniId, InstanceId};

use super::{Call, done, tag_specification, write_tags};
use crate::error::{ApiError, Kind};
use crate::filters::Filters;
use crate::params::Reader;
use crate::state::State;
use crate::state::address::PublicAddress;
use crate::xml::Xml;

pub(super) fn allocate(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let tags = tag_specification(call, p, "elastic-ip")?;
    p.ignore(&["Domain", "NetworkBorderGroup"]);
    p.end_or_dry_run()?;
    let address = state.allocate_address(tags)?;
    let mut xml = Xml::new();
    xml.leaf("publicIp", address.public)
        .leaf("domain", "vpc")
        .opt("allocationId", address.allocation)
        .leaf("publicIpv4Pool", "amazon")
        .leaf("networkBorderGroup", &state.options.region);
    Ok(xml)
}

pub(super) fn associate(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let allocation: String = p.required_id(Kind::Allocation, "AllocationId")?;
    let eni: Option<EniId> = p.opt_id(Kind::Interface, "NetworkInterfaceId")?;
    let instance: Option<InstanceId> = p.opt_id(Kind::Instance, "InstanceId")?;
    let private = p.address("PrivateIpAddress")?;
    // In a VPC an address moves by default; only an explicit `false` holds it.
    let allow = p.bool("AllowReassociation")?.unwrap_or(true);
    p.end_or_dry_run()?;
    let public = state.by_allocation(&allocation)?.public;
    let eni = match (eni, instance) {
        (Some(eni), None) => eni,
        (None, Some(instance)) => primary_eni(state, &instance)?,
        _ => {
            return Err(ApiError::new(
                "MissingParameter",
                "Either 'networkInterfaceId' or 'instanceId' must be specified, and not both",
            ));
        }
    };
    let association = state.associate_address(call.now, public, &eni, private, allow)?;
    let mut xml = done();
    xml.leaf("associationId", association);
    Ok(xml)
}

fn primary_eni(state: &State, instance: &InstanceId) -> Result<EniId, ApiError> {
    state.instance(instance)?;
    let primary = state
        .enis()
        .values()
        .find(|eni| eni.attachment.as_ref().is_some_and(|a| a.instance == *instance && a.device.0 == 0 && a.card == 0));
    primary.map(|eni| eni.id.clone()).ok_or_else(|| {
        ApiError::new("InvalidInstanceID", format!("The instance '{instance}' has no network interface."))
    })
}

pub(super) fn disassociate(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let association: String = p.required_id(Kind::Association, "AssociationId")?;
    p.end_or_dry_run()?;
    state.disassociate_address(call.now, &association)?;
    Ok(done())
}

pub(super) fn release(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let allocation: String = p.required_id(Kind::Allocation, "AllocationId")?;
    p.ignore(&["NetworkBorderGroup"]);
    p.end_or_dry_run()?;
    state.release_address(&allocation)?;
    Ok(done())
}

const FILTERS: &[&str] =
    &["allocation-id", "association-id", "domain", "network-interface-id", "private-ip-address", "public-ip"];

pub(super) fn describe(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let allocations: Vec<String> = p.ids(Kind::Allocation, "AllocationId")?;
    let publics: Vec<Ipv4Addr> = p.addresses("PublicIp")?;
    let filters = Filters::read(p, FILTERS, true)?;
    p.end_or_dry_run()?;
    for allocation in &allocations {
        state.by_allocation(allocation)?;
    }
    let addresses = state.addresses.values().filter(|address| {
        let Some(allocation) = &address.allocation else { return false };
        (allocations.is_empty() || allocations.contains(allocation))
            && (publics.is_empty() || publics.contains(&address.public))
            && filters.keep(&address.tags, |name| field(address, name))
    });
    let mut xml = Xml::new();
    xml.list("addressesSet", addresses, |xml, address| {
        xml.leaf("publicIp", address.public)
            .leaf("domain", "vpc")
            .opt("allocationId", address.allocation.as_ref())
            .leaf("publicIpv4Pool", "amazon")
            .leaf("networkBorderGroup", &state.options.region);
        if let Some(association) = &address.association {
            let eni = state.enis().get(&association.eni);
            xml.leaf("associationId", &association.id)
                .leaf("networkInterfaceId", &association.eni)
                .leaf("networkInterfaceOwnerId", &state.options.account_id)
                .leaf("privateIpAddress", association.private)
                .opt("instanceId", eni.and_then(|eni| eni.attachment.as_ref()).map(|a| &a.instance));
        }
        write_tags(xml, &address.tags);
    });
    Ok(xml)
}

fn field(address: &PublicAddress, name: &str) -> Vec<String> {
    let association = address.association.as_ref();
    match name {
        "allocation-id" => address.allocation.iter().cloned().collect(),
        "association-id" => association.map(|a| a.id.clone()).into_iter().collect(),
        "domain" => vec!["vpc".into()],
        "network-interface-id" => association.map(|a| a.eni.to_string()).into_iter().collect(),
        "private-ip-address" => association.map(|a| a.private.to_string()).into_iter().collect(),
        "public-ip" => vec![address.public.to_string()],
        _ => Vec::new(),
    }
}
