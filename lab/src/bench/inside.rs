//! The part of a benchmark that runs within a lab, as a process of its own: nothing but it measures, and with it goes all it
//! has made.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use super::floor::Floor;
use super::layout::{Layout, Pod};
use super::measure::PingPong;
use super::ours;
use super::path::{Contender, Effort, Row, Scope, compare, measure as measure_path};
use super::pods::{Caller, Chain, PodsReport, measure as measure_pods, take_down};
use super::report::Measured;
use crate::ctl::Entrance;
use crate::error::{Doing, Error, Result, chain};
use crate::fabric::{EC2_INSIDE, IMDS};
use crate::ns::{Place, make_private};

/// A daemon must serve its first ADD within this.
const SERVES_WITHIN: Duration = Duration::from_secs(60);
const DAEMON_LOG: &str = "/var/log/bench-daemon.log";
/// The world's process, as everything in the lab sees it.
const WORLD: u32 = 1;

/// What to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    pub nodes: Vec<(String, Entrance)>,
    pub path: Effort,
    /// ADDs and DELs one at a time.
    pub alone: u32,
    /// ADDs and DELs at once.
    pub burst: usize,
    pub given: Option<Given>,
}

/// Another implementation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Given {
    pub chain: Chain,
    pub daemon: Option<Daemon>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Daemon {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

/// The hidden command: takes a job, prints what was measured as JSON.
pub fn main(job: &str) -> Result<()> {
    let job: Job = serde_json::from_str(job).doing(|| "the job".into())?;
    let start = Instant::now();
    let tell = |text: &str| eprintln!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
    let mut nodes = Vec::new();
    for (name, entrance) in &job.nodes {
        nodes.push((name.as_str(), Place::of_process(WORLD, entrance.net_fd, entrance.mnt_fd)?));
    }
    let first = nodes.first().map(|(_, place)| place).ok_or_else(|| Error::refused("the lab has no node"))?;
    let (pods, path) = match &job.given {
        None => {
            let chain = ours(first)?;
            let caller = Caller { node: first, chain: &chain };
            let mut floor = Floor::of(first)?;
            let (mut pods, sandboxes) = measure_pods(&caller, job.alone, job.burst, Some(&mut floor), &tell)?;
            take_down(&caller, &mut pods, sandboxes)?;
            (pods, measure_layouts(&job.path, &tell)?)
        }
        Some(given) => measure_given(&job, given, &nodes, &tell)?,
    };
    let measured = Measured { effort: job.path, alone: job.alone, pods, path };
    println!("{}", serde_json::to_string(&measured).doing(|| "what was measured".into())?);
    Ok(())
}

/// The layouts are on machines of their own, in a fabric whose names nobody else sees.
fn measure_layouts(effort: &Effort, tell: &dyn Fn(&str)) -> Result<Vec<Row>> {
    unshare(CloneFlags::CLONE_NEWNS).doing(|| "create a mount namespace".into())?;
    make_private()?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, None::<&str>)
        .doing(|| "mount an empty /run".into())?;
    fs::create_dir("/run/netns").doing(|| "create /run/netns".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.doing(|| "start a runtime".into())?.block_on(measure_path(effort, tell))
}

/// ADD and DEL of what was given, and the path between the pods it wired, with two pods on the node and with the burst.
fn measure_given(
    job: &Job,
    given: &Given,
    nodes: &[(&str, Place)],
    tell: &dyn Fn(&str),
) -> Result<(PodsReport, Vec<Row>)> {
    let [(_, here), (_, there)] = nodes else { return Err(Error::refused("two nodes are needed")) };
    let mut daemons = Vec::new();
    for (name, node) in nodes {
        daemons.extend(given.daemon.as_ref().map(|daemon| Running::start(daemon, name, node)).transpose()?);
    }
    let caller = Caller { node: here, chain: &given.chain };
    let far = Caller { node: there, chain: &given.chain };
    tell("the first pods");
    let mut trio = [caller.sandbox("near")?, caller.sandbox("beside")?, far.sandbox("away")?];
    for (sandbox, caller) in trio.iter_mut().zip([&caller, &caller, &far]) {
        let deadline = Instant::now() + SERVES_WITHIN;
        while let Err(error) = caller.add(sandbox) {
            if daemons.is_empty() || Instant::now() > deadline {
                let logs: Vec<String> = daemons.iter().map(Running::log).collect();
                return Err(Error::refused(format!("{}{}", chain(&error), logs.concat())));
            }
            // As a runtime does after a failed ADD, and it tries again.
            let _ = caller.del(sandbox);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let [near, beside, away] = [trio[0].pod()?, trio[1].pod()?, trio[2].pod()?];
    let contenders = contenders(near, beside, away, tell)?;
    let mut rows = compare(&job.path, 2, &contenders)?;
    let (mut pods, sandboxes) = measure_pods(&caller, job.alone, job.burst, None, tell)?;
    let crowd = sandboxes.len() + 2;
    tell(&format!("{crowd} pods on the node"));
    rows.extend(compare(&job.path, crowd, &contenders)?);
    take_down(&caller, &mut pods, sandboxes)?;
    Ok((pods, rows))
}

/// Not every network reaches from node to node; that is no fault of the measurement.
fn contenders(near: Pod, beside: Pod, away: Pod, tell: &dyn Fn(&str)) -> Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    for (scope, far) in [(Scope::SameNode, beside), (Scope::AcrossNodes, away)] {
        let pods = [near.clone(), far];
        match PingPong::between(&pods[0], &pods[1]).and_then(|sockets| sockets.round(1)) {
            Ok(_) => contenders.push(Contender { layout: Layout::Given, scope, pods, few: None }),
            Err(error) => tell(&format!("no way from pod to pod {}: {}", scope.text(), chain(&error))),
        }
    }
    Ok(contenders)
}

/// A daemon on a node, ended with this value.
struct Running {
    child: Child,
    name: String,
    node: Place,
}

impl Running {
    fn start(daemon: &Daemon, name: &str, node: &Place) -> Result<Self> {
        let child = node.run(|| -> std::io::Result<Child> {
            let log = OpenOptions::new().create(true).append(true).open(DAEMON_LOG)?;
            Command::new(&daemon.program)
                .args(&daemon.args)
                .env("AWS_EC2_ENDPOINT", format!("http://{EC2_INSIDE}"))
                .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}"))
                .env("MY_NODE_NAME", name)
                .envs(daemon.env.iter().map(|(key, value)| (key, value)))
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
        })?;
        let child = child.doing(|| format!("start {} on {name}", daemon.program.display()))?;
        Ok(Self { child, name: name.to_owned(), node: node.clone() })
    }

    /// How its log ends, for a message.
    fn log(&self) -> String {
        let text = self.node.run(|| fs::read_to_string(Path::new(DAEMON_LOG)).unwrap_or_default()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n");
        format!("\nthe daemon of {} said last:\n{tail}", self.name)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
