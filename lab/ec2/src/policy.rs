//! IAM policies of the kind that nodes have: statements that allow actions on resources, under conditions on tags.
//!
//! An action is allowed if each resource it names, and each action it implies, is allowed by some statement. Which resources
//! an action names is EC2's page of the service authorization reference. A resource that does not exist is not judged: the
//! action itself refuses it. Known are `Allow`, wildcards in actions and resources, and `StringEquals`; whatever else a
//! policy has is refused rather than passed over, because a policy that is half read proves nothing.

use std::collections::{BTreeMap, BTreeSet};

use flatwire_core::ids::{EniId, InstanceId};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use crate::filters::wildcard;
use crate::params::Params;
use crate::state::State;
use crate::view::Tags;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub struct Policy {
    #[serde(rename = "Version")]
    version: String,
    pub(crate) statement: Vec<Statement>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub(crate) struct Statement {
    #[serde(default)]
    sid: String,
    effect: Effect,
    #[serde(deserialize_with = "one_or_more")]
    action: Vec<String>,
    #[serde(deserialize_with = "one_or_more")]
    resource: Vec<String>,
    #[serde(default)]
    condition: Condition,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Effect {
    Allow,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Condition {
    string_equals: BTreeMap<String, String>,
}

/// A policy that cannot be judged here.
#[derive(Debug, thiserror::Error)]
#[error("not a policy that the lab can judge: {0}")]
pub struct PolicyError(#[from] serde_json::Error);

/// One action on one resource, with what conditions may look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) action: String,
    resource: String,
    keys: BTreeMap<String, String>,
}

impl Policy {
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        Ok(serde_json::from_str(text)?)
    }

    /// Every pair of a statement and an action in it, by the statement's name.
    pub fn grants(&self) -> Vec<(String, String)> {
        let of = |s: &Statement| s.action.iter().map(|a| (s.sid.clone(), a.clone())).collect::<Vec<_>>();
        self.statement.iter().flat_map(of).collect()
    }

    /// The policy without an action in one statement.
    pub fn without(&self, sid: &str, action: &str) -> Self {
        let mut lesser = self.clone();
        for statement in lesser.statement.iter_mut().filter(|statement| statement.sid == sid) {
            statement.action.retain(|other| other != action);
        }
        lesser
    }

    pub(crate) fn allows(&self, asked: &Asked) -> bool {
        self.statement.iter().any(|statement| {
            let named = |rule: &String| wildcard(rule, &format!("ec2:{}", asked.action));
            statement.effect == Effect::Allow
                && statement.action.iter().any(named)
                && statement.resource.iter().any(|rule| wildcard(rule, &asked.resource))
                && statement.condition.string_equals.iter().all(|(key, value)| asked.keys.get(key) == Some(value))
        })
    }
}

fn one_or_more<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        More(Vec<String>),
    }
    match Texts::deserialize(from)? {
        Texts::One(text) => Ok(vec![text]),
        Texts::More(texts) if texts.is_empty() => Err(D::Error::custom("an empty list")),
        Texts::More(texts) => Ok(texts),
    }
}

/// Everything that a request must be allowed.
pub(crate) fn asked(state: &State, action: &str, params: &Params) -> Vec<Asked> {
    let arn =
        |kind: &str, id: &str| format!("arn:aws:ec2:{}:{}:{kind}/{id}", state.options.region, state.options.account_id);
    let ask = |action: &str, resource: String, keys: BTreeMap<String, String>| Asked {
        action: action.to_owned(),
        resource,
        keys,
    };
    if action.starts_with("Describe") {
        return vec![ask(action, "*".to_owned(), BTreeMap::new())];
    }
    let requested = keyed("aws:RequestTag/", &request_tags(params));
    let mut all = Vec::new();
    if action == "CreateNetworkInterface" {
        all.push(ask(action, arn("network-interface", "*"), requested.clone()));
        if !requested.is_empty() {
            let created = ("ec2:CreateAction".to_owned(), action.to_owned());
            let keys = requested.clone().into_iter().chain([created]).collect();
            all.push(ask("CreateTags", arn("network-interface", "*"), keys));
        }
        all.extend(params.get("SubnetId").map(|id| ask(action, arn("subnet", id), BTreeMap::new())));
    }
    for id in values(params, "SecurityGroupId.") {
        all.push(ask(action, arn("security-group", id), BTreeMap::new()));
    }
    let attached = params.get("AttachmentId").or_else(|| params.get("Attachment.AttachmentId"));
    let by_attachment = attached.and_then(|attachment| {
        let holds = |eni: &&crate::view::EniInfo| eni.attachment.as_ref().is_some_and(|a| a.id.as_str() == attachment);
        state.enis().values().find(holds)
    });
    let named = values(params, "ResourceId.").chain(params.get("NetworkInterfaceId"));
    let enis: BTreeSet<&EniId> = named
        .filter_map(|id| state.enis().keys().find(|eni| eni.as_str() == id))
        .chain(by_attachment.map(|eni| &eni.id))
        .collect();
    for id in enis {
        let mut keys = keyed("aws:ResourceTag/", &state.enis()[id].tags);
        keys.extend(requested.clone());
        all.push(ask(action, arn("network-interface", id.as_str()), keys));
    }
    let holder = by_attachment.and_then(|eni| Some(eni.attachment.as_ref()?.instance.to_string()));
    if let Some(id) = holder.as_deref().or_else(|| params.get("InstanceId")) {
        let instance = InstanceId::new(id).ok().and_then(|id| state.instances.get(&id));
        all.extend(instance.map(|i| ask(action, arn("instance", id), keyed("aws:ResourceTag/", &i.info.tags))));
    }
    all
}

