//! The actions on network interfaces.

use std::ops::Deref;
use std::sync::Arc;

use flatwire_core::ids::{DeviceIndex, EniId, Time};

use super::{Call, Query, done, exclusive, group_ids, ipv6, moment, named, tag_specification, wanted, write_tags};
use crate::error::{ApiError, Kind};
use crate::params::Reader;
use crate::state::State;
use crate::state::eni::NewEni;
use crate::state::history::Past;
use crate::view::EniInfo;
use crate::xml::Xml;

pub(super) fn create(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let subnet = p.required_id(Kind::Subnet, "SubnetId")?;
    let groups = group_ids(p)?;
    let tags = tag_specification(call, p, "network-interface")?;
    let (primary, wanted) = wanted(p)?;
    let interface_type = p.opt("InterfaceType").unwrap_or("interface").to_owned();
    if !matches!(interface_type.as_str(), "interface" | "trunk" | "branch" | "efa" | "efa-only") {
        return Err(ApiError::bad_value("interfaceType", interface_type));
    }
    let token = p.opt("ClientToken");
    let new = NewEni { subnet, groups, description: p.text("Description"), primary, wanted, tags, interface_type };
    p.ignore(&["ConnectionTrackingSpecification", "EnablePrimaryIpv6"]);
    p.end_or_dry_run()?;
    let fingerprint = format!("{new:?}");
    let known = state.recall(call.action, token, &fingerprint)?;
    let known = known.and_then(|ids| EniId::new(ids.first()?.as_str()).ok());
    let id = match known {
        Some(id) => id,
        None => {
            let id = state.create_eni(call.now, new)?;
            state.remember(call.action, token, fingerprint, vec![id.to_string()]);
            id
        }
    };
    let eni = state.eni(&id)?;
    let mut xml = Xml::new();
    xml.element("networkInterface", |xml| write_eni(xml, state, eni));
    xml.opt("clientToken", token);
    Ok(xml)
}

pub(super) fn delete(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    p.end_or_dry_run()?;
    state.delete_eni(call.now, &id)?;
    Ok(done())
}

pub(super) fn attach(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let eni = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let instance = p.required_id(Kind::Instance, "InstanceId")?;
    p.required("DeviceIndex")?;
    let device = DeviceIndex(p.number("DeviceIndex")?.unwrap_or(0));
    let card = p.number("NetworkCardIndex")?.unwrap_or(0);
    p.ignore(&["EnaSrdSpecification", "EnaQueueCount"]);
    p.end_or_dry_run()?;
    let attachment = state.attach(call.now, &eni, &instance, device, card)?;
    let mut xml = Xml::new();
    xml.leaf("attachmentId", attachment).leaf("networkCardIndex", card);
    Ok(xml)
}

pub(super) fn detach(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let attachment = p.required_id(Kind::Attachment, "AttachmentId")?;
    let force = p.bool("Force")?.unwrap_or(false);
    p.end_or_dry_run()?;
    state.detach(call.now, &attachment, force)?;
    Ok(done())
}

/// EC2 changes one attribute per call.
pub(super) fn modify(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: EniId = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let groups = group_ids(p)?;
    let check = p.bool("SourceDestCheck.Value")?;
    let description = p.opt("Description.Value").map(str::to_owned);
    let attachment = p.opt_id(Kind::Attachment, "Attachment.AttachmentId")?;
    let delete = p.bool("Attachment.DeleteOnTermination")?;
    p.ignore(&["ConnectionTrackingSpecification", "EnaSrdSpecification"]);
    p.end_or_dry_run()?;
    let given = [!groups.is_empty(), check.is_some(), description.is_some(), attachment.is_some() || delete.is_some()];
    match given.into_iter().filter(|given| *given).count() {
        0 => return Err(ApiError::new("MissingParameter", "The request must contain an attribute to modify")),
        1 => {}
        _ => return Err(ApiError::combination("Only one attribute can be modified at a time")),
    }
    state.eni(&id)?;
    if !groups.is_empty() {
        state.set_groups(call.now, &id, &groups)?;
    } else if attachment.is_some() || delete.is_some() {
        let attachment = attachment.ok_or_else(|| ApiError::missing("Attachment.AttachmentId"))?;
        let delete = delete.ok_or_else(|| ApiError::missing("Attachment.DeleteOnTermination"))?;
        state.set_delete_on_termination(call.now, &id, &attachment, delete)?;
    } else {
        state.change_eni(call.now, &id, |eni| {
            eni.source_dest_check = check.unwrap_or(eni.source_dest_check);
            eni.description = description.unwrap_or(std::mem::take(&mut eni.description));
        });
    }
    Ok(done())
}

