//! Seeds that once broke a rule, a range of others, and what a world promises to whoever builds on it.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use flatwire_core::pool::Pool;
use lab_sim::{Act, Habits, Scenario, Telling, World, run_scenario, run_seed, tell_seed};

/// Fresh seeds run besides the corpus.
const FRESH: u64 = 200;

/// `<seed> <what it once showed>` per line.
fn corpus() -> Vec<u64> {
    let lines = include_str!("../seeds.txt").lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once(' ').unwrap_or((line, "")).0.parse().unwrap()).collect()
}

fn hold(seeds: impl IntoIterator<Item = u64>) {
    let failures: Vec<String> = seeds
        .into_iter()
        .filter_map(|seed| run_seed(seed).1)
        .map(|failure| format!("{}\n{}", tell_seed(failure.seed, Telling::Tail(40)).0, failure.violation))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn seeds_that_once_failed_hold() {
    hold(corpus());
    // Most of them failed when all worlds were IPv4's.
    for seed in corpus() {
        let (_, failure) = run_scenario(&Scenario::from_seed(seed).with_ipv4_alone());
        assert!(failure.is_none(), "seed {seed} with IPv4 alone: {}", failure.unwrap().violation);
    }
}

#[test]
fn fresh_seeds_hold() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let first = u64::from(now.subsec_nanos());
    println!("seeds {first} to {}", first + FRESH - 1);
    hold(first..first + FRESH);
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in [3, 40, 310] {
        let (a, b) = (tell_seed(seed, Telling::Full), tell_seed(seed, Telling::Full));
        assert_eq!(a.1, b.1);
        assert_eq!(a.0, b.0);
    }
    assert_ne!(tell_seed(3, Telling::Full).1, tell_seed(4, Telling::Full).1);
}

/// Three pods on a healthy node, one crash, and a scenario written by hand.
#[test]
fn a_scenario_by_hand_says_what_it_needs_and_is_judged_like_any_other() {
    let scenario = Scenario::new(7)
        .instance_type("m5.large")
        .var("WARM_IP_TARGET", 2)
        .habits(Habits { patience_ms: 15_000, ..Habits::default() })
        .at(0, Act::Pods { count: 3, life_ms: None })
        .at(2_000, Act::Crash { effects: 1, down_ms: 500 })
        .at(5_000, Act::Pods { count: 2, life_ms: None })
        .at(20_000, Act::Quiet);
    let mut world: World<Pool> = World::new(&scenario, Telling::Full);
    world.play().unwrap_or_else(|violation| panic!("{}\n{violation}", world.story));
    assert_eq!(world.node.runtime.running(), 5);
    assert_eq!(world.tally.faults.get("daemon crash"), Some(&1));
}