fn keyed(prefix: &str, tags: &Tags) -> BTreeMap<String, String> {
    tags.iter().map(|(key, value)| (format!("{prefix}{key}"), value.clone())).collect()
}

/// `Tag.1.Key` with `Tag.1.Value`, wherever in the request they stand.
fn request_tags(params: &Params) -> Tags {
    let keys = params.iter().filter(|(name, _)| name.starts_with("Tag") && name.ends_with(".Key"));
    let value = |name: &str| params.get(&format!("{}.Value", name.trim_end_matches(".Key"))).unwrap_or("");
    keys.map(|(name, key)| (key.to_owned(), value(name).to_owned())).collect()
}

fn values<'p>(params: &'p Params, prefix: &'p str) -> impl Iterator<Item = &'p str> {
    params.iter().filter(move |(name, _)| name.starts_with(prefix)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(statement: &str) -> Result<Policy, PolicyError> {
        Policy::parse(&format!(r#"{{"Version":"2012-10-17","Statement":[{statement}]}}"#))
    }

    fn asked(action: &str, tags: &[(&str, &str)]) -> Asked {
        let keys = tags.iter().map(|(k, v)| (format!("aws:ResourceTag/{k}"), (*v).to_owned())).collect();
        let resource = "arn:aws:ec2:us-east-1:1:network-interface/eni-1".to_owned();
        Asked { action: action.to_owned(), resource, keys }
    }

    #[test]
    fn action_resource_and_condition_must_all_fit() {
        let policy = policy(
            r#"{"Effect":"Allow","Action":["ec2:Delete*","ec2:CreateTags"],"Resource":"arn:aws:ec2:*:*:network-interface/*",
                "Condition":{"StringEquals":{"aws:ResourceTag/cluster":"c"}}}"#,
        )
        .unwrap();
        assert!(policy.allows(&asked("DeleteNetworkInterface", &[("cluster", "c"), ("x", "y")])));
        assert!(!policy.allows(&asked("DeleteNetworkInterface", &[("cluster", "other")])));
        assert!(!policy.allows(&asked("DeleteNetworkInterface", &[])));
        assert!(!policy.allows(&asked("DetachNetworkInterface", &[("cluster", "c")])));
        let elsewhere =
            Asked { resource: "arn:aws:ec2:us-east-1:1:subnet/subnet-1".to_owned(), ..asked("CreateTags", &[]) };
        assert!(!policy.allows(&elsewhere));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let allow = r#""Action":"ec2:*","Resource":"*""#;
        assert!(policy(&format!(r#"{{"Effect":"Allow",{allow}}}"#)).is_ok());
        for bad in [
            format!(r#"{{"Effect":"Deny",{allow}}}"#),
            format!(r#"{{"Effect":"Allow",{allow},"NotAction":"ec2:Run"}}"#),
            format!(r#"{{"Effect":"Allow",{allow},"Condition":{{"StringLike":{{"a":"b"}}}}}}"#),
            r#"{"Effect":"Allow","Action":[],"Resource":"*"}"#.to_owned(),
        ] {
            assert!(policy(&bad).is_err(), "{bad}");
        }
    }
}
