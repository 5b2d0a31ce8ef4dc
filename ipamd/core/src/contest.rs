//! Things in the kernel that somebody else keeps changing back. A repair is made at once; one that does not hold is made
//! less and less often, so that two programs that want different things do not spend the node on it, and both are told.
//!
//! Pure: what was repaired goes in with the time, what to let be comes out. What kind of thing it is does not matter here.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::Time;
use crate::ports::{Repair, RepairKind};

/// So many repairs of one object follow each other at once.
pub const QUICK_REPAIRS: u32 = 3;
/// The pause after the last of those; each further one doubles it.
pub const FIRST_PAUSE_MS: u64 = 1_000;
pub const LONGEST_PAUSE_MS: u64 = 300_000;
/// An object that has stood for this long, its pause not counted, starts anew.
pub const FORGIVEN_AFTER_MS: u64 = 60_000;
/// Objects remembered at once; the one repaired longest ago makes room.
pub const MAX_OBJECTS: usize = 1_024;

/// One object, and how often it was repaired of late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contest {
    pub kind: RepairKind,
    pub object: String,
    pub repairs: u32,
    pub since: Time,
    pub last: Time,
    /// It is let be until then.
    pub until: Time,
}

impl Contest {
    /// It was repaired so often in a row that it is somebody's doing and not an accident.
    pub fn is_fought_over(&self) -> bool {
        self.repairs >= QUICK_REPAIRS
    }
}

#[derive(Debug, Clone, Default)]
pub struct Contests {
    by_object: BTreeMap<String, Contest>,
}

impl Contests {
    /// An object was repaired. Where that happens too often, the contest with the pause that begins now.
    pub fn repaired(&mut self, repair: &Repair, now: Time) -> Option<&Contest> {
        if self.by_object.len() >= MAX_OBJECTS && !self.by_object.contains_key(&repair.object) {
            let oldest = self.by_object.values().min_by_key(|contest| contest.last).map(|c| c.object.clone());
            oldest.and_then(|object| self.by_object.remove(&object));
        }
        let contest = self.by_object.entry(repair.object.clone()).or_insert_with(|| Contest {
            kind: repair.kind,
            object: repair.object.clone(),
            repairs: 0,
            since: now,
            last: now,
            until: now,
        });
        contest.repairs += 1;
        contest.last = now;
        contest.until = now.plus_ms(pause_ms(contest.repairs));
        contest.is_fought_over().then_some(&*contest)
    }

    /// Forgets what has stood long enough.
    pub fn forgive(&mut self, now: Time) {
        self.by_object.retain(|_, contest| now.since_ms(contest.until) < FORGIVEN_AFTER_MS);
    }

    /// Objects not to be touched now.
    pub fn let_be(&self, now: Time) -> BTreeSet<String> {
        self.by_object.values().filter(|c| c.until > now).map(|contest| contest.object.clone()).collect()
    }

    /// When the next pause ends.
    pub fn next_at(&self, now: Time) -> Option<Time> {
        self.by_object.values().map(|contest| contest.until).filter(|until| *until > now).min()
    }

    pub fn fought_over(&self) -> impl Iterator<Item = &Contest> {
        self.by_object.values().filter(|contest| contest.is_fought_over())
    }
}

fn pause_ms(repairs: u32) -> u64 {
    match repairs.checked_sub(QUICK_REPAIRS) {
        None => 0,
        Some(beyond) => FIRST_PAUSE_MS.saturating_mul(1 << beyond.min(16)).min(LONGEST_PAUSE_MS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repair(object: &str) -> Repair {
        Repair { kind: RepairKind::Rule, object: object.to_owned(), text: format!("{object} added"), undone: true }
    }

    #[test]
    fn three_repairs_are_quick_and_then_the_pause_doubles_up_to_five_minutes() {
        let (mut contests, mut now, mut pauses) = (Contests::default(), Time(0), Vec::new());
        for _ in 0..14 {
            assert!(contests.let_be(now).is_empty());
            contests.repaired(&repair("rule 512"), now);
            let until = contests.next_at(now).unwrap_or(now);
            pauses.push(until.since_ms(now) / 1_000);
            // The other one changes it back as soon as it may be repaired.
            now = until;
        }
        assert_eq!(pauses, [0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
    }

    #[test]
    fn a_fight_over_one_object_leaves_the_others_alone() {
        let mut contests = Contests::default();
        let now = Time(1_000);
        for _ in 0..QUICK_REPAIRS {
            contests.repaired(&repair("rule 512"), now);
        }
        assert!(contests.repaired(&repair("rule 1024"), now).is_none());
        assert_eq!(contests.let_be(now), BTreeSet::from(["rule 512".to_owned()]));
        assert_eq!(contests.fought_over().map(|c| c.object.as_str()).collect::<Vec<_>>(), ["rule 512"]);
    }

    #[test]
    fn what_stands_for_a_minute_after_its_pause_is_forgiven() {
        let mut contests = Contests::default();
        let mut now = Time(0);
        for _ in 0..4 {
            contests.repaired(&repair("rule 512"), now);
        }
        now = now.plus_ms(2_000 + FORGIVEN_AFTER_MS - 1);
        contests.forgive(now);
        assert_eq!(contests.fought_over().count(), 1);
        contests.forgive(now.plus_ms(1));
        assert_eq!(contests.fought_over().count(), 0);
        assert!(contests.repaired(&repair("rule 512"), now.plus_ms(1)).is_none(), "it starts anew");
    }

    #[test]
    fn memory_is_bounded_and_loses_the_oldest() {
        let mut contests = Contests::default();
        for n in 0..=MAX_OBJECTS {
            contests.repaired(&repair(&format!("rule {n}")), Time(u64::try_from(n).unwrap()));
        }
        assert_eq!(contests.by_object.len(), MAX_OBJECTS);
        assert!(!contests.by_object.contains_key("rule 0") && contests.by_object.contains_key("rule 1"));
    }
}
