//! Section 1 (configuration), section 2 (parameters, errors), section 3 (life cycle), section 5 (error object).

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::driver::{VERSIONS, World};
use super::node::NO_LINKS;

/// Keys the plugin does not know may stand in a configuration; a runtime passes them on.
#[test]
fn sec1_conf_1_tolerates_unknown_keys() {
    let world = World::new();
    let pod = world.node.pod("a");
    let call = world.call("ADD", "a", &pod).key("somebodyElses", json!({"deep": [1, 2]}));
    call.key("capabilities", json!({"portMappings": true})).key("args", json!({"cni": {}})).run().result();
}

/// A network has a name, which begins with a letter or digit and holds nothing that could leave a folder.
#[test]
fn sec1_conf_2_needs_a_valid_network_name() {
    let world = World::new();
    let pod = world.node.pod("a");
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        assert!(world.call(verb, "a", &pod).without_key("name").run().error(7).contains("name"));
        for name in ["", "../up", "-dash", "a b"] {
            let message = world.call(verb, "a", &pod).key("name", json!(name)).run().error(7);
            assert!(message.contains("name"), "{message}");
        }
    }
}

/// A configuration without version is one of the first version.
#[test]
fn sec1_conf_3_takes_a_missing_version_for_the_first() {
    let world = World::new();
    let pod = world.node.pod("a");
    let outcome = world.call("ADD", "a", &pod).without_key("cniVersion").run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let result: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((&result["cniVersion"], &result["ip4"]["ip"]), (&json!("0.1.0"), &json!("10.77.0.1/32")));
}

/// A version that is not published is refused with code 1, and the message says which one was asked for.
#[test]
fn sec1_conf_4_refuses_unknown_versions() {
    let world = World::new();
    let pod = world.node.pod("a");
    for version in ["0.5.0", "2.0.0", "1.1", "one"] {
        let message = world.call("ADD", "a", &pod).version(version).run().error(1);
        assert!(message.contains(version), "{message}");
    }
    assert_eq!(world.ipamd.state().adds.len(), 0);
}

/// The verb comes from the environment; one that is missing or unknown is an error that names the variable.
#[test]
fn sec2_params_1_needs_a_known_verb() {
    let world = World::new();
    for call in [world.plain("").without("CNI_COMMAND"), world.plain(""), world.plain("REMOVE"), world.plain("add")] {
        assert!(call.run().error(4).contains("CNI_COMMAND"));
    }
}

/// A container id is not empty, begins with a letter or digit, and holds letters, digits, `_`, `.` and `-` only.
#[test]
fn sec2_params_2_refuses_bad_container_ids() {
    let world = World::new();
    let pod = world.node.pod("a");
    for verb in ["ADD", "DEL", "CHECK"] {
        for id in ["", "-a", ".a", "a/b", "a b", "ä"] {
            let message = world.call(verb, "a", &pod).var("CNI_CONTAINERID", id).run().error(4);
            assert!(message.contains("CNI_CONTAINERID"), "{message}");
        }
    }
    world.call("ADD", "a", &pod).var("CNI_CONTAINERID", "0A_z.9-").run().result();
}

/// If the interface name cannot be used, the plugin must say so.
#[test]
fn sec2_params_3_refuses_unusable_interface_names() {
    let world = World::new();
    let pod = world.node.pod("a");
    for verb in ["ADD", "DEL", "CHECK"] {
        for name in ["", ".", "..", "a/b", "a:b", "a b", "sixteencharacter", "eth%d"] {
            let message = world.call(verb, "a", &pod).var("CNI_IFNAME", name).run().error(4);
            assert!(message.contains("CNI_IFNAME"), "{message}");
        }
    }
    world.call("ADD", "a", &pod).var("CNI_IFNAME", "fifteen-letters").run().result();
    assert_eq!(world.node.links_in(&pod), ["fifteen-letters"]);
}

/// Extra arguments are pairs in any order; what they say of the pod reaches the daemon, what is unknown does no harm.
#[test]
fn sec2_params_4_reads_args_in_any_order() {
    let world = World::new();
    let pairs =
        ["K8S_POD_NAME=web-0", "K8S_POD_NAMESPACE=shop", "IgnoreUnknown=1", "K8S_POD_UID=u-1", "MAC=", "FOO=bar"];
    for (turn, name) in ["a", "b", "c", "d", "e", "f"].into_iter().enumerate() {
        let pod = world.node.pod(name);
        let mut pairs = pairs;
        pairs.rotate_left(turn);
        world.call("ADD", name, &pod).var("CNI_ARGS", &pairs.join(";")).run().result();
    }
    for add in &world.ipamd.state().adds {
        assert_eq!((add.pod_name.as_str(), add.pod_namespace.as_str(), add.pod_uid.as_str()), ("web-0", "shop", "u-1"));
    }
    let pod = world.node.pod("g");
    assert!(world.call("ADD", "g", &pod).var("CNI_ARGS", "K8S_POD_NAME").run().error(4).contains("CNI_ARGS"));
}

