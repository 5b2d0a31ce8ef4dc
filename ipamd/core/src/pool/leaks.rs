//! ENIs that an IPAM made and nobody has: a node died between creating and attaching one, or between detaching and deleting.
//! They block subnets, security groups and quotas, so somebody must collect them, and nobody may collect what is in use.
//!
//! Only unattached ENIs with the IPAM's own description and instance tag are looked at; with a cluster's name all of that
//! cluster's, without one only this instance's own. Each is marked first, with the marker's name and the time, and deleted
//! by whoever marked it, ten minutes later at the earliest and only if a new reading still shows it unattached. EC2 itself
//! refuses to delete an ENI that is attached.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::grow::{DESCRIBE, TAG_CLUSTER, TAG_INSTANCE};
use super::setback::Subject;
use super::{Note, Op, Out, Pool};
use crate::ids::{EniId, Time};
use crate::ports::{CloudRequest, EniStatus, EniView};

/// `<instance> <Unix seconds>` of whoever means to delete the ENI.
pub const TAG_COLLECTOR: &str = "node.k8s.amazonaws.com/collector";
const DESCRIPTION: &str = "aws-K8S-";
/// How often ENIs are looked for; as long again at most, by chance: every node of the cluster does this.
const LOOK_EVERY_MS: u64 = 3_600_000;
/// From the mark to the deletion. A creation that is merely slow has ended by then.
const GRACE_MS: u64 = 600_000;
/// A mark this old is of a node that is gone itself.
const STALE_MARK_MS: u64 = 7_200_000;
/// Until the next try when readings are to be spared.
const PUT_OFF_MS: u64 = 10_000;
/// ENIs one node deletes in one round.
const MAX_COLLECTED: usize = 5;

#[derive(Debug, Clone, Default)]
pub struct Leaks {
    next_at: Option<Time>,
    to_mark: Vec<EniId>,
    /// With what the reading showed on each.
    to_delete: Vec<(EniId, BTreeSet<IpNet>)>,
}

impl Leaks {
    pub fn next_at(&self) -> Option<Time> {
        self.next_at
    }
}

impl Pool {
    /// One step of the collection, when nothing else is to be asked of EC2.
    pub(super) fn collect_leaks(&mut self, now: Time, out: &mut Out) {
        // Not put off by pods that wait: what has leaked may hold the very addresses they wait for.
        if !self.settings.leaked_cleanup || !self.may_give_back() {
            self.leaks.next_at = None;
            return;
        }
        if self.ledger.node.is_none() {
            return;
        }
        let next_at = match self.leaks.next_at {
            Some(at) => at,
            None => {
                let first = now.plus_ms(GRACE_MS + self.random() % LOOK_EVERY_MS);
                *self.leaks.next_at.insert(first)
            }
        };
        let idle = next_at > now && self.leaks.to_delete.is_empty() && self.leaks.to_mark.is_empty();
        if idle || self.under_way(|op| matches!(op, Op::Leaks | Op::Mark(_) | Op::Collect(_))) {
            return;
        }
        let Some(node) = self.ledger.node.clone() else { return };
        // The reading may be a while ago: what became ours since, or has a pod after all, is not leaked.
        let mut to_delete = std::mem::take(&mut self.leaks.to_delete);
        to_delete.retain(|(eni, slots)| !self.is_claimed(eni, slots));
        self.leaks.to_delete = to_delete;
        if let Some((eni, _)) =
            self.leaks.to_delete.last().cloned().filter(|_| self.may_call("DeleteNetworkInterface", now))
        {
            self.leaks.to_delete.pop();
            self.start(Op::Collect(eni.clone()), CloudRequest::DeleteEni { eni }, now, out);
        } else if let Some(eni) = self.leaks.to_mark.last().cloned().filter(|_| self.may_call("CreateTags", now)) {
            self.leaks.to_mark.pop();
            let mark = format!("{} {}", node.instance, now.0 / 1_000);
            let tags = BTreeMap::from([(TAG_COLLECTOR.to_owned(), mark)]);
            self.start(Op::Mark(eni.clone()), CloudRequest::TagEni { eni, tags }, now, out);
        } else if next_at <= now && !self.may_call(DESCRIBE, now) {
            // Others come first, and none of this is urgent.
            self.leaks.next_at = Some(now.plus_ms(PUT_OFF_MS));
        } else if next_at <= now {
            self.leaks.next_at = Some(now.plus_ms(LOOK_EVERY_MS + self.random() % LOOK_EVERY_MS));
            let tags = match &self.settings.cluster_name {
                Some(cluster) => BTreeMap::from([(TAG_CLUSTER.to_owned(), cluster.clone())]),
                None => BTreeMap::from([(TAG_INSTANCE.to_owned(), node.instance.to_string())]),
            };
            self.start(Op::Leaks, CloudRequest::DescribeUnattached { vpc: node.vpc, tags }, now, out);
        }
    }

    pub(super) fn leaks_found(&mut self, views: &[EniView], now: Time, out: &mut Out) {
        let Some(node) = self.ledger.node.clone() else { return };
        let own = node.instance.to_string();
        self.leaks.to_mark.clear();
        self.leaks.to_delete.clear();
        for view in views {
            let made_by_an_ipam = view.description.starts_with(DESCRIPTION) && view.tags.contains_key(TAG_INSTANCE);
            // An open creation of ours may be this very ENI: the repeated call will find it.
            let may_be_ours = view.tags.get(TAG_INSTANCE) == Some(&own) && !self.ledger.creations.is_empty();
            let claimed = may_be_ours || self.is_claimed(&view.id, &view.slots);
            if !made_by_an_ipam || claimed || view.status != EniStatus::Available {
                continue;
            }
            match view.tags.get(TAG_COLLECTOR).and_then(|mark| parse_mark(mark)) {
                Some((by, at)) if by == own && now.since_ms(at) >= GRACE_MS => {
                    self.leaks.to_delete.push((view.id.clone(), view.slots.clone()))
                }
                Some((_, at)) if now.since_ms(at) < STALE_MARK_MS => {}
                _ => self.leaks.to_mark.push(view.id.clone()),
            }
        }
        self.leaks.to_mark.truncate(MAX_COLLECTED);
        self.leaks.to_delete.truncate(MAX_COLLECTED);
        for eni in &self.leaks.to_mark {
            out.note(Note::Leaked { eni: eni.clone(), to: "found unattached, to be marked" });
        }
    }

    /// It is in the ledger, or a pod here lives on it.
    fn is_claimed(&self, eni: &EniId, slots: &BTreeSet<IpNet>) -> bool {
        self.ledger.enis.contains_key(eni) || self.is_lived_on(slots)
    }

    pub(super) fn leak_marked(&mut self, eni: &EniId, now: Time, out: &mut Out) {
        out.note(Note::Leaked { eni: eni.clone(), to: "marked" });
        let again = now.plus_ms(GRACE_MS + self.random() % GRACE_MS);
        self.leaks.next_at = Some(self.leaks.next_at.map_or(again, |at| at.min(again)));
    }

    pub(super) fn leak_collected(&mut self, eni: &EniId, out: &mut Out) {
        self.recovered(&Subject::Eni(eni.clone()));
        out.note(Note::Leaked { eni: eni.clone(), to: "deleted" });
    }
}

fn parse_mark(mark: &str) -> Option<(&str, Time)> {
    let (by, seconds) = mark.split_once(' ')?;
    let seconds: u64 = seconds.parse().ok()?;
    Some((by, Time(seconds.checked_mul(1_000)?)))
}
