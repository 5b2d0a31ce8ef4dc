//! AssignPrivateIpAddresses by count (single addresses or /28 prefixes, never both) or by name.
//!
//! AllowReassignment is never sent: its default, off, is the fence that keeps this node from taking another one's
//! address.

use std::collections::BTreeSet;

use aws_sdk_ec2::Client;
use aws_sdk_ec2::operation::assign_private_ip_addresses::AssignPrivateIpAddressesOutput;
use flatwire_core::ids::EniId;
use flatwire_core::ports::{CloudError, CloudReply, Want};
use ipnet::IpNet;

use super::unassign_private_ip_addresses::split;
use crate::client::once;
use crate::convert::{field, host, to_i32};
use crate::errors::{for_want, from_sdk};

const ACTION: &str = "AssignPrivateIpAddresses";

/// The reply is what EC2 says it assigned by this call. moto and LocalStack answer with everything the ENI holds;
/// that is their error and not corrected here, since the correction would lose addresses of a faithful answer.
pub async fn assign(ec2: &Client, eni: &EniId, want: Want) -> Result<CloudReply, CloudError> {
    let call = ec2.assign_private_ip_addresses().network_interface_id(eni.as_str());
    let call = match want {
        Want::Addresses(n) => call.secondary_private_ip_address_count(to_i32(ACTION, n)?),
        Want::Prefixes(n) => call.ipv4_prefix_count(to_i32(ACTION, n)?),
    };
    let answer = call
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| for_want(want, from_sdk(ACTION, failure)))?;
    Ok(CloudReply::Assigned(assigned(&answer)?))
}

/// Gives the ENI these very addresses and prefixes; EC2 refuses if one of them is somebody else's. Addresses in one call and
/// prefixes in another, as for Unassign: EC2 does not say that it takes both kinds at once.
pub async fn assign_named(ec2: &Client, eni: &EniId, slots: &BTreeSet<IpNet>) -> Result<CloudReply, CloudError> {
    let (addresses, prefixes) = split(ACTION, slots)?;
    let mut given = BTreeSet::new();
    let call = || ec2.assign_private_ip_addresses().network_interface_id(eni.as_str());
    let by_name = [call().set_private_ip_addresses(texts(&addresses)), call().set_ipv4_prefixes(texts(&prefixes))];
    for call in by_name {
        if call.get_private_ip_addresses().is_none() && call.get_ipv4_prefixes().is_none() {
            continue;
        }
        let answer = call.customize().config_override(once()).send().await;
        given.extend(assigned(&answer.map_err(|failure| from_sdk(ACTION, failure))?)?);
    }
    Ok(CloudReply::Assigned(given))
}

fn texts<T: ToString>(list: &[T]) -> Option<Vec<String>> {
    (!list.is_empty()).then(|| list.iter().map(ToString::to_string).collect())
}

fn assigned(answer: &AssignPrivateIpAddressesOutput) -> Result<BTreeSet<IpNet>, CloudError> {
    let mut assigned = BTreeSet::new();
    for address in answer.assigned_private_ip_addresses() {
        assigned.insert(host(field(ACTION, "privateIpAddress", address.private_ip_address())?));
    }
    for prefix in answer.assigned_ipv4_prefixes() {
        assigned.insert(IpNet::V4(field(ACTION, "ipv4Prefix", prefix.ipv4_prefix())?));
    }
    Ok(assigned)
}
