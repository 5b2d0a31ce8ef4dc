//! EC2's shapes as the core's. Everything EC2 marks optional is checked here, once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::str::FromStr;

use aws_sdk_ec2::types::AttachmentStatus;
use aws_sdk_ec2::types::{
    Filter, NetworkInterface, NetworkInterfaceAttachment, NetworkInterfaceStatus, NetworkInterfaceType, ResourceType,
    Tag, TagSpecification,
};
use flatwire_core::ids::{AttachmentId, DeviceIndex};
use flatwire_core::ports::{CloudError, EniKind, EniStatus, EniView};
use ipnet::{IpNet, Ipv4Net};

use crate::errors::{invalid, malformed};

/// A field that the answer must have, parsed.
pub fn field<T>(action: &str, name: &str, value: Option<&str>) -> Result<T, CloudError>
where
    T: FromStr,
    T::Err: Display,
{
    let value = value.ok_or_else(|| malformed(action, format!("the answer has no {name}")))?;
    value.parse().map_err(|error| malformed(action, format!("{name} of the answer: {error}")))
}

/// EC2 counts in signed numbers; a negative or missing count is zero.
pub fn count(value: Option<i32>) -> u32 {
    value.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
}

pub fn to_i32(action: &str, value: u32) -> Result<i32, CloudError> {
    i32::try_from(value).map_err(|_| invalid(action, format!("{value} is more than EC2 can be asked for")))
}

pub fn host(address: Ipv4Addr) -> IpNet {
    IpNet::V4(Ipv4Net::from(address))
}

pub fn filter(name: &str, value: impl Into<String>) -> Filter {
    Filter::builder().name(name).values(value).build()
}

pub fn eni(action: &str, from: &NetworkInterface) -> Result<EniView, CloudError> {
    let mut slots = BTreeSet::new();
    for address in from.private_ip_addresses() {
        if address.primary() != Some(true) {
            slots.insert(host(field(action, "privateIpAddress", address.private_ip_address())?));
        }
    }
    for prefix in from.ipv4_prefixes() {
        slots.insert(IpNet::V4(field(action, "ipv4Prefix", prefix.ipv4_prefix())?));
    }
    for prefix in from.ipv6_prefixes() {
        slots.insert(IpNet::V6(field(action, "ipv6Prefix", prefix.ipv6_prefix())?));
    }
    let attachment = from.attachment();
    Ok(EniView {
        id: field(action, "networkInterfaceId", from.network_interface_id())?,
        mac: field(action, "macAddress", from.mac_address())?,
        device: DeviceIndex(count(attachment.and_then(NetworkInterfaceAttachment::device_index))),
        card: count(attachment.and_then(NetworkInterfaceAttachment::network_card_index)),
        subnet: field(action, "subnetId", from.subnet_id())?,
        subnet_cidr: None,
        primary_ipv4: match from.private_ip_address() {
            Some(text) => field(action, "privateIpAddress", Some(text))?,
            None => Ipv4Addr::UNSPECIFIED,
        },
        slots,
        security_groups: from
            .groups()
            .iter()
            .map(|group| field(action, "groupId", group.group_id()))
            .collect::<Result<_, _>>()?,
        attachment: match attachment.and_then(NetworkInterfaceAttachment::attachment_id) {
            Some(id) => Some(field::<AttachmentId>(action, "attachmentId", Some(id))?),
            None => None,
        },
        status: status(from),
        description: from.description().unwrap_or("").to_owned(),
        tags: tag_map(from.tag_set()),
        kind: match from.interface_type() {
            Some(NetworkInterfaceType::Interface) | None => EniKind::Interface,
            Some(NetworkInterfaceType::Trunk) => EniKind::Trunk,
            Some(NetworkInterfaceType::Efa | NetworkInterfaceType::EfaOnly) => EniKind::Efa,
            Some(_) => EniKind::Other,
        },
    })
}

/// The attachment's word counts before the interface's: an ENI is `in-use` from the moment it begins to attach.
fn status(from: &NetworkInterface) -> EniStatus {
    match from.attachment().and_then(NetworkInterfaceAttachment::status) {
        Some(AttachmentStatus::Attaching) => EniStatus::Attaching,
        Some(AttachmentStatus::Attached) => EniStatus::Attached,
        Some(AttachmentStatus::Detaching) => EniStatus::Detaching,
        _ => match from.status() {
            Some(NetworkInterfaceStatus::Attaching) => EniStatus::Attaching,
            Some(NetworkInterfaceStatus::InUse | NetworkInterfaceStatus::Associated) => EniStatus::Attached,
            Some(NetworkInterfaceStatus::Detaching) => EniStatus::Detaching,
            _ => EniStatus::Available,
        },
    }
}

pub fn tag_map(tags: &[Tag]) -> BTreeMap<String, String> {
    tags.iter().filter_map(|tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or("").to_owned()))).collect()
}

pub fn tag_list(tags: &BTreeMap<String, String>) -> Vec<Tag> {
    tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect()
}

/// Tags in the create call itself: saves a CreateTags, and leaves no moment in which the new ENI is nobody's.
pub fn eni_tags(tags: &BTreeMap<String, String>) -> Option<Vec<TagSpecification>> {
    if tags.is_empty() {
        return None;
    }
    let specification = TagSpecification::builder()
        .resource_type(ResourceType::NetworkInterface)
        .set_tags(Some(tag_list(tags)))
        .build();
    Some(vec![specification])
}
