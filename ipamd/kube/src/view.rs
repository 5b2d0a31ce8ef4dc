//! What the API server shows of this node, and what is `Said` of the node by it. Pure.

use std::collections::BTreeMap;

use flatwire_core::ids::{PodName, SecurityGroupId, SubnetId};
use flatwire_core::pool::{EniConfig, Level, Part, Said};
use flatwire_core::settings::{PER_NODE, Sizing};

use crate::Config;
use crate::mirror::Mirror;
use crate::objects::{EniConfigObject, Meta, Node, Object as _, POD_IPS, PREFIX, Pod};
use crate::watch::Change;

/// Pods that are kept of one node: more than any kubelet runs.
const MAX_PODS_KEPT: usize = 4_096;
/// Who manages a node from outside names its ENIConfig by this label, and wins.
const EXTERNAL_ENI_CONFIG: &str = "vpc.amazonaws.com/externalEniConfig";
/// What applies where a node names none.
const DEFAULT_ENI_CONFIG: &str = "default";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
const MAX_PODS: &str = "MAX_PODS";

/// What is kept of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptPod {
    pub name: PodName,
    /// It has or wants an address of the pool.
    pub counted: bool,
    /// Its annotation, if those are ours to write.
    pub annotation: Option<String>,
}

/// Something a person must put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Of the event about it.
    pub reason: &'static str,
    pub text: String,
}

#[derive(Debug)]
pub struct View {
    nodes: Mirror<Node>,
    pods: Mirror<KeptPod>,
    eni_configs: Mirror<EniConfigObject>,
}

impl View {
    pub fn new() -> Self {
        Self { nodes: Mirror::new(1), pods: Mirror::new(MAX_PODS_KEPT), eni_configs: Mirror::new(1) }
    }

    pub fn node_changed(&mut self, change: Change<Node>) {
        self.nodes.apply(change, Node::uid, Some);
    }

    pub fn pod_changed(&mut self, change: Change<Pod>, annotate: bool) {
        self.pods.apply(change, Pod::uid, |pod| {
            let Pod { metadata: Meta { name, namespace, mut annotations, .. }, spec, status } = pod;
            // The server's selector leaves these out; a server that knows no such selector does not.
            let ended = matches!(status.phase.as_str(), "Succeeded" | "Failed");
            let annotation = annotations.remove(POD_IPS).filter(|_| annotate);
            (!ended).then_some(KeptPod { name: PodName { namespace, name }, counted: !spec.host_network, annotation })
        });
    }

    pub fn eni_config_changed(&mut self, change: Change<EniConfigObject>) {
        self.eni_configs.apply(change, EniConfigObject::uid, Some);
    }

    /// Another name is followed from now on.
    pub fn forget_eni_config(&mut self) {
        self.eni_configs = Mirror::new(1);
    }

    pub fn node(&self) -> Option<&Node> {
        self.nodes.only()
    }

    /// By uid, once all of them are known.
    pub fn pods(&self) -> Option<&BTreeMap<String, KeptPod>> {
        self.pods.synced()
    }

    pub fn uid_of(&self, pod: &PodName) -> Option<&str> {
        self.pods()?.iter().find(|(_, kept)| kept.name == *pod).map(|(uid, _)| uid.as_str())
    }

    /// The kubelet takes no more pods: that there is no address for one more is no shortage.
    pub fn is_full(&self) -> bool {
        let most = self.node().and_then(capacity_of_pods);
        let pods = self.pods().map(BTreeMap::len);
        most.zip(pods).is_some_and(|(most, pods)| u32::try_from(pods).is_ok_and(|pods| pods >= most))
    }

    /// The name of the ENIConfig that this node is to have, and where it is named.
    pub fn eni_config_name(&self, config: &Config) -> Option<(String, String)> {
        let Meta { labels, annotations, .. } = &self.node()?.metadata;
        let (annotation, label) = (&config.eni_config_annotation, &config.eni_config_label);
        let places = [
            ("label", EXTERNAL_ENI_CONFIG, labels.get(EXTERNAL_ENI_CONFIG)),
            ("annotation", annotation.as_str(), annotations.get(annotation)),
            ("label", label.as_str(), labels.get(label)),
        ];
        let named = places.into_iter().find_map(|(what, key, name)| {
            let name = name.filter(|name| !name.is_empty())?;
            Some((name.clone(), format!("{what} {key}")))
        });
        Some(named.unwrap_or_else(|| (DEFAULT_ENI_CONFIG.to_owned(), "the node names none".to_owned())))
    }

