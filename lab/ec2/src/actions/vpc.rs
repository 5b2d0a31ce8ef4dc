//! The actions on VPCs, subnets, reservations, internet gateways and peerings.

use flatwire_core::ids::{SubnetId, VpcId};

use super::{Call, Query, done, ipv6, named, tag_specification, write_tags};
use crate::error::{ApiError, Kind};
use crate::params::Reader;
use crate::state::State;
use crate::state::pool::ReservationKind;
use crate::state::vpc::{CidrAssociation, Gateway, Peering, Reservation, Subnet, Vpc};
use crate::xml::Xml;

pub(super) fn create(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    p.required("CidrBlock")?;
    let cidr = p.cidr("CidrBlock")?.ok_or_else(|| ApiError::missing("CidrBlock"))?;
    let tags = tag_specification(call, p, "vpc")?;
    let with_ipv6 = p.bool("AmazonProvidedIpv6CidrBlock")?.unwrap_or(false);
    p.ignore(&["InstanceTenancy"]);
    p.end_or_dry_run()?;
    let id = state.create_vpc(cidr, tags)?;
    if with_ipv6 {
        state.give_vpc_ipv6(&id)?;
    }
    let mut xml = Xml::new();
    let vpc = state.vpc(&id)?;
    xml.element("vpc", |xml| write_vpc(xml, state, vpc));
    Ok(xml)
}

pub(super) fn delete(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = p.required_id(Kind::Vpc, "VpcId")?;
    p.end_or_dry_run()?;
    state.delete_vpc(&id)?;
    Ok(done())
}

const VPC_FILTERS: &[&str] = &[
    "cidr",
    "cidr-block-association.association-id",
    "cidr-block-association.cidr-block",
    "cidr-block-association.state",
    "dhcp-options-id",
    "is-default",
    "owner-id",
    "state",
    "vpc-id",
];

