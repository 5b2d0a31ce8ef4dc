//! One node: the policy in the daemon's place, and around it the journal, the kernel, the way to EC2 and the runtime.
//!
//! The loop here keeps the contract of the daemon's own: what a batch of events records is durable before anything else
//! of the batch is carried out, and what could not be written was never promised. Between any two effects the daemon may
//! die. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flatwire_core::ids::{EniId, SandboxId, Time};
use flatwire_core::ledger::Record;
use flatwire_core::netplan::NodePlan;
use flatwire_core::pool::{Answer, Command, Event, Failure, NodeState, Note, OpId, Reason, RequestId};
use flatwire_core::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest};
use flatwire_core::settings::Settings;
use ipnet::IpNet;
use lab_ec2::Ec2;

use crate::cloud::{self, Call, Cloud, Met, Reached};
use crate::dice::Dice;
use crate::invariants::{Rule, Watch};
use crate::journal::Journal;
use crate::kernel::Kernel;
use crate::policy::Policy;
use crate::queue::Queue;
use crate::runtime::{Habits, Runtime, Step};
use crate::story::Story;
use crate::tally::Tally;

/// The longest a call may take; the adapter answers `Timeout` then, whatever becomes of the call.
const CALL_DEADLINE_MS: u64 = 20_000;
/// Turns of the loop within one millisecond.
const TURNS_MOST: u32 = 500;
/// How often the queue of releases is looked at.
const RELEASES_EVERY_MS: u64 = 2_000;

/// What a node shares with others, and who listens.
pub struct Scene<'w> {
    pub ec2: &'w Ec2,
    pub story: &'w mut Story,
    pub tally: &'w mut Tally,
}

/// How long things take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// One way to EC2 or back, at most.
    pub cloud_ms: u64,
    /// One programming of the kernel, at most.
    pub kernel_ms: u64,
    /// Of a hundred calls so many take far longer, some past their deadline.
    pub slow_percent: u32,
}

/// Something that is due on this node.
#[derive(Debug)]
pub(crate) enum Happening {
    Starts,
    Reaches(Box<Call>),
    Answers { life: u32, op: OpId, result: Box<Result<CloudReply, CloudError>>, read_at: Option<Time> },
    Programs { life: u32, op: OpId, plan: Arc<NodePlan> },
    DrainsReleases { life: u32 },
    TellsState { life: u32 },
    Pod(u32, PodStep),
    Sandbox(u32, Step),
}

/// What becomes of a pod, as the kubelet sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PodStep {
    Starts,
    Ends,
}

/// Who waits for an answer of the daemon.
#[derive(Debug, Clone)]
pub(crate) enum Asker {
    Add(u32),
    Del(u32),
    Queue(SandboxId),
    Gc,
    Audit,
}

pub struct Node<P> {
    pub settings: Settings,
    pub cloud: Cloud,
    pub kernel: Kernel,
    pub journal: Journal,
    pub runtime: Runtime,
    pub watch: Watch,
    pub pace: Pace,
    pub dice: Dice,
    /// `None` while the daemon is down.
    pub(crate) daemon: Option<P>,
    /// Counts the daemon's lives: what one asked, the next does not hear.
    pub(crate) life: u32,
    pub(crate) inbox: Vec<Event>,
    pub(crate) queue: Queue<Happening>,
    pub(crate) asked: BTreeMap<RequestId, Asker>,
    next_request: u64,
    wake: Option<Time>,
    /// Turns of the loop at this moment.
    turns: (Time, u32),
    /// The daemon dies at the boundary after so many more effects, and stays away so long.
    crash: Option<(u32, u64)>,
    pub(crate) state: NodeState,
    /// What EC2 has taken back from this node since somebody looked.
    pub given_back: BTreeSet<IpNet>,
    /// The answer to the last audit.
    pub audit: Option<flatwire_core::audit::AuditReport>,
}

impl<P: Policy> Node<P> {
    pub fn new(settings: Settings, cloud: Cloud, habits: Habits, pace: Pace, mut dice: Dice, now: Time) -> Self {
        let mut queue = Queue::default();
        queue.push(now, Happening::Starts);
        let runtime = Runtime::new(habits, dice.split());
        Self {
            settings,
            cloud,
            kernel: Kernel::default(),
            journal: Journal::default(),
            runtime,
            watch: Watch::default(),
            pace,
            dice,
            daemon: None,
            life: 0,
            inbox: Vec::new(),
            queue,
            asked: BTreeMap::new(),
            next_request: 1,
            wake: None,
            turns: (now, 0),
            crash: None,
            state: NodeState::default(),
            given_back: BTreeSet::new(),
            audit: None,
        }
    }

