//! `sim`: runs fresh seeds of the simulated world, or replays one.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand, ValueEnum};
use lab_sim::{Failure, Tally, Telling, exhibits, fleet, report, run_seed, tell_seed, tour};

/// Of the story of a seed that failed.
const TAIL: usize = 60;

/// The pool in a seeded world with a virtual clock.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run seeds until time or seeds run out, or one breaks a rule.
    Run(Run),
    /// Play the outages that others have reported, with a naive policy and with ours.
    Museum(Museum),
    /// Start many nodes at once on one account, under the pool and under the add-on's policy.
    Fleet(Fleet),
    /// What fresh nodes ask of EC2 until their pods are served, beside the least that the limits allow.
    Calls,
}

#[derive(Args)]
struct Fleet {
    #[arg(long, default_value_t = 1_000)]
    nodes: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the first shape, whose figures are the last line.
    #[arg(long)]
    brief: bool,
}

#[derive(Args)]
struct Museum {
    /// Tell the story of this exhibit, by its thread or its test.
    #[arg(long)]
    tell: Option<String>,
    /// How much of a story to print.
    #[arg(long, value_enum, default_value_t = StoryPart::Tail)]
    story: StoryPart,
}

#[derive(Args)]
struct Run {
    /// How long to run fresh seeds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Replay this seed and tell its story.
    #[arg(long)]
    seed: Option<u64>,
    /// The first seed; without it one is drawn.
    #[arg(long)]
    from_seed: Option<u64>,
    /// So many seeds, however long they take.
    #[arg(long)]
    seeds: Option<u64>,
    /// How much of a story to print.
    #[arg(long, value_enum, default_value_t = StoryPart::Tail)]
    story: StoryPart,
    /// Seeds run at the same time, each on a thread of its own.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Go on after a seed that failed, and list all of them.
    #[arg(long)]
    keep_going: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StoryPart {
    Tail,
    Full,
}

impl StoryPart {
    fn telling(self) -> Telling {
        match self {
            Self::Tail => Telling::Tail(TAIL),
            Self::Full => Telling::Full,
        }
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(run) => explore_or_replay(&run),
        Command::Museum(museum) => visit(&museum),
        Command::Fleet(args) => scale_out(&args),
        Command::Calls => {
            let bill = fleet::bill();
            println!("{}calls: least={}", bill.text, if bill.least { "yes" } else { "no" });
            if bill.least { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn visit(museum: &Museum) -> ExitCode {
    if let Some(name) = &museum.tell {
        let chosen = exhibits().into_iter().find(|exhibit| exhibit.thread == name || exhibit.test == name);
        let Some(exhibit) = chosen else {
            eprintln!("sim museum: no exhibit {name}; `sim museum` lists their threads");
            return ExitCode::from(2);
        };
        println!("{}", exhibit.tell(museum.story.telling()));
        return ExitCode::SUCCESS;
    }
    let terminal = std::io::stdout().is_terminal();
    let tour = tour(|done, all| {
        if terminal {
            print!("\r  {done} of {all} exhibits ");
            let _ = std::io::stdout().flush();
        }
    });
    let clear = if terminal { "\r" } else { "" };
    println!("{clear}{}museum: held={}/{}", tour.text, tour.held, tour.of);
    if tour.held == tour.of { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn explore_or_replay(run: &Run) -> ExitCode {
    let (tally, failures) = match run.seed {
        Some(seed) => replay(seed, run),
        None => explore(run),
    };
    for failure in &failures {
        if run.seed.is_none() {
            println!("{}", tell_seed(failure.seed, run.story.telling()).0);
        }
    }
    println!("sim: seeds={} steps={} violations={}", tally.seeds, tally.steps, failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn scale_out(args: &Fleet) -> ExitCode {
    let shapes = if args.brief { 1 } else { fleet::SHAPES.len() };
    let mut verdicts = fleet::SHAPES.iter().take(shapes).map(|shape| {
        let verdict = fleet::race_both(args.nodes, shape, args.seed);
        println!("{}", verdict.text);
        verdict
    });
    let first = verdicts.next();
    verdicts.for_each(drop);
    let Some(first) = first else { return ExitCode::FAILURE };
    println!("fleet: ours_over_floor={} addon_over_floor={}", first.ours, first.addon);
    if first.holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn replay(seed: u64, run: &Run) -> (Tally, Vec<Failure>) {
    println!("{}", tell_seed(seed, run.story.telling()).0);
    let (tally, failure) = run_seed(seed);
    (tally, failure.into_iter().collect())
}

fn explore(run: &Run) -> (Tally, Vec<Failure>) {
    let first = run.from_seed.unwrap_or_else(entropy);
    println!("sim: seeds from {first} (replay one with --seed N)");
    let started = Instant::now();
    let (next, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let sum = Mutex::new((Tally::default(), Vec::new(), Duration::ZERO));
    std::thread::scope(|scope| {
        for _ in 0..run.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let time_is_up = run.seeds.is_none() && started.elapsed() >= Duration::from_secs(run.seconds);
                    let enough = run.seeds.is_some_and(|seeds| number >= seeds);
                    if time_is_up || enough || over.load(Ordering::Relaxed) {
                        return;
                    }
                    let begun = Instant::now();
                    let (tally, failure) = run_seed(first.wrapping_add(number));
                    let mut sum = sum.lock().expect("invariant: no thread panics with the sum in hand");
                    sum.0.add(&tally);
                    sum.2 += begun.elapsed();
                    if failure.is_some() && !run.keep_going {
                        over.store(true, Ordering::Relaxed);
                    }
                    sum.1.extend(failure);
                    progress(&sum.0, sum.1.len(), started.elapsed());
                }
            });
        }
    });
    let (tally, failures, busy) = sum.into_inner().expect("invariant: no thread panics with the sum in hand");
    if std::io::stdout().is_terminal() {
        println!();
    }
    let cpu_ms = cpu_ms().unwrap_or_else(|| u64::try_from(busy.as_millis()).unwrap_or(u64::MAX));
    print!("{}", report(&tally, cpu_ms));
    (tally, failures)
}

fn progress(tally: &Tally, failures: usize, elapsed: Duration) {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        let (secs, hours) = (elapsed.as_secs(), tally.node_hours());
        let _ = write!(out, "\r  {secs:>4} s  {} seeds, {hours} node-hours, {failures} failed ", tally.seeds);
        let _ = out.flush();
    }
}

/// CPU time of this process, where the kernel says it: a machine that is shared must not look slower than it is.
fn cpu_ms() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name in brackets: state, then ten numbers, then user and system time in hundredths of a second.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) * 10)
}

/// A seed nobody chose.
fn entropy() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mixed = lab_sim::Dice::new(now.as_secs() ^ (u64::from(now.subsec_nanos()) << 20)).number();
    // Short enough to be typed.
    mixed % 1_000_000_000
}
