//! A lab from outside: starting one as a child, asking it, stepping into its places. For tests, the demo and commands.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::geteuid;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::api::Ec2Client;
use crate::boot;
use crate::ctl::{Called, Control, DaemonAction, Entrance, Info, PodInfo, Probe, Request, Spec, Status};
use crate::error::{Doing, Error, Result};

/// A lab must be up within this.
const UP_SECS: u64 = 120;

/// A lab that lives as long as this value: its process ends when our end of its standard input does.
pub struct Lab {
    program: PathBuf,
    outer: Child,
    name: String,
    control: Control,
    info: Info,
}

impl Lab {
    /// Starts `program up` with this description, and waits until it is up.
    pub fn start(program: &Path, spec: &Spec) -> Result<Self> {
        let json = serde_json::to_string(spec).doing(|| "the lab's description".into())?;
        let mut outer = Command::new(program)
            .args(["up", "--quiet", "--until-stdin-closes", "--spec", &json])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .doing(|| format!("start {}", program.display()))?;
        let dir = boot::dir_of(&spec.name)?;
        let deadline = Instant::now() + Duration::from_secs(UP_SECS);
        let mut control = loop {
            if let Ok(Some(_)) = outer.try_wait() {
                return Err(Error::Refused(last_words(&mut outer)));
            }
            // The pid is noted last: what is here before it may be an earlier lab's.
            if let Ok(noted) = fs::read_to_string(dir.join("outer.pid"))
                && noted == outer.id().to_string()
                && let Ok(control) = Control::connect(&dir)
            {
                break control;
            }
            if Instant::now() > deadline {
                let _ = outer.kill();
                return Err(Error::Deadline { what: "the lab's start".into(), seconds: UP_SECS });
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        match control.ask(&Request::Info) {
            Ok(info) => Ok(Self { program: program.to_owned(), outer, name: spec.name.clone(), control, info }),
            Err(error) => {
                drop(outer.stdin.take());
                let _ = outer.wait();
                let words = last_words(&mut outer);
                Err(if words.is_empty() { error } else { Error::Refused(words) })
            }
        }
    }

    /// As it was when the lab came up.
    pub fn info(&self) -> &Info {
        &self.info
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ipamd that nodes run.
    pub fn ipamd(&self) -> Result<String> {
        let path = self.info.ipamd.as_ref().map(|path| path.display().to_string());
        path.ok_or_else(|| Error::refused("this lab runs no ipamd"))
    }

    /// Process id of the outer process.
    pub fn pid(&self) -> u32 {
        self.outer.id()
    }

    pub fn ec2(&self) -> Ec2Client {
        Ec2Client::new(self.info.endpoint, self.info.region.clone(), self.info.credentials.clone())
    }

    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        self.control.ask(request)
    }

    pub fn status(&mut self) -> Result<Status> {
        self.ask(&Request::Status)
    }

    pub fn view(&mut self) -> Result<lab_ec2::View> {
        self.ask(&Request::View)
    }

    pub fn settle(&mut self) -> Result<()> {
        self.ask(&Request::Settle)
    }

    pub fn probe(&mut self, from: &str, to: &[&str]) -> Result<Vec<Probe>> {
        let to = to.iter().map(|name| (*name).to_owned()).collect();
        self.ask(&Request::Probe { from: from.to_owned(), to, ipv6: false })
    }

    /// As `probe`, to the places' IPv6 addresses.
    pub fn probe6(&mut self, from: &str, to: &[&str]) -> Result<Vec<Probe>> {
        let to = to.iter().map(|name| (*name).to_owned()).collect();
        self.ask(&Request::Probe { from: from.to_owned(), to, ipv6: true })
    }

    pub fn pod_add(&mut self, node: &str, name: &str) -> Result<PodInfo> {
        self.ask(&Request::PodAdd { node: node.to_owned(), name: name.to_owned() })
    }

    /// As `pod_add`, with what the kubelet tells plugins that declare a capability.
    pub fn pod_add_with(&mut self, node: &str, name: &str, capabilities: BTreeMap<String, Value>) -> Result<PodInfo> {
        self.ask(&Request::PodAddWith { node: node.to_owned(), name: name.to_owned(), capabilities })
    }

    pub fn pod_check(&mut self, node: &str, name: &str) -> Result<()> {
        self.ask(&Request::PodCheck { node: node.to_owned(), name: name.to_owned() })
    }

    /// Calls the reflectors behind these addresses and ports.
    pub fn call(&mut self, from: &str, to: &[SocketAddr]) -> Result<Vec<Called>> {
        self.ask(&Request::Call { from: from.to_owned(), to: to.to_vec() })
    }

    pub fn pod_del(&mut self, node: &str, name: &str) -> Result<f64> {
        self.ask(&Request::PodDel { node: node.to_owned(), name: name.to_owned() })
    }

    pub fn daemon(&mut self, node: &str, action: DaemonAction) -> Result<()> {
        self.ask(&Request::Daemon { node: node.to_owned(), action })
    }

    /// A second connection, for use from another thread.
    pub fn connect(&self) -> Result<Control> {
        Control::connect(&boot::dir_of(&self.name)?)
    }

    /// Runs a command in a place and returns what it said.
    pub fn exec(&self, place: &str, command: &[&str]) -> Result<Output> {
        Command::new(&self.program)
            .args(["exec", "--name", &self.name, place, "--"])
            .args(command)
            .output()
            .doing(|| format!("run {} exec", self.program.display()))
    }

    /// As `exec`, and an error if the command fails.
    pub fn run(&self, place: &str, command: &[&str]) -> Result<String> {
        let output = self.exec(place, command)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::refused(format!("{} in {place} ended with {}: {said}", command.join(" "), output.status)))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The end of standard input ends the lab; by force if it takes its time.
        drop(self.outer.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && matches!(self.outer.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

fn last_words(outer: &mut Child) -> String {
    let mut words = String::new();
    if let Some(stderr) = &mut outer.stderr {
        let _ = stderr.read_to_string(&mut words);
    }
    words.trim().trim_start_matches("lab: ").to_owned()
}

/// Runs a command inside a place of a running lab, with our own standard streams, and returns its exit code. To be
/// called while this process has no other thread.
pub fn enter_and_run(name: &str, place: &str, command: &[String]) -> Result<i32> {
    let dir = boot::dir_of(name)?;
    let entrance: Entrance = Control::connect(&dir)?.ask(&Request::Enter { place: place.to_owned() })?;
    let pid = fs::read_to_string(dir.join("world.pid")).doing(|| "read the world's process id".into())?;
    let open = |path: &str| {
        let path = format!("/proc/{pid}/{path}");
        fs::File::open(&path).doing(|| format!("open {path}"))
    };
    let mnt = match entrance.mnt_fd {
        Some(fd) => open(&format!("fd/{fd}"))?,
        None => open("ns/mnt")?,
    };
    let (net, pids) = (open(&format!("fd/{}", entrance.net_fd))?, open("ns/pid")?);
    if !geteuid().is_root() {
        setns(open("ns/user")?.as_fd(), CloneFlags::CLONE_NEWUSER).doing(|| "enter the lab's user namespace".into())?;
    }
    unshare(CloneFlags::CLONE_FS).doing(|| "take a root directory of its own".into())?;
    setns(pids.as_fd(), CloneFlags::CLONE_NEWPID).doing(|| "enter the lab's processes".into())?;
    setns(net.as_fd(), CloneFlags::CLONE_NEWNET).doing(|| format!("enter the network of {place}"))?;
    setns(mnt.as_fd(), CloneFlags::CLONE_NEWNS).doing(|| format!("enter the files of {place}"))?;
    let (program, arguments) = command.split_first().ok_or_else(|| Error::refused("there is no command to run"))?;
    let status = Command::new(program).args(arguments).status().doing(|| format!("run {program} in {place}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
