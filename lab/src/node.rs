//! One machine of the lab: a network namespace for its links, a mount namespace with files of its own, and its ipamd.
//!
//! A node sees this machine's file system, but `/etc`, `/opt`, `/var` and `/run` are its own: what it writes there
//! stays in a layer above, which is a folder of the lab.

use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use flatwire_core::ids::InstanceId;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::ctl::{DaemonAction, NodeSpec};
use crate::error::{Doing, Error, Result};
use crate::fabric::{EC2_INSIDE, Guest, IMDS, VPC_MTU};
use crate::ns::{Place, bind, has_ipv6, sysctl};
use crate::probe::Reflector;
use crate::runtime::Pods;

/// Parts of the file system in which every node writes for itself.
const LAYERED: [&str; 3] = ["etc", "opt", "var"];
const SOCKET: &str = "/var/run/aws-node/ipamd.sock";
const LOG: &str = "/var/log/aws-routed-eni/ipamd.log";

const START_SECS: u64 = 30;
const STOP_SECS: u64 = 10;

pub struct Node {
    pub name: String,
    pub instance: InstanceId,
    /// None for a machine that runs no ipamd.
    pub spec: Option<NodeSpec>,
    pub guest: Guest,
    pub files: PathBuf,
    pub pods: Pods,
    daemon: tokio::sync::Mutex<Option<Child>>,
    _reflector: Reflector,
}

/// The programs a node runs.
#[derive(Debug, Clone)]
pub struct Programs {
    pub ipamd: PathBuf,
    pub plugin: PathBuf,
}

impl Programs {
    /// In `dir`, or beside the lab's own program.
    pub fn find(dir: Option<&Path>) -> Result<Self> {
        let beside = std::env::current_exe().doing(|| "find the lab's own program".into())?;
        let dir = dir.or(beside.parent()).unwrap_or(Path::new("/"));
        let find = |name: &str| {
            let path = dir.join(name);
            if path.is_file() {
                return Ok(path);
            }
            Err(Error::refused(format!("{} is not there; build it, or say --bin-dir or --no-daemons", path.display())))
        };
        Ok(Self { ipamd: find("ipamd")?, plugin: find("aws-cni")? })
    }
}

impl Node {
    /// A machine that is switched on and has no link yet.
    pub async fn boot(
        name: &str,
        instance: InstanceId,
        spec: Option<NodeSpec>,
        files: PathBuf,
        programs: Option<&Programs>,
    ) -> Result<Self> {
        let bare = Place::new()?;
        furnish(&files, programs)?;
        let place = bare.with_mounts(|| arrange(&files))?;
        place.run(|| {
            for (key, value) in [
                // As on an EKS machine image: forwarding on, loose reverse path filter for links to come.
                ("net/ipv4/ip_forward", "1"),
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "2"),
                // The router is known without being asked for, and no address waits to be found unique: EC2 has seen to
                // that. IPv6 forwarding is ipamd's to switch on.
                ("net/ipv6/conf/all/accept_ra", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
            ] {
                if has_ipv6() || !key.starts_with("net/ipv6") {
                    sysctl(key, value)?;
                }
            }
            Ok::<(), Error>(())
        })??;
        place.publish(name)?;
        let reflector = Reflector::start(&place)?;
        Ok(Self {
            name: name.to_owned(),
            instance,
            spec,
            guest: Guest::at(place).await?,
            files,
            pods: Pods::default(),
            daemon: tokio::sync::Mutex::new(None),
            _reflector: reflector,
        })
    }

    pub fn place(&self) -> &Place {
        &self.guest.place
    }

