//! Giving back, behind fences. What goes is chosen by `crate::release`; here is the order of effects:
//!
//! 1. The ledger says so. From then on nothing is handed out from it, whatever happens to this process.
//! 2. The kernel is read once more, by a reading that began after that. A pod route in it calls the release off.
//! 3. EC2 is called. After a lost answer the fence stays until EC2 has said which it is.
//! 4. The ledger forgets.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::compare::list;
use super::setback::Subject;
use super::{Note, Op, Out, Pool};
use crate::families;
use crate::ids::{DeviceIndex, EniId, Time};
use crate::ledger::{EniRecord, Progress, Record};
use crate::pick;
use crate::plan::Means;
use crate::ports::CloudRequest;
use crate::release::{self, EniUse, Release, SlotUse};
use crate::target::Wanted;

/// How often the pool looks for something to give back while it holds more than it wants.
const LOOK_EVERY_MS: u64 = 30_000;

impl Pool {
    pub(super) fn give_back(&mut self, now: Time, out: &mut Out) {
        if !self.may_give_back() || !self.waiting.is_empty() {
            self.lift_fences(out);
        }
        if !self.may_give_back() {
            self.release_at = None;
            return;
        }
        self.unassign_fenced(now, out);
        self.detach_fenced(now, out);
        self.delete_detached(now, out);
        self.choose_release(now, out);
    }

    /// Fences the next thing to go, when nothing is wanted and nothing else is going.
    fn choose_release(&mut self, now: Time, out: &mut Out) {
        let Some(target) = self.target(now) else {
            self.release_at = None;
            return;
        };
        let looking = self.release_at.is_none_or(|at| at <= now);
        let singles = self.idle_singles();
        if target.spare == 0 && target.surplus == 0 && singles == 0 && !self.has_idle_eni() {
            self.release_at = None;
            return;
        }
        if !looking {
            return;
        }
        // By chance, so that nodes that grew together do not shrink together.
        self.release_at = Some(now.plus_ms(LOOK_EVERY_MS + self.random() % LOOK_EVERY_MS));
        let going = !self.ledger.releasing.is_empty() || self.ledger.enis.values().any(|eni| eni.leaving.is_some());
        let busy = self.under_way(|op| op.changes().is_some()) || !self.ledger.creations.is_empty();
        let first_look = self.verify_due || self.kernel.read_at.is_none();
        if going || busy || first_look || !self.waiting.is_empty() {
            return;
        }
        let Some(frame) = self.frame() else { return };
        let mut uses = self.uses(now);
        let mut chosen = match target.wanted {
            Wanted::Enough => release::release(&target, frame.mode, &uses),
            _ => None,
        };
        if chosen.is_none() && singles > 0 && self.is_full(now) {
            uses.retain(|eni| self.may_have_prefixes(&eni.eni));
            chosen = release::room_for_a_prefix(&uses);
        }
        let Some(chosen) = chosen else { return };
        // A fence costs addresses while it stands: none is put up for a call that could not be made.
        let action = match &chosen {
            Release::Slots { .. } => "UnassignPrivateIpAddresses",
            Release::Eni(_) => "DetachNetworkInterface",
        };
        if !self.may_call(action, now) {
            return;
        }
        let eni = match &chosen {
            Release::Slots { eni, slots } => {
                out.note(Note::Release { why: target.why.to_string(), eni: eni.clone(), slots: slots.clone() });
                self.record(Record::Releasing { eni: eni.clone(), slots: slots.clone() }, out);
                eni.clone()
            }
            Release::Eni(eni) => {
                let slots = self.ledger.slots.get(eni).cloned().unwrap_or_default();
                out.note(Note::Release { why: target.why.to_string(), eni: eni.clone(), slots });
                if let Some(record) = self.ledger.enis.get(eni).cloned() {
                    self.record(Record::Eni(EniRecord { leaving: Some(now), ..record }), out);
                }
                eni.clone()
            }
        };
        if let Some(live) = self.live.get_mut(&eni) {
            live.fenced_at = Some(now);
        }
        self.kernel.recheck_at = Some(now);
    }

