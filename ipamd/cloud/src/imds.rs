//! IMDSv2: who this node is and which ENIs it has, without an EC2 call.
//!
//! The metadata is a tree of small texts that changes while it is read. A reading counts only if the list of MACs is
//! the same before and after it and no listed ENI lost its identity in between; else it is read again. IMDS shares a
//! budget of 1,024 packets a second with the node's resolver, so few ENIs are read at a time and nothing is polled.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use aws_config::imds;
use aws_config::imds::client::error::ImdsError;
use flatwire_core::ids::{DeviceIndex, InstanceId, MacAddress};
use flatwire_core::ports::{CloudError, EniKind, EniStatus, EniView, Metadata};
use futures_util::{StreamExt, TryStreamExt, stream};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tracing::warn;

use crate::client::{ConfigError, check_url};
use crate::convert::host;
use crate::errors;

const ACTION: &str = "ImdsRead";
/// ENIs read at the same time.
const PARALLEL_ENIS: usize = 4;
/// Readings before a tree that does not come to rest is taken without its torn parts.
const MAX_READINGS: usize = 3;
const PAUSE_BETWEEN_READINGS: Duration = Duration::from_millis(200);
const ATTEMPTS: u32 = 3;
/// IMDS answers from the same host in well under a millisecond; longer means it is not there.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub struct Imds {
    client: imds::Client,
}

impl Imds {
    pub fn new(endpoint: Option<&str>, http_timeout: Duration) -> Result<Self, ConfigError> {
        let attempt = http_timeout.min(LONGEST_ATTEMPT);
        let mut builder = imds::Client::builder()
            .connect_timeout(attempt)
            .read_timeout(attempt)
            .operation_attempt_timeout(attempt)
            .operation_timeout(attempt * ATTEMPTS)
            .max_attempts(ATTEMPTS);
        if let Some(url) = endpoint {
            check_url("IMDS", url)?;
            builder =
                builder.endpoint(url).map_err(|_| ConfigError::Endpoint { which: "IMDS", url: url.to_owned() })?;
        }
        Ok(Self { client: builder.build() })
    }

    pub fn client(&self) -> &imds::Client {
        &self.client
    }

    /// The region, from its own leaf or, on a service without it, from the identity document.
    pub async fn region(&self) -> Result<String, CloudError> {
        if let Some(region) = self.get("meta-data/placement/region").await? {
            return Ok(region);
        }
        let document = self.require("dynamic/instance-identity/document").await?;
        json_text(&document, "region")
            .ok_or_else(|| errors::malformed(ACTION, "the identity document names no region".to_owned()))
    }

    pub async fn instance(&self) -> Result<InstanceId, CloudError> {
        parse("instance-id", &self.require("meta-data/instance-id").await?)
    }

    pub async fn read(&self) -> Result<Metadata, CloudError> {
        let primary_mac: MacAddress = parse("mac", &self.require("meta-data/mac").await?)?;
        let enis = self.enis().await?;
        let Some(primary) = enis.iter().find(|eni| eni.mac == primary_mac) else {
            return Err(errors::malformed(ACTION, format!("the primary ENI {primary_mac} is not in the metadata")));
        };
        let primary_ipv4 = match self.get("meta-data/local-ipv4").await? {
            Some(text) => parse("local-ipv4", &text)?,
            None => primary.primary_ipv4,
        };
        if primary_ipv4.is_unspecified() {
            return Err(errors::malformed(ACTION, format!("the primary ENI {} has no IPv4 address", primary.id)));
        }
        let of_primary = format!("meta-data/network/interfaces/macs/{primary_mac}");
        let mut vpc_cidrs: Vec<IpNet> = self.list(&format!("{of_primary}/vpc-ipv4-cidr-blocks")).await?;
        if vpc_cidrs.is_empty() {
            vpc_cidrs = self.list(&format!("{of_primary}/vpc-ipv4-cidr-block")).await?;
        }
        vpc_cidrs.extend(self.list::<IpNet>(&format!("{of_primary}/vpc-ipv6-cidr-blocks")).await?);
        Ok(Metadata {
            instance: self.instance().await?,
            instance_type: self.require("meta-data/instance-type").await?,
            region: self.region().await?,
            availability_zone: self.require("meta-data/placement/availability-zone").await?,
            vpc: parse("vpc-id", &self.require(&format!("{of_primary}/vpc-id")).await?)?,
            primary_mac,
            primary_ipv4,
            vpc_cidrs,
            enis,
            terminating: self.terminating().await?,
        })
    }

    /// A spot interruption or the end of an Auto Scaling lifecycle has been announced. Both leaves are absent otherwise.
    async fn terminating(&self) -> Result<bool, CloudError> {
        if self.get("meta-data/spot/instance-action").await?.is_some() {
            return Ok(true);
        }
        let lifecycle = self.get("meta-data/autoscaling/target-lifecycle-state").await?;
        Ok(lifecycle.is_some_and(|state| state.trim() == "Terminated"))
    }

