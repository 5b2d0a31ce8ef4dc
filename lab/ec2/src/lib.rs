//! The lab's EC2: one account in one region as a state machine, the Query API and IMDSv2 over it, and both over HTTP.
//!
//! The state machine takes time as a value and its randomness from a seed, so the same code serves a live lab and a
//! seeded world with a virtual clock. It is faithful where an address pool could go wrong: uniqueness, reserved
//! addresses, fragmentation, limits per type, asynchronous attachment, idempotency, pages, throttling, and EC2's own
//! error codes. It knows no network namespace and moves no packet: the fabric reads `View` for that.

mod access;
mod actions;
mod ec2;
mod error;
mod faults;
mod filters;
mod imds;
mod options;
mod params;
mod policy;
mod rng;
mod serve;
mod sigv4;
mod state;
mod typed;
mod view;
mod xml;

pub use access::{Caller, Credentials, NODE_ROLE};
pub use ec2::{CallCount, Ec2, Response, RunInstance};
pub use error::ApiError;
pub use imds::{Imds, ImdsRequest, ImdsResponse};
pub use options::{Bucket, Buckets, Delays, Fault, FaultRule, Faults, ImdsRule, Options, When};
pub use params::Params;
pub use policy::{Policy, PolicyError};
pub use rng::Rng;
pub use serve::{drive, imds_router, router, wall_clock};
pub use sigv4::{SignedRequest, sign};
pub use state::pool::ReservationKind;
pub use typed::{Answered, PageAsked};
pub use view::{
    AttachmentInfo, AttachmentState, Ending, EniInfo, EniStatus, InstanceInfo, InstanceState, RuleInfo, RulePeer,
    SecurityGroupInfo, SubnetInfo, Tags, View, VpcView,
};

/// A moment as a calendar knows it. Times beyond the calendar's end are its end.
pub(crate) fn stamp(now: flatwire_core::ids::Time) -> jiff::Timestamp {
    let ms = i64::try_from(now.0).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::MAX)
}
