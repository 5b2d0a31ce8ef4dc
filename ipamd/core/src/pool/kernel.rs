//! The kernel's side: computing the node's data path from the pool, and learning what stands.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::pods::UNWIRED_GRACE_MS;
use super::setback::Subject;
use super::{Command, FORGET_SPACING_MS, KERNEL_RESYNC_MS, LINK_RETRY_MS, LOOK_SPACING_MS, Note, Op, OpId, Out, Pool};
use crate::families::EGRESS;
use crate::ids::{DeviceIndex, MacAddress, Time};
use crate::ledger::{Allocation, Progress};
use crate::naming::{host_if_of, host_mac_of};
use crate::netplan::{EniPlan, Look, NodePlan, PodPlan, PrimaryPlan};
use crate::pick;
use crate::ports::{CloudError, CloudErrorKind, KernelReport, PodsSeen};

impl Pool {
    /// Has the kernel made what the plan says: when the plan changed, when a link was missing, and now and then anyway.
    pub(super) fn program_kernel(&mut self, now: Time, out: &mut Out) {
        // The plan follows from the ledger alone; most steps do not touch that.
        if self.kernel.planned_from != Some(self.version) {
            self.kernel.planned_from = Some(self.version);
            self.remember_links();
            let Some(plan) = self.node_plan() else { return };
            if self.kernel.plan.as_deref() != Some(&plan) {
                self.forget_unplanned(&plan);
                self.kernel.plan = Some(Arc::new(plan));
                self.kernel.revision += 1;
            }
        }
        if self.kernel.plan.is_none() {
            return;
        }
        if self.kernel.in_flight || self.rests(&Subject::Kernel) {
            return;
        }
        let due = self.kernel.recheck_at.is_none_or(|at| at <= now);
        if self.kernel.applied == Some(self.kernel.revision) && !due {
            return;
        }
        let Some(plan) = self.kernel.plan.clone() else { return };
        self.kernel.contests.forgive(now);
        let forgets = self.forgets(now);
        let look = self.look(forgets, now);
        self.kernel.in_flight = true;
        self.kernel.recheck_at = None;
        self.kernel.looked_at = Some(now);
        let op = self.new_op(Op::Program { revision: self.kernel.revision, forgets }, now);
        out.commands.push(Command::Kernel { op, plan, look });
    }

    /// What a plan lacks stands no longer as soon as the kernel has it, and its answer comes later: nothing is handed out
    /// there from now on.
    fn forget_unplanned(&mut self, plan: &NodePlan) {
        for (id, live) in self.live.iter_mut().filter(|(id, _)| **id != plan.primary.id) {
            match plan.enis.iter().find(|eni| eni.id == *id) {
                Some(eni) => live.told.retain(|slot| eni.sources.contains(slot)),
                None => {
                    live.programmed = false;
                    live.told.clear();
                }
            }
        }
    }

    /// Somebody changed something in the kernel, perhaps we ourselves: then the look finds nothing, and that is the end.
    pub(super) fn look_soon(&mut self, now: Time) {
        let at = self.kernel.looked_at.map_or(now, |looked_at| looked_at.plus_ms(LOOK_SPACING_MS).max(now));
        self.kernel.recheck_at = Some(self.kernel.recheck_at.map_or(at, |due| due.min(at)));
    }

    fn forgets(&self, now: Time) -> bool {
        !self.waiting.is_empty() || self.kernel.forgot_at.is_none_or(|at| now.since_ms(at) >= FORGET_SPACING_MS)
    }

    fn look(&self, forgets: bool, now: Time) -> Look {
        let forgot_at = self.kernel.forgot_at;
        // Freed at the very moment of the last such look counts as freed after it.
        let since = |freed_at: &Time| forgets && forgot_at.is_none_or(|forgot_at| forgot_at <= *freed_at);
        let left = self.ledger.freed.iter().filter(|(_, at)| since(at)).map(|(address, _)| *address);
        let left: BTreeSet<IpAddr> = left.flat_map(|first| [first].into_iter().chain(self.second_of(&first))).collect();
        Look { pods: self.pods_to_keep(now), left, let_be: self.kernel.contests.let_be(now) }
    }

