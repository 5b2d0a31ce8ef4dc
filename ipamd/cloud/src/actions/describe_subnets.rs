//! DescribeSubnets of one VPC and zone, with their tags and free addresses.

use aws_sdk_ec2::Client;
use flatwire_core::ids::VpcId;
use flatwire_core::ports::{CloudError, CloudReply, SubnetView};

use crate::client::MAX_PAGES;
use crate::convert::{count, field, filter, tag_map};
use crate::errors::{from_sdk, malformed};

const ACTION: &str = "DescribeSubnets";
/// A VPC holds 200 subnets unless its quota was raised.
const PAGE_SIZE: i32 = 200;

pub async fn of_zone(ec2: &Client, vpc: &VpcId, availability_zone: &str) -> Result<CloudReply, CloudError> {
    let mut pages = ec2
        .describe_subnets()
        .filters(filter("vpc-id", vpc.as_str()))
        .filters(filter("availability-zone", availability_zone))
        .into_paginator()
        .page_size(PAGE_SIZE)
        .send();
    let mut subnets = Vec::new();
    let mut seen = 0;
    while let Some(page) = pages.next().await {
        let page = page.map_err(|failure| from_sdk(ACTION, failure))?;
        for subnet in page.subnets() {
            // An IPv6-only subnet has no IPv4 block and nothing to give to an IPv4 pool.
            let Some(cidr) = subnet.cidr_block().filter(|cidr| !cidr.is_empty()) else { continue };
            subnets.push(SubnetView {
                id: field(ACTION, "subnetId", subnet.subnet_id())?,
                cidr: field(ACTION, "cidrBlock", Some(cidr))?,
                free_addresses: count(subnet.available_ip_address_count()),
                tags: tag_map(subnet.tags()),
            });
        }
        seen += 1;
        if seen == MAX_PAGES && page.next_token().is_some_and(|token| !token.is_empty()) {
            return Err(malformed(ACTION, format!("more than {MAX_PAGES} pages of subnets of {vpc}")));
        }
    }
    Ok(CloudReply::Subnets(subnets))
}
