//! Section 2, DEL.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use serde_json::json;

use super::driver::World;
use super::node::NO_LINKS;

/// The interface, the node's end of it and its route are gone, and the address is free again.
#[test]
fn sec2_del_1_removes_interface_and_releases() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.node.links_in(&pod), NO_LINKS);
    assert_eq!(world.node.links(), NO_LINKS);
    assert_eq!(world.node.route_to("10.77.0.1"), None);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
    assert_eq!(world.queued().len(), 0);
}

/// DEL may come any number of times, in any state of things.
#[test]
fn sec2_del_2_succeeds_again_and_again() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    for _ in 0..2 {
        world.call("DEL", "a", &pod).prev_result(&result).run().silent();
        world.call("DEL", "a", &pod).run().silent();
    }
    world.node.remove_pod(&pod);
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    // The form of containerd's last call.
    world.call("DEL", "a", &pod).var("CNI_NETNS", "").run().silent();
    assert_eq!(world.queued().len(), 0);
}

/// A container nobody ever added is deleted with success.
#[test]
fn sec2_del_3_succeeds_for_a_container_never_added() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("DEL", "a", &pod).run().silent();
    world.call("DEL", "a", Path::new("/nowhere")).run().silent();
    world.call("DEL", "a", &pod).without("CNI_NETNS").without("CNI_ARGS").run().silent();
}

/// Without the namespace and without the result of ADD, the address is released and the node's end goes all the same.
#[test]
fn sec2_del_4_works_without_namespace_and_previous_result() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    world.call("DEL", "a", &pod).var("CNI_NETNS", "").run().silent();
    assert_eq!(world.node.links(), NO_LINKS);
    assert_eq!(world.node.route_to("10.77.0.1"), None);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
}

/// A namespace that has vanished is no reason to keep the address.
#[test]
fn sec2_del_5_releases_when_the_namespace_is_gone() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.node.remove_pod(&pod);
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
    assert_eq!(world.node.route_to("10.77.0.1"), None);
}

/// With the daemon away the pod still ends, and the release is on disk for later, in the form the daemon reads.
#[test]
fn sec2_del_6_succeeds_without_daemon_and_keeps_the_release() {
    let mut world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.ipamd.stop();
    for _ in 0..2 {
        world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    }
    assert_eq!(world.node.links(), NO_LINKS);
    let [entry] = &world.queued()[..] else { panic!("one release is queued") };
    let expected = json!({
        "version": 1, "network": "aws-cni", "container_id": "a", "if_name": "eth0",
        "pod_namespace": "default", "pod_name": "a", "queued_at_ms": entry["queued_at_ms"]
    });
    assert_eq!(entry, &expected);
    assert!(entry["queued_at_ms"].as_u64().is_some_and(|at| at > 1_700_000_000_000));
    assert!(world.log().contains("release queued"));
}

/// A daemon that answers with an error has not released: the release is kept on disk.
#[test]
fn sec2_del_7_keeps_the_release_when_the_daemon_fails() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    world.ipamd.state().del_error = Some(tonic::Status::internal("journal: no space left on device"));
    world.call("DEL", "a", &pod).run().silent();
    assert_eq!(world.queued().len(), 1);
    // A release that goes through later settles it.
    world.ipamd.state().del_error = None;
    world.call("DEL", "a", &pod).run().silent();
    assert_eq!(world.queued().len(), 0);
}

/// The add-on's daemon says in an error text that it does not know the sandbox; that is as good as released.
#[test]
fn sec2_del_8_takes_unknown_for_done() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().is_the_add_on = true;
    world.ipamd.state().del_error = Some(tonic::Status::unknown("1 error occurred: * datastore: unknown pod"));
    world.call("DEL", "a", &pod).run().silent();
    assert_eq!(world.queued().len(), 0);
}

/// The address is free for others only when no packet can reach this pod any more: kernel first, then the daemon.
#[test]
fn sec2_del_9_unwires_before_it_releases() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    let (sender, seen) = mpsc::channel();
    let ip: Command = world.node.command("ip");
    let (program, args): (_, Vec<_>) = (ip.get_program().to_owned(), ip.get_args().map(ToOwned::to_owned).collect());
    world.ipamd.state().on_del = Some(Box::new(move || {
        let output = Command::new(&program).args(&args).args(["-4", "route", "show"]).output().unwrap();
        let _ = sender.send(String::from_utf8(output.stdout).unwrap());
    }));
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(seen.recv().unwrap(), "");
}

