//! The API server, as far as one node's daemon needs it: what it says of this node, and what it is told.
//!
//! Never on the path of an ADD, and nothing waits for it: without it the daemon does what it did before, with what was
//! said last. Three watches come in (`watch`, over `client` and `split`), of this node, its pods, and the one ENIConfig
//! that its annotations and labels name; `mirror` keeps the little of them that counts, and `view` makes of it what is
//! `Said` of the node. What goes out is decided by pure parts, condition and capacity (`pressure`), events (`events`) and
//! annotations (`wanted`), and passes one queue (`outbox`) that `writes` carries out. `keeper` is the loop that owns all
//! of this state.
//!
//! The client is our own and small: lists, watches, patches and one create. kube-rs would bring forty-five more crates
//! (JSONPath, YAML and JSON Patch among them) and new features of those under the EC2 SDK, and it reads a list as one value
//! of whole objects; here a list is read object by object, and of each only the members in `objects` are kept.

mod client;
mod events;
mod keeper;
mod mirror;
mod objects;
mod outbox;
mod pressure;
mod split;
mod view;
mod wanted;
mod watch;
mod writes;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flatwire_core::ids::{PodName, Time};
use flatwire_core::pool::{Failure, Said};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};

pub use client::check_server;
pub use writes::WriteKind;

/// Where a pod finds what it may use to call the API server.
pub const CREDENTIALS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The add-on's key of a node's annotation or label that names its ENIConfig.
pub const ENI_CONFIG_KEY: &str = "k8s.amazonaws.com/eniConfig";
/// Failures that wait to be told; more are lost, and counted.
const MAX_UNTOLD: usize = 256;

/// Everything the adapter is told before it starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which `check_server` has passed.
    pub server: String,
    /// The name of our Node object.
    pub node: String,
    /// Who reports, in events: our pod, or the node.
    pub reporter: String,
    /// Folder with `token` and `ca.crt`, read anew as they change.
    pub credentials: PathBuf,
    /// Write pods' addresses to their annotation.
    pub annotate_pods: bool,
    /// An ENIConfig is wanted.
    pub custom_networking: bool,
    pub eni_config_annotation: String,
    pub eni_config_label: String,
    /// The variables the daemon was started with, for a node's own settings to lie over.
    pub settings: BTreeMap<String, String>,
    pub lenient: bool,
}

/// The daemon as the adapter sees it.
pub trait Daemon: Send + Sync + 'static {
    /// What the API server says of this node now.
    fn hear(&self, said: Said);
    /// The pool as it is; `None` once it is gone.
    fn report(&self) -> impl Future<Output = Option<Report>> + Send;
}

/// What is told of the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Why a pod that came now would be given no address, and none is on its way.
    pub shortage: Option<Failure>,
    /// Addresses held.
    pub total: u32,
    /// Addresses this node could hold.
    pub most: u32,
    /// Newest last where a name has several sandboxes.
    pub pods: Vec<PodAddresses>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAddresses {
    pub pod: PodName,
    pub since: Time,
    pub addresses: Vec<IpAddr>,
}

/// Hears of what the adapter does; metrics hang here. Must not block.
pub trait Observer: Send + Sync + 'static {
    /// A watch was begun anew with a list: at the start, or because the server no longer knew where it had stopped.
    fn listed(&self, resource: &'static str);
    /// A list or watch failed, or was cut.
    fn failed(&self, resource: &'static str);
    fn wrote(&self, kind: WriteKind, outcome: WriteOutcome);
    /// Settings of the node that are not allowed, and an ENIConfig that cannot be used.
    fn complaints(&self, count: usize);
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteOutcome {
    Done,
    Failed,
    /// Given up: too many wait, it was tried often enough, or its object is gone.
    Dropped,
}

impl fmt::Display for WriteOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        })
    }
}

/// An ADD that was answered without an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddFailed {
    pub pod: PodName,
    /// The contract's reason, such as `subnet_empty`.
    pub reason: String,
    pub message: String,
}

/// By which the rest of the daemon tells what happened. Never waits.
#[derive(Clone)]
pub struct Teller {
    failures: mpsc::Sender<AddFailed>,
    changed: Arc<Notify>,
    observer: Arc<dyn Observer>,
}

