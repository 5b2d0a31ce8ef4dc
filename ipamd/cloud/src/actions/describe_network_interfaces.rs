//! DescribeNetworkInterfaces: the node's ENIs, one ENI by id, or ENIs that were made for a node and belong to none.
//!
//! Always filtered and paginated: an account with many ENIs is refused an unpaginated call, and unfiltered ones draw
//! on a smaller token bucket. Pages are not a snapshot; an ENI seen twice counts as seen last.

use std::collections::BTreeMap;

use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::Filter;
use flatwire_core::ids::{EniId, InstanceId, VpcId};
use flatwire_core::ports::{CloudError, CloudReply, EniView};

use crate::client::MAX_PAGES;
use crate::convert::{self, filter};
use crate::errors::{error, from_sdk, malformed};

const ACTION: &str = "DescribeNetworkInterfaces";
/// EC2's largest page.
const PAGE_SIZE: i32 = 1000;
/// The tag of every ENI that an IPAM makes: its value is the instance it was made for.
pub const NODE_TAG: &str = "node.k8s.amazonaws.com/instance_id";

pub async fn of_instance(ec2: &Client, instance: &InstanceId) -> Result<CloudReply, CloudError> {
    all(ec2, vec![filter("attachment.instance-id", instance.as_str())], &format!("ENIs of {instance}")).await
}

/// ENIs that an IPAM made and that belong to no instance, narrowed by tags.
pub async fn unattached(ec2: &Client, vpc: &VpcId, tags: &BTreeMap<String, String>) -> Result<CloudReply, CloudError> {
    let mut filters = vec![filter("status", "available"), filter("vpc-id", vpc.as_str()), filter("tag-key", NODE_TAG)];
    filters.extend(tags.iter().map(|(key, value)| filter(&format!("tag:{key}"), value)));
    all(ec2, filters, &format!("unattached ENIs of {vpc}")).await
}

/// Every page, or an error: part of a list is never taken for the whole.
async fn all(ec2: &Client, filters: Vec<Filter>, what: &str) -> Result<CloudReply, CloudError> {
    let mut pages =
        ec2.describe_network_interfaces().set_filters(Some(filters)).into_paginator().page_size(PAGE_SIZE).send();
    let mut enis: BTreeMap<EniId, EniView> = BTreeMap::new();
    let mut seen = 0;
    while let Some(page) = pages.next().await {
        let page = page.map_err(|failure| from_sdk(ACTION, failure))?;
        for eni in page.network_interfaces() {
            let eni = convert::eni(ACTION, eni)?;
            enis.insert(eni.id.clone(), eni);
        }
        seen += 1;
        if seen == MAX_PAGES && page.next_token().is_some_and(|token| !token.is_empty()) {
            return Err(malformed(ACTION, format!("more than {MAX_PAGES} pages of {what}")));
        }
    }
    Ok(CloudReply::Enis(enis.into_values().collect()))
}

pub async fn by_id(ec2: &Client, eni: &EniId) -> Result<CloudReply, CloudError> {
    let answer = ec2
        .describe_network_interfaces()
        .network_interface_ids(eni.as_str())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    match answer.network_interfaces().iter().find(|found| found.network_interface_id() == Some(eni.as_str())) {
        Some(found) => Ok(CloudReply::Eni(convert::eni(ACTION, found)?)),
        None => Err(error(ACTION, "InvalidNetworkInterfaceID.NotFound", format!("{eni} is not in EC2's answer"))),
    }
}
