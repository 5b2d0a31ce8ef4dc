//! What the reports of outages describe, as a policy: the museum's other side. It works while nothing happens.
//!
//! It believes IMDS: at start and, where the number of addresses differs, once a minute. It remembers cool-downs and ENIs
//! being made in memory only, counts a cooling address as available, drops allocations that match nothing, gives back by its
//! own books without a look at the kernel, takes every refusal of EC2 as a reason to ask again in five seconds, and never
//! asks who is still there. It serves nobody before EC2 has described the node. Target and plan are the pool's own
//! arithmetic.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use flatwire_core::ids::{DeviceIndex, EniId, PodName, SandboxId, Time};
use flatwire_core::ledger::{Allocation, EniRecord, LedgerState, NodeFacts, Progress, Record};
use flatwire_core::limits;
use flatwire_core::netplan::{EniPlan, Look, NodePlan, PrimaryPlan};
use flatwire_core::pick;
use flatwire_core::plan::{self, AtMost, EniRoom, Means, Step, SubnetRoom};
use flatwire_core::pool::{Answer, Command, Event, Failure, OpId, Reason, RequestId};
use flatwire_core::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest, EniView, KernelReport, Metadata};
use flatwire_core::settings::Settings;
use flatwire_core::target::{self, Counts, Frame, Mode, PREFIX_SIZE, Target, Wanted, WarmTargets};
use ipnet::IpNet;

use crate::invariants::TAG_INSTANCE;
use crate::policy::Policy;

/// How often it compares its pool with the target.
const LOOK_EVERY_MS: u64 = 5_000;
/// How often it compares its pool with IMDS.
const COMPARE_EVERY_MS: u64 = 60_000;
/// While it has not started it tries again after this.
const START_AGAIN_MS: u64 = 1_000;
/// How long it waits for a link before it drops the ENI, and how often it looks.
const LINK_PATIENCE_MS: u64 = 15_000;
const LINK_RETRY_MS: u64 = 3_000;

/// Falls back to single addresses, for good, once a subnet has no prefix to give.
pub type NaiveWithFallback = Naive<true>;

pub struct Naive<const FALLS_BACK: bool = false> {
    settings: Settings,
    ledger: LedgerState,
    /// IMDS and EC2 have been read.
    started: bool,
    fell_back: bool,
    cooling: BTreeMap<IpAddr, Time>,
    /// The pod of each sandbox that asked.
    names: BTreeMap<SandboxId, PodName>,
    /// Detached ENIs that are still to be deleted.
    doomed: Vec<EniId>,
    /// It asks EC2 one thing at a time.
    doing: Option<(OpId, Doing)>,
    look_at: Time,
    compare_at: Time,
    /// What stands in the kernel, what it is being told, and when to tell it again.
    told: Option<Arc<NodePlan>>,
    telling: Option<(OpId, Arc<NodePlan>)>,
    kernel_at: Option<Time>,
    /// ENIs whose routes stand.
    stands: BTreeSet<EniId>,
    /// ENIs whose link it waits for, since when.
    linking: BTreeMap<EniId, Time>,
    ops: u64,
}

/// What EC2 was asked for.
enum Doing {
    Metadata,
    Node,
    Create,
    Attach(EniRecord, BTreeSet<IpNet>),
    Finish(EniRecord, BTreeSet<IpNet>),
    Assign(EniId),
    Detach(EniId),
    Delete(EniId),
    Unassign,
}

#[derive(Default)]
struct Out {
    records: Vec<Record>,
    commands: Vec<Command>,
}

impl<const FALLS_BACK: bool> Policy for Naive<FALLS_BACK> {
    const QUEUES_RELEASES: bool = false;

    fn start(settings: &Settings, ledger: LedgerState, _: u64, now: Time) -> Self {
        Self {
            settings: settings.clone(),
            names: ledger.pods.iter().map(|(sandbox, held)| (sandbox.clone(), held.pod.clone())).collect(),
            ledger,
            started: false,
            fell_back: false,
            cooling: BTreeMap::new(),
            doomed: Vec::new(),
            doing: None,
            look_at: now,
            compare_at: now.plus_ms(COMPARE_EVERY_MS),
            told: None,
            telling: None,
            kernel_at: None,
            stands: BTreeSet::new(),
            linking: BTreeMap::new(),
            ops: 0,
        }
    }

