//! What should stand in the API server and does not: of the node's status, and of pods' annotations. Compared with what is
//! seen there, so that what somebody undoes is done again, and what stands already is not written. Pure.

use std::collections::BTreeMap;

use flatwire_core::ids::PodName;

use crate::events::camel_case;
use crate::objects::{CONDITION, Node};
use crate::pressure::Told;
use crate::view::View;
use crate::writes::{Key, Write};
use crate::{PodAddresses, Report};

/// The reason of the condition while there is no shortage.
pub const ENOUGH: &str = "AddressesAvailable";

/// Every state that differs from what is seen.
pub fn wanted(view: &View, told: &Told, report: &Report) -> BTreeMap<Key, Write> {
    let mut wanted = BTreeMap::new();
    // A pool that does not know its node yet has nothing to tell of it.
    if report.most == 0 {
        return wanted;
    }
    if let Some(node) = view.node() {
        if !shows_condition(node, told) {
            wanted.insert(Key::Condition, Write::Condition(told.clone()));
        }
        // Where no more can be had, what is held is all there is.
        let count = if told.shortage.is_some() { report.total.min(report.most) } else { report.most };
        let text = Some(count.to_string());
        if node.status.capacity.addresses != text || node.status.allocatable.addresses != text {
            wanted.insert(Key::Capacity, Write::Capacity(count));
        }
    }
    wanted
}

/// The annotations that differ: a pod's addresses while it has some, and none once they are released.
pub fn annotations(view: &View, pods: &[PodAddresses]) -> BTreeMap<Key, Write> {
    let mut newest: BTreeMap<&PodName, &PodAddresses> = BTreeMap::new();
    for pod in pods {
        let known = newest.entry(&pod.pod).or_insert(pod);
        if known.since <= pod.since {
            *known = pod;
        }
    }
    let mut wanted = BTreeMap::new();
    for (uid, pod) in view.pods().into_iter().flatten().filter(|(_, pod)| pod.counted) {
        let addresses = newest.get(&pod.name).map(|held| &held.addresses);
        let texts = addresses.into_iter().flatten().map(ToString::to_string);
        let value = texts.collect::<Vec<_>>().join(",");
        if value != pod.annotation.as_deref().unwrap_or_default() {
            let write = Write::Annotation { pod: pod.name.clone(), uid: uid.clone(), value };
            wanted.insert(Key::Annotation(uid.clone()), write);
        }
    }
    wanted
}

pub fn reason_of(told: &Told) -> String {
    told.shortage.as_ref().map_or(ENOUGH.to_owned(), |failure| camel_case(&failure.reason.to_string()))
}

fn shows_condition(node: &Node, told: &Told) -> bool {
    let status = if told.shortage.is_some() { "True" } else { "False" };
    let ours = node.status.conditions.iter().find(|condition| condition.kind == CONDITION);
    ours.is_some_and(|condition| condition.status == status && condition.reason == reason_of(told))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{listed, pod};
    use flatwire_core::ids::Time;
    use flatwire_core::pool::{Failure, Reason};
    use serde_json::{Value, json};

    fn view(status: Value, pods: &[Value]) -> View {
        let mut view = View::new();
        let node = json!({ "metadata": { "name": "node-1", "uid": "n" }, "status": status });
        listed(&[node], |change| view.node_changed(change));
        listed(pods, |change| view.pod_changed(change, true));
        view
    }

    fn held(name: &str, since: u64, addresses: &[&str]) -> PodAddresses {
        let pod = PodName { namespace: "default".into(), name: name.into() };
        PodAddresses {
            pod,
            since: Time(since),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn the_nodes_status_is_written_where_it_differs() {
        let enough = Told { shortage: None, since: Time(0) };
        let short = Told {
            shortage: Some(Failure::retryable(Reason::SubnetEmpty, "subnet-1 has no free address".into())),
            since: Time(0),
        };
        let report = Report { total: 9, most: 27, ..Report::default() };
        let bare = view(json!({}), &[]);
        let both = wanted(&bare, &enough, &report);
        assert_eq!(both.keys().collect::<Vec<_>>(), [&Key::Condition, &Key::Capacity]);
        assert_eq!(wanted(&bare, &short, &report)[&Key::Capacity], Write::Capacity(9), "no more can be had");
        let amount = json!({ "flatwire.io/pod-addresses": "27" });
        let condition = json!([{ "type": "Ready", "status": "True" },
            { "type": "PodAddressPressure", "status": "False", "reason": "AddressesAvailable" }]);
        let right = view(json!({ "capacity": amount, "allocatable": amount, "conditions": condition }), &[]);
        assert!(wanted(&right, &enough, &report).is_empty());
        assert_eq!(wanted(&right, &short, &report).len(), 2);
        let half = view(json!({ "capacity": amount, "conditions": condition }), &[]);
        assert_eq!(wanted(&half, &enough, &report).keys().collect::<Vec<_>>(), [&Key::Capacity]);
        assert!(wanted(&bare, &short, &Report::default()).is_empty(), "a pool that knows nothing tells nothing");
    }

    #[test]
    fn annotations_follow_the_ledger() {
        let pods = [
            pod("new", false, "Running", json!({})),
            pod("right", false, "Running", json!({ "vpc.amazonaws.com/pod-ips": "10.0.0.2" })),
            pod("moved", false, "Running", json!({ "vpc.amazonaws.com/pod-ips": "10.0.0.9" })),
            pod("gone", false, "Running", json!({ "vpc.amazonaws.com/pod-ips": "10.0.0.4" })),
            pod("waits", false, "Pending", json!({})),
            pod("host", true, "Running", json!({})),
        ];
        let held = [
            held("new", 1, &["10.0.0.1", "fd00::1"]),
            held("right", 1, &["10.0.0.2"]),
            held("moved", 5, &["10.0.0.3"]),
            // A sandbox of an earlier life that has not been deleted yet.
            held("moved", 2, &["10.0.0.9"]),
            held("elsewhere", 1, &["10.0.0.7"]),
        ];
        let wanted = annotations(&view(json!({}), &pods), &held);
        let values: Vec<(&str, &str)> = wanted
            .values()
            .map(|write| match write {
                Write::Annotation { uid, value, .. } => (uid.as_str(), value.as_str()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values, [("gone", ""), ("moved", "10.0.0.3"), ("new", "10.0.0.1,fd00::1")]);
    }
}
