//! What counts as harm, and the figures it is read from.

use std::collections::{BTreeMap, BTreeSet};

use flatwire_core::ids::Time;

use crate::invariants::{Rule, TAG_INSTANCE, Violation};
use crate::policy::Policy;
use crate::runtime::Sandbox;
use crate::tally::Calls;
use crate::world::World;

/// A pod that is still without an address after this waits for good.
const LONG_MS: u64 = 120_000;

/// What an exhibit looks at.
#[derive(Debug, Clone, Copy)]
pub enum Probe {
    /// Pods that wait for an address longer than so many seconds.
    Waits { secs: u64 },
    /// Times a rule of the simulator is broken; the words follow the number.
    Breaks(Rule, &'static str),
    /// Running pods whose address EC2 does not route to the node when all is over.
    Dark,
    /// ENIs an IPAM made that hang on nothing when all is over.
    Leaked,
    /// Calls of one action that EC2 refuses, beyond so many.
    Refused { action: &'static str, most: u64 },
    /// Addresses kept for sandboxes that are gone when all is over.
    Kept,
    /// Sandboxes that cannot be taken down for longer than so many seconds.
    Terminates { secs: u64 },
}

/// What a probe found, in a few words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Harm {
    pub harmed: bool,
    pub count: u64,
    pub text: String,
}

/// What was seen of a world.
#[derive(Debug, Default)]
pub struct Seen {
    pub broken: BTreeMap<Rule, Vec<String>>,
    pub violations: usize,
    /// For how long each pod has waited for its address.
    waits: BTreeMap<u32, u64>,
    /// For how long each sandbox has been taken down.
    ends: BTreeMap<u32, u64>,
    looked_at: Time,
    calls: BTreeMap<&'static str, Calls>,
    waiting: usize,
    dark: usize,
    leaked: usize,
    kept: usize,
}

impl Seen {
    pub fn note(&mut self, violations: Vec<Violation>) {
        self.violations += violations.len();
        for Violation { rule, text } in violations {
            self.broken.entry(rule).or_default().push(text);
        }
    }

    /// Once a second.
    pub fn look<P: Policy>(&mut self, world: &World<P>) {
        let passed_ms = world.now.since_ms(std::mem::replace(&mut self.looked_at, world.now)).min(1_000);
        let runtime = &world.node.runtime;
        for (number, _) in runtime.pods.iter().filter(|(_, pod)| !pod.running) {
            *self.waits.entry(*number).or_default() += passed_ms;
        }
        for (number, _) in runtime.sandboxes.iter().filter(|(_, sandbox)| sandbox.ending) {
            *self.ends.entry(*number).or_default() += passed_ms;
        }
    }

    pub fn end<P: Policy>(&mut self, world: &World<P>) {
        let node = &world.node;
        let waits = |number: &u32| self.waits.get(number).is_some_and(|ms| *ms >= LONG_MS);
        self.waiting = node.runtime.pods.iter().filter(|(number, pod)| !pod.running && waits(number)).count();
        self.calls = world.tally.cloud.clone();
        let routed = world.routed();
        let dark = |sandbox: &&Sandbox| sandbox.wired && sandbox.address.is_some() && !sandbox.is_routed(&routed);
        self.dark = node.runtime.sandboxes.values().filter(dark).count();
        self.leaked = world.ec2.with_enis(world.now, |enis| {
            enis.values().filter(|eni| eni.tags.contains_key(TAG_INSTANCE) && eni.attachment.is_none()).count()
        });
        let known: BTreeSet<_> = node.runtime.sandboxes.values().map(|sandbox| &sandbox.id).collect();
        let held = node.daemon().map(|daemon| daemon.ledger().pods.keys());
        self.kept = held.into_iter().flatten().filter(|id| !known.contains(id)).count();
    }

    /// What must not be, whatever the probe looks at: a rule of the simulator broken, or pods that still have no address.
    pub fn unwell(&self) -> Option<Harm> {
        let rule = self.broken.first_key_value().and_then(|(rule, texts)| {
            let text = format!("broken: {} ({})", rule.sentence(), texts.first()?);
            Some(Harm { harmed: true, count: number(texts.len()), text })
        });
        let waiting = || counted(number(self.waiting), 0, "pods without an address in the end");
        rule.or_else(|| Some(waiting()).filter(|harm| harm.harmed))
    }
}

impl Probe {
    pub fn look(self, seen: &Seen) -> Harm {
        match self {
            Self::Waits { secs } => longest(&seen.waits, secs, "wait", "wait for an address"),
            Self::Terminates { secs } => longest(&seen.ends, secs, "DEL", "stay Terminating"),
            Self::Breaks(rule, words) => counted(number(seen.broken.get(&rule).map_or(0, Vec::len)), 0, words),
            Self::Dark => counted(number(seen.dark), 0, "running pods without packets"),
            Self::Leaked => counted(number(seen.leaked), 0, "ENIs left over"),
            Self::Kept => counted(number(seen.kept), 0, "addresses kept for nobody"),
            Self::Refused { action, most } => {
                let refused = seen.calls.get(action).map_or(0, |calls| calls.failed);
                counted(refused, most, "refused calls")
            }
        }
    }
}

fn counted(count: u64, most: u64, words: &str) -> Harm {
    Harm { harmed: count > most, count, text: format!("{words}: {count}") }
}

fn longest(times: &BTreeMap<u32, u64>, secs: u64, one: &str, many: &str) -> Harm {
    let count = times.values().filter(|ms| **ms > secs * 1_000).count();
    let longest = times.values().max().copied().unwrap_or(0) / 1_000;
    let text = match count {
        0 => format!("longest {one} {longest} s"),
        _ => format!("{count} pods {many} over {secs} s, up to {longest} s"),
    };
    Harm { harmed: count > 0, count: number(count), text }
}

fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
