//! Section 2, ADD, and section 5, ADD success.

use std::path::Path;
use std::time::Duration;

use flatwire_proto::{IpAllocationMetadata, Reason};
use flatwire_tests::eventually;
use serde_json::json;

use super::driver::{VERSIONS, World};
use super::ipamd::failure;
use super::node::NO_LINKS;

/// The interface that was asked for exists in the namespace that was asked for, up, with its address, and leads out.
#[test]
fn sec2_add_1_creates_the_interface_in_the_namespace() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).key("mtu", json!(8951)).run().result();

    let link = &world.node.ip_in(&pod, &["link", "show", "dev", "eth0"])[0];
    assert_eq!(link["mtu"], 8951);
    assert!(link["flags"].as_array().unwrap().contains(&json!("UP")), "{link}");
    assert_eq!(world.node.addresses_in(&pod, "eth0"), ["10.77.0.1/32"]);
    let routes = world.node.ip_in(&pod, &["route", "show"]);
    let default = routes.as_array().unwrap().iter().find(|route| route["dst"] == "default").unwrap();
    assert_eq!((&default["gateway"], &default["dev"]), (&json!("169.254.1.1"), &json!("eth0")));

    let host_if = world.node.route_to("10.77.0.1").unwrap();
    let host = &world.node.ip(&["link", "show", "dev", &host_if])[0];
    assert!(host["flags"].as_array().unwrap().contains(&json!("UP")), "{host}");
    // The gateway is nobody's address: the pod knows the other end of its cable for good.
    let neighbours = world.node.ip_in(&pod, &["neigh", "show", "nud", "permanent"]);
    assert_eq!((&neighbours[0]["dst"], &neighbours[0]["lladdr"]), (&json!("169.254.1.1"), &host["address"]));
}

/// The answer is a result in the version of the configuration, with the interfaces made and the addresses given.
#[test]
fn sec2_add_2_prints_a_result_in_every_version() {
    let world = World::new();
    for version in VERSIONS {
        let id = format!("v{}", version.replace('.', "-"));
        let pod = world.node.pod(&id);
        let result = world.call("ADD", &id, &pod).version(version).run().result();
        let address = world.ipamd.held(&id, "eth0")[0];
        if version < "0.3.0" {
            assert_eq!(result["ip4"]["ip"], format!("{address}/32"));
            continue;
        }
        assert_eq!(result["ips"][0]["address"], format!("{address}/32"));
        assert_eq!(result["ips"][0]["interface"], 1);
        let inside = &result["interfaces"][1];
        assert_eq!((&inside["name"], &inside["sandbox"]), (&json!("eth0"), &json!(pod)));
        let host_if = world.node.route_to(&address.to_string()).unwrap();
        assert_eq!(result["interfaces"][0]["name"], host_if);
        assert!(result["interfaces"][0].get("sandbox").is_none());
    }
}

/// The encoding by which either implementation takes down what the other has set up: the route table in `mac`, the device
/// number in the `sandbox` of a last entry.
#[test]
fn sec5_add_1_result_is_readable_by_the_add_on() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().answer = Some(vec![IpAllocationMetadata {
        ipv4_addr: "10.0.17.25".into(),
        ipv6_addr: String::new(),
        device_number: 1,
        route_table_id: 2,
        egress_ipv4_addr: String::new(),
    }]);
    let args = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=sample-pod-1";
    let mut result = world.call("ADD", "a", &pod).version("0.4.0").var("CNI_ARGS", args).run().result();
    result.as_object_mut().unwrap().remove("routes");
    let expected = json!({
        "cniVersion": "0.4.0",
        "interfaces": [
            {"name": "eni5f6d6b7710e"},
            {"name": "eth0", "mac": "2", "sandbox": pod},
            {"name": "dummy5f6d6b7710e", "mac": "0", "sandbox": "1"}
        ],
        "ips": [{"version": "4", "interface": 1, "address": "10.0.17.25/32"}],
        "dns": {}
    });
    assert_eq!(result, expected);
}

/// Routes made in the pod are told; what 1.1.0 added to interfaces and routes is told there and nowhere else.
#[test]
fn sec5_add_2_routes_and_mtu() {
    let world = World::new();
    let (old, new) = (world.node.pod("old"), world.node.pod("new"));
    let result = world.call("ADD", "old", &old).version("1.0.0").run().result();
    assert_eq!(result["routes"], json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]));
    let result = world.call("ADD", "new", &new).run().result();
    assert_eq!(result["interfaces"][1]["mtu"], 9001);
    let routes = json!([{"dst": "169.254.1.1/32", "scope": 253}, {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]);
    assert_eq!(result["routes"], routes);
}

