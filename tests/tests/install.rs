//! Flatwire put on a node of the lab as the chart does it, with the rights the chart gives it and no more, and taken off.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use flatwire_tests::manifest::container;
use flatwire_tests::{binary, eventually, name_of};
use lab::client::Lab;
use lab::ctl::{DaemonAction, Spec};

const NODE: &str = "node-1";
const CONFLIST: &str = "/etc/cni/net.d/10-aws.conflist";

/// What the runtime makes of the container's security context: a root file system of its own, in which /proc/sys cannot be
/// written and the node's /proc/sys/net lies at /host/proc/sys/net, and of root's capabilities only CAP_NET_ADMIN.
const CONTAINER: &str = r#"#!/bin/bash
set -eu
if [ "${1:-}" != run ]; then exec PROGRAM "$@"; fi
export VARIABLES
exec unshare --mount --propagation private bash -eu -c '
  root=$(mktemp -d -p /run)
  mount -t tmpfs container "$root"
  for part in /*; do
    if [ -L "$part" ]; then cp -a "$part" "$root$part"
    elif [ -d "$part" ]; then mkdir "$root$part" && mount --rbind "$part" "$root$part"; fi
  done
  mkdir -p "$root/host/proc/sys/net"
  mount --bind /proc/sys/net "$root/host/proc/sys/net"
  mount --bind /proc/sys "$root/proc/sys" && mount -o remount,ro,bind "$root/proc/sys"
  exec chroot "$root" setpriv --no-new-privs --bounding-set=-all,+net_admin --inh-caps=-all PROGRAM "$@"
' container "$@"
"#;

fn start(programs: &Path) -> Lab {
    let real = binary("ipamd").canonicalize().unwrap();
    let place = programs.join("ipamd");
    let daemon = container("aws-node");
    assert_eq!(daemon.args, ["run"]);
    let text = CONTAINER.replace("PROGRAM", real.to_str().unwrap()).replace("VARIABLES", &daemon.env.join(" "));
    std::fs::write(&place, text).unwrap();
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(binary("aws-cni"), programs.join("aws-cni")).unwrap();
    let nodes = vec!["m5.large".parse().unwrap()];
    let bin_dir = Some(programs.to_owned());
    flatwire_tests::start(&Spec { name: name_of("install"), nodes, bin_dir, ..Spec::default() })
}

fn on_node(lab: &Lab, command: &[&str]) -> (i32, String) {
    let output = lab.exec(NODE, command).unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.code().unwrap(), said)
}

fn is_there(lab: &Lab, file: &str) -> bool {
    on_node(lab, &["test", "-e", file]).0 == 0
}

#[test]
fn a_node_is_served_with_net_admin_alone_and_nothing_stays_when_it_is_taken_off() {
    let programs = tempfile::tempdir().unwrap();
    let mut lab = start(programs.path());
    let ipamd = binary("ipamd").canonicalize().unwrap();
    let ipamd = ipamd.to_str().unwrap();

    let install = container("install");
    let command: Vec<&str> = ["env"].into_iter().chain(install.env.iter().map(String::as_str)).chain([ipamd]).collect();
    let command: Vec<&str> = command.into_iter().chain(install.args.iter().map(String::as_str)).collect();
    let (code, said) = on_node(&lab, &command);
    assert!(code == 0 && said.contains("everything was in place"), "{command:?}: {said}");
    let ask = "exec 3<>/dev/tcp/127.0.0.1/61678; printf 'GET PATH HTTP/1.0\\r\\n\\r\\n' >&3; head -1 <&3";
    let (_, answer) = on_node(&lab, &["bash", "-c", &ask.replace("PATH", &container("aws-node").probe.unwrap())]);
    assert!(answer.contains(" 200 "), "the probe: {answer}");

    // The lab has put a conflist there; the daemon's own takes its place once it can serve.
    eventually("the daemon's conflist is in place", || on_node(&lab, &["grep", "-q", "flatwire", CONFLIST]).0 == 0);
    // More pods than the primary ENI has room for, so that ENIs are attached and programmed.
    let pods: Vec<_> = (0..12).map(|n| lab.pod_add(NODE, &format!("pod-{n}")).unwrap()).collect();
    let (_, rules) = on_node(&lab, &["ip", "rule"]);
    assert!(rules.contains("1536:"), "no secondary ENI is in use: {rules}");
    let gone = on_node(&lab, &["ip", "rule", "del", "priority", "512"]);
    assert_eq!(gone.0, 0, "{}", gone.1);
    eventually("the rule is put back", || on_node(&lab, &["ip", "rule"]).1.contains("512:"));
    let (_, forward) = on_node(&lab, &["cat", "/proc/sys/net/ipv4/ip_forward"]);
    assert_eq!(forward.trim(), "1");
    assert_eq!(on_node(&lab, &["sysctl", "-qw", "net.ipv4.ip_forward=0"]).0, 0);
    eventually("the sysctl is put back", || on_node(&lab, &["cat", "/proc/sys/net/ipv4/ip_forward"]).1.trim() == "1");
    let rights = on_node(&lab, &["bash", "-c", "grep CapEff /proc/$(pgrep -n -x ipamd)/status"]).1;
    assert_eq!(rights.split_whitespace().last(), Some("0000000000001000"), "CAP_NET_ADMIN alone: {rights}");

    // A daemon that runs would put everything back: it is waited for, and nothing is taken from under it.
    let (code, said) = on_node(&lab, &["timeout", "2", ipamd, "uninstall"]);
    assert_eq!(code, 124, "{said}");
    assert!(on_node(&lab, &["ip", "rule"]).1.contains("512:"));

    // Pods live here, which the runtime could not delete any more.
    lab.daemon(NODE, DaemonAction::Stop).unwrap();
    for purge in [&[ipamd, "uninstall", "--purge"][..], &[ipamd, "uninstall"]] {
        let (code, said) = on_node(&lab, purge);
        assert!(code == 1 && said.contains("12 pods of this node have addresses"), "{said}");
        assert!(is_there(&lab, CONFLIST) && is_there(&lab, "/opt/cni/bin/aws-cni"), "nothing is touched");
        assert!(on_node(&lab, &["ip", "rule"]).1.contains("512:"), "nothing is touched");
    }
    for n in 0..pods.len() {
        lab.pod_del(NODE, &format!("pod-{n}")).unwrap();
    }
    let (code, said) = on_node(&lab, &[ipamd, "uninstall", "--purge"]);
    assert_eq!(code, 0, "deleted without a daemon: {said}");
    let (code, said) = on_node(&lab, &["timeout", "--preserve-status", "2", ipamd, "uninstall", "--stay"]);
    assert!(code == 0 && said.contains("staying until a signal"), "{said}");
    for file in [CONFLIST, "/var/run/aws-node/flatwire.journal", "/var/run/aws-node/ipam.json"] {
        assert!(!is_there(&lab, file), "{file} stays; {said}");
    }
    let (_, rules) = on_node(&lab, &["ip", "rule"]);
    assert!(["512:", "1024:", "1536:", "32765:"].iter().all(|rule| !rules.contains(rule)), "{rules}");
    assert!(!on_node(&lab, &["nft", "list", "tables"]).1.contains("flatwire"));
    let (_, routes) = on_node(&lab, &["ip", "route", "show", "table", "2"]);
    assert_eq!(routes.trim(), "", "the table of the first secondary ENI is empty");
}
