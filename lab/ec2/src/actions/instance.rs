//! RunInstances, TerminateInstances, DescribeInstances.

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, SubnetId};
use flatwire_core::limits::{self, Hypervisor};

use super::eni::{write_common, write_groups};
use super::{Call, Query, group_ids, ipv6, moment, named, tag_specifications, wanted, write_tags};
use crate::error::{ApiError, Kind};
use crate::params::Reader;
use crate::state::State;
use crate::state::eni::Wanted;
use crate::state::instance::{Instance, Interface, Launch};
use crate::view::{EniInfo, InstanceState};
use crate::xml::Xml;

/// Instances in one launch.
const LAUNCH_MAX: u32 = 100;

/// Parameters that have no meaning without disks, keys, markets and placement.
const MEANINGLESS: &[&str] = &[
    "BlockDeviceMapping",
    "CapacityReservationSpecification",
    "CpuOptions",
    "CreditSpecification",
    "DisableApiStop",
    "DisableApiTermination",
    "EbsOptimized",
    "EnclaveOptions",
    "HibernationOptions",
    "InstanceInitiatedShutdownBehavior",
    "InstanceMarketOptions",
    "KernelId",
    "LicenseSpecification",
    "MaintenanceOptions",
    "MetadataOptions",
    "Monitoring",
    "NetworkPerformanceOptions",
    "Placement",
    "PrivateDnsNameOptions",
    "RamdiskId",
];

pub(super) fn run(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let image = p.required("ImageId")?.to_owned();
    let instance_type = p.opt("InstanceType").unwrap_or("m1.small").to_owned();
    p.required("MinCount")?;
    p.required("MaxCount")?;
    let (min, max) = (p.count("MinCount")?.unwrap_or(1), p.count("MaxCount")?.unwrap_or(1));
    if min > max {
        return Err(ApiError::combination("The value of MinCount must not exceed that of MaxCount."));
    }
    if max > LAUNCH_MAX {
        return Err(ApiError::new("InstanceLimitExceeded", format!("At most {LAUNCH_MAX} instances in one request.")));
    }
    let interfaces = interfaces(p)?;
    let mut tags = tag_specifications(call, p, &["instance", "network-interface"])?;
    let (eni_tags, tags) = (tags.remove(1), tags.remove(0));
    let role = p
        .opt("IamInstanceProfile.Name")
        .or_else(|| p.opt("IamInstanceProfile.Arn").map(|arn| arn.rsplit('/').next().unwrap_or(arn)));
    let launch = Launch {
        image,
        instance_type,
        min,
        max,
        interfaces,
        tags,
        eni_tags,
        hop_limit: p.number("MetadataOptions.HttpPutResponseHopLimit")?.unwrap_or(1),
        tokens_required: p.opt("MetadataOptions.HttpTokens") != Some("optional"),
        role: role.map(str::to_owned),
        client_token: p.opt("ClientToken").map(str::to_owned),
        key_name: p.opt("KeyName").map(str::to_owned),
        user_data: p.opt("UserData").map(str::to_owned),
    };
    p.ignore(MEANINGLESS);
    p.end_or_dry_run()?;
    let fingerprint = format!("{launch:?}");
    let token = launch.client_token.as_deref();
    let ids: Vec<InstanceId> = match state.recall(call.action, token, &fingerprint)? {
        Some(known) => known.into_iter().filter_map(|id| InstanceId::new(id).ok()).collect(),
        None => {
            let ids = state.launch(call.now, &launch)?;
            state.remember(call.action, token, fingerprint, ids.iter().map(ToString::to_string).collect());
            ids
        }
    };
    let instances: Vec<&Instance> = ids.iter().filter_map(|id| state.instances.get(id)).collect();
    let mut xml = Xml::new();
    write_reservation(&mut xml, state, &instances);
    Ok(xml)
}