    fn step(&mut self, event: Event, now: Time) -> Vec<Command> {
        let mut out = Out::default();
        match event {
            Event::Add { request, sandbox, pod, .. } => self.add(request, sandbox, pod, now, &mut out),
            Event::Del { request, sandbox } => self.del(request, &sandbox, now, &mut out),
            Event::Gc { request, .. } => {
                out.commands.push(Command::Reply { request, answer: Answer::Stale(Vec::new()) });
            }
            Event::Cloud { op, result } => self.cloud_answered(op, result, now, &mut out),
            Event::Kernel { op, result: Ok((report, _)) } => self.kernel_answered(op, &report, now, &mut out),
            Event::Kernel { .. } => (self.telling, self.kernel_at) = (None, Some(now.plus_ms(LINK_RETRY_MS))),
            _ => {}
        }
        self.look(now, &mut out);
        self.tell_kernel(now, &mut out);
        let written = (!out.records.is_empty()).then_some(Command::Persist(out.records));
        written.into_iter().chain(out.commands).collect()
    }

    fn deadline(&self) -> Option<Time> {
        let look = self.doing.is_none().then_some(self.look_at);
        [look, self.kernel_at.filter(|_| self.telling.is_none())].into_iter().flatten().min()
    }

    fn persist_failed(&mut self, records: Vec<Record>) {
        records.iter().rev().for_each(|record| self.ledger.revert(record));
    }

    fn ledger(&self) -> &LedgerState {
        &self.ledger
    }

    fn free_now(&self, now: Time) -> u32 {
        u32::try_from(self.free(now).count()).unwrap_or(u32::MAX)
    }

    fn target(&self, _: Time) -> Option<Target> {
        self.goal()
    }
}

impl<const FALLS_BACK: bool> Naive<FALLS_BACK> {
    // Pods.

    fn add(&mut self, request: RequestId, sandbox: SandboxId, pod: PodName, now: Time, out: &mut Out) {
        self.names.insert(sandbox.clone(), pod.clone());
        let held = self.ledger.pods.get(&sandbox).cloned();
        let answer = held.or_else(|| {
            let (address, eni) = self.free(now).next().filter(|_| self.started)?;
            let (eni, device, table) = (eni.id.clone(), eni.device, eni.table());
            let new = Allocation { sandbox, pod, address, second: None, eni, device, table, at: now };
            self.record(Record::Allocated(new.clone()), out);
            Some(new)
        });
        let none = || Answer::Failed(Failure::retryable(Reason::Assigning, "no address is free".to_owned()));
        out.commands.push(Command::Reply { request, answer: answer.map_or_else(none, Answer::Added) });
    }

    /// What the sandbox holds, or else what its pod holds.
    fn del(&mut self, request: RequestId, sandbox: &SandboxId, now: Time, out: &mut Out) {
        let of_pod = || {
            let name = self.names.get(sandbox)?;
            self.ledger.pods.values().find(|held| held.pod == *name)
        };
        let held = self.ledger.pods.get(sandbox).or_else(of_pod).cloned();
        let answer = match held {
            Some(allocation) => {
                self.cooling.insert(allocation.address, now);
                self.record(Record::Released { allocation: allocation.clone(), at: now }, out);
                Answer::Deleted(allocation)
            }
            None => Answer::Unknown,
        };
        out.commands.push(Command::Reply { request, answer });
    }

    /// Addresses that could be handed out now, lowest device first.
    fn free(&self, now: Time) -> impl Iterator<Item = (IpAddr, &EniRecord)> {
        let used: BTreeSet<IpAddr> = self.ledger.pods.values().map(|held| held.address).collect();
        let cools = move |address: &IpAddr| {
            self.cooling.get(address).is_some_and(|at| now.since_ms(*at) < self.settings.cooldown_ms())
        };
        let in_service = self.enis().into_iter().filter(|eni| self.stands.contains(&eni.id));
        let addresses = in_service.flat_map(|eni| {
            let told = self.told.iter().flat_map(|plan| &plan.enis).find(|told| told.id == eni.id);
            let steered = move |slot: &&IpNet| {
                eni.device == DeviceIndex::PRIMARY || told.is_some_and(|t| t.sources.contains(*slot))
            };
            self.slots(&eni.id).filter(steered).flat_map(pick::addresses).map(move |address| (address, eni))
        });
        addresses.filter(move |(address, _)| !used.contains(address) && !cools(address))
    }