    /// What all of this says of the node, and what of it cannot be used.
    pub fn said(&self, config: &Config) -> (Said, Vec<Complaint>) {
        let (mut said, mut complaints) = (Said::default(), Vec::new());
        if let Some(pods) = self.pods() {
            let counted = pods.values().filter(|pod| pod.counted).count();
            said.scheduled_pods = Some(u32::try_from(counted).unwrap_or(u32::MAX));
            said.places.insert(Part::ScheduledPods, "its pods in the API server".to_owned());
        }
        let Some(node) = self.node() else { return (said, complaints) };
        let tainted = node.spec.taints.iter().any(|taint| taint.key == UNSCHEDULABLE);
        said.unschedulable = Some(node.spec.unschedulable || tainted);
        said.places.insert(Part::Unschedulable, "its Node".to_owned());
        let own = own_settings(node, &mut complaints);
        if let Some((place, value)) = own.get("level") {
            said.level = level(place, value, &mut complaints);
            if said.level.is_some() {
                said.places.insert(Part::Level, place.clone());
            }
        }
        self.size(&own, node, config, &mut said, &mut complaints);
        if config.custom_networking {
            self.eni_config(config, &mut said, &mut complaints);
        }
        (said, complaints)
    }

    fn size(&self, own: &Own, node: &Node, config: &Config, said: &mut Said, complaints: &mut Vec<Complaint>) {
        let of_kubelet = capacity_of_pods(node).filter(|_| !config.settings.contains_key(MAX_PODS));
        let values = PER_NODE.iter().filter_map(|(key, variable)| Some((*variable, own.get(*key)?.1.clone())));
        let values: BTreeMap<&'static str, String> = values.collect();
        if values.is_empty() && of_kubelet.is_none() {
            return;
        }
        let environment = |name: &str| {
            let kubelets = of_kubelet.filter(|_| name == MAX_PODS).map(|most| most.to_string());
            config.settings.get(name).cloned().or(kubelets)
        };
        let found = Sizing::of_node(&values, environment, config.lenient);
        let places = PER_NODE.iter().filter_map(|(key, variable)| Some((*variable, own.get(*key)?)));
        let places: BTreeMap<&'static str, &(String, String)> = places.collect();
        complaints.extend(found.refused.iter().map(|error| {
            let place = places.get(error.variable()).map(|(place, _)| place.as_str());
            let place = place.unwrap_or("what labels and annotations say of this node");
            Complaint { reason: "InvalidSetting", text: format!("{place} is set aside: {error}") }
        }));
        let held = places.iter().filter(|(variable, _)| found.held.contains(*variable));
        let held = held.map(|(_, (place, value))| format!("{place}={value}"));
        let capacity = of_kubelet.map(|most| format!("{most} pods by the kubelet"));
        said.places.insert(Part::Sizing, held.chain(capacity).collect::<Vec<_>>().join(", "));
        said.sizing = Some(found.sizing);
    }

    fn eni_config(&self, config: &Config, said: &mut Said, complaints: &mut Vec<Complaint>) {
        let Some((name, place)) = self.eni_config_name(config) else { return };
        let mut complain = |text: String| {
            said.places.insert(Part::EniConfig, text.clone());
            complaints.push(Complaint { reason: "ENIConfigUnusable", text });
        };
        match (self.eni_configs.only(), self.eni_configs.synced()) {
            (Some(object), _) => match eni_config_of(object) {
                Ok(eni_config) => {
                    said.eni_config = Some(eni_config);
                    said.places.insert(Part::EniConfig, format!("ENIConfig {name}, by {place}"));
                }
                Err(why) => complain(format!("ENIConfig {name} ({place}) cannot be used: {why}")),
            },
            (None, Some(_)) => complain(format!("there is no ENIConfig {name} ({place})")),
            // It is being looked for.
            (None, None) => {
                drop(said.places.insert(Part::EniConfig, format!("ENIConfig {name} has not been read yet")))
            }
        }
    }
}

/// Settings of the node by their name, with the place and the value.
type Own = BTreeMap<&'static str, (String, String)>;

/// An annotation wins over a label, as with ENIConfigs.
fn own_settings(node: &Node, complaints: &mut Vec<Complaint>) -> Own {
    let Meta { labels, annotations, .. } = &node.metadata;
    let mut own = Own::new();
    for (what, map) in [("label", labels), ("annotation", annotations)] {
        for (key, value) in map {
            let Some(name) = key.strip_prefix(PREFIX) else { continue };
            let known = PER_NODE.iter().map(|(key, _)| *key).chain(["level"]).find(|known| *known == name);
            match known {
                Some(known) => drop(own.insert(known, (format!("{what} {key}"), value.clone()))),
                None => {
                    let known: Vec<&str> = PER_NODE.iter().map(|(key, _)| *key).collect();
                    let text = format!("{what} {key} is no setting of a node; there are level, {}", known.join(", "));
                    complaints.push(Complaint { reason: "InvalidSetting", text });
                }
            }
        }
    }
    own
}

