//! One collection of the API server, followed: listed whole, then watched from there, and listed again when the server no
//! longer knows where we stopped. A cut watch goes on where it was.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::StatusCode;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use crate::client::{ApiError, Client};
use crate::objects::{Carrier, ListFrame, Object, WatchLine};
use crate::split::{Shape, Splitter};
use crate::{Board, Observer, chance, pause_after};

/// The server ends a watch after this long and as long again at most, by chance; it then goes on with another.
const WATCH_SECS: u64 = 240;
/// No list takes longer, and no watch is silent for longer than the server lets it live.
const SILENCE: Duration = Duration::from_secs(30);

/// What is followed.
#[derive(Debug, Clone)]
pub struct Collection {
    /// As the metrics and the role name it.
    pub resource: &'static str,
    pub path: &'static str,
    /// The server sends nothing that it does not fit.
    pub field_selector: String,
}

/// What has happened to a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<T> {
    /// A list begins: what it does not show is gone.
    Listing,
    Seen(T),
    /// By its uid.
    Gone(String),
    /// The list has ended.
    Listed,
}

/// Who is told, and how a change is put for them.
pub struct Listener<T, M> {
    pub to: mpsc::Sender<M>,
    pub wrap: Box<dyn Fn(Change<T>) -> M + Send + Sync>,
}

impl<T, M> Listener<T, M> {
    async fn tell(&self, change: Change<T>) -> Result<(), Ended> {
        self.to.send((self.wrap)(change)).await.map_err(|_| Ended::Unwanted)
    }
}

