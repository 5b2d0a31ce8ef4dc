//! An API server as far as one node's daemon calls it: lists and watches with field selectors, patches of nodes' status
//! and of pods, and events. It does what Kubernetes does where that can hurt: it forgets the past (410), cuts watches,
//! goes away, asks for a token, refuses a patch with another uid, and takes no event that the real one would not take.
//!
//! Tests change its objects directly, look at them, and read which verbs were used on what.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::TcpListener;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// Where it listens on the node.
pub const PORT: u16 = 6443;
const TOKEN: &str = "a-token-of-this-test";
/// Signs of life on a watch.
const BOOKMARK_EVERY: Duration = Duration::from_millis(500);

/// Verb, API group and resource, as a role names them.
pub type Call = (String, String, String);

#[derive(Default)]
struct State {
    version: u64,
    /// By resource, then by namespace and name.
    objects: BTreeMap<&'static str, BTreeMap<String, Value>>,
    /// What has happened, for watches to go on from.
    past: Vec<Happening>,
    /// Watches from before this are told that they are too old.
    remembered_from: u64,
    calls: BTreeSet<Call>,
    lists: BTreeMap<&'static str, u32>,
    away: bool,
}

struct Happening {
    version: u64,
    resource: &'static str,
    before: Option<Value>,
    after: Option<Value>,
}

/// Ends with the value.
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    /// Told of every change; its value is the number of times that connections were cut.
    wake: watch::Sender<u64>,
    dir: tempfile::TempDir,
    stop: Option<watch::Sender<()>>,
}

impl ApiServer {
    /// `listen` binds where the daemon will find it.
    pub fn start(listen: impl FnOnce() -> TcpListener) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_certificates(dir.path());
        let state = Arc::new(Mutex::new(State { version: 1, ..State::default() }));
        let (wake, woken) = watch::channel(0);
        let (stop, stopped) = watch::channel(());
        let listener = listen();
        listener.set_nonblocking(true).unwrap();
        let tls = acceptor(dir.path());
        let served = state.clone();
        let notify = wake.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(listener, tls, served, notify, woken, stopped));
        });
        Self { state, wake, dir, stop: Some(stop) }
    }

    /// The authority's certificate and the token, as a pod finds them.
    pub fn credentials(&self) -> (String, &'static str) {
        (std::fs::read_to_string(self.dir.path().join("ca.crt")).unwrap(), TOKEN)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Makes or replaces an object.
    pub fn put(&self, resource: &'static str, object: Value) {
        self.lock().put(resource, object);
        self.wake.send_modify(|_| ());
    }

    pub fn put_all(&self, resource: &'static str, objects: impl IntoIterator<Item = Value>) {
        let mut state = self.lock();
        objects.into_iter().for_each(|object| state.put(resource, object));
        drop(state);
        self.wake.send_modify(|_| ());
    }

    pub fn delete(&self, resource: &'static str, key: &str) {
        self.lock().delete(resource, key);
        self.wake.send_modify(|_| ());
    }

    pub fn get(&self, resource: &'static str, key: &str) -> Option<Value> {
        self.lock().objects.get(resource)?.get(key).cloned()
    }

    pub fn all(&self, resource: &'static str) -> Vec<Value> {
        self.lock().objects.get(resource).into_iter().flat_map(|objects| objects.values()).cloned().collect()
    }

    /// Every connection ends in the middle of what it was doing.
    pub fn cut(&self) {
        self.wake.send_modify(|cuts| *cuts += 1);
    }

    /// Nobody is answered until it is back.
    pub fn away(&self, away: bool) {
        self.lock().away = away;
        self.cut();
    }

    /// What has happened so far can no longer be watched from.
    pub fn forget_the_past(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.remembered_from = state.version;
        state.past.clear();
        drop(state);
        self.cut();
    }

    pub fn calls(&self) -> BTreeSet<Call> {
        self.lock().calls.clone()
    }

    /// How often the resource was listed.
    pub fn lists(&self, resource: &'static str) -> u32 {
        self.lock().lists.get(resource).copied().unwrap_or(0)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

fn key_of(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    match text("namespace").as_str() {
        "" => text("name"),
        namespace => format!("{namespace}/{}", text("name")),
    }
}

impl State {
    fn put(&mut self, resource: &'static str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = key_of(&object);
        let before = self.objects.entry(resource).or_default().insert(key, object.clone());
        self.past.push(Happening { version: self.version, resource, before, after: Some(object) });
    }

    fn delete(&mut self, resource: &'static str, key: &str) {
        let Some(mut before) = self.objects.entry(resource).or_default().remove(key) else { return };
        self.version += 1;
        before["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.past.push(Happening { version: self.version, resource, before: Some(before), after: None });
    }
}

/// `key=value`, `key!=value`, with commas between, as the server reads it.
fn fits(object: &Value, selector: &str) -> bool {
    selector.split(',').filter(|term| !term.is_empty()).all(|term| {
        let (key, wanted, value) = match term.split_once("!=") {
            Some((key, value)) => (key, false, value),
            None => term.split_once('=').map(|(key, value)| (key, true, value)).unwrap(),
        };
        let field = key.split('.').fold(object, |object, part| &object[part]);
        (field.as_str().unwrap_or_default() == value) == wanted
    })
}

fn make_certificates(dir: &Path) {
    let script = "set -e\n\
        key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'\n\
        openssl req -x509 $key -keyout ca.key -out ca.crt -days 2 -subj /CN=cluster\n\
        openssl req -new $key -keyout server.key -out server.csr -subj /CN=kube-apiserver\n\
        printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext\n\
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -set_serial 2 -days 2 -extfile ext -out server.crt";
    let output = Command::new("bash").args(["-c", script]).current_dir(dir).output().expect("bash starts");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}

fn acceptor(dir: &Path) -> TlsAcceptor {
    let chain: Vec<_> = CertificateDer::pem_file_iter(dir.join("server.crt")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(dir.join("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()))
}

async fn serve(
    listener: TcpListener,
    tls: TlsAcceptor,
    state: Arc<Mutex<State>>,
    wake: watch::Sender<u64>,
    woken: watch::Receiver<u64>,
    mut stopped: watch::Receiver<()>,
) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let stream = tokio::select! {
            Ok((stream, _)) = listener.accept() => stream,
            // An error: the other end is gone.
            _ = stopped.changed() => return,
        };
        // Counted before the question: who goes away meanwhile cuts this connection too.
        let cuts = *woken.borrow();
        if state.lock().unwrap().away {
            continue;
        }
        let (tls, state, wake, mut woken) = (tls.clone(), state.clone(), wake.clone(), woken.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let answers = Connected { woken: woken.clone(), cuts };
            let service = service_fn(move |request| {
                let (state, wake, connected) = (state.clone(), wake.clone(), answers.clone());
                async move { Ok::<_, Infallible>(answer(request, &state, &wake, connected).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                biased;
                _ = woken.wait_for(|now| *now != cuts) => {}
                _ = connection => {}
            }
        });
    }
}

/// What a watch hears of the server, and the number of cuts that its connection has outlived.
#[derive(Clone)]
struct Connected {
    woken: watch::Receiver<u64>,
    cuts: u64,
}

impl Connected {
    fn is_cut(&self) -> bool {
        *self.woken.borrow() != self.cuts
    }
}

/// A whole answer, or a watch.
enum Answer {
    Whole(Full<Bytes>),
    Watch(mpsc::Receiver<Bytes>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context),
            Self::Watch(lines) => lines.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line)))),
        }
    }
}