    pub fn daemon(&self) -> Option<&P> {
        self.daemon.as_ref()
    }

    /// When something is due here; `None` if nothing ever will be.
    pub fn next(&self) -> Option<Time> {
        let wake = self.wake.filter(|_| self.daemon.is_some());
        [self.queue.next(), wake].into_iter().flatten().min()
    }

    /// Lets happen what is due by `now`, then lets the daemon see it as one batch.
    pub fn advance(&mut self, now: Time, scene: &mut Scene<'_>) {
        while let Some(happening) = self.queue.pop(now) {
            self.happens(happening, now, scene);
        }
        self.turns = if self.turns.0 == now { (now, self.turns.1 + 1) } else { (now, 0) };
        if self.turns.1 > TURNS_MOST {
            let text = format!("{TURNS_MOST} turns within a millisecond");
            self.watch.broken(Rule::Spins, text);
        }
        let due = self.wake.is_some_and(|at| at <= now);
        if self.daemon.is_some() && (due || !self.inbox.is_empty()) {
            let mut events = std::mem::take(&mut self.inbox);
            let idle = events.is_empty();
            if idle {
                events.push(Event::Tick);
            }
            self.handle(events, idle, now, scene);
        }
        self.inbox.retain(|_| self.daemon.is_some());
        self.check_patience(now);
    }

    fn happens(&mut self, happening: Happening, now: Time, scene: &mut Scene<'_>) {
        match happening {
            Happening::Starts => self.start(now, scene),
            Happening::Reaches(call) => self.reaches(*call, now, scene),
            Happening::Answers { life, op, result, read_at } => {
                if life == self.life && self.daemon.is_some() {
                    scene.story.tell(now, "ipamd", || format!("hears {}", cloud::outcome(&result)));
                    self.watch.answered(op, &result, read_at, now);
                    self.inbox.push(Event::Cloud { op, result: *result });
                }
            }
            Happening::Programs { life, op, plan } => {
                if life == self.life && self.daemon.is_some() {
                    self.programs(op, plan, now, scene);
                }
            }
            Happening::DrainsReleases { life } => {
                if life == self.life && self.daemon.is_some() {
                    self.drain_releases(now);
                }
            }
            Happening::TellsState { life } => {
                if life == self.life && self.daemon.is_some() {
                    self.inbox.push(Event::NodeState(self.state.clone()));
                }
            }
            Happening::Pod(pod, step) => self.pod_steps(pod, step, now, scene),
            Happening::Sandbox(sandbox, step) => self.sandbox_steps(sandbox, step, now, scene),
        }
    }

    // The daemon's life.

    fn start(&mut self, now: Time, scene: &mut Scene<'_>) {
        if self.daemon.is_some() {
            return;
        }
        let ledger = match self.journal.replay() {
            Ok(ledger) => ledger,
            Err(damage) => {
                let text = format!("line {}: {}", damage.line, damage.why);
                self.watch.broken(Rule::Replay, format!("the journal is refused after a crash: {text}"));
                return;
            }
        };
        scene.story.tell(now, "ipamd", || {
            let slots: usize = ledger.slots.values().map(std::collections::BTreeSet::len).sum();
            format!("starts: {} ENIs, {slots} slots, {} pods in its ledger", ledger.enis.len(), ledger.pods.len())
        });
        self.check_replayed(&ledger);
        self.life += 1;
        self.daemon = Some(P::start(&self.settings, ledger, self.dice.number(), now));
        self.watch.daemon_started(now);
        self.inbox = vec![Event::Tick];
        self.queue.push(now.plus_ms(self.dice.between(0, 300)), Happening::TellsState { life: self.life });
        self.queue.push(now, Happening::DrainsReleases { life: self.life });
    }

