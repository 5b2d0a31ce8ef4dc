//! CreateTags on one ENI. Repeating it changes nothing, yet it is sent once like every mutation: the pool paces it.

use std::collections::BTreeMap;

use aws_sdk_ec2::Client;
use flatwire_core::ids::EniId;
use flatwire_core::ports::{CloudError, CloudReply};

use crate::client::once;
use crate::convert::tag_list;
use crate::errors::from_sdk;

const ACTION: &str = "CreateTags";

pub async fn tag_eni(ec2: &Client, eni: &EniId, tags: &BTreeMap<String, String>) -> Result<CloudReply, CloudError> {
    if tags.is_empty() {
        return Ok(CloudReply::Done);
    }
    ec2.create_tags()
        .resources(eni.as_str())
        .set_tags(Some(tag_list(tags)))
        .customize()
        .config_override(once())
        .send()
        .await
        .map_err(|failure| from_sdk(ACTION, failure))?;
    Ok(CloudReply::Done)
}
