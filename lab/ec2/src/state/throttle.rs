//! Token buckets per action, as EC2 keeps them per account and region.

use std::collections::BTreeMap;

use flatwire_core::ids::Time;

use crate::error::ApiError;
use crate::options::{Bucket, Buckets};

#[derive(Debug)]
pub(crate) struct Throttle {
    buckets: Option<Buckets>,
    levels: BTreeMap<String, Level>,
    /// Thousandths of every refill that others use up as it comes.
    others: u64,
}

const WHOLE: u64 = 1_000;
/// Parts of a token: a millisecond refills a whole number of them, whatever others take.
const TOKEN: u64 = 1_000 * WHOLE;

#[derive(Debug, Clone, Copy)]
struct Level {
    parts: u64,
    at: Time,
}

impl Throttle {
    pub(crate) fn new(buckets: Option<Buckets>) -> Self {
        Self { buckets, levels: BTreeMap::new(), others: 0 }
    }

    pub(crate) fn set(&mut self, buckets: Option<Buckets>) {
        self.buckets = buckets;
        self.levels.clear();
    }

    /// Others use up so many thousandths of every bucket's refill. To be said before the buckets are used.
    pub(crate) fn share(&mut self, per_mille: u32) {
        self.others = u64::from(per_mille).min(WHOLE);
    }

    /// Takes a token for one call, or refuses it. `unfiltered` says that the call is one of those with a smaller
    /// bucket.
    pub(crate) fn take(&mut self, now: Time, action: &str, mutating: bool, unfiltered: bool) -> Result<(), ApiError> {
        let Some((key, bucket)) = self.bucket(action, mutating, unfiltered) else { return Ok(()) };
        let level = self.level(now, key, bucket);
        if level.parts < TOKEN {
            return Err(ApiError::throttled());
        }
        level.parts -= TOKEN;
        Ok(())
    }

    /// Somebody else in the account makes so many calls.
    pub(crate) fn drain(&mut self, now: Time, action: &str, mutating: bool, calls: u32) {
        if let Some((key, bucket)) = self.bucket(action, mutating, false) {
            let level = self.level(now, key, bucket);
            level.parts = level.parts.saturating_sub(u64::from(calls) * TOKEN);
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
        let full = u64::from(bucket.burst) * TOKEN;
        let ours = WHOLE - self.others;
        let level = self.levels.entry(key).or_insert(Level { parts: full, at: now });
        let refill = now.since_ms(level.at).saturating_mul(u64::from(bucket.per_second) * ours);
        level.parts = level.parts.saturating_add(refill).min(full);
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
    fn what_others_take_steadily_is_missing_from_the_refill_and_not_from_the_burst() {
        let mut throttle = Throttle::new(Some(Buckets::published()));
        throttle.share(400);
        let action = "AttachNetworkInterface";
        assert_eq!(passed(&mut throttle, Time(0), 60, action), 50);
        let each_ms = (1..=10_000).map(|ms| passed(&mut throttle, Time(ms), 1, action));
        assert_eq!(each_ms.sum::<u32>(), 30, "three a second are left of five, however often one asks");
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