/// The interfaces of a launch: as listed, or the one that subnet, groups and address of the instance describe.
fn interfaces(p: &Reader<'_>) -> Result<Vec<Interface>, ApiError> {
    let listed = p.structs("NetworkInterface")?;
    let subnet: Option<SubnetId> = p.opt_id(Kind::Subnet, "SubnetId")?;
    let groups = group_ids(p)?;
    if listed.is_empty() {
        return Ok(vec![Interface {
            device: DeviceIndex::PRIMARY,
            card: 0,
            existing: None,
            subnet,
            groups,
            description: String::new(),
            primary: p.address("PrivateIpAddress")?,
            wanted: Wanted { ipv6: ipv6::wanted(p)?, ..Wanted::default() },
            public: None,
            delete_on_termination: true,
            interface_type: "interface".to_owned(),
        }]);
    }
    if subnet.is_some() || !groups.is_empty() {
        return Err(ApiError::combination(
            "Network interfaces and an instance-level subnet ID or security groups may not be specified on the same \
             request",
        ));
    }
    listed.iter().map(interface).collect()
}

fn interface(p: &Reader<'_>) -> Result<Interface, ApiError> {
    let existing: Option<EniId> = p.opt_id(Kind::Interface, "NetworkInterfaceId")?;
    let (primary, wanted) = wanted(p)?;
    p.ignore(&["ConnectionTrackingSpecification", "EnaSrdSpecification", "EnaQueueCount"]);
    Ok(Interface {
        device: DeviceIndex(p.number("DeviceIndex")?.unwrap_or(0)),
        card: p.number("NetworkCardIndex")?.unwrap_or(0),
        subnet: p.opt_id(Kind::Subnet, "SubnetId")?,
        groups: group_ids(p)?,
        description: p.text("Description"),
        primary,
        wanted,
        public: p.bool("AssociatePublicIpAddress")?,
        // An ENI that was there before outlives the instance, unless it is said to go.
        delete_on_termination: p.bool("DeleteOnTermination")?.unwrap_or(existing.is_none()),
        interface_type: p.opt("InterfaceType").unwrap_or("interface").to_owned(),
        existing,
    })
}

pub(super) fn terminate(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<InstanceId> = p.ids(Kind::Instance, "InstanceId")?;
    p.ignore(&["Force", "SkipOsShutdown"]);
    p.end_or_dry_run()?;
    if ids.is_empty() {
        return Err(ApiError::missing("InstanceId"));
    }
    for id in &ids {
        state.instance(id)?;
    }
    let mut changes = Vec::new();
    for id in &ids {
        changes.push((id, state.terminate(call.now, id)?));
    }
    let mut xml = Xml::new();
    xml.list("instancesSet", changes, |xml, (id, (before, after))| {
        xml.leaf("instanceId", id);
        xml.element("currentState", |xml| write_state(xml, after));
        xml.element("previousState", |xml| write_state(xml, before));
    });
    Ok(xml)
}

const FILTERS: &[&str] = &[
    "availability-zone",
    "availability-zone-id",
    "architecture",
    "client-token",
    "image-id",
    "instance-id",
    "instance-state-code",
    "instance-state-name",
    "instance-type",
    "instance.group-id",
    "key-name",
    "network-interface.addresses.private-ip-address",
    "network-interface.attachment.attachment-id",
    "network-interface.attachment.device-index",
    "network-interface.mac-address",
    "network-interface.network-interface-id",
    "network-interface.subnet-id",
    "owner-id",
    "private-dns-name",
    "private-ip-address",
    "reservation-id",
    "subnet-id",
    "vpc-id",
];

