//! Section 2, GC, STATUS and VERSION, and section 5, version result.

use std::time::Duration;

use flatwire_proto::Reason;
use serde_json::{Value, json};

use super::driver::{VERSIONS, World};
use super::ipamd::failure;
use super::node::NO_LINKS;

const LIST: &str = "cni.dev/valid-attachments";

/// What is not in the list goes, reservation and links; what is in the list stays; nothing is printed.
#[test]
fn sec2_gc_1_removes_what_is_stale_and_nothing_else() {
    let world = World::new();
    let pods: Vec<_> = ["live", "stale", "gone"].map(|id| (id, world.node.pod(id))).into();
    let results: Vec<Value> = pods.iter().map(|(id, pod)| world.call("ADD", id, pod).run().result()).collect();
    world.node.remove_pod(&pods[2].1);
    let list = json!([{"containerID": "live", "ifname": "eth0"}, {"containerID": "never", "ifname": "eth0"}]);
    world.plain("GC").key(LIST, list).run().silent();
    assert_eq!(world.node.links(), [results[0]["interfaces"][0]["name"].as_str().unwrap()]);
    assert_eq!(["live", "stale", "gone"].map(|id| world.ipamd.held(id, "eth0").len()), [1, 0, 0]);
    world.call("CHECK", "live", &pods[0].1).prev_result(&results[0]).run().silent();
}

/// An attachment is a container and an interface: one of the two alone does not keep the other.
#[test]
fn sec2_gc_2_tells_attachments_by_container_and_interface() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    world.call("ADD", "a", &pod).var("CNI_IFNAME", "net1").run().result();
    world.plain("GC").key(LIST, json!([{"containerID": "a", "ifname": "net1"}])).run().silent();
    assert_eq!((world.ipamd.held("a", "eth0").len(), world.ipamd.held("a", "net1").len()), (0, 1));
    assert_eq!(world.node.links_in(&pod), ["net1"]);
}

/// An empty list is an order to remove everything; a missing one is no order at all.
#[test]
fn sec2_gc_3_a_missing_list_is_not_an_empty_one() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    assert!(world.plain("GC").run().error(7).contains(LIST));
    assert!(world.plain("GC").key(LIST, json!("all")).run().error(7).contains(LIST));
    assert_eq!(world.ipamd.state().gcs.len(), 0);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 1);
    world.plain("GC").key(LIST, json!([])).run().silent();
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
    // How a runtime in Go writes an empty list.
    world.plain("GC").key(LIST, Value::Null).run().silent();
}

/// After an error the rest is removed all the same, and the error is told at the end.
#[test]
fn sec2_gc_4_goes_on_after_an_error_and_tells_it() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    world.ipamd.state().gc_failure = Some(failure(Reason::Ledger, false, "journal: no space left on device"));
    let outcome = world.plain("GC").key(LIST, json!([])).run();
    outcome.error(114);
    assert!(outcome.stdout.contains("no space left on device"));
    assert_eq!(world.node.links(), NO_LINKS);
}

/// GC again finds nothing and succeeds; without the daemon it may succeed later; before 1.1.0 there is no GC.
#[test]
fn sec2_gc_5_again_without_daemon_and_in_old_versions() {
    let mut world = World::new();
    for _ in 0..2 {
        world.plain("GC").key(LIST, json!([])).run().silent();
    }
    for version in &VERSIONS[..6] {
        assert!(world.plain("GC").key(LIST, json!([])).version(version).run().error(1).contains("GC"));
    }
    world.ipamd.state().is_the_add_on = true;
    world.plain("GC").key(LIST, json!([])).run().error(107);
    world.ipamd.stop();
    world.plain("GC").key(LIST, json!([])).run().error(11);
}

/// Ready to serve ADD is exit code 0 and no output; no parameter of an attachment is needed.
#[test]
fn sec2_status_1_succeeds_when_ready() {
    let world = World::new();
    let outcome = world.plain("STATUS").run();
    outcome.silent();
    assert!(outcome.took < Duration::from_secs(2), "runtimes ask every few seconds: {outcome:?}");
    world.ipamd.state().is_the_add_on = true;
    world.plain("STATUS").run().silent();
}

/// Resources used up are code 50, with the reason an ADD would be given.
#[test]
fn sec2_status_2_tells_exhaustion() {
    let world = World::new();
    for retryable in [true, false] {
        let text = "subnet-0abc has no free address since 14:02";
        world.ipamd.state().refuse = Some(failure(Reason::SubnetEmpty, retryable, text));
        assert!(world.plain("STATUS").run().error(50).contains(text));
    }
}

/// A daemon that is away is code 50 as well.
#[test]
fn sec2_status_3_tells_a_missing_daemon() {
    let mut world = World::new();
    world.ipamd.stop();
    assert!(world.plain("STATUS").run().error(50).contains("ipamd.sock"));
}

/// The other verbs do not care what STATUS said, or whether it was asked.
#[test]
fn sec2_status_4_is_only_information() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.ipamd.state().refuse = Some(failure(Reason::SubnetEmpty, false, "empty"));
    world.plain("STATUS").run().error(50);
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    world.ipamd.state().refuse = None;
    world.call("ADD", "a", &pod).run().result();
}

/// The verb exists since 1.1.0.
#[test]
fn sec2_status_5_does_not_exist_before_1_1_0() {
    let world = World::new();
    for version in &VERSIONS[..6] {
        assert!(world.plain("STATUS").version(version).run().error(1).contains("STATUS"));
    }
}

/// The list of versions, in an object of the version that was asked in; nothing but the verb is needed.
#[test]
fn sec2_version_1_lists_the_supported_versions() {
    let world = World::new();
    for version in VERSIONS {
        let stdin = json!({ "cniVersion": version }).to_string();
        let outcome = world.plain("VERSION").without("CNI_PATH").stdin(stdin.as_bytes()).run();
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        let answer: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(answer, json!({ "cniVersion": version, "supportedVersions": VERSIONS }));
    }
}

/// Every version in the list is really spoken, and a prober that sends nothing gets an answer, daemon or not.
#[test]
fn sec2_version_2_answers_without_input_and_without_daemon() {
    let mut world = World::new();
    world.ipamd.stop();
    let outcome = world.plain("VERSION").stdin(b"").run();
    let answer: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((outcome.code, &answer["cniVersion"]), (Some(0), &json!("1.1.0")));
    world.plain("VERSION").stdin(b"nonsense").run().error(6);
    for version in answer["supportedVersions"].as_array().unwrap() {
        let pod = world.node.dir().join("none");
        world.call("DEL", "a", &pod).version(version.as_str().unwrap()).run().silent();
    }
}
