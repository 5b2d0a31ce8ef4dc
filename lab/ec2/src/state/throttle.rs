//! Token buckets per action, as EC2 keeps them per account and region.

use std::collections::BTreeMap;

use flatwire_core::ids::Time;

use crate::error::ApiError;
use crate::options::{Bucket, Buckets};

#[derive(Debug)]
pub(crate) struct Throttle {
    buckets: Option<Buckets>,
    levels: BTreeMap<String, Level>,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    /// Thousandths of a token: a millisecond refills as many as a second refills tokens.
    milli: u64,
    at: Time,
}

impl Throttle {
    pub(crate) fn new(buckets: Option<Buckets>) -> Self {
        Self { buckets, levels: BTreeMap::new() }
    }

    pub(crate) fn set(&mut self, buckets: Option<Buckets>) {
        self.buckets = buckets;
        self.levels.clear();
    }

    /// Takes a token for one call, or refuses it. `unfiltered` says that the call is one of those with a smaller
    /// bucket.
    pub(crate) fn take(&mut self, now: Time, action: &str, mutating: bool, unfiltered: bool) -> Result<(), ApiError> {
        let Some((key, bucket)) = self.bucket(action, mutating, unfiltered) else { return Ok(()) };
        let level = self.level(now, key, bucket);
        if level.milli < 1_000 {
            return Err(ApiError::throttled());
        }
        level.milli -= 1_000;
        Ok(())
    }

    /// Somebody else in the account makes so many calls.
    pub(crate) fn drain(&mut self, now: Time, action: &str, mutating: bool, calls: u32) {
        if let Some((key, bucket)) = self.bucket(action, mutating, false) {
            let level = self.level(now, key, bucket);
            level.milli = level.milli.saturating_sub(u64::from(calls) * 1_000);
        }
    }

    fn bucket(&self, action: &str, mutating: bool, unfiltered: bool) -> Option<(String, Bucket)> {
        let buckets = self.buckets.as_ref()?;
        if unfiltered {
            return Some((format!("{action} unfiltered"), buckets.unfiltered));
        }
        let class = if mutating { buckets.mutating } else { buckets.non_mutating };
        Some((action.to_owned(), buckets.actions.get(action).copied().unwrap_or(class)))
    }

    fn level(&mut self, now: Time, key: String, bucket: Bucket) -> &mut Level {
        let full = u64::from(bucket.burst) * 1_000;
        let level = self.levels.entry(key).or_insert(Level { milli: full, at: now });
        let refill = now.since_ms(level.at).saturating_mul(u64::from(bucket.per_second));
        level.milli = level.milli.saturating_add(refill).min(full);
        level.at = now.max(level.at);
        level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(throttle: &mut Throttle, now: Time, calls: u32, action: &str) -> u32 {
        let taken = (0..calls).filter(|_| throttle.take(now, action, true, false).is_ok()).count();
        u32::try_from(taken).unwrap()
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let mut throttle = Throttle::new(Some(Buckets::published()));
        let action = "AssignPrivateIpAddresses";
        assert_eq!(passed(&mut throttle, Time(0), 150, action), 100);
        assert_eq!(passed(&mut throttle, Time(199), 10, action), 0);
        assert_eq!(passed(&mut throttle, Time(1_000), 10, action), 5);
        assert_eq!(passed(&mut throttle, Time(1_000), 60, "AttachNetworkInterface"), 50);
        assert_eq!(passed(&mut throttle, Time(100_000), 150, action), 100);
    }

    #[test]
    fn neighbours_drain_the_same_bucket_and_no_bucket_never_refuses() {
        let mut throttle = Throttle::new(Some(Buckets::published()));
        throttle.drain(Time(0), "RunInstances", true, 4);
        assert_eq!(passed(&mut throttle, Time(0), 5, "RunInstances"), 1);
        throttle.set(None);
        assert_eq!(passed(&mut throttle, Time(0), 500, "RunInstances"), 500);
    }
}
