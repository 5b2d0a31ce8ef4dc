//! The pool: the state machine that owns this node's addresses.
//!
//! `step(event, now)` takes one fact and returns the wishes that follow from it. Every step ends in `settle`, which looks at
//! the state as it is now and not at what happened: it serves waiting ADDs, moves ENIs along, grows the pool and programs
//! the kernel. So a lost event costs time and never correctness.
//!
//! Order of effects: the records of a step are durable before any of its other commands is carried out. An ADD is answered
//! after the ledger knows it; a slot is given back after the ledger has forgotten it.

mod cloud;
mod compare;
mod explain;
mod grow;
mod ipv6;
mod kernel;
mod leaks;
mod note;
mod pods;
mod release;
mod requests;
mod said;
mod setback;
mod subnets;
#[cfg(test)]
mod tests;
mod view;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use explain::{ExplainLine, Explanation, Question};
pub use note::Note;
pub use said::{EniConfig, Level, NodeState, Part, Said};
pub use setback::Setback;
pub use view::{EniRow, Failure, PoolStatus, Reason};

use crate::audit::AuditReport;
use crate::bucket::Bucket;
use crate::contest::Contests;
use crate::ids::{DeviceIndex, EniId, MacAddress, PodName, SandboxId, SecurityGroupId, Time};
use crate::ledger::{Allocation, LedgerState, Record};
use crate::netplan::{Look, NodePlan};
use crate::ports::{CloudError, CloudReply, CloudRequest, EniView, InstanceLimits, KernelReport, PodsSeen, Want};
use crate::settings::{Settings, Sizing};
use crate::target::Counts;

/// ADDs that wait at once; the next is refused at once, with the reason.
pub const MAX_WAITING: usize = 1_024;
/// How long an ADD waits when the plugin does not say.
pub const DEFAULT_PATIENCE_MS: u64 = 15_000;
/// ENIs being created at once.
pub const MAX_CREATIONS: usize = 2;
/// An ENI whose link has not come after this long no longer counts as capacity on its way.
pub const STUCK_ENI_MS: u64 = 20_000;
/// How often the kernel is asked again for a link that has not appeared.
pub const LINK_RETRY_MS: u64 = 200;
/// How often the kernel is compared with the plan when nothing happens.
pub const KERNEL_RESYNC_MS: u64 = 10_000;

/// Looks that changes in the kernel ask for follow each other no faster: pods that come and go change it all the time.
pub const LOOK_SPACING_MS: u64 = 100;
/// Looks that forget connections follow each other no faster, unless a pod waits for one of the addresses: each holds up a
/// processor of the node for ten milliseconds. Well below any sensible cool-down.
pub const FORGET_SPACING_MS: u64 = 5_000;

/// How often the instance metadata is read again: groups, CIDRs of the VPC, the end of the instance.
pub const METADATA_EVERY_MS: u64 = 60_000;
/// How often EC2 is asked for this node's ENIs although nothing differs; half as long again at most, by chance.
pub const VERIFY_EVERY_MS: u64 = 1_800_000;
/// Readings of EC2 and IMDS may be this old: what was given up less long ago is not taken back because one shows it.
pub const READINGS_LAG_MS: u64 = 300_000;
/// Decisions that `explain` remembers.
pub const MAX_HISTORY: usize = 1_024;
/// An audit says what it has after this, if EC2 or the kernel has not answered.
const AUDIT_PATIENCE_MS: u64 = 20_000;

