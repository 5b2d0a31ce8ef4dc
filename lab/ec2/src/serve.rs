//! EC2 and IMDS over HTTP: what comes in becomes plain data, what the state machine answers goes out.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response as HttpResponse;
use flatwire_core::ids::{InstanceId, Time};
use tokio::sync::Notify;

use crate::ec2::{Ec2, Response};
use crate::imds::{ImdsRequest, ImdsResponse};
use crate::params::Params;
use crate::sigv4::SignedRequest;

/// A form with a thousand list entries is well below this.
const BODY_MAX: usize = 1 << 20;
/// The longest the clock of `drive` sleeps without looking.
const IDLE: Duration = Duration::from_secs(60);

type Clock = Arc<dyn Fn() -> Time + Send + Sync>;

/// Finds the instance that an address belongs to.
pub type Identify = Arc<dyn Fn(SocketAddr) -> Option<InstanceId> + Send + Sync>;

/// The machine's own clock.
pub fn wall_clock() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The EC2 endpoint, and STS's GetCallerIdentity. Signatures are checked.
pub fn router(ec2: Arc<Ec2>, clock: impl Fn() -> Time + Send + Sync + 'static) -> Router {
    let clock: Clock = Arc::new(clock);
    Router::new().fallback(answer_query).layer(DefaultBodyLimit::max(BODY_MAX)).with_state((ec2, clock))
}

/// The metadata service of whichever instance a request comes from. To be served with
/// `into_make_service_with_connect_info::<SocketAddr>()`.
pub fn imds_router(ec2: Arc<Ec2>, clock: impl Fn() -> Time + Send + Sync + 'static, identify: Identify) -> Router {
    let clock: Clock = Arc::new(clock);
    Router::new().fallback(answer_imds).with_state((ec2, clock, identify))
}

/// Carries out asynchronous changes when they are due, for as long as it is polled.
pub async fn drive(ec2: Arc<Ec2>, clock: impl Fn() -> Time + Send + Sync) {
    let changed = Arc::new(Notify::new());
    let notify = Arc::clone(&changed);
    ec2.on_change(Box::new(move || notify.notify_one()));
    loop {
        let now = clock();
        ec2.advance(now);
        let wait = ec2.next_transition().map_or(IDLE, |due| Duration::from_millis(due.since_ms(now)).min(IDLE));
        // A change may bring the next transition nearer.
        let _ = tokio::time::timeout(wait, changed.notified()).await;
    }
}

async fn answer_query(State((ec2, clock)): State<(Arc<Ec2>, Clock)>, request: Request) -> HttpResponse {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, BODY_MAX).await else {
        return plain(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large");
    };
    let headers = header_pairs(&parts.headers);
    let query = parts.uri.query().unwrap_or("");
    let signed =
        SignedRequest { method: parts.method.as_str(), path: parts.uri.path(), query, headers: &headers, body: &body };
    let form = String::from_utf8_lossy(&body);
    let params = Params::decode(&format!("{query}&{form}"));
    let now = clock();
    let response = match ec2.authenticate(now, &signed) {
        Ok(caller) => ec2.query(now, &caller, &params),
        Err(error) => ec2.refuse(now, &error, &params),
    };
    if response.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(response.delay_ms)).await;
    }
    into_http(response)
}

fn into_http(response: Response) -> HttpResponse {
    let broken = response.broken;
    let body = if broken {
        // A body that fails makes the server drop the connection in the middle of its answer.
        let failure = io::Error::from(io::ErrorKind::ConnectionReset);
        Body::from_stream(tokio_stream::once(Err::<Bytes, io::Error>(failure)))
    } else {
        Body::from(response.body)
    };
    let mut http = HttpResponse::new(body);
    *http.status_mut() = StatusCode::from_u16(response.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = http.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("text/xml;charset=UTF-8"));
    if let Ok(id) = HeaderValue::from_str(&response.request_id) {
        headers.insert("x-amzn-requestid", id);
    }
    http
}

async fn answer_imds(
    State((ec2, clock, identify)): State<(Arc<Ec2>, Clock, Identify)>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> HttpResponse {
    let Some(instance) = identify(peer) else {
        return plain(StatusCode::NOT_FOUND, "no instance has this address");
    };
    let headers = header_pairs(request.headers());
    let asked = ImdsRequest { method: request.method().as_str(), path: request.uri().path(), headers: &headers };
    let response = ec2.imds_request(clock(), &instance, &asked);
    imds_into_http(response)
}

fn imds_into_http(response: ImdsResponse) -> HttpResponse {
    let mut http = HttpResponse::new(Body::from(response.body));
    *http.status_mut() = StatusCode::from_u16(response.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in response.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            http.headers_mut().insert(name, value);
        }
    }
    http.headers_mut().insert("server", HeaderValue::from_static("EC2ws"));
    http
}

fn plain(status: StatusCode, text: &'static str) -> HttpResponse {
    let mut http = HttpResponse::new(Body::from(text));
    *http.status_mut() = status;
    http
}

fn header_pairs(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect()
}
