//! Writes to the API server as requests: path, kind of patch, body, and what its answer means.

use std::fmt;

use flatwire_core::ids::{PodName, Time};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::Config;
use crate::client::{ApiError, Client};
use crate::events::Event;
use crate::objects::{CONDITION, POD_IPS, RESOURCE};
use crate::outbox::Outcome;
use crate::pressure::Told;
use crate::wanted::reason_of;

const STRATEGIC_MERGE: &str = "application/strategic-merge-patch+json";
const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json";
/// Who reports, in events.
const CONTROLLER: &str = "flatwire.io/ipamd";

/// What a write is about; the order is that of urgency.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Condition,
    Capacity,
    /// By the pod's uid.
    Annotation(String),
    /// By its name.
    Event(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Condition(Told),
    Capacity(u32),
    Annotation { pod: PodName, uid: String, value: String },
    Event(Event),
}

/// For counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    Condition,
    Capacity,
    Annotation,
    Event,
}

impl fmt::Display for WriteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Condition => "condition",
            Self::Capacity => "capacity",
            Self::Annotation => "annotation",
            Self::Event => "event",
        })
    }
}

impl Write {
    pub fn kind(&self) -> WriteKind {
        match self {
            Self::Condition(_) => WriteKind::Condition,
            Self::Capacity(_) => WriteKind::Capacity,
            Self::Annotation { .. } => WriteKind::Annotation,
            Self::Event(_) => WriteKind::Event,
        }
    }
}

/// Makes the call, or the two that an event may need.
pub async fn carry_out(client: &Client, config: &Config, write: &Write) -> Result<(), ApiError> {
    let status = format!("/api/v1/nodes/{}/status", config.node);
    let (path, kind, body) = match write {
        Write::Condition(told) => (status, STRATEGIC_MERGE, condition(told)),
        Write::Capacity(count) => {
            let amount = json!({ RESOURCE: count.to_string() });
            (status, STRATEGIC_MERGE, json!({ "status": { "capacity": amount, "allocatable": amount } }))
        }
        Write::Annotation { pod, uid, value } => {
            let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
            // With the uid it is refused by a pod of the same name that came later.
            (path, MERGE, json!({ "metadata": { "uid": uid, "annotations": { POD_IPS: value } } }))
        }
        Write::Event(event) => return tell(client, config, event).await,
    };
    client.send(Method::PATCH, &path, kind, body.to_string().into_bytes()).await
}

/// The first is made; a repetition counts up the one that is there, which may have been forgotten.
async fn tell(client: &Client, config: &Config, event: &Event) -> Result<(), ApiError> {
    let folder = format!("/apis/events.k8s.io/v1/namespaces/{}/events", namespace_of(event));
    let make = || client.send(Method::POST, &folder, JSON, new_event(event, config).to_string().into_bytes());
    let path = format!("{folder}/{}", event.name);
    let count =
        || client.send(Method::PATCH, &path, MERGE, json!({ "series": series(event) }).to_string().into_bytes());
    if event.count == 1 {
        return match make().await {
            // It is there: an answer was lost.
            Err(error) if error.status() == Some(StatusCode::CONFLICT) => Ok(()),
            outcome => outcome,
        };
    }
    match count().await {
        Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => make().await,
        outcome => outcome,
    }
}

/// What the answer means for the queue.
pub fn outcome(write: &Write, answer: &Result<(), ApiError>) -> Outcome {
    let Err(error) = answer else { return Outcome::Done };
    let pod_is_gone = matches!(error.status(), Some(StatusCode::NOT_FOUND | StatusCode::CONFLICT));
    match write {
        Write::Annotation { .. } if pod_is_gone => Outcome::Pointless,
        _ => Outcome::Failed(error.retry_after()),
    }
}

/// Events about what lies in no namespace lie in the one that every server takes; before 1.21 `default` was refused.
fn namespace_of(event: &Event) -> &str {
    if event.about.namespace.is_empty() { "kube-system" } else { &event.about.namespace }
}

