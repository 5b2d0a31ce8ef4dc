//! DeleteNetworkInterface of a detached ENI. EC2 refuses while the detach is under way (class `Busy`).

use aws_sdk_ec2::Client;
use flatwire_core::ids::EniId;
use flatwire_core::ports::{CloudError, CloudReply};

use crate::client::once;
use crate::errors::from_sdk;

const ACTION: &str = "DeleteNetworkInterface";

pub async fn delete(ec2: &Client, eni: &EniId) -> Result<CloudReply, CloudError> {
    ec2.delete_network_interface()
        .network_interface_id(eni.as_str())
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Done)
}