/// A fact.
#[derive(Debug, Clone)]
pub enum Event {
    /// A pod asks for an address (CNI ADD).
    Add { request: RequestId, sandbox: SandboxId, pod: PodName, patience_ms: Option<u64> },
    /// Whoever asked is gone; nobody waits for the answer.
    Abandoned { request: RequestId },
    /// A sandbox is gone (CNI DEL).
    Del { request: RequestId, sandbox: SandboxId },
    /// What the runtime still knows of a network; the rest is gone (CNI GC).
    Gc { request: RequestId, network: String, valid: BTreeSet<(String, String)> },
    /// An answer from EC2 or IMDS.
    Cloud { op: OpId, result: Result<CloudReply, CloudError> },
    /// An answer from the kernel, with the pods it shows now; the error as text, with its causes.
    Kernel { op: OpId, result: Result<(KernelReport, PodsSeen), String> },
    /// Something changed in the kernel, perhaps by us: it is to be compared with the plan.
    KernelChanged,
    /// What is said of this node from outside: by an operator, or by who watches the API server.
    NodeState(NodeState),
    /// Pods another IPAM has wired on this node (the add-on's state file), for a ledger that is empty.
    Import(Vec<ImportedPod>),
    /// Look at cloud and kernel again, compare all three views, and say what differs.
    Audit { request: RequestId },
    /// Time passed.
    Tick,
    /// The daemon stops: whoever waits is told so.
    Stop,
}

/// A pod of another IPAM's state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedPod {
    pub sandbox: SandboxId,
    pub pod: PodName,
    pub address: IpAddr,
    pub at: Time,
}

/// A wish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Must be durable before the commands that follow it.
    Persist(Vec<Record>),
    Reply {
        request: RequestId,
        answer: Answer,
    },
    Cloud {
        op: OpId,
        request: CloudRequest,
    },
    Kernel {
        op: OpId,
        plan: Arc<NodePlan>,
        look: Look,
    },
    /// For the log and the counters.
    Note(Note),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OpId(pub u64);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Added(Allocation),
    Deleted(Allocation),
    /// To a DEL of a sandbox nobody knows. Not an error: absent means done.
    Unknown,
    /// To a GC: what the runtime no longer lists.
    Stale(Vec<Allocation>),
    /// To an audit.
    Audited(AuditReport),
    Failed(Failure),
}

/// What was asked of the world and has not been answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Op {
    Metadata,
    Limits,
    Verify,
    ReadBack(EniId),
    Create { token: String },
    Attach(EniId),
    Settle(EniId),
    Assign { eni: EniId, want: Want },
    AssignIpv6 { eni: EniId, prefix: Option<Ipv6Net> },
    Reclaim { eni: EniId, slots: BTreeSet<IpNet> },
    Unassign { eni: EniId, slots: BTreeSet<IpNet> },
    Detach(EniId),
    Delete(EniId),
    Groups { eni: EniId, groups: Vec<SecurityGroupId> },
    Subnets,
    Leaks,
    Mark(EniId),
    Collect(EniId),
    Program { revision: u64, forgets: bool },
}

/// What is known of an ENI beside the ledger; read again after a restart.
#[derive(Debug, Clone)]
struct Live {
    /// When it came to its present stage.
    since: Time,
    /// Its link is there and its table and rules stand.
    programmed: bool,
    /// Sources the kernel steers to it.
    told: BTreeSet<IpNet>,
    /// Slots only IMDS shows: not handed out until EC2 confirms them.
    quarantined: BTreeSet<IpNet>,
    /// Slots of the ledger that IMDS does not show after a restart: not handed out until EC2 has spoken, or cannot.
    doubted: BTreeSet<IpNet>,
    /// Slots that IMDS did not show at some time, long after they came: EC2 has been asked about them.
    lacking: BTreeSet<IpNet>,
    /// When each slot came, as far as this life of the daemon knows.
    gained: BTreeMap<IpNet, Time>,
    /// Nothing is given back on the word of a reading of the kernel that began before this.
    fenced_at: Option<Time>,
    /// The outcome of a change is not known: to be read before anything else is done to it.
    read_due: bool,
    /// EC2 may have given it back already: only its word lifts the fence.
    fence_uncertain: bool,
    /// When we last learnt something of it from an answer of EC2: an older reading says nothing against that.
    changed_at: Time,
}