    /// Names and MACs are hashes: made once per sandbox, not at every look.
    fn remember_links(&mut self) {
        let pods = &self.ledger.pods;
        self.kernel.links.retain(|sandbox, _| pods.contains_key(sandbox));
        for Allocation { sandbox, pod, .. } in pods.values() {
            if !self.kernel.links.contains_key(sandbox) {
                let link = host_if_of(&self.settings.veth_prefix, sandbox, pod);
                let mac = host_mac_of(sandbox);
                self.kernel.links.insert(sandbox.clone(), (link, mac));
            }
        }
    }

    /// Of several sandboxes of one pod only the youngest can have the link.
    fn pods_to_keep(&self, now: Time) -> Vec<PodPlan> {
        let mut by_link: BTreeMap<&str, (&Allocation, MacAddress, bool)> = BTreeMap::new();
        for allocation in self.ledger.pods.values() {
            let Some((link, mac)) = self.kernel.links.get(&allocation.sandbox) else { continue };
            let held = by_link.entry(link).or_insert((allocation, *mac, true));
            if held.0.sandbox != allocation.sandbox {
                let younger = held.0.at < allocation.at;
                *held = if younger { (allocation, *mac, false) } else { (held.0, held.1, false) };
            }
        }
        let keep = |(link, (allocation, mac, alone)): (&str, (&Allocation, MacAddress, bool))| {
            let link = link.to_owned();
            let settled = alone && now.since_ms(allocation.at) >= UNWIRED_GRACE_MS;
            allocation.addresses().map(move |address| PodPlan { address, link: link.clone(), mac, settled })
        };
        by_link.into_iter().flat_map(keep).collect()
    }

    pub(super) fn kernel_answered(
        &mut self,
        id: OpId,
        result: Result<(KernelReport, PodsSeen), String>,
        now: Time,
        out: &mut Out,
    ) {
        let Some((Op::Program { revision, forgets }, asked_at)) = self.ops.remove(&id) else { return };
        self.kernel.in_flight = false;
        let report = match result {
            Ok((report, pods)) => {
                if self.kernel.pods != pods {
                    self.kernel.pods = pods;
                    self.version += 1;
                }
                self.kernel.read_at = Some(asked_at);
                if forgets {
                    self.kernel.forgot_at = Some(asked_at);
                }
                self.release_dead_sandboxes(now, out);
                report
            }
            Err(error) => {
                let setback = CloudError {
                    kind: CloudErrorKind::Transient,
                    action: "kernel".to_owned(),
                    code: "Netlink".to_owned(),
                    message: error.clone(),
                    request_id: None,
                };
                self.set_back(Subject::Kernel, "the node's routes and rules".to_owned(), setback, now, out);
                out.note(Note::KernelFailed { error });
                return;
            }
        };
        self.recovered(&Subject::Kernel);
        self.kernel.applied = Some(revision);
        let wait = if report.missing_links.is_empty() { KERNEL_RESYNC_MS } else { LINK_RETRY_MS };
        // Somebody may have asked for another look while this one was under way.
        for repair in report.repaired.iter().filter(|repair| repair.undone) {
            out.note(Note::Repaired { kind: repair.kind, text: repair.text.clone() });
            if let Some(contest) = self.kernel.contests.repaired(repair, now) {
                let pause_ms = contest.until.since_ms(now);
                out.note(Note::Contested { contest: contest.clone(), pause_ms });
            }
        }
        for text in &report.lacking {
            out.note(Note::KernelLacks { text: text.clone() });
        }
        let at =
            [Some(now.plus_ms(wait)), self.kernel.contests.next_at(now)].into_iter().flatten().min().unwrap_or(now);
        self.kernel.recheck_at = Some(self.kernel.recheck_at.map_or(at, |asked| asked.min(at)));
        self.version += u64::from(self.kernel.report.missing_links != report.missing_links);
        self.kernel.report = KernelReport { repaired: Vec::new(), lacking: Vec::new(), ..report };
        let programmed = &self.kernel.report.programmed;
        let Some(plan) = self.kernel.plan.as_ref().filter(|_| revision == self.kernel.revision) else {
            // The plan changed meanwhile: what stands is known after the next application.
            return;
        };
        for (id, live) in &mut self.live {
            // Without the primary there is no ruleset, and what the others hold would leave by the wrong ENI.
            let stands = programmed.contains(&plan.primary.id) && programmed.contains(id);
            if stands && !live.programmed {
                out.note(Note::EniMoved { eni: id.clone(), to: "in service", after_ms: now.since_ms(live.since) });
            }
            self.version += u64::from(stands != live.programmed);
            live.programmed = stands;
            match plan.enis.iter().find(|eni| eni.id == *id) {
                Some(eni) if eni.sources != live.told => live.told = eni.sources.clone(),
                Some(_) => {}
                None => live.told.clear(),
            }
        }
    }

