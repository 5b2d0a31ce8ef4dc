//! Is the node short of addresses? A condition that schedulers, autoscalers and people act on must not flap: a shortage is
//! told once it has lasted, and is over once it has stayed away for longer. Pure.

use flatwire_core::ids::Time;
use flatwire_core::pool::Failure;

/// A shortage is told after this. An ENI on its way is none, and a burst is served in less.
pub const SET_AFTER_MS: u64 = 30_000;
/// It is over after this.
pub const CLEAR_AFTER_MS: u64 = 120_000;

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// `None`: there are addresses enough.
    pub shortage: Option<Failure>,
    pub since: Time,
}

#[derive(Debug)]
pub struct Pressure {
    told: Told,
    /// Since when what is seen is the opposite of what is told.
    contradicted: Option<Time>,
    /// When the reason was told last.
    renewed: Time,
}

impl Pressure {
    /// As the node's object shows it: a restart is no news.
    pub fn new(shown: Option<Failure>, now: Time) -> Self {
        Self { told: Told { shortage: shown, since: now }, contradicted: None, renewed: now }
    }

    pub fn told(&self) -> &Told {
        &self.told
    }

    pub fn observe(&mut self, seen: Option<&Failure>, now: Time) {
        let (agrees, hold_ms) = match (&self.told.shortage, seen) {
            (None, None) => (true, 0),
            (None, Some(_)) => (false, SET_AFTER_MS),
            (Some(_), None) => (false, CLEAR_AFTER_MS),
            (Some(told), Some(seen)) => {
                // The same shortage for another reason; its words change with every look and are left as they were told.
                if told.reason != seen.reason && now.since_ms(self.renewed) >= SET_AFTER_MS {
                    self.told.shortage = Some(seen.clone());
                    self.renewed = now;
                }
                (true, 0)
            }
        };
        if agrees {
            self.contradicted = None;
            return;
        }
        let since = *self.contradicted.get_or_insert(now);
        if now.since_ms(since) >= hold_ms {
            self.told = Told { shortage: seen.cloned(), since: now };
            self.renewed = now;
            self.contradicted = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::pool::Reason;
    use proptest::prelude::*;

    fn failure(reason: Reason) -> Failure {
        Failure::retryable(reason, format!("{reason}"))
    }

    fn reason(pressure: &Pressure) -> Option<Reason> {
        pressure.told().shortage.as_ref().map(|failure| failure.reason)
    }

    #[test]
    fn a_shortage_is_told_when_it_lasts_and_over_when_it_stays_away() {
        let (mut pressure, empty) = (Pressure::new(None, Time(0)), failure(Reason::SubnetEmpty));
        pressure.observe(Some(&empty), Time(1_000));
        pressure.observe(Some(&empty), Time(30_999));
        assert_eq!(reason(&pressure), None, "not yet");
        pressure.observe(Some(&empty), Time(31_000));
        assert_eq!((reason(&pressure), pressure.told().since), (Some(Reason::SubnetEmpty), Time(31_000)));
        pressure.observe(None, Time(40_000));
        pressure.observe(Some(&empty), Time(100_000));
        pressure.observe(None, Time(110_000));
        pressure.observe(None, Time(229_999));
        assert_eq!(reason(&pressure), Some(Reason::SubnetEmpty), "it came back in between");
        pressure.observe(None, Time(230_000));
        assert_eq!((reason(&pressure), pressure.told().since), (None, Time(230_000)));
    }

    #[test]
    fn a_short_dip_is_never_told() {
        let (mut pressure, empty) = (Pressure::new(None, Time(0)), failure(Reason::Throttled));
        for minute in 0..60 {
            pressure.observe(Some(&empty), Time(minute * 60_000));
            pressure.observe(Some(&empty), Time(minute * 60_000 + 20_000));
            pressure.observe(None, Time(minute * 60_000 + 25_000));
            assert_eq!(reason(&pressure), None);
        }
    }

    #[test]
    fn reasons_that_take_turns_are_one_shortage() {
        let mut pressure = Pressure::new(None, Time(0));
        for second in 0..=30 {
            let seen = if second % 2 == 0 { Reason::SubnetEmpty } else { Reason::Throttled };
            pressure.observe(Some(&failure(seen)), Time(second * 1_000));
        }
        assert_eq!(reason(&pressure), Some(Reason::SubnetEmpty));
        pressure.observe(Some(&failure(Reason::Denied)), Time(59_000));
        assert_eq!(reason(&pressure), Some(Reason::SubnetEmpty), "a new reason is not told at once");
        pressure.observe(Some(&failure(Reason::Denied)), Time(60_000));
        assert_eq!((reason(&pressure), pressure.told().since), (Some(Reason::Denied), Time(30_000)));
    }

    proptest! {
        /// Whatever is seen, what is told changes no faster than the hold-downs allow.
        #[test]
        fn it_never_flaps(seen in prop::collection::vec(any::<bool>(), 1..600)) {
            let mut pressure = Pressure::new(None, Time(0));
            let empty = failure(Reason::SubnetEmpty);
            let mut last: Option<(bool, u64)> = None;
            let mut told = false;
            for (second, short) in (1u64..).zip(seen) {
                pressure.observe(short.then_some(&empty), Time(second * 1_000));
                let now_told = pressure.told().shortage.is_some();
                if now_told != told {
                    if let Some((was, at)) = last {
                        let held_ms = if was { CLEAR_AFTER_MS } else { SET_AFTER_MS };
                        prop_assert!((second - at) * 1_000 >= held_ms);
                    }
                    told = now_told;
                    last = Some((told, second));
                }
            }
        }
    }
}