impl Live {
    fn new(now: Time) -> Self {
        Self {
            since: now,
            programmed: false,
            told: BTreeSet::new(),
            quarantined: BTreeSet::new(),
            doubted: BTreeSet::new(),
            lacking: BTreeSet::new(),
            gained: BTreeMap::new(),
            fenced_at: None,
            read_due: false,
            fence_uncertain: false,
            changed_at: now,
        }
    }
}

#[derive(Debug, Clone)]
struct Waiter {
    request: RequestId,
    sandbox: SandboxId,
    pod: PodName,
    since: Time,
    deadline: Time,
}

/// Where the kernel stands beside the plan.
#[derive(Debug, Clone, Default)]
struct KernelState {
    /// Grows with every change of the plan.
    revision: u64,
    plan: Option<Arc<NodePlan>>,
    /// The version of the ledger that the plan was made from.
    planned_from: Option<u64>,
    applied: Option<u64>,
    in_flight: bool,
    /// When to compare again although nothing changed.
    recheck_at: Option<Time>,
    /// When the last look began.
    looked_at: Option<Time>,
    /// Who changes what again and again.
    contests: Contests,
    /// What the last application reported.
    report: KernelReport,
    /// Name and MAC of each sandbox's host link.
    links: BTreeMap<SandboxId, (String, MacAddress)>,
    /// When the reading behind `pods` was asked for.
    read_at: Option<Time>,
    /// When the last look was asked for that forgot the connections of addresses left before.
    forgot_at: Option<Time>,
    /// The pods when the kernel was last read: an address with a route is in use, whatever the ledger says.
    pods: PodsSeen,
}

/// The state machine. See the module's head.
pub struct Pool {
    /// As they are in force: sized by the node's own settings where it has some.
    settings: Settings,
    /// The sizes the daemon was started with.
    started_with: Sizing,
    ledger: LedgerState,
    /// Grows with every change of what counts and the data path follow from.
    version: u64,
    /// What was counted at which version, and until when that holds.
    counted: Cell<Option<(u64, Time, Counts)>>,
    limits: Option<InstanceLimits>,
    live: BTreeMap<EniId, Live>,
    /// ENIs as IMDS showed them last: the source of subnet CIDRs.
    imds: BTreeMap<EniId, EniView>,
    /// Device numbers taken by ENIs that are not ours to use, with the ENI where it is known.
    foreign: BTreeMap<DeviceIndex, Option<EniId>>,
    /// The ENI limit EC2 taught us, when our table was wrong.
    learned_max_enis: Option<u32>,
    /// Slots an ENI holds beside its own address, when EC2 said it is full before our table did, and until when we believe it.
    learned_slots: Option<(u32, Time)>,
    /// ENIs of the ledger whose owner has taken them out of our hands.
    unmanaged: BTreeSet<EniId>,
    subnets: subnets::Subnets,
    buckets: BTreeMap<&'static str, Bucket>,
    leaks: leaks::Leaks,
    /// When to look again for something to give back.
    release_at: Option<Time>,
    /// Sandboxes the kernel did not show when it was last read, since when.
    unwired: BTreeMap<SandboxId, Time>,
    ops: BTreeMap<OpId, (Op, Time)>,
    next_op: u64,
    waiting: VecDeque<Waiter>,
    setbacks: BTreeMap<setback::Subject, Setback>,
    kernel: KernelState,
    unsaved: Vec<Record>,
    metadata_read: bool,
    /// When to read the metadata again.
    metadata_at: Option<Time>,
    /// EC2 has announced the end of this instance.
    terminating: bool,
    /// Why the pool could not grow when it last should have.
    cannot_grow: Option<Reason>,
    /// EC2 must still confirm what the ledger and IMDS say.
    verify_due: bool,
    /// When to ask EC2 again because something differed.
    verify_at: Option<Time>,
    /// An ENI is there whose subnet is not known, so it is not used.
    unadopted: bool,
    /// When the next freed address will have cooled down.
    cooled_at: Option<Time>,
    node_state: NodeState,
    /// Pods of another IPAM's state file, until the ENIs are known.
    imported: Vec<ImportedPod>,
    /// What EC2 showed of our ENIs when it was last read, and when it was asked.
    cloud_seen: Option<(Time, Vec<EniView>)>,
    /// Who waits for an audit, since when.
    audits: Vec<(RequestId, Time)>,
    history: VecDeque<(Time, Note)>,
    /// When an action that may not be called now may be.
    paced_until: Option<Time>,
    rng: u64,
    tokens: u64,
}

