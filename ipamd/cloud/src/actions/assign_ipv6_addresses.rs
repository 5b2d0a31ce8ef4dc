//! AssignIpv6Addresses: one /80 for an ENI, any one or a named one. It has no client token: after a lost reply the ENI is read.

use std::collections::BTreeSet;

use aws_sdk_ec2::Client;
use flatwire_core::ids::EniId;
use flatwire_core::ports::{CloudError, CloudReply};
use ipnet::{IpNet, Ipv6Net};

use crate::client::once;
use crate::convert::field;
use crate::errors::from_sdk;

const ACTION: &str = "AssignIpv6Addresses";

pub async fn prefix(ec2: &Client, eni: &EniId, prefix: Option<Ipv6Net>) -> Result<CloudReply, CloudError> {
    let call = ec2.assign_ipv6_addresses().network_interface_id(eni.as_str());
    let call = match prefix {
        Some(prefix) => call.ipv6_prefixes(prefix.to_string()),
        None => call.ipv6_prefix_count(1),
    };
    let answer = call.customize().config_override(once()).send().await.map_err(|failure| from_sdk(ACTION, failure))?;
    let assigned: Result<BTreeSet<IpNet>, CloudError> = answer
        .assigned_ipv6_prefixes()
        .iter()
        .map(|text| field(ACTION, "assignedIpv6Prefix", Some(text.as_str())).map(IpNet::V6))
        .collect();
    Ok(CloudReply::Assigned(assigned?))
}
