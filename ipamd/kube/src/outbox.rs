//! What waits to be written, by what it is about: a newer write takes the place of an older one, so a server that is away
//! makes nothing grow. A bucket sets the pace, refusals set a pause, and there is a bound. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use flatwire_core::ids::Time;

/// Writes that wait at once; one more is dropped.
pub const MAX_WAITING: usize = 1_024;
/// Writes in a row, and per second after them.
pub const BURST: u64 = 30;
pub const PER_SECOND: u64 = 10;
/// A write that has been done is not asked for again before the watch could have shown it.
pub const SETTLE_MS: u64 = 30_000;
/// News is tried this often; a state for as long as it is wanted.
pub const MAX_ATTEMPTS: u32 = 6;
/// Pauses of what is refused.
const FIRST_PAUSE_MS: u64 = 1_000;
const LONGEST_PAUSE_MS: u64 = 300_000;

/// What a write is worth while it cannot be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worth {
    /// What should stand there: tried for as long as it is wanted.
    State,
    /// What has happened: of no use much later.
    News,
}

/// How a write has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Its object is not there any more.
    Pointless,
    /// To be tried again, after this at the earliest.
    Failed(Option<Duration>),
}

/// What has become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Written,
    Waits,
    Dropped,
}

#[derive(Debug)]
struct Waiting<W> {
    write: W,
    worth: Worth,
    attempts: u32,
    due: Time,
}

#[derive(Debug)]
pub struct Outbox<K, W> {
    waiting: BTreeMap<K, Waiting<W>>,
    under_way: Option<K>,
    /// What was written last of each state, and when.
    settling: BTreeMap<K, (W, Time)>,
    /// Thousandths of a write.
    tokens: u64,
    filled_at: Time,
}

