//! The loop that owns the pool: events in, wishes carried out.
//!
//! One thread, no lock. It takes what has arrived, lets the pool step through it, makes the records of the whole batch
//! durable in one flush, and only then replies and starts calls. Calls to EC2 and the kernel run on the daemon's async runtime
//! and come back as events; nothing they do can hold up an ADD that the pool can answer.
//!
//! The plugins' socket is served on the same thread (`Handle::serving`): an ADD waits for the pool anyway, and handing it to
//! another thread and back costs more than all else ipamd does for it, the more where the plugin fills one of two processors.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use flatwire_core::error::chain;
use flatwire_core::ids::{SandboxId, Time};
use flatwire_core::ledger::{LedgerState, Record};
use flatwire_core::pool::{
    Answer, Command, Event, Failure, ImportedPod, NodeState, OpId, Pool, PoolStatus, Reason, RequestId, Said,
};
use flatwire_core::ports::{Cloud, CloudError, CloudErrorKind, CloudRequest, Kernel};
use flatwire_store::journal::Journal;
use flatwire_store::{checkpoint, releases};
use tokio::sync::mpsc::{UnboundedReceiver as Receiver, UnboundedSender as Sender, unbounded_channel};
use tokio::sync::oneshot;

use crate::metrics::Metrics;
use crate::node_state::{self, NodeStateFile};
use crate::notes;
use crate::probe::{Effect, Point, Probe};

/// Requests that may be under way at once; one more is refused.
pub const MAX_REQUESTS: usize = 2_048;
/// Events taken together; their records share one flush.
const MAX_BATCH: usize = 256;
/// The add-on's checkpoint follows the ledger by at most this.
const CHECKPOINT_DELAY: Duration = Duration::from_millis(200);
/// The longest a programming of the node may take.
const KERNEL_DEADLINE: Duration = Duration::from_secs(30);
/// How often the folder of queued releases and the state of the node are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// When hearing from the kernel failed.
const WATCH_AGAIN: Duration = Duration::from_secs(10);

type Look = Box<dyn FnOnce(&Pool, Time) + Send>;
/// Takes the answer to who asked. It may be gone.
type Reply = Box<dyn FnOnce(Answer, &Pool) + Send>;

enum Input {
    Event(Event),
    Request {
        event: Box<dyn FnOnce(RequestId) -> Event + Send>,
        id: RequestId,
        reply: Reply,
    },
    Look(Look),
    /// What the API server says of this node now.
    Said(Box<Said>),
    Stop(oneshot::Sender<()>),
}

/// What the rest of the daemon holds of the loop.
#[derive(Clone)]
pub struct Handle {
    inputs: Sender<Input>,
    next_request: Arc<AtomicU64>,
    under_way: Arc<AtomicUsize>,
    serving: tokio::runtime::Handle,
    _holds: Sender<Infallible>,
}

/// The loop is gone, or has too much to do.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    #[error("{MAX_REQUESTS} requests are under way already; try again")]
    Busy,
    #[error("ipamd is stopping")]
    Stopping,
}

impl Handle {
    /// The runtime of the loop's own thread, for who asks the pool on behalf of a plugin.
    pub fn serving(&self) -> &tokio::runtime::Handle {
        &self.serving
    }

    /// Asks the pool; when the caller gives up, so does the pool.
    pub async fn ask(&self, event: impl FnOnce(RequestId) -> Event + Send + 'static) -> Result<Answer, Unavailable> {
        self.ask_and(event, |answer, _| answer).await
    }

    /// As `ask`, with a look at the pool as it is when it answers.
    pub async fn ask_and<T: Send + 'static>(
        &self,
        event: impl FnOnce(RequestId) -> Event + Send + 'static,
        look: impl FnOnce(Answer, &Pool) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        if self.under_way.fetch_add(1, Ordering::Relaxed) >= MAX_REQUESTS {
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            return Err(Unavailable::Busy);
        }
        let id = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = oneshot::channel();
        let mut guard = Abandon { handle: self, id, answered: false };
        let reply: Reply = Box::new(|answer, pool| drop(reply.send(look(answer, pool))));
        let request = Input::Request { event: Box::new(event), id, reply };
        self.inputs.send(request).map_err(|_| Unavailable::Stopping)?;
        let answer = answer.await.map_err(|_| Unavailable::Stopping);
        guard.answered = true;
        answer
    }

    /// Looks at the pool between two steps.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Pool, Time) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let (reply, answer) = oneshot::channel();
        let look = Box::new(|pool: &Pool, now| {
            // Whoever asked may be gone.
            let _ = reply.send(look(pool, now));
        });
        self.inputs.send(Input::Look(look)).map_err(|_| Unavailable::Stopping)?;
        answer.await.map_err(|_| Unavailable::Stopping)
    }

    /// What the API server says of this node; holds until it says something else. A loop that is gone does not care.
    pub fn said(&self, said: Said) {
        let _ = self.inputs.send(Input::Said(Box::new(said)));
    }

    pub async fn status(&self) -> Result<PoolStatus, Unavailable> {
        self.look(Pool::status).await
    }

    /// Sends waiting pods away, writes what is unwritten, and ends the loop.
    pub async fn stop(&self) {
        let (done, stopped) = oneshot::channel();
        if self.inputs.send(Input::Stop(done)).is_ok() {
            let _ = stopped.await;
        }
    }
}