    // The books.

    fn record(&mut self, record: Record, out: &mut Out) {
        if !matches!(record, Record::Allocated(_) | Record::Released { .. }) {
            self.kernel_at = Some(Time(0));
        }
        self.ledger.apply(&record);
        out.records.push(record);
    }

    fn enis(&self) -> Vec<&EniRecord> {
        let mut enis: Vec<&EniRecord> = self.ledger.enis.values().collect();
        enis.sort_by_key(|eni| eni.device);
        enis
    }

    fn slots(&self, eni: &EniId) -> impl Iterator<Item = &IpNet> {
        self.ledger.slots.get(eni).into_iter().flatten()
    }

    fn is_empty(&self, slot: &IpNet) -> bool {
        !self.ledger.pods.values().any(|held| slot.contains(&held.address))
    }

    /// These are the ENI's addresses; allocations that match none of any ENI's are dropped.
    fn believe(&mut self, eni: &EniId, slots: &BTreeSet<IpNet>, now: Time, out: &mut Out) {
        let gone: BTreeSet<IpNet> = self.slots(eni).filter(|slot| !slots.contains(slot)).copied().collect();
        self.record(Record::GivenUp { eni: eni.clone(), slots: gone, at: now }, out);
        self.record(Record::Held { eni: eni.clone(), slots: slots.clone() }, out);
    }

    fn drop_unmatched(&mut self, now: Time, out: &mut Out) {
        let held: BTreeSet<IpNet> = self.ledger.slots.values().flatten().copied().collect();
        let matches = |address: &IpAddr| held.iter().any(|slot| slot.contains(address));
        let lost: Vec<Allocation> = self.ledger.pods.values().filter(|a| !matches(&a.address)).cloned().collect();
        for allocation in lost {
            self.record(Record::Released { allocation, at: now }, out);
        }
    }

    // EC2 and IMDS.

    /// One thing at a time, every five seconds.
    fn look(&mut self, now: Time, out: &mut Out) {
        if self.doing.is_some() || now < self.look_at {
            return;
        }
        self.look_at = now.plus_ms(LOOK_EVERY_MS);
        if !self.started || now >= self.compare_at {
            self.compare_at = now.plus_ms(COMPARE_EVERY_MS);
            return self.ask(Doing::Metadata, CloudRequest::ReadMetadata, out);
        }
        if let Some(eni) = self.doomed.pop() {
            return self.ask(Doing::Delete(eni.clone()), CloudRequest::DeleteEni { eni }, out);
        }
        let (Some(node), Some(target)) = (self.ledger.node.clone(), self.goal()) else { return };
        match target.wanted {
            Wanted::Enough => self.give_back(&target, now, out),
            wanted => self.grow(wanted, &node, now, out),
        }
    }

    fn ask(&mut self, doing: Doing, request: CloudRequest, out: &mut Out) {
        let op = self.new_op();
        self.doing = Some((op, doing));
        out.commands.push(Command::Cloud { op, request });
    }

    fn new_op(&mut self) -> OpId {
        self.ops += 1;
        OpId(self.ops)
    }

    fn frame(&self) -> Option<Frame> {
        let kind = limits::lookup(&self.ledger.node.as_ref()?.instance_type)?;
        let mode = if self.fell_back { Mode::Addresses } else { self.settings.mode };
        Some(Frame { mode, slots_per_eni: kind.ipv4_per_eni - 1, max_pods: self.settings.max_pods })
    }