pub(super) fn assign(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: EniId = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let addresses = p.addresses("PrivateIpAddress")?;
    let count = p.count("SecondaryPrivateIpAddressCount")?;
    let prefixes = prefixes(p)?;
    let prefix_count = p.count("Ipv4PrefixCount")?;
    let allow_reassignment = p.bool("AllowReassignment")?.unwrap_or(false);
    p.end()?;
    if addresses.is_empty() && count.is_none() && prefixes.is_empty() && prefix_count.is_none() {
        return Err(ApiError::new(
            "MissingParameter",
            "The request must contain either the addresses, their count, the IPv4 prefixes or their count",
        ));
    }
    let wanted = exclusive(addresses, count, prefixes, prefix_count)?;
    let taken = state.assign(call.now, &id, &wanted, allow_reassignment)?;
    let mut xml = Xml::new();
    xml.leaf("networkInterfaceId", &id);
    xml.list("assignedPrivateIpAddressesSet", taken.addresses, |xml, address| {
        xml.leaf("privateIpAddress", address);
    });
    xml.list("assignedIpv4PrefixSet", taken.prefixes, |xml, prefix| {
        xml.leaf("ipv4Prefix", prefix);
    });
    xml.leaf("return", true);
    Ok(xml)
}

pub(super) fn unassign(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = p.required_id(Kind::Interface, "NetworkInterfaceId")?;
    let addresses = p.addresses("PrivateIpAddress")?;
    let prefixes = prefixes(p)?;
    p.end()?;
    if addresses.is_empty() && prefixes.is_empty() {
        return Err(ApiError::missing("PrivateIpAddress"));
    }
    state.unassign(call.now, &id, &addresses, &prefixes)?;
    Ok(done())
}

fn prefixes(p: &Reader<'_>) -> Result<Vec<ipnet::Ipv4Net>, ApiError> {
    let refuse = |text: &str| ApiError::value(format!("The prefix {text} is not valid."));
    p.list("Ipv4Prefix")?.into_iter().map(|text| text.parse().map_err(|_| refuse(text))).collect()
}

const FILTERS: &[&str] = &[
    "addresses.association.public-ip",
    "addresses.primary",
    "addresses.private-ip-address",
    "association.association-id",
    "association.allocation-id",
    "association.public-ip",
    "attachment.attach-time",
    "attachment.attachment-id",
    "attachment.delete-on-termination",
    "attachment.device-index",
    "attachment.instance-id",
    "attachment.instance-owner-id",
    "attachment.network-card-index",
    "attachment.status",
    "availability-zone",
    "availability-zone-id",
    "description",
    "group-id",
    "group-name",
    "interface-type",
    "ipv6-addresses.ipv6-address",
    "mac-address",
    "network-interface-id",
    "owner-id",
    "private-dns-name",
    "private-ip-address",
    "requester-id",
    "requester-managed",
    "source-dest-check",
    "status",
    "subnet-id",
    "vpc-id",
];

pub(super) fn describe(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<EniId> = p.ids(Kind::Interface, "NetworkInterfaceId")?;
    p.ignore(&["IncludeManagedResources"]);
    let query = Query::read(call, p, FILTERS, !ids.is_empty(), 1_000)?;
    let visible = visible(state, call.now);
    let enis = named(&ids, visible.iter().map(|eni| (&eni.id, &**eni)), Kind::Interface)?;
    let enis: Vec<_> =
        enis.into_iter().filter(|eni| query.filters.keep(&eni.tags, |name| field(state, eni, name))).collect();
    let (page, token) = query.cut(state, call, enis, |eni| eni.id.to_string())?;
    let mut xml = Xml::new();
    xml.list("networkInterfaceSet", page, |xml, eni| write_eni(xml, state, eni));
    xml.opt("nextToken", token);
    Ok(xml)
}