/// What a step collects.
#[derive(Default)]
struct Out {
    records: Vec<Record>,
    commands: Vec<Command>,
}

impl Out {
    fn note(&mut self, note: Note) {
        self.commands.push(Command::Note(note));
    }

    fn reply(&mut self, request: RequestId, answer: Answer) {
        self.commands.push(Command::Reply { request, answer });
    }
}

impl Pool {
    /// A pool over what the ledger said at start; an empty ledger is a first boot. `seed` feeds jitter and client tokens
    /// and nothing that could be seen in a decision.
    pub fn new(settings: Settings, ledger: LedgerState, seed: u64, now: Time) -> Self {
        let live = ledger.enis.keys().map(|eni| (eni.clone(), Live::new(now))).collect();
        let verify_due = ledger.node.is_some();
        let limits =
            ledger.node.as_ref().and_then(|node| crate::limits::lookup(&node.instance_type)).map(|t| t.limits());
        Self {
            started_with: settings.sizing(),
            settings,
            ledger,
            version: 0,
            counted: Cell::new(None),
            limits,
            live,
            imds: BTreeMap::new(),
            foreign: BTreeMap::new(),
            learned_max_enis: None,
            learned_slots: None,
            unmanaged: BTreeSet::new(),
            subnets: subnets::Subnets::default(),
            buckets: [grow::CREATE, grow::ATTACH].map(|action| (action, Bucket::new(action, now))).into(),
            leaks: leaks::Leaks::default(),
            release_at: None,
            unwired: BTreeMap::new(),
            ops: BTreeMap::new(),
            next_op: 1,
            waiting: VecDeque::new(),
            setbacks: BTreeMap::new(),
            kernel: KernelState::default(),
            unsaved: Vec::new(),
            metadata_read: false,
            metadata_at: None,
            terminating: false,
            cannot_grow: None,
            verify_due,
            verify_at: None,
            unadopted: false,
            cooled_at: None,
            node_state: NodeState::default(),
            imported: Vec::new(),
            cloud_seen: None,
            audits: Vec::new(),
            history: VecDeque::new(),
            paced_until: None,
            rng: seed,
            tokens: 0,
        }
    }

