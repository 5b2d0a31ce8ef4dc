//! ModifyNetworkInterfaceAttribute: an ENI that we attached dies with its instance, so that a lost node leaks nothing; and
//! the security groups of an ENI we made follow those of the node.

use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::NetworkInterfaceAttachmentChanges;
use flatwire_core::ids::{AttachmentId, EniId, SecurityGroupId};
use flatwire_core::ports::{CloudError, CloudReply};

use crate::client::once;
use crate::errors::from_sdk;

const ACTION: &str = "ModifyNetworkInterfaceAttribute";

pub async fn delete_on_termination(
    ec2: &Client,
    eni: &EniId,
    attachment: &AttachmentId,
) -> Result<CloudReply, CloudError> {
    let changes = NetworkInterfaceAttachmentChanges::builder()
        .attachment_id(attachment.as_str())
        .delete_on_termination(true)
        .build();
    ec2.modify_network_interface_attribute()
        .network_interface_id(eni.as_str())
        .attachment(changes)
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Done)
}

pub async fn security_groups(ec2: &Client, eni: &EniId, groups: &[SecurityGroupId]) -> Result<CloudReply, CloudError> {
    ec2.modify_network_interface_attribute()
        .network_interface_id(eni.as_str())
        .set_groups(Some(groups.iter().map(ToString::to_string).collect()))
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Done)
}
