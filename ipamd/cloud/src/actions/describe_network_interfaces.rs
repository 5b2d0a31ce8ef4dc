//! DescribeNetworkInterfaces: the node's ENIs, or one ENI by id.
//!
//! Always filtered and paginated: an account with many ENIs is refused an unpaginated call, and unfiltered ones draw
//! on a smaller token bucket. Pages are not a snapshot; an ENI seen twice counts as seen last.

use std::collections::BTreeMap;

use aws_sdk_ec2::Client;
use flatwire_core::ids::{EniId, InstanceId};
use flatwire_core::ports::{CloudError, CloudReply, EniView};

use crate::client::MAX_PAGES;
use crate::convert::{self, filter};
use crate::errors::{error, from_sdk, malformed};

const ACTION: &str = "DescribeNetworkInterfaces";
/// EC2's largest page.
const PAGE_SIZE: i32 = 1000;

pub async fn of_instance(ec2: &Client, instance: &InstanceId) -> Result<CloudReply, CloudError> {
    let mut pages = ec2
        .describe_network_interfaces()
        .filters(filter("attachment.instance-id", instance.as_str()))
        .into_paginator()
        .page_size(PAGE_SIZE)
        .send();
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
            return Err(malformed(ACTION, format!("more than {MAX_PAGES} pages of ENIs of {instance}")));
        }
    }
    Ok(CloudReply::Node(enis.into_values().collect()))
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