/// Tells the pool when a caller has gone away before its answer came.
struct Abandon<'h> {
    handle: &'h Handle,
    id: RequestId,
    answered: bool,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.handle.under_way.fetch_sub(1, Ordering::Relaxed);
        if !self.answered {
            let _ = self.handle.inputs.send(Input::Event(Event::Abandoned { request: self.id }));
        }
    }
}

pub struct Driver<C, K, P> {
    pub pool: Pool,
    pub journal: Journal,
    pub cloud: Arc<C>,
    pub kernel: Arc<K>,
    pub runtime: tokio::runtime::Handle,
    pub metrics: Arc<Metrics>,
    pub checkpoint: PathBuf,
    pub release_queue: PathBuf,
    /// Pods of another IPAM, for the pool to take over first of all.
    pub imported: Vec<ImportedPod>,
    pub node_state: NodeStateFile,
    pub probe: P,
}

/// Who waits for an answer.
enum ReplyTo {
    Caller(Reply),
    /// A release from the queue on disk, done when answered.
    Queue(PathBuf),
}

struct Loop<C, K, P> {
    driver: Driver<C, K, P>,
    inputs: Receiver<Input>,
    sender: Sender<Input>,
    replies: BTreeMap<RequestId, ReplyTo>,
    next_request: Arc<AtomicU64>,
    /// Wall time and running time at the start: time goes on evenly from there, whatever is done to the clock.
    started: (Time, Instant),
    last: Time,
    checkpoint_due: Option<Time>,
    /// The checkpoint on disk names pods that are not in the ledger yet, and stays until they are.
    checkpoint_ahead: bool,
    look_due: Time,
    complained: std::collections::BTreeSet<PathBuf>,
    by_operator: Said,
    by_api_server: Said,
    /// What holds of the two.
    node_state: NodeState,
    stopping: Option<oneshot::Sender<()>>,
    /// Answers of this round.
    answered: usize,
    /// Ends when nobody holds a handle any more.
    holders: Receiver<Infallible>,
}

impl<C: Cloud, K: Kernel, P: Probe> Driver<C, K, P> {
    /// Starts the loop on a thread of its own, which ends when it was stopped and nobody holds its handle any more.
    pub fn start(self) -> std::io::Result<Handle> {
        let serving = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (sender, inputs) = unbounded_channel();
        let (holds, holders) = unbounded_channel();
        let next_request = Arc::new(AtomicU64::new(1));
        let handle = Handle {
            inputs: sender.clone(),
            next_request: next_request.clone(),
            under_way: Arc::new(AtomicUsize::new(0)),
            serving: serving.handle().clone(),
            _holds: holds,
        };
        // A clock set back between two lives must not make the past lie ahead.
        let newest = newest_stamp(self.pool.ledger());
        let the_loop = Loop {
            driver: self,
            inputs,
            sender,
            replies: BTreeMap::new(),
            next_request,
            started: (newest.max(wall_clock()), Instant::now()),
            last: Time::default(),
            checkpoint_due: None,
            checkpoint_ahead: false,
            look_due: Time::default(),
            complained: std::collections::BTreeSet::new(),
            by_operator: Said::default(),
            by_api_server: Said::default(),
            node_state: NodeState::default(),
            stopping: None,
            answered: 0,
            holders,
        };
        the_loop.driver.runtime.spawn(watch_kernel(the_loop.driver.kernel.clone(), the_loop.sender.clone()));
        std::thread::Builder::new().name("pool".to_owned()).spawn(move || serving.block_on(the_loop.run()))?;
        Ok(handle)
    }
}

