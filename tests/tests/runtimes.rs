//! Flatwire under the runtimes that call it: containerd, driven as a kubelet drives it, and podman, on two nodes of the lab
//! that were set up as the chart does it.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use flatwire_tests::eventually;
use flatwire_tests::runtimes::cri::Protocol;
use flatwire_tests::runtimes::{CONFLIST, Containerd, NODES, Pod, Running, Scene, obstacle};
use lab::ctl::DaemonAction;
use lab::fabric::EC2_INSIDE;

/// Where pods serve.
const PORT: u16 = 7777;

/// `None`, said loudly, where containers cannot be run.
fn scene(name: &str) -> Option<Scene> {
    if let Some(reason) = obstacle() {
        println!("SKIPPED {name}: {reason}");
        return None;
    }
    Some(Scene::start(name, Path::new(env!("CARGO_BIN_EXE_peer"))))
}

fn saw(who: Ipv4Addr) -> String {
    format!("udp {who}\ntcp {who}\n")
}

/// Every pod asks every other, and is seen under its own address.
fn all_talk(pods: &[(&Containerd, &Running)]) {
    for (containerd, from) in pods {
        for (_, to) in pods.iter().filter(|(_, to)| to.sandbox != from.sandbox) {
            assert_eq!(containerd.ask(from, &to.address.to_string()), Ok(saw(from.address)), "{from:?} asks {to:?}");
        }
    }
}

/// Asked by the second node, which no pod stands between.
fn answers(scene: &mut Scene, whom: Ipv4Addr, port: u16) {
    let whom = [SocketAddr::new(whom.into(), port)];
    eventually("the pod answers the node over UDP and TCP", || {
        let called = scene.lab.call(NODES[1], &whom).unwrap();
        called[0].udp.is_some() && called[0].tcp.is_some()
    });
}

#[test]
fn pods_of_containerd_talk_on_a_node_and_across_nodes_and_leave_nothing() {
    let Some(mut scene) = scene("talk") else { return };
    let [one, two] = NODES.map(|node| Containerd::start(&scene, node));
    assert!(!one.has_network() && one.run_pod(&Pod::named("early")).is_err(), "no daemon has written a conflist");
    scene.serve();
    eventually("containerd has read the conflists", || one.has_network() && two.has_network());

    let host_ports = vec![(Protocol::Tcp, 8080), (Protocol::Udp, 8080)];
    let web = one.run_pod(&Pod { host_ports, ..Pod::named("web") }).unwrap();
    let near = one.run_pod(&Pod::named("near")).unwrap();
    let far = two.run_pod(&Pod::named("far")).unwrap();
    all_talk(&[(&one, &web), (&one, &near), (&two, &far)]);
    // By the node's address and port, from a pod of the other node and from the node itself.
    let node = scene.address(NODES[0]);
    assert_eq!(two.ask(&far, &format!("{node}:8080")), Ok(saw(far.address)));
    answers(&mut scene, node, 8080);

    let given: BTreeSet<Ipv4Addr> = [&web, &near, &far].map(|pod| pod.address).into();
    assert_eq!(given.len(), 3);
    // With them the one that came early: it is there for a kubelet to take away.
    for containerd in [&one, &two] {
        for (sandbox, _) in containerd.sandboxes() {
            containerd.remove(&sandbox).unwrap();
        }
    }
    scene.nothing_is_left(&given);
}

/// A first address is asked for, and not there: no pod is to be sent here on the strength of a question.
#[test]
fn a_node_has_no_network_for_the_runtime_before_it_has_an_address() {
    let Some(mut scene) = scene("first") else { return };
    let containerd = Containerd::start(&scene, NODES[0]);
    let ec2 = format!("{EC2_INSIDE}/32");
    scene.run(NODES[0], &["ip", "route", "add", "unreachable", &ec2]);
    scene.daemon(NODES[0], DaemonAction::Start);
    let log = || scene.run(NODES[0], &["cat", "/var/log/aws-routed-eni/ipamd.log"]);
    eventually("the first call has failed", || {
        log().contains("AssignPrivateIpAddresses") && log().contains("a call failed")
    });
    assert!(!scene.is_there(NODES[0], CONFLIST) && !containerd.has_network());
    scene.run(NODES[0], &["ip", "route", "del", "unreachable", &ec2]);
    eventually("the runtime has a network", || containerd.has_network());
    assert!(scene.is_there(NODES[0], CONFLIST));
    let pod = containerd.run_pod(&Pod::named("web")).unwrap();
    containerd.remove(&pod.sandbox).unwrap();
    scene.nothing_is_left_on(NODES[0], &BTreeSet::from([pod.address]));
}

