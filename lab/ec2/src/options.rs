//! What a lab can be told: where it pretends to be, how slow it is, how it throttles, how it fails.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Settings of one simulated account in one region.
#[derive(Debug, Clone)]
pub struct Options {
    pub region: String,
    pub account_id: String,
    /// Every id, MAC, address pick and injected fault follows from it.
    pub seed: u64,
    pub delays: Delays,
    /// Token buckets per action; `None` never throttles.
    pub throttle: Option<Buckets>,
    /// The account's quota of ENIs in the region.
    pub max_enis: u32,
    /// How long what changed on an ENI stays out of sight of `Describe*`; 0 reads your writes.
    pub describe_lag_ms: u64,
    /// Refuses `Describe*` calls without page size, filter and ids above so many results, as EC2 does to large
    /// accounts.
    pub max_unpaginated: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            region: "us-east-1".to_owned(),
            account_id: "123456789012".to_owned(),
            seed: 0,
            delays: Delays::default(),
            throttle: Some(Buckets::published()),
            max_enis: 5_000,
            describe_lag_ms: 0,
            max_unpaginated: None,
        }
    }
}

/// How long the asynchronous parts of EC2 take, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delays {
    /// A new ENI shows as `pending`.
    pub eni_pending_ms: u64,
    /// The API says `attaching`.
    pub attach_ms: u64,
    /// From AttachNetworkInterface until the guest sees the link.
    pub link_ms: u64,
    /// The API says `detaching`.
    pub detach_ms: u64,
    /// An instance is `pending`.
    pub run_ms: u64,
    /// An instance is `shutting-down`.
    pub terminate_ms: u64,
    /// How far IMDS is behind EC2.
    pub imds_lag_ms: u64,
}

impl Default for Delays {
    fn default() -> Self {
        Self {
            eni_pending_ms: 200,
            attach_ms: 600,
            link_ms: 900,
            detach_ms: 800,
            run_ms: 500,
            terminate_ms: 800,
            imds_lag_ms: 0,
        }
    }
}

impl Delays {
    /// Everything at once, for tests that are not about time.
    pub const NONE: Self =
        Self { eni_pending_ms: 0, attach_ms: 0, link_ms: 0, detach_ms: 0, run_ms: 0, terminate_ms: 0, imds_lag_ms: 0 };
}

/// One token bucket: it starts full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    pub burst: u32,
    pub per_second: u32,
}

/// The buckets of an account in a region. Every action has one of its own, of its class's size unless it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buckets {
    pub non_mutating: Bucket,
    /// Describes without filter and page size, of the actions in `UNFILTERED`.
    pub unfiltered: Bucket,
    pub mutating: Bucket,
    pub actions: BTreeMap<String, Bucket>,
}

/// Describes that have a smaller bucket when they are called without filter and page size.
pub(crate) const UNFILTERED: [&str; 3] = ["DescribeInstances", "DescribeNetworkInterfaces", "DescribeSecurityGroups"];

impl Buckets {
    /// The values of the EC2 API throttling page.
    pub fn published() -> Self {
        let bucket = |burst, per_second| Bucket { burst, per_second };
        let actions = [
            ("AssignIpv6Addresses", bucket(100, 5)),
            ("AssignPrivateIpAddresses", bucket(100, 5)),
            ("CreateNetworkInterface", bucket(100, 5)),
            ("CreateSubnetCidrReservation", bucket(5, 1)),
            ("CreateTags", bucket(100, 10)),
            ("DeleteNetworkInterface", bucket(100, 5)),
            ("DeleteTags", bucket(100, 10)),
            ("ModifyNetworkInterfaceAttribute", bucket(100, 5)),
            ("RunInstances", bucket(5, 2)),
            ("UnassignPrivateIpAddresses", bucket(100, 5)),
        ];
        Self {
            non_mutating: bucket(100, 20),
            unfiltered: bucket(50, 10),
            mutating: bucket(50, 5),
            actions: actions.into_iter().map(|(action, bucket)| (action.to_owned(), bucket)).collect(),
        }
    }
}

/// Faults to inject, in order: the first rule that fits and fires decides. Chance follows from the seed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    pub calls: Vec<FaultRule>,
    pub imds: Vec<ImdsRule>,
}

/// What happens to calls of one action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultRule {
    /// The action's name; `*` stands for any run of characters.
    pub action: String,
    /// Only calls with this access key; `None` for everybody's.
    pub access_key: Option<String>,
    pub when: When,
    pub fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum When {
    Always,
    /// The next so many calls that fit.
    Next(u32),
    /// So many of a million.
    PerMillion(u32),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Refused with this code; nothing is carried out. The HTTP status is the code's own.
    Error { code: String, message: String },
    /// Carried out, then answered with `InternalError`.
    LostReply,
    /// Carried out, then the connection breaks.
    BrokenConnection,
    /// Carried out at once, answered so much later.
    Delay { ms: u64 },
}

/// What happens to reads of IMDS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImdsRule {
    /// Paths that contain this text.
    pub path: String,
    pub when: When,
    /// Answered instead: 404 for a leaf that is missing, 429 or 503 for a service that is not well.
    pub status: u16,
}
