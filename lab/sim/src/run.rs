//! Seeds, run: in silence while all is well, and again aloud when something broke.

use std::fmt::Write as _;

use flatwire_core::pool::Pool;

use crate::invariants::Violation;
use crate::policy::Policy;
use crate::scenario::Scenario;
use crate::story::Telling;
use crate::tally::Tally;
use crate::world::World;

/// A seed whose world broke a rule.
#[derive(Debug, Clone)]
pub struct Failure {
    pub seed: u64,
    pub violation: Violation,
}

/// One seed, in silence.
pub fn run_seed(seed: u64) -> (Tally, Option<Failure>) {
    run_scenario(&Scenario::from_seed(seed))
}

pub fn run_scenario(scenario: &Scenario) -> (Tally, Option<Failure>) {
    let mut world: World<Pool> = World::new(scenario, Telling::Nothing);
    let broken = world.play().err();
    (world.tally, broken.map(|violation| Failure { seed: scenario.seed, violation }))
}

/// The same seed with its story: what broke, what the world was made of, and what happened.
pub fn tell_seed(seed: u64, telling: Telling) -> (String, u64) {
    let scenario = Scenario::from_seed(seed);
    let mut world: World<Pool> = World::new(&scenario, telling);
    let broken = world.play().err();
    let mut text = String::new();
    let vars: Vec<String> = scenario.vars.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let subnets: Vec<&str> = scenario.subnets.iter().map(|plan| plan.cidr).collect();
    let _ = writeln!(text, "seed {seed}: {} in {}, {}", scenario.instance_type, subnets.join(" "), vars.join(" "));
    let _ = write!(text, "{}", world.story);
    if let Some(violation) = broken {
        if let Some(daemon) = world.node.daemon() {
            let _ = write!(text, "the pool at the end\n{}", daemon.account(world.now));
        }
        let _ = writeln!(text, "seed {seed} broke a rule: {violation}");
    }
    (text, world.story.hash())
}

/// What was exercised, as a table.
pub fn report(tally: &Tally, cpu_ms: u64) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "cloud calls                                  ok    failed");
    for (action, calls) in &tally.cloud {
        let _ = writeln!(text, "  {action:<36}{:>9}{:>10}", calls.ok, calls.failed);
    }
    let section = |text: &mut String, title: &str, rows: &mut dyn Iterator<Item = (&str, u64)>| {
        let _ = writeln!(text, "{title}");
        for (name, count) in rows {
            let _ = writeln!(text, "  {name:<36}{count:>9}");
        }
    };
    section(&mut text, "faults", &mut tally.faults.iter().map(|(kind, count)| (kind.as_str(), *count)));
    section(&mut text, "seen", &mut tally.seen.iter().map(|(what, count)| (*what, *count)));
    let rate = tally.node_ms / 60 / cpu_ms.max(1);
    let _ = writeln!(text, "simulated node-hours                  {:>9}", tally.node_hours());
    let _ = writeln!(text, "node-hours per CPU-minute             {rate:>9}");
    text
}