/// DNS settings of the configuration are passed to the runtime.
#[test]
fn sec5_add_3_dns_of_the_configuration_is_told() {
    let world = World::new();
    let pod = world.node.pod("a");
    let dns = json!({"nameservers": ["169.254.20.10"], "search": ["svc.local"]});
    assert_eq!(world.call("ADD", "a", &pod).key("dns", dns.clone()).run().result()["dns"], dns);
}

/// Behind another plugin, what that one did stays in the result and ours is added.
#[test]
fn sec2_add_3_keeps_the_previous_result() {
    let world = World::new();
    let pod = world.node.pod("a");
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "br0", "mac": "02:00:00:00:00:01"}, {"name": "net0", "sandbox": pod}],
        "ips": [{"interface": 1, "address": "192.168.7.2/32", "gateway": "192.168.7.1"}],
        "routes": [{"dst": "192.168.0.0/16", "gw": "192.168.7.1"}],
        "dns": {"domain": "example.org"}
    });
    let result = world.call("ADD", "a", &pod).prev_result(&previous).run().result();
    for key in ["interfaces", "ips", "routes"] {
        let (before, after) = (previous[key].as_array().unwrap(), result[key].as_array().unwrap());
        assert_eq!(&after[..before.len()], &before[..], "{key}");
        assert!(after.len() > before.len());
    }
    assert_eq!(result["dns"], previous["dns"]);
    assert_eq!((&result["ips"][1]["interface"], &result["interfaces"][3]["name"]), (&json!(3), &json!("eth0")));
    // CHECK and DEL find our part in it.
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.node.links_in(&pod), NO_LINKS);
}

/// An interface of that name in the namespace is an error; it stays as it is, and no address is taken.
#[test]
fn sec2_add_4_refuses_an_interface_name_in_use() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.node.set_in(&pod, &["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    let message = world.call("ADD", "a", &pod).run().error(4);
    assert!(message.contains("eth0") && message.contains(pod.to_str().unwrap()), "{message}");
    let mut links = world.node.links_in(&pod);
    links.sort();
    assert_eq!(links, ["eth0", "other"]);
    assert_eq!(world.node.links(), NO_LINKS);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
}

/// A second ADD of a live attachment, which a runtime should not call, fails and does the first no harm.
#[test]
fn sec2_add_16_a_second_add_leaves_the_first_alone() {
    let world = World::new();
    let pod = world.node.pod("a");
    let result = world.call("ADD", "a", &pod).run().result();
    world.call("ADD", "a", &pod).run().error(4);
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.ipamd.state().dels.len(), 0);
}

/// One container may be attached twice under different interface names.
#[test]
fn sec2_add_5_attaches_one_container_twice() {
    let world = World::new();
    let pod = world.node.pod("a");
    let first = world.call("ADD", "a", &pod).run().result();
    let second = world.call("ADD", "a", &pod).var("CNI_IFNAME", "net1").run().result();
    let mut links = world.node.links_in(&pod);
    links.sort();
    assert_eq!((links.len(), world.node.links().len()), (2, 2), "{links:?}");
    // Packets of each address leave by its own interface.
    for (source, interface) in [("10.77.0.1", "eth0"), ("10.77.0.2", "net1")] {
        let route = world.node.ip_in(&pod, &["route", "get", "192.0.2.1", "from", source]);
        assert_eq!(route[0]["dev"], interface);
    }
    world.call("CHECK", "a", &pod).prev_result(&first).run().silent();
    world.call("CHECK", "a", &pod).var("CNI_IFNAME", "net1").prev_result(&second).run().silent();
    world.call("DEL", "a", &pod).var("CNI_IFNAME", "net1").prev_result(&second).run().silent();
    assert_eq!(world.node.links_in(&pod), ["eth0"]);
    world.call("CHECK", "a", &pod).prev_result(&first).run().silent();
}

/// The namespace must exist (code 3: there is nothing to clean up), be a network namespace, and not be the runtime's own.
#[test]
fn sec2_add_6_refuses_namespaces_it_must_not_touch() {
    let world = World::new();
    let message = world.call("ADD", "a", Path::new("/nowhere/ns")).run().error(3);
    assert!(message.contains("CNI_NETNS") && message.contains("/nowhere/ns"), "{message}");
    let file = world.node.dir().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(world.call("ADD", "a", &file).run().error(4).contains("CNI_NETNS"));
    assert!(world.call("ADD", "a", Path::new("/proc/self/ns/net")).run().error(4).contains("CNI_NETNS"));
    assert_eq!(world.ipamd.state().adds.len(), 0);
}

