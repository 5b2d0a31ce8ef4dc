//! ADD and DEL: a plugin called as a runtime calls it, from exec to exit, one at a time and many at once, beside the floor
//! that no plugin can get under.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::floor::{Floor, FloorTimes};
use super::layout::Pod;
use super::measure::Spread;
use crate::error::{Doing, Error, Result};
use crate::ns::Place;
use crate::runtime::{self, Verb};

/// What is called: a list of plugins as a runtime finds it, and where they are as the node sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chain {
    pub conflist: Value,
    pub bin_dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodsReport {
    /// The network's name and its plugins.
    pub plugin: String,
    /// One call at a time, exec to exit.
    pub add_ms: Spread,
    pub del_ms: Spread,
    /// VERSION: what starting the plugin costs by itself.
    pub start_ms: Spread,
    /// Measured in turns with the ADDs; absent for a plugin that was given.
    pub floor: Option<FloorTimes>,
    /// p50 of ADD over the floor's p50.
    pub add_over_floor: Option<f64>,
    pub burst: Burst,
}

/// So many calls started at the same moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Burst {
    pub pods: usize,
    pub add_ms: Spread,
    /// From the first exec to the last exit.
    pub add_wall_ms: f64,
    /// Processor time of the plugins' processes.
    pub add_cpu_ms: f64,
    pub del_ms: Spread,
    pub del_wall_ms: f64,
    pub del_cpu_ms: f64,
    /// What the last of the burst waits for, in words.
    pub bound: String,
}

/// A sandbox on a node, and what its plugins answered.
pub struct Sandbox {
    id: String,
    pub place: Place,
    path: PathBuf,
    result: Value,
}

impl Sandbox {
    pub fn pod(&self) -> Result<Pod> {
        Ok(Pod { place: self.place.clone(), address: address_of(&self.result)? })
    }
}

/// A runtime that does nothing but call.
pub struct Caller<'a> {
    pub node: &'a Place,
    pub chain: &'a Chain,
}

impl Caller<'_> {
    /// Makes a network namespace as a runtime does.
    pub fn sandbox(&self, name: &str) -> Result<Sandbox> {
        let path = Path::new("/run/netns").join(name);
        let place = self.node.new_at(&path)?;
        let mut id = String::new();
        for byte in name.bytes().chain([b'.'; 32]).take(32) {
            let _ = write!(id, "{byte:02x}");
        }
        Ok(Sandbox { id, place, path, result: Value::Null })
    }

    /// Calls the chain's plugins, and returns how long they took from exec to exit.
    pub fn add(&self, sandbox: &mut Sandbox) -> Result<Duration> {
        let mut took = Duration::ZERO;
        for plugin in self.plugins() {
            let (result, this) = self.call(Verb::Add, plugin, sandbox)?;
            sandbox.result = result;
            took += this;
        }
        Ok(took)
    }

    pub fn del(&self, sandbox: &Sandbox) -> Result<Duration> {
        let mut took = Duration::ZERO;
        for plugin in self.plugins().iter().rev() {
            took += self.call(Verb::Del, plugin, sandbox)?.1;
        }
        Ok(took)
    }

    fn start(&self, sandbox: &Sandbox) -> Result<Duration> {
        let plugin = self.plugins().first().ok_or_else(|| Error::refused("the list names no plugin"))?;
        Ok(self.call(Verb::Version, plugin, sandbox)?.1)
    }

    fn plugins(&self) -> &[Value] {
        self.chain.conflist["plugins"].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    fn call(&self, verb: Verb, plugin: &Value, sandbox: &Sandbox) -> Result<(Value, Duration)> {
        let mut config = plugin.clone();
        config["cniVersion"] = self.chain.conflist["cniVersion"].clone();
        config["name"] = self.chain.conflist["name"].clone();
        if !sandbox.result.is_null() {
            config["prevResult"] = sandbox.result.clone();
        }
        let kind = plugin["type"].as_str().unwrap_or_default();
        let pod = sandbox.path.file_name().unwrap_or_default().to_string_lossy();
        let mut command = runtime::plugin(&[&self.chain.bin_dir], kind, verb, &pod, &sandbox.id, &sandbox.path);
        let exchange = || -> std::io::Result<_> {
            // Files in memory, where a runtime has pipes: nobody has to be woken but for the end.
            let (mut given, mut out, mut err) = (in_memory()?, in_memory()?, in_memory()?);
            given.write_all(config.to_string().as_bytes())?;
            given.rewind()?;
            command.stdin(given).stdout(out.try_clone()?).stderr(err.try_clone()?);
            let start = Instant::now();
            let status = command.spawn()?.wait()?;
            let took = start.elapsed();
            Ok((status, took, [all_of(&mut out)?, all_of(&mut err)?]))
        };
        let ran = self.node.run(exchange)?;
        let (status, took, [stdout, stderr]) =
            ran.doing(|| format!("run the plugin {kind} from {}", self.chain.bin_dir.display()))?;
        let said: Value = serde_json::from_str(&stdout).unwrap_or(Value::Null);
        if status.success() {
            return Ok((said, took));
        }
        let words = [stdout, stderr].map(|text| text.trim().to_owned());
        let message = said["msg"].as_str().map_or_else(|| words.join(" "), str::to_owned);
        let code = said["code"].as_i64().unwrap_or(-1);
        Err(Error::Cni { verb: verb.name(), pod: pod.into_owned(), code, message })
    }
}

fn in_memory() -> std::io::Result<File> {
    Ok(memfd_create("call", MFdFlags::MFD_CLOEXEC)?.into())
}

