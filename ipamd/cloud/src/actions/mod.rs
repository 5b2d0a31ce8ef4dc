//! The EC2 actions, one file each: a request of the core in, the SDK's call, the core's reply out.

use aws_sdk_ec2::Client;
use flatwire_core::ports::{CloudError, CloudReply, CloudRequest};

use crate::errors;

mod assign_ipv6_addresses;
mod assign_private_ip_addresses;
mod attach_network_interface;
mod create_network_interface;
mod create_tags;
mod delete_network_interface;
mod describe_instance_types;
pub mod describe_network_interfaces;
mod describe_subnets;
mod detach_network_interface;
mod modify_network_interface_attribute;
mod unassign_private_ip_addresses;

pub async fn perform(ec2: &Client, request: &CloudRequest) -> Result<CloudReply, CloudError> {
    match request {
        // Not an EC2 action; `AwsCloud` sends it to IMDS.
        CloudRequest::ReadMetadata => Err(errors::invalid(request.action(), "not an EC2 action".to_owned())),
        CloudRequest::DescribeInstanceType { instance_type } => describe_instance_types::one(ec2, instance_type).await,
        CloudRequest::DescribeNode { instance } => describe_network_interfaces::of_instance(ec2, instance).await,
        CloudRequest::DescribeEni { eni } => describe_network_interfaces::by_id(ec2, eni).await,
        CloudRequest::DescribeUnattached { vpc, tags } => describe_network_interfaces::unattached(ec2, vpc, tags).await,
        CloudRequest::DescribeSubnets { vpc, availability_zone } => {
            describe_subnets::of_zone(ec2, vpc, availability_zone).await
        }
        CloudRequest::CreateEni { subnet, security_groups, want, ipv6_prefix, description, tags, client_token } => {
            let named = create_network_interface::Named { description, tags, client_token };
            create_network_interface::create(ec2, subnet, security_groups, *want, *ipv6_prefix, named).await
        }
        CloudRequest::AttachEni { eni, instance, device, card } => {
            attach_network_interface::attach(ec2, eni, instance, *device, *card).await
        }
        CloudRequest::SetDeleteOnTermination { eni, attachment } => {
            modify_network_interface_attribute::delete_on_termination(ec2, eni, attachment).await
        }
        CloudRequest::SetSecurityGroups { eni, security_groups } => {
            modify_network_interface_attribute::security_groups(ec2, eni, security_groups).await
        }
        CloudRequest::AssignNamed { eni, slots } => assign_private_ip_addresses::assign_named(ec2, eni, slots).await,
        CloudRequest::AssignIpv6Prefix { eni, prefix } => assign_ipv6_addresses::prefix(ec2, eni, *prefix).await,
        CloudRequest::Assign { eni, want } => assign_private_ip_addresses::assign(ec2, eni, *want).await,
        CloudRequest::Unassign { eni, slots } => unassign_private_ip_addresses::unassign(ec2, eni, slots).await,
        CloudRequest::DetachEni { eni: _, attachment } => detach_network_interface::detach(ec2, attachment).await,
        CloudRequest::DeleteEni { eni } => delete_network_interface::delete(ec2, eni).await,
        CloudRequest::TagEni { eni, tags } => create_tags::tag_eni(ec2, eni, tags).await,
    }
}