fn whole(status: StatusCode, body: &Value) -> Response<Answer> {
    let body = Answer::Whole(Full::new(Bytes::from(body.to_string())));
    Response::builder().status(status).body(body).unwrap()
}

fn refused(status: StatusCode, message: &str) -> Response<Answer> {
    whole(status, &json!({ "kind": "Status", "status": "Failure", "code": status.as_u16(), "message": message }))
}

/// The path taken apart: group, namespace, resource, name, subresource.
struct Target {
    group: String,
    namespace: Option<String>,
    resource: &'static str,
    name: Option<String>,
    sub: Option<String>,
}

fn target(path: &str) -> Option<Target> {
    let mut parts = path.trim_start_matches('/').split('/').map(str::to_owned).peekable();
    let group = match parts.next()?.as_str() {
        "api" => String::new(),
        "apis" => parts.next()?,
        _ => return None,
    };
    let version = parts.next()?;
    let namespace = match parts.peek().map(String::as_str) {
        Some("namespaces") => {
            parts.next();
            Some(parts.next()?)
        }
        _ => None,
    };
    let resource = match (group.as_str(), version.as_str(), parts.next()?.as_str()) {
        ("", "v1", "nodes") => "nodes",
        ("", "v1", "pods") => "pods",
        ("crd.k8s.amazonaws.com", "v1alpha1", "eniconfigs") => "eniconfigs",
        ("events.k8s.io", "v1", "events") => "events",
        _ => return None,
    };
    Some(Target { group, namespace, resource, name: parts.next(), sub: parts.next() })
}