    pub async fn daemon(&self, action: DaemonAction, ipamd: &Path, env: &[(String, String)]) -> Result<()> {
        let mut daemon = self.daemon.lock().await;
        let runs = daemon.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        match (action, daemon.as_mut()) {
            (DaemonAction::Start, Some(_)) if runs => {
                Err(Error::refused(format!("ipamd of {} runs already", self.name)))
            }
            (DaemonAction::Start, _) => {
                *daemon = Some(self.start(ipamd, env)?);
                let child = daemon.as_mut().expect("invariant: set a line above");
                self.wait_until_serving(child).await
            }
            (_, None) => Err(Error::refused(format!("ipamd of {} does not run", self.name))),
            (DaemonAction::Stop, Some(child)) => {
                if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
                    kill(Pid::from_raw(id), Signal::SIGTERM).doing(|| format!("stop ipamd of {}", self.name))?;
                }
                if timeout(Duration::from_secs(STOP_SECS), child.wait()).await.is_err() {
                    return Err(Error::Deadline {
                        what: format!("the end of {}'s ipamd", self.name),
                        seconds: STOP_SECS,
                    });
                }
                *daemon = None;
                Ok(())
            }
            (DaemonAction::Kill, Some(child)) => {
                child.kill().await.doing(|| format!("kill ipamd of {}", self.name))?;
                *daemon = None;
                Ok(())
            }
        }
    }

    pub async fn daemon_state(&self) -> &'static str {
        if self.spec.is_none() {
            return "none";
        }
        match self.daemon.lock().await.as_mut().map(Child::try_wait) {
            Some(Ok(None)) if self.serves() => "serving",
            Some(Ok(None)) => "starting",
            Some(_) => "ended",
            None => "stopped",
        }
    }

    fn start(&self, ipamd: &Path, env: &[(String, String)]) -> Result<Child> {
        self.place()
            .run_in_runtime(|| {
                let log = OpenOptions::new().create(true).append(true).open(LOG)?;
                let mut command = Command::new(ipamd);
                command
                    .arg("run")
                    .env("AWS_EC2_ENDPOINT", format!("http://{EC2_INSIDE}"))
                    .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"))
                    .env("MY_NODE_NAME", &self.name)
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .kill_on_drop(true);
                if self.spec.as_ref().is_some_and(|spec| spec.prefixes > 0) {
                    command.env("ENABLE_PREFIX_DELEGATION", "true");
                }
                let own = self.spec.iter().flat_map(|spec| &spec.env).map(|(k, v)| (k.as_str(), v.as_str()));
                command.envs(env.iter().map(|(k, v)| (k.as_str(), v.as_str())).chain(own));
                command.spawn()
            })?
            .doing(|| format!("start {} on {}", ipamd.display(), self.name))
    }

    fn serves(&self) -> bool {
        self.place().run(|| UnixStream::connect(SOCKET).is_ok()).unwrap_or(false)
    }

    async fn wait_until_serving(&self, child: &mut Child) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(START_SECS);
        while !self.serves() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(Error::refused(format!("ipamd of {} ended ({status}):\n{}", self.name, self.log_tail())));
            }
            if Instant::now() > deadline {
                let what = format!("ipamd of {} serving; its log ends:\n{}", self.name, self.log_tail());
                return Err(Error::Deadline { what, seconds: START_SECS });
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub fn log_tail(&self) -> String {
        let text = self.place().run(|| fs::read_to_string(LOG).unwrap_or_default()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(12)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Its processes hold the rest; ipamd is killed as its handle goes.
        if let Err(error) = Place::unpublish(&self.name) {
            tracing::warn!(error = crate::error::chain(&error), "a machine's name stays");
        }
    }
}

/// Fills the node's own layers before they are mounted.
fn furnish(files: &Path, programs: Option<&Programs>) -> Result<()> {
    for part in LAYERED {
        make(&files.join(format!(".{part}.work")))?;
    }
    for dir in ["etc/cni/net.d", "opt/cni/bin", "var/lib/cni", "var/log/aws-routed-eni", "run/netns", "run/aws-node"] {
        make(&files.join(dir))?;
    }
    let Some(programs) = programs else { return Ok(()) };
    fs::copy(&programs.plugin, files.join("opt/cni/bin/aws-cni"))
        .doing(|| format!("install {}", programs.plugin.display()))?;
    let conflist = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "aws-cni",
        "plugins": [{
            "name": "aws-cni",
            "type": "aws-cni",
            "vethPrefix": "eni",
            "mtu": VPC_MTU.to_string(),
            "podSGEnforcingMode": "strict",
            "pluginLogFile": "/var/log/aws-routed-eni/plugin.log",
            "pluginLogLevel": "info",
            "capabilities": { "io.kubernetes.cri.pod-annotations": true },
        }],
    });
    fs::write(files.join("etc/cni/net.d/10-aws.conflist"), format!("{conflist:#}\n"))
        .doing(|| "write the CNI configuration".into())
}

/// Mounts the node's layers over what it shares with this machine. Runs in the node's mount namespace.
fn arrange(files: &Path) -> Result<()> {
    for part in LAYERED {
        let options = format!(
            "lowerdir=/{part},upperdir={},workdir={}{}",
            files.join(part).display(),
            files.join(format!(".{part}.work")).display(),
            // In a user namespace the layer keeps its notes in attributes a user may write.
            if crate::world::in_user_namespace() { ",userxattr" } else { "" }
        );
        let target = format!("/{part}");
        mount(Some("overlay"), target.as_str(), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .doing(|| format!("lay a node's own files over {target}"))?;
    }
    bind(&files.join("run"), Path::new("/run"))
}

fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).doing(|| format!("create {}", dir.display()))
}
