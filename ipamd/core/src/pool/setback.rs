//! What went wrong a moment ago and must rest before it is tried again. The same data answers "why does my pod wait?".

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::{Note, Out, Pool};
use crate::ids::{EniId, SubnetId, Time};
use crate::ports::{CloudError, CloudErrorKind};

/// What rests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// An EC2 action, wherever it is used.
    Action(Cow<'static, str>),
    /// Calls on one ENI.
    Eni(EniId),
    /// /28s for one ENI: single addresses are taken meanwhile.
    EniPrefixes(EniId),
    /// New addresses and ENIs in one subnet.
    Subnet(SubnetId),
    SubnetPrefixes(SubnetId),
    /// The security groups of one ENI.
    Groups(EniId),
    /// The /80 of one ENI.
    Ipv6(EniId),
    /// Giving an ENI back what it lost under a pod.
    Lost(EniId),
    Kernel,
}

/// A failure, how often, since when, and until when its subject rests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setback {
    pub kind: CloudErrorKind,
    pub action: String,
    /// The object it was about.
    pub object: String,
    pub code: String,
    pub message: String,
    pub since: Time,
    pub until: Time,
    pub failures: u32,
    /// The rest has ended; kept until the next try ends, because the next failure is longer.
    pub over: bool,
}

/// First and longest rest by kind, in milliseconds.
fn rest_ms(kind: CloudErrorKind) -> (u64, u64) {
    match kind {
        CloudErrorKind::Throttled => (1_000, 30_000),
        CloudErrorKind::SubnetEmpty => (5_000, 120_000),
        CloudErrorKind::Fragmented => (60_000, 600_000),
        CloudErrorKind::Denied | CloudErrorKind::Invalid => (10_000, 300_000),
        CloudErrorKind::AccountFull | CloudErrorKind::InstanceFull | CloudErrorKind::EniFull => (30_000, 300_000),
        CloudErrorKind::NotFound | CloudErrorKind::Busy | CloudErrorKind::DeviceTaken => (500, 30_000),
        CloudErrorKind::Transient => (500, 30_000),
    }
}

impl Pool {
    /// Notes a failure and lets its subject rest: twice as long each time, plus up to half again so that nodes spread out.
    pub(super) fn set_back(&mut self, subject: Subject, object: String, error: CloudError, now: Time, out: &mut Out) {
        let (first, longest) = rest_ms(error.kind);
        let before = self.setbacks.get(&subject);
        let failures = before.map_or(0, |s| s.failures) + 1;
        let since = before.map_or(now, |s| s.since);
        let base = first.saturating_mul(1 << (failures - 1).min(16)).min(longest);
        let chance = self.random();
        // EC2's own pace for what it throttles; for the rest up to half again, so that nodes spread out.
        let retry_in_ms = match (&subject, error.kind) {
            (Subject::Action(_), CloudErrorKind::Throttled) => self.slow_down(&error.action, now, chance),
            _ => base + chance % (base / 2 + 1),
        };
        let setback = Setback {
            kind: error.kind,
            action: error.action.clone(),
            object,
            code: error.code.clone(),
            message: error.message.clone(),
            since,
            until: now.plus_ms(retry_in_ms),
            failures,
            over: false,
        };
        self.setbacks.insert(subject, setback);
        out.note(Note::CloudFailed { error, retry_in_ms });
    }

    fn slow_down(&mut self, action: &str, now: Time, chance: u64) -> u64 {
        let bucket = self.buckets.iter_mut().find(|(name, _)| **name == action);
        bucket.map_or(1_000, |(_, bucket)| bucket.refused(now, chance))
    }

    /// EC2 has refused this action a moment ago.
    pub(super) fn action_rests(&self, action: &'static str) -> bool {
        !self.setbacks.is_empty() && self.rests(&Subject::Action(Cow::Borrowed(action)))
    }

    pub(super) fn rests(&self, subject: &Subject) -> bool {
        self.setbacks.get(subject).is_some_and(|s| !s.over)
    }

    pub(super) fn recovered(&mut self, subject: &Subject) {
        self.setbacks.remove(subject);
    }
}
