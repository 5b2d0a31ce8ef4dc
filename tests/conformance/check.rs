//! Section 2, CHECK.

use flatwire_proto::IpAllocationMetadata;
use serde_json::{Value, json};

use super::driver::World;

/// Right after ADD everything is as ADD made it, in every version that has the verb.
#[test]
fn sec2_check_1_passes_right_after_add() {
    let world = World::new();
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let id = format!("v{}", version.replace('.', "-"));
        let pod = world.node.pod(&id);
        let result = world.call("ADD", &id, &pod).version(version).run().result();
        world.call("CHECK", &id, &pod).prev_result(&result).run().silent();
    }
}

/// What to expect comes from the result of ADD, so without it, or without our interface in it, there is nothing to check.
#[test]
fn sec2_check_2_needs_the_previous_result() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    assert!(world.call("CHECK", "a", &pod).run().error(7).contains("prevResult"));
    for result in [
        json!({"cniVersion": "1.1.0"}),
        json!({"cniVersion": "1.1.0", "interfaces": [{"name": "eth0"}]}),
        json!({"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": pod}]}),
    ] {
        assert!(world.call("CHECK", "a", &pod).prev_result(&result).run().error(7).contains("prevResult"));
    }
}

/// Every part of what ADD made is missed by name.
#[test]
fn sec2_check_3_names_what_is_missing() {
    type Damage = fn(&World, &std::path::Path, &str);
    let damages: [(&str, Damage, &str); 8] = [
        ("link", |world, pod, _| world.node.set_in(pod, &["link", "del", "eth0"]), "eth0"),
        ("down", |world, pod, _| world.node.set_in(pod, &["link", "set", "eth0", "down"]), "eth0"),
        ("mtu", |world, pod, _| world.node.set_in(pod, &["link", "set", "eth0", "mtu", "1400"]), "1400"),
        (
            "address",
            |world, pod, _| {
                world.node.set_in(pod, &["addr", "flush", "dev", "eth0"]);
                world.node.set_in(pod, &["addr", "add", "10.77.99.99/32", "dev", "eth0"]);
            },
            "10.77.0.",
        ),
        ("default", |world, pod, _| world.node.set_in(pod, &["route", "del", "default"]), "default"),
        (
            "gateway",
            |world, pod, _| world.node.set_in(pod, &["neigh", "flush", "all", "nud", "permanent"]),
            "169.254.1.1",
        ),
        ("node-route", |world, _, host| world.node.set(&["route", "flush", "dev", host]), "route"),
        ("node-down", |world, _, host| world.node.set(&["link", "set", host, "down"]), "eni"),
    ];
    let world = World::new();
    for (id, damage, named) in damages {
        let pod = world.node.pod(id);
        let result = world.call("ADD", id, &pod).run().result();
        damage(&world, &pod, result["interfaces"][0]["name"].as_str().unwrap());
        let message = world.call("CHECK", id, &pod).prev_result(&result).run().error(111);
        assert!(message.contains(named), "{id}: {message}");
    }
}

/// A namespace that is gone is a difference too.
#[test]
fn sec2_check_4_misses_the_namespace() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.node.remove_pod(&pod);
    let message = world.call("CHECK", "a", &pod).prev_result(&result).run().error(111);
    assert!(message.contains(pod.to_str().unwrap()), "{message}");
}

/// Later plugins of the chain may have added interfaces and routes; that is not damage.
#[test]
fn sec2_check_5_allows_for_later_plugins() {
    let world = World::new();
    let pod = world.node.pod("a");
    let mut result = world.call("ADD", "a", &pod).run().result();
    world.node.set_in(&pod, &["link", "add", "v4if0", "type", "veth", "peer", "name", "v4peer"]);
    world.node.set_in(&pod, &["link", "set", "v4if0", "up"]);
    world.node.set_in(&pod, &["route", "add", "192.168.0.0/16", "via", "169.254.1.1", "dev", "eth0"]);
    result["interfaces"].as_array_mut().unwrap().push(json!({"name": "v4if0", "sandbox": pod}));
    result["ips"].as_array_mut().unwrap().push(json!({"address": "169.254.172.2/22", "interface": 3}));
    result["routes"].as_array_mut().unwrap().push(json!({"dst": "192.168.0.0/16"}));
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
}

/// The reservation behind the address is checked as well: with the daemon, which must hold it for this sandbox.
#[test]
fn sec2_check_6_compares_the_reservation() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    let key = ("aws-cni".to_owned(), "a".to_owned(), "eth0".to_owned());
    let other = IpAllocationMetadata { ipv4_addr: "10.77.0.200".into(), ..Default::default() };
    world.ipamd.state().held.insert(key.clone(), vec![other]);
    let message = world.call("CHECK", "a", &pod).prev_result(&result).run().error(111);
    assert!(message.contains("10.77.0.1") && message.contains("10.77.0.200"), "{message}");
    world.ipamd.state().held.remove(&key);
    world.call("CHECK", "a", &pod).prev_result(&result).run().error(112);
}

/// A daemon that connectivity depends on and that does not answer is an error; the same check may pass later.
#[test]
fn sec2_check_7_without_daemon_is_try_again_later() {
    let mut world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.ipamd.stop();
    world.call("CHECK", "a", &pod).prev_result(&result).run().error(11);
}

/// The verb exists since 0.4.0.
#[test]
fn sec2_check_8_does_not_exist_before_0_4_0() {
    let world = World::new();
    let pod = world.node.pod("a");
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1"] {
        assert!(world.call("CHECK", "a", &pod).version(version).run().error(1).contains("CHECK"));
    }
}

/// A daemon without the call (the add-on's) leaves the kernel's word, which is checked.
#[test]
fn sec2_check_9_with_the_add_ons_daemon_checks_the_kernel() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().is_the_add_on = true;
    let result: Value = world.call("ADD", "a", &pod).version("0.4.0").run().result();
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    world.node.set_in(&pod, &["link", "del", "eth0"]);
    world.call("CHECK", "a", &pod).prev_result(&result).run().error(111);
}

/// CHECK looks and changes nothing.
#[test]
fn sec2_check_10_changes_nothing() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    // Not the state of links, which the kernel raises a moment after the cable is plugged.
    let state = |world: &World| {
        let node = [["route"], ["rule"]].map(|what| world.node.ip(&what));
        let inside = [["route"], ["rule"]].map(|what| world.node.ip_in(&pod, &what));
        (node, inside, world.node.links(), world.node.links_in(&pod), world.node.addresses_in(&pod, "eth0"))
    };
    let before = state(&world);
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(state(&world), before);
    let ipamd = world.ipamd.state();
    assert_eq!((ipamd.dels.len(), ipamd.adds.len()), (0, 1));
}