pub(super) fn describe(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<InstanceId> = p.ids(Kind::Instance, "InstanceId")?;
    p.ignore(&["IncludeManagedResources"]);
    let query = Query::read(call, p, FILTERS, !ids.is_empty(), 1_000)?;
    let instances = named(&ids, state.instances.iter(), Kind::Instance)?;
    let instances: Vec<&Instance> = instances
        .into_iter()
        .filter(|instance| query.filters.keep(&instance.info.tags, |name| field(state, instance, name)))
        .collect();
    let (page, token) = query.cut(state, call, instances, |instance| instance.info.id.to_string())?;
    let mut reservations: Vec<(&str, Vec<&Instance>)> = Vec::new();
    for instance in page {
        match reservations.iter_mut().find(|(id, _)| *id == instance.reservation) {
            Some((_, members)) => members.push(instance),
            None => reservations.push((&instance.reservation, vec![instance])),
        }
    }
    let mut xml = Xml::new();
    xml.list("reservationSet", reservations, |xml, (_, members)| write_reservation(xml, state, &members));
    xml.opt("nextToken", token);
    Ok(xml)
}

fn enis_of<'a>(state: &'a State, instance: &Instance) -> Vec<&'a EniInfo> {
    let mut enis: Vec<_> = state.enis().values().filter(|eni| eni.is_on(&instance.info.id)).collect();
    enis.sort_by_key(|eni| eni.attachment.as_ref().map(|a| (a.card, a.device)));
    enis
}

fn field(state: &State, instance: &Instance, name: &str) -> Vec<String> {
    let info = &instance.info;
    let enis = enis_of(state, instance);
    let of_enis = |f: &dyn Fn(&EniInfo) -> Vec<String>| enis.iter().flat_map(|eni| f(eni)).collect::<Vec<_>>();
    let primary = enis.first().map(|eni| eni.primary_ipv4);
    match name {
        "availability-zone" => vec![info.availability_zone.clone()],
        "availability-zone-id" => state.subnets.get(&info.subnet).map(|s| s.zone.id.clone()).into_iter().collect(),
        "architecture" => architecture(&info.instance_type).map(str::to_owned).into_iter().collect(),
        "client-token" => instance.client_token.clone().into_iter().collect(),
        "image-id" => vec![info.image.clone()],
        "instance-id" => vec![info.id.to_string()],
        "instance-state-code" => vec![info.state.code().to_string()],
        "instance-state-name" => vec![info.state.to_string()],
        "instance-type" => vec![info.instance_type.clone()],
        "instance.group-id" => of_enis(&|eni| eni.security_groups.iter().map(ToString::to_string).collect()),
        "key-name" => instance.key_name.clone().into_iter().collect(),
        "network-interface.addresses.private-ip-address" => {
            of_enis(&|eni| eni.secondary.iter().chain([&eni.primary_ipv4]).map(ToString::to_string).collect())
        }
        "network-interface.attachment.attachment-id" => {
            of_enis(&|eni| eni.attachment.iter().map(|a| a.id.to_string()).collect())
        }
        "network-interface.attachment.device-index" => {
            of_enis(&|eni| eni.attachment.iter().map(|a| a.device.to_string()).collect())
        }
        "network-interface.mac-address" => of_enis(&|eni| vec![eni.mac.to_string()]),
        "network-interface.network-interface-id" => of_enis(&|eni| vec![eni.id.to_string()]),
        "network-interface.subnet-id" => of_enis(&|eni| vec![eni.subnet.to_string()]),
        "owner-id" => vec![state.options.account_id.clone()],
        "private-dns-name" => primary.map(|address| state.private_dns(address)).into_iter().collect(),
        "private-ip-address" => primary.map(|address| address.to_string()).into_iter().collect(),
        "reservation-id" => vec![instance.reservation.clone()],
        "subnet-id" => vec![info.subnet.to_string()],
        "vpc-id" => vec![info.vpc.to_string()],
        _ => Vec::new(),
    }
}

fn architecture(instance_type: &str) -> Option<&'static str> {
    limits::lookup(instance_type)?.architectures.last().copied()
}

fn write_state(xml: &mut Xml, state: InstanceState) {
    xml.leaf("code", state.code()).leaf("name", state);
}