/// The runtime's own choice of version is the conflist's. Debian's containerd takes results up to 1.0.0.
#[test]
fn containerd_takes_the_daemons_conflist_and_lists_of_older_versions() {
    let Some(mut scene) = scene("versions") else { return };
    scene.serve();
    let containerd = Containerd::start(&scene, NODES[0]);
    eventually("containerd has read the conflist", || containerd.has_network());
    let mut given = BTreeSet::new();
    for version in ["1.0.0", "0.4.0", "0.3.1"] {
        if version != "1.0.0" {
            let other = format!("s/\"cniVersion\": \"[0-9.]*\"/\"cniVersion\": \"{version}\"/");
            let place = format!("sed '{other}' {CONFLIST} > /etc/cni/net.d/.new && mv /etc/cni/net.d/.new {CONFLIST}");
            scene.run(NODES[0], &["sh", "-c", &place]);
        }
        eventually("the list is read", || containerd.conflist_version().as_deref() == Some(version));
        let pod = containerd.run_pod(&Pod::named("web")).unwrap_or_else(|error| panic!("{version}: {error}"));
        answers(&mut scene, pod.address, PORT);
        given.insert(pod.address);
        containerd.remove(&pod.sandbox).unwrap();
    }
    scene.nothing_is_left(&given);
}

#[test]
fn a_containerd_that_is_killed_costs_no_pod_its_network_and_no_address_is_given_twice() {
    let Some(mut scene) = scene("killed") else { return };
    scene.serve();
    let [mut one, two] = NODES.map(|node| Containerd::start(&scene, node));
    eventually("both have read the conflists", || one.has_network() && two.has_network());
    let (old, far) = (one.run_pod(&Pod::named("old")).unwrap(), two.run_pod(&Pod::named("far")).unwrap());
    all_talk(&[(&one, &old), (&two, &far)]);

    // Killed while pods are being made: when the daemon has given out some of their addresses.
    let burst = Pod::burst("new", 20);
    let calls: Vec<_> = burst.iter().cloned().map(|pod| one.run_in_background(pod)).collect();
    eventually("some pods have addresses", || scene.given(NODES[0]).len() > 3);
    one.kill(&scene);
    assert_eq!(two.ask(&far, &old.address.to_string()), Ok(saw(far.address)), "with containerd dead");
    let cut = calls.into_iter().filter_map(|call| call.join().unwrap().err()).count();
    assert!(cut > 0, "every pod was there before containerd was killed");

    one.start_again(&scene);
    all_talk(&[(&one, &old), (&two, &far)]);
    // What a kubelet does: whatever is left of a pod that does not run is taken away, and the pod made anew.
    for (sandbox, name) in one.sandboxes() {
        if name != "old" {
            one.remove(&sandbox).unwrap();
        }
    }
    let mut given = BTreeSet::from([old.address, far.address]);
    let mut pods = Vec::new();
    for pod in burst {
        let running = one.run_pod(&Pod { attempt: 1, ..pod }).unwrap();
        assert!(given.insert(running.address), "{running:?} has an address of another pod");
        pods.push(running);
    }
    all_talk(&[(&one, &old), (&one, &pods[0]), (&two, &far)]);
    for pod in pods.iter().chain([&old]) {
        one.remove(&pod.sandbox).unwrap();
    }
    two.remove(&far.sandbox).unwrap();
    // Debian's containerd forgets a sandbox whose network it was making: its namespace stays, with a pod's address. The
    // address is ours to release, by GC; without that by the daemon itself, five minutes later.
    scene.collect(&one, NODES[0]);
    scene.run(
        NODES[0],
        &["sh", "-c", "for name in /run/netns/cni-*; do umount $name; rm -f $name; done 2>/dev/null; true"],
    );
    scene.nothing_is_left(&given);
}

#[test]
fn pods_live_on_and_are_removed_with_the_daemon_dead_and_are_known_to_be_when_it_is_back() {
    let Some(mut scene) = scene("dead") else { return };
    scene.serve();
    let [one, two] = NODES.map(|node| Containerd::start(&scene, node));
    eventually("both have read the conflists", || one.has_network() && two.has_network());
    let pods: Vec<Running> = Pod::burst("old", 4).iter().map(|pod| one.run_pod(pod).unwrap()).collect();
    let far = two.run_pod(&Pod::named("far")).unwrap();

    // Killed while pods are being made: some have their addresses, some have not.
    let burst = Pod::burst("new", 16);
    let calls: Vec<_> = burst.iter().cloned().map(|pod| one.run_in_background(pod)).collect();
    eventually("some pods have addresses", || scene.given(NODES[0]).len() > pods.len() + 2);
    scene.daemon(NODES[0], DaemonAction::Kill);
    all_talk(&[(&one, &pods[0]), (&two, &far)]);
    let (made, refused): (Vec<_>, Vec<_>) = calls.into_iter().map(|call| call.join().unwrap()).partition(Result::is_ok);
    assert!(!refused.is_empty(), "every pod was there before the daemon was killed");

    // Removed while nobody serves: half of the old ones.
    for pod in &pods[..2] {
        one.remove(&pod.sandbox).unwrap();
    }
    scene.daemon(NODES[0], DaemonAction::Start);
    let gone: Vec<Ipv4Addr> = pods[..2].iter().map(|pod| pod.address).collect();
    eventually("what was removed meanwhile is released", || {
        let given = scene.given(NODES[0]);
        given.len() == 2 + made.len() && !gone.iter().any(|address| given.contains(address))
    });
    all_talk(&[(&one, &pods[2]), (&one, &pods[3]), (&two, &far)]);

    let mut running: Vec<Running> = made.into_iter().map(Result::unwrap).chain(pods[2..].iter().cloned()).collect();
    for pod in burst {
        // The kubelet's retry of those that were refused; the others run.
        if !one.sandboxes().iter().any(|(_, name)| *name == pod.name) {
            running.push(one.run_pod(&Pod { attempt: 1, ..pod }).unwrap());
        }
    }
    let mut given: BTreeSet<Ipv4Addr> = running.iter().map(|pod| pod.address).collect();
    assert_eq!(given.len(), running.len(), "an address twice: {running:?}");
    for pod in &running {
        one.remove(&pod.sandbox).unwrap();
    }
    two.remove(&far.sandbox).unwrap();
    given.extend(gone.iter().chain([&far.address]));
    scene.nothing_is_left(&given);
}

