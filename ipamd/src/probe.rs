//! Where the daemon's effects begin and end: the points at which a crash must not cost a pod its address.
//!
//! The crash suite ends the daemon at each of them. The program that is shipped has `NoProbe`, of which nothing is left
//! after compilation. Reading has no effect and therefore no point.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use flatwire_core::ports::CloudRequest;

/// Hears of every point the daemon comes to. Called on the thread that is about to act, so it must return at once, or not
/// at all.
pub trait Probe: Clone + Send + Sync + 'static {
    fn reached(&self, point: Point);

    /// How many seconds pass for the pool in one: more than one only in tests, which cannot wait an hour.
    #[inline(always)]
    fn hurry(&self) -> u32 {
        1
    }
}

/// Hears nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoProbe;

impl Probe for NoProbe {
    #[inline(always)]
    fn reached(&self, _: Point) {}
}

/// What the daemon changes outside its own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Effect {
    /// The records of a batch, written to the ledger and flushed.
    Persist,
    /// An answer to the plugin, or to whoever else asked.
    Reply,
    CreateEni,
    AttachEni,
    SetDeleteOnTermination,
    Assign,
    AssignNamed,
    AssignIpv6Prefix,
    Unassign,
    DetachEni,
    DeleteEni,
    SetSecurityGroups,
    TagEni,
    /// Links, tables, rules and nftables made what the plan says.
    Program,
    /// The add-on's state file.
    Checkpoint,
    /// The ledger rewritten to its shortest form.
    Compact,
    /// A queued release that was done, taken out of the queue.
    Settle,
}

impl Effect {
    /// The effect a call to EC2 has, if any.
    pub fn of(request: &CloudRequest) -> Option<Self> {
        match request {
            CloudRequest::ReadMetadata
            | CloudRequest::DescribeInstanceType { .. }
            | CloudRequest::DescribeNode { .. }
            | CloudRequest::DescribeEni { .. }
            | CloudRequest::DescribeUnattached { .. }
            | CloudRequest::DescribeSubnets { .. } => None,
            CloudRequest::CreateEni { .. } => Some(Self::CreateEni),
            CloudRequest::AttachEni { .. } => Some(Self::AttachEni),
            CloudRequest::SetDeleteOnTermination { .. } => Some(Self::SetDeleteOnTermination),
            CloudRequest::Assign { .. } => Some(Self::Assign),
            CloudRequest::AssignNamed { .. } => Some(Self::AssignNamed),
            CloudRequest::AssignIpv6Prefix { .. } => Some(Self::AssignIpv6Prefix),
            CloudRequest::Unassign { .. } => Some(Self::Unassign),
            CloudRequest::DetachEni { .. } => Some(Self::DetachEni),
            CloudRequest::DeleteEni { .. } => Some(Self::DeleteEni),
            CloudRequest::SetSecurityGroups { .. } => Some(Self::SetSecurityGroups),
            CloudRequest::TagEni { .. } => Some(Self::TagEni),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Moment {
    Before,
    After,
}

/// A point, written `before-persist` or `after-create-eni`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub moment: Moment,
    pub effect: Effect,
}

impl Point {
    /// Every point there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let both = |effect: &Effect| Moment::value_variants().iter().map(|m| (*m, *effect)).collect::<Vec<_>>();
        Effect::value_variants().iter().flat_map(both).map(|(moment, effect)| Self { moment, effect })
    }

    pub fn before(effect: Effect) -> Self {
        Self { moment: Moment::Before, effect }
    }

    pub fn after(effect: Effect) -> Self {
        Self { moment: Moment::After, effect }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", name_of(self.moment), name_of(self.effect))
    }
}

fn name_of<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).expect("invariant: no moment or effect is skipped")
}

/// A text that names no point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no point; they are {all}")]
pub struct UnknownPoint {
    name: String,
    all: String,
}

impl FromStr for Point {
    type Err = UnknownPoint;
    fn from_str(text: &str) -> Result<Self, UnknownPoint> {
        Self::all().find(|point| point.to_string() == text).ok_or_else(|| UnknownPoint {
            name: text.to_owned(),
            all: Self::all().map(|point| point.to_string()).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_found_by_its_name() {
        for point in Point::all() {
            assert_eq!(point.to_string().parse(), Ok(point));
        }
        assert_eq!("after-create-eni".parse(), Ok(Point::after(Effect::CreateEni)));
        let error = "after-lunch".parse::<Point>().unwrap_err().to_string();
        assert!(error.contains("\"after-lunch\"") && error.contains("before-persist"), "{error}");
    }
}