    /// The add-on's arithmetic, in which a cooling address is available and a waiting pod is nobody.
    fn goal(&self) -> Option<Target> {
        let slots: Vec<&IpNet> = self.ledger.slots.values().flatten().collect();
        let prefixes: Vec<&IpNet> = slots.iter().filter(|slot| pick::size(slot) == PREFIX_SIZE).copied().collect();
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let counts = Counts {
            total: slots.iter().map(|slot| pick::size(slot)).sum(),
            assigned: number(self.ledger.pods.len()),
            prefixes: number(prefixes.len()),
            free_prefixes: number(prefixes.iter().filter(|slot| self.is_empty(slot)).count()),
            ..Counts::default()
        };
        let policy = match self.settings.policy {
            target::Policy::Demand => {
                target::Policy::AddOn(WarmTargets { warm_eni: 1, warm_ip: 0, minimum_ip: 0, warm_prefix: 0 })
            }
            policy => policy,
        };
        Some(target::target(policy, &self.frame()?, &counts))
    }

    fn grow(&mut self, wanted: Wanted, node: &NodeFacts, now: Time, out: &mut Out) {
        let (Some(frame), Some(primary)) = (self.frame(), self.ledger.enis.get(&node.primary_eni)) else { return };
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let room = |eni: &&EniRecord| EniRoom {
            eni: eni.id.clone(),
            free_slots: frame.slots_per_eni.saturating_sub(number(self.slots(&eni.id).count())),
            resting: false,
            singles_only: false,
            at_most: AtMost::ANY,
        };
        let most = limits::lookup(&node.instance_type).map_or(0, |kind| kind.max_enis);
        let most = most.min(self.settings.max_eni.unwrap_or(u32::MAX));
        let means = Means {
            mode: frame.mode,
            enis: self.enis().iter().map(room).collect(),
            new_enis: most.saturating_sub(number(self.ledger.enis.len())),
            slots_per_eni: frame.slots_per_eni,
            subnets: vec![SubnetRoom { subnet: primary.subnet.clone(), singles_only: false, at_most: AtMost::ANY }],
            later: 0,
            spare_enis: true,
        };
        match plan::plan(wanted, u32::MAX, &means).steps.into_iter().next() {
            Some(Step::Assign { eni, want }) => {
                self.ask(Doing::Assign(eni.clone()), CloudRequest::Assign { eni, want }, out);
            }
            Some(Step::Create { subnet, want }) => {
                let request = CloudRequest::CreateEni {
                    subnet,
                    security_groups: node.security_groups.clone(),
                    want,
                    ipv6_prefix: false,
                    description: format!("aws-K8S-{}", node.instance),
                    tags: BTreeMap::from([(TAG_INSTANCE.to_owned(), node.instance.to_string())]),
                    client_token: format!("{}-{:x}", node.instance, now.0),
                };
                self.ask(Doing::Create, request, out);
            }
            None => {}
        }
    }

    /// A whole ENI that the target is met without, or else idle slots of one ENI: out of the books first, then out of EC2.
    fn give_back(&mut self, target: &Target, now: Time, out: &mut Out) {
        let enis: Vec<EniRecord> = self.enis().into_iter().rev().cloned().collect();
        let size = |eni: &EniRecord| self.slots(&eni.id).map(pick::size).sum::<u32>();
        let idle = |eni: &EniRecord| self.slots(&eni.id).all(|slot| self.is_empty(slot));
        let whole = |eni: &&EniRecord| eni.device != DeviceIndex::PRIMARY && idle(eni) && size(eni) <= target.spare;
        if let Some(EniRecord { id, attachment: Some(attachment), .. }) = enis.iter().find(whole).cloned() {
            self.record(Record::EniGone { eni: id.clone(), at: now }, out);
            return self.ask(Doing::Detach(id.clone()), CloudRequest::DetachEni { eni: id, attachment }, out);
        }
        for eni in enis {
            let mut left = target.surplus;
            let mut slots = BTreeSet::new();
            for slot in self.slots(&eni.id).filter(|slot| self.is_empty(slot)) {
                let kind = slots.first().is_none_or(|first| pick::size(first) == pick::size(slot));
                if kind && pick::size(slot) <= left {
                    left -= pick::size(slot);
                    slots.insert(*slot);
                }
            }
            if !slots.is_empty() {
                self.record(Record::GivenUp { eni: eni.id.clone(), slots: slots.clone(), at: now }, out);
                return self.ask(Doing::Unassign, CloudRequest::Unassign { eni: eni.id, slots }, out);
            }
        }
    }