/// An ENI as a reader sees it: as it is, or as it was.
pub(crate) enum Seen<'a> {
    Now(&'a EniInfo),
    Then(Arc<EniInfo>),
}

impl Deref for Seen<'_> {
    type Target = EniInfo;

    fn deref(&self) -> &EniInfo {
        match self {
            Self::Now(eni) => eni,
            Self::Then(eni) => eni,
        }
    }
}

/// The ENIs that `Describe*` shows now, by id: as they were a while ago, gone ones perhaps still there.
pub(crate) fn visible(state: &State, now: Time) -> Vec<Seen<'_>> {
    let moment = Time(now.0.saturating_sub(state.options.describe_lag_ms));
    let mut gone: Vec<&EniId> = state.history.ids().filter(|id| !state.enis().contains_key(id)).collect();
    gone.sort();
    let past = |id: &EniId| match state.history.at(id, moment) {
        Past::Current => state.enis().get(id).map(Seen::Now),
        Past::Was(eni) => Some(Seen::Then(eni)),
        Past::Absent => None,
    };
    let mut seen: Vec<Seen<'_>> = state.enis().keys().chain(gone).filter_map(past).collect();
    seen.sort_by(|a, b| a.id.cmp(&b.id));
    seen
}

fn field(state: &State, eni: &EniInfo, name: &str) -> Vec<String> {
    let attachment = eni.attachment.as_ref();
    let public = |private| eni.public.get(private).and_then(|public| state.addresses.get(public));
    let own = public(&eni.primary_ipv4);
    let one = |value: Option<String>| value.into_iter().collect();
    match name {
        "addresses.association.public-ip" => eni.public.values().map(ToString::to_string).collect(),
        "addresses.primary" if eni.secondary.is_empty() => vec!["true".into()],
        "addresses.primary" => vec!["true".into(), "false".into()],
        "addresses.private-ip-address" => {
            eni.secondary.iter().chain([&eni.primary_ipv4]).map(ToString::to_string).collect()
        }
        "association.association-id" => one(own.and_then(|a| Some(a.association.as_ref()?.id.clone()))),
        "association.allocation-id" => one(own.and_then(|a| a.allocation.clone())),
        "association.public-ip" => one(own.map(|a| a.public.to_string())),
        "attachment.attach-time" => one(attachment.map(|a| moment(a.attached_at))),
        "attachment.attachment-id" => one(attachment.map(|a| a.id.to_string())),
        "attachment.delete-on-termination" => one(attachment.map(|a| a.delete_on_termination.to_string())),
        "attachment.device-index" => one(attachment.map(|a| a.device.to_string())),
        "attachment.instance-id" => one(attachment.map(|a| a.instance.to_string())),
        "attachment.instance-owner-id" => one(attachment.map(|_| state.options.account_id.clone())),
        "attachment.network-card-index" => one(attachment.map(|a| a.card.to_string())),
        "attachment.status" => one(attachment.map(|a| a.state.to_string())),
        "availability-zone" => vec![eni.availability_zone.clone()],
        "availability-zone-id" => one(state.subnets.get(&eni.subnet).map(|subnet| subnet.zone.id.clone())),
        "description" => vec![eni.description.clone()],
        "group-id" => eni.security_groups.iter().map(ToString::to_string).collect(),
        "group-name" => {
            eni.security_groups.iter().filter_map(|id| state.groups.get(id)).map(|g| g.name.clone()).collect()
        }
        "ipv6-addresses.ipv6-address" => eni.ipv6.iter().map(ToString::to_string).collect(),
        "interface-type" => vec![eni.interface_type.clone()],
        "mac-address" => vec![eni.mac.to_string()],
        "network-interface-id" => vec![eni.id.to_string()],
        "owner-id" => vec![state.options.account_id.clone()],
        "private-dns-name" => vec![state.private_dns(eni.primary_ipv4)],
        "private-ip-address" => vec![eni.primary_ipv4.to_string()],
        "requester-managed" => vec!["false".into()],
        "source-dest-check" => vec![eni.source_dest_check.to_string()],
        "status" => vec![eni.status.to_string()],
        "subnet-id" => vec![eni.subnet.to_string()],
        "vpc-id" => vec![eni.vpc.to_string()],
        _ => Vec::new(),
    }
}