/// Behind our plugin stands one that refuses; the runtime takes the pod back, and so do we.
#[test]
fn a_later_plugin_that_fails_leaves_nothing_of_ours() {
    let Some(mut scene) = scene("chain") else { return };
    scene.serve();
    let containerd = Containerd::start(&scene, NODES[0]);
    let refuses = r#"#!/bin/sh
case $CNI_COMMAND in
  ADD) cat > /run/refused; printf '{"cniVersion":"1.0.0","code":999,"msg":"not today"}'; exit 1;;
  VERSION) printf '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}';;
esac
"#;
    let place = r#"printf %s "$1" > /opt/cni/bin/refuses; chmod 755 /opt/cni/bin/refuses; sed 's/"type": "portmap"/"type": "refuses"/' "$2"         > /etc/cni/net.d/.new && mv /etc/cni/net.d/.new "$2""#;
    scene.run(NODES[0], &["sh", "-c", place, "sh", refuses, CONFLIST]);
    let pod = Pod::named("web");
    eventually(
        "containerd calls the chain with the plugin that refuses",
        || matches!(containerd.run_pod(&pod), Err(error) if error.contains("not today")),
    );
    // It was called with our result, so the address had been given and the veth was there.
    let told: serde_json::Value = serde_json::from_str(&scene.run(NODES[0], &["cat", "/run/refused"])).unwrap();
    let address = told["prevResult"]["ips"][0]["address"].as_str().unwrap();
    let address: Ipv4Addr = address.trim_end_matches("/32").parse().unwrap();
    scene.nothing_is_left(&BTreeSet::from([address]));
}

#[test]
fn podman_runs_containers_in_our_network_and_leaves_nothing() {
    let Some(mut scene) = scene("podman") else { return };
    scene.serve();
    let backend = scene.podman(NODES[0], &["info", "--format", "{{.Host.NetworkBackend}}"]);
    if backend.as_deref().map(str::trim) != Ok("cni") {
        println!("SKIPPED podman: this podman calls no CNI plugins ({backend:?}); Debian 12's does");
        return;
    }
    let two = Containerd::start(&scene, NODES[1]);
    eventually("containerd has read the conflist", || two.has_network());
    let far = two.run_pod(&Pod::named("far")).unwrap();

    let image = scene.podman(NODES[0], &["load", "-q", "-i", &scene.image().to_string_lossy()]).unwrap();
    let image = image.trim().rsplit(' ').next().unwrap().to_owned();
    let cgroup = scene.cgroup();
    let run = ["run", "--network", "aws-cni", "--cgroup-parent", &cgroup];
    let web = [&run[..], &["-d", "--name", "web", "-p", "8080:7777", "-p", "8080:7777/udp", &image, "serve"]].concat();
    scene.podman(NODES[0], &web).unwrap();
    let address = scene.podman(
        NODES[0],
        &["inspect", "web", "--format", "{{(index .NetworkSettings.Networks \"aws-cni\").IPAddress}}"],
    );
    let address: Ipv4Addr = address.unwrap().trim().parse().unwrap();
    assert!(scene.given(NODES[0]).contains(&address), "{address} is an address of the node's pool");
    assert_eq!(two.ask(&far, &address.to_string()), Ok(saw(far.address)));
    assert_eq!(scene.podman(NODES[0], &["exec", "web", "/peer", "ask", &far.address.to_string()]), Ok(saw(address)));
    let node = scene.address(NODES[0]);
    answers(&mut scene, node, 8080);
    let whom = far.address.to_string();
    let once = [&run[..], &["--rm", &image, "ask", &whom]].concat();
    let said = scene.podman(NODES[0], &once).unwrap();
    let second: Ipv4Addr = said.lines().next().unwrap().trim_start_matches("udp ").parse().unwrap();
    assert_eq!((said, second == address), (saw(second), false));

    scene.podman(NODES[0], &["rm", "-f", "-t", "0", "web"]).unwrap();
    two.remove(&far.sandbox).unwrap();
    scene.nothing_is_left(&BTreeSet::from([address, second, far.address]));
}