    fn cloud_answered(&mut self, op: OpId, result: Result<CloudReply, CloudError>, now: Time, out: &mut Out) {
        let Some((_, doing)) = self.doing.take_if(|(asked, _)| *asked == op) else { return };
        match (doing, result) {
            (Doing::Metadata, Ok(CloudReply::Metadata(metadata))) if self.started => {
                self.compare(&metadata.enis, now, out);
            }
            (Doing::Metadata, Ok(CloudReply::Metadata(metadata))) => self.start_over(metadata, now, out),
            (Doing::Node, Ok(CloudReply::Enis(views))) => {
                for view in views {
                    if let Some(record) = self.ledger.enis.get(&view.id).cloned() {
                        self.record(Record::Eni(EniRecord { attachment: view.attachment, ..record }), out);
                    }
                }
                self.started = true;
            }
            (Doing::Metadata | Doing::Node, _) if !self.started => self.look_at = now.plus_ms(START_AGAIN_MS),
            (Doing::Create, Ok(CloudReply::Created(view))) => self.attach(&view, out),
            (Doing::Attach(record, slots), Ok(CloudReply::Attached { attachment })) => {
                let eni = record.id.clone();
                let record = EniRecord { attachment: Some(attachment.clone()), ..record };
                let request = CloudRequest::SetDeleteOnTermination { eni, attachment };
                self.ask(Doing::Finish(record, slots), request, out);
            }
            (Doing::Attach(record, _), Err(_)) => {
                self.ask(Doing::Delete(record.id.clone()), CloudRequest::DeleteEni { eni: record.id }, out);
            }
            (Doing::Finish(record, slots), Ok(_)) => {
                let eni = record.id.clone();
                self.record(Record::Eni(EniRecord { progress: Progress::Settled, ..record }), out);
                self.record(Record::Held { eni: eni.clone(), slots }, out);
                self.linking.insert(eni, now);
            }
            (Doing::Finish(EniRecord { id: eni, attachment: Some(attachment), .. }, _), Err(_)) => {
                self.ask(Doing::Detach(eni.clone()), CloudRequest::DetachEni { eni, attachment }, out);
            }
            (Doing::Assign(eni), Ok(CloudReply::Assigned(slots))) => {
                self.record(Record::Held { eni, slots }, out);
            }
            (Doing::Assign(_) | Doing::Create, Err(error)) => {
                self.fell_back |= FALLS_BACK && error.kind == CloudErrorKind::Fragmented;
            }
            (Doing::Detach(eni), Ok(_)) => self.doomed.push(eni),
            (Doing::Delete(eni), Err(error)) if error.kind == CloudErrorKind::Busy => self.doomed.push(eni),
            // Whatever else was refused is forgotten.
            _ => {}
        }
    }

    fn attach(&mut self, view: &EniView, out: &mut Out) {
        let Some(node) = self.ledger.node.clone() else { return };
        let Some(primary) = self.ledger.enis.get(&node.primary_eni) else { return };
        let taken: BTreeSet<u32> = self.ledger.enis.values().map(|eni| eni.device.0).collect();
        let device = DeviceIndex((1..).find(|device| !taken.contains(device)).unwrap_or(1));
        let record = EniRecord { device, created: true, ..record_of(view, primary.subnet_cidr) };
        let request = CloudRequest::AttachEni { eni: view.id.clone(), instance: node.instance, device, card: 0 };
        self.ask(Doing::Attach(record, view.slots.clone()), request, out);
    }

    /// At start: the node is what IMDS says, and nothing else.
    fn start_over(&mut self, metadata: Metadata, now: Time, out: &mut Out) {
        let Some(primary) = metadata.enis.iter().find(|eni| eni.mac == metadata.primary_mac).cloned() else { return };
        let Some(cidr) = primary.subnet_cidr else { return };
        let instance = metadata.instance.clone();
        let facts = NodeFacts {
            instance: metadata.instance,
            instance_type: metadata.instance_type,
            region: metadata.region,
            availability_zone: metadata.availability_zone,
            vpc: metadata.vpc,
            vpc_cidrs: metadata.vpc_cidrs,
            primary_eni: primary.id,
            security_groups: primary.security_groups,
        };
        self.record(Record::Node(facts), out);
        self.forget_absent(&metadata.enis, now, out);
        for view in &metadata.enis {
            let record = record_of(view, view.subnet_cidr.unwrap_or(cidr));
            self.record(Record::Eni(record), out);
            self.believe(&view.id, &view.slots, now, out);
            self.linking.insert(view.id.clone(), now);
        }
        self.drop_unmatched(now, out);
        self.ask(Doing::Node, CloudRequest::DescribeNode { instance }, out);
    }