/// No address now is "try again later" where it passes by itself and a code of its own where somebody has to act; the
/// message is the daemon's, and nothing was made.
#[test]
fn sec2_add_7_says_why_there_is_no_address() {
    let world = World::new();
    let pod = world.node.pod("a");
    let table = [
        (Reason::Cooling, true, 11),
        (Reason::Throttled, true, 11),
        (Reason::SubnetEmpty, true, 11),
        (Reason::SubnetEmpty, false, 101),
        (Reason::Denied, false, 103),
        (Reason::InstanceLimit, false, 104),
    ];
    for (reason, retryable, code) in table {
        let text = format!("subnet-0abc has no free address since 14:02 ({})", reason.as_str_name());
        world.ipamd.state().refuse = Some(failure(reason, retryable, &text));
        assert_eq!(world.call("ADD", "a", &pod).run().error(code), text);
    }
    world.ipamd.state().refuse = None;
    world.ipamd.state().refuse_without_reason = true;
    world.call("ADD", "a", &pod).run().error(11);
    assert_eq!(world.node.links_in(&pod), NO_LINKS);
    assert_eq!(world.node.links(), NO_LINKS);
}

/// Without a daemon ADD says "try again later", at once.
#[test]
fn sec2_add_8_without_daemon_is_try_again_later() {
    let mut world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.stop();
    let outcome = world.call("ADD", "a", &pod).run();
    assert!(outcome.error(11).contains("ipamd.sock"));
    assert!(outcome.took < Duration::from_secs(3), "{outcome:?}");
    std::fs::remove_file(world.node.dir().join("ipamd.sock")).unwrap();
    world.call("ADD", "a", &pod).run().error(11);
}

/// The daemon learns what it needs, and that the caller has patience.
#[test]
fn sec2_add_9_asks_with_everything_known() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.call("ADD", "a", &pod).run().result();
    let asked = world.ipamd.state().adds[0].clone();
    assert_eq!(
        (asked.pod_namespace.as_str(), asked.pod_name.as_str(), asked.pod_uid.as_str()),
        ("default", "a", "uid-a")
    );
    assert_eq!((asked.network_name.as_str(), asked.container_id.as_str()), ("aws-cni", "a"));
    assert_eq!((asked.if_name.as_str(), asked.netns.as_str()), ("eth0", pod.to_str().unwrap()));
    assert_eq!((asked.pod_infra_container_id.as_str(), asked.client_version.as_str()), ("a", ""));
    assert!(asked.patience_ms >= 1_000 && asked.patience_ms < 30_000);
}

/// An ADD that fails behind the daemon's answer leaves neither links nor routes nor an address taken.
#[test]
fn sec2_add_10_undoes_everything_on_failure() {
    let world = World::new();
    let pod = world.node.pod("a");
    let answer = |address: &str| {
        Some(vec![
            IpAllocationMetadata { ipv4_addr: "10.77.0.1".into(), route_table_id: 254, ..Default::default() },
            IpAllocationMetadata {
                ipv4_addr: address.into(),
                route_table_id: 2,
                egress_ipv4_addr: String::new(),
                device_number: 1,
                ..Default::default()
            },
        ])
    };
    // The second interface cannot be made, after the first was.
    for (address, code) in [("127.0.0.1", 110), ("not an address", 109), ("", 109)] {
        world.ipamd.state().answer = answer(address);
        world.call("ADD", "a", &pod).run().error(code);
        assert_eq!(world.node.links_in(&pod), NO_LINKS);
        assert_eq!(world.node.links(), NO_LINKS);
        assert_eq!(world.node.route_to("10.77.0.1"), None);
        assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
        assert_eq!(world.ipamd.state().dels.last().unwrap().reason, "SetupNSFailed");
    }
    world.ipamd.state().answer = Some(Vec::new());
    world.call("ADD", "a", &pod).run().error(109);
    world.ipamd.state().answer = None;
    world.ipamd.state().vlan = 7;
    world.call("ADD", "a", &pod).run().error(107);
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
    assert_eq!((world.node.links_in(&pod), world.node.links()), (Vec::new(), Vec::new()));
}

/// Where a policy agent guards the node, the pod is under its policy before it starts, or does not start.
#[test]
fn sec2_add_11_policy_before_the_pod_starts() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().policy_mode = "strict".into();
    world.call("ADD", "a", &pod).run().result();
    let enforced = world.ipamd.state().enforced[0].clone();
    assert_eq!((enforced.pod_name.as_str(), enforced.network_policy_mode.as_str()), ("a", "strict"));
    assert_eq!(enforced.interface_count, 1);

    let other = world.node.pod("b");
    world.ipamd.state().policy_refuses = true;
    world.call("ADD", "b", &other).run().error(113);
    world.call("ADD", "b", &other).key("npaSocket", json!("/nowhere/npa.sock")).run().error(11);
    assert_eq!(world.node.links_in(&other), NO_LINKS);
    assert_eq!(world.ipamd.held("b", "eth0").len(), 0);
}

