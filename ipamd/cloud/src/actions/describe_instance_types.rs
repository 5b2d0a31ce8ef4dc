//! DescribeInstanceTypes for one type: what it can carry.

use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::{InstanceType, InstanceTypeHypervisor};
use flatwire_core::ports::{CloudError, CloudReply, InstanceLimits};

use crate::convert::count;
use crate::errors::{from_sdk, malformed};

const ACTION: &str = "DescribeInstanceTypes";

pub async fn one(ec2: &Client, instance_type: &str) -> Result<CloudReply, CloudError> {
    let answer = ec2
        .describe_instance_types()
        .instance_types(InstanceType::from(instance_type))
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    let missing = |what: &str| malformed(ACTION, format!("the answer has no {what} of {instance_type}"));
    let info = answer
        .instance_types()
        .iter()
        .find(|info| info.instance_type().is_some_and(|name| name.as_str() == instance_type))
        .ok_or_else(|| missing("description"))?;
    let network = info.network_info().ok_or_else(|| missing("networkInfo"))?;
    // Cards have limits of their own; the sum over all cards is no use to somebody who attaches to the default one.
    let default_card = network.default_network_card_index().unwrap_or(0);
    let max_enis = network
        .network_cards()
        .iter()
        .find(|card| card.network_card_index() == Some(default_card))
        .and_then(|card| card.maximum_network_interfaces())
        .or(network.maximum_network_interfaces());
    let limits = InstanceLimits {
        instance_type: instance_type.to_owned(),
        max_enis: count(max_enis),
        ipv4_per_eni: count(network.ipv4_addresses_per_interface()),
        ipv6_per_eni: count(network.ipv6_addresses_per_interface()),
        prefixes: info.hypervisor() == Some(&InstanceTypeHypervisor::Nitro) || info.bare_metal() == Some(true),
    };
    if limits.max_enis == 0 || limits.ipv4_per_eni == 0 {
        return Err(missing("limits"));
    }
    Ok(CloudReply::InstanceType(limits))
}
