//! The actions of the Query API. Each reads its parameters, ends the reading (which refuses unknown ones and stops a
//! dry run), changes the state, and writes its answer. One file per family.

mod address;
mod eni;
mod group;
mod instance;
mod instance_type;
mod ipv6;
mod region;
mod tags;
mod vpc;

pub(crate) use eni::visible;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::Ipv4Addr;

use flatwire_core::ids::{SecurityGroupId, Time};
use ipnet::Ipv4Net;

use crate::access::{Caller, unauthorized};
use crate::error::{ApiError, Kind};
use crate::filters::{Filters, Page};
use crate::params::Reader;
use crate::state::State;
use crate::state::eni::Wanted;
use crate::state::ipv6::Wanted6;
use crate::view::Tags;
use crate::xml::Xml;

/// One request, seen from its action.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) now: Time,
    pub(crate) caller: &'a Caller,
    pub(crate) action: &'static str,
}

impl Call<'_> {
    pub(crate) fn permit(&self, action: &str) -> Result<(), ApiError> {
        if self.caller.permits(action) { Ok(()) } else { Err(unauthorized(self.caller, action)) }
    }
}

type Run = fn(&mut State, &Call<'_>, &Reader<'_>) -> Result<Xml, ApiError>;

#[derive(Clone, Copy)]
pub(crate) struct Action {
    pub(crate) name: &'static str,
    pub(crate) mutating: bool,
    pub(crate) needs_permission: bool,
    pub(crate) run: Run,
}

pub(crate) fn find(name: &str) -> Option<&'static Action> {
    ACTIONS.iter().find(|action| action.name == name)
}

const fn read(name: &'static str, run: Run) -> Action {
    Action { name, mutating: false, needs_permission: true, run }
}

const fn write(name: &'static str, run: Run) -> Action {
    Action { name, mutating: true, needs_permission: true, run }
}

static ACTIONS: &[Action] = &[
    write("AcceptVpcPeeringConnection", vpc::accept_peering),
    write("AllocateAddress", address::allocate),
    write("AssignIpv6Addresses", ipv6::assign),
    write("AssignPrivateIpAddresses", eni::assign),
    write("AssociateAddress", address::associate),
    write("AssociateSubnetCidrBlock", ipv6::associate_subnet),
    write("AssociateVpcCidrBlock", vpc::associate_cidr),
    write("AttachInternetGateway", vpc::attach_gateway),
    write("AttachNetworkInterface", eni::attach),
    write("AuthorizeSecurityGroupEgress", group::authorize),
    write("AuthorizeSecurityGroupIngress", group::authorize),
    write("CreateInternetGateway", vpc::create_gateway),
    write("CreateNetworkInterface", eni::create),
    write("CreateSecurityGroup", group::create),
    write("CreateSubnet", vpc::create_subnet),
    write("CreateSubnetCidrReservation", vpc::create_reservation),
    write("CreateTags", tags::create),
    write("CreateVpc", vpc::create),
    write("CreateVpcPeeringConnection", vpc::create_peering),
    write("DeleteInternetGateway", vpc::delete_gateway),
    write("DeleteNetworkInterface", eni::delete),
    write("DeleteSecurityGroup", group::delete),
    write("DeleteSubnet", vpc::delete_subnet),
    write("DeleteSubnetCidrReservation", vpc::delete_reservation),
    write("DeleteTags", tags::delete),
    write("DeleteVpc", vpc::delete),
    write("DeleteVpcPeeringConnection", vpc::delete_peering),
    read("DescribeAddresses", address::describe),
    read("DescribeAvailabilityZones", region::describe_zones),
    read("DescribeInstanceTypes", instance_type::describe),
    read("DescribeInstances", instance::describe),
    read("DescribeInternetGateways", vpc::describe_gateways),
    read("DescribeNetworkInterfaces", eni::describe),
    read("DescribeRegions", region::describe_regions),
    read("DescribeSecurityGroups", group::describe),
    read("DescribeSubnets", vpc::describe_subnets),
    read("DescribeTags", tags::describe),
    read("DescribeVpcPeeringConnections", vpc::describe_peerings),
    read("DescribeVpcs", vpc::describe),
    write("DetachInternetGateway", vpc::detach_gateway),
    write("DetachNetworkInterface", eni::detach),
    write("DisassociateAddress", address::disassociate),
    // STS grants this one to everybody.
    Action { name: "GetCallerIdentity", mutating: false, needs_permission: false, run: region::caller_identity },
    read("GetSubnetCidrReservations", vpc::get_reservations),
    write("ModifyNetworkInterfaceAttribute", eni::modify),
    write("ModifySubnetAttribute", vpc::modify_subnet),
    write("ReleaseAddress", address::release),
    write("RevokeSecurityGroupEgress", group::revoke),
    write("RevokeSecurityGroupIngress", group::revoke),
    write("RunInstances", instance::run),
    write("TerminateInstances", instance::terminate),
    write("UnassignIpv6Addresses", ipv6::unassign),
    write("UnassignPrivateIpAddresses", eni::unassign),
];

