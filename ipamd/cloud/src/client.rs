//! The EC2 client: where it calls, in whose name, how long it waits and how often it tries.

use std::fmt;
use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::ProvideRegion;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{AppName, BehaviorVersion, Region};
use aws_sdk_ec2::Client;
use aws_sdk_ec2::config::retry::RetryConfig;
use aws_sdk_ec2::config::timeout::TimeoutConfig;
use flatwire_core::ports::CloudError;
use tokio::sync::OnceCell;

use crate::errors;
use crate::imds::Imds;
use crate::whole::WholeAnswers;

/// Attempts of a read. A read changes nothing, so the SDK may repeat it on its own.
const READ_ATTEMPTS: u32 = 3;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);
/// What finding region and credentials may add to a call: the SDK gives a credentials lookup five seconds.
const IDENTITY_ALLOWANCE: Duration = Duration::from_secs(6);
/// Pages of one describe, of up to 1,000 items each; a reply that goes on beyond is refused.
pub const MAX_PAGES: usize = 50;

/// What an `AwsCloud` is made from. What is `None` comes from the environment, then from where AWS keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Else AWS_REGION, AWS_DEFAULT_REGION, the profile, and the node's own region in IMDS.
    pub region: Option<String>,
    /// Else AWS_EC2_ENDPOINT (the add-on's variable), AWS_ENDPOINT_URL_EC2, AWS_ENDPOINT_URL, and the region's
    /// endpoint.
    pub ec2_endpoint: Option<String>,
    /// Else AWS_EC2_METADATA_SERVICE_ENDPOINT, and http://169.254.169.254.
    pub imds_endpoint: Option<String>,
    /// One attempt of one HTTP exchange.
    pub http_timeout: Duration,
    /// Of this program, for the user agent.
    pub version: String,
}

impl Config {
    pub fn new(version: impl Into<String>) -> Self {
        Self {
            region: None,
            ec2_endpoint: None,
            imds_endpoint: None,
            http_timeout: Duration::from_secs(10),
            version: version.into(),
        }
    }

    /// Fills in the endpoints that the SDK would not take from the environment itself, or not for every client.
    pub(crate) fn with_environment(mut self, read: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name| read(name).filter(|value| !value.is_empty());
        self.region = self.region.filter(|region| !region.is_empty());
        self.ec2_endpoint = self.ec2_endpoint.filter(|url| !url.is_empty()).or_else(|| set("AWS_EC2_ENDPOINT"));
        self.imds_endpoint =
            self.imds_endpoint.filter(|url| !url.is_empty()).or_else(|| set("AWS_EC2_METADATA_SERVICE_ENDPOINT"));
        self
    }
}

/// Settings that no call could ever succeed with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the {which} endpoint {url:?} is not an http or https URL")]
    Endpoint { which: &'static str, url: String },
    #[error("the version {0:?} cannot stand in a user agent")]
    Version(String),
}

pub(crate) fn check_url(which: &'static str, url: &str) -> Result<(), ConfigError> {
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).unwrap_or("");
    let clean = host.bytes().all(|b| b.is_ascii_graphic());
    if host.is_empty() || host.starts_with('/') || !clean {
        return Err(ConfigError::Endpoint { which, url: url.to_owned() });
    }
    Ok(())
}

/// All attempts of a read with the pauses between them.
fn read_operation_timeout(config: &Config) -> Duration {
    config.http_timeout * READ_ATTEMPTS + LONGEST_BACKOFF * READ_ATTEMPTS + IDENTITY_ALLOWANCE
}

/// A read may span several pages, each with its own operation timeout; a node's and a zone's worth is two or three.
pub(crate) fn read_deadline(config: &Config) -> Duration {
    read_operation_timeout(config) * 2
}

/// One attempt, with the search for region and credentials before it.
pub(crate) fn write_deadline(config: &Config) -> Duration {
    config.http_timeout + IDENTITY_ALLOWANCE * 2
}

/// A mutation is sent once. Assign, Unassign, Attach, Detach and Delete carry no client token, so a second attempt
/// after a lost reply could take a second batch of addresses; the pool reads back what happened before it asks again.
/// Throttled mutations come back to the pool too: it owns the pacing, and a retry in here would be a second, hidden
/// clock.
pub(crate) fn once() -> aws_sdk_ec2::config::Builder {
    aws_sdk_ec2::Config::builder().retry_config(RetryConfig::disabled())
}

