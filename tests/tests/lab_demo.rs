//! The demo as a test: real ipamd, real plugin, real packets, judged by what EC2 says.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::process::Command;

use flatwire_tests::{binary, name_of, programs, start};
use lab::ctl::{DaemonAction, Spec};

#[test]
fn the_demo_finds_nothing_wrong_and_leaves_nothing_behind() {
    let name = name_of("demo");
    let output = Command::new(binary("lab"))
        .args(["demo", "--pods", "20", "--name", &name, "--bin-dir"])
        .arg(programs())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complaints}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("demo: pairs=1840/1840 nat_free=yes ec2_calls="), "{last}");
    assert!(!said.contains("wrong"), "{said}");
    let dir = lab::boot::dir_of(&name).unwrap();
    assert!(!dir.exists());
}

#[test]
fn pods_talk_on_while_ipamd_is_dead_and_keep_their_addresses_when_it_is_back() {
    let nodes = vec!["m5.large".parse().unwrap(), "t3.medium:1".parse().unwrap()];
    let mut lab = start(&Spec { name: name_of("dead"), nodes, bin_dir: Some(programs()), ..Spec::default() });
    for node in ["node-1", "node-2"] {
        let (first, second) = (lab.pod_add(node, "a").unwrap(), lab.pod_add(node, "b").unwrap());
        lab.daemon(node, DaemonAction::Kill).unwrap();
        assert_eq!(lab.probe(&format!("{node}/a"), &["peer"]).unwrap()[0].rtt_us.map(|_| ()), Some(()));
        assert!(lab.pod_add(node, "early").is_err(), "nobody gives an address while ipamd is dead");

        lab.daemon(node, DaemonAction::Start).unwrap();
        let third = lab.pod_add(node, "c").unwrap();
        assert!(![first.address, second.address].contains(&third.address), "{third:?}");
        for pod in ["a", "b", "c"] {
            let seen = lab.probe(&format!("{node}/{pod}"), &["node-1", "node-2"]).unwrap();
            assert!(seen.iter().all(|probe| probe.seen.is_some()), "{seen:?}");
        }
    }
    // Released while the daemon is away, and known to it once it is back.
    lab.daemon("node-1", DaemonAction::Stop).unwrap();
    lab.pod_del("node-1", "a").unwrap();
    lab.daemon("node-1", DaemonAction::Start).unwrap();
    let ipamd = lab.ipamd().unwrap();
    let status: serde_json::Value =
        serde_json::from_str(&lab.run("node-1", &[&ipamd, "status", "--json"]).unwrap()).unwrap();
    assert_eq!(status["counts"]["assigned"], 2, "{status}");
}
