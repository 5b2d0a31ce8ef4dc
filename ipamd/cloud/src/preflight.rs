//! What a preflight asks: whether IAM lets this node do what the daemon does, and how its metadata service is set. Nothing
//! here changes anything.
//!
//! Each action is asked with DryRun, which EC2 answers once it has looked at the policies and before it does anything. Two
//! actions know no DryRun, AssignPrivateIpAddresses and UnassignPrivateIpAddresses: they are asked for the first address
//! of the subnet, which EC2 gives to nobody, and a refusal of that value has passed the policies.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use aws_sdk_ec2::Client;
use aws_sdk_ec2::config::http::HttpResponse;
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::types::HttpTokensState;
use flatwire_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId};
use flatwire_core::ports::{CloudError, CloudReply, EniView};
use futures_util::{StreamExt, stream};

use crate::AwsCloud;
use crate::actions::describe_network_interfaces::{NODE_TAG, of_instance};
use crate::client::once;
use crate::convert::{count, eni_tags, tag_list};
use crate::errors::{from_sdk, malformed, timeout};

/// Every EC2 action the daemon uses.
pub const ACTIONS: [&str; 11] = [
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "CreateTags",
    "DeleteNetworkInterface",
    "DescribeInstanceTypes",
    "DescribeNetworkInterfaces",
    "DescribeSubnets",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "UnassignPrivateIpAddresses",
];
/// Called besides where pods have IPv6 addresses.
pub const IPV6_ACTION: &str = "AssignIpv6Addresses";
const PARALLEL_PROBES: usize = 4;

/// Whether this node may call one action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permission {
    pub action: &'static str,
    pub outcome: PermissionOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PermissionOutcome {
    Allowed,
    /// With EC2's own words, which name the principal and what is missing.
    Denied {
        message: String,
    },
    /// EC2 could not be asked, or gave an answer that says nothing about permissions.
    Unknown {
        why: String,
    },
}

/// The metadata service as far as it can be seen from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataService {
    /// It gave a session token and said which instance this is. A token's answer that dies on the way, because this program
    /// is further away than the hop limit, shows as a `Timeout` here.
    pub instance: Result<InstanceId, CloudError>,
    /// How it is set, by EC2 DescribeInstances: the one action that only a preflight uses.
    pub options: Result<MetadataOptions, CloudError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataOptions {
    /// Hops that the answer with the token may travel: 1 for the host itself, 2 for a container behind a bridge.
    pub hop_limit: u32,
    /// IMDSv1 is off.
    pub tokens_required: bool,
}

/// What the questions are about: this node, and an ENI of it.
struct Subject {
    instance: InstanceId,
    subnet: SubnetId,
    eni: EniId,
    security_groups: Vec<SecurityGroupId>,
    attachment: Option<AttachmentId>,
    tags: BTreeMap<String, String>,
    /// An address of the subnet that EC2 gives to nobody.
    reserved: Ipv4Addr,
}

impl AwsCloud {
    /// For each EC2 action the daemon uses, whether this node may call it. Changes nothing; as many calls as actions.
    pub async fn permissions(&self, ipv6: bool) -> Vec<Permission> {
        let subject = self.in_time("DescribeNetworkInterfaces", self.subject()).await;
        let actions = ACTIONS.into_iter().chain(ipv6.then_some(IPV6_ACTION));
        let probes = stream::iter(actions).map(|action| {
            let subject = &subject;
            async move {
                let probe = async { Ok(probe(self.ec2.client(action).await?, action, subject.as_ref()).await) };
                let outcome = self.in_time(action, probe).await;
                let unknown = |error: CloudError| PermissionOutcome::Unknown { why: error.to_string() };
                Permission { action, outcome: outcome.unwrap_or_else(unknown) }
            }
        });
        probes.buffered(PARALLEL_PROBES).collect().await
    }

    /// How the metadata service answers and is set.
    pub async fn metadata_service(&self) -> MetadataService {
        let instance = self.in_time("ImdsRead", self.imds.instance()).await;
        let options = match &instance {
            Ok(instance) => self.in_time("DescribeInstances", self.metadata_options(instance)).await,
            Err(error) => Err(error.clone()),
        };
        MetadataService { instance, options }
    }

    async fn in_time<T>(
        &self,
        action: &str,
        work: impl Future<Output = Result<T, CloudError>>,
    ) -> Result<T, CloudError> {
        let deadline = self.read_deadline;
        match tokio::time::timeout(deadline, work).await {
            Ok(done) => done,
            Err(_) => Err(timeout(action, format!("no answer within {} s", deadline.as_secs()))),
        }
    }

    /// This node by its metadata, and the ENI to ask about: one that an IPAM made if there is one, since policies are often
    /// tied to the tags of those, else the primary.
    async fn subject(&self) -> Result<Subject, CloudError> {
        let action = "DescribeNetworkInterfaces";
        let metadata = self.imds.read().await?;
        let primary = metadata.enis.iter().find(|eni| eni.mac == metadata.primary_mac);
        let primary = primary.ok_or_else(|| malformed("ImdsRead", "the metadata has no primary ENI".to_owned()))?;
        let cidr = primary.subnet_cidr.ok_or_else(|| malformed("ImdsRead", "the subnet has no CIDR".to_owned()))?;
        // What EC2 does not tell is what the questions find out.
        let shown = match of_instance(self.ec2.client(action).await?, &metadata.instance).await {
            Ok(CloudReply::Enis(enis)) => enis,
            _ => Vec::new(),
        };
        let made = |eni: &&EniView| eni.tags.contains_key(NODE_TAG);
        let eni = shown.iter().find(made).or_else(|| shown.iter().find(|eni| eni.id == primary.id)).unwrap_or(primary);
        let own = |(key, _): &(&String, &String)| !key.starts_with("aws:");
        let mut tags: BTreeMap<String, String> =
            eni.tags.iter().filter(own).map(|(key, value)| (key.clone(), value.clone())).collect();
        tags.insert(NODE_TAG.to_owned(), metadata.instance.to_string());
        Ok(Subject {
            instance: metadata.instance.clone(),
            subnet: primary.subnet.clone(),
            eni: eni.id.clone(),
            security_groups: eni.security_groups.clone(),
            attachment: eni.attachment.clone(),
            tags,
            reserved: cidr.network(),
        })
    }