    /// Every slot that the instance can have is taken.
    fn is_full(&self, now: Time) -> bool {
        let room = |means: &Means| means.new_enis > 0 || means.enis.iter().any(|eni| eni.free_slots > 0);
        self.means(now).is_some_and(|means| !room(&means))
    }

    /// EC2 has not refused the ENI or its subnet a /28 a moment ago.
    fn may_have_prefixes(&self, eni: &EniId) -> bool {
        let subnet = self.ledger.enis.get(eni).map(|record| Subject::SubnetPrefixes(record.subnet.clone()));
        !self.rests(&Subject::EniPrefixes(eni.clone())) && subnet.is_none_or(|subnet| !self.rests(&subnet))
    }

    fn has_idle_eni(&self) -> bool {
        let empty = |eni: &&EniRecord| !self.ledger.pods.values().any(|a| a.eni == eni.id);
        self.ledger.enis.values().filter(|eni| eni.device != DeviceIndex::PRIMARY && eni.created).any(|eni| empty(&eni))
    }

    /// Takes back what was decided and not yet asked of EC2: whoever waits comes before what is to go. True if there was any.
    pub(super) fn lift_fences(&mut self, out: &mut Out) -> bool {
        let certain = |pool: &Self, eni: &EniId| {
            let fenced = pool.live.get(eni).is_some_and(|live| live.fenced_at.is_some() && !live.fence_uncertain);
            fenced && !pool.under_way(|op| op.changes() == Some(eni))
        };
        let slots = self.ledger.releasing.iter().filter(|(eni, _)| certain(self, eni));
        let slots: Vec<(EniId, BTreeSet<IpNet>)> = slots.map(|(eni, slots)| (eni.clone(), slots.clone())).collect();
        let leaving = |eni: &&EniRecord| eni.leaving.is_some() && eni.progress >= Progress::Attached;
        let enis = self.ledger.enis.values().filter(leaving).filter(|eni| certain(self, &eni.id));
        let enis: Vec<EniId> = enis.map(|eni| eni.id.clone()).collect();
        let any = !slots.is_empty() || !enis.is_empty();
        for (eni, slots) in slots {
            self.keep(&eni, slots, "it is needed, or nothing may be given back now", out);
        }
        for eni in enis {
            self.stay(&eni, "it is needed, or nothing may be given back now", out);
        }
        any
    }

    /// Every ENI in service with how long each of its slots has served nobody.
    fn uses(&self, now: Time) -> Vec<EniUse> {
        let pods = self.pods_by_eni();
        let settled = |eni: &&EniRecord| eni.progress == Progress::Settled && eni.leaving.is_none();
        let enis =
            self.ledger.enis.values().filter(settled).filter(|eni| {
                !self.is_gone(&eni.id) && !self.unmanaged.contains(&eni.id) && !self.is_changing(&eni.id)
            });
        enis.filter_map(|eni| {
            let live = self.live.get(&eni.id)?;
            let unseen = self.ledger.unseen.get(&eni.id);
            let held = self.ledger.slots.get(&eni.id).into_iter().flatten();
            let slots = held.filter(|slot| self.settings.families.picks_from(slot)).map(|slot| SlotUse {
                slot: *slot,
                idle_ms: self.idle_ms(slot, live.gained.get(slot).copied().unwrap_or(live.since), now),
            });
            Some(EniUse {
                eni: eni.id.clone(),
                device: eni.device,
                pods: pods.get(&eni.id).copied().unwrap_or(0),
                ours_to_delete: eni.created && unseen.is_none(),
                age_ms: now.since_ms(live.since),
                slots: slots.filter(|slot| unseen.is_none_or(|unseen| !unseen.contains_key(&slot.slot))).collect(),
            })
        })
        .collect()
    }

    fn idle_ms(&self, slot: &IpNet, came_at: Time, now: Time) -> Option<u64> {
        if self.somebody_lives_in(slot) {
            return None;
        }
        let cooldown_ms = self.settings.cooldown_ms();
        let mut since = came_at;
        for (_, freed_at) in self.ledger.freed.range(pick::range(slot)) {
            if now.since_ms(*freed_at) < cooldown_ms {
                return None;
            }
            since = since.max(freed_at.plus_ms(cooldown_ms));
        }
        Some(now.since_ms(since))
    }