/// Follows until nobody listens.
pub async fn follow<T: Object, M: Send>(
    client: Arc<Client>,
    collection: Collection,
    board: Arc<Board>,
    observer: Arc<dyn Observer>,
    listener: Listener<T, M>,
) {
    let mut failures = 0;
    let mut version: Option<String> = None;
    loop {
        let outcome = match &version {
            None => list(&client, &collection, &board, &listener).await.map(|at| {
                observer.listed(collection.resource);
                Some(at)
            }),
            Some(at) => watch(&client, &collection, &board, at, &listener).await,
        };
        match outcome {
            Ok(at) => {
                failures = 0;
                version = at;
            }
            Err(Ended::Unwanted) => return,
            Err(Ended::Failed { error, at }) => {
                version = at.or(version);
                if error.status() == Some(StatusCode::GONE) {
                    version = None;
                }
                observer.failed(collection.resource);
                let pause = error.retry_after().unwrap_or_default().max(pause_after(failures, chance()));
                say(&collection, &error, failures, pause);
                board.failed(collection.resource, error.to_string());
                failures = failures.saturating_add(1);
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// The first failures in a row are everyday; what lasts is told once a while and not each time.
fn say(collection: &Collection, error: &ApiError, failures: u32, pause: Duration) {
    let resource = collection.resource;
    let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
    if !failures.is_multiple_of(10) {
        tracing::debug!(resource, %error, pause_ms, "the API server could not be followed");
        return;
    }
    let hint = match error.status() {
        Some(StatusCode::FORBIDDEN) => "; the role lacks list and watch of it",
        Some(StatusCode::UNAUTHORIZED) => "; the token is not accepted",
        Some(StatusCode::NOT_FOUND) => "; its definition is not installed",
        _ => "",
    };
    tracing::warn!(resource, error = format!("{error}{hint}"), pause_ms, "the API server could not be followed");
}

/// Why a list or a watch has ended otherwise than it should.
enum Ended {
    /// Nobody listens any more.
    Unwanted,
    /// With where it stood by then.
    Failed { error: ApiError, at: Option<String> },
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Self {
        Self::Failed { error, at: None }
    }
}

/// Everything there is, as the server has it in memory: a consistent list would make it read the pods of the whole cluster
/// to find those of one node. It may lag a little, and the watch brings the rest.
async fn list<T: Object, M: Send>(
    client: &Client,
    collection: &Collection,
    board: &Board,
    listener: &Listener<T, M>,
) -> Result<String, Ended> {
    let Collection { path, field_selector, .. } = collection;
    let path = format!("{path}?fieldSelector={}&resourceVersion=0", escape(field_selector));
    let mut body = client.get(&path).await?;
    let mut splitter = Splitter::new(Shape::List);
    listener.tell(Change::Listing).await?;
    while let Some(objects) = next(&mut body, &mut splitter, SILENCE).await? {
        for object in objects {
            let object = serde_json::from_slice(&object).map_err(|error| ApiError::Answer(error.to_string()))?;
            listener.tell(Change::Seen(object)).await?;
        }
    }
    let frame: ListFrame =
        serde_json::from_slice(splitter.frame()).map_err(|error| ApiError::Answer(format!("a list: {error}")))?;
    listener.tell(Change::Listed).await?;
    board.heard(collection.resource, true);
    Ok(frame.metadata.resource_version)
}

/// What changes from `at` on, until the server ends the watch. `None`: there is no going on from where it stood.
async fn watch<T: Object, M: Send>(
    client: &Client,
    collection: &Collection,
    board: &Board,
    at: &str,
    listener: &Listener<T, M>,
) -> Result<Option<String>, Ended> {
    let seconds = WATCH_SECS + chance() % WATCH_SECS;
    let Collection { path, field_selector, .. } = collection;
    let path = format!(
        "{path}?watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&fieldSelector={}&resourceVersion={at}",
        escape(field_selector)
    );
    let mut at = at.to_owned();
    let failed = |error, at: &str| Ended::Failed { error, at: Some(at.to_owned()) };
    let mut body = client.get(&path).await?;
    board.heard(collection.resource, false);
    let mut splitter = Splitter::new(Shape::Events);
    let longest = Duration::from_secs(seconds) + SILENCE;
    loop {
        let Some(lines) = next(&mut body, &mut splitter, longest).await.map_err(|error| failed(error, &at))? else {
            return Ok(Some(at));
        };
        for line in lines {
            let answer = |error: serde_json::Error| ApiError::Answer(format!("a watch: {error}"));
            let WatchLine { kind, object } =
                serde_json::from_slice(&line).map_err(|error| failed(answer(error), &at))?;
            let carried = || serde_json::from_slice::<Carrier<T>>(&line).map(|carrier| carrier.object);
            match kind.as_str() {
                "ADDED" | "MODIFIED" => {
                    let seen = carried().map_err(|error| failed(answer(error), &at))?;
                    listener.tell(Change::Seen(seen)).await?;
                }
                "DELETED" => {
                    let gone = carried().map_err(|error| failed(answer(error), &at))?;
                    listener.tell(Change::Gone(gone.uid().to_owned())).await?;
                }
                "BOOKMARK" => {}
                // Too far back: the server has forgotten what came since. A list follows, without a pause.
                _ if object.code == StatusCode::GONE.as_u16() => return Ok(None),
                _ => {
                    let error = ApiError::Answer(format!("a watch: {kind} {}: {}", object.code, object.message));
                    return Err(failed(error, &at));
                }
            }
            if !object.metadata.resource_version.is_empty() {
                at = object.metadata.resource_version;
            }
            board.heard(collection.resource, false);
        }
    }
}

/// The objects that the next bytes complete; `None` at the end.
async fn next(
    body: &mut Incoming,
    splitter: &mut Splitter,
    longest: Duration,
) -> Result<Option<Vec<Vec<u8>>>, ApiError> {
    let frame = tokio::time::timeout(longest, body.frame()).await.map_err(|_| ApiError::Timeout(longest))?;
    let Some(frame) = frame else { return Ok(None) };
    let frame = frame.map_err(|error| ApiError::Unreachable(error.to_string()))?;
    let mut objects = Vec::new();
    let bytes = frame.into_data().unwrap_or_default();
    splitter
        .feed(&bytes, |object| objects.push(object.to_vec()))
        .map_err(|error| ApiError::Answer(error.to_string()))?;
    Ok(Some(objects))
}

/// For a selector in a query: names of nodes and phases, with `=`, `!=` and commas.
fn escape(selector: &str) -> String {
    selector.replace('%', "%25").replace('=', "%3D").replace('!', "%21").replace(',', "%2C").replace('&', "%26")
}