fn condition(told: &Told) -> Value {
    let message = match &told.shortage {
        Some(failure) => failure.message.as_str(),
        None => "pods of this node are given addresses",
    };
    let condition = json!({
        "type": CONDITION,
        "status": if told.shortage.is_some() { "True" } else { "False" },
        "reason": reason_of(told),
        "message": message,
        "lastHeartbeatTime": seconds(told.since),
        "lastTransitionTime": seconds(told.since),
    });
    json!({ "status": { "conditions": [condition] } })
}

fn new_event(event: &Event, config: &Config) -> Value {
    let about = &event.about;
    let mut value = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": { "name": event.name, "namespace": namespace_of(event) },
        "eventTime": micros(event.first),
        "reportingController": CONTROLLER,
        "reportingInstance": config.reporter.chars().take(128).collect::<String>(),
        "action": event.action,
        "reason": event.reason,
        "type": "Warning",
        "note": event.note,
        "regarding": {
            "apiVersion": "v1",
            "kind": about.kind,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        },
    });
    // The server takes a series of two or more.
    if event.count > 1 {
        value["series"] = series(event);
    }
    value
}

fn series(event: &Event) -> Value {
    json!({ "count": event.count, "lastObservedTime": micros(event.last) })
}

fn timestamp(at: Time) -> jiff::Timestamp {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}

fn seconds(at: Time) -> String {
    format!("{:.0}", timestamp(at))
}

/// The server reads exactly six digits.
fn micros(at: Time) -> String {
    format!("{:.6}", timestamp(at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::About;
    use crate::view::tests::config;
    use flatwire_core::pool::{Failure, Reason};

    #[test]
    fn times_are_as_the_server_reads_them() {
        assert_eq!(seconds(Time(1_700_000_000_123)), "2023-11-14T22:13:20Z");
        assert_eq!(micros(Time(1_700_000_000_120)), "2023-11-14T22:13:20.120000Z");
    }

    #[test]
    fn an_event_says_what_the_server_asks_for() {
        let about = About { kind: "Pod", namespace: "shop".into(), name: "web".into(), uid: "u".into() };
        let mut event = Event {
            about,
            name: "web.1".into(),
            reason: "SubnetEmpty".into(),
            action: "AssignAddress",
            note: "no address".into(),
            first: Time(0),
            last: Time(0),
            count: 1,
        };
        let value = new_event(&event, &config());
        assert_eq!((&value["metadata"]["namespace"], &value["regarding"]["uid"]), (&json!("shop"), &json!("u")));
        assert_eq!(value.get("series"), None, "one is no series");
        event.count = 2;
        event.about.namespace = String::new();
        let value = new_event(&event, &config());
        assert_eq!((&value["metadata"]["namespace"], &value["series"]["count"]), (&json!("kube-system"), &json!(2)));
    }

    #[test]
    fn a_condition_carries_its_reason_and_sentence() {
        let failure = Failure::retryable(Reason::InstanceLimit, "the instance is full".into());
        let value = condition(&Told { shortage: Some(failure), since: Time(0) });
        let condition = &value["status"]["conditions"][0];
        assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("InstanceLimit")));
        assert_eq!(condition["message"], "the instance is full");
    }

    #[test]
    fn a_pod_that_is_gone_needs_no_annotation() {
        let write = Write::Annotation {
            pod: PodName { namespace: "d".into(), name: "web".into() },
            uid: "u".into(),
            value: String::new(),
        };
        let refused = |status| Err(ApiError::Refused { status, message: String::new(), retry_after: None });
        assert_eq!(outcome(&write, &refused(StatusCode::CONFLICT)), Outcome::Pointless);
        assert_eq!(outcome(&write, &refused(StatusCode::NOT_FOUND)), Outcome::Pointless);
        assert_eq!(outcome(&write, &refused(StatusCode::FORBIDDEN)), Outcome::Failed(None));
        assert_eq!(outcome(&Write::Capacity(3), &refused(StatusCode::CONFLICT)), Outcome::Failed(None));
        assert_eq!(outcome(&write, &Ok(())), Outcome::Done);
    }
}