    async fn metadata_options(&self, instance: &InstanceId) -> Result<MetadataOptions, CloudError> {
        let action = "DescribeInstances";
        let ec2 = self.ec2.client(action).await?;
        let answer = ec2.describe_instances().instance_ids(instance.as_str()).send().await;
        let answer = answer.map_err(|failure| from_sdk(action, failure))?;
        let shown = answer.reservations().iter().flat_map(|reservation| reservation.instances());
        let options = shown.filter_map(|shown| shown.metadata_options()).next();
        let options = options.ok_or_else(|| malformed(action, "the answer has no metadataOptions".to_owned()))?;
        Ok(MetadataOptions {
            hop_limit: count(options.http_put_response_hop_limit()),
            tokens_required: options.http_tokens() == Some(&HttpTokensState::Required),
        })
    }
}

/// Asks for one action.
async fn probe(ec2: &Client, action: &'static str, subject: Result<&Subject, &CloudError>) -> PermissionOutcome {
    match (action, subject) {
        ("DescribeInstanceTypes", _) => dry(action, ec2.describe_instance_types().dry_run(true).send().await),
        ("DescribeNetworkInterfaces", _) => dry(action, ec2.describe_network_interfaces().dry_run(true).send().await),
        ("DescribeSubnets", _) => dry(action, ec2.describe_subnets().dry_run(true).send().await),
        (_, Err(error)) => PermissionOutcome::Unknown { why: format!("this node's own ENI is not known: {error}") },
        (_, Ok(subject)) => probe_change(ec2, action, subject).await,
    }
}

async fn probe_change(ec2: &Client, action: &'static str, subject: &Subject) -> PermissionOutcome {
    let eni = subject.eni.as_str();
    let groups = || Some(subject.security_groups.iter().map(ToString::to_string).collect());
    match action {
        "CreateNetworkInterface" => {
            let call = ec2.create_network_interface().dry_run(true).subnet_id(subject.subnet.as_str());
            let call = call.set_groups(groups()).set_tag_specifications(eni_tags(&subject.tags));
            dry(action, call.send().await)
        }
        "AttachNetworkInterface" => {
            let call = ec2.attach_network_interface().dry_run(true).network_interface_id(eni);
            dry(action, call.instance_id(subject.instance.as_str()).device_index(1).send().await)
        }
        "ModifyNetworkInterfaceAttribute" => {
            let call = ec2.modify_network_interface_attribute().dry_run(true).network_interface_id(eni);
            dry(action, call.set_groups(groups()).send().await)
        }
        "CreateTags" => {
            let call = ec2.create_tags().dry_run(true).resources(eni);
            dry(action, call.set_tags(Some(tag_list(&subject.tags))).send().await)
        }
        "DeleteNetworkInterface" => {
            dry(action, ec2.delete_network_interface().dry_run(true).network_interface_id(eni).send().await)
        }
        "DetachNetworkInterface" => match &subject.attachment {
            Some(attachment) => {
                let call = ec2.detach_network_interface().dry_run(true).attachment_id(attachment.as_str());
                dry(action, call.send().await)
            }
            None => PermissionOutcome::Unknown { why: format!("the attachment of {eni} is not known") },
        },
        "AssignPrivateIpAddresses" => {
            let call = ec2.assign_private_ip_addresses().network_interface_id(eni);
            let call = call.private_ip_addresses(subject.reserved.to_string()).customize();
            outcome(action, "InvalidParameterValue", call.config_override(once()).send().await)
        }
        IPV6_ACTION => {
            // Of no subnet, so it is refused behind the policies.
            let call = ec2.assign_ipv6_addresses().network_interface_id(eni).ipv6_addresses("fe80::1").customize();
            outcome(action, "InvalidParameterValue", call.config_override(once()).send().await)
        }
        "UnassignPrivateIpAddresses" => {
            let call = ec2.unassign_private_ip_addresses().network_interface_id(eni);
            let call = call.private_ip_addresses(subject.reserved.to_string()).customize();
            outcome(action, "InvalidParameterValue", call.config_override(once()).send().await)
        }
        _ => PermissionOutcome::Unknown { why: "nobody knows how to ask for it".to_owned() },
    }
}

fn dry<T, E>(action: &str, answer: Result<T, SdkError<E, HttpResponse>>) -> PermissionOutcome
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    outcome(action, "DryRunOperation", answer)
}

/// `past` is the code of the refusal that lies behind the policies.
fn outcome<T, E>(action: &str, past: &str, answer: Result<T, SdkError<E, HttpResponse>>) -> PermissionOutcome
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let error = match answer {
        Ok(_) => return PermissionOutcome::Unknown { why: "the endpoint did what EC2 refuses".to_owned() },
        Err(failure) => from_sdk(action, failure),
    };
    match error.code.as_str() {
        code if code == past => PermissionOutcome::Allowed,
        "UnauthorizedOperation" | "AccessDenied" => {
            // What follows is for `aws sts decode-authorization-message`, and kilobytes long.
            let message = error.message.split(" Encoded authorization failure message").next().unwrap_or_default();
            PermissionOutcome::Denied { message: message.to_owned() }
        }
        _ => PermissionOutcome::Unknown { why: error.to_string() },
    }
}