impl Teller {
    pub fn add_failed(&self, failed: AddFailed) {
        if self.failures.try_send(failed).is_err() {
            self.observer.wrote(WriteKind::Event, WriteOutcome::Dropped);
        }
    }

    /// Pods have come or gone: what is told of the pool is to be looked at now.
    pub fn changed(&self) {
        self.changed.notify_one();
    }
}

/// How it stands with the API server, for `ipamd status` and the metrics.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Health {
    pub server: String,
    pub watches: BTreeMap<String, WatchHealth>,
    /// The name of the ENIConfig that the node names, with custom networking.
    pub eni_config: Option<String>,
    /// Settings of the node that are not allowed, and an ENIConfig that cannot be used.
    pub complaints: Vec<String>,
    /// Writes that wait.
    pub queued: usize,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WatchHealth {
    /// It has been listed whole at least once.
    pub synced: bool,
    /// How long ago something was heard, be it a sign of life; `None` before the first time.
    pub heard_secs: Option<u64>,
    /// What went wrong last, if nothing was heard since.
    pub error: Option<String>,
}

/// A running adapter, to ask how it is.
#[derive(Clone)]
pub struct Adapter {
    board: Arc<Board>,
    teller: Teller,
}

impl Adapter {
    /// Starts the adapter on the current runtime. It ends with the runtime.
    pub fn start(config: Config, daemon: Arc<impl Daemon>, observer: Arc<dyn Observer>) -> Self {
        let (failures, untold) = mpsc::channel(MAX_UNTOLD);
        let changed = Arc::new(Notify::new());
        let teller = Teller { failures, changed: changed.clone(), observer: observer.clone() };
        let board = Arc::new(Board::new(config.server.clone()));
        tokio::spawn(keeper::keep(config, daemon, observer, board.clone(), untold, changed));
        Self { board, teller }
    }

    pub fn teller(&self) -> Teller {
        self.teller.clone()
    }

    pub fn health(&self) -> Health {
        self.board.health()
    }
}

/// Where each part notes how it stands.
#[derive(Debug)]
struct Board {
    server: String,
    inner: Mutex<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    watches: BTreeMap<&'static str, (bool, Option<Instant>, Option<String>)>,
    eni_config: Option<String>,
    complaints: Vec<String>,
    queued: usize,
}

impl Board {
    fn new(server: String) -> Self {
        Self { server, inner: Mutex::default() }
    }

    fn note<T>(&self, write: impl FnOnce(&mut Noted) -> T) -> T {
        write(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn heard(&self, resource: &'static str, synced: bool) {
        self.note(|noted| {
            let watch = noted.watches.entry(resource).or_default();
            *watch = (watch.0 || synced, Some(Instant::now()), None);
        });
    }

    fn failed(&self, resource: &'static str, error: String) {
        self.note(|noted| noted.watches.entry(resource).or_default().2 = Some(error));
    }

    fn health(&self) -> Health {
        self.note(|noted| {
            let ages = |at: &Instant| at.elapsed().as_secs();
            let watches = noted.watches.iter().map(|(resource, (synced, heard, error))| {
                let heard_secs = heard.as_ref().map(ages);
                ((*resource).to_owned(), WatchHealth { synced: *synced, heard_secs, error: error.clone() })
            });
            Health {
                server: self.server.clone(),
                watches: watches.collect(),
                eni_config: noted.eni_config.clone(),
                complaints: noted.complaints.clone(),
                queued: noted.queued,
            }
        })
    }
}

/// The longest that anything waits before it tries the API server again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Doubles with every failure, up to `LONGEST_PAUSE`; between half of that and all of it, by chance, so that the nodes of a
/// cluster do not come back at once.
fn pause_after(failures: u32, chance: u64) -> Duration {
    let whole = Duration::from_millis(500 << failures.min(7)).min(LONGEST_PAUSE);
    let millis = u64::try_from(whole.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(millis / 2 + chance % (millis / 2 + 1))
}

/// Chance for spreading calls in time, and nothing else.
fn chance() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        assert_eq!(pause_after(0, 0), Duration::from_millis(250));
        assert_eq!(pause_after(0, 250), Duration::from_millis(500));
        assert_eq!(pause_after(99, 0), LONGEST_PAUSE / 2);
        assert!((0..1_000).all(|chance| pause_after(9, chance * 7_919) <= LONGEST_PAUSE));
    }
}
