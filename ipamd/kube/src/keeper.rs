//! The loop that owns what is known and what waits to be written. It never waits for the API server: watches and writes run
//! beside it and report to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use flatwire_core::error::chain;
use flatwire_core::ids::Time;
use flatwire_core::pool::{Failure, Reason, Said};
use hyper::StatusCode;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::client::{ApiError, Client};
use crate::events::{About, Event, Events};
use crate::objects::{CONDITION, EniConfigObject, Node, Pod};
use crate::outbox::{Fate, Outbox};
use crate::pressure::Pressure;
use crate::view::{Complaint, View};
use crate::wanted::{annotations, wanted};
use crate::watch::{Change, Collection, Listener, follow};
use crate::writes::{Key, Write, carry_out, outcome};
use crate::{AddFailed, Board, Config, Daemon, Observer, WriteOutcome, chance, pause_after};

/// Changes that wait to be taken in; the watches wait, and the server keeps what they have not read.
const MAX_UNREAD: usize = 64;
/// How long changes are gathered before they are acted on.
const GATHER: Duration = Duration::from_millis(100);
/// How often the pool is looked at when nothing happens.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What a watch brought.
enum Heard {
    Node(Change<Node>),
    Pod(Change<Pod>),
    /// With its name: another may be followed by now.
    EniConfig(String, Change<EniConfigObject>),
}

type Written = (Key, Write, Result<(), ApiError>);

struct Keeper<D> {
    config: Arc<Config>,
    daemon: Arc<D>,
    observer: Arc<dyn Observer>,
    board: Arc<Board>,
    client: Arc<Client>,
    clock: Clock,
    heard: mpsc::Sender<Heard>,
    written: mpsc::Sender<Written>,
    view: View,
    said: Said,
    complaints: Vec<Complaint>,
    pressure: Option<Pressure>,
    events: Events,
    outbox: Outbox<Key, Write>,
    /// The ENIConfig that is followed.
    eni_config: Option<(String, JoinHandle<()>)>,
}

/// Wall time at the start, and even from there: hold-downs must not jump with the clock.
struct Clock(Time, Instant);