fn level(place: &str, value: &str, complaints: &mut Vec<Complaint>) -> Option<Level> {
    let level = serde_json::from_value(value.into()).ok();
    if level.is_none() {
        let text = format!("{place}={value:?} is not allowed: normal, no-release or no-cloud");
        complaints.push(Complaint { reason: "InvalidSetting", text });
    }
    level
}

fn eni_config_of(object: &EniConfigObject) -> Result<EniConfig, String> {
    let subnet = SubnetId::new(object.spec.subnet.clone()).map_err(|error| format!("its subnet: {error}"))?;
    let groups = object.spec.security_groups.iter().flatten().map(|group| SecurityGroupId::new(group.clone()));
    let security_groups = groups.collect::<Result<_, _>>().map_err(|error| format!("its securityGroups: {error}"))?;
    Ok(EniConfig { subnet, security_groups })
}

/// Pods the kubelet takes, if it says something sensible.
fn capacity_of_pods(node: &Node) -> Option<u32> {
    let most = node.status.capacity.pods.as_ref()?.parse().ok()?;
    (1..=10_000).contains(&most).then_some(most)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use flatwire_core::target::Policy;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    pub fn config() -> Config {
        Config {
            server: "https://10.100.0.1:443".into(),
            node: "node-1".into(),
            reporter: "aws-node-x".into(),
            credentials: crate::CREDENTIALS.into(),
            annotate_pods: true,
            custom_networking: true,
            eni_config_annotation: crate::ENI_CONFIG_KEY.into(),
            eni_config_label: crate::ENI_CONFIG_KEY.into(),
            settings: BTreeMap::new(),
            lenient: false,
        }
    }

    pub fn listed<T: DeserializeOwned>(objects: &[Value], mut apply: impl FnMut(Change<T>)) {
        apply(Change::Listing);
        objects.iter().for_each(|object| apply(Change::Seen(serde_json::from_value(object.clone()).unwrap())));
        apply(Change::Listed);
    }

    /// A view of a node with these labels and annotations.
    pub fn view(labels: Value, annotations: Value) -> View {
        let mut view = View::new();
        let metadata = json!({ "name": "node-1", "uid": "n", "labels": labels, "annotations": annotations });
        let node = json!({ "metadata": metadata, "status": { "capacity": { "pods": "29", "cpu": "2" } } });
        listed(&[node], |change| view.node_changed(change));
        view
    }

    pub fn pod(name: &str, host_network: bool, phase: &str, annotations: Value) -> Value {
        let metadata = json!({ "name": name, "namespace": "default", "uid": name, "annotations": annotations });
        json!({ "metadata": metadata, "spec": { "hostNetwork": host_network }, "status": { "phase": phase } })
    }

    #[test]
    fn pods_count_that_want_an_address_and_have_not_ended() {
        let mut view = View::new();
        assert_eq!(view.said(&config()).0, Said::default(), "nothing is said before anything is known");
        let pods = [
            pod("web", false, "Running", json!({})),
            pod("soon", false, "Pending", json!({})),
            pod("proxy", true, "Running", json!({})),
            pod("job", false, "Succeeded", json!({})),
        ];
        view.pod_changed(Change::Listing, true);
        for one in &pods {
            view.pod_changed(Change::Seen(serde_json::from_value(one.clone()).unwrap()), true);
        }
        assert_eq!(view.said(&config()).0.scheduled_pods, None, "half a list says nothing");
        view.pod_changed(Change::Listed, true);
        assert_eq!(view.said(&config()).0.scheduled_pods, Some(2));
        let ended = serde_json::from_value(pod("web", false, "Failed", json!({}))).unwrap();
        view.pod_changed(Change::Seen(ended), true);
        view.pod_changed(Change::Gone("proxy".into()), true);
        assert_eq!(view.said(&config()).0.scheduled_pods, Some(1));
        assert_eq!(view.pods().unwrap().len(), 1, "what has ended is not kept");
    }

    #[test]
    fn an_eni_config_is_named_by_annotation_then_label_then_is_the_default() {
        let name = |labels, annotations, config: &Config| view(labels, annotations).eni_config_name(config).unwrap().0;
        let key = crate::ENI_CONFIG_KEY;
        assert_eq!(name(json!({}), json!({}), &config()), "default");
        assert_eq!(name(json!({ key: "a" }), json!({}), &config()), "a");
        assert_eq!(name(json!({ key: "a" }), json!({ key: "b" }), &config()), "b");
        assert_eq!(name(json!({ key: "a", EXTERNAL_ENI_CONFIG: "c" }), json!({ key: "b" }), &config()), "c");
        let zone = Config { eni_config_label: "topology.kubernetes.io/zone".into(), ..config() };
        assert_eq!(name(json!({ "topology.kubernetes.io/zone": "eu-1a", key: "a" }), json!({}), &zone), "eu-1a");
    }

    #[test]
    fn an_eni_config_is_used_or_it_is_said_why_not() {
        let mut view = view(json!({ crate::ENI_CONFIG_KEY: "a" }), json!({}));
        let (said, complaints) = view.said(&config());
        assert!(said.eni_config.is_none() && complaints.is_empty(), "it is being looked for");
        let object = |spec: Value| json!({ "metadata": { "name": "a", "uid": "e" }, "spec": spec });
        let good = object(json!({ "subnet": "subnet-1", "securityGroups": ["sg-1"] }));
        listed(&[good], |change| view.eni_config_changed(change));
        let said = view.said(&config()).0;
        assert_eq!(said.eni_config.unwrap().security_groups.len(), 1);
        assert!(said.places[&Part::EniConfig].contains("ENIConfig a, by label"), "{:?}", said.places);
        for (objects, words) in [
            (vec![], "there is no ENIConfig a"),
            (vec![object(json!({ "subnet": "10.0.0.0/24" }))], "10.0.0.0/24"),
            (vec![object(json!({ "subnet": "subnet-1", "securityGroups": ["web"] }))], "web"),
        ] {
            listed(&objects, |change| view.eni_config_changed(change));
            let (said, complaints) = view.said(&config());
            assert!(said.eni_config.is_none());
            assert!(complaints.len() == 1 && complaints[0].text.contains(words), "{complaints:?}");
            assert!(said.places[&Part::EniConfig].contains(words));
        }
        let without = Config { custom_networking: false, ..config() };
        assert!(view.said(&without).1.is_empty(), "nobody asked");
    }

    #[test]
    fn a_nodes_settings_are_read_as_the_environments_and_a_bad_one_is_named() {
        let labels =
            json!({ "flatwire.io/warm-ip-target": "3", "flatwire.io/max-eni": "two", "flatwire.io/colour": "x" });
        let annotations = json!({ "flatwire.io/warm-ip-target": "5", "flatwire.io/level": "no-release" });
        let plain = Config { custom_networking: false, ..config() };
        let (said, complaints) = view(labels, annotations).said(&plain);
        let sizing = said.sizing.unwrap();
        assert!(matches!(sizing.policy, Policy::AddOn(warm) if warm.warm_ip == 5), "the annotation wins: {sizing:?}");
        assert_eq!((sizing.max_eni, sizing.max_pods, said.level), (None, 29, Some(Level::NoRelease)));
        let texts: Vec<&str> = complaints.iter().map(|complaint| complaint.text.as_str()).collect();
        assert!(texts.len() == 2 && texts[0].contains("flatwire.io/colour"), "{texts:?}");
        assert!(texts[1].starts_with("label flatwire.io/max-eni is set aside: MAX_ENI=\"two\""), "{texts:?}");
        let place = &said.places[&Part::Sizing];
        assert!(place.contains("annotation flatwire.io/warm-ip-target=5") && !place.contains("max-eni"), "{place}");
        let set = Config { settings: [(MAX_PODS.to_owned(), "12".to_owned())].into(), ..plain };
        let (said, complaints) = view(json!({}), json!({ "flatwire.io/level": "off" })).said(&set);
        assert_eq!((said.sizing, said.level, complaints.len()), (None, None, 1), "{complaints:?}");
        assert_eq!(said.places.get(&Part::Level), None, "what is not allowed says nothing");
    }

    #[test]
    fn a_node_with_all_the_pods_it_may_have_is_full() {
        let mut view = view(json!({}), json!({}));
        let pods: Vec<Value> = (0..29).map(|n| pod(&format!("p{n}"), n < 2, "Running", json!({}))).collect();
        listed(&pods[1..], |change| view.pod_changed(change, false));
        assert!(!view.is_full());
        listed(&pods, |change| view.pod_changed(change, false));
        assert!(view.is_full());
    }
}