async fn answer(
    request: Request<Incoming>,
    state: &Arc<Mutex<State>>,
    wake: &watch::Sender<u64>,
    connected: Connected,
) -> Response<Answer> {
    let bearer = request.headers().get("authorization").and_then(|value| value.to_str().ok()).map(str::to_owned);
    if bearer != Some(format!("Bearer {TOKEN}")) {
        return refused(StatusCode::UNAUTHORIZED, "Unauthorized");
    }
    let Some(target) = target(request.uri().path()) else {
        return refused(StatusCode::NOT_FOUND, "the server could not find the requested resource");
    };
    let query: BTreeMap<String, String> = request.uri().query().into_iter().flat_map(pairs).collect();
    let watches = query.get("watch").is_some_and(|watch| watch == "true");
    let verb = match *request.method() {
        Method::GET if watches => "watch",
        Method::GET if target.name.is_none() => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PATCH => "patch",
        _ => return refused(StatusCode::METHOD_NOT_ALLOWED, "the method is not allowed"),
    };
    let resource = match &target.sub {
        Some(sub) => format!("{}/{sub}", target.resource),
        None => target.resource.to_owned(),
    };
    state.lock().unwrap().calls.insert((verb.to_owned(), target.group.clone(), resource));
    let kind = request.headers().get("content-type").and_then(|value| value.to_str().ok()).map(str::to_owned);
    match verb {
        "list" => list(&target, &query, &mut state.lock().unwrap()),
        "watch" => follow(&target, &query, state, connected),
        "create" | "patch" => {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let Ok(body) = serde_json::from_slice(&body) else {
                return refused(StatusCode::BAD_REQUEST, "the body is not JSON");
            };
            let mut state = state.lock().unwrap();
            let changed = match verb {
                "create" => create(&target, body, &mut state),
                _ => patch(&target, kind.as_deref().unwrap_or_default(), &body, &mut state),
            };
            wake.send_modify(|_| ());
            changed.unwrap_or_else(|(status, message)| refused(status, &message))
        }
        _ => refused(StatusCode::FORBIDDEN, "nobody needs this"),
    }
}

fn pairs(query: &str) -> Vec<(String, String)> {
    let plain = |text: &str| text.replace("%3D", "=").replace("%21", "!").replace("%2C", ",").replace("%25", "%");
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), plain(value)))
        .collect()
}

fn list(target: &Target, query: &BTreeMap<String, String>, state: &mut State) -> Response<Answer> {
    *state.lists.entry(target.resource).or_default() += 1;
    let selector = query.get("fieldSelector").cloned().unwrap_or_default();
    let objects = state.objects.get(target.resource).into_iter().flat_map(|objects| objects.values());
    let items: Vec<&Value> = objects.filter(|object| fits(object, &selector)).collect();
    let metadata = json!({ "resourceVersion": state.version.to_string() });
    whole(StatusCode::OK, &json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
}

fn follow(
    target: &Target,
    query: &BTreeMap<String, String>,
    state: &Arc<Mutex<State>>,
    mut connected: Connected,
) -> Response<Answer> {
    let mut at: u64 = query.get("resourceVersion").and_then(|at| at.parse().ok()).unwrap_or(0);
    let selector = query.get("fieldSelector").cloned().unwrap_or_default();
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|wanted| wanted == "true");
    let (lines, receiver) = mpsc::channel(16);
    let (state, resource) = (state.clone(), target.resource);
    tokio::spawn(async move {
        loop {
            let (news, version) = {
                let state = state.lock().unwrap();
                // With the lock held: what is changed after a cut is told on no connection from before it.
                if connected.is_cut() {
                    return;
                }
                if at < state.remembered_from {
                    let error = json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": "too old" });
                    (vec![json!({ "type": "ERROR", "object": error })], None)
                } else {
                    let new = state.past.iter().filter(|it| it.version > at && it.resource == resource);
                    (new.filter_map(|it| event(it, &selector)).collect(), Some(state.version))
                }
            };
            for line in &news {
                if lines.send(Bytes::from(format!("{line}\n"))).await.is_err() {
                    return;
                }
            }
            let Some(version) = version else { return };
            at = version;
            if tokio::time::timeout(BOOKMARK_EVERY, connected.woken.changed()).await.is_err() && bookmarks {
                let object = json!({ "metadata": { "resourceVersion": at.to_string() } });
                let line = json!({ "type": "BOOKMARK", "object": object });
                if lines.send(Bytes::from(format!("{line}\n"))).await.is_err() {
                    return;
                }
            }
        }
    });
    Response::new(Answer::Watch(receiver))
}