/// The EC2 client, made at the first call that succeeds in finding a region.
pub(crate) struct Ec2 {
    config: Config,
    app: AppName,
    imds: Imds,
    client: OnceCell<Client>,
}

impl Ec2 {
    pub fn new(config: Config, imds: Imds) -> Result<Self, ConfigError> {
        if let Some(url) = &config.ec2_endpoint {
            check_url("EC2", url)?;
        }
        let app = AppName::new(format!("flatwire-{}", config.version))
            .map_err(|_| ConfigError::Version(config.version.clone()))?;
        Ok(Self { config, app, imds, client: OnceCell::new() })
    }

    /// The client, or why there is none yet; a failure is not remembered, the next call looks again.
    pub async fn client(&self, action: &str) -> Result<&Client, CloudError> {
        self.client.get_or_try_init(|| self.build(action)).await
    }

    async fn build(&self, action: &str) -> Result<Client, CloudError> {
        let region = self.region(action).await?;
        // The same IMDS client that reads the metadata also fetches the instance role's credentials: one endpoint, one
        // session token.
        let credentials = DefaultCredentialsChain::builder()
            .imds_client(self.imds.client().clone())
            .region(region.clone())
            .build()
            .await;
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .region(region)
            .credentials_provider(credentials)
            .app_name(self.app.clone())
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(READ_ATTEMPTS)
                    .with_initial_backoff(FIRST_BACKOFF)
                    .with_max_backoff(LONGEST_BACKOFF),
            )
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(self.config.http_timeout)
                    .read_timeout(self.config.http_timeout)
                    .operation_attempt_timeout(self.config.http_timeout)
                    .operation_timeout(read_operation_timeout(&self.config))
                    .build(),
            );
        if let Some(url) = &self.config.ec2_endpoint {
            loader = loader.endpoint_url(url);
        }
        let config = aws_sdk_ec2::config::Builder::from(&loader.load().await).interceptor(WholeAnswers);
        Ok(Client::from_conf(config.build()))
    }

    async fn region(&self, action: &str) -> Result<Region, CloudError> {
        if let Some(region) = &self.config.region {
            return Ok(Region::new(region.clone()));
        }
        if let Some(region) = EnvironmentVariableRegionProvider::new().region().await {
            return Ok(region);
        }
        if let Some(region) = ProfileFileRegionProvider::new().region().await {
            return Ok(region);
        }
        match self.imds.region().await {
            Ok(region) => Ok(Region::new(region)),
            Err(error) => Err(CloudError {
                action: action.to_owned(),
                message: format!("the region is not set and not to be had from IMDS: {}", error.message),
                ..errors::connection(action, String::new())
            }),
        }
    }
}

impl fmt::Debug for Ec2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ec2").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_add_ons_variable_reaches_ec2_and_a_setting_wins() {
        let env = |name: &str| match name {
            "AWS_EC2_ENDPOINT" => Some("http://ec2.example".to_owned()),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT" => Some("http://imds.example".to_owned()),
            _ => None,
        };
        let config = Config::new("1").with_environment(env);
        assert_eq!(config.ec2_endpoint.as_deref(), Some("http://ec2.example"));
        assert_eq!(config.imds_endpoint.as_deref(), Some("http://imds.example"));

        let set = Config { ec2_endpoint: Some("http://mine".to_owned()), ..Config::new("1") }.with_environment(env);
        assert_eq!(set.ec2_endpoint.as_deref(), Some("http://mine"));

        let empty =
            Config { region: Some(String::new()), ..Config::new("1") }.with_environment(|_| Some(String::new()));
        assert_eq!(empty, Config::new("1"));
    }

    #[test]
    fn only_urls_are_endpoints() {
        for good in ["http://127.0.0.1:4566", "https://ec2.eu-west-1.amazonaws.com/", "http://[::1]:80"] {
            assert_eq!(check_url("EC2", good), Ok(()), "{good}");
        }
        for bad in ["", "127.0.0.1:4566", "http://", "http:///x", "ftp://x", "http://a b"] {
            assert!(check_url("EC2", bad).is_err(), "{bad:?}");
        }
    }
}
