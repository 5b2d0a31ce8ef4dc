//! AttachNetworkInterface. The ENI is `attaching` when this returns; the link appears on the node later, or never.

use aws_sdk_ec2::Client;
use flatwire_core::ids::{DeviceIndex, EniId, InstanceId};
use flatwire_core::ports::{CloudError, CloudReply};

use crate::client::once;
use crate::convert::{field, to_i32};
use crate::errors::from_sdk;

const ACTION: &str = "AttachNetworkInterface";

pub async fn attach(
    ec2: &Client,
    eni: &EniId,
    instance: &InstanceId,
    device: DeviceIndex,
    card: u32,
) -> Result<CloudReply, CloudError> {
    let answer = ec2
        .attach_network_interface()
        .network_interface_id(eni.as_str())
        .instance_id(instance.as_str())
        .device_index(to_i32(ACTION, device.0)?)
        // Sent even when it is 0: without it EC2 takes the device index for taken on types with several cards.
        .network_card_index(to_i32(ACTION, card)?)
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Attached { attachment: field(ACTION, "attachmentId", answer.attachment_id())? })
}
