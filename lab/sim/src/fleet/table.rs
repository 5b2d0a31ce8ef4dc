//! The figures of fleets side by side, for people.

use std::fmt::Write as _;

use super::{Brain, Fleet, Outcome};
use crate::shape::Shape;

/// The first is the one that is judged; the others show what the limits make of other nodes.
pub const SHAPES: [Shape; 4] = [
    Shape::singles("m5.large", 16),
    Shape::singles("m5.large", 27),
    Shape::prefixes("m5.large", 0, 12),
    Shape::prefixes("m5.large", 7, 110),
];
/// How long the fleet may take, in floors.
const MOST_OVER_FLOOR: f64 = 1.2;

/// A fleet of one shape, under both policies.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub text: String,
    /// Times the floor, in words.
    pub ours: String,
    pub addon: String,
    /// Ours is near enough to the floor.
    pub holds: bool,
}

pub fn race_both(nodes: u32, shape: &Shape, seed: u64) -> Verdict {
    let fleet = Fleet { seed, ..Fleet::new(nodes, shape.clone()) };
    let (ours, addon) = (fleet.run(Brain::Ours), fleet.run(Brain::AddOn));
    Verdict {
        text: table(shape, nodes, &ours, &addon),
        ours: ratio(&ours),
        addon: ratio(&addon),
        holds: ours.over_floor().is_some_and(|ratio| ratio <= MOST_OVER_FLOOR),
    }
}

fn ratio(outcome: &Outcome) -> String {
    match outcome.took_ms {
        None => "never".to_owned(),
        Some(_) => outcome.over_floor().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
    }
}

/// One block per shape: ours and the add-on's beside the floor, and below that the calls by action.
fn table(shape: &Shape, nodes: u32, ours: &Outcome, addon: &Outcome) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{nodes} × {shape}; floor {}", seconds(ours.floor_ms));
    let _ = writeln!(
        text,
        "  {:<34}{:>10}{:>10}{:>9}{:>9}{:>9}{:>10}",
        "", "last pod", "× floor", "p50", "p99", "calls", "refused"
    );
    for (who, outcome) in [("ours", ours), ("the add-on", addon)] {
        let took = outcome.took_ms.map_or_else(|| "never".to_owned(), seconds);
        let ratio = ratio(outcome);
        let (p50, p99) = (seconds(outcome.percentile_ms(50)), seconds(outcome.percentile_ms(99)));
        let calls = outcome.counts();
        let _ = writeln!(
            text,
            "  {who:<34}{took:>10}{ratio:>10}{p50:>9}{p99:>9}{:>9}{:>10}",
            calls.ok + calls.errors,
            calls.errors
        );
    }
    let _ = writeln!(text, "  {:<34}{:>10}{:>10}{:>18}{:>19}", "", "ours", "refused", "the add-on", "refused");
    let actions: std::collections::BTreeSet<&String> = ours.calls.keys().chain(addon.calls.keys()).collect();
    for action in actions {
        let of = |outcome: &Outcome| outcome.calls.get(action).copied().unwrap_or_default();
        let (a, b) = (of(ours), of(addon));
        let _ = writeln!(
            text,
            "  {action:<34}{:>10}{:>10}{:>18}{:>19}",
            a.ok + a.errors,
            a.errors,
            b.ok + b.errors,
            b.errors
        );
    }
    text
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1_000, ms % 1_000 / 100)
}
