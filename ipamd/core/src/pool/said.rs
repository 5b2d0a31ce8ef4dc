//! What is said of this node from outside: by an operator's file, and by the API server. Who wins where both speak is
//! decided here and nowhere else.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{SecurityGroupId, SubnetId};
use crate::settings::Sizing;

/// What holds of this node. The default is that nobody says anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeState {
    pub level: Level,
    /// The node has the taint node.kubernetes.io/unschedulable.
    pub unschedulable: bool,
    /// Pods bound to this node that need an address of the pool, whether they have one yet or not.
    pub scheduled_pods: Option<u32>,
    /// Subnet and groups of new ENIs, with custom networking.
    pub eni_config: Option<EniConfig>,
    /// The node's own sizes of the pool, over those of the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sizing: Option<Sizing>,
    /// Where each part comes from, or why it is not there; what nobody speaks of is absent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<Part, String>,
}

/// A part of what is said of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Level,
    Unschedulable,
    ScheduledPods,
    EniConfig,
    Sizing,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Level => "level",
            Self::Unschedulable => "unschedulable",
            Self::ScheduledPods => "scheduled_pods",
            Self::EniConfig => "eni_config",
            Self::Sizing => "sizing",
        })
    }
}

/// How much the daemon may do in EC2: an operator's brake for incidents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    #[default]
    Normal,
    /// Nothing is given back: no unassign, no detach, no delete.
    NoRelease,
    /// EC2 is not called at all; what the node has is served.
    NoCloud,
}

/// The ENIConfig that applies to this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EniConfig {
    pub subnet: SubnetId,
    /// Empty: those of the primary ENI.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupId>,
}

/// What one source says; its serde form is the operator's file. `None`: it does not speak of that.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Said {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unschedulable: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduled_pods: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eni_config: Option<EniConfig>,
    #[serde(skip)]
    pub sizing: Option<Sizing>,
    /// Where a part was found, or why it was not, in words.
    #[serde(skip)]
    pub places: BTreeMap<Part, String>,
}

impl NodeState {
    /// What the operator's file says holds; of what it does not speak, what the API server says.
    pub fn of(file: &Said, api_server: &Said) -> Self {
        let mut sources = api_server.places.clone();
        let mut from_file = |part, said| {
            if said {
                sources.insert(part, "the node's file".to_owned());
            }
        };
        from_file(Part::Level, file.level.is_some());
        from_file(Part::Unschedulable, file.unschedulable.is_some());
        from_file(Part::ScheduledPods, file.scheduled_pods.is_some());
        from_file(Part::EniConfig, file.eni_config.is_some());
        Self {
            level: file.level.or(api_server.level).unwrap_or_default(),
            unschedulable: file.unschedulable.or(api_server.unschedulable).unwrap_or_default(),
            scheduled_pods: file.scheduled_pods.or(api_server.scheduled_pods),
            eni_config: file.eni_config.as_ref().or(api_server.eni_config.as_ref()).cloned(),
            sizing: api_server.sizing,
            sources,
        }
    }

    /// Something else than the number of pods differs: those come and go all the time.
    pub fn is_news_beside(&self, other: &Self) -> bool {
        Self { scheduled_pods: None, ..self.clone() } != Self { scheduled_pods: None, ..other.clone() }
    }
}

impl fmt::Display for NodeState {
    /// What is said, with where it comes from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {:?}, unschedulable {}", self.level, self.unschedulable)?;
        match &self.eni_config {
            Some(config) => write!(f, ", ENIConfig with {}", config.subnet)?,
            None => write!(f, ", no ENIConfig")?,
        }
        if let Some(sizing) = &self.sizing {
            write!(f, ", {sizing:?}")?;
        }
        self.sources.iter().try_for_each(|(part, source)| write!(f, "; {part}: {source}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_file_wins_where_it_speaks_and_only_there() {
        let file: Said = serde_json::from_str(r#"{"level":"no-release"}"#).unwrap();
        let api_server = Said {
            level: Some(Level::NoCloud),
            unschedulable: Some(true),
            scheduled_pods: Some(7),
            places: [(Part::Level, "annotation flatwire.io/level".to_owned())].into(),
            ..Said::default()
        };
        let state = NodeState::of(&file, &api_server);
        assert_eq!((state.level, state.unschedulable, state.scheduled_pods), (Level::NoRelease, true, Some(7)));
        assert_eq!(state.sources[&Part::Level], "the node's file");
        let file: Said = serde_json::from_str(r#"{"unschedulable":false,"scheduled_pods":3}"#).unwrap();
        let state = NodeState::of(&file, &api_server);
        assert_eq!((state.level, state.unschedulable, state.scheduled_pods), (Level::NoCloud, false, Some(3)));
        assert_eq!(state.sources[&Part::Level], "annotation flatwire.io/level");
        assert_eq!(NodeState::of(&Said::default(), &Said::default()), NodeState::default());
    }

    #[test]
    fn a_file_that_says_little_stays_little_when_it_is_written_again() {
        let said: Said = serde_json::from_str(r#"{"level":"no-cloud"}"#).unwrap();
        assert_eq!(serde_json::to_string(&said).unwrap(), r#"{"level":"no-cloud"}"#);
    }
}