    /// A reading of the kernel that began after the fence has come back.
    fn looked_since_fence(&self, eni: &EniId) -> bool {
        let fenced_at = self.live.get(eni).and_then(|live| live.fenced_at);
        fenced_at.is_some_and(|fenced_at| self.kernel.read_at.is_some_and(|read_at| read_at >= fenced_at))
    }

    /// Whether a fence of an earlier life, or one whose call got no answer, may be lifted: only EC2 knows.
    fn fence_restored(&mut self, eni: &EniId, now: Time) {
        if let Some(live) = self.live.get_mut(eni).filter(|live| live.fenced_at.is_none()) {
            live.fenced_at = Some(now);
            live.fence_uncertain = true;
            self.kernel.recheck_at = Some(now);
        }
    }

    fn unassign_fenced(&mut self, now: Time, out: &mut Out) {
        let fenced: Vec<(EniId, BTreeSet<IpNet>)> =
            self.ledger.releasing.iter().map(|(eni, slots)| (eni.clone(), slots.clone())).collect();
        for (eni, slots) in fenced {
            self.fence_restored(&eni, now);
            if !self.looked_since_fence(&eni) || self.is_gone(&eni) {
                continue;
            }
            let lived_in: BTreeSet<IpNet> = slots.iter().filter(|slot| self.somebody_lives_in(slot)).copied().collect();
            if !lived_in.is_empty() {
                if !self.live.get(&eni).is_some_and(|live| live.fence_uncertain) {
                    self.keep(&eni, lived_in, "the kernel shows a pod there", out);
                }
                continue;
            }
            let busy = self.is_changing(&eni);
            if busy || self.rests(&Subject::Eni(eni.clone())) || !self.may_call("UnassignPrivateIpAddresses", now) {
                continue;
            }
            // Addresses and prefixes go in calls of their own.
            let single = slots.iter().any(|slot| pick::size(slot) == 1);
            let slots: BTreeSet<IpNet> = slots.into_iter().filter(|slot| (pick::size(slot) == 1) == single).collect();
            if let Some(live) = self.live.get_mut(&eni) {
                live.fenced_at = Some(now);
            }
            let request = CloudRequest::Unassign { eni: eni.clone(), slots: slots.clone() };
            self.start(Op::Unassign { eni, slots }, request, now, out);
        }
    }

    fn detach_fenced(&mut self, now: Time, out: &mut Out) {
        let leaving = |eni: &&EniRecord| eni.leaving.is_some() && eni.progress >= Progress::Attached;
        let leaving: Vec<EniRecord> = self.ledger.enis.values().filter(leaving).cloned().collect();
        for eni in leaving {
            self.fence_restored(&eni.id, now);
            if !self.looked_since_fence(&eni.id) {
                continue;
            }
            if self.somebody_lives_on(&eni.id) {
                if !self.live.get(&eni.id).is_some_and(|live| live.fence_uncertain) {
                    self.stay(&eni.id, "the kernel shows a pod there", out);
                }
                continue;
            }
            let busy = self.is_changing(&eni.id);
            if busy || self.rests(&Subject::Eni(eni.id.clone())) || !self.may_call("DetachNetworkInterface", now) {
                continue;
            }
            let Some(attachment) = eni.attachment else {
                self.verify_due = true;
                continue;
            };
            if let Some(live) = self.live.get_mut(&eni.id) {
                live.fenced_at = Some(now);
            }
            let request = CloudRequest::DetachEni { eni: eni.id.clone(), attachment };
            self.start(Op::Detach(eni.id), request, now, out);
        }
    }

    fn delete_detached(&mut self, now: Time, out: &mut Out) {
        let detached = |eni: &&EniRecord| eni.leaving.is_some() && eni.progress == Progress::Created;
        let detached: Vec<EniId> = self.ledger.enis.values().filter(detached).map(|eni| eni.id.clone()).collect();
        for eni in detached {
            let busy = self.under_way(|op| op.changes() == Some(&eni));
            if !busy && !self.rests(&Subject::Eni(eni.clone())) && self.may_call("DeleteNetworkInterface", now) {
                self.start(Op::Delete(eni.clone()), CloudRequest::DeleteEni { eni }, now, out);
            }
        }
    }