    /// Once a minute: an ENI that is not there is gone, and where the numbers differ IMDS is right.
    fn compare(&mut self, views: &[EniView], now: Time, out: &mut Out) {
        self.forget_absent(views, now, out);
        for view in views {
            if self.ledger.enis.contains_key(&view.id) && self.slots(&view.id).count() != view.slots.len() {
                self.believe(&view.id, &view.slots, now, out);
            }
        }
        self.drop_unmatched(now, out);
    }

    fn forget_absent(&mut self, views: &[EniView], now: Time, out: &mut Out) {
        let absent = |eni: &&EniId| !views.iter().any(|view| view.id == **eni);
        let absent: Vec<EniId> = self.ledger.enis.keys().filter(absent).cloned().collect();
        for eni in absent {
            self.record(Record::EniGone { eni, at: now }, out);
        }
    }

    // The kernel.

    /// When the books of ENIs have changed, and while a link is missing; never else.
    fn tell_kernel(&mut self, now: Time, out: &mut Out) {
        if self.telling.is_some() || self.kernel_at.is_none_or(|at| at > now) {
            return;
        }
        self.kernel_at = None;
        let Some(plan) = self.node_plan().map(Arc::new) else { return };
        let op = self.new_op();
        self.telling = Some((op, plan.clone()));
        out.commands.push(Command::Kernel { op, plan, look: Look::default() });
    }

    fn kernel_answered(&mut self, op: OpId, report: &KernelReport, now: Time, out: &mut Out) {
        let Some((_, plan)) = self.telling.take_if(|(asked, _)| *asked == op) else { return };
        self.told = Some(plan);
        self.stands = report.programmed.clone();
        self.linking.retain(|eni, _| !report.programmed.contains(eni));
        for eni in &report.missing_links {
            let again = now.plus_ms(LINK_RETRY_MS);
            self.kernel_at = Some(self.kernel_at.map_or(again, |at| at.min(again)));
            let since = self.linking.get(eni).copied().unwrap_or(now);
            if now.since_ms(since) >= LINK_PATIENCE_MS {
                self.linking.remove(eni);
                self.record(Record::EniGone { eni: eni.clone(), at: now }, out);
            }
        }
    }

    fn node_plan(&self) -> Option<NodePlan> {
        let node = self.ledger.node.as_ref()?;
        let primary = self.ledger.enis.get(&node.primary_eni)?;
        let secondary = self.enis().into_iter().filter(|eni| eni.device != DeviceIndex::PRIMARY);
        let enis = secondary.map(|eni| EniPlan {
            id: eni.id.clone(),
            mac: eni.mac,
            address: eni.primary_ipv4,
            subnet: eni.subnet_cidr,
            table: eni.table(),
            mark: self.settings.marks.of_eni(eni.device.0 + 1),
            sources: self.slots(&eni.id).copied().collect(),
        });
        let primary = PrimaryPlan { id: primary.id.clone(), mac: primary.mac, address: primary.primary_ipv4 };
        let plan = NodePlan { enis: enis.collect(), vpc: node.vpc_cidrs.clone(), ..NodePlan::new(primary) };
        Some(plan.with_settings(&self.settings))
    }
}

fn record_of(view: &EniView, subnet_cidr: ipnet::Ipv4Net) -> EniRecord {
    EniRecord {
        id: view.id.clone(),
        mac: view.mac,
        device: view.device,
        card: view.card,
        subnet: view.subnet.clone(),
        subnet_cidr,
        primary_ipv4: view.primary_ipv4,
        attachment: view.attachment.clone(),
        progress: Progress::Settled,
        created: false,
        security_groups: view.security_groups.clone(),
        leaving: None,
    }
}