fn write_reservation(xml: &mut Xml, state: &State, members: &[&Instance]) {
    let id = members.first().map(|instance| &instance.reservation);
    xml.opt("reservationId", id).leaf("ownerId", &state.options.account_id);
    xml.texts("groupSet", [""; 0]);
    xml.list("instancesSet", members, |xml, instance| write_instance(xml, state, instance));
}

fn write_instance(xml: &mut Xml, state: &State, instance: &Instance) {
    let info = &instance.info;
    let enis = enis_of(state, instance);
    // A terminated instance has lost its interfaces, and with them address, subnet and VPC.
    let primary = enis.first();
    let kind = limits::lookup(&info.instance_type);
    xml.leaf("instanceId", &info.id).leaf("imageId", &info.image);
    xml.element("instanceState", |xml| write_state(xml, info.state));
    xml.leaf("privateDnsName", primary.map(|eni| state.private_dns(eni.primary_ipv4)).unwrap_or_default())
        .leaf("dnsName", "")
        .opt("keyName", instance.key_name.as_ref())
        .leaf("amiLaunchIndex", instance.launch_index)
        .leaf("instanceType", &info.instance_type)
        .leaf("launchTime", moment(info.launched_at));
    xml.element("placement", |xml| {
        xml.leaf("availabilityZone", &info.availability_zone)
            .opt("availabilityZoneId", state.subnets.get(&info.subnet).map(|subnet| &subnet.zone.id))
            .leaf("groupName", "")
            .leaf("tenancy", "default");
    });
    xml.element("monitoring", |xml| {
        xml.leaf("state", "disabled");
    });
    if let Some(eni) = primary {
        xml.leaf("subnetId", &info.subnet).leaf("vpcId", &info.vpc).leaf("privateIpAddress", eni.primary_ipv4);
        xml.opt("ipAddress", eni.public.get(&eni.primary_ipv4));
        xml.leaf("sourceDestCheck", eni.source_dest_check);
        write_groups(xml, state, &eni.security_groups);
    }
    let hypervisor = kind.map_or("nitro", |kind| if kind.hypervisor == Hypervisor::Xen { "xen" } else { "nitro" });
    xml.opt("architecture", architecture(&info.instance_type))
        .leaf("rootDeviceType", "ebs")
        .leaf("rootDeviceName", "/dev/xvda")
        .leaf("virtualizationType", "hvm")
        .opt("clientToken", instance.client_token.as_ref())
        .leaf("hypervisor", hypervisor)
        .leaf("ebsOptimized", false)
        .leaf("enaSupport", true);
    if let Some(role) = &info.role {
        xml.element("iamInstanceProfile", |xml| {
            xml.leaf("arn", format!("arn:aws:iam::{}:instance-profile/{role}", state.options.account_id))
                .leaf("id", "AIPALAB00000000000000");
        });
    }
    xml.element("metadataOptions", |xml| {
        xml.leaf("state", "applied")
            .leaf("httpTokens", if instance.tokens_required { "required" } else { "optional" })
            .leaf("httpPutResponseHopLimit", info.hop_limit)
            .leaf("httpEndpoint", "enabled");
    });
    xml.list("networkInterfaceSet", enis, |xml, eni| {
        xml.leaf("networkInterfaceId", &eni.id).leaf("subnetId", &eni.subnet).leaf("vpcId", &eni.vpc);
        write_common(xml, state, eni);
        if let Some(a) = &eni.attachment {
            xml.element("attachment", |xml| {
                xml.leaf("attachmentId", &a.id)
                    .leaf("deviceIndex", a.device)
                    .leaf("networkCardIndex", a.card)
                    .leaf("status", a.state)
                    .leaf("attachTime", moment(a.attached_at))
                    .leaf("deleteOnTermination", a.delete_on_termination);
            });
        }
    });
    write_tags(xml, &info.tags);
}