    /// EC2 has confirmed that the ENI no longer holds these.
    pub(super) fn gave_up(&mut self, eni: &EniId, slots: BTreeSet<IpNet>, now: Time, out: &mut Out) {
        if let Some(live) = self.live.get_mut(eni) {
            live.changed_at = now;
            live.fence_uncertain = false;
            live.gained.retain(|slot, _| !slots.contains(slot));
        }
        self.record(Record::GivenUp { eni: eni.clone(), slots: slots.clone(), at: now }, out);
        out.note(Note::GaveUp { eni: eni.clone(), slots });
    }

    /// A release of slots is called off.
    pub(super) fn keep(&mut self, eni: &EniId, slots: BTreeSet<IpNet>, why: &str, out: &mut Out) {
        if let Some(live) = self.live.get_mut(eni) {
            live.fence_uncertain = false;
        }
        out.note(Note::Kept { eni: eni.clone(), text: format!("{}: {why}", list(&slots)) });
        self.record(Record::Held { eni: eni.clone(), slots }, out);
    }

    /// An ENI that was to leave stays.
    pub(super) fn stay(&mut self, eni: &EniId, why: &str, out: &mut Out) {
        if let Some(record) = self.ledger.enis.get(eni).cloned() {
            self.record(Record::Eni(EniRecord { leaving: None, ..record }), out);
            out.note(Note::Kept { eni: eni.clone(), text: why.to_owned() });
        }
        if let Some(live) = self.live.get_mut(eni) {
            live.fence_uncertain = false;
        }
    }

    /// A call that gives back was refused. A definite no lifts the fence, unless an earlier answer was lost.
    pub(super) fn release_refused(&mut self, op: &Op, unknown: bool, out: &mut Out) {
        let Some(eni) = op.changes().cloned() else { return };
        let uncertain = self.live.get_mut(&eni).is_some_and(|live| {
            live.fence_uncertain |= unknown;
            live.fence_uncertain
        });
        match op {
            Op::Unassign { slots, .. } if !uncertain => self.keep(&eni, slots.clone(), "EC2 refused", out),
            Op::Detach(_) if !uncertain => self.stay(&eni, "EC2 refused", out),
            _ => {}
        }
    }

    /// Gives an ENI back what it lost while pods live there. EC2 refuses if somebody else has it meanwhile.
    pub(super) fn reclaim(&mut self, eni: &EniId, slots: BTreeSet<IpNet>, now: Time, out: &mut Out) {
        // A family at a time: no two changes of one ENI are under way at once.
        let (op, request) = match families::ipv6_prefix(&slots) {
            Some(prefix) => (
                Op::AssignIpv6 { eni: eni.clone(), prefix: Some(prefix) },
                CloudRequest::AssignIpv6Prefix { eni: eni.clone(), prefix: Some(prefix) },
            ),
            None => (
                Op::Reclaim { eni: eni.clone(), slots: slots.clone() },
                CloudRequest::AssignNamed { eni: eni.clone(), slots },
            ),
        };
        let busy = self.is_changing(eni);
        let rests = self.rests(&Subject::Lost(eni.clone()));
        if busy || rests || !self.may_change() || !self.may_call(request.action(), now) {
            return;
        }
        self.start(op, request, now, out);
    }

    pub(super) fn reclaimed(&mut self, eni: &EniId, slots: &BTreeSet<IpNet>, now: Time, out: &mut Out) {
        self.recovered(&Subject::Lost(eni.clone()));
        let unseen = self.ledger.unseen.get(eni).into_iter().flatten().map(|(slot, _)| *slot);
        let left = unseen.filter(|slot| !slots.contains(slot)).collect();
        self.record(Record::Unseen { eni: eni.clone(), slots: left, at: now }, out);
        if let Some(live) = self.live.get_mut(eni) {
            live.changed_at = now;
        }
        let text = format!("{} assigned again: EC2 had lost it under a running pod", list(slots));
        out.note(Note::Reconciled { eni: eni.clone(), text });
    }
}
