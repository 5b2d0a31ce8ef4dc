//! The figures of fleets side by side, for people.

use std::fmt::Write as _;

use super::Outcome;
use crate::shape::Shape;

/// One block per shape: ours and the add-on's beside the floor, and below that the calls by action.
pub fn table(shape: &Shape, nodes: u32, ours: &Outcome, addon: &Outcome) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{nodes} × {shape}; floor {}", seconds(ours.floor_ms));
    let _ = writeln!(
        text,
        "  {:<34}{:>10}{:>10}{:>9}{:>9}{:>9}{:>10}",
        "", "last pod", "× floor", "p50", "p99", "calls", "refused"
    );
    for (who, outcome) in [("ours", ours), ("the add-on", addon)] {
        let took = outcome.took_ms.map_or_else(|| "never".to_owned(), seconds);
        let ratio = outcome.over_floor().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
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