/// Tells the pool of every change in the kernel, until there is no pool any more.
async fn watch_kernel<K: Kernel>(kernel: Arc<K>, sender: Sender<Input>) {
    loop {
        if let Err(error) = kernel.changed().await {
            tracing::warn!(
                error = %chain(&error),
                seconds = WATCH_AGAIN.as_secs(),
                "changes in the kernel are not heard of for now; it is still compared with the plan every few seconds"
            );
            tokio::time::sleep(WATCH_AGAIN).await;
        }
        if sender.send(Input::Event(Event::KernelChanged)).is_err() {
            return;
        }
    }
}

impl<C: Cloud, K: Kernel, P: Probe> Loop<C, K, P> {
    async fn run(mut self) {
        // Before the first step: an operator's brake holds from the start, and pods that are here are known.
        let mut events = self.look_at_node_state(node_state::cautious());
        let imported = std::mem::take(&mut self.driver.imported);
        self.checkpoint_ahead = !imported.is_empty();
        if self.checkpoint_ahead {
            events.push(Event::Import(imported));
        }
        events.push(Event::Tick);
        // What the ledger says now is what a rollback should find, whether or not anything changes.
        self.checkpoint_due = Some(self.now());
        loop {
            self.handle(events);
            // What was answered goes out, before anything else is written.
            tokio::task::yield_now().await;
            for _ in 0..std::mem::take(&mut self.answered) {
                self.driver.probe.reached(Point::after(Effect::Reply));
            }
            self.housekeeping();
            if let Some(done) = self.stopping.take() {
                let _ = done.send(());
                break;
            }
            events = self.next_events().await;
        }
        // Who asks from now on hears that it is too late. The last answers are still on their way, from this thread.
        let mut holders = self.holders;
        drop((self.inputs, self.replies, self.sender, self.driver));
        // Nothing is ever sent: this waits for the end.
        holders.recv().await;
    }

    /// Waits for the next inputs, or for the next deadline.
    async fn next_events(&mut self) -> Vec<Event> {
        let now = self.now();
        let pool = self.driver.pool.poll_deadline().map(|(at, _)| at);
        let due = [pool, self.checkpoint_due, Some(self.look_due)].into_iter().flatten().min().unwrap_or(now);
        let wait = Duration::from_millis(due.since_ms(now)).min(LOOK_EVERY) / self.driver.probe.hurry();
        let mut events = Vec::new();
        match tokio::time::timeout(wait, self.inputs.recv()).await {
            Ok(Some(input)) => self.take(input, &mut events),
            Ok(None) => unreachable!("invariant: the loop holds a sender itself"),
            Err(_) => events.push(Event::Tick),
        }
        for _ in 0..MAX_BATCH {
            match self.inputs.try_recv() {
                Ok(input) if self.stopping.is_none() => self.take(input, &mut events),
                _ => break,
            }
        }
        events
    }

    fn take(&mut self, input: Input, events: &mut Vec<Event>) {
        match input {
            Input::Event(event) => events.push(event),
            Input::Request { event, id, reply } => {
                self.replies.insert(id, ReplyTo::Caller(reply));
                events.push(event(id));
            }
            Input::Look(look) => {
                let now = self.now();
                look(&self.driver.pool, now);
            }
            Input::Said(said) => {
                self.by_api_server = *said;
                events.extend(self.settle_node_state());
            }
            Input::Stop(done) => {
                self.stopping = Some(done);
                self.checkpoint_due = Some(self.last);
                events.push(Event::Stop);
            }
        }
    }

    /// Steps through a batch; what it records is flushed once, before anything else is done.
    fn handle(&mut self, events: Vec<Event>) {
        let mut records = Vec::new();
        let mut rest = Vec::new();
        for event in events {
            if let Event::Abandoned { request } = &event {
                self.replies.remove(request);
            }
            let now = self.now();
            for command in self.driver.pool.step(event, now) {
                match command {
                    Command::Persist(more) => records.extend(more),
                    command => rest.push(command),
                }
            }
        }
        if !records.is_empty() {
            if let Err(error) = self.effect(Effect::Persist, |driver| driver.journal.append(&records)) {
                let text = chain(&error);
                tracing::error!(error = %text, "the ledger could not be written; nothing of this batch was promised");
                self.take_back(records, rest, &text);
                return;
            }
            let touches_pods = |r: &Record| matches!(r, Record::Allocated(_) | Record::Released { .. });
            if records.iter().any(touches_pods) {
                self.checkpoint_ahead = false;
                let delay = u64::try_from(CHECKPOINT_DELAY.as_millis()).unwrap_or(0);
                self.checkpoint_due.get_or_insert(self.last.plus_ms(delay));
            }
        }
        for command in rest {
            self.carry_out(command);
        }
    }