/// As a watch with this selector sees it: what no longer fits is gone.
fn event(it: &Happening, selector: &str) -> Option<Value> {
    let fits = |object: &&Value| fits(object, selector);
    let (before, after) = (it.before.as_ref().filter(fits), it.after.as_ref().filter(fits));
    let (kind, object) = match (before, after) {
        (None, None) => return None,
        (None, Some(after)) => ("ADDED", after.clone()),
        (Some(_), Some(after)) => ("MODIFIED", after.clone()),
        (Some(before), None) => {
            let mut gone = before.clone();
            gone["metadata"]["resourceVersion"] = json!(it.version.to_string());
            ("DELETED", gone)
        }
    };
    Some(json!({ "type": kind, "object": object }))
}

type Changed = Result<Response<Answer>, (StatusCode, String)>;

fn bad(message: impl Into<String>) -> (StatusCode, String) {
    (StatusCode::UNPROCESSABLE_ENTITY, message.into())
}

fn create(target: &Target, object: Value, state: &mut State) -> Changed {
    check_event(target, &object)?;
    let key = key_of(&object);
    if state.objects.get(target.resource).is_some_and(|objects| objects.contains_key(&key)) {
        return Err((StatusCode::CONFLICT, format!("{key} already exists")));
    }
    state.put(target.resource, object.clone());
    Ok(whole(StatusCode::CREATED, &object))
}

/// What the real server asks of an event of `events.k8s.io/v1`.
fn check_event(target: &Target, event: &Value) -> Result<(), (StatusCode, String)> {
    if target.resource != "events" {
        return Err((StatusCode::FORBIDDEN, "nobody needs this".to_owned()));
    }
    for field in ["reason", "action", "reportingController", "reportingInstance", "eventTime", "type"] {
        if event[field].as_str().is_none_or(str::is_empty) {
            return Err(bad(format!("{field} is required")));
        }
    }
    let time = event["eventTime"].as_str().unwrap_or_default();
    if time.len() != "2006-01-02T15:04:05.000000Z".len() {
        return Err(bad(format!("eventTime {time}: six digits of a second")));
    }
    let namespace = event["regarding"]["namespace"].as_str().filter(|name| !name.is_empty()).unwrap_or("kube-system");
    if target.namespace.as_deref() != Some(namespace) || event["metadata"]["namespace"] != namespace {
        return Err(bad("the namespace is not that of the object"));
    }
    if event["note"].as_str().is_none_or(|note| note.len() > 1_024) {
        return Err(bad("the note is too long"));
    }
    check_series(&event["series"])
}

fn check_series(series: &Value) -> Result<(), (StatusCode, String)> {
    match series {
        Value::Null => Ok(()),
        series if series["count"].as_u64().is_some_and(|count| count >= 2) => Ok(()),
        _ => Err(bad("series.count: should be at least 2")),
    }
}

fn patch(target: &Target, kind: &str, body: &Value, state: &mut State) -> Changed {
    let name = target.name.as_deref().unwrap_or_default();
    let key = target.namespace.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join("/");
    let Some(mut object) = state.objects.get(target.resource).and_then(|objects| objects.get(&key)).cloned() else {
        return Err((StatusCode::NOT_FOUND, format!("{key} not found")));
    };
    match (target.resource, target.sub.as_deref(), kind) {
        ("nodes", Some("status"), "application/strategic-merge-patch+json") => {
            merge(&mut object["status"], &body["status"]);
        }
        ("pods", None, "application/merge-patch+json") => {
            let uid = &body["metadata"]["uid"];
            if !uid.is_null() && *uid != object["metadata"]["uid"] {
                return Err((StatusCode::CONFLICT, "the uid in the precondition does not match".to_owned()));
            }
            merge(&mut object, body);
        }
        ("events", None, "application/merge-patch+json") => {
            // Everything else of an event is immutable.
            if body.as_object().is_none_or(|fields| fields.keys().any(|field| field != "series")) {
                return Err(bad("field is immutable"));
            }
            check_series(&body["series"])?;
            merge(&mut object, body);
        }
        _ => return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("{kind} of {}", target.resource))),
    }
    state.put(target.resource, object.clone());
    Ok(whole(StatusCode::OK, &object))
}

/// A merge patch; lists of conditions are merged by type, as a strategic one does it.
fn merge(into: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    for (field, value) in fields {
        if field == "conditions" {
            let mut conditions = into["conditions"].as_array().cloned().unwrap_or_default();
            for condition in value.as_array().into_iter().flatten() {
                conditions.retain(|known| known["type"] != condition["type"]);
                conditions.push(condition.clone());
            }
            into["conditions"] = conditions.into();
        } else {
            merge(&mut into[field.as_str()], value);
        }
    }
}
