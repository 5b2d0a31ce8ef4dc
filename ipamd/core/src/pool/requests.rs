//! What pods ask: ADD, DEL and GC, and who gets which address.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Answer, DEFAULT_PATIENCE_MS, Failure, MAX_WAITING, Note, Out, Pool, Reason, RequestId, Waiter};
use crate::families::Families;
use crate::ids::{DeviceIndex, EniId, PodName, SandboxId, Time};
use crate::ledger::{Allocation, Record};
use crate::pick::{self, Candidate, Occupancy, Pick};

impl Pool {
    pub(super) fn add(
        &mut self,
        request: RequestId,
        sandbox: SandboxId,
        pod: PodName,
        patience_ms: Option<u64>,
        now: Time,
        out: &mut Out,
    ) {
        if let Some(allocation) = self.ledger.pods.get(&sandbox) {
            // The runtime may repeat an ADD whose answer it lost; the same sandbox has the same address.
            out.reply(request, Answer::Added(allocation.clone()));
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            let message = format!("{MAX_WAITING} pods are waiting for an address already; try again");
            out.reply(request, Answer::Failed(Failure::retryable(Reason::Assigning, message)));
            return;
        }
        let deadline = now.plus_ms(patience_ms.unwrap_or(DEFAULT_PATIENCE_MS));
        self.waiting.push_back(Waiter { request, sandbox, pod, since: now, deadline });
    }

    pub(super) fn del(&mut self, request: RequestId, sandbox: &SandboxId, now: Time, out: &mut Out) {
        self.refuse_waiting(out, |waiter| waiter.sandbox == *sandbox, "the sandbox was deleted while it waited");
        match self.ledger.pods.get(sandbox).cloned() {
            Some(allocation) => {
                self.record(Record::Released { allocation: allocation.clone(), at: now }, out);
                out.reply(request, Answer::Deleted(allocation));
            }
            None => out.reply(request, Answer::Unknown),
        }
    }

    pub(super) fn gc(&mut self, request: RequestId, network: &str, valid: &BTreeSet<(String, String)>, out: &mut Out) {
        let dead = |a: &&Allocation| {
            let key = (a.sandbox.container_id.clone(), a.sandbox.if_name.clone());
            a.sandbox.network == network && !valid.contains(&key)
        };
        // Only told, not released: the plugin takes each down in the kernel first and then says DEL, as for every other pod.
        out.reply(request, Answer::Stale(self.ledger.pods.values().filter(dead).cloned().collect()));
    }

    pub(super) fn stop(&mut self, out: &mut Out) {
        self.refuse_waiting(out, |_| true, "ipamd is stopping; the next start serves this pod");
    }

    fn refuse_waiting(&mut self, out: &mut Out, which: impl Fn(&Waiter) -> bool, why: &str) {
        let (refused, kept): (VecDeque<Waiter>, _) = self.waiting.drain(..).partition(|waiter| which(waiter));
        self.waiting = kept;
        for waiter in refused {
            out.reply(waiter.request, Answer::Failed(Failure::retryable(Reason::Starting, why.to_owned())));
        }
    }

    /// Gives addresses to waiting ADDs, first come first served, and sends away those whose patience has ended.
    pub(super) fn serve_waiting(&mut self, now: Time, out: &mut Out) {
        if self.waiting.is_empty() {
            return;
        }
        let mut used = self.in_use();
        let mut pods: BTreeMap<EniId, u32> = self.pods_by_eni();
        let mut candidates = self.candidates(&pods);
        let (mut nothing_comes, mut fences_stand) = (None, true);
        while let Some(first) = self.waiting.front() {
            if let Some(held) = self.ledger.pods.get(&first.sandbox).cloned() {
                // The same sandbox asked twice while nothing was free: both get the one address.
                out.reply(first.request, Answer::Added(held));
                self.waiting.pop_front();
                continue;
            }
            let out_of_patience = first.deadline <= now;
            let rested = self.pick(&candidates, &used, false, now);
            if rested.is_none() && std::mem::take(&mut fences_stand) && self.lift_fences(out) {
                candidates = self.candidates(&pods);
                continue;
            }
            // A cool-down yields when nothing else can bring an address soon, or when the pod would fail otherwise.
            let pick = rested.or_else(|| self.pick(&candidates, &used, out_of_patience, now)).or_else(|| {
                let yields = *nothing_comes.get_or_insert_with(|| !self.capacity_is_coming(now));
                self.pick(&candidates, &used, true, now).filter(|_| yields)
            });
            if pick.is_none() && !out_of_patience {
                break;
            }
            let Some(waiter) = self.waiting.pop_front() else { break };
            let Some(pick) = pick else {
                self.refuse(waiter, now, out);
                continue;
            };
            if pick.early {
                let rested_ms = self.ledger.freed.get(&pick.address).map_or(0, |at| now.since_ms(*at));
                out.note(Note::CooldownYielded { address: pick.address, rested_ms });
            }
            let eni = self.ledger.enis.get(&pick.eni).expect("invariant: candidates are ENIs of the ledger");
            let allocation = Allocation {
                sandbox: waiter.sandbox,
                pod: waiter.pod,
                address: pick.address,
                second: self.second(&pick.eni, pick.address),
                eni: pick.eni,
                device: eni.device,
                table: eni.table(),
                at: now,
            };
            used.insert(allocation.address);
            let count = pods.entry(allocation.eni.clone()).or_default();
            *count += 1;
            for candidate in candidates.iter_mut().filter(|c| c.eni == allocation.eni) {
                candidate.eni_pods = *count;
            }
            self.record(Record::Allocated(allocation.clone()), out);
            out.reply(waiter.request, Answer::Added(allocation));
        }
        // The queue is in order of arrival, not of patience: whoever has run out behind the first is told now.
        let (gone, kept): (VecDeque<Waiter>, _) = self.waiting.drain(..).partition(|w| w.deadline <= now);
        self.waiting = kept;
        for waiter in gone {
            self.refuse(waiter, now, out);
        }
        if !self.waiting.is_empty() && self.ledger.freed.keys().any(|address| self.is_unforgotten(address)) {
            self.kernel.recheck_at = Some(now);
        }
    }

