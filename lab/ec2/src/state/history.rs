//! What ENIs looked like a while ago: the source of every reader that lags (IMDS, `Describe*`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use flatwire_core::ids::{EniId, InstanceId, Time};

use crate::view::EniInfo;

/// Per ENI its states with the time each began; `None` from when it is gone. Empty while nothing lags.
#[derive(Debug, Default)]
pub(crate) struct History {
    past: BTreeMap<EniId, VecDeque<Entry>>,
}

type Entry = (Time, Option<Arc<EniInfo>>);

/// What an ENI looked like at some moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Past {
    /// As it is now: no change is recent enough to be hidden.
    Current,
    Was(Arc<EniInfo>),
    Absent,
}

impl History {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn record(
        &mut self,
        now: Time,
        lag_ms: u64,
        id: &EniId,
        before: Option<&EniInfo>,
        after: Option<&EniInfo>,
    ) {
        if lag_ms == 0 {
            return;
        }
        let states = self.past.entry(id.clone()).or_insert_with(|| {
            // What was there before history began has always been there.
            VecDeque::from([(Time(0), before.cloned().map(Arc::new))])
        });
        states.push_back((now, after.cloned().map(Arc::new)));
    }

    /// Drops what no reader can see any more. An ENI whose last change everybody sees has no history left.
    pub(crate) fn prune(&mut self, now: Time, lag_ms: u64) {
        let horizon = Time(now.0.saturating_sub(lag_ms));
        self.past.retain(|_, states| {
            while states.get(1).is_some_and(|(began, _)| *began <= horizon) {
                states.pop_front();
            }
            states.len() > 1
        });
    }

    pub(crate) fn at(&self, id: &EniId, moment: Time) -> Past {
        let Some(states) = self.past.get(id) else { return Past::Current };
        match states.iter().rev().find(|(began, _)| *began <= moment) {
            Some((_, Some(eni))) => Past::Was(Arc::clone(eni)),
            Some((_, None)) | None => Past::Absent,
        }
    }

    /// The first state of an ENI on the instance it was launched with: that much an instance knows from birth.
    pub(crate) fn born_on(&self, id: &EniId, instance: &InstanceId, launched: Time) -> Option<Arc<EniInfo>> {
        let states = self.past.get(id)?;
        let born = |eni: &&Arc<EniInfo>| {
            eni.attachment.as_ref().is_some_and(|a| a.instance == *instance && a.attached_at == launched)
        };
        states.iter().filter_map(|(_, eni)| eni.as_ref()).find(born).cloned()
    }

    /// ENIs with a past that is still visible, gone ones included.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &EniId> {
        self.past.keys()
    }
}