pub(super) fn describe(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<VpcId> = p.ids(Kind::Vpc, "VpcId")?;
    let query = Query::read(call, p, VPC_FILTERS, !ids.is_empty(), 1_000)?;
    let vpcs: Vec<&Vpc> = named(&ids, state.vpcs.iter(), Kind::Vpc)?
        .into_iter()
        .filter(|vpc| {
            query.filters.keep(&vpc.tags, |name| match name {
                "cidr" => vpc.cidrs.first().map(|a| a.cidr.to_string()).into_iter().collect(),
                "cidr-block-association.association-id" => vpc.cidrs.iter().map(|a| a.id.clone()).collect(),
                "cidr-block-association.cidr-block" => vpc.cidrs.iter().map(|a| a.cidr.to_string()).collect(),
                "cidr-block-association.state" => vec!["associated".into()],
                "dhcp-options-id" => vec![vpc.dhcp_options.clone()],
                "is-default" => vec!["false".into()],
                "owner-id" => vec![state.options.account_id.clone()],
                "state" => vec!["available".into()],
                "vpc-id" => vec![vpc.id.to_string()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, vpcs, |vpc| vpc.id.to_string())?;
    let mut xml = Xml::new();
    xml.list("vpcSet", page, |xml, vpc| write_vpc(xml, state, vpc));
    xml.opt("nextToken", token);
    Ok(xml)
}

fn write_vpc(xml: &mut Xml, state: &State, vpc: &Vpc) {
    xml.leaf("vpcId", &vpc.id)
        .leaf("ownerId", &state.options.account_id)
        .leaf("state", "available")
        .opt("cidrBlock", vpc.cidrs.first().map(|association| association.cidr));
    xml.list("cidrBlockAssociationSet", &vpc.cidrs, write_association);
    ipv6::write_vpc(xml, &vpc.id, vpc.ipv6);
    xml.leaf("dhcpOptionsId", &vpc.dhcp_options).leaf("instanceTenancy", "default").leaf("isDefault", false);
    write_tags(xml, &vpc.tags);
}

fn write_association(xml: &mut Xml, association: &CidrAssociation) {
    xml.leaf("associationId", &association.id).leaf("cidrBlock", association.cidr);
    xml.element("cidrBlockState", |xml| {
        xml.leaf("state", "associated");
    });
}

pub(super) fn associate_cidr(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: VpcId = p.required_id(Kind::Vpc, "VpcId")?;
    if p.bool("AmazonProvidedIpv6CidrBlock")?.unwrap_or(false) {
        p.end()?;
        let net = state.give_vpc_ipv6(&id)?;
        let mut xml = Xml::new();
        xml.leaf("vpcId", &id);
        xml.element("ipv6CidrBlockAssociation", |xml| ipv6::write_block(xml, id.as_str(), &net));
        return Ok(xml);
    }
    p.required("CidrBlock")?;
    let cidr = p.cidr("CidrBlock")?.ok_or_else(|| ApiError::missing("CidrBlock"))?;
    p.end()?;
    let association = state.associate_cidr(&id, cidr)?;
    let mut xml = Xml::new();
    xml.leaf("vpcId", id).element("cidrBlockAssociation", |xml| write_association(xml, &association));
    Ok(xml)
}

pub(super) fn create_subnet(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let vpc = p.required_id(Kind::Vpc, "VpcId")?;
    p.required("CidrBlock")?;
    let cidr = p.cidr("CidrBlock")?.ok_or_else(|| ApiError::missing("CidrBlock"))?;
    let zone = p.opt("AvailabilityZone").or(p.opt("AvailabilityZoneId"));
    let block = p.opt("Ipv6CidrBlock").map(ipv6::prefix).transpose()?;
    let tags = tag_specification(call, p, "subnet")?;
    p.end_or_dry_run()?;
    let id = state.create_subnet(&vpc, cidr, zone, tags)?;
    if let Some(block) = block
        && let Err(refused) = state.give_subnet_ipv6(&id, block)
    {
        state.delete_subnet(&id)?;
        return Err(refused);
    }
    let subnet = state.subnet(&id)?;
    let mut xml = Xml::new();
    xml.element("subnet", |xml| write_subnet(xml, state, subnet));
    Ok(xml)
}

pub(super) fn delete_subnet(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = p.required_id(Kind::Subnet, "SubnetId")?;
    p.end_or_dry_run()?;
    state.delete_subnet(&id)?;
    Ok(done())
}

pub(super) fn modify_subnet(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SubnetId = p.required_id(Kind::Subnet, "SubnetId")?;
    let public = p.bool("MapPublicIpOnLaunch.Value")?;
    p.end()?;
    let public = public.ok_or_else(|| ApiError::missing("MapPublicIpOnLaunch.Value"))?;
    state.set_public_on_launch(&id, public)?;
    Ok(done())
}

const SUBNET_FILTERS: &[&str] = &[
    "availability-zone",
    "availabilityZone",
    "availability-zone-id",
    "available-ip-address-count",
    "cidr",
    "cidr-block",
    "default-for-az",
    "map-public-ip-on-launch",
    "owner-id",
    "state",
    "subnet-arn",
    "subnet-id",
    "vpc-id",
];

pub(super) fn describe_subnets(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<SubnetId> = p.ids(Kind::Subnet, "SubnetId")?;
    let query = Query::read(call, p, SUBNET_FILTERS, !ids.is_empty(), 1_000)?;
    let subnets: Vec<&Subnet> = named(&ids, state.subnets.iter(), Kind::Subnet)?
        .into_iter()
        .filter(|subnet| {
            query.filters.keep(&subnet.tags, |name| match name {
                "availability-zone" | "availabilityZone" => vec![subnet.zone.name.clone()],
                "availability-zone-id" => vec![subnet.zone.id.clone()],
                "available-ip-address-count" => vec![subnet.pool.available().to_string()],
                "cidr" | "cidr-block" => vec![subnet.cidr.to_string()],
                "default-for-az" => vec!["false".into()],
                "map-public-ip-on-launch" => vec![subnet.public_on_launch.to_string()],
                "owner-id" => vec![state.options.account_id.clone()],
                "state" => vec!["available".into()],
                "subnet-arn" => vec![subnet_arn(state, subnet)],
                "subnet-id" => vec![subnet.id.to_string()],
                "vpc-id" => vec![subnet.vpc.to_string()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, subnets, |subnet| subnet.id.to_string())?;
    let mut xml = Xml::new();
    xml.list("subnetSet", page, |xml, subnet| write_subnet(xml, state, subnet));
    xml.opt("nextToken", token);
    Ok(xml)
}

fn subnet_arn(state: &State, subnet: &Subnet) -> String {
    format!("arn:aws:ec2:{}:{}:subnet/{}", state.options.region, state.options.account_id, subnet.id)
}

fn write_subnet(xml: &mut Xml, state: &State, subnet: &Subnet) {
    xml.leaf("subnetId", &subnet.id)
        .leaf("subnetArn", subnet_arn(state, subnet))
        .leaf("state", "available")
        .leaf("ownerId", &state.options.account_id)
        .leaf("vpcId", &subnet.vpc)
        .leaf("cidrBlock", subnet.cidr)
        .leaf("availableIpAddressCount", subnet.pool.available())
        .leaf("availabilityZone", &subnet.zone.name)
        .leaf("availabilityZoneId", &subnet.zone.id)
        .leaf("defaultForAz", false)
        .leaf("mapPublicIpOnLaunch", subnet.public_on_launch)
        .leaf("assignIpv6AddressOnCreation", false)
        .leaf("ipv6Native", false);
    ipv6::write_subnet(xml, &subnet.id, subnet.ipv6);
    write_tags(xml, &subnet.tags);
}

pub(super) fn create_reservation(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let subnet: SubnetId = p.required_id(Kind::Subnet, "SubnetId")?;
    p.required("Cidr")?;
    let cidr = p.cidr("Cidr")?.ok_or_else(|| ApiError::missing("Cidr"))?;
    let kind = match p.required("ReservationType")? {
        "prefix" => ReservationKind::Prefix,
        "explicit" => ReservationKind::Explicit,
        other => return Err(ApiError::bad_value("reservationType", other)),
    };
    let description = p.text("Description");
    let tags = tag_specification(call, p, "subnet-cidr-reservation")?;
    p.end_or_dry_run()?;
    let reservation = state.create_reservation(&subnet, cidr, kind, description, tags)?;
    let mut xml = Xml::new();
    xml.element("subnetCidrReservation", |xml| write_reservation(xml, state, &subnet, &reservation));
    Ok(xml)
}

pub(super) fn delete_reservation(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = p.required("SubnetCidrReservationId")?;
    Kind::Reservation.check(id)?;
    p.end_or_dry_run()?;
    let (subnet, reservation) = state.delete_reservation(id)?;
    let mut xml = Xml::new();
    xml.element("deletedSubnetCidrReservation", |xml| write_reservation(xml, state, &subnet, &reservation));
    Ok(xml)
}

pub(super) fn get_reservations(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SubnetId = p.required_id(Kind::Subnet, "SubnetId")?;
    let query = Query::read(call, p, &["reservationType", "subnet-id"], false, 1_000)?;
    let subnet = state.subnet(&id)?;
    let reservations: Vec<&Reservation> = subnet
        .reservations
        .values()
        .filter(|reservation| {
            query.filters.keep(&reservation.tags, |name| match name {
                "reservationType" => vec![reservation_type(reservation.kind).to_owned()],
                "subnet-id" => vec![id.to_string()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, reservations, |reservation| reservation.id.clone())?;
    let mut xml = Xml::new();
    xml.list("subnetIpv4CidrReservationSet", page, |xml, reservation| {
        write_reservation(xml, state, &id, reservation);
    });
    xml.texts("subnetIpv6CidrReservationSet", [""; 0]);
    xml.opt("nextToken", token);
    Ok(xml)
}

fn reservation_type(kind: ReservationKind) -> &'static str {
    match kind {
        ReservationKind::Prefix => "prefix",
        ReservationKind::Explicit => "explicit",
    }
}

fn write_reservation(xml: &mut Xml, state: &State, subnet: &SubnetId, reservation: &Reservation) {
    xml.leaf("subnetCidrReservationId", &reservation.id)
        .leaf("subnetId", subnet)
        .leaf("cidr", reservation.cidr)
        .leaf("reservationType", reservation_type(reservation.kind))
        .leaf("ownerId", &state.options.account_id)
        .leaf("description", &reservation.description);
    write_tags(xml, &reservation.tags);
}

pub(super) fn create_gateway(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let tags = tag_specification(call, p, "internet-gateway")?;
    p.end_or_dry_run()?;
    let id = state.create_gateway(tags);
    let gateway = state.gateway(&id)?;
    let mut xml = Xml::new();
    xml.element("internetGateway", |xml| write_gateway(xml, state, gateway));
    Ok(xml)
}

/// Gateway and VPC of attach and detach.
fn gateway_and_vpc<'a>(p: &Reader<'a>) -> Result<(&'a str, VpcId), ApiError> {
    let gateway = p.required("InternetGatewayId")?;
    Kind::Gateway.check(gateway)?;
    let vpc = p.required_id(Kind::Vpc, "VpcId")?;
    p.end_or_dry_run()?;
    Ok((gateway, vpc))
}

pub(super) fn attach_gateway(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let (gateway, vpc) = gateway_and_vpc(p)?;
    state.attach_gateway(gateway, &vpc)?;
    Ok(done())
}

pub(super) fn detach_gateway(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let (gateway, vpc) = gateway_and_vpc(p)?;
    state.detach_gateway(gateway, &vpc)?;
    Ok(done())
}

pub(super) fn delete_gateway(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let gateway = p.required("InternetGatewayId")?;
    Kind::Gateway.check(gateway)?;
    p.end_or_dry_run()?;
    state.delete_gateway(gateway)?;
    Ok(done())
}

const GATEWAY_FILTERS: &[&str] = &["attachment.state", "attachment.vpc-id", "internet-gateway-id", "owner-id"];

pub(super) fn describe_gateways(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids = text_ids(p, Kind::Gateway, "InternetGatewayId")?;
    let query = Query::read(call, p, GATEWAY_FILTERS, !ids.is_empty(), 1_000)?;
    let gateways: Vec<&Gateway> = named(&ids, state.gateways.iter(), Kind::Gateway)?
        .into_iter()
        .filter(|gateway| {
            query.filters.keep(&gateway.tags, |name| match name {
                "attachment.state" => gateway.vpc.iter().map(|_| "available".to_owned()).collect(),
                "attachment.vpc-id" => gateway.vpc.iter().map(ToString::to_string).collect(),
                "internet-gateway-id" => vec![gateway.id.clone()],
                "owner-id" => vec![state.options.account_id.clone()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, gateways, |gateway| gateway.id.clone())?;
    let mut xml = Xml::new();
    xml.list("internetGatewaySet", page, |xml, gateway| write_gateway(xml, state, gateway));
    xml.opt("nextToken", token);
    Ok(xml)
}

fn write_gateway(xml: &mut Xml, state: &State, gateway: &Gateway) {
    xml.leaf("internetGatewayId", &gateway.id).leaf("ownerId", &state.options.account_id);
    xml.list("attachmentSet", &gateway.vpc, |xml, vpc| {
        xml.leaf("vpcId", vpc).leaf("state", "available");
    });
    write_tags(xml, &gateway.tags);
}

pub(super) fn create_peering(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let requester = p.required_id(Kind::Vpc, "VpcId")?;
    let accepter = p.required_id(Kind::Vpc, "PeerVpcId")?;
    let elsewhere = p.opt("PeerRegion").is_some_and(|region| region != state.options.region)
        || p.opt("PeerOwnerId").is_some_and(|owner| owner != state.options.account_id);
    let tags = tag_specification(call, p, "vpc-peering-connection")?;
    p.end_or_dry_run()?;
    if elsewhere {
        return Err(ApiError::new("UnsupportedOperation", "There is one account and one region here."));
    }
    let id = state.request_peering(&requester, &accepter, tags)?;
    write_one_peering(state, &id)
}

fn peering_id<'a>(p: &Reader<'a>) -> Result<&'a str, ApiError> {
    let id = p.required("VpcPeeringConnectionId")?;
    Kind::Peering.check(id)?;
    p.end_or_dry_run()?;
    Ok(id)
}

pub(super) fn accept_peering(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id = peering_id(p)?;
    state.accept_peering(id)?;
    write_one_peering(state, id)
}

pub(super) fn delete_peering(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    state.delete_peering(peering_id(p)?)?;
    Ok(done())
}

const PEERING_FILTERS: &[&str] =
    &["accepter-vpc-info.vpc-id", "requester-vpc-info.vpc-id", "status-code", "vpc-peering-connection-id"];

pub(super) fn describe_peerings(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids = text_ids(p, Kind::Peering, "VpcPeeringConnectionId")?;
    let query = Query::read(call, p, PEERING_FILTERS, !ids.is_empty(), 1_000)?;
    let peerings: Vec<&Peering> = named(&ids, state.peerings.iter(), Kind::Peering)?
        .into_iter()
        .filter(|peering| {
            query.filters.keep(&peering.tags, |name| match name {
                "accepter-vpc-info.vpc-id" => vec![peering.accepter.to_string()],
                "requester-vpc-info.vpc-id" => vec![peering.requester.to_string()],
                "status-code" => vec![peering.status.code().to_owned()],
                "vpc-peering-connection-id" => vec![peering.id.clone()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, peerings, |peering| peering.id.clone())?;
    let mut xml = Xml::new();
    xml.list("vpcPeeringConnectionSet", page, |xml, peering| write_peering(xml, state, peering));
    xml.opt("nextToken", token);
    Ok(xml)
}

fn write_one_peering(state: &State, id: &str) -> Result<Xml, ApiError> {
    let peering = state.peering(id)?;
    let mut xml = Xml::new();
    xml.element("vpcPeeringConnection", |xml| write_peering(xml, state, peering));
    Ok(xml)
}

fn write_peering(xml: &mut Xml, state: &State, peering: &Peering) {
    xml.leaf("vpcPeeringConnectionId", &peering.id);
    for (side, vpc) in [("requesterVpcInfo", &peering.requester), ("accepterVpcInfo", &peering.accepter)] {
        let cidrs = state.vpcs.get(vpc).map(|vpc| vpc.cidrs.as_slice()).unwrap_or_default();
        xml.element(side, |xml| {
            xml.leaf("vpcId", vpc)
                .leaf("ownerId", &state.options.account_id)
                .leaf("region", &state.options.region)
                .opt("cidrBlock", cidrs.first().map(|association| association.cidr));
            xml.list("cidrBlockSet", cidrs, |xml, association| {
                xml.leaf("cidrBlock", association.cidr);
            });
        });
    }
    xml.element("status", |xml| {
        xml.leaf("code", peering.status.code()).leaf("message", peering.status.code());
    });
    write_tags(xml, &peering.tags);
}

fn text_ids(p: &Reader<'_>, kind: Kind, name: &str) -> Result<Vec<String>, ApiError> {
    p.ids(kind, name)
}