    fn pick(&self, candidates: &[Candidate], used: &BTreeSet<IpAddr>, yields: bool, now: Time) -> Option<Pick> {
        let occupancy = |address: &IpAddr| match self.cooling_since(address, now) {
            _ if used.contains(address) || self.is_unforgotten(address) => Occupancy::Used,
            Some(freed_at) => Occupancy::Cooling(freed_at),
            None => Occupancy::Free,
        };
        pick::pick(candidates, occupancy, &self.ledger.freed, yields)
    }

    /// Freed since the last look that forgot connections: the kernel still knows the pod's, and the pod may even run on, taken
    /// for gone. The cool-down outlasts that, except where it is short or yields.
    fn is_unforgotten(&self, address: &IpAddr) -> bool {
        let freed_at = self.ledger.freed.get(address);
        freed_at.is_some_and(|freed_at| self.kernel.forgot_at.is_none_or(|forgot_at| forgot_at < *freed_at))
    }

    fn refuse(&mut self, waiter: Waiter, now: Time, out: &mut Out) {
        let failure = self.why_no_address(waiter.since, now);
        out.note(Note::Refused { pod: waiter.pod, failure: failure.clone() });
        out.reply(waiter.request, Answer::Failed(failure));
    }

    /// Addresses of sandboxes, and addresses the kernel still routes to a pod although no sandbox is known.
    pub(super) fn in_use(&self) -> BTreeSet<IpAddr> {
        let wired = self.kernel.pods.routes.iter().copied();
        self.ledger.pods.values().map(|a| a.address).chain(wired).chain(self.firsts_of_routes()).collect()
    }

    /// Slots that may be picked from: confirmed by EC2, not missing there now, on an ENI whose routes stand.
    pub(super) fn candidates(&self, pods: &BTreeMap<EniId, u32>) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (id, eni) in &self.ledger.enis {
            let Some(live) = self.live.get(id) else { continue };
            if !live.programmed || !self.serves_pods(id) {
                continue;
            }
            let slots = self.ledger.slots.get(id).into_iter().flatten();
            // Packets of pods on the primary need no steering: main is where they go.
            let steered = |slot: &IpNet| eni.device == DeviceIndex::PRIMARY || live.told.contains(slot);
            let usable = |slot: &IpNet| !live.doubted.contains(slot) && !self.is_withheld(id, slot);
            // Where pods have both families they live on ENIs that have both.
            let lacks_ipv6 = self.settings.families == Families::Dual
                && !self.ipv6_prefix(id).map(IpNet::V6).is_some_and(|slot| steered(&slot) && usable(&slot));
            if lacks_ipv6 {
                continue;
            }
            let picked_from = |slot: &&IpNet| self.settings.families.picks_from(slot);
            for slot in slots.filter(picked_from).filter(|slot| steered(slot) && usable(slot)) {
                candidates.push(Candidate {
                    slot: *slot,
                    eni: id.clone(),
                    device: eni.device,
                    eni_pods: pods.get(id).copied().unwrap_or(0),
                });
            }
        }
        candidates
    }

    pub(super) fn pods_by_eni(&self) -> BTreeMap<EniId, u32> {
        let mut pods = BTreeMap::new();
        for allocation in self.ledger.pods.values() {
            *pods.entry(allocation.eni.clone()).or_default() += 1;
        }
        pods
    }

    /// When the address was freed, while it is still cooling.
    pub(super) fn cooling_since(&self, address: &IpAddr, now: Time) -> Option<Time> {
        let freed_at = self.ledger.freed.get(address).copied()?;
        (now.since_ms(freed_at) < self.settings.cooldown_ms()).then_some(freed_at)
    }

    /// When the next address will have cooled down.
    pub(super) fn next_cooled(&self, now: Time) -> Option<Time> {
        let cooldown_ms = self.settings.cooldown_ms();
        self.ledger.freed.values().map(|at| at.plus_ms(cooldown_ms)).filter(|at| *at > now).min()
    }
}
