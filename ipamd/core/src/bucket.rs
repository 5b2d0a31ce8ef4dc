//! How fast may an EC2 action be called? One token bucket per action, starting at the values EC2 publishes for a whole
//! account and adapting to what EC2 says: the account is shared with every other node, so a refusal halves the rate and
//! a success gives some of it back. Pure: time and chance come in as values.

use crate::ids::Time;

/// Slowest rate a refusal can lead to: one call in sixteen seconds. With any number of nodes behind it a bucket of EC2's
/// then finds somebody asking whenever it has a token, and the last node does not wait for minutes.
const SLOWEST_MICRO: u64 = 1_000_000 / 16;
/// After a refusal, what no pod waits for is not asked for this long, and as long again at most, by chance; nor this soon
/// after the start, because a node seldom starts alone.
const YIELD_MS: u64 = 600_000;

/// Rate after a first refusal: whatever one node does at the published rate, a refusal says that others do more.
const FIRST_REFUSAL_MICRO: u64 = 1_000_000;

/// Millionths of a call, so that slow rates are whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    burst: u64,
    published: u64,
    /// Per second.
    rate: u64,
    tokens: u64,
    at: Time,
    /// Nothing before this, whatever the tokens say.
    rests_until: Time,
    /// Until then others need the calls more than who merely prepares.
    yields_until: Time,
}

/// Burst and refill per second as EC2 publishes them (Amazon EC2 Developer Guide, "Request throttling").
fn published(action: &str) -> (u64, u64) {
    match action {
        "AssignPrivateIpAddresses"
        | "UnassignPrivateIpAddresses"
        | "CreateNetworkInterface"
        | "DeleteNetworkInterface"
        | "ModifyNetworkInterfaceAttribute" => (100, 5),
        "CreateTags" => (100, 10),
        _ if action.starts_with("Describe") => (100, 20),
        _ => (50, 5),
    }
}

impl Bucket {
    pub fn new(action: &str, now: Time) -> Self {
        let (burst, per_second) = published(action);
        let (burst, published) = (burst * 1_000_000, per_second * 1_000_000);
        Self {
            burst,
            published,
            rate: published,
            tokens: burst,
            at: now,
            rests_until: now,
            yields_until: now.plus_ms(YIELD_MS),
        }
    }

    /// When the next call may be made; now or earlier means at once.
    pub fn ready_at(&self, now: Time) -> Time {
        let missing = 1_000_000_u64.saturating_sub(self.tokens_at(now));
        now.plus_ms((missing * 1_000).div_ceil(self.rate)).max(self.rests_until)
    }

    pub fn take(&mut self, now: Time) {
        self.tokens = self.tokens_at(now).saturating_sub(1_000_000);
        self.at = now;
    }

    /// EC2 refused: half the rate, and a rest of half to one and a half calls at it, by `chance`, so that nodes spread out.
    /// Returns the rest in milliseconds.
    pub fn refused(&mut self, now: Time, chance: u64) -> u64 {
        self.rate = (self.rate / 2).clamp(SLOWEST_MICRO, FIRST_REFUSAL_MICRO);
        let one_call_ms = 1_000_000_000 / self.rate;
        let rest_ms = one_call_ms / 2 + chance % (one_call_ms + 1);
        self.tokens = 1_000_000;
        self.at = now;
        self.rests_until = now.plus_ms(rest_ms);
        self.yields_until = now.plus_ms(YIELD_MS + chance % YIELD_MS);
        rest_ms
    }

    /// EC2 has refused a while ago: only what a pod waits for is to be asked.
    pub fn yields(&self, now: Time) -> bool {
        now < self.yields_until
    }

    /// EC2 let a call through: there is room, so the next refusal is farther away.
    pub fn passed(&mut self) {
        self.rate = (self.rate + self.published / 20).min(self.published);
    }

    fn tokens_at(&self, now: Time) -> u64 {
        let gained = now.since_ms(self.at).saturating_mul(self.rate) / 1_000;
        self.tokens.saturating_add(gained).min(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_starts_full_and_refills_at_the_published_rate() {
        let mut bucket = Bucket::new("AttachNetworkInterface", Time(0));
        for _ in 0..50 {
            assert_eq!(bucket.ready_at(Time(0)), Time(0));
            bucket.take(Time(0));
        }
        assert_eq!(bucket.ready_at(Time(0)), Time(200), "five a second");
        assert_eq!(bucket.ready_at(Time(200)), Time(200));
    }

    #[test]
    fn refusals_slow_down_to_a_floor_and_successes_speed_up_to_what_is_published() {
        let mut bucket = Bucket::new("AssignPrivateIpAddresses", Time(0));
        let rests: Vec<u64> = (0..12).map(|_| bucket.refused(Time(0), 0)).collect();
        assert_eq!((rests[0], rests[1]), (500, 1_000));
        assert_eq!(rests[11], 8_000, "half of sixteen seconds");
        assert_eq!(bucket.refused(Time(0), 16_000), 24_000, "chance adds at most one call's time");
        assert_eq!(bucket.ready_at(Time(23_999)), Time(24_000));
        for _ in 0..100 {
            bucket.passed();
        }
        assert_eq!(bucket.rate, bucket.published);
    }

    #[test]
    fn a_refusal_keeps_what_can_wait_away_for_a_while() {
        let mut bucket = Bucket::new("CreateNetworkInterface", Time(0));
        assert!(bucket.yields(Time(YIELD_MS - 1)) && !bucket.yields(Time(YIELD_MS)));
        bucket.refused(Time(YIELD_MS), 5_000);
        assert!(bucket.yields(Time(2 * YIELD_MS + 4_999)) && !bucket.yields(Time(2 * YIELD_MS + 5_000)));
    }
}