    /// The daemon dies now; what it had sent may still arrive.
    pub(crate) fn dies(&mut self, now: Time, down_ms: u64, scene: &mut Scene<'_>) {
        self.crash = None;
        if self.daemon.take().is_none() {
            return;
        }
        scene.tally.fault("daemon crash");
        scene.story.tell(now, "ipamd", || format!("DIES, is away for {down_ms} ms"));
        let (life, dice) = (self.life, &mut self.dice);
        self.queue.retain(|happening| match happening {
            Happening::Reaches(call) if call.life == life => dice.percent(50),
            Happening::Answers { .. } | Happening::Programs { .. } => false,
            _ => true,
        });
        self.wake = None;
        self.inbox.clear();
        self.watch.daemon_died(now);
        for (_, asker) in std::mem::take(&mut self.asked) {
            self.unanswered(asker, now);
        }
        self.queue.push(now.plus_ms(down_ms), Happening::Starts);
    }

    /// The daemon will die so many effects from now.
    pub fn crash_after(&mut self, effects: u32, down_ms: u64) {
        self.crash = Some((effects, down_ms));
    }

    /// The daemon will not die.
    pub fn spare(&mut self) {
        self.crash = None;
    }

    /// Between two effects. True if the daemon died here.
    fn boundary(&mut self, now: Time, scene: &mut Scene<'_>) -> bool {
        match &mut self.crash {
            None => false,
            Some((0, down_ms)) => {
                let down_ms = *down_ms;
                self.dies(now, down_ms, scene);
                true
            }
            Some((left, _)) => {
                *left -= 1;
                false
            }
        }
    }

    fn handle(&mut self, events: Vec<Event>, idle: bool, now: Time, scene: &mut Scene<'_>) {
        let mut records = Vec::new();
        let mut rest = Vec::new();
        for event in events {
            if let Event::Del { sandbox, .. } = &event {
                self.watch.told_del(sandbox, now);
            }
            let Some(daemon) = &mut self.daemon else { return };
            scene.tally.steps += 1;
            for command in daemon.step(event, now) {
                match command {
                    Command::Persist(more) => records.extend(more),
                    command => rest.push(command),
                }
            }
        }
        self.wake = self.daemon.as_ref().and_then(Policy::deadline);
        if idle && records.is_empty() && rest.is_empty() && self.wake.is_some_and(|at| at <= now) {
            self.watch.broken(Rule::Spins, "a tick did nothing and the deadline stays in the past".to_owned());
            return;
        }
        if records.is_empty() && rest.is_empty() {
            return;
        }
        if self.boundary(now, scene) {
            return;
        }
        if !records.is_empty() {
            if let Some((0, down_ms)) = self.crash {
                self.journal.tear(&records, &mut self.dice);
                scene.story.tell(now, "journal", || format!("torn while {} records were written", records.len()));
                scene.tally.fault("torn append");
                self.dies(now, down_ms, scene);
                return;
            }
            if let Err(why) = self.journal.append(&records) {
                scene.story.tell(now, "journal", || format!("refuses {} records: {why}", records.len()));
                scene.tally.fault("journal write failed");
                self.take_back(records, rest, &why, now, scene);
                return;
            }
            for record in &records {
                self.written(record, now, scene);
            }
        }
        for command in rest {
            if self.boundary(now, scene) {
                return;
            }
            self.carry_out(command, now, scene);
        }
        self.check_batch(now, scene);
        if let Some(daemon) = &self.daemon
            && self.journal.compact_if_long(daemon.ledger())
        {
            scene.tally.saw("journal compactions");
            self.check_compacted();
        }
    }

    /// Nothing of the batch was promised: callers are told, and calls that hang on it are not made.
    fn take_back(&mut self, records: Vec<Record>, rest: Vec<Command>, why: &str, now: Time, scene: &mut Scene<'_>) {
        records.iter().for_each(|record| self.watch.not_written(record));
        if let Some(daemon) = &mut self.daemon {
            daemon.persist_failed(records);
        }
        for command in rest {
            match command {
                Command::Persist(_) => {}
                Command::Note(note) => self.noted(&note, now, scene),
                Command::Reply { request, .. } => {
                    let message = format!("the ledger could not be written: {why}");
                    let failure = Failure { reason: Reason::Ledger, message, retryable: true };
                    self.reply(request, Answer::Failed(failure), now, scene);
                }
                Command::Cloud { op, request } => {
                    let error = CloudError {
                        kind: CloudErrorKind::Transient,
                        action: request.action().to_owned(),
                        code: "Ledger".to_owned(),
                        message: why.to_owned(),
                        request_id: None,
                    };
                    self.inbox.push(Event::Cloud { op, result: Err(error) });
                }
                Command::Kernel { op, .. } => self.inbox.push(Event::Kernel { op, result: Err(why.to_owned()) }),
            }
        }
        // The next turn of the loop, at once.
        self.wake = Some(now.plus_ms(1));
    }