    /// The records of a batch could not be written: callers are told, and calls that hang on them are not made.
    fn take_back(&mut self, records: Vec<Record>, commands: Vec<Command>, why: &str) {
        // Now and not as an event: inputs that wait already must not be judged by what never became true.
        self.driver.pool.persist_failed(records);
        let mut events = Vec::new();
        for command in commands {
            match command {
                Command::Persist(_) => {}
                Command::Note(note) => notes::note(&note, &self.driver.metrics),
                Command::Reply { request, .. } => {
                    let failure = Failure {
                        reason: Reason::Ledger,
                        message: format!("the ledger could not be written: {why}"),
                        retryable: true,
                    };
                    self.reply(request, Answer::Failed(failure));
                }
                Command::Cloud { op, request } => {
                    let error = CloudError {
                        kind: CloudErrorKind::Transient,
                        action: request.action().to_owned(),
                        code: "Ledger".to_owned(),
                        message: why.to_owned(),
                        request_id: None,
                    };
                    events.push(Event::Cloud { op, result: Err(error) });
                }
                Command::Kernel { op, .. } => events.push(Event::Kernel { op, result: Err(why.to_owned()) }),
            }
        }
        for event in events {
            let _ = self.sender.send(Input::Event(event));
        }
    }

    /// Something the daemon changes outside its own memory, with its points.
    fn effect<T>(&mut self, effect: Effect, act: impl FnOnce(&mut Driver<C, K, P>) -> T) -> T {
        self.driver.probe.reached(Point::before(effect));
        let done = act(&mut self.driver);
        self.driver.probe.reached(Point::after(effect));
        done
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Persist(_) => {}
            Command::Reply { request, answer } => self.reply(request, answer),
            Command::Cloud { op, request } => self.call_cloud(op, request),
            Command::Kernel { op, plan, look } => {
                let (kernel, sender, probe) =
                    (self.driver.kernel.clone(), self.sender.clone(), self.driver.probe.clone());
                self.driver.runtime.spawn(async move {
                    let work = async {
                        probe.reached(Point::before(Effect::Program));
                        let report = kernel.apply(&plan, &look).await?;
                        probe.reached(Point::after(Effect::Program));
                        Ok((report, kernel.pods().await?))
                    };
                    let result = match tokio::time::timeout(KERNEL_DEADLINE, work).await {
                        Ok(result) => result.map_err(|error: K::Error| chain(&error)),
                        Err(_) => Err(format!("the kernel has not answered within {} s", KERNEL_DEADLINE.as_secs())),
                    };
                    let _ = sender.send(Input::Event(Event::Kernel { op, result }));
                });
            }
            Command::Note(note) => notes::note(&note, &self.driver.metrics),
        }
    }

    fn call_cloud(&self, op: OpId, request: CloudRequest) {
        let (cloud, sender, probe) = (self.driver.cloud.clone(), self.sender.clone(), self.driver.probe.clone());
        tracing::debug!(?op, ?request, "cloud call");
        let effect = Effect::of(&request);
        self.driver.runtime.spawn(async move {
            if let Some(effect) = effect {
                probe.reached(Point::before(effect));
            }
            let result = cloud.call(request).await;
            if let Some(effect) = effect {
                probe.reached(Point::after(effect));
            }
            let _ = sender.send(Input::Event(Event::Cloud { op, result }));
        });
    }

    fn reply(&mut self, request: RequestId, answer: Answer) {
        match self.replies.remove(&request) {
            // It leaves when this thread gets to it: `run` says when that was.
            Some(ReplyTo::Caller(reply)) => {
                self.driver.probe.reached(Point::before(Effect::Reply));
                reply(answer, &self.driver.pool);
                self.answered += 1;
            }
            Some(ReplyTo::Queue(path)) => match answer {
                Answer::Failed(failure) => {
                    tracing::warn!(path = %path.display(), why = failure.message, "queued release waits")
                }
                _ => {
                    if let Err(error) = self.effect(Effect::Settle, |_| releases::settle(&path)) {
                        tracing::warn!(error = %chain(&error), "a settled release stays in the queue");
                    }
                }
            },
            None => {}
        }
    }

    /// What is due by the clock: the add-on's checkpoint, a shorter journal, the queue of releases, the state of the node.
    fn housekeeping(&mut self) {
        let now = self.now();
        if self.checkpoint_due.is_some_and(|at| at <= now) {
            self.checkpoint_due = None;
            if !self.checkpoint_ahead {
                let written = self.effect(Effect::Checkpoint, |d| checkpoint::write(&d.checkpoint, d.pool.ledger()));
                if let Err(error) = written {
                    tracing::warn!(error = %chain(&error), "the add-on's checkpoint is behind");
                }
            }
            if self.driver.journal.is_long(self.driver.pool.ledger())
                && let Err(error) = self.effect(Effect::Compact, |d| d.journal.compact(d.pool.ledger()))
            {
                tracing::warn!(error = %chain(&error), "the ledger stays long");
            }
        }
        if self.look_due <= now && self.stopping.is_none() {
            self.look_due = now.plus_ms(u64::try_from(LOOK_EVERY.as_millis()).unwrap_or(0));
            self.drain_releases();
            let events = self.look_at_node_state(self.by_operator.clone());
            if !events.is_empty() {
                self.handle(events);
            }
        }
    }

    /// What the operator's file newly says; `otherwise` holds where it cannot be read.
    fn look_at_node_state(&mut self, otherwise: Said) -> Vec<Event> {
        let Some(said) = self.driver.node_state.look() else { return Vec::new() };
        self.by_operator = said.unwrap_or_else(|error| {
            self.driver.metrics.error("node_state");
            let level = node_state::level_name(otherwise.level.unwrap_or_default());
            tracing::error!(error = %chain(&error), level, "what is said of this node cannot be read; this holds");
            otherwise
        });
        self.settle_node_state().into_iter().collect()
    }

    /// What holds now of all that is said, if that has changed.
    fn settle_node_state(&mut self) -> Option<Event> {
        let state = NodeState::of(&self.by_operator, &self.by_api_server);
        if state == self.node_state {
            return None;
        }
        self.node_state = state.clone();
        Some(Event::NodeState(state))
    }

    fn drain_releases(&mut self) {
        let queued = match releases::list(&self.driver.release_queue) {
            Ok(queued) => queued,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the queue of releases could not be read");
                return;
            }
        };
        let mut events = Vec::new();
        for item in queued {
            match item.release {
                // Listed and released without taking an input in between, so an ADD that removed the file first, as the plugin
                // does, comes after. A file older than the sandbox's present address is of an earlier life and means nothing.
                Ok(release) if self.is_stale(&release) => {
                    tracing::info!(sandbox = %release.sandbox(), "a queued release of an earlier life is dropped");
                    if let Err(error) = releases::settle(&item.path) {
                        tracing::warn!(error = %chain(&error), "a stale release stays in the queue");
                    }
                }
                Ok(release) => {
                    let request = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
                    let sandbox: SandboxId = release.sandbox();
                    tracing::info!(%sandbox, pod = %release.pod(), "release queued by the plugin");
                    self.replies.insert(request, ReplyTo::Queue(item.path));
                    events.push(Event::Del { request, sandbox });
                }
                Err(why) if self.complained.insert(item.path.clone()) => {
                    tracing::warn!(path = %item.path.display(), why, "a queued release cannot be read; left as it is");
                }
                Err(_) => {}
            }
        }
        if !events.is_empty() {
            self.handle(events);
        }
    }

    fn is_stale(&mut self, release: &releases::QueuedRelease) -> bool {
        // The plugin wrote wall time; the pool's time differs from it by what was done to the clock since the start. Both
        // are read now: an old reading of one would make a release of a moment ago look older than it is.
        let (wall, ours) = (wall_clock(), self.now());
        let queued_at = (release.queued_at_ms + ours.since_ms(wall)).saturating_sub(wall.since_ms(ours));
        let held = self.driver.pool.ledger().pods.get(&release.sandbox());
        held.is_some_and(|allocation| allocation.at.0 > queued_at)
    }

    /// The pool's time: wall time at the start, and even from there.
    fn now(&mut self) -> Time {
        let (start, running) = self.started;
        let passed = running.elapsed() * self.driver.probe.hurry();
        self.last = start.plus_ms(u64::try_from(passed.as_millis()).unwrap_or(u64::MAX));
        self.last
    }
}

/// The latest moment the ledger speaks of.
fn newest_stamp(ledger: &LedgerState) -> Time {
    let leaving = ledger.enis.values().filter_map(|eni| eni.leaving);
    let pods = ledger.pods.values().map(|allocation| allocation.at);
    let freed = ledger.freed.values().chain(ledger.given_up.values());
    let unseen = ledger.unseen.values().flat_map(|slots| slots.values());
    let enis = ledger.enis_unseen.values().chain(ledger.forgotten.values());
    let creations = ledger.creations.values().map(|creation| creation.since);
    let stamps = leaving.chain(pods).chain(creations).chain(freed.chain(unseen).chain(enis).copied());
    stamps.max().unwrap_or_default()
}

pub fn wall_clock() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
