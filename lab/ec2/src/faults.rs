//! Decides which injected fault meets a call. Chance comes from a generator of its own, so that injecting faults does
//! not change which addresses are picked.

use crate::error::ApiError;
use crate::filters::wildcard;
use crate::options::{Fault, Faults, When};
use crate::rng::Rng;

pub(crate) struct Injector {
    faults: Faults,
    rng: Rng,
}

/// What happens to one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Nothing,
    Refuse(ApiError),
    LoseReply,
    Break,
    Delay(u64),
}

impl Injector {
    pub(crate) fn new(seed: u64) -> Self {
        Self { faults: Faults::default(), rng: Rng::new(seed ^ 0xfa17) }
    }

    pub(crate) fn set(&mut self, faults: Faults) {
        self.faults = faults;
    }

    pub(crate) fn decide(&mut self, action: &str, access_key: &str) -> Outcome {
        for rule in &mut self.faults.calls {
            let fits = wildcard(&rule.action, action) && rule.access_key.as_ref().is_none_or(|key| key == access_key);
            if fits && fires(&mut rule.when, &mut self.rng) {
                return match &rule.fault {
                    Fault::Error { code, message } => Outcome::Refuse(ApiError::new(code, message)),
                    Fault::LostReply => Outcome::LoseReply,
                    Fault::BrokenConnection => Outcome::Break,
                    Fault::Delay { ms } => Outcome::Delay(*ms),
                };
            }
        }
        Outcome::Nothing
    }

    /// The status that a read of IMDS is answered with instead.
    pub(crate) fn decide_imds(&mut self, path: &str) -> Option<u16> {
        let rules = self.faults.imds.iter_mut().filter(|rule| path.contains(&rule.path));
        for rule in rules {
            if fires(&mut rule.when, &mut self.rng) {
                return Some(rule.status);
            }
        }
        None
    }
}

fn fires(when: &mut When, rng: &mut Rng) -> bool {
    match when {
        When::Always => true,
        When::Next(0) => false,
        When::Next(left) => {
            *left -= 1;
            true
        }
        When::PerMillion(share) => rng.chance(*share),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::FaultRule;

    fn rule(action: &str, when: When, fault: Fault) -> FaultRule {
        FaultRule { action: action.into(), access_key: None, when, fault }
    }

    #[test]
    fn rules_fire_as_often_as_they_say() {
        let mut injector = Injector::new(1);
        injector.set(Faults {
            calls: vec![
                rule("Assign*", When::Next(2), Fault::LostReply),
                rule("*", When::PerMillion(250_000), Fault::Delay { ms: 5 }),
            ],
            imds: Vec::new(),
        });
        let outcomes: Vec<_> = (0..3).map(|_| injector.decide("AssignPrivateIpAddresses", "k")).collect();
        assert_eq!(outcomes.iter().filter(|o| **o == Outcome::LoseReply).count(), 2);
        let delayed = (0..1_000).filter(|_| injector.decide("CreateTags", "k") == Outcome::Delay(5)).count();
        assert!((200..300).contains(&delayed), "{delayed}");
    }
}