/// A pod's next sandbox has the same name, and so the same link name. A late DEL of the sandbox before leaves it alone,
/// whether or not the daemon is there to ask.
#[test]
fn sec2_del_10_leaves_the_next_sandbox_of_the_pod_alone() {
    let mut world = World::new();
    let (old, new) = (world.node.pod("old"), world.node.pod("new"));
    let args = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0";
    let before = world.call("ADD", "old", &old).var("CNI_ARGS", args).run().result();
    world.node.remove_pod(&old);
    let after = world.call("ADD", "new", &new).var("CNI_ARGS", args).run().result();
    assert_eq!(before["interfaces"][0], after["interfaces"][0]);

    let late = |world: &World| {
        world.call("DEL", "old", &old).var("CNI_ARGS", args).prev_result(&before).run().silent();
        world.call("DEL", "old", &old).var("CNI_ARGS", args).var("CNI_NETNS", "").run().silent();
    };
    late(&world);
    assert_eq!(world.ipamd.held("old", "eth0").len(), 0);
    world.call("CHECK", "new", &new).var("CNI_ARGS", args).prev_result(&after).run().silent();
    world.ipamd.stop();
    late(&world);
    assert_eq!(world.node.links_in(&new), ["eth0"]);
    assert!(world.node.route_to("10.77.0.2").is_some());
}

/// A result the add-on wrote (no routes, random MACs, rules per pod) is as good as ours.
#[test]
fn sec2_del_11_takes_down_what_the_add_on_set_up() {
    let world = World::new();
    let pod = world.node.pod("a");
    let net = pod.to_str().unwrap();
    let (host, args) = ("eni5f6d6b7710e", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=sample-pod-1");
    world.node.set(&["link", "add", host, "type", "veth", "peer", "name", "tmp0"]);
    world.node.set(&["link", "set", "tmp0", "netns", net, "name", "eth0"]);
    world.node.set_in(&pod, &["link", "set", "eth0", "up"]);
    world.node.set(&["link", "set", host, "up"]);
    world.node.set(&["route", "add", "10.0.17.25/32", "dev", host, "scope", "link"]);
    world.node.set(&["rule", "add", "priority", "512", "to", "10.0.17.25/32", "lookup", "main"]);
    world.node.set(&["rule", "add", "priority", "1536", "from", "10.0.17.25/32", "lookup", "2"]);
    let result = json!({
        "cniVersion": "0.4.0",
        "interfaces": [
            {"name": host}, {"name": "eth0", "mac": "2", "sandbox": pod},
            {"name": "dummy5f6d6b7710e", "mac": "0", "sandbox": "1"}
        ],
        "ips": [{"version": "4", "interface": 1, "address": "10.0.17.25/32"}],
        "dns": {}
    });
    world.call("DEL", "a", &pod).var("CNI_ARGS", args).prev_result(&result).run().silent();
    assert_eq!(world.node.links(), NO_LINKS);
    let rules = world.node.ip(&["rule", "show"]).to_string();
    assert!(!rules.contains("10.0.17.25"), "{rules}");
    assert_eq!(world.node.route_to("10.0.17.25"), None);
}

/// Settings that only ADD uses, or that are broken, do not keep a pod from ending.
#[test]
fn sec2_del_12_does_not_stumble_over_settings() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    let call = world.call("DEL", "a", &pod).key("mtu", json!("broken")).key("podSGEnforcingMode", json!(5));
    call.key("vethPrefix", json!("much too long")).var("CNI_ARGS", "broken").run().silent();
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
    assert_eq!(world.node.links_in(&pod), NO_LINKS);
}

/// A namespace path may lead to the runtime's own by now (`/proc/<pid>/ns/net` of a number in use again). Then the
/// address is released and nothing of the node is touched.
#[test]
fn sec2_del_13_never_touches_its_own_namespace() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.node.remove_pod(&pod);
    world.node.set(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
    world.call("DEL", "a", Path::new("/proc/self/ns/net")).prev_result(&result).run().silent();
    let mut links = world.node.links();
    links.sort();
    assert_eq!(links, ["eth0", "eth1"]);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
}

/// A queue that is full does not hold up the pod; it is said loudly.
#[test]
fn sec2_del_14_succeeds_with_a_full_queue() {
    let mut world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.stop();
    std::fs::create_dir(world.queue()).unwrap();
    for number in 0..4096 {
        std::fs::write(world.queue().join(format!("{number}.json")), b"{}").unwrap();
    }
    world.call("DEL", "a", &pod).run().silent();
    assert!(world.log().contains("release queue full"), "{}", world.log());
}

/// Only when neither the daemon nor the disk takes the release is DEL to be called again.
#[test]
fn sec2_del_15_asks_to_be_called_again_when_nothing_keeps_the_release() {
    let mut world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.stop();
    let blocked = world.node.dir().join("file");
    std::fs::write(&blocked, b"").unwrap();
    world.call("DEL", "a", &pod).key("releaseQueueDir", json!(blocked.join("queue"))).run().error(11);
}

/// The policy agent hears of the end; if it is away, the pod ends all the same.
#[test]
fn sec2_del_16_tells_the_policy_agent() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().policy_mode = "standard".into();
    world.call("ADD", "a", &pod).run().result();
    world.call("DEL", "a", &pod).run().silent();
    assert_eq!(world.ipamd.state().forgotten[0].pod_name, "a");
    world.call("ADD", "a", &pod).run().result();
    world.call("DEL", "a", &pod).key("npaSocket", json!("/nowhere/npa.sock")).run().silent();
}
