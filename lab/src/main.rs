//! The command line of the lab. Each command is one function; what they do is in the library.

use std::io::IsTerminal as _;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use lab::bench::{Bench, Other};
use lab::boot::{self, Running};
use lab::client;
use lab::ctl::{Control, DaemonAction, Info, NodeSpec, PodInfo, Probe, Request, Spec, Status};
use lab::demo::Demo;
use lab::error::{Result, chain};
use lab::heal::Heal;
use lab::matrix::{Families, Matrix, Mode};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

/// The VPC on one machine: simulated EC2, real kernel, real packets. Nothing outside its own namespaces is touched.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a lab and keep it up until Ctrl-C or `lab down`.
    Up(Up),
    /// Run a command on a machine (node-1, peer), in a pod (node-1/web), or in internet, vpc, peer-vpc.
    Exec {
        #[command(flatten)]
        lab: Name,
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Pods of the lab's own small runtime.
    #[command(subcommand)]
    Pod(PodVerb),
    /// Send an echo and ask the far side whom it saw. Places as in `exec`.
    Ping {
        #[command(flatten)]
        lab: Name,
        /// Over IPv6.
        #[arg(short = '6')]
        ipv6: bool,
        from: String,
        to: String,
    },
    /// Machines, ENIs, addresses, pods, drops and EC2 calls.
    Status {
        #[command(flatten)]
        lab: Name,
        #[arg(long)]
        json: bool,
    },
    /// Start, stop (SIGTERM) or kill (SIGKILL) the ipamd of a node.
    #[command(subcommand)]
    Daemon(DaemonVerb),
    /// Launch another node, or terminate one.
    #[command(subcommand)]
    Node(NodeVerb),
    /// Bring up two nodes and their pods, let everything talk to everything, judge it, and take it all down.
    Demo {
        /// Pods per node.
        #[arg(long, default_value_t = 20)]
        pods: usize,
        #[arg(long, value_delimiter = ',', default_value = "m5.large,t3.medium:1")]
        nodes: Vec<NodeSpec>,
        #[arg(long, env = "FLATWIRE_BIN_DIR")]
        bin_dir: Option<PathBuf>,
        /// Name of the lab it runs in.
        #[arg(long, default_value = "demo")]
        name: String,
    },
    /// Rules of the shapes kube-proxy makes on two nodes, traffic through all of them, and whom each far side saw.
    Matrix {
        /// What addresses pods have: IPv4, both, or IPv6 alone.
        #[arg(long, value_enum, value_delimiter = ',', default_value = "v4,dual,v6")]
        families: Vec<Families>,
        #[arg(long, value_enum, value_delimiter = ',', default_value = "legacy,nft,nftables")]
        modes: Vec<Mode>,
        #[arg(long, env = "FLATWIRE_BIN_DIR")]
        bin_dir: Option<PathBuf>,
        /// Name of the lab it runs in.
        #[arg(long, default_value = "matrix")]
        name: String,
        /// A variable for every ipamd, as NAME=VALUE.
        #[arg(long = "env", value_parser = variable)]
        env: Vec<(String, String)>,
    },
    /// Flush and change what ipamd keeps in the kernel, under traffic, and say how long each gap was.
    Heal {
        #[arg(long, env = "FLATWIRE_BIN_DIR")]
        bin_dir: Option<PathBuf>,
        /// Name of the lab it runs in.
        #[arg(long, default_value = "heal")]
        name: String,
        /// Only the steps whose names contain one of these.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// The rows as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Measure what a packet and a pod cost, beside other layouts and the floor; write a report and pictures.
    Bench(BenchArgs),
    /// End a lab.
    Down {
        #[command(flatten)]
        lab: Name,
    },
    /// Remove what a killed lab left of its folder.
    Clean,
    #[command(name = "__world", hide = true)]
    World { spec: String },
    #[command(name = "__traffic", hide = true, subcommand)]
    Traffic(TrafficVerb),
    #[command(name = lab::bench::INSIDE_COMMAND, hide = true)]
    BenchInside { job: String },
}

#[derive(Subcommand)]
enum TrafficVerb {
    Echo,
    Ping { target: IpAddr },
    Stream { target: IpAddr },
}

#[derive(Args)]
struct Name {
    /// Which lab.
    #[arg(long = "name", default_value = "default")]
    name: String,
}

impl Name {
    fn ask<T: serde::de::DeserializeOwned>(&self, request: &Request) -> Result<T> {
        Control::connect(&boot::dir_of(&self.name)?)?.ask(request)
    }
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    lab: Name,
    /// Instance types, each with the number of /28s, and of /80s, it is launched with: m5.large:1,m5.large:0:1,t3.medium.
    #[arg(long, value_delimiter = ',', default_value = "m5.large,m5.large:1")]
    nodes: Vec<NodeSpec>,
    /// Port of the EC2 API on 127.0.0.1; any free one by default.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Dual stack: IPv6 blocks for both VPCs and their subnets, and an IPv6 address for every machine.
    #[arg(long)]
    ipv6: bool,
    #[arg(long, default_value = "eu-central-1")]
    region: String,
    /// Where ids, MACs and address picks come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where ipamd and aws-cni are, if not beside this program.
    #[arg(long, env = "FLATWIRE_BIN_DIR")]
    bin_dir: Option<PathBuf>,
    /// Keep the nodes' files (ledger, logs, CNI configuration) in this folder instead of in memory.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// A variable for every ipamd, as NAME=VALUE.
    #[arg(long = "env", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Machines and fabric only: ipamd is not started.
    #[arg(long)]
    no_daemons: bool,
    /// Say what is up as JSON.
    #[arg(long)]
    json: bool,
    /// Say nothing.
    #[arg(long)]
    quiet: bool,
    /// End when standard input does: for programs that hold a lab.
    #[arg(long)]
    until_stdin_closes: bool,
    /// The whole description as JSON, instead of the options above.
    #[arg(long, hide = true)]
    spec: Option<String>,
}

#[derive(Args)]
struct BenchArgs {
    /// Few pods and short rounds: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Folder for report.json and the pictures.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Where ipamd and aws-cni are, if not beside this program.
    #[arg(long, env = "FLATWIRE_BIN_DIR")]
    bin_dir: Option<PathBuf>,
    /// Name of the lab it runs in.
    #[arg(long, default_value = "bench")]
    name: String,
    /// Measure this CNI plugin instead of ours: its path, or the folder of the plugins its list names.
    #[arg(long, requires = "conflist")]
    plugin: Option<PathBuf>,
    /// The network configuration list of that plugin.
    #[arg(long, requires = "plugin")]
    conflist: Option<PathBuf>,
    /// The daemon it needs, started on every node.
    #[arg(long, requires = "plugin")]
    daemon: Option<PathBuf>,
    /// An argument for the daemon; may be repeated.
    #[arg(long, requires = "daemon", allow_hyphen_values = true)]
    daemon_arg: Vec<String>,
    /// A variable for the daemon, as NAME=VALUE; may be repeated.
    #[arg(long, requires = "daemon", value_parser = variable)]
    daemon_env: Vec<(String, String)>,
}

#[derive(Subcommand)]
enum PodVerb {
    Add {
        #[command(flatten)]
        lab: Name,
        node: String,
        pod: String,
    },
    Del {
        #[command(flatten)]
        lab: Name,
        node: String,
        pod: String,
    },
    Exec {
        #[command(flatten)]
        lab: Name,
        node: String,
        pod: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    List {
        #[command(flatten)]
        lab: Name,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum DaemonVerb {
    Start(OnNode),
    Stop(OnNode),
    Kill(OnNode),
}

#[derive(Subcommand)]
enum NodeVerb {
    /// Launch one: m5.large, or m5.large:1 with a /28.
    Add {
        #[command(flatten)]
        lab: Name,
        spec: NodeSpec,
    },
    Remove(OnNode),
}

#[derive(Args)]
struct OnNode {
    #[command(flatten)]
    lab: Name,
    node: String,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lab: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<u8> {
    match verb {
        Verb::World { spec } => lab::world::main(&spec)?,
        Verb::Up(up) => return stay_up(up),
        Verb::Exec { lab, place, command } => return exec(&lab, &place, &command),
        Verb::Pod(PodVerb::Exec { lab, node, pod, command }) => return exec(&lab, &format!("{node}/{pod}"), &command),
        Verb::Pod(PodVerb::Add { lab, node, pod }) => {
            let pod: PodInfo = lab.ask(&Request::PodAdd { node, name: pod })?;
            println!("{}/{} has {} after {:.1} ms", pod.node, pod.name, addresses(&pod), pod.add_ms);
        }
        Verb::Pod(PodVerb::Del { lab, node, pod }) => {
            let took: f64 = lab.ask(&Request::PodDel { node: node.clone(), name: pod.clone() })?;
            println!("{node}/{pod} is gone after {took:.1} ms");
        }
        Verb::Pod(PodVerb::List { lab, json }) => {
            let pods: Vec<PodInfo> = lab.ask(&Request::Pods)?;
            if json {
                print_json(&pods);
            } else {
                for pod in pods {
                    println!("{:<24} {:<16} {}", format!("{}/{}", pod.node, pod.name), addresses(&pod), pod.netns);
                }
            }
        }
        Verb::Ping { lab, ipv6, from, to } => return ping(&lab, ipv6, from, to),
        Verb::Status { lab, json } => {
            let status: Status = lab.ask(&Request::Status)?;
            if json {
                print_json(&status);
            } else {
                print!("{}", lab::picture::status(&status));
            }
        }
        Verb::Daemon(verb) => {
            let (on, action, done) = match verb {
                DaemonVerb::Start(on) => (on, DaemonAction::Start, "serves"),
                DaemonVerb::Stop(on) => (on, DaemonAction::Stop, "has stopped"),
                DaemonVerb::Kill(on) => (on, DaemonAction::Kill, "is killed"),
            };
            on.lab.ask::<()>(&Request::Daemon { node: on.node.clone(), action })?;
            println!("ipamd of {} {done}", on.node);
        }
        Verb::Node(NodeVerb::Add { lab, spec }) => {
            let name: String = lab.ask(&Request::NodeAdd { spec })?;
            println!("{name} is up");
        }
        Verb::Node(NodeVerb::Remove(on)) => {
            on.lab.ask::<()>(&Request::NodeRemove { node: on.node.clone() })?;
            println!("{} is terminated", on.node);
        }
        Verb::Demo { pods, nodes, bin_dir, name } => {
            let good = lab::demo::run(&Demo { pods, nodes, bin_dir, name })?;
            return Ok(u8::from(!good));
        }
        Verb::Matrix { families, modes, bin_dir, name, env } => {
            let env = env.into_iter().collect();
            let good = lab::matrix::run(&Matrix { families, modes, bin_dir, name, env })?;
            return Ok(u8::from(!good));
        }
        Verb::Heal { bin_dir, name, only, json } => {
            let good = lab::heal::run(&Heal { bin_dir, name, only, json })?;
            return Ok(u8::from(!good));
        }
        Verb::Traffic(TrafficVerb::Echo) => lab::traffic::echo()?,
        Verb::Traffic(TrafficVerb::Ping { target }) => lab::traffic::ping(target)?,
        Verb::Traffic(TrafficVerb::Stream { target }) => lab::traffic::stream(target)?,
        Verb::Bench(args) => bench(args)?,
        Verb::BenchInside { job } => lab::bench::inside::main(&job)?,
        Verb::Down { lab } => down(&lab)?,
        Verb::Clean => {
            let gone = boot::clean()?;
            println!(
                "{}",
                if gone.is_empty() { "nothing to remove".into() } else { format!("removed {}", gone.join(", ")) }
            );
        }
    }
    Ok(0)
}

fn exec(lab: &Name, place: &str, command: &[String]) -> Result<u8> {
    let code = client::enter_and_run(&lab.name, place, command)?;
    Ok(u8::try_from(code).unwrap_or(255))
}

fn addresses(pod: &PodInfo) -> String {
    pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn ping(lab: &Name, ipv6: bool, from: String, to: String) -> Result<u8> {
    let probes: Vec<Probe> = lab.ask(&Request::Probe { from, to: vec![to], ipv6 })?;
    let mut silent = false;
    for probe in probes {
        let rtt = probe.rtt_us.map_or("no echo".into(), |us| format!("{us} µs"));
        let seen = probe.seen.map_or("nobody".into(), |source| source.to_string());
        println!("{} → {} ({}): {rtt}; the far side saw {seen}", probe.from, probe.to, probe.target);
        silent |= probe.rtt_us.is_none() || probe.seen.is_none();
    }
    Ok(u8::from(silent))
}

fn bench(args: BenchArgs) -> Result<()> {
    let BenchArgs { quick, out, bin_dir, name, plugin, conflist, daemon, daemon_arg, daemon_env } = args;
    let other = plugin.zip(conflist).map(|(plugin, conflist)| Other {
        plugin,
        conflist,
        daemon,
        daemon_args: daemon_arg,
        daemon_env,
    });
    lab::bench::run(&Bench { quick, name, bin_dir, out, other })
}

/// The world's end closes the connection before it can answer; that is the answer.
fn down(lab: &Name) -> Result<()> {
    let dir = boot::dir_of(&lab.name)?;
    let mut control = Control::connect(&dir)?;
    let _ = control.ask::<()>(&Request::Down);
    for _ in 0..1000 {
        if !dir.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if dir.exists() {
        return Err(lab::error::Error::refused(format!(
            "{} was asked to end and has not within 5 s; see {}",
            lab.name,
            dir.display()
        )));
    }
    println!("{} is down", lab.name);
    Ok(())
}

fn stay_up(up: Up) -> Result<u8> {
    let spec = match &up.spec {
        Some(json) => serde_json::from_str(json)
            .map_err(|source| lab::error::Error::Json { what: "the lab's description".into(), source })?,
        None => Spec {
            name: up.lab.name.clone(),
            nodes: up.nodes.clone(),
            region: up.region.clone(),
            seed: up.seed,
            ipv6: up.ipv6,
            bin_dir: up.bin_dir.clone(),
            keep: up.keep.clone(),
            env: up.env.iter().cloned().collect(),
            daemons: !up.no_daemons,
            ..Spec::default()
        },
    };
    if !up.quiet && !up.json {
        eprintln!("bringing up {} …", spec.name);
    }
    let mut running = boot::start(&spec, up.port)?;
    let info: Info = Control::connect(running.dir())?.ask(&Request::Info)?;
    if up.json {
        print_json(&info);
    } else if !up.quiet {
        print!("{}", lab::picture::welcome(&info));
    }
    let code = wait_for_the_end(&mut running, up.until_stdin_closes);
    if code != 0 {
        eprint!("{}", running.log());
    }
    Ok(code)
}

/// Until a signal, the end of the world, or the end of standard input.
fn wait_for_the_end(running: &mut Running, until_stdin_closes: bool) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("lab: cannot wait for signals: {error}");
            return 1;
        }
    };
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return 1;
        };
        let mut look = tokio::time::interval(Duration::from_millis(50));
        let input = end_of_input();
        tokio::pin!(input);
        loop {
            tokio::select! {
                _ = interrupt.recv() => return 0,
                _ = terminate.recv() => return 0,
                () = &mut input, if until_stdin_closes => return 0,
                _ = look.tick() => if let Some(clean) = running.ended() { return u8::from(!clean) },
            }
        }
    })
}

/// Without a thread: this process can make none, since its children belong to another process namespace.
async fn end_of_input() {
    let input = std::io::stdin().as_fd().try_clone_to_owned().and_then(pipe::Receiver::from_owned_fd);
    match input {
        Ok(mut input) => while matches!(input.read(&mut [0; 256]).await, Ok(1..)) {},
        Err(error) => eprintln!("lab: --until-stdin-closes needs a pipe: {error}"),
    }
}

fn print_json(value: &impl serde::Serialize) {
    let pretty = std::io::stdout().is_terminal();
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    println!("{}", text.unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}")));
}
