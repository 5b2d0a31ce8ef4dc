//! What decides on a node: the pool, or something worse to compare it with.

use flatwire_core::ids::Time;
use flatwire_core::ledger::{LedgerState, Record};
use flatwire_core::pool::{Command, EniRow, Event, Pool};
use flatwire_core::settings::Settings;
use flatwire_core::target::Target;

/// A daemon's brain, without the daemon: facts in, wishes out. The contract is that of `flatwire_core::pool::Pool`.
pub trait Policy {
    /// Its plugin leaves a release on disk while the daemon is away; else DEL fails and the runtime tries again.
    const QUEUES_RELEASES: bool = true;
    /// Starts over what the ledger says.
    fn start(settings: &Settings, ledger: LedgerState, seed: u64, now: Time) -> Self;
    fn step(&mut self, event: Event, now: Time) -> Vec<Command>;
    /// When it wants a `Tick` at the latest.
    fn deadline(&self) -> Option<Time>;
    /// These records could not be written.
    fn persist_failed(&mut self, records: Vec<Record>);
    fn ledger(&self) -> &LedgerState;
    /// Addresses it could hand out this moment without cutting a cool-down short.
    fn free_now(&self, now: Time) -> u32;
    /// Its own account of itself, for a story that ended badly.
    fn account(&self, _now: Time) -> String {
        String::new()
    }
    /// What it still wants of the cloud; `None` if the pool is as it should be, or nothing is known yet.
    fn target(&self, now: Time) -> Option<Target>;
}

impl Policy for Pool {
    fn start(settings: &Settings, ledger: LedgerState, seed: u64, now: Time) -> Self {
        Pool::new(settings.clone(), ledger, seed, now)
    }

    fn step(&mut self, event: Event, now: Time) -> Vec<Command> {
        Pool::step(self, event, now)
    }

    fn deadline(&self) -> Option<Time> {
        self.poll_deadline().map(|(at, _)| at)
    }

    fn persist_failed(&mut self, records: Vec<Record>) {
        Pool::persist_failed(self, records);
    }

    fn ledger(&self) -> &LedgerState {
        Pool::ledger(self)
    }

    fn free_now(&self, now: Time) -> u32 {
        Pool::free_now(self, now)
    }

    fn account(&self, now: Time) -> String {
        let status = self.status(now);
        let enis = status.enis.iter().map(|eni| {
            let EniRow { id, device, state, addresses, prefixes, pods, .. } = eni;
            format!("  {id} device {device}: {addresses} addresses, {prefixes} prefixes, {pods} pods, {state}\n")
        });
        let setbacks = status.setbacks.iter().map(|s| {
            let next_s = s.until.since_ms(now) / 1_000;
            format!("  {} of {}: {} failures, last {}, next in {next_s} s\n", s.action, s.object, s.failures, s.code)
        });
        let counts = format!("  {:?}, {} free, target {:?}\n", status.counts, status.free, status.target);
        enis.chain(setbacks).chain([counts]).collect()
    }

    fn target(&self, now: Time) -> Option<Target> {
        Pool::target(self, now)
    }
}
