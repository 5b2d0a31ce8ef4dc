//! `sim`: runs fresh seeds of the simulated world, or replays one.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand, ValueEnum};
use lab_sim::fleet::{Brain, Fleet, table};
use lab_sim::{Failure, Shape, Tally, Telling, report, run_seed, tell_seed};

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
    /// Start many nodes at once on one account, under the pool and under the add-on's policy.
    Fleet(FleetArgs),
}

#[derive(Args)]
struct FleetArgs {
    #[arg(long, default_value_t = 1_000)]
    nodes: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the first shape, whose figures are the last line.
    #[arg(long)]
    brief: bool,
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
        Command::Run(args) => run(&args),
        Command::Fleet(args) => fleet(&args),
    }
}

fn run(run: &Run) -> ExitCode {
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

/// The first is the one that is judged; the others show what the limits make of other nodes.
const SHAPES: [Shape; 4] = [
    Shape::singles("m5.large", 16),
    Shape::singles("m5.large", 27),
    Shape::prefixes("m5.large", 0, 12),
    Shape::prefixes("m5.large", 7, 110),
];

/// More than this over the floor is a failure.
const MOST_OVER_FLOOR: f64 = 1.2;

fn fleet(args: &FleetArgs) -> ExitCode {
    let (mut last, mut good) = (String::new(), true);
    for shape in SHAPES.into_iter().take(if args.brief { 1 } else { SHAPES.len() }) {
        let fleet = Fleet { seed: args.seed, ..Fleet::new(args.nodes, shape.clone()) };
        let (ours, addon) = (fleet.run(Brain::Ours), fleet.run(Brain::AddOn));
        println!("{}", table(&shape, args.nodes, &ours, &addon));
        if last.is_empty() {
            let ratio = |of: Option<f64>| of.map_or_else(|| "never".to_owned(), |ratio| format!("{ratio:.2}"));
            good = ours.over_floor().is_some_and(|ratio| ratio <= MOST_OVER_FLOOR);
            last = format!(
                "fleet: ours_over_floor={} addon_over_floor={}",
                ratio(ours.over_floor()),
                ratio(addon.over_floor())
            );
        }
    }
    println!("{last}");
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
    print!("{}", report(&tally, u64::try_from(busy.as_millis()).unwrap_or(u64::MAX)));
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

/// A seed nobody chose.
fn entropy() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mixed = lab_sim::Dice::new(now.as_secs() ^ (u64::from(now.subsec_nanos()) << 20)).number();
    // Short enough to be typed.
    mixed % 1_000_000_000
}