/// Each verb names the variables it needs when they are missing, and does without the others.
#[test]
fn sec2_params_5_needs_exactly_the_required_variables() {
    let world = World::new();
    let required: [(&str, &[&str]); 4] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
        ("GC", &["CNI_PATH"]),
    ];
    let pod = world.node.pod("a");
    for (verb, names) in required {
        for name in names {
            let message = world.call(verb, "a", &pod).without(name).run().error(4);
            assert!(message.contains(name), "{verb}: {message}");
        }
    }
    let add = world.call("ADD", "a", &pod).without("CNI_ARGS").without("CNI_PATH").run();
    let check = world.call("CHECK", "a", &pod).without("CNI_ARGS").without("CNI_PATH").prev_result(&add.result());
    check.run().silent();
    world.call("DEL", "a", &pod).without("CNI_ARGS").without("CNI_PATH").without("CNI_NETNS").run().silent();
    world.plain("STATUS").without("CNI_PATH").run().silent();
}

/// Success is exit code 0 and failure another; an error is one JSON object on standard output, and standard error, where
/// a runtime looks for nothing, stays quiet.
#[test]
fn sec2_errors_1_exit_codes_and_streams() {
    let world = World::new();
    let pod = world.node.pod("a");
    let outcome = world.call("ADD", "a", &pod).run();
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    let outcome = world.call("ADD", "a", Path::new("/nowhere")).run();
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(1), ""));
    assert_eq!(outcome.stdout.trim_end().lines().count(), 1);
}

/// What does not decode is told as such (code 6): nothing at all, no JSON, no object, more than any runtime sends.
#[test]
fn sec2_errors_2_undecodable_configurations() {
    let world = World::new();
    let pod = world.node.pod("a");
    let huge = format!("{{\"name\":\"{}\"}}", "x".repeat(2 << 20));
    let deep = "[".repeat(100_000);
    for stdin in ["", "\n", "{", "nonsense", "[]", "\"text\"", "null", "{\"cniVersion\":[]}", &huge, &deep, "{}{}"] {
        for verb in ["ADD", "DEL", "GC"] {
            world.call(verb, "a", &pod).stdin(stdin.as_bytes()).run().error(6);
        }
    }
    world.call("ADD", "a", &pod).stdin(&[0xff, 0xfe, b'{']).run().error(6);
    assert_eq!(world.ipamd.state().adds.len(), 0);
}

/// A caller that never closes standard input gets an error in the end, and not a process that hangs.
#[test]
fn sec2_errors_3_ends_by_itself() {
    let world = World::new();
    let started = Instant::now();
    let mut child = world.plain("VERSION").command().spawn().unwrap();
    let _held_open = child.stdin.take();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(started.elapsed() < Duration::from_secs(15));
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["code"], 11);
}

/// A daemon that breaks the connection, or keeps it and says nothing, is as good as away: nothing waits for ever, an ADD
/// may be tried again, and a DEL keeps its release.
#[test]
fn sec2_errors_5_a_daemon_that_does_not_answer() {
    let world = World::new();
    let pod = world.node.pod("a");
    let path = |name: &str| json!(world.node.dir().join(name));
    let (broken, silent) = (path("broken.sock"), path("silent.sock"));
    let listen = |socket: &Value| UnixListener::bind(socket.as_str().unwrap()).unwrap();
    let (breaks, _keeps) = (listen(&broken), listen(&silent));
    thread::spawn(move || {
        for connection in breaks.incoming().flatten() {
            let mut connection = connection;
            let _ = connection.read(&mut [0; 256]);
        }
    });
    for _ in 0..5 {
        world.call("ADD", "a", &pod).key("ipamdSocket", broken.clone()).run().error(11);
    }
    world.plain("STATUS").key("ipamdSocket", broken.clone()).run().error(50);
    world.call("DEL", "a", &pod).key("ipamdSocket", broken).run().silent();
    assert_eq!(world.queued().len(), 1);
    thread::scope(|scope| {
        scope.spawn(|| world.plain("STATUS").key("ipamdSocket", silent.clone()).run().error(50));
        scope.spawn(|| world.call("DEL", "b", &pod).key("ipamdSocket", silent.clone()).run().silent());
    });
    assert_eq!(world.queued().len(), 2);
    assert_eq!(world.node.links_in(&pod), NO_LINKS);
}