    /// Takes one fact, returns the wishes that follow, in the order they are to be carried out.
    pub fn step(&mut self, event: Event, now: Time) -> Vec<Command> {
        let mut out = Out::default();
        match event {
            Event::Add { request, sandbox, pod, patience_ms } => {
                self.add(request, sandbox, pod, patience_ms, now, &mut out);
            }
            Event::Abandoned { request } => self.waiting.retain(|waiter| waiter.request != request),
            Event::Del { request, sandbox } => self.del(request, &sandbox, now, &mut out),
            Event::Gc { request, network, valid } => self.gc(request, &network, &valid, &mut out),
            Event::Cloud { op, result } => self.cloud_answered(op, result, now, &mut out),
            Event::Kernel { op, result } => self.kernel_answered(op, result, now, &mut out),
            Event::KernelChanged => self.look_soon(now),
            Event::NodeState(state) => self.node_state_said(state, &mut out),
            Event::Import(pods) => self.imported = pods,
            Event::Audit { request } => self.audit_asked(request, now, &mut out),
            Event::Tick => {}
            Event::Stop => {
                self.stop(&mut out);
                let unsaved = std::mem::take(&mut self.unsaved);
                let write = (!unsaved.is_empty()).then_some(Command::Persist(unsaved));
                return write.into_iter().chain(out.commands).collect();
            }
        }
        self.settle(now, &mut out);
        let mut commands = Vec::with_capacity(out.commands.len() + 1);
        // What an earlier failure left unwritten goes before anything that may hang on it.
        let acts = out.commands.iter().any(|command| !matches!(command, Command::Note(_)));
        if !out.records.is_empty() || (acts && !self.unsaved.is_empty()) {
            let mut records = std::mem::take(&mut self.unsaved);
            records.extend(out.records);
            commands.push(Command::Persist(records));
        }
        for command in &out.commands {
            if let Command::Note(note) = command {
                self.history.push_back((now, note.clone()));
            }
        }
        let too_many = self.history.len().saturating_sub(MAX_HISTORY);
        self.history.drain(..too_many);
        commands.extend(out.commands);
        commands
    }

    /// When to call `step(Tick)` at the latest, and why.
    pub fn poll_deadline(&self) -> Option<(Time, &'static str)> {
        let waiter = self.waiting.iter().map(|w| (w.deadline, "a waiting ADD runs out of patience")).min();
        let retry =
            self.setbacks.values().filter(|s| !s.over).map(|s| (s.until, "a refused call is tried again")).min();
        let may_look = self.kernel.plan.is_some() && !self.kernel.in_flight && !self.rests(&setback::Subject::Kernel);
        let kernel = self.kernel.recheck_at.filter(|_| may_look);
        let kernel = kernel.map(|at| (at, "the kernel is compared with the plan"));
        let cooling = self.cooled_at.map(|at| (at, "an address has cooled down"));
        let verify = self.verify_at.map(|at| (at, "EC2 is asked again"));
        let metadata = self.metadata_at.filter(|_| !self.action_rests("ImdsRead"));
        let metadata = metadata.map(|at| (at, "the instance metadata is read again"));
        let release = self.release_at.map(|at| (at, "what is idle may be given back"));
        let collecting = self.under_way(|op| matches!(op, Op::Leaks | Op::Mark(_) | Op::Collect(_)));
        let leaks = self.leaks.next_at().filter(|_| !collecting);
        let leaks = leaks.map(|at| (at, "leaked ENIs are looked for"));
        let audit =
            self.audits.iter().map(|(_, at)| (at.plus_ms(AUDIT_PATIENCE_MS), "an audit has waited enough")).min();
        let pace = self.paced_until.map(|at| (at, "the next call is due"));
        [waiter, retry, kernel, cooling, verify, metadata, release, leaks, audit, pace].into_iter().flatten().min()
    }

