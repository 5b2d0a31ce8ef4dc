//! Calls to the API server: who is called, as whom, and what a refusal means.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// The longest wait for a connection, and for the head of an answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// A peer that has vanished is noticed within a minute, even on a watch that has nothing to say.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_RETRIES: u32 = 2;
/// Connections that nobody uses any more. Watches keep their own.
const IDLE: Duration = Duration::from_secs(30);
/// Of an answer, what is read at once: a list of many pods must not be in memory whole.
const MAX_READ_BYTES: usize = 64 << 10;
/// A refusal is a few lines; an object we patched comes back whole and is not read.
const MAX_REFUSAL_BYTES: usize = 16 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("read the credentials {path}", path = path.display())]
    Credentials { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no certificate that can be used: {why}", path = path.display())]
    Certificates { path: PathBuf, why: String },
    #[error("the API server is not reached: {0}")]
    Unreachable(String),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("{status}: {message}")]
    Refused { status: StatusCode, message: String, retry_after: Option<Duration> },
    #[error("the answer is not what it should be: {0}")]
    Answer(String),
}

impl ApiError {
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// How long the server wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// Whether this is the URL of an API server; if not, what is. The token is a secret: it leaves this machine only under TLS.
pub fn check_server(server: &str) -> Result<(), &'static str> {
    let allowed = "https://HOST:PORT, or http:// to 127.0.0.1 or [::1]";
    let uri: Uri = server.parse().map_err(|_| allowed)?;
    let own = matches!(uri.host(), Some("127.0.0.1" | "[::1]"));
    match uri.scheme_str() {
        Some("https") if uri.host().is_some() => Ok(()),
        Some("http") if own => Ok(()),
        _ => Err(allowed),
    }
}

pub struct Client {
    http: hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    server: String,
    token: PathBuf,
}

impl Client {
    /// Reads the authority's certificates, and calls nobody.
    pub fn new(server: &str, credentials: &Path) -> Result<Self, ApiError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_WITHIN));
        tcp.set_keepalive(Some(KEEPALIVE));
        tcp.set_keepalive_interval(Some(KEEPALIVE));
        tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        let tls = tls(&credentials.join("ca.crt"), server.starts_with("https"))?;
        let connector = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(1)
            .http1_max_buf_size(MAX_READ_BYTES)
            .build(connector.wrap_connector(tcp));
        let server = server.trim_end_matches('/').to_owned();
        Ok(Self { http, server, token: credentials.join("token") })
    }

    /// The answer's body, still on its way.
    pub async fn get(&self, path: &str) -> Result<Incoming, ApiError> {
        self.call(Method::GET, path, None).await.map(Response::into_body)
    }

    /// Sends a body; what comes back is of no interest.
    pub async fn send(&self, method: Method, path: &str, kind: &'static str, body: Vec<u8>) -> Result<(), ApiError> {
        let mut answer = self.call(method, path, Some((kind, body))).await?.into_body();
        // To its end, so that the connection can be used again.
        let read = async { while let Some(Ok(_)) = answer.frame().await {} };
        tokio::time::timeout(ANSWER_WITHIN, read).await.map_err(|_| ApiError::Timeout(ANSWER_WITHIN))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<(&'static str, Vec<u8>)>,
    ) -> Result<Response<Incoming>, ApiError> {
        // Read each time: it is replaced well before it ends, and calls are few. A few hundred bytes in memory, not worth a
        // thread of their own.
        let token = std::fs::read_to_string(&self.token);
        let token = token.map_err(|source| ApiError::Credentials { path: self.token.clone(), source })?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.server))
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("flatwire-ipamd/", env!("CARGO_PKG_VERSION")))
            .header(AUTHORIZATION, format!("Bearer {}", token.trim()));
        let body = match body {
            Some((kind, body)) => {
                request = request.header(CONTENT_TYPE, kind);
                Bytes::from(body)
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(body)).map_err(|error| ApiError::Answer(error.to_string()))?;
        let answer = tokio::time::timeout(ANSWER_WITHIN, self.http.request(request)).await;
        let answer = answer.map_err(|_| ApiError::Timeout(ANSWER_WITHIN))?;
        let answer = answer.map_err(|error| ApiError::Unreachable(innermost(&error)))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(refusal(answer).await)
    }
}

/// The cause at the bottom says most: hyper's own words are "client error (Connect)".
fn innermost(error: &hyper_util::client::legacy::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    match error.source() {
        Some(_) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// What a `Status` object of the server says, or the first line of whatever stands there.
async fn refusal(answer: Response<Incoming>) -> ApiError {
    let status = answer.status();
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let body = Limited::new(answer.into_body(), MAX_REFUSAL_BYTES).collect();
    let body = match tokio::time::timeout(ANSWER_WITHIN, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        _ => Bytes::new(),
    };
    let message = match serde_json::from_slice::<crate::objects::Status>(&body) {
        Ok(status) => status.message,
        Err(_) => String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned(),
    };
    ApiError::Refused { status, message, retry_after: retry_after.map(Duration::from_secs) }
}

/// Trusts the cluster's authority and nobody else. A plain server needs none.
fn tls(path: &Path, needed: bool) -> Result<rustls::ClientConfig, ApiError> {
    let refused = |why: String| ApiError::Certificates { path: path.to_owned(), why };
    let mut roots = rustls::RootCertStore::empty();
    if needed {
        let pem = std::fs::read(path).map_err(|source| ApiError::Credentials { path: path.to_owned(), source })?;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| refused(error.to_string()))?;
            roots.add(certificate).map_err(|error| refused(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(refused("there is none".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|error| refused(error.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_leaves_the_machine_under_tls_only() {
        for good in ["https://10.100.0.1:443", "https://[fd00::1]:443", "https://x.eks.aws/", "http://127.0.0.1:8001"] {
            assert_eq!(check_server(good), Ok(()), "{good}");
        }
        for bad in ["http://10.100.0.1", "10.100.0.1:443", "ftp://h", "http://localhost:80", "https://", ""] {
            assert!(check_server(bad).is_err(), "{bad}");
        }
    }
}