    fn carry_out(&mut self, command: Command, now: Time, scene: &mut Scene<'_>) {
        match command {
            Command::Persist(_) => {}
            Command::Note(note) => self.noted(&note, now, scene),
            Command::Reply { request, answer } => self.reply(request, answer, now, scene),
            Command::Cloud { op, request } => self.send(op, request, now, scene),
            Command::Kernel { op, plan, .. } => {
                let at = now.plus_ms(self.dice.between(1, self.pace.kernel_ms.max(1)));
                self.queue.push(at, Happening::Programs { life: self.life, op, plan });
            }
        }
    }

    fn noted(&mut self, note: &Note, now: Time, scene: &mut Scene<'_>) {
        self.watch.noted(note);
        match note {
            Note::CooldownYielded { .. } => scene.tally.saw("cool-downs cut short"),
            Note::Repaired { .. } => scene.tally.saw("repairs noted"),
            Note::Differs { .. } => scene.tally.saw("differences noted"),
            Note::CannotGrow { .. } => scene.tally.saw("could not grow"),
            _ => {}
        }
        scene.story.tell(now, "note", || format!("{note:?}"));
    }

    // EC2.

    fn send(&mut self, op: OpId, request: CloudRequest, now: Time, scene: &mut Scene<'_>) {
        scene.story.tell(now, "ipamd", || format!("asks {}", cloud::words(&request)));
        self.watch.sent(op, &request, now);
        let call = Call::new(op, self.life, request, now);
        let at = now.plus_ms(self.one_way());
        self.queue.push(at, Happening::Reaches(Box::new(call)));
    }

    fn one_way(&mut self) -> u64 {
        let slow = self.dice.percent(self.pace.slow_percent);
        let most = if slow { CALL_DEADLINE_MS * 3 / 2 } else { self.pace.cloud_ms };
        self.dice.between(1, most.max(1))
    }

    fn reaches(&mut self, call: Call, now: Time, scene: &mut Scene<'_>) {
        let (life, op, started) = (call.life, call.op, call.started);
        let request = call.request().clone();
        self.check_before(&request, now, scene);
        let (reached, met) = self.cloud.reach(now, scene.ec2, call, &mut self.dice);
        let action = request.action();
        let calls = scene.tally.cloud.entry(action).or_default();
        let (result, read_at) = match reached {
            Reached::Goes(call) => {
                calls.ok += 1;
                scene.story.tell(now, "ec2", || format!("{} → a page, and there is more", cloud::words(&request)));
                let at = now.plus_ms(self.one_way() + self.one_way());
                self.queue.push(at, Happening::Reaches(Box::new(call)));
                return;
            }
            Reached::Ends(result, read_at) => (result, read_at),
        };
        let Met { lost, broken, delay_ms } = met;
        match &result {
            Ok(_) => calls.ok += 1,
            Err(_) => calls.failed += 1,
        }
        match (&result, lost, broken) {
            (_, true, _) => scene.tally.fault("lost reply"),
            (_, _, true) => scene.tally.fault("broken connection"),
            (Err(error), ..) => scene.tally.fault(&error.code),
            (Ok(_), ..) => {}
        }
        scene.story.tell(now, "ec2", || {
            let lost = if lost { " (done, and the reply is lost)" } else { "" };
            format!("{} → {}{lost}", cloud::words(&request), cloud::outcome(&result))
        });
        self.check_after(&request, &result, now, scene);
        let at = now.plus_ms(self.one_way() + delay_ms);
        let (at, result) = match at.since_ms(started) > CALL_DEADLINE_MS {
            true => {
                scene.tally.fault("call past its deadline");
                let late = CloudError { code: "Timeout".to_owned(), ..cloud::connection(action, "no answer in time") };
                (started.plus_ms(CALL_DEADLINE_MS).max(now), Err(late))
            }
            false => (at, result),
        };
        let answer = Happening::Answers { life, op, result: Box::new(result), read_at };
        self.queue.push(at, answer);
    }

    // The kernel.

