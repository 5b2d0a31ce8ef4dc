//! DetachNetworkInterface, never with Force: a forced detach can leave the instance with a dead device.

use aws_sdk_ec2::Client;
use flatwire_core::ids::AttachmentId;
use flatwire_core::ports::{CloudError, CloudReply};

use crate::client::once;
use crate::errors::from_sdk;

const ACTION: &str = "DetachNetworkInterface";

/// EC2 wants only the attachment; the ENI stands in the core's request for those who read it.
pub async fn detach(ec2: &Client, attachment: &AttachmentId) -> Result<CloudReply, CloudError> {
    ec2.detach_network_interface()
        .attachment_id(attachment.as_str())
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Done)
}
