//! What was exercised: counted per world, summed over worlds.

use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    pub ok: u64,
    pub failed: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub seeds: u64,
    /// Calls of the policy's step function.
    pub steps: u64,
    /// Simulated time of nodes.
    pub node_ms: u64,
    pub cloud: BTreeMap<&'static str, Calls>,
    /// What went wrong on purpose, by kind.
    pub faults: BTreeMap<String, u64>,
    /// What became of pods and what the pool said, by name.
    pub seen: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub fn fault(&mut self, kind: &str) {
        match self.faults.get_mut(kind) {
            Some(count) => *count += 1,
            None => {
                self.faults.insert(kind.to_owned(), 1);
            }
        }
    }

    pub fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.node_ms += other.node_ms;
        for (action, calls) in &other.cloud {
            let sum = self.cloud.entry(action).or_default();
            sum.ok += calls.ok;
            sum.failed += calls.failed;
        }
        for (kind, count) in &other.faults {
            *self.faults.entry(kind.clone()).or_default() += count;
        }
        for (what, count) in &other.seen {
            *self.seen.entry(what).or_default() += count;
        }
    }

    pub fn node_hours(&self) -> u64 {
        self.node_ms / 3_600_000
    }
}
