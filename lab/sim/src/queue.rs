//! What is due when: the world's only idea of time passing.

use std::collections::BTreeMap;

use flatwire_core::ids::Time;

/// Things by the time they are due; of the same time, first in first out.
#[derive(Debug)]
pub struct Queue<T> {
    due: BTreeMap<(Time, u64), T>,
    count: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { due: BTreeMap::new(), count: 0 }
    }
}

impl<T> Queue<T> {
    pub fn push(&mut self, at: Time, what: T) {
        self.count += 1;
        self.due.insert((at, self.count), what);
    }

    pub fn next(&self) -> Option<Time> {
        self.due.keys().next().map(|(at, _)| *at)
    }

    pub fn last(&self) -> Option<Time> {
        self.due.keys().next_back().map(|(at, _)| *at)
    }

    /// The first thing due by `now`.
    pub fn pop(&mut self, now: Time) -> Option<T> {
        let first = self.due.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(first.remove())
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.due.retain(|_, what| keep(what));
    }
}