pub(super) fn write_eni(xml: &mut Xml, state: &State, eni: &EniInfo) {
    let zone_id = state.subnets.get(&eni.subnet).map(|subnet| &subnet.zone.id);
    xml.leaf("networkInterfaceId", &eni.id)
        .leaf("subnetId", &eni.subnet)
        .leaf("vpcId", &eni.vpc)
        .leaf("availabilityZone", &eni.availability_zone)
        .opt("availabilityZoneId", zone_id)
        .leaf("requesterManaged", false);
    write_common(xml, state, eni);
    if let Some(a) = &eni.attachment {
        xml.element("attachment", |xml| {
            xml.leaf("attachmentId", &a.id)
                .leaf("instanceId", &a.instance)
                .leaf("instanceOwnerId", &state.options.account_id)
                .leaf("deviceIndex", a.device)
                .leaf("networkCardIndex", a.card)
                .leaf("status", a.state)
                .leaf("attachTime", moment(a.attached_at))
                .leaf("deleteOnTermination", a.delete_on_termination);
        });
    }
    write_association(xml, state, eni, &eni.primary_ipv4);
    write_tags(xml, &eni.tags);
}

/// What an ENI shows alike in DescribeNetworkInterfaces and within an instance.
pub(super) fn write_common(xml: &mut Xml, state: &State, eni: &EniInfo) {
    xml.leaf("description", &eni.description)
        .leaf("ownerId", &state.options.account_id)
        .leaf("status", eni.status)
        .leaf("macAddress", eni.mac)
        .leaf("privateIpAddress", eni.primary_ipv4)
        .leaf("privateDnsName", state.private_dns(eni.primary_ipv4))
        .leaf("sourceDestCheck", eni.source_dest_check)
        .leaf("interfaceType", &eni.interface_type);
    write_groups(xml, state, &eni.security_groups);
    let addresses = std::iter::once(&eni.primary_ipv4).chain(&eni.secondary);
    xml.list("privateIpAddressesSet", addresses, |xml, address| {
        xml.leaf("privateIpAddress", address)
            .leaf("privateDnsName", state.private_dns(*address))
            .leaf("primary", *address == eni.primary_ipv4);
        write_association(xml, state, eni, address);
    });
    if !eni.prefixes.is_empty() {
        xml.list("ipv4PrefixSet", &eni.prefixes, |xml, prefix| {
            xml.leaf("ipv4Prefix", prefix);
        });
    }
    ipv6::write_eni(xml, eni);
}

pub(super) fn write_groups(xml: &mut Xml, state: &State, groups: &[flatwire_core::ids::SecurityGroupId]) {
    xml.list("groupSet", groups, |xml, id| {
        xml.leaf("groupId", id).opt("groupName", state.groups.get(id).map(|group| &group.name));
    });
}

fn write_association(xml: &mut Xml, state: &State, eni: &EniInfo, private: &std::net::Ipv4Addr) {
    let Some(public) = eni.public.get(private) else { return };
    let address = state.addresses.get(public);
    let allocation = address.and_then(|address| address.allocation.as_ref());
    xml.element("association", |xml| {
        xml.leaf("publicIp", public)
            .leaf("ipOwnerId", if allocation.is_some() { state.options.account_id.as_str() } else { "amazon" })
            .opt("allocationId", allocation)
            .opt("associationId", address.and_then(|a| a.association.as_ref()).map(|a| &a.id));
    });
}
