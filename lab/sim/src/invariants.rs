//! What must hold after every step, each with the sentence it holds. The checks know the truth of EC2, kernel and runtime,
//! and ask nothing of the policy that is judged, except what it wrote down.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use flatwire_core::ids::{DeviceIndex, EniId, SandboxId, Time};
use flatwire_core::ledger::{Allocation, EniRecord, LedgerState, Progress, Record};
use flatwire_core::limits;
use flatwire_core::netplan::NodePlan;
use flatwire_core::pool::{DEFAULT_PATIENCE_MS, NodeState, Note, OpId, RequestId};
use flatwire_core::ports::{CloudError, CloudReply, CloudRequest, KernelReport};
use ipnet::IpNet;
use lab_ec2::EniInfo;

use crate::cloud;
use crate::kernel::SandboxNo;
use crate::node::{Node, Scene};
use crate::policy::Policy;
use crate::settle::slots;

/// Tag of the ENIs an IPAM of this contract makes, with the instance as its value.
pub const TAG_INSTANCE: &str = "node.k8s.amazonaws.com/instance_id";
/// An answer may be late by this: the loop has other things to do, too.
const PATIENCE_SLACK_MS: u64 = 2_000;
/// Failing calls of one action on one object, within the window: a few rounds of asking for less and less.
const FAILURES_MOST: usize = 20;
/// Calls of one reading action, within the window.
const READS_MOST: usize = 40;
const WINDOW_MS: u64 = 60_000;
/// Longer than any rest that a failure leads to.
const CALM_MS: u64 = 1_200_000;
/// As long as the daemon may take to hear what is said of its node.
const HEARD_MS: u64 = 1_000;
/// Free addresses of a subnet that is not short of any, /28s included.
const ROOMY: u32 = 64;

/// A thing that must never happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Unique,
    Veto,
    Routed,
    CoolDown,
    InUse,
    Kept,
    Calls,
    OneMutation,
    ReadFirst,
    Patience,
    Limits,
    Leaks,
    Noted,
    Replay,
    Spins,
    Settles,
}

impl Rule {
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Unique => "no address belongs to two live sandboxes",
            Self::Veto => "an address with a pod route on this node is in use, whatever the ledger says",
            Self::Routed => {
                "an address handed out is, at that moment, on an attached ENI of this node, and that ENI's routes stand"
            }
            Self::CoolDown => {
                "an address is not handed out twice within the cool-down unless the pool is otherwise empty"
            }
            Self::InUse => "no ENI, prefix or address is given back while a live sandbox or a kernel pod route uses it",
            Self::Kept => "no allocation of a live pod leaves the ledger except by its own DEL, by GC, or found dead",
            Self::Calls => "a call that fails is not repeated hot, and nothing is polled",
            Self::OneMutation => "never more than one mutation of an ENI is under way",
            Self::ReadFirst => "when the answer to an assignment is lost, EC2 is read before more is asked for",
            Self::Patience => "who asks for an address is answered when the patience ends",
            Self::Limits => "the pool never exceeds the limits of its instance type or MAX_ENI",
            Self::Leaks => "an ENI that was created is attached, known to the ledger, or collected",
            Self::Noted => "nothing is repaired in silence",
            Self::Replay => "a journal cut at any byte recovers what was promised",
            Self::Spins => "the loop never spins",
            Self::Settles => "when faults end, every pod that can have an address has one and the three views agree",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  {}", self.rule.sentence(), self.text)
    }
}

/// An address handed out although it was cooling.
#[derive(Debug)]
struct Early {
    address: IpAddr,
    rested_ms: u64,
    /// An ENI of the node that had room for more, where nothing stood in the way of asking for it.
    instead: Option<EniId>,
}