    /// The data path this pool needs. `None` until the primary ENI is known.
    fn node_plan(&self) -> Option<NodePlan> {
        let node = self.ledger.node.as_ref()?;
        let primary = self.ledger.enis.get(&node.primary_eni)?;
        let mut secondary: Vec<_> = self
            .ledger
            .enis
            .values()
            .filter(|eni| eni.device != DeviceIndex::PRIMARY && eni.progress >= Progress::Attached)
            .filter(|eni| !self.is_replaced(eni))
            .collect();
        secondary.sort_by_key(|eni| (eni.card, eni.device));
        let enis = secondary.into_iter().map(|eni| EniPlan {
            id: eni.id.clone(),
            mac: eni.mac,
            address: eni.primary_ipv4,
            subnet: eni.subnet_cidr,
            table: eni.table(),
            mark: self.settings.marks.of_eni(eni.device.0 + 1),
            sources: self.sources(&eni.id),
        });
        let primary = PrimaryPlan { id: primary.id.clone(), mac: primary.mac, address: primary.primary_ipv4 };
        let plan = NodePlan { enis: enis.collect(), vpc: node.vpc_cidrs.clone(), ..NodePlan::new(primary) };
        Some(plan.with_settings(&self.settings))
    }

    /// EC2 no longer shows this ENI here and another one is attached in its place. One that merely does not show keeps its
    /// routes: a reading may be wrong, and pods may live there.
    fn is_replaced(&self, eni: &crate::ledger::EniRecord) -> bool {
        let gone = |id: &crate::ids::EniId| self.is_gone(id);
        let successor = |other: &&crate::ledger::EniRecord| {
            let same_place = (other.card, other.device) == (eni.card, eni.device);
            other.id != eni.id && same_place && other.progress >= Progress::Attached && !gone(&other.id)
        };
        gone(&eni.id) && self.ledger.enis.values().any(|other| successor(&other))
    }

    /// Slots of the ENI, and addresses of pods whose slot is no longer listed: a running pod keeps its way out.
    fn sources(&self, eni: &crate::ids::EniId) -> BTreeSet<IpNet> {
        let mut sources = self.ledger.slots.get(eni).cloned().unwrap_or_default();
        for allocation in self.ledger.pods.values().filter(|a| a.eni == *eni) {
            let routed =
                allocation.addresses().filter(|address| !matches!(address, IpAddr::V4(v4) if EGRESS.contains(v4)));
            for address in routed {
                if pick::slot_of(&sources, &address).is_none() {
                    sources.insert(IpNet::from(address));
                }
            }
        }
        sources
    }
}