impl<K: Ord + Clone, W: Clone + PartialEq> Outbox<K, W> {
    pub fn new(now: Time) -> Self {
        let (waiting, settling) = (BTreeMap::new(), BTreeMap::new());
        Self { waiting, under_way: None, settling, tokens: BURST * 1_000, filled_at: now }
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes news. False: there is no room.
    pub fn news(&mut self, key: K, write: W, now: Time) -> bool {
        self.put(key, write, Worth::News, now)
    }

    /// Takes every state that should stand and does not, and forgets waiting ones that are not wanted any more. Returns how
    /// many found no room.
    pub fn states(&mut self, wanted: BTreeMap<K, W>, now: Time) -> usize {
        self.settling.retain(|_, (_, at)| now.since_ms(*at) < SETTLE_MS);
        self.waiting.retain(|key, waiting| waiting.worth == Worth::News || wanted.contains_key(key));
        let mut refused = 0;
        for (key, write) in wanted {
            let settles = self.settling.get(&key).is_some_and(|(written, _)| *written == write);
            if !settles && !self.put(key, write, Worth::State, now) {
                refused += 1;
            }
        }
        refused
    }

    fn put(&mut self, key: K, write: W, worth: Worth, now: Time) -> bool {
        if let Some(waiting) = self.waiting.get_mut(&key) {
            // Its pause stays: the server has not changed its mind for our having changed ours.
            waiting.write = write;
            return true;
        }
        if self.waiting.len() >= MAX_WAITING {
            return false;
        }
        self.waiting.insert(key, Waiting { write, worth, attempts: 0, due: now });
        true
    }

    /// The next write, if one is due and none is under way; states before news, as their keys are ordered.
    pub fn next(&mut self, now: Time) -> Option<(K, W)> {
        self.fill(now);
        if self.under_way.is_some() || self.tokens < 1_000 {
            return None;
        }
        let (key, waiting) = self.waiting.iter().find(|(_, waiting)| waiting.due <= now)?;
        let (key, write) = (key.clone(), waiting.write.clone());
        self.tokens -= 1_000;
        self.under_way = Some(key.clone());
        Some((key, write))
    }

    /// When `next` is worth asking again.
    pub fn due(&self, now: Time) -> Option<Time> {
        if self.under_way.is_some() {
            return None;
        }
        let due = self.waiting.values().map(|waiting| waiting.due).min()?;
        let missing = 1_000_u64.saturating_sub(self.tokens);
        Some(due.max(now.plus_ms(missing.div_ceil(PER_SECOND))))
    }

    /// The write that `next` gave has ended.
    pub fn ended(&mut self, key: &K, write: &W, outcome: Outcome, now: Time) -> Fate {
        self.under_way = None;
        let Some(waiting) = self.waiting.get_mut(key) else { return Fate::Written };
        waiting.attempts += 1;
        // Something newer has taken its place meanwhile, and waits for its own turn.
        let replaced = waiting.write != *write;
        match outcome {
            Outcome::Failed(after) => {
                if waiting.worth == Worth::News && waiting.attempts >= MAX_ATTEMPTS {
                    self.waiting.remove(key);
                    return Fate::Dropped;
                }
                let pause_ms = (FIRST_PAUSE_MS << waiting.attempts.min(10)).min(LONGEST_PAUSE_MS) / 2;
                let after_ms = after.map_or(0, |after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
                waiting.due = now.plus_ms(pause_ms.max(after_ms.min(LONGEST_PAUSE_MS)));
                Fate::Waits
            }
            Outcome::Done | Outcome::Pointless => {
                if waiting.worth == Worth::State {
                    self.settling.insert(key.clone(), (write.clone(), now));
                }
                if replaced {
                    waiting.attempts = 0;
                    waiting.due = now;
                } else {
                    self.waiting.remove(key);
                }
                if outcome == Outcome::Done { Fate::Written } else { Fate::Dropped }
            }
        }
    }

    fn fill(&mut self, now: Time) {
        let gained = now.since_ms(self.filled_at).saturating_mul(PER_SECOND);
        self.tokens = self.tokens.saturating_add(gained).min(BURST * 1_000);
        self.filled_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Box = Outbox<u32, &'static str>;

    fn states(outbox: &mut Box, wanted: &[(u32, &'static str)], now: u64) -> usize {
        outbox.states(wanted.iter().copied().collect(), Time(now))
    }

    #[test]
    fn a_newer_state_takes_the_place_of_an_older_one() {
        let mut outbox = Box::new(Time(0));
        assert_eq!(states(&mut outbox, &[(1, "a")], 0), 0);
        states(&mut outbox, &[(1, "b")], 1);
        assert_eq!(outbox.len(), 1);
        assert_eq!(outbox.next(Time(2)), Some((1, "b")));
        assert_eq!(outbox.next(Time(2)), None, "one at a time");
        states(&mut outbox, &[(1, "c")], 3);
        assert_eq!(outbox.ended(&1, &"b", Outcome::Done, Time(4)), Fate::Written);
        assert_eq!(outbox.next(Time(4)), Some((1, "c")), "what came while it was written is written too");
    }

    #[test]
    fn what_is_written_rests_until_the_watch_has_shown_it() {
        let mut outbox = Box::new(Time(0));
        states(&mut outbox, &[(1, "a")], 0);
        outbox.next(Time(0));
        outbox.ended(&1, &"a", Outcome::Done, Time(0));
        states(&mut outbox, &[(1, "a")], SETTLE_MS - 1);
        assert_eq!(outbox.len(), 0);
        states(&mut outbox, &[(1, "a")], SETTLE_MS);
        assert_eq!(outbox.len(), 1, "somebody has undone it");
        states(&mut outbox, &[], SETTLE_MS);
        assert_eq!(outbox.len(), 0, "not wanted any more");
    }

    #[test]
    fn news_is_given_up_and_a_state_is_not() {
        let mut outbox = Box::new(Time(0));
        assert!(outbox.news(9, "news", Time(0)));
        states(&mut outbox, &[(1, "state")], 0);
        let (mut now, mut dropped) = (0, 0);
        for _ in 0..40 {
            now += LONGEST_PAUSE_MS;
            if let Some((key, write)) = outbox.next(Time(now)) {
                let fate = outbox.ended(&key, &write, Outcome::Failed(None), Time(now));
                dropped += u32::from(fate == Fate::Dropped);
            }
            // With a state that is due first each time, news would wait for ever.
            if let Some((key, write)) = outbox.next(Time(now)) {
                let fate = outbox.ended(&key, &write, Outcome::Failed(None), Time(now));
                dropped += u32::from(fate == Fate::Dropped);
            }
        }
        assert_eq!((dropped, outbox.len()), (1, 1));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_the_servers_own_wish_counts() {
        let mut outbox = Box::new(Time(0));
        let (mut now, mut pauses) = (Time(0), Vec::new());
        states(&mut outbox, &[(1, "a")], 0);
        for _ in 0..12 {
            let (key, write) = outbox.next(now).unwrap();
            outbox.ended(&key, &write, Outcome::Failed(None), now);
            let due = outbox.due(now).unwrap();
            pauses.push(due.since_ms(now));
            now = due;
        }
        assert!(pauses.is_sorted() && pauses[0] == FIRST_PAUSE_MS, "{pauses:?}");
        assert_eq!(pauses.last(), Some(&(LONGEST_PAUSE_MS / 2)));
        let (key, write) = outbox.next(now).unwrap();
        outbox.ended(&key, &write, Outcome::Failed(Some(Duration::from_secs(200))), now);
        assert_eq!(outbox.due(now).unwrap().since_ms(now), 200_000);
    }

    #[test]
    fn the_bucket_and_the_bound_hold() {
        let mut outbox = Outbox::<usize, usize>::new(Time(0));
        let wanted = (0..MAX_WAITING + 5).map(|n| (n, n)).collect();
        assert_eq!(outbox.states(wanted, Time(0)), 5);
        let mut written = 0;
        for ms in 0..10_000 {
            while let Some((key, write)) = outbox.next(Time(ms)) {
                outbox.ended(&key, &write, Outcome::Done, Time(ms));
                written += 1;
            }
        }
        assert_eq!(written, BURST + 10 * PER_SECOND - 1);
    }
}