/// What the checks remember of one node.
#[derive(Debug, Default)]
pub struct Watch {
    pub violations: Vec<Violation>,
    /// When each address was released last, by the journal.
    freed: BTreeMap<IpAddr, Time>,
    /// Handed out in this batch although still cooling.
    early: Vec<Early>,
    /// DELs the daemon heard, by sandbox.
    dels: BTreeMap<SandboxId, Time>,
    /// Answers that are owed, by when.
    owed: BTreeSet<(Time, RequestId)>,
    owed_by: BTreeMap<RequestId, Time>,
    in_flight: BTreeMap<OpId, (&'static str, String, Option<EniId>)>,
    failures: BTreeMap<(&'static str, String), VecDeque<Time>>,
    /// Assignments under way that name no addresses: to make one twice is to get twice as many.
    assigning: BTreeMap<OpId, EniId>,
    /// ENIs of which nobody knows what their last assignment did.
    unread: BTreeSet<EniId>,
    /// When a call last failed, and when the daemon started.
    failed_at: Time,
    started_at: Time,
    /// When something else was last said of the node; it is heard a moment later.
    pub(crate) said_at: Time,
    reads: BTreeMap<&'static str, VecDeque<Time>>,
    /// When EC2 was last asked for its list of this node, and when it last answered a change of each ENI: a list asked for
    /// before that answer says nothing of what the ENI lacks.
    listing_since: Time,
    changed: BTreeMap<EniId, Time>,
    /// The kernel as of then has reached the daemon.
    kernel_of: Time,
    /// Taken from this node in EC2 by somebody else, which the daemon cannot know yet.
    taken: Vec<(EniId, Option<IpNet>, Time)>,
    /// What of it the daemon has heard and could not write down: its next life has to hear it again.
    unwritten: BTreeMap<EniId, BTreeSet<IpNet>>,
    /// Undone in the kernel by somebody else; `None` is the ruleset.
    flushed: BTreeMap<Option<EniId>, Time>,
    /// The plan that stood whole when it was last applied.
    stood: Option<Arc<NodePlan>>,
    /// Repairs the policy has still to mention.
    unmentioned: Vec<String>,
}

impl Watch {
    pub fn broken(&mut self, rule: Rule, text: String) {
        self.violations.push(Violation { rule, text });
    }

    pub(crate) fn daemon_started(&mut self, now: Time) {
        self.started_at = now;
        self.stood = None;
    }

    pub(crate) fn daemon_died(&mut self, now: Time) {
        for (eni, slots) in std::mem::take(&mut self.unwritten) {
            self.taken.extend(slots.into_iter().map(|slot| (eni.clone(), Some(slot), now)));
        }
        self.owed.clear();
        self.owed_by.clear();
        self.in_flight.clear();
        self.failures.clear();
        self.assigning.clear();
        self.unread.clear();
        self.reads.clear();
        self.early.clear();
        self.unmentioned.clear();
    }

    /// Somebody else takes an ENI (or one slot of it) from this node in EC2.
    pub fn taken_in_cloud(&mut self, eni: &EniId, slot: Option<IpNet>, now: Time) {
        self.taken.push((eni.clone(), slot, now));
    }

    /// The journal refused this.
    pub(crate) fn not_written(&mut self, record: &Record) {
        if let Record::Unseen { eni, slots, .. } = record {
            self.unwritten.insert(eni.clone(), slots.clone());
        }
    }

    /// Somebody else undoes what stands in the kernel for an ENI, or the ruleset.
    pub fn flushed_in_kernel(&mut self, eni: Option<EniId>, now: Time) {
        self.flushed.insert(eni, now);
    }

    pub(crate) fn told_del(&mut self, sandbox: &SandboxId, now: Time) {
        self.dels.insert(sandbox.clone(), now);
    }

    pub(crate) fn asked(&mut self, request: RequestId, patience_ms: Option<u64>, now: Time) {
        let by = now.plus_ms(patience_ms.unwrap_or(DEFAULT_PATIENCE_MS) + PATIENCE_SLACK_MS);
        self.owed.insert((by, request));
        self.owed_by.insert(request, by);
    }

    pub(crate) fn replied(&mut self, request: RequestId) {
        if let Some(by) = self.owed_by.remove(&request) {
            self.owed.remove(&(by, request));
        }
    }

    pub(crate) fn sent(&mut self, op: OpId, request: &CloudRequest, now: Time) {
        let (action, eni) = (request.action(), cloud::mutated(request).cloned());
        if let Some(eni) = &eni
            && let Some((other, ..)) = self.in_flight.values().find(|(_, _, of)| of.as_ref() == Some(eni))
        {
            self.broken(Rule::OneMutation, format!("{action} is sent while {other} of {eni} has not been answered"));
        }
        if eni.is_none() && !matches!(request, CloudRequest::CreateEni { .. }) {
            let times = self.reads.entry(action).or_default();
            if crowded(times, now, READS_MOST) {
                self.broken(Rule::Calls, format!("{action} was asked {READS_MOST} times within a minute"));
            }
        }
        if let CloudRequest::Assign { eni, .. } | CloudRequest::AssignIpv6Prefix { eni, prefix: None } = request {
            if self.unread.contains(eni) {
                self.broken(Rule::ReadFirst, format!("{eni} is asked for more, and nobody has looked"));
            }
            self.assigning.insert(op, eni.clone());
        }
        let object = object(request);
        if object == "node" {
            self.listing_since = now;
        }
        self.in_flight.insert(op, (action, object, eni));
    }

    pub(crate) fn answered(
        &mut self,
        op: OpId,
        result: &Result<CloudReply, CloudError>,
        read_at: Option<Time>,
        now: Time,
    ) {
        let Some((action, object, eni)) = self.in_flight.remove(&op) else { return };
        self.changed.extend(eni.map(|eni| (eni, now)));
        let assigning = self.assigning.remove(&op);
        if result.is_ok() {
            self.failures.retain(|(of, _), _| *of != action);
        }
        match result {
            Ok(CloudReply::Enis(_)) if object == "node" => {
                let read_of = read_at.unwrap_or_default();
                let overtaken = |eni: &EniId| self.changed.get(eni).is_some_and(|at| *at >= self.listing_since);
                self.taken.retain(|(eni, _, at)| *at >= read_of || overtaken(eni));
                self.unread.clear();
            }
            Ok(CloudReply::Eni(view)) => {
                self.unread.remove(&view.id);
            }
            Ok(_) => {}
            Err(error) => {
                self.failed_at = now;
                self.unread.extend(assigning.filter(|_| error.kind.outcome_unknown()));
                let times = self.failures.entry((action, object.clone())).or_default();
                if crowded(times, now, FAILURES_MOST) {
                    let text = format!("{action} on {object} failed {FAILURES_MOST} times within a minute: {error}");
                    self.broken(Rule::Calls, text);
                }
            }
        }
    }

    pub(crate) fn kernel_read(&mut self, result: &Result<KernelReport, String>, plan: Arc<NodePlan>, now: Time) {
        let Ok(report) = result else { return };
        self.kernel_of = now;
        self.flushed.retain(|_, at| *at >= now);
        if self.stood.as_ref() == Some(&plan) {
            self.unmentioned.extend(report.repaired.iter().map(|repair| repair.text.clone()));
        }
        self.stood = report.missing_links.is_empty().then_some(plan);
    }

    pub(crate) fn noted(&mut self, note: &Note) {
        if let Note::Repaired { text, .. } = note {
            self.unmentioned.retain(|repair| !text.contains(repair.as_str()));
        }
    }
}

/// Notes one more; true if there were already so many within the window.
fn crowded(times: &mut VecDeque<Time>, now: Time, most: usize) -> bool {
    while times.front().is_some_and(|at| now.since_ms(*at) > WINDOW_MS) {
        times.pop_front();
    }
    times.push_back(now);
    times.len() > most
}

/// What a call is about, for counting its failures.
fn object(request: &CloudRequest) -> String {
    match request {
        CloudRequest::CreateEni { subnet, .. } => subnet.to_string(),
        CloudRequest::DescribeEni { eni } => eni.to_string(),
        CloudRequest::DescribeNode { .. } => "node".to_owned(),
        other => cloud::mutated(other).map_or_else(String::new, ToString::to_string),
    }
}

impl<P: Policy> Node<P> {
    /// An address was handed out: before its sandbox takes it.
    pub(crate) fn check_handed_out(
        &mut self,
        number: SandboxNo,
        allocation: &Allocation,
        now: Time,
        scene: &mut Scene<'_>,
    ) {
        let Allocation { address, second, eni, .. } = allocation;
        let repeated = self.runtime.sandboxes.get(&number).is_some_and(|sandbox| sandbox.address == Some(*address));
        let other = |(other, sandbox): (&SandboxNo, &crate::runtime::Sandbox)| {
            (*other != number && sandbox.address == Some(*address) && sandbox.is_live()).then_some(*other)
        };
        if let Some(other) = self.runtime.sandboxes.iter().find_map(other) {
            self.watch.broken(Rule::Unique, format!("{address} goes to c{number} and belongs to c{other}"));
        }
        if let Some(other) = self.kernel.routes.get(address).copied().filter(|other| *other != number) {
            // A DEL says that the pod is unwired; that it is not shows at the next look.
            let told = self.watch.dels.iter().find(|(id, _)| id.container_id == format!("c{other}")).map(|(_, at)| *at);
            if told.is_none_or(|told| self.watch.kernel_of > told) {
                self.watch.broken(Rule::Veto, format!("{address} goes to c{number}; the kernel routes it to c{other}"));
            }
        }
        let both =
            |other: &crate::runtime::Sandbox| other.second.is_some() && other.second == *second && other.is_live();
        let other = self.runtime.sandboxes.iter().find(|(other, sandbox)| **other != number && both(sandbox));
        if let (Some(second), Some((other, _))) = (second, other) {
            self.watch.broken(Rule::Unique, format!("{second} goes to c{number} and belongs to c{other}"));
        }
        self.check_routed(*address, eni, now, scene);
        let families = self.settings.families;
        if families.has_v6() && second.is_none() {
            self.watch.broken(Rule::Routed, format!("{address} is handed out to c{number} without a second address"));
        }
        // Of IPv6 pods it is for egress, and no concern of EC2's.
        if let Some(second) = second.filter(IpAddr::is_ipv6) {
            self.check_routed(second, eni, now, scene);
        }
        if !repeated && let Some(freed) = self.watch.freed.remove(address) {
            let rested_ms = now.since_ms(freed);
            if rested_ms < self.settings.cooldown_ms() {
                let instead = self.could_have_grown(now, scene);
                self.watch.early.push(Early { address: *address, rested_ms, instead });
            }
        }
    }

    /// An ENI with a free slot, on a node where all has been well for a while and an assignment takes a second.
    fn could_have_grown(&self, now: Time, scene: &Scene<'_>) -> Option<EniId> {
        let ledger = self.daemon.as_ref()?.ledger();
        let calm =
            now.since_ms(self.watch.failed_at.max(self.watch.started_at)) > CALM_MS && self.watch.taken.is_empty();
        let brisk = self.pace.cloud_ms <= 500 && self.pace.slow_percent == 0 && self.kernel.broken.is_none();
        let settings = &self.settings;
        let heard = now.since_ms(self.watch.said_at) > HEARD_MS;
        let plain = heard && self.state == self.plain_state();
        let allowed = settings.provisioning && !settings.custom_networking && plain;
        let whole = ledger.releasing.is_empty() && ledger.unseen.is_empty() && ledger.enis_unseen.is_empty();
        // What is on its way is waited for; an ENI whose link has not come brings what it holds by itself.
        let up = |id: &EniId| scene.ec2.with_enis(now, |enis| enis.get(id).is_some_and(|eni| eni.link_is_up(now)));
        let in_service = |eni: &EniRecord| eni.progress == Progress::Settled && eni.leaving.is_none() && up(&eni.id);
        let settled = ledger.enis.values().all(in_service);
        let asking = !self.watch.in_flight.is_empty() || !ledger.creations.is_empty();
        if asking || !(calm && brisk && allowed && whole && settled) {
            return None;
        }
        let kind = limits::lookup(&ledger.node.as_ref()?.instance_type)?;
        let view = scene.ec2.view(now);
        let roomy = |id: &EniId| {
            let eni = view.eni(id).filter(|eni| eni.slots() < kind.ipv4_per_eni)?;
            view.subnet(&eni.subnet).filter(|subnet| subnet.free_addresses >= ROOMY)
        };
        ledger.enis.keys().find(|id| roomy(id).is_some()).cloned()
    }

    /// What is said of a node of which nothing but its pods is said.
    fn plain_state(&self) -> NodeState {
        NodeState { scheduled_pods: self.state.scheduled_pods, ..NodeState::default() }
    }

    fn check_routed(&mut self, address: IpAddr, eni: &EniId, now: Time, scene: &mut Scene<'_>) {
        let instance = &self.cloud.instance;
        let (in_cloud, primary) = scene.ec2.with_enis(now, |enis| {
            let info = enis.get(eni);
            let holds = |eni: &EniInfo| match address {
                IpAddr::V4(v4) => eni.primary_ipv4 != v4 && eni.holds(v4),
                IpAddr::V6(v6) => eni.ipv6_prefixes.iter().any(|prefix| prefix.contains(&v6)),
            };
            let attached =
                info.filter(|eni| eni.is_on(instance) && eni.link_is_up(now)).and_then(|eni| eni.attachment.as_ref());
            let device = attached.map(|attachment| attachment.device);
            (device.is_some() && info.is_some_and(holds), device == Some(DeviceIndex::PRIMARY))
        });
        let behind_our_back =
            |(of, slot, _): &(EniId, Option<IpNet>, Time)| of == eni && slot.is_none_or(|slot| slot.contains(&address));
        if !in_cloud && !self.watch.taken.iter().any(behind_our_back) {
            self.watch.broken(Rule::Routed, format!("{address} on {eni} is handed out; EC2 does not route it here"));
            return;
        }
        let stands = if primary { self.kernel.ruleset_stands() } else { self.kernel.steers(address, eni) };
        let flushed = |eni: Option<EniId>| self.watch.flushed.get(&eni).is_some_and(|at| *at >= self.watch.kernel_of);
        if in_cloud && !stands && !flushed(Some(eni.clone())) && !flushed(None) {
            self.watch.broken(Rule::Routed, format!("{address} is handed out; the routes of {eni} do not stand"));
        }
    }

    /// A request is about to reach EC2.
    pub(crate) fn check_before(&mut self, request: &CloudRequest, now: Time, scene: &mut Scene<'_>) {
        let given_back: Vec<IpNet> = match request {
            CloudRequest::Unassign { slots, .. } => slots.iter().copied().collect(),
            CloudRequest::DetachEni { eni, .. } | CloudRequest::DeleteEni { eni } => {
                scene.ec2.with_enis(now, |enis| enis.get(eni).map(|eni| slots(eni).collect()).unwrap_or_default())
            }
            _ => return,
        };
        let inside = |address: &IpAddr| given_back.iter().any(|slot| slot.contains(address));
        let live = self.runtime.sandboxes.iter().filter(|(_, sandbox)| sandbox.is_live());
        let addresses = live.flat_map(|(number, sandbox)| sandbox.addresses().map(move |address| (number, address)));
        let user = { addresses }.find(|(_, address)| inside(address));
        let route = || self.kernel.routes.iter().map(|(address, number)| (number, *address)).find(|(_, a)| inside(a));
        if let Some((number, address)) = user.or_else(route) {
            let text = format!("{} while {address} belongs to c{number}", cloud::words(request));
            self.watch.broken(Rule::InUse, text);
        }
    }

    /// EC2 has answered a request; the answer is on its way.
    pub(crate) fn check_after(
        &mut self,
        request: &CloudRequest,
        result: &Result<CloudReply, CloudError>,
        now: Time,
        scene: &mut Scene<'_>,
    ) {
        if let (CloudRequest::Unassign { slots, .. }, Ok(_)) = (request, result) {
            self.given_back.extend(slots);
        }
        if result.is_err() || !matches!(request, CloudRequest::AttachEni { .. }) {
            return;
        }
        let (ours, primary_type) = self.enis_of_ours(now, scene);
        let by_type = limits::lookup(&primary_type).map_or(u32::MAX, |kind| kind.max_enis);
        let most = by_type.min(self.settings.max_eni.unwrap_or(u32::MAX));
        if ours > most {
            self.watch.broken(Rule::Limits, format!("{ours} ENIs are ours and attached; {most} are allowed"));
        }
    }

    /// ENIs on the instance that are the primary or of our making, and the instance's type.
    fn enis_of_ours(&self, now: Time, scene: &mut Scene<'_>) -> (u32, String) {
        let instance = &self.cloud.instance;
        let ours = scene.ec2.with_enis(now, |enis| {
            let here = enis.values().filter(|eni| eni.is_on(instance));
            let made = here.filter(|eni| {
                let primary = eni.attachment.as_ref().is_some_and(|a| a.device == DeviceIndex::PRIMARY);
                primary || eni.tags.get(TAG_INSTANCE).map(String::as_str) == Some(instance.as_str())
            });
            made.count()
        });
        let node = self.daemon.as_ref().and_then(|daemon| daemon.ledger().node.as_ref());
        (u32::try_from(ours).unwrap_or(u32::MAX), node.map_or_else(String::new, |node| node.instance_type.clone()))
    }

    /// A record is durable.
    pub(crate) fn written(&mut self, record: &Record, now: Time, _: &mut Scene<'_>) {
        if let Record::Unseen { eni, .. } = record {
            self.watch.unwritten.remove(eni);
        }
        let Record::Released { allocation, at } = record else { return };
        self.watch.freed.insert(allocation.address, *at);
        let told = self.watch.dels.get(&allocation.sandbox).is_some_and(|told| *told <= now);
        if let Some((number, sandbox)) = self.runtime.by_id(&allocation.sandbox)
            && sandbox.is_live()
            && !told
        {
            let text = format!("{} of c{number} is released; the pod runs and nobody deleted it", allocation.address);
            self.watch.broken(Rule::Kept, text);
        }
    }

    /// A batch is over.
    pub(crate) fn check_batch(&mut self, now: Time, _: &mut Scene<'_>) {
        for Early { address, rested_ms, instead } in std::mem::take(&mut self.watch.early) {
            let free = self.daemon.as_ref().map_or(0, |daemon| daemon.free_now(now));
            if free > 0 {
                let text = format!("{address} is handed out after {rested_ms} ms; {free} others were free");
                self.watch.broken(Rule::CoolDown, text);
            } else if let Some(eni) = instead {
                let text = format!("{address} is handed out after {rested_ms} ms; {eni} had room for another");
                self.watch.broken(Rule::CoolDown, text);
            }
        }
        for repair in std::mem::take(&mut self.watch.unmentioned) {
            self.watch.broken(Rule::Noted, format!("nobody said that {repair}"));
        }
    }

    /// Whoever has been waiting longer than it was willing to.
    pub(crate) fn check_patience(&mut self, now: Time) {
        if let Some((by, request)) = self.watch.owed.first().copied()
            && by < now
        {
            self.watch.replied(request);
            let text = format!("request {} was owed an answer {} ms ago", request.0, now.since_ms(by));
            self.watch.broken(Rule::Patience, text);
        }
    }

    /// What the journal says after a crash, against what was promised before it.
    pub(crate) fn check_replayed(&mut self, ledger: &LedgerState) {
        for (number, sandbox) in self.runtime.sandboxes.iter().filter(|(_, sandbox)| sandbox.is_live()) {
            let held = ledger.pods.get(&sandbox.id).map(|allocation| allocation.address);
            if held != sandbox.address && !self.watch.dels.contains_key(&sandbox.id) {
                let text =
                    format!("c{number} lives with {:?}; after the restart the ledger says {held:?}", sandbox.address);
                self.watch.violations.push(Violation { rule: Rule::Replay, text });
            }
        }
    }

    /// A compacted journal must say what the daemon knows.
    pub(crate) fn check_compacted(&mut self) {
        let (Ok(says), Some(daemon)) = (self.journal.clone().replay(), &self.daemon) else { return };
        let knows = daemon.ledger();
        if says != *knows {
            let parts = [
                ("ENIs", says.enis != knows.enis),
                ("slots", says.slots != knows.slots),
                ("slots going", says.releasing != knows.releasing),
                ("slots unseen", says.unseen != knows.unseen || says.enis_unseen != knows.enis_unseen),
                ("slots given up", says.given_up != knows.given_up || says.forgotten != knows.forgotten),
                ("pods", says.pods != knows.pods),
                ("cool-downs", says.freed != knows.freed),
                ("creations", says.creations != knows.creations),
            ];
            let differ = cloud::list(parts.iter().filter(|(_, differs)| *differs).map(|(name, _)| name));
            let text = format!("the compacted journal says something else than the daemon knows: {differ}");
            self.watch.broken(Rule::Replay, text);
        }
    }
}