    fn programs(&mut self, op: OpId, plan: Arc<NodePlan>, now: Time, scene: &mut Scene<'_>) {
        let instance = self.cloud.instance.clone();
        let result = scene.ec2.with_enis(now, |enis| {
            let up = |id: &EniId| enis.get(id).is_some_and(|eni| eni.is_on(&instance) && eni.link_is_up(now));
            self.kernel.apply(&plan, up)
        });
        match &result {
            Ok(report) if !report.repaired.is_empty() => {
                let texts = || report.repaired.iter().map(|repair| repair.text.as_str()).collect::<Vec<_>>().join("; ");
                scene.story.tell(now, "kernel", || format!("programs: {}", texts()));
            }
            Ok(_) => {}
            Err(error) => {
                scene.tally.fault("kernel refused");
                scene.story.tell(now, "kernel", || format!("refuses: {error}"));
            }
        }
        self.watch.kernel_read(&result, plan, now);
        let result = result.map(|report| (report, self.kernel.pods()));
        self.inbox.push(Event::Kernel { op, result });
    }

    // What others ask the daemon.

    /// Asks the daemon; `None` if it is away.
    pub(crate) fn ask(&mut self, asker: Asker, event: impl FnOnce(RequestId) -> Event) -> Option<RequestId> {
        self.daemon.as_ref()?;
        let request = RequestId(self.next_request);
        self.next_request += 1;
        self.asked.insert(request, asker);
        self.inbox.push(event(request));
        Some(request)
    }

    fn reply(&mut self, request: RequestId, answer: Answer, now: Time, scene: &mut Scene<'_>) {
        self.watch.replied(request);
        let Some(asker) = self.asked.remove(&request) else { return };
        match (asker, answer) {
            (Asker::Add(sandbox), Answer::Added(allocation)) => self.added(sandbox, &allocation, now, scene),
            (Asker::Add(sandbox), Answer::Failed(failure)) => {
                scene.story.tell(now, "ipamd", || format!("c{sandbox} gets no address: {}", failure.message));
                scene.tally.saw("ADDs refused");
                self.add_failed(sandbox, now, scene);
            }
            (Asker::Del(sandbox), Answer::Failed(_)) => self.queue_release(sandbox, now),
            (Asker::Del(sandbox), _) => self.deleted(sandbox, now),
            (Asker::Queue(_), Answer::Failed(_)) => {}
            (Asker::Queue(sandbox), _) => {
                self.runtime.releases.remove(&sandbox);
            }
            (Asker::Gc, Answer::Stale(stale)) => self.collect(&stale, now, scene),
            (Asker::Audit, Answer::Audited(report)) => self.audit = Some(report),
            (Asker::Add(_) | Asker::Gc | Asker::Audit, _) => {}
        }
    }

    /// The daemon died before it answered.
    fn unanswered(&mut self, asker: Asker, now: Time) {
        match asker {
            Asker::Add(sandbox) => self.queue.push(now.plus_ms(1), Happening::Sandbox(sandbox, Step::AddFails)),
            Asker::Del(sandbox) => self.queue_release(sandbox, now),
            Asker::Queue(_) | Asker::Gc | Asker::Audit => {}
        }
    }

    /// Releases that the plugin left on disk, as the daemon's own loop takes them.
    fn drain_releases(&mut self, now: Time) {
        let queued: Vec<(SandboxId, Time)> = self.runtime.releases.iter().map(|(s, at)| (s.clone(), *at)).collect();
        for (sandbox, queued_at) in queued {
            let held = self.daemon.as_ref().and_then(|daemon| daemon.ledger().pods.get(&sandbox));
            if held.is_some_and(|allocation| allocation.at > queued_at) {
                // Of an earlier life of this sandbox.
                self.runtime.releases.remove(&sandbox);
                continue;
            }
            self.ask(Asker::Queue(sandbox.clone()), |request| Event::Del { request, sandbox });
        }
        if !self.runtime.releases.is_empty() {
            let at = now.plus_ms(RELEASES_EVERY_MS);
            self.queue.push(at, Happening::DrainsReleases { life: self.life });
        }
    }

    /// The daemon hears this of its node before anything else.
    pub fn hear_state(&mut self, state: NodeState) {
        self.state = state.clone();
        self.inbox.insert(0, Event::NodeState(state));
    }

    /// Something is said of this node from outside.
    pub fn tell_state(&mut self, now: Time, change: impl FnOnce(&mut NodeState)) {
        let before = self.state.clone();
        change(&mut self.state);
        if self.state != before {
            self.watch.said_at = now;
            let at = now.plus_ms(self.dice.between(20, 400));
            self.queue.push(at, Happening::TellsState { life: self.life });
        }
    }
}