/// A container that comes back under its old id is not hit by the release of its earlier life: when the daemon is asked,
/// the queued release is gone from the disk.
#[test]
fn sec2_add_12_settles_a_queued_release_before_it_asks() {
    let world = World::new();
    let pod = world.node.pod("a");
    let away = json!("/nowhere/ipamd.sock");
    world.call("DEL", "a", &pod).key("ipamdSocket", away).run().silent();
    assert_eq!(world.queued().len(), 1);
    let (queue, seen) = (world.queue(), std::sync::mpsc::channel());
    let sender = seen.0;
    world.ipamd.state().on_add = Some(Box::new(move || {
        let _ = sender.send(std::fs::read_dir(&queue).map_or(0, Iterator::count));
    }));
    world.call("ADD", "a", &pod).run().result();
    assert_eq!(seen.1.recv().unwrap(), 0);
}

/// One interface per network card where the pod asks for it, all told in the result.
#[test]
fn sec2_add_13_several_interfaces() {
    let world = World::new();
    let pod = world.node.pod("a");
    let wish = json!({"io.kubernetes.cri.pod-annotations": {"k8s.amazonaws.com/nicConfig": "multi-nic-attachment"}});
    let result = world.call("ADD", "a", &pod).key("runtimeConfig", wish).run().result();
    let mut links = world.node.links_in(&pod);
    links.sort();
    assert_eq!(links, ["eth0", "mNicIf1"]);
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 5);
    assert_eq!(result["ips"][1]["interface"], 3);
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.node.links(), NO_LINKS);
}

/// IPv6 pods are wired and told like IPv4 pods.
#[test]
fn sec2_add_14_ipv6() {
    let world = World::new();
    let pod = world.node.pod("a");
    world.ipamd.state().v6 = true;
    let result = world.call("ADD", "a", &pod).run().result();
    assert_eq!(result["ips"][0]["address"], "2001:db8::1/128");
    assert_eq!(result["routes"][1], json!({"dst": "::/0", "gw": "fe80::1"}));
    assert_eq!(world.node.addresses_in(&pod, "eth0"), ["2001:db8::1/128"]);
    assert!(world.node.route_to("2001:db8::1").is_some());
    world.call("CHECK", "a", &pod).prev_result(&result).run().silent();
    world.call("DEL", "a", &pod).prev_result(&result).run().silent();
    assert_eq!(world.node.route_to("2001:db8::1"), None);
}

/// Runtimes that know no Kubernetes pods: two containers of one name, or of none, do not get in each other's way.
#[test]
fn sec2_add_15_containers_without_a_pod() {
    let world = World::new();
    for (id, args) in [("a", ""), ("b", ""), ("c", "IgnoreUnknown=1;K8S_POD_NAME=web"), ("d", "K8S_POD_NAME=web")] {
        let pod = world.node.pod(id);
        world.call("ADD", id, &pod).var("CNI_ARGS", args).run().result();
    }
    let links = world.node.links();
    assert_eq!(links.len(), 4, "{links:?}");
    assert!(links.iter().all(|link| link.starts_with("eni") && link.len() == 14), "{links:?}");
}

/// While the daemon looks for an address, the interface is down, without an address, and no route leads to it. A plugin that
/// is killed then leaves it so, and DEL takes it.
#[test]
fn sec2_add_17_nothing_leads_to_a_pod_without_an_address() {
    let world = World::new();
    let pod = world.node.pod("a");
    let ((asked, question), (answer, answered)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    world.ipamd.state().on_add = Some(Box::new(move || {
        let _ = asked.send(());
        let _ = answered.recv();
    }));
    let add = world.call("ADD", "a", &pod).start();
    question.recv().unwrap();
    eventually("the interface is there", || world.node.links_in(&pod) == ["eth0"]);
    for link in
        [&world.node.ip_in(&pod, &["address", "show", "dev", "eth0"])[0], &world.node.ip(&["address", "show"])[1]]
    {
        assert_eq!((&link["operstate"], &link["addr_info"]), (&json!("DOWN"), &json!([])), "{link}");
        assert!(!link["flags"].as_array().unwrap().contains(&json!("UP")), "{link}");
    }
    assert_eq!(world.node.ip_in(&pod, &["route", "show", "table", "all"]), json!([]));
    assert_eq!(world.node.ip(&["route", "show"]), json!([]));

    add.kill();
    answer.send(()).unwrap();
    eventually("the daemon has answered", || world.ipamd.held("a", "eth0").len() == 1);
    world.call("DEL", "a", &pod).run().silent();
    assert_eq!((world.node.links_in(&pod), world.node.links()), (Vec::new(), Vec::new()));
    assert_eq!(world.ipamd.held("a", "eth0").len(), 0);
}
