//! CreateNetworkInterface, with addresses, groups, description and tags in the one call.

use std::collections::BTreeMap;

use aws_sdk_ec2::Client;
use flatwire_core::ids::{SecurityGroupId, SubnetId};
use flatwire_core::ports::{CloudError, CloudReply, Want};

use crate::client::once;
use crate::convert::{self, eni_tags, to_i32};
use crate::errors::{for_want, from_sdk, malformed};

const ACTION: &str = "CreateNetworkInterface";

/// What tells the new ENI from others.
pub struct Named<'a> {
    pub description: &'a str,
    pub tags: &'a BTreeMap<String, String>,
    pub client_token: &'a str,
}

pub async fn create(
    ec2: &Client,
    subnet: &SubnetId,
    security_groups: &[SecurityGroupId],
    want: Want,
    ipv6_prefix: bool,
    named: Named<'_>,
) -> Result<CloudReply, CloudError> {
    let call = ec2
        .create_network_interface()
        .subnet_id(subnet.as_str())
        .set_groups(Some(security_groups.iter().map(ToString::to_string).collect()))
        .description(named.description)
        .set_tag_specifications(eni_tags(named.tags))
        .client_token(named.client_token);
    // A count of zero is refused by EC2; an ENI with its primary address only is asked for by naming no count.
    let call = match want {
        Want::Addresses(0) | Want::Prefixes(0) => call,
        Want::Addresses(n) => call.secondary_private_ip_address_count(to_i32(ACTION, n)?),
        Want::Prefixes(n) => call.ipv4_prefix_count(to_i32(ACTION, n)?),
    };
    let call = if ipv6_prefix { call.ipv6_prefix_count(1) } else { call };
    let answer = call
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| for_want(want, from_sdk(ACTION, failure)))?;
    let created =
        answer.network_interface().ok_or_else(|| malformed(ACTION, "the answer has no networkInterface".to_owned()))?;
    Ok(CloudReply::Created(convert::eni(ACTION, created)?))
}