fn all_of(file: &mut File) -> std::io::Result<String> {
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Measures ADD and DEL on a node. With a floor, it is measured in turns with the ADDs. What was wired stays wired in the
/// sandboxes of the burst, which the caller gets to measure between and to let go.
pub fn measure(
    caller: &Caller<'_>,
    alone: u32,
    burst: usize,
    floor: Option<&mut Floor>,
    tell: &dyn Fn(&str),
) -> Result<(PodsReport, Vec<Sandbox>)> {
    tell(&format!("ADD and DEL, {alone} times alone"));
    let (singles, floor) = one_by_one(caller, alone, floor)?;
    tell(&format!("{burst} ADDs at once"));
    let mut sandboxes = (0..burst).map(|n| caller.sandbox(&format!("burst-{n}"))).collect::<Result<Vec<_>>>()?;
    let added = at_once(&mut sandboxes, |sandbox| caller.add(sandbox))?;
    let [add_ms, del_ms, start_ms] = singles;
    let report = PodsReport {
        plugin: caller.chain.conflist["name"].as_str().unwrap_or_default().to_owned(),
        add_over_floor: floor.as_ref().map(|floor| add_ms.p50 / floor.total_ms),
        burst: Burst {
            pods: burst,
            add_ms: added.times,
            add_wall_ms: added.wall_ms,
            add_cpu_ms: added.cpu_ms,
            bound: bound(&added, burst, floor.as_ref()),
            ..Burst::default()
        },
        add_ms,
        del_ms,
        start_ms,
        floor,
    };
    Ok((report, sandboxes))
}

/// Takes the burst down again, all at once.
pub fn take_down(caller: &Caller<'_>, report: &mut PodsReport, mut sandboxes: Vec<Sandbox>) -> Result<()> {
    let deleted = at_once(&mut sandboxes, |sandbox| caller.del(sandbox))?;
    report.burst.del_ms = deleted.times;
    report.burst.del_wall_ms = deleted.wall_ms;
    report.burst.del_cpu_ms = deleted.cpu_ms;
    Ok(())
}

/// Namespaces are kept until the last call has been measured: taking one down keeps the kernel busy for long after.
fn one_by_one(
    caller: &Caller<'_>,
    alone: u32,
    mut floor: Option<&mut Floor>,
) -> Result<([Spread; 3], Option<FloorTimes>)> {
    let mut sandboxes = Vec::new();
    let (mut add, mut del, mut start) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..alone {
        let mut sandbox = caller.sandbox(&format!("alone-{number}"))?;
        if let Some(floor) = &mut floor {
            floor.turn(number)?;
        }
        start.push(ms(caller.start(&sandbox)?));
        add.push(ms(caller.add(&mut sandbox)?));
        sandboxes.push(sandbox);
    }
    for sandbox in &sandboxes {
        del.push(ms(caller.del(sandbox)?));
    }
    let floor = floor.map(|floor| floor.times()).transpose()?;
    Ok(([add, del, start].map(Spread::of), floor))
}

struct AtOnce {
    times: Spread,
    wall_ms: f64,
    cpu_ms: f64,
}

/// Runs `work` for all sandboxes from one moment on, a thread each.
fn at_once(sandboxes: &mut [Sandbox], work: impl Fn(&mut Sandbox) -> Result<Duration> + Sync) -> Result<AtOnce> {
    let ready = Barrier::new(sandboxes.len() + 1);
    let before = cpu()?;
    let (times, wall) = std::thread::scope(|scope| -> Result<_> {
        let running: Vec<_> = (sandboxes.iter_mut())
            .map(|sandbox| {
                scope.spawn(|| {
                    ready.wait();
                    work(sandbox)
                })
            })
            .collect();
        ready.wait();
        let start = Instant::now();
        let mut times = Vec::new();
        for one in running {
            times.push(ms(one.join().map_err(|_| Error::refused("a call's thread panicked"))??));
        }
        Ok((times, start.elapsed()))
    })?;
    Ok(AtOnce { times: Spread::of(times), wall_ms: ms(wall), cpu_ms: ms(cpu()?.saturating_sub(before)) })
}

/// Processor time of all plugins that have ended.
fn cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).doing(|| "read the plugins' processor time".into())?;
    let time = |value: nix::sys::time::TimeVal| {
        let part = |number: i64| u64::try_from(number).unwrap_or_default();
        Duration::from_secs(part(value.tv_sec())) + Duration::from_micros(part(value.tv_usec()))
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

/// Which of the two things that cannot be shared took most of the wall clock.
fn bound(burst: &AtOnce, pods: usize, floor: Option<&FloorTimes>) -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let busy = burst.cpu_ms / number(cores);
    let share = |part: f64| format!("{:.0} %", 100.0 * part / burst.wall_ms);
    let mut text = format!(
        "{:.0} ms of processor time of the plugins on {cores} processors fill {} of the {:.0} ms",
        burst.cpu_ms,
        share(busy),
        burst.wall_ms
    );
    if let Some(floor) = floor {
        let serial = floor.netlink_ms.p50 * number(pods);
        let _ = write!(
            text,
            "; the kernel makes links one after the other, which alone takes {serial:.0} ms, {}",
            share(serial)
        );
    }
    text
}

pub fn number(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The first address of a result, in the form of any version.
fn address_of(result: &Value) -> Result<Ipv4Addr> {
    let text = [&result["ips"][0]["address"], &result["ip4"]["ip"]].into_iter().find_map(Value::as_str);
    let bare = text.unwrap_or_default().split('/').next().unwrap_or_default();
    bare.parse().map_err(|_| Error::refused(format!("the plugin's result carries no IPv4 address: {}", json!(result))))
}