    pub fn ledger(&self) -> &LedgerState {
        &self.ledger
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Looks at the state as it is and does what is due.
    fn settle(&mut self, now: Time, out: &mut Out) {
        for setback in self.setbacks.values_mut() {
            setback.over = setback.until <= now;
        }
        if self.verify_at.is_some_and(|at| at <= now) {
            self.verify_at = None;
            self.verify_due = true;
            // An ENI whose subnet was not known is adopted once IMDS shows it.
            if self.unadopted {
                self.metadata_at = Some(now);
            }
        }
        self.ledger.given_up.retain(|_, at| now.since_ms(*at) < READINGS_LAG_MS);
        self.ledger.forgotten.retain(|_, at| now.since_ms(*at) < READINGS_LAG_MS);
        self.learned_slots = self.learned_slots.filter(|(_, until)| *until > now);
        self.serve_waiting(now, out);
        self.learn_node(now, out);
        self.advance_enis(now, out);
        self.grow(now, out);
        self.give_ipv6_prefixes(now, out);
        // What could not be served by growing may be served by an early end of a cool-down.
        self.serve_waiting(now, out);
        self.give_back(now, out);
        self.collect_leaks(now, out);
        self.program_kernel(now, out);
        self.answer_audits(now, out);
        self.cooled_at = if self.waiting.is_empty() { None } else { self.next_cooled(now) };
        self.paced_until = self.buckets.values().map(|bucket| bucket.ready_at(now)).filter(|at| *at > now).min();
    }

    /// Applies a record to the state and has it written.
    fn record(&mut self, record: Record, out: &mut Out) {
        if let Record::Released { allocation, .. } = &record {
            // A DEL unwires before it releases; should the route still be there, the next look at the kernel says so.
            for address in allocation.addresses() {
                self.kernel.pods.routes.remove(&address);
            }
        }
        if let Record::GivenUp { eni, slots, .. } = &record
            && let Some(live) = self.live.get_mut(eni)
        {
            // Should one come back, the kernel has to be told again before it serves.
            live.told.retain(|slot| !slots.contains(slot));
        }
        self.ledger.apply(&record);
        self.version += 1;
        out.records.push(record);
    }

    /// These records could not be written: what they promised is taken back, last first. To be called before the next
    /// step, so that no event is judged by what never became true.
    pub fn persist_failed(&mut self, records: Vec<Record>) {
        for record in records.iter().rev() {
            self.ledger.revert(record);
        }
        self.version += 1;
        let promise = |record: &Record| matches!(record, Record::Allocated(_) | Record::Released { .. });
        self.unsaved.extend(records.into_iter().filter(|record| !promise(record)));
    }

    fn start(&mut self, op: Op, request: CloudRequest, now: Time, out: &mut Out) {
        self.bucket(request.action(), now).take(now);
        let id = self.new_op(op, now);
        out.commands.push(Command::Cloud { op: id, request });
    }

    fn bucket(&mut self, action: &'static str, now: Time) -> &mut Bucket {
        self.buckets.entry(action).or_insert_with(|| Bucket::new(action, now))
    }

    /// The action may be called now: EC2 has not refused it a moment ago, and it would not be too fast.
    fn may_call(&self, action: &'static str, now: Time) -> bool {
        !self.action_rests(action) && self.buckets.get(action).is_none_or(|bucket| bucket.ready_at(now) <= now)
    }

    /// EC2 may be asked at all.
    fn may_read(&self) -> bool {
        !self.settings.imds_only && self.node_state.level < Level::NoCloud
    }

    /// EC2 may be changed. Before IMDS has spoken the ledger may be another instance's.
    fn may_change(&self) -> bool {
        self.may_read() && self.settings.provisioning && self.metadata_read
    }

    /// The node is on its way out, or nobody is to come: pods that wait are served, and nothing else is begun.
    fn winding_down(&self) -> bool {
        self.terminating || (self.node_state.unschedulable && !self.settings.manage_unschedulable)
    }

    /// Something may be given back in EC2.
    fn may_give_back(&self) -> bool {
        self.may_change() && self.node_state.level == Level::Normal && !self.winding_down()
    }

    fn node_state_said(&mut self, state: NodeState, out: &mut Out) {
        if state.is_news_beside(&self.node_state) {
            out.note(Note::NodeStateChanged { text: state.to_string() });
            self.settings.resize(state.sizing.unwrap_or(self.started_with));
            self.version += 1;
        }
        self.node_state = state;
    }

    /// EC2 does not show the ENI on this instance.
    fn is_gone(&self, eni: &EniId) -> bool {
        self.ledger.enis_unseen.contains_key(eni)
    }

    fn new_op(&mut self, op: Op, now: Time) -> OpId {
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(id, (op, now));
        id
    }

    fn under_way(&self, wanted: impl Fn(&Op) -> bool) -> bool {
        self.ops.values().any(|(op, _)| wanted(op))
    }

    /// Splitmix64: jitter and tokens only.
    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