/// The answer of actions that have nothing to say.
fn done() -> Xml {
    let mut xml = Xml::new();
    xml.leaf("return", true);
    xml
}

/// Ids, filters and page of a `Describe*` action.
struct Query {
    filters: Filters,
    page: Page,
    by_id: bool,
}

impl Query {
    fn read(call: &Call<'_>, p: &Reader<'_>, known: &[&str], by_id: bool, page_max: u32) -> Result<Self, ApiError> {
        let filters = Filters::read(p, known, true)?;
        let page = Page::read(p, call.action, page_max, by_id)?;
        p.end_or_dry_run()?;
        Ok(Self { filters, page, by_id })
    }

    /// The page that was asked for; refused where a large account must paginate and does not.
    fn cut<T>(
        &self,
        state: &State,
        call: &Call<'_>,
        items: Vec<T>,
        key: impl Fn(&T) -> String,
    ) -> Result<(Vec<T>, Option<String>), ApiError> {
        let whole = self.page.is_whole() && !self.by_id && self.filters.is_empty();
        let limit = state.options.max_unpaginated.and_then(|max| usize::try_from(max).ok());
        if whole && limit.is_some_and(|limit| items.len() > limit) {
            return Err(ApiError::new(
                "OperationNotPermitted",
                "The result is too large to be described in one call: use pagination.",
            ));
        }
        Ok(self.page.cut(call.action, items, key))
    }
}

