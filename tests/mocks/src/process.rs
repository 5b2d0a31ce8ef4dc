//! A server in a process group of its own: started on a free loopback port, killed with everything it started, its log
//! kept when the test fails.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
const LOG_TAIL_LINES: usize = 30;

pub struct Process {
    child: Child,
    group: Pid,
    /// Removed on success; see `Drop`.
    folder: Option<tempfile::TempDir>,
    name: &'static str,
}

impl Process {
    /// Starts the program with nothing of this process's environment and an empty folder as its home. The kernel
    /// kills it should this thread die without cleaning up.
    pub fn start(name: &'static str, program: &Path, arguments: &[&str], environment: &[(&str, String)]) -> Self {
        let folder = tempfile::Builder::new().prefix(&format!("flatwire-{name}-")).tempdir().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", folder.path())
            .env("TMPDIR", folder.path())
            .envs(
                environment.iter().map(|(key, value)| (key, value.replace("{home}", &folder.path().to_string_lossy()))),
            )
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {}: {error}", program.display()));
        let group = Pid::from_raw(child.id().try_into().unwrap());
        Self { child, group, folder: Some(folder), name }
    }

    /// Waits until `ready` says so. Says why not if the program ends or the time does.
    pub fn wait_until(&mut self, limit: Duration, ready: impl Fn() -> bool) -> Result<Duration, String> {
        let started = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Err(format!("{} ended with {status}\n{}", self.name, self.log_tail()));
            }
            if started.elapsed() > limit {
                return Err(format!("{} is not ready after {limit:?}\n{}", self.name, self.log_tail()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(started.elapsed())
    }

    /// Panics unless everything this process group listens on is a loopback address, and `port` is among it.
    /// LocalStack's default gateway listens on all addresses whatever it is told; these tests open no port to the
    /// network.
    pub fn assert_loopback_only(&self, port: u16) {
        let sockets = sockets_of_group(self.group.as_raw());
        let listening = listening(&sockets);
        for (address, port) in &listening {
            assert!(is_loopback(address), "{} listens on {address}:{port}, which is not loopback", self.name);
        }
        assert!(
            listening.iter().any(|(_, p)| *p == port),
            "{} listens on {listening:?}, not on port {port}",
            self.name
        );
    }

    pub fn log_tail(&self) -> String {
        let Some(folder) = &self.folder else { return String::new() };
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = killpg(self.group, Signal::SIGTERM);
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(20));
        }
        // The leader may be gone while its children are not; a group without members is no error.
        let _ = killpg(self.group, Signal::SIGKILL);
        let _ = self.child.wait();
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            let kept = keep_log(self.name, folder.path());
            let _ = writeln!(std::io::stderr(), "the log of {} is kept in {}", self.name, kept.display());
        }
    }
}

fn keep_log(name: &str, folder: &Path) -> PathBuf {
    let kept = crate::target_dir().join("mock-logs");
    let file = kept.join(format!("{name}-{}.log", std::process::id()));
    let _ = std::fs::create_dir_all(&kept);
    let _ = std::fs::copy(folder.join("log"), &file);
    file
}

/// A loopback port nobody listens on at this moment.
pub fn free_port() -> u16 {
    TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Socket inodes held by any process of a process group.
fn sockets_of_group(group: i32) -> Vec<String> {
    let mut inodes = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name in parentheses may hold anything; the fields after it are state, parent, process group.
        let Some((_, fields)) = stat.rsplit_once(')') else { continue };
        if fields.split_whitespace().nth(2).and_then(|field| field.parse().ok()) != Some(group) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(entry.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
            if let Some(inode) = target.to_string_lossy().strip_prefix("socket:[").and_then(|t| t.strip_suffix(']')) {
                inodes.push(inode.to_owned());
            }
        }
    }
    inodes
}

/// Address (as /proc writes it, in hexadecimal) and port of each listening TCP socket among these inodes.
fn listening(inodes: &[String]) -> Vec<(String, u16)> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (Some(local), Some(&"0A"), Some(inode)) = (fields.get(1), fields.get(3), fields.get(9)) else {
                continue;
            };
            if let Some((address, port)) = local.split_once(':')
                && inodes.iter().any(|held| held == inode)
            {
                found.push((address.to_owned(), u16::from_str_radix(port, 16).unwrap()));
            }
        }
    }
    found
}

fn is_loopback(address: &str) -> bool {
    address == "0100007F" || address == "00000000000000000000000001000000"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_port_is_told_from_a_loopback_one() {
        let loopback = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listening(&sockets_of_group(nix::unistd::getpgrp().as_raw()));
        let port = loopback.local_addr().unwrap().port();
        assert!(own.iter().any(|(address, p)| *p == port && is_loopback(address)), "{own:?}");
        assert!(!is_loopback("00000000"));
        assert!(!is_loopback("00000000000000000000000000000000"));
    }
}
