//! `lab bench`: what a packet and a pod cost, beside what they cost with other layouts and at least. One run, one report.
//!
//! `inside` runs within a lab and measures: `pods` calls plugins, with `floor` beside them, and `path` times packets over
//! the layouts of `layout` on the machines of `site`, by the means of `measure`. `report` is what was measured, as data
//! and as a table, `charts` draws it with `svg`. Figures are for reading: none of them makes a run fail.

mod charts;
mod floor;
pub mod inside;
mod layout;
mod measure;
mod path;
mod pods;
pub mod report;
mod site;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize as _;
use serde_json::Value;

use self::inside::{Daemon, Given, Job};
use self::path::Effort;
use self::pods::Chain;
use self::report::{Measured, Report};
use crate::client::Lab;
use crate::ctl::{Entrance, NodeSpec, Request, Spec};
use crate::error::{Doing, Error, Result};
use crate::node::Programs;
use crate::runtime::{BIN_DIRS, CONFLIST};

/// The hidden command that measures inside the lab.
pub const INSIDE_COMMAND: &str = "__bench";

/// Addresses for every pod of a run, those that cool down included, without a call of EC2.
const NODE: &str = "m5.4xlarge:20";
const HELD: &str = "320";

#[derive(Debug, Clone)]
pub struct Bench {
    /// Few pods and short rounds: to see that it works.
    pub quick: bool,
    pub name: String,
    pub bin_dir: Option<PathBuf>,
    /// Where the report and the pictures go.
    pub out: PathBuf,
    pub other: Option<Other>,
}

/// Another implementation to be measured in place of ours.
#[derive(Debug, Clone)]
pub struct Other {
    /// A plugin, or the folder of the plugins that the list names.
    pub plugin: PathBuf,
    pub conflist: PathBuf,
    pub daemon: Option<PathBuf>,
    pub daemon_args: Vec<String>,
    pub daemon_env: Vec<(String, String)>,
}

/// Measures, writes the report and the pictures, and prints the tables.
pub fn run(bench: &Bench) -> Result<()> {
    let job = job(bench)?;
    let measured = measure(bench, job)?;
    let report = Report::of(measured, bench.quick)?;
    fs::create_dir_all(&bench.out).doing(|| format!("create {}", bench.out.display()))?;
    let write = |name: &str, text: &str| {
        let path = bench.out.join(name);
        fs::write(&path, text).doing(|| format!("write {}", path.display()))
    };
    let json = serde_json::to_string_pretty(&report).doing(|| "the report".into())?;
    write("report.json", &format!("{json}\n"))?;
    for (name, picture) in charts::all(&report) {
        write(name, &picture)?;
    }
    print!("{}", report.text());
    println!("\nwritten to {}: report.json, latency.svg, throughput.svg, pods.svg", bench.out.display());
    println!("{}", report.summary());
    Ok(())
}

/// What is to be measured, without the places.
fn job(bench: &Bench) -> Result<Job> {
    let path = match bench.quick {
        true => Effort { pods: vec![1, 10, 20], rounds: 3, trips: 200, stream_ms: 20, stream_rounds: 1 },
        false => Effort { pods: vec![1, 100, 250, 500, 750], rounds: 15, trips: 700, stream_ms: 150, stream_rounds: 3 },
    };
    let (alone, burst) = if bench.quick { (5, 10) } else { (40, 110) };
    let given = bench.other.as_ref().map(given).transpose()?;
    Ok(Job { nodes: Vec::new(), path, alone, burst, given })
}

fn given(other: &Other) -> Result<Given> {
    let absolute = |path: &Path| path.canonicalize().doing(|| format!("find {}", path.display()));
    let plugin = absolute(&other.plugin)?;
    let bin_dir = if plugin.is_dir() { plugin } else { plugin.parent().unwrap_or(Path::new("/")).to_owned() };
    let text = fs::read_to_string(&other.conflist).doing(|| format!("read {}", other.conflist.display()))?;
    let conflist: Value = serde_json::from_str(&text).doing(|| other.conflist.display().to_string())?;
    if conflist["plugins"].as_array().is_none_or(Vec::is_empty) {
        let path = other.conflist.display();
        return Err(Error::refused(format!("{path} is no network configuration list: it has no \"plugins\"")));
    }
    let daemon = match &other.daemon {
        None => None,
        Some(program) => {
            Some(Daemon { program: absolute(program)?, args: other.daemon_args.clone(), env: other.daemon_env.clone() })
        }
    };
    Ok(Given { chain: Chain { conflist, bin_dir }, daemon })
}

/// Runs the job inside a lab made for it.
fn measure(bench: &Bench, mut job: Job) -> Result<Measured> {
    let program = std::env::current_exe().doing(|| "find the lab's own program".into())?;
    let node: NodeSpec = NODE.parse()?;
    let spec = Spec {
        name: bench.name.clone(),
        // Ours needs one node to wire pods on; the path is measured on others. What is given is measured on both.
        nodes: vec![node; if job.given.is_some() { 2 } else { 1 }],
        bin_dir: bench.bin_dir.clone(),
        env: [("MINIMUM_IP_TARGET".to_owned(), HELD.to_owned())].into(),
        daemons: job.given.is_none(),
        ..Spec::default()
    };
    if spec.daemons {
        // Told before anything is started.
        Programs::find(spec.bin_dir.as_deref())?;
    }
    let mut lab = Lab::start(&program, &spec)?;
    lab.settle()?;
    for node in lab.info().nodes.clone() {
        let entrance: Entrance = lab.ask(&Request::Enter { place: node.name.clone() })?;
        if node.name.starts_with("node-") {
            job.nodes.push((node.name, entrance));
        }
    }
    let json = serde_json::to_string(&job).doing(|| "the job".into())?;
    let output = Command::new(&program)
        .args(["exec", "--name", lab.name(), "vpc", "--"])
        .arg(&program)
        .args([INSIDE_COMMAND, &json])
        .stderr(Stdio::inherit())
        .output()
        .doing(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        return Err(Error::refused(format!("the measurement ended with {}; its reason stands above", output.status)));
    }
    let value: Value = serde_json::from_slice(&output.stdout).doing(|| "what was measured".into())?;
    Measured::deserialize(value).doing(|| "what was measured".into())
}

/// Our own configuration, as it stands on a node of the lab.
fn ours(node: &crate::ns::Place) -> Result<Chain> {
    let text = node.run(|| fs::read_to_string(CONFLIST))?.doing(|| format!("read {CONFLIST}"))?;
    Ok(Chain { conflist: serde_json::from_str(&text).doing(|| CONFLIST.into())?, bin_dir: BIN_DIRS[0].into() })
}