/// The items named by id, in the order of `all`; refused with the first id that is not there.
fn named<'a, I: Ord + Display + 'a, T>(
    ids: &[I],
    all: impl Iterator<Item = (&'a I, T)>,
    kind: Kind,
) -> Result<Vec<T>, ApiError> {
    let mut missing: Vec<&I> = ids.iter().collect();
    let mut found = Vec::new();
    for (id, item) in all {
        if ids.is_empty() || ids.contains(id) {
            missing.retain(|other| *other != id);
            found.push(item);
        }
    }
    match missing.first() {
        Some(id) => Err(kind.not_found(id)),
        None => Ok(found),
    }
}

/// `TagSpecification.N` for one resource type. Tags at creation need the permission to tag.
fn tag_specification(call: &Call<'_>, p: &Reader<'_>, resource: &str) -> Result<Tags, ApiError> {
    let mut all = tag_specifications(call, p, &[resource])?;
    Ok(all.remove(0))
}

/// `TagSpecification.N` for several resource types, in their order.
fn tag_specifications(call: &Call<'_>, p: &Reader<'_>, resources: &[&str]) -> Result<Vec<Tags>, ApiError> {
    let mut all = vec![Tags::new(); resources.len()];
    for specification in p.structs("TagSpecification")? {
        let kind = specification.required("ResourceType")?;
        let tags = read_tags(&specification)?;
        match resources.iter().position(|resource| *resource == kind) {
            Some(at) => all[at].extend(tags),
            // Volumes and the like do not exist here; RunInstances may tag them all the same.
            None if call.action == "RunInstances" => {}
            None => return Err(ApiError::value(format!("'{kind}' is not a valid taggable resource type here."))),
        }
    }
    if all.iter().any(|tags| !tags.is_empty()) {
        call.permit("CreateTags")?;
    }
    Ok(all)
}

fn read_tags(p: &Reader<'_>) -> Result<Tags, ApiError> {
    let mut tags = Tags::new();
    for tag in p.structs("Tag")? {
        let (key, value) = (tag.required("Key")?, tag.text("Value"));
        crate::state::tags::check(key, &value)?;
        if tags.insert(key.to_owned(), value).is_some() {
            return Err(ApiError::value(format!("Duplicate tag key '{key}' specified.")));
        }
    }
    Ok(tags)
}

fn write_tags(xml: &mut Xml, tags: &Tags) {
    xml.list("tagSet", tags, |xml, (key, value)| {
        xml.leaf("key", key).leaf("value", value);
    });
}

/// Groups in the two ways that requests name them.
fn group_ids(p: &Reader<'_>) -> Result<Vec<SecurityGroupId>, ApiError> {
    p.ids(Kind::Group, "SecurityGroupId")
}

/// What an ENI is to hold, and its primary address if that is named: CreateNetworkInterface and each interface of
/// RunInstances spell it alike. Count, list, prefix count and prefixes exclude each other.
fn wanted(p: &Reader<'_>) -> Result<(Option<Ipv4Addr>, Wanted), ApiError> {
    let mut primary = p.address("PrivateIpAddress")?;
    let mut addresses = Vec::new();
    for entry in p.structs("PrivateIpAddresses")? {
        entry.required("PrivateIpAddress")?;
        let Some(address) = entry.address("PrivateIpAddress")? else { continue };
        if entry.bool("Primary")?.unwrap_or(false) {
            if primary.is_some_and(|other| other != address) {
                return Err(ApiError::combination("Only one private IP address may be designated as primary."));
            }
            primary = Some(address);
        } else {
            addresses.push(address);
        }
    }
    let mut prefixes = Vec::new();
    for entry in p.structs("Ipv4Prefix")? {
        entry.required("Ipv4Prefix")?;
        prefixes.extend(entry.cidr("Ipv4Prefix")?);
    }
    let count = p.count("SecondaryPrivateIpAddressCount")?;
    let wanted = exclusive(addresses, count, prefixes, p.count("Ipv4PrefixCount")?)?;
    Ok((primary, Wanted { ipv6: ipv6::wanted(p)?, ..wanted }))
}

fn exclusive(
    addresses: Vec<Ipv4Addr>,
    count: Option<u32>,
    prefixes: Vec<Ipv4Net>,
    prefix_count: Option<u32>,
) -> Result<Wanted, ApiError> {
    let given = [!addresses.is_empty(), count.is_some(), !prefixes.is_empty(), prefix_count.is_some()];
    if given.into_iter().filter(|given| *given).count() > 1 {
        return Err(ApiError::combination(
            "Private addresses, their count, IPv4 prefixes and their count exclude each other in one request.",
        ));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = addresses.iter().find(|address| !seen.insert(**address)) {
        return Err(ApiError::value(format!("The address {twice} is given twice.")));
    }
    let (count, prefix_count) = (count.unwrap_or(0), prefix_count.unwrap_or(0));
    Ok(Wanted { addresses, count, prefixes, prefix_count, ipv6: Wanted6::default() })
}

fn moment(now: Time) -> String {
    crate::stamp(now).strftime("%Y-%m-%dT%H:%M:%S.000Z").to_string()
}
