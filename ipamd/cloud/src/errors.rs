//! Failures of the SDK and of IMDS as `CloudError`.
//!
//! Where EC2 answered with a code, the code, the message and the request id are passed on, and the class is
//! `CloudErrorKind::classify`'s. Where no code arrived the code is ours: `Timeout`, `Connection`, `Malformed` or
//! `Credentials`. All of these are `Transient`: the call may have happened.

use std::error::Error;
use std::time::Duration;

use aws_config::imds::client::error::ImdsError;
use aws_sdk_ec2::config::http::HttpResponse;
use aws_sdk_ec2::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::operation::RequestId;
use flatwire_core::error::chain;
use flatwire_core::ports::{CloudError, CloudErrorKind, Want};

/// IAM's encoded denials run to kilobytes; a pod event and a log line do not.
const MAX_MESSAGE_CHARS: usize = 1024;
/// Enough of a foreign body to tell a proxy's page from a server's stack trace.
const MAX_BODY_CHARS: usize = 160;

/// A code with its class. The message is cut to a length that events and logs carry.
pub fn error(action: &str, code: &str, message: impl AsRef<str>) -> CloudError {
    let message: String = message.as_ref().chars().take(MAX_MESSAGE_CHARS).collect();
    CloudError {
        kind: CloudErrorKind::classify(action, code, &message),
        action: action.to_owned(),
        code: code.to_owned(),
        message,
        request_id: None,
    }
}

pub fn timeout(action: &str, message: String) -> CloudError {
    error(action, "Timeout", message)
}

pub fn connection(action: &str, message: String) -> CloudError {
    error(action, "Connection", message)
}

/// An answer arrived that says neither yes nor no.
pub fn malformed(action: &str, message: String) -> CloudError {
    error(action, "Malformed", message)
}

/// A request that cannot be put to EC2 at all.
pub fn invalid(action: &str, message: String) -> CloudError {
    error(action, "InvalidParameterValue", message)
}

/// The SDK's error of `action`.
pub fn from_sdk<E>(action: &str, failure: SdkError<E, HttpResponse>) -> CloudError
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    let mut mapped = match &failure {
        SdkError::ConstructionFailure(_) => invalid(action, chain(&failure)),
        SdkError::TimeoutError(_) => timeout(action, chain(&failure)),
        SdkError::DispatchFailure(cause) if cause.is_timeout() => timeout(action, chain(&failure)),
        SdkError::DispatchFailure(cause) if cause.is_io() => connection(action, chain(&failure)),
        // Neither time nor wire, and without a retry class: the request was not signed, so it was not sent. Credentials
        // may turn up later.
        SdkError::DispatchFailure(cause) if cause.as_other().is_none() && says_identity(&failure) => {
            error(action, "Credentials", chain(&failure))
        }
        SdkError::DispatchFailure(_) => connection(action, chain(&failure)),
        SdkError::ServiceError(service) => match service.err().code() {
            Some(code) => error(action, code, service.err().message().unwrap_or("")),
            None => unreadable(action, service.raw()),
        },
        SdkError::ResponseError(response) => unreadable(action, response.raw()),
        _ => connection(action, chain(&failure)),
    };
    mapped.request_id = failure.raw_response().and_then(request_id);
    mapped
}

/// What a full subnet means depends on what was asked. EC2 answers a request for single addresses with the very words
/// it uses when no aligned /28 is free, and then there is no falling back to single addresses. And a refused prefix
/// proves only that no /28 is free, whichever of its three codes EC2 chose: there may still be addresses.
pub fn for_want(want: Want, mut failure: CloudError) -> CloudError {
    if matches!(failure.kind, CloudErrorKind::Fragmented | CloudErrorKind::SubnetEmpty) {
        failure.kind = match want {
            Want::Addresses(_) => CloudErrorKind::SubnetEmpty,
            Want::Prefixes(_) => CloudErrorKind::Fragmented,
        };
    }
    failure
}

/// A body that is no EC2 answer: an HTML page of a proxy or a mock, an empty 503 of a load balancer, a cut document.
fn unreadable(action: &str, response: &HttpResponse) -> CloudError {
    let body = String::from_utf8_lossy(response.body().bytes().unwrap_or_default());
    let start: String = body.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_BODY_CHARS).collect();
    malformed(action, format!("http {} with a body that is no EC2 answer: {start:?}", response.status().as_u16()))
}

/// The SDK hands on a failed search for credentials as a failed dispatch; only its words tell it from a torn
/// connection.
fn says_identity(failure: &(dyn Error + 'static)) -> bool {
    let text = chain(failure).to_ascii_lowercase();
    text.contains("credential") || text.contains("identity")
}

/// From the header, else from the body: EC2 sends both, some endpoints in between only the body.
fn request_id(response: &HttpResponse) -> Option<String> {
    if let Some(id) = response.request_id() {
        return Some(id.to_owned());
    }
    let body = std::str::from_utf8(response.body().bytes()?).ok()?;
    ["RequestID", "RequestId", "requestId"].into_iter().find_map(|tag| {
        let (_, rest) = body.split_once(&format!("<{tag}>"))?;
        let (id, _) = rest.split_once("</")?;
        (!id.is_empty()).then(|| id.to_owned())
    })
}

/// IMDS's error on `path`. A 404 is no error and does not come here.
pub fn from_imds(action: &str, path: &str, failure: &ImdsError, waited: Duration) -> CloudError {
    match failure {
        ImdsError::ErrorResponse(answer) => {
            let status = answer.response().status().as_u16();
            match status {
                403 => error(
                    action,
                    "Blocked",
                    format!("the metadata service refuses {path} (http 403): is IMDS disabled?"),
                ),
                429 => {
                    error(action, "Throttling", format!("the metadata service is asked too often (http 429 on {path})"))
                }
                _ => malformed(action, format!("the metadata service answers {path} with http {status}")),
            }
        }
        ImdsError::FailedToLoadToken(token) if !token.is_dispatch_failure() => {
            let text = chain(failure);
            if text.contains("forbidden") {
                error(action, "Blocked", format!("no session token from IMDS: {text}"))
            } else if text.contains("imeout") || text.contains("timed out") {
                timeout(
                    action,
                    format!(
                        "no session token from IMDS: {text}; outside the host's network its hop limit may be too low"
                    ),
                )
            } else {
                malformed(action, format!("no session token from IMDS: {text}"))
            }
        }
        _ => {
            let text = format!("IMDS {path}: {}", chain(failure));
            let debug = DisplayErrorContext(failure).to_string();
            if debug.contains("Timeout") {
                timeout(action, format!("{text} after {waited:.1?}"))
            } else {
                connection(action, text)
            }
        }
    }
}
