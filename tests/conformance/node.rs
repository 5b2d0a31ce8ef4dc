//! A node and its pods as network namespaces of their own, and the oracle: `ip -j`, never a reader of ours.
//!
//! One process holds the node's network and mount namespace and ends with this one, whatever becomes of it; pod
//! namespaces are files that only exist in that mount namespace. Nothing can be left behind on the machine.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// What `links` gives where nothing is left.
pub const NO_LINKS: [&str; 0] = [];

pub struct Node {
    holder: Child,
    dir: TempDir,
}

impl Node {
    pub fn new() -> Self {
        let uid = Command::new("id").arg("-u").output().expect("id runs").stdout;
        assert_eq!(
            String::from_utf8_lossy(&uid).trim(),
            "0",
            "these tests make network namespaces and need root: run them as root, they do not skip"
        );
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c"])
            // Ends when the pipe to this process closes.
            .arg("ip link set lo up && echo ready && exec cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts (util-linux)");
        let mut line = String::new();
        let stdout = holder.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("the holder answers");
        assert_eq!(line.trim(), "ready", "a network namespace could not be made");
        Self { holder, dir }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A command that runs on this node, with an empty environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("/usr/bin/nsenter");
        let pid = self.holder.id().to_string();
        command.args(["--target", &pid, "--net", "--mount", "--"]).arg(program).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program).args(args).output().expect("nsenter starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {stderr}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Makes an empty namespace, as a runtime does before it calls plugins, and gives its path.
    pub fn pod(&self, name: &str) -> PathBuf {
        let path = self.dir().join(name);
        let text = path.to_str().expect("a text path");
        std::fs::write(&path, b"").expect("a mount point");
        self.run("unshare", &[&format!("--net={text}"), "true"]);
        path
    }

    /// What a runtime does at the end of a sandbox.
    pub fn remove_pod(&self, path: &Path) {
        self.run("umount", &[path.to_str().expect("a text path")]);
        std::fs::remove_file(path).expect("the mount point goes");
    }

    pub fn ip(&self, args: &[&str]) -> Value {
        json_of(&self.run("ip", &[&["-j", "-d"], args].concat()))
    }

    /// Changes something on the node.
    pub fn set(&self, args: &[&str]) {
        self.run("ip", args);
    }

    pub fn ip_in(&self, pod: &Path, args: &[&str]) -> Value {
        let net = format!("--net={}", pod.display());
        json_of(&self.run("nsenter", &[&[net.as_str(), "ip", "-j", "-d"], args].concat()))
    }

    pub fn set_in(&self, pod: &Path, args: &[&str]) {
        let net = format!("--net={}", pod.display());
        self.run("nsenter", &[&[net.as_str(), "ip"], args].concat());
    }

    /// Names of the links beside the loopback.
    pub fn links(&self) -> Vec<String> {
        names(&self.ip(&["link"]))
    }

    pub fn links_in(&self, pod: &Path) -> Vec<String> {
        names(&self.ip_in(pod, &["link"]))
    }

    /// The addresses of one interface of a pod, with their prefix lengths.
    pub fn addresses_in(&self, pod: &Path, interface: &str) -> Vec<String> {
        let shown = self.ip_in(pod, &["address", "show", "dev", interface]);
        let infos = shown[0]["addr_info"].as_array().cloned().unwrap_or_default();
        let global = infos.iter().filter(|info| info["scope"] == "global");
        global.map(|info| format!("{}/{}", info["local"].as_str().unwrap_or_default(), info["prefixlen"])).collect()
    }

    /// The interface the node's own route to a single address leads to.
    pub fn route_to(&self, address: &str) -> Option<String> {
        let family = if address.contains(':') { "-6" } else { "-4" };
        let routes = self.ip(&[family, "route", "show"]);
        let found = routes.as_array()?.iter().find(|route| route["dst"] == *address)?.clone();
        found["dev"].as_str().map(str::to_owned)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn json_of(text: &str) -> Value {
    if text.trim().is_empty() { Value::Array(Vec::new()) } else { serde_json::from_str(text).expect("ip prints JSON") }
}

fn names(links: &Value) -> Vec<String> {
    let all = links.as_array().expect("a list").iter();
    let names = all.filter_map(|link| link["ifname"].as_str()).filter(|name| *name != "lo");
    // Devices that some kernels put into every namespace.
    let fixed = ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];
    names.filter(|name| !fixed.contains(name)).map(str::to_owned).collect()
}