/// A value the configuration may not have is code 7 and names the key.
#[test]
fn sec2_errors_4_unusable_values() {
    let world = World::new();
    let pod = world.node.pod("a");
    let table = [
        ("mtu", json!("100")),
        ("mtu", json!(10_000)),
        ("mtu", json!("__MTU__")),
        ("vethPrefix", json!("fivec")),
        ("vethPrefix", json!(1)),
        ("podSGEnforcingMode", json!("perhaps")),
        ("ipamdSocket", json!("relative.sock")),
        ("releaseQueueDir", json!(["x"])),
        ("runtimeConfig", json!("x")),
        ("prevResult", json!("x")),
    ];
    for (key, value) in table {
        let message = world.call("ADD", "a", &pod).key(key, value).run().error(7);
        assert!(message.contains(key), "{message}");
    }
    assert_eq!(world.ipamd.state().adds.len(), 0);
}

/// A field whose wish cannot be met is code 2, with key and value.
#[test]
fn sec5_error_1_unsupported_fields_are_named_with_their_value() {
    let world = World::new();
    let pod = world.node.pod("a");
    let call = world.call("ADD", "a", &pod).key("runtimeConfig", json!({"ips": ["10.9.9.9/32"]}));
    let message = call.run().error(2);
    assert!(message.contains("runtimeConfig.ips") && message.contains("10.9.9.9/32"), "{message}");
}

/// The error object is in the version of the configuration it answers.
#[test]
fn sec5_error_2_speaks_the_version_of_the_configuration() {
    let world = World::new();
    for version in VERSIONS {
        let outcome = world.call("ADD", "a", Path::new("/nowhere")).version(version).run();
        outcome.error(3);
        let unusable = world.call("ADD", "a", Path::new("/nowhere")).version(version).without_key("name").run();
        unusable.error(7);
        assert!(unusable.stdout.contains(&format!("\"cniVersion\":\"{version}\"")), "{unusable:?}");
        let object: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(object["cniVersion"], version);
    }
}

/// Different containers may be set up and taken down at the same time.
#[test]
fn sec3_lifecycle_1_runs_concurrently_for_different_containers() {
    let world = World::new();
    let names: Vec<String> = (0..12).map(|n| format!("pod-{n}")).collect();
    let pods: Vec<_> = names.iter().map(|name| (name, world.node.pod(name))).collect();
    let (world, addresses) = (&world, std::sync::Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for (name, pod) in &pods {
            let addresses = &addresses;
            scope.spawn(move || {
                let result = world.call("ADD", name, pod).run().result();
                addresses.lock().unwrap().push(result["ips"][0]["address"].to_string());
            });
        }
    });
    let mut addresses = addresses.into_inner().unwrap();
    addresses.sort();
    addresses.dedup();
    assert_eq!((addresses.len(), world.node.links().len()), (12, 12));
    thread::scope(|scope| {
        for (name, pod) in &pods {
            scope.spawn(move || world.call("DEL", name, pod).run().silent());
        }
    });
    assert_eq!((world.node.links().len(), world.ipamd.state().held.len()), (0, 0));
}

/// A failed ADD is followed by DEL, which finds nothing and succeeds.
#[test]
fn sec3_lifecycle_2_delete_after_a_failed_add() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.node.set_in(&pod, &["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    world.call("ADD", "a", &pod).run().error(4);
    world.call("DEL", "a", &pod).run().silent();
}

/// The log is a courtesy: it is written where it can be, without the keys of others, and where it cannot, nothing fails.
#[test]
fn sec2_log_1_never_fails_a_verb_and_keeps_no_secrets() {
    let world = World::new();
    let pod = world.node.pod("a");
    let secret = json!({"io.kubernetes.cri.pod-annotations": {"token": "hunter2"}});
    world.call("ADD", "a", &pod).key("runtimeConfig", secret).key("password", json!("hunter2")).run().result();
    let log = world.log();
    assert!(!log.contains("hunter2"), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!((&last["verb"], &last["container"], &last["msg"]), (&json!("ADD"), &json!("a"), &json!("done")));
    world.call("ADD", "a", Path::new("/nowhere")).run().error(3);
    assert!(world.log().lines().last().unwrap().contains("\"code\":3"));
    let blocked = world.node.dir().join("ipamd.sock/plugin.log");
    world.call("DEL", "a", &pod).key("pluginLogFile", json!(blocked)).run().silent();
}
