//! EC2 and IMDSv2 behind the core's `Cloud` port; the only crate that knows `aws-sdk-ec2`.
//!
//! A request becomes one EC2 action (one file each under `actions/`) or one reading of the instance metadata
//! (`imds.rs`), and every failure becomes a `CloudError` with its class (`errors.rs`, described in `docs/errors.md`).
//! `preflight.rs` asks what this node may do, and does none of it.
//! Nothing is decided here: no pacing, no choice of subnet, no repair. What EC2 answers is passed on as it stands.
//!
//! Making an `AwsCloud` calls nobody. Region and credentials are found at the first call that needs them and looked for
//! again at the next one if that fails, so that a node whose EC2 is out of reach still serves what its ledger knows.

mod actions;
mod client;
mod convert;
mod errors;
mod imds;
mod preflight;
mod whole;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flatwire_core::ports::{Cloud, CloudError, CloudReply, CloudRequest};

use crate::client::Ec2;
pub use crate::client::{Config, ConfigError};
use crate::imds::Imds;
pub use crate::preflight::{ACTIONS, IPV6_ACTION, MetadataOptions, MetadataService, Permission, PermissionOutcome};

/// Hears of every finished call; metrics hang here.
pub trait CallObserver: Send + Sync + 'static {
    /// `action` is the EC2 action or `ImdsRead`; `latency` spans all attempts of the call. Must not block.
    fn observed(&self, action: &str, outcome: Result<(), &CloudError>, latency: Duration);
}

/// Nobody listens.
impl CallObserver for () {
    fn observed(&self, _: &str, _: Result<(), &CloudError>, _: Duration) {}
}

/// EC2 and IMDS through the AWS SDK. Cheap to clone; clones share connections, credentials and the IMDS session token.
#[derive(Clone)]
pub struct AwsCloud {
    ec2: Arc<Ec2>,
    imds: Imds,
    observer: Arc<dyn CallObserver>,
    read_deadline: Duration,
    write_deadline: Duration,
}

impl AwsCloud {
    /// Prepares the clients without calling anybody. Fails only on an endpoint that is not a URL.
    pub fn connect(config: Config, observer: Arc<dyn CallObserver>) -> Result<Self, ConfigError> {
        let config = config.with_environment(|name| std::env::var(name).ok());
        let imds = Imds::new(config.imds_endpoint.as_deref(), config.http_timeout)?;
        let (read_deadline, write_deadline) = (client::read_deadline(&config), client::write_deadline(&config));
        let ec2 = Arc::new(Ec2::new(config, imds.clone())?);
        Ok(Self { ec2, imds, observer, read_deadline, write_deadline })
    }

    async fn perform(&self, request: &CloudRequest) -> Result<CloudReply, CloudError> {
        match request {
            CloudRequest::ReadMetadata => self.imds.read().await.map(CloudReply::Metadata),
            _ => actions::perform(self.ec2.client(request.action()).await?, request).await,
        }
    }

    /// The last word on how long a call may take, whatever the SDK, IMDS or a resolver is stuck in.
    fn deadline(&self, request: &CloudRequest) -> Duration {
        match request {
            CloudRequest::ReadMetadata
            | CloudRequest::DescribeInstanceType { .. }
            | CloudRequest::DescribeNode { .. }
            | CloudRequest::DescribeEni { .. }
            | CloudRequest::DescribeUnattached { .. }
            | CloudRequest::DescribeSubnets { .. } => self.read_deadline,
            CloudRequest::CreateEni { .. }
            | CloudRequest::AttachEni { .. }
            | CloudRequest::SetDeleteOnTermination { .. }
            | CloudRequest::SetSecurityGroups { .. }
            | CloudRequest::Assign { .. }
            | CloudRequest::AssignNamed { .. }
            | CloudRequest::AssignIpv6Prefix { .. }
            | CloudRequest::Unassign { .. }
            | CloudRequest::DetachEni { .. }
            | CloudRequest::DeleteEni { .. }
            | CloudRequest::TagEni { .. } => self.write_deadline,
        }
    }
}

impl Cloud for AwsCloud {
    /// Dropping the future does not undo the call: EC2 may already have it.
    async fn call(&self, request: CloudRequest) -> Result<CloudReply, CloudError> {
        let action = request.action();
        let deadline = self.deadline(&request);
        let started = Instant::now();
        let outcome = match tokio::time::timeout(deadline, self.perform(&request)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(errors::timeout(action, format!("no answer within {} s", deadline.as_secs()))),
        };
        self.observer.observed(action, outcome.as_ref().map(|_| ()), started.elapsed());
        outcome
    }
}

impl fmt::Debug for AwsCloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsCloud").field("ec2", &self.ec2).finish_non_exhaustive()
    }
}