impl Clock {
    fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)), Instant::now())
    }

    fn now(&self) -> Time {
        self.0.plus_ms(u64::try_from(self.1.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// Runs for as long as the daemon does.
pub async fn keep<D: Daemon>(
    config: Config,
    daemon: Arc<D>,
    observer: Arc<dyn Observer>,
    board: Arc<Board>,
    mut untold: mpsc::Receiver<AddFailed>,
    changed: Arc<Notify>,
) {
    let client = Arc::new(client(&config, &board).await);
    let (heard, mut unread) = mpsc::channel(MAX_UNREAD);
    let (written, mut ended) = mpsc::channel(1);
    let clock = Clock::start();
    let outbox = Outbox::new(clock.now());
    let mut keeper = Keeper {
        config: Arc::new(config),
        daemon,
        observer,
        board,
        client,
        clock,
        heard,
        written,
        view: View::new(),
        said: Said::default(),
        complaints: Vec::new(),
        pressure: None,
        events: Events::default(),
        outbox,
        eni_config: None,
    };
    keeper.follow_node_and_pods();
    let mut look_at = Instant::now() + LOOK_EVERY;
    loop {
        let due = keeper.outbox.due(keeper.clock.now());
        let due = due.map(|at| Instant::now() + Duration::from_millis(at.since_ms(keeper.clock.now())));
        let wake = due.map_or(look_at, |due| due.min(look_at));
        let soon = Instant::now() + GATHER;
        tokio::select! {
            Some(heard) = unread.recv() => {
                keeper.take(heard);
                look_at = look_at.min(soon);
            }
            Some(failed) = untold.recv() => keeper.add_failed(&failed),
            Some((key, write, answer)) = ended.recv() => keeper.wrote(&key, &write, &answer),
            () = changed.notified() => look_at = look_at.min(soon),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        if look_at <= Instant::now() {
            keeper.say();
            if !keeper.look().await {
                return;
            }
            look_at = Instant::now() + LOOK_EVERY;
        }
        keeper.write_next();
    }
}

/// The credentials may come later than the daemon.
async fn client(config: &Config, board: &Board) -> Client {
    let mut failures = 0;
    loop {
        match Client::new(&config.server, &config.credentials) {
            Ok(client) => return client,
            Err(error) => {
                let why = chain(&error);
                if failures == 0 {
                    tracing::warn!(
                        error = why,
                        "the API server cannot be called yet; everything else goes on without it"
                    );
                }
                board.failed("credentials", why);
                tokio::time::sleep(pause_after(failures, chance())).await;
                failures = failures.saturating_add(1);
            }
        }
    }
}

impl<D: Daemon> Keeper<D> {
    fn follow_node_and_pods(&self) {
        self.board.note(|noted| drop(noted.watches.remove("credentials")));
        let node = &self.config.node;
        let nodes =
            Collection { resource: "nodes", path: "/api/v1/nodes", field_selector: format!("metadata.name={node}") };
        // What has ended needs no address, and jobs leave it lying by the hundred.
        let pods = Collection {
            resource: "pods",
            path: "/api/v1/pods",
            field_selector: format!("spec.nodeName={node},status.phase!=Succeeded,status.phase!=Failed"),
        };
        self.follow(nodes, Heard::Node);
        self.follow(pods, Heard::Pod);
    }

    fn follow<T: crate::objects::Object>(
        &self,
        collection: Collection,
        wrap: impl Fn(Change<T>) -> Heard + Send + Sync + 'static,
    ) -> JoinHandle<()> {
        let (client, board, observer) = (self.client.clone(), self.board.clone(), self.observer.clone());
        let listener = Listener { to: self.heard.clone(), wrap: Box::new(wrap) };
        tokio::spawn(follow(client, collection, board, observer, listener))
    }

    fn take(&mut self, heard: Heard) {
        match heard {
            Heard::Node(change) => self.view.node_changed(change),
            Heard::Pod(change) => self.view.pod_changed(change, self.config.annotate_pods),
            Heard::EniConfig(name, change) => {
                if self.eni_config.as_ref().is_some_and(|(followed, _)| *followed == name) {
                    self.view.eni_config_changed(change);
                }
            }
        }
    }

    /// Follows the ENIConfig that the node names now.
    fn follow_eni_config(&mut self) {
        let named = self.view.eni_config_name(&self.config).filter(|_| self.config.custom_networking);
        let Some((name, place)) = named else { return };
        if self.eni_config.as_ref().is_some_and(|(followed, _)| *followed == name) {
            return;
        }
        tracing::info!(name, place, "this node's ENIConfig");
        if let Some((_, task)) = self.eni_config.take() {
            task.abort();
        }
        self.view.forget_eni_config();
        self.board.note(|noted| noted.eni_config = Some(name.clone()));
        let collection = Collection {
            resource: "eniconfigs",
            path: "/apis/crd.k8s.amazonaws.com/v1alpha1/eniconfigs",
            field_selector: format!("metadata.name={name}"),
        };
        let its = name.clone();
        let task = self.follow(collection, move |change| Heard::EniConfig(its.clone(), change));
        self.eni_config = Some((name, task));
    }

    /// Tells the daemon what is said of the node, if that has changed, and people what of it cannot be used.
    fn say(&mut self) {
        self.follow_eni_config();
        let (said, complaints) = self.view.said(&self.config);
        if complaints != self.complaints {
            let before = std::mem::replace(&mut self.complaints, complaints.clone());
            for complaint in complaints.iter().filter(|complaint| !before.contains(complaint)) {
                tracing::warn!(reason = complaint.reason, what = complaint.text, "said of this node, and set aside");
                let about = About {
                    kind: "Node",
                    namespace: String::new(),
                    name: self.config.node.clone(),
                    // As the kubelet's events about its node.
                    uid: self.config.node.clone(),
                };
                self.happened(about, complaint.reason, &complaint.text, "ReadSettings", &complaint.text);
            }
            self.observer.complaints(complaints.len());
            let texts = complaints.iter().map(|complaint| complaint.text.clone()).collect();
            self.board.note(|noted| noted.complaints = texts);
        }
        if said != self.said {
            self.said = said.clone();
            self.daemon.hear(said);
        }
    }

    /// Looks at the pool, and asks for what should stand in the API server. False: there is no pool any more.
    async fn look(&mut self) -> bool {
        let Some(report) = self.daemon.report().await else { return false };
        let now = self.clock.now();
        let mut states = BTreeMap::new();
        if let Some(node) = self.view.node() {
            let pressure = self.pressure.get_or_insert_with(|| Pressure::new(shown(node), now));
            // Before the pool knows its node it is not short of anything.
            let shortage = report.shortage.as_ref().filter(|_| report.most > 0 && !self.view.is_full());
            let before = pressure.told().clone();
            pressure.observe(shortage, now);
            if let (before, told) = (before.shortage, &pressure.told().shortage)
                && before.is_some() != told.is_some()
            {
                let why = told.as_ref().map_or("addresses can be had again", |failure| failure.message.as_str());
                tracing::warn!(short = told.is_some(), why, "the node's condition {CONDITION} changes");
            }
            states = wanted(&self.view, pressure.told(), &report);
        }
        if self.config.annotate_pods && report.most > 0 {
            states.extend(annotations(&self.view, &report.pods));
        }
        let kinds: Vec<_> = states.values().map(Write::kind).collect();
        let refused = self.outbox.states(states, now);
        // The last ones in the order of urgency found no room; they are wanted again at the next look.
        kinds.iter().rev().take(refused).for_each(|kind| self.observer.wrote(*kind, WriteOutcome::Dropped));
        self.board.note(|noted| noted.queued = self.outbox.len());
        true
    }

    fn add_failed(&mut self, failed: &AddFailed) {
        // Not every runtime is Kubernetes'.
        if failed.pod.name.is_empty() || failed.pod.namespace.is_empty() {
            return;
        }
        let about = About {
            kind: "Pod",
            namespace: failed.pod.namespace.clone(),
            name: failed.pod.name.clone(),
            uid: self.view.uid_of(&failed.pod).unwrap_or_default().to_owned(),
        };
        self.happened(about, &failed.reason, "", "AssignAddress", &format!("no address: {}", failed.message));
    }

    fn happened(&mut self, about: About, reason: &str, matter: &str, action: &'static str, note: &str) {
        let now = self.clock.now();
        let Some(event) = self.events.happened(about, reason, matter, action, note, now) else { return };
        let Event { name, .. } = &event;
        if !self.outbox.news(Key::Event(name.clone()), Write::Event(event), now) {
            self.observer.wrote(crate::WriteKind::Event, WriteOutcome::Dropped);
        }
    }

    /// Starts the next write, if one is due.
    fn write_next(&mut self) {
        let Some((key, write)) = self.outbox.next(self.clock.now()) else { return };
        let (client, config, written) = (self.client.clone(), self.config.clone(), self.written.clone());
        tokio::spawn(async move {
            let answer = carry_out(&client, &config, &write).await;
            // The keeper is gone with the daemon.
            let _ = written.send((key, write, answer)).await;
        });
    }

    fn wrote(&mut self, key: &Key, write: &Write, answer: &Result<(), ApiError>) {
        let kind = write.kind();
        let fate = self.outbox.ended(key, write, outcome(write, answer), self.clock.now());
        if let Err(error) = answer {
            let hint = match error.status() {
                Some(StatusCode::FORBIDDEN) => "; the role lacks it",
                _ => "",
            };
            tracing::warn!(%kind, ?fate, error = format!("{error}{hint}"), "not written to the API server");
        }
        let outcome = match fate {
            Fate::Written => WriteOutcome::Done,
            Fate::Waits => WriteOutcome::Failed,
            Fate::Dropped => WriteOutcome::Dropped,
        };
        self.observer.wrote(kind, outcome);
    }
}

/// The shortage that the node's object shows, from an earlier life.
fn shown(node: &Node) -> Option<Failure> {
    let condition = node.status.conditions.iter().find(|condition| condition.kind == CONDITION)?;
    let words = "was told before a restart of ipamd".to_owned();
    // Its reason is told anew with the next look that differs.
    (condition.status == "True").then(|| Failure::retryable(reason_named(&condition.reason), words))
}

fn reason_named(camel: &str) -> Reason {
    let mut snake = String::new();
    for letter in camel.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    serde_json::from_value(snake.into()).unwrap_or(Reason::Starting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::camel_case;

    #[test]
    fn a_reason_is_read_back_as_it_was_told() {
        for reason in [Reason::SubnetEmpty, Reason::Throttled, Reason::ProvisioningDisabled] {
            assert_eq!(reason_named(&camel_case(&reason.to_string())), reason);
        }
        assert_eq!(reason_named("Anything"), Reason::Starting);
    }
}
