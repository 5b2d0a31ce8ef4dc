//! What one fresh node asks of EC2 until its pods are served, beside the least that the limits of its type allow.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Brain, Fleet, Outcome};
use crate::shape::{Shape, Tariff};

/// From one prefix at launch that is enough to nodes that need every ENI they can have.
const SHAPES: [Shape; 9] = [
    Shape::prefixes("m5.large", 7, 110),
    Shape::prefixes("m5.large", 1, 110),
    Shape::prefixes("m5.large", 0, 110),
    Shape::prefixes("m5.24xlarge", 0, 250),
    Shape::singles("t3.medium", 5),
    Shape::singles("m5.large", 9),
    Shape::singles("m5.large", 16),
    Shape::singles("m5.large", 27),
    Shape::singles("m5.4xlarge", 110),
];

/// The calls of fresh nodes, as a table.
pub struct Bill {
    pub text: String,
    /// No node asked for more than the least, nor left a pod without an address.
    pub least: bool,
}

/// A node of one shape by itself, its pods known from the API server as it starts.
fn alone(shape: &Shape) -> Outcome {
    Fleet { others: 0, ..Fleet::new(1, shape.clone()) }.run(Brain::Ours)
}

fn tariff(outcome: &Outcome) -> Tariff {
    outcome.calls.iter().map(|(action, count)| (action.clone(), count.ok + count.errors)).collect()
}

fn sum(tariff: &Tariff) -> u64 {
    tariff.values().sum()
}

pub fn bill() -> Bill {
    let mut text = String::new();
    let mut all_least = true;
    let _ = writeln!(
        text,
        "{:<46}{:>8}{:>6}{:>7}   by action (least where it differs)",
        "a fresh node", "served", "least", "calls"
    );
    for shape in &SHAPES {
        let outcome = alone(shape);
        let (least, calls) = (shape.minimum(), tariff(&outcome));
        let actions: BTreeSet<_> = least.keys().chain(calls.keys()).collect();
        let of = |tariff: &Tariff, action: &str| tariff.get(action).copied().unwrap_or(0);
        let parts: Vec<String> = actions
            .into_iter()
            .map(|action| match (of(&calls, action), of(&least, action)) {
                (made, least) if made == least => format!("{action} {made}"),
                (made, least) => format!("{action} {made} ({least})"),
            })
            .collect();
        all_least &= calls == least && outcome.took_ms.is_some();
        let served = outcome.waits_ms.len();
        let shape = shape.to_string();
        let _ = writeln!(text, "{shape:<46}{served:>8}{:>6}{:>7}   {}", sum(&least), sum(&calls), parts.join(", "));
    }
    Bill { text, least: all_least }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_node_asks_ec2_no_more_than_the_limits_make_it() {
        for shape in &SHAPES {
            let outcome = alone(shape);
            assert_eq!(outcome.waits_ms.len(), usize::try_from(shape.pods).unwrap(), "{shape}");
            assert_eq!(tariff(&outcome), shape.minimum(), "{shape}");
        }
    }
}
