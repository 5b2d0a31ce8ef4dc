//! The bench of the namespace tests: every test gets a network and a mount namespace of its own, on its own thread, and
//! an empty /run/netns. Nothing it does is seen outside, and nothing is left when its thread ends.
//!
//! The oracle is iproute2's and nft's JSON, never this crate's own reader.

#![allow(dead_code, reason = "each test file uses its part")]

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use flatwire_kernel::Netns;
use flatwire_kernel::netns::in_netns;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

/// Runs a test's body inside fresh namespaces.
///
/// Without root it fails: a test that silently did not run is worse than one that is red. `FLATWIRE_UNPRIVILEGED=1` says
/// that this is known, and then the test says loudly that it did nothing.
pub fn in_testbed<F: Future<Output = ()>>(body: impl FnOnce() -> F) {
    if !nix::unistd::geteuid().is_root() {
        if std::env::var_os("FLATWIRE_UNPRIVILEGED").is_some_and(|value| value == "1") {
            eprintln!("SKIPPED: {} needs root", std::thread::current().name().unwrap_or("this test"));
            return;
        }
        panic!("this test needs root for namespaces; set FLATWIRE_UNPRIVILEGED=1 to leave it out knowingly");
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("unshare");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private /");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("tmpfs on /run");
    std::fs::create_dir("/run/netns").expect("/run/netns");
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(body());
}

/// Runs a shell command that must succeed, and returns what it printed.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").arg("-c").arg(command).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("utf-8")
}

/// `ip -j …` in the test's namespace, or with `-n NAME` in a named one.
pub fn ip(arguments: &str) -> Vec<Value> {
    let text = sh(&format!("ip -j {arguments}"));
    if text.trim().is_empty() {
        return Vec::new();
    }
    let list: Vec<Value> = serde_json::from_str(&text).expect("ip prints JSON");
    list.into_iter().filter(|entry| entry.as_object().is_some_and(|o| !o.is_empty())).collect()
}

/// Everything in a namespace that a test could leave behind, as text to compare before and after. Without what the kernel
/// brings about by itself in its own time: carriers, and a link's own IPv6 address.
pub fn snapshot(netns: Option<&str>) -> String {
    let n = netns.map(|name| format!("-n {name} ")).unwrap_or_default();
    let mut text = String::new();
    for what in ["-o link", "-o addr", "route show table all", "-6 route show table all", "rule", "neigh"] {
        let shown = sh(&format!("ip {n}{what}"));
        for line in shown.lines().filter(|line| !line.contains("fe80::") && !line.contains("ff00::")) {
            let mut words = line.split(' ').filter(|word| !word.starts_with('<')).peekable();
            while let Some(word) = words.next() {
                if matches!(word, "state" | "qdisc") {
                    words.next();
                } else {
                    text.push_str(word);
                    text.push(' ');
                }
            }
            text.push('\n');
        }
        text.push_str("--\n");
    }
    text
}

/// Waits until a link can carry packets. A veth end that came up before its other one drops everything until the
/// kernel's link watch has run.
pub fn await_carrier(netns: Option<&str>, link: &str) {
    let n = netns.map(|name| format!("-n {name} ")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(10);
    while ip(&format!("{n}link show {link}"))[0]["operstate"] != "UP" {
        assert!(Instant::now() < deadline, "{link} does not come up");
    }
}

/// Makes /run/netns/NAME with iproute2.
pub fn add_netns(name: &str) -> (PathBuf, Netns) {
    sh(&format!("ip netns add {name}"));
    let path = PathBuf::from(format!("/run/netns/{name}"));
    let netns = Netns::open(&path).expect("a namespace that ip made");
    (path, netns)
}

pub fn v4(text: &str) -> IpAddr {
    IpAddr::V4(text.parse::<Ipv4Addr>().expect("an address"))
}

/// A UDP socket inside a namespace, with a deadline on reading.
pub fn udp_in(netns: &Netns, address: IpAddr, port: u16) -> UdpSocket {
    in_netns(netns, || udp(address, port)).expect("a socket in the namespace")
}

pub fn udp(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(address, port))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(socket)
}

/// Sends from one socket to the other and returns the source the other one saw.
pub fn exchange(from: &UdpSocket, to: &UdpSocket) -> SocketAddr {
    let target = to.local_addr().expect("bound");
    from.send_to(b"hello", target).expect("send");
    let mut buffer = [0; 16];
    let (length, source) = to.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{target} hears nothing: {e}"));
    assert_eq!(&buffer[..length], b"hello");
    source
}