    /// The ENIs of one reading in which nothing moved, or of the last one without what moved in it.
    async fn enis(&self) -> Result<Vec<EniView>, CloudError> {
        let mut reading = 1;
        loop {
            let before = self.macs().await?;
            let found: Vec<Option<EniView>> = stream::iter(before.iter().copied())
                .map(|mac| self.eni(mac))
                .buffered(PARALLEL_ENIS)
                .try_collect()
                .await?;
            let after = self.macs().await?;
            let torn = found.iter().filter(|eni| eni.is_none()).count();
            if torn == 0 && before == after {
                return Ok(found.into_iter().flatten().collect());
            }
            if reading == MAX_READINGS {
                let kept: Vec<EniView> = found.into_iter().flatten().filter(|eni| after.contains(&eni.mac)).collect();
                warn!(readings = reading, listed = after.len(), kept = kept.len(), "metadata does not come to rest");
                return Ok(kept);
            }
            reading += 1;
            tokio::time::sleep(PAUSE_BETWEEN_READINGS).await;
        }
    }

    async fn macs(&self) -> Result<BTreeSet<MacAddress>, CloudError> {
        let listing = self.require("meta-data/network/interfaces/macs/").await?;
        lines(&listing).map(|line| parse("macs", line.trim_end_matches('/'))).collect()
    }

    /// One ENI, or `None` where its directory is listed but does not (or no longer) say which ENI it is.
    async fn eni(&self, mac: MacAddress) -> Result<Option<EniView>, CloudError> {
        let leaf = |name: &str| format!("meta-data/network/interfaces/macs/{mac}/{name}");
        let Some(id) = self.get(&leaf("interface-id")).await? else { return Ok(None) };
        let Some(device) = self.get(&leaf("device-number")).await? else { return Ok(None) };
        let Some(subnet) = self.get(&leaf("subnet-id")).await? else { return Ok(None) };
        let addresses: Vec<Ipv4Addr> = self.list(&leaf("local-ipv4s")).await?;
        let prefixes: Vec<Ipv4Net> = self.list(&leaf("ipv4-prefix")).await?;
        let ipv6_prefixes: Vec<Ipv6Net> = self.list(&leaf("ipv6-prefix")).await?;
        // The add-on reads `network-card`, the documentation says `network-card-index`; neither stands on most types.
        let card = match self.get(&leaf("network-card")).await? {
            Some(card) => Some(card),
            None => self.get(&leaf("network-card-index")).await?,
        };
        let mut addresses = addresses.into_iter();
        let primary_ipv4 = addresses.next();
        Ok(Some(EniView {
            id: parse("interface-id", &id)?,
            mac,
            device: DeviceIndex(parse("device-number", &device)?),
            card: card.map(|text| parse("network-card", &text)).transpose()?.unwrap_or(0),
            subnet: parse("subnet-id", &subnet)?,
            subnet_cidr: self.list(&leaf("subnet-ipv4-cidr-block")).await?.into_iter().next(),
            primary_ipv4: primary_ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED),
            slots: addresses
                .map(host)
                .chain(prefixes.into_iter().map(IpNet::V4))
                .chain(ipv6_prefixes.into_iter().map(IpNet::V6))
                .collect(),
            security_groups: self.list(&leaf("security-group-ids")).await?,
            attachment: None,
            status: EniStatus::Attached,
            description: String::new(),
            tags: Default::default(),
            // IMDS does not say what kind an ENI is; one without any IPv4 address cannot serve pods.
            kind: if primary_ipv4.is_some() { EniKind::Interface } else { EniKind::Other },
        }))
    }

    /// A leaf of lines, parsed; a missing leaf is an empty list.
    async fn list<T>(&self, path: &str) -> Result<Vec<T>, CloudError>
    where
        T: FromStr,
        T::Err: Display,
    {
        let text = self.get(path).await?.unwrap_or_default();
        lines(&text).map(|line| parse(path, line)).collect()
    }

    async fn require(&self, path: &str) -> Result<String, CloudError> {
        self.get(path).await?.ok_or_else(|| errors::malformed(ACTION, format!("the metadata service has no {path}")))
    }

    /// One leaf below `/latest/`; `None` for a 404 and for an empty text.
    async fn get(&self, path: &str) -> Result<Option<String>, CloudError> {
        let started = Instant::now();
        match self.client.get(format!("/latest/{path}")).await {
            Ok(text) => Ok(Some(text.as_ref().trim().to_owned()).filter(|text| !text.is_empty())),
            Err(ImdsError::ErrorResponse(answer)) if answer.response().status().as_u16() == 404 => Ok(None),
            Err(failure) => Err(errors::from_imds(ACTION, path, &failure, started.elapsed())),
        }
    }
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

fn parse<T>(name: &str, text: &str) -> Result<T, CloudError>
where
    T: FromStr,
    T::Err: Display,
{
    text.trim().parse().map_err(|error| errors::malformed(ACTION, format!("{name} of the metadata: {text:?}: {error}")))
}

/// The text of a key of the identity document, which is flat JSON without escapes.
fn json_text(document: &str, key: &str) -> Option<String> {
    let (_, rest) = document.split_once(&format!("\"{key}\""))?;
    let (_, rest) = rest.split_once('"')?;
    let (value, _) = rest.split_once('"')?;
    Some(value.to_owned()).filter(|value| !value.is_empty())
}
