//! UnassignPrivateIpAddresses: single addresses in one call, prefixes in another.
//!
//! Two calls because EC2 does not say that it takes both kinds at once. If the second fails the first has happened; the
//! caller re-reads the ENI after any failure, so nothing is undone.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use aws_sdk_ec2::Client;
use flatwire_core::ids::EniId;
use flatwire_core::ports::{CloudError, CloudReply};
use ipnet::{IpNet, Ipv4Net};

use crate::client::once;
use crate::errors::{from_sdk, invalid};

const ACTION: &str = "UnassignPrivateIpAddresses";
/// The only prefix length EC2 delegates in IPv4.
const PREFIX_LEN: u8 = 28;

pub async fn unassign(ec2: &Client, eni: &EniId, slots: &BTreeSet<IpNet>) -> Result<CloudReply, CloudError> {
    let (addresses, prefixes) = split(ACTION, slots)?;
    if !addresses.is_empty() {
        ec2.unassign_private_ip_addresses()
            .network_interface_id(eni.as_str())
            .set_private_ip_addresses(Some(addresses.iter().map(ToString::to_string).collect()))
            .customize()
            .config_override(once())
            .send()
            .await
            .map_err(|failure| from_sdk(ACTION, failure))?;
    }
    if !prefixes.is_empty() {
        ec2.unassign_private_ip_addresses()
            .network_interface_id(eni.as_str())
            .set_ipv4_prefixes(Some(prefixes.iter().map(ToString::to_string).collect()))
            .customize()
            .config_override(once())
            .send()
            .await
            .map_err(|failure| from_sdk(ACTION, failure))?;
    }
    Ok(CloudReply::Done)
}

/// Addresses and prefixes apart, as EC2 takes them.
pub fn split(action: &str, slots: &BTreeSet<IpNet>) -> Result<(Vec<Ipv4Addr>, Vec<Ipv4Net>), CloudError> {
    let mut addresses = Vec::new();
    let mut prefixes = Vec::new();
    for slot in slots {
        match slot {
            IpNet::V4(net) if net.prefix_len() == net.max_prefix_len() => addresses.push(net.addr()),
            IpNet::V4(net) if net.prefix_len() == PREFIX_LEN => prefixes.push(*net),
            other => return Err(invalid(action, format!("{other} is neither an IPv4 address nor a /28"))),
        }
    }
    Ok((addresses, prefixes))
}
