//! The outage museum: outages that others have reported, each as a scenario that is played twice: with a naive policy, to
//! show that it bites, and with the real pool, which must come through it unharmed.
//!
//! An exhibit is data. What is in order without its event must be in order for the naive policy too, so that it is the event
//! that bites; and the real pool must not break any rule of the simulator, nor leave a pod without an address, whatever the
//! exhibit's probe looks at. Every exhibit is played in several worlds: of the naive policy the best counts, of ours the
//! worst. `docs/museum.md` shows them all.

mod cool_down;
mod half_done;
mod leaks;
mod probe;
mod runtime;
mod shortage;
mod stale_readings;

use std::fmt::Write as _;

use flatwire_core::pool::Pool;

use crate::naive::{Naive, NaiveWithFallback};
use crate::policy::Policy;
use crate::scenario::Scenario;
use crate::story::Telling;
use crate::world::World;

use probe::{Harm, Probe, Seen};

/// Worlds that each exhibit is played in.
const SEEDS: std::ops::Range<u64> = 1..101;
const MINUTE: u64 = 60_000;
/// A world in which so much is wrong is watched no further: it may not even move on.
const MOST_VIOLATIONS: usize = 1_000;

/// One outage.
pub struct Exhibit {
    /// Of its test.
    pub test: &'static str,
    /// Where it was reported.
    pub thread: &'static str,
    pub title: &'static str,
    /// What happens to others.
    pub elsewhere: &'static str,
    /// What happens here.
    pub here: &'static str,
    /// The world without the event.
    setting: Scenario,
    event: fn(Scenario) -> Scenario,
    /// How long it is looked at.
    minutes: u64,
    probe: Probe,
    naive: NaiveKind,
}

/// Which naive policy meets the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NaiveKind {
    Plain,
    /// Falls back to single addresses, and never back.
    WithFallback,
}

/// What became of an exhibit.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The naive policy without the event, if it was harmed.
    broken_without_event: Option<String>,
    naive: Harm,
    ours: Harm,
}

impl Outcome {
    /// It bites, by its event, and it does not bite us.
    pub fn held(&self) -> bool {
        self.broken_without_event.is_none() && self.naive.harmed && !self.ours.harmed
    }

    /// Why it did not hold.
    fn complaint(&self) -> String {
        match &self.broken_without_event {
            Some(text) => format!("the naive policy is harmed without the event: {text}"),
            None if !self.naive.harmed => format!("the naive policy is not bitten: {}", self.naive.text),
            None => format!("ours is harmed: {}", self.ours.text),
        }
    }
}

macro_rules! exhibits {
    ($($group:ident: [$($name:ident),* $(,)?]),* $(,)?) => {
        /// All of them.
        pub fn exhibits() -> Vec<Exhibit> {
            vec![$($(Exhibit { test: stringify!($name), ..$group::$name() }),*),*]
        }

        #[cfg(test)]
        mod tests {
            $($(#[test]
            fn $name() {
                super::hold(stringify!($name));
            })*)*
        }
    };
}

exhibits! {
    cool_down: [cooling_addresses_are_not_available, a_restart_keeps_the_cool_down],
    shortage: [
        a_fragmented_subnet_still_gives_addresses,
        missing_prefixes_are_not_asked_for_every_five_seconds,
        prefixes_come_back_after_a_shortage,
        a_throttled_start_is_no_storm,
    ],
    stale_readings: [
        stale_metadata_brings_no_address_back,
        stale_metadata_takes_no_address_from_a_pod,
        no_pod_is_placed_on_an_eni_that_is_gone,
        a_torn_list_after_a_restart_erases_nothing,
        a_prefix_with_a_pod_route_is_not_given_back,
        what_another_writer_takes_is_put_back,
    ],
    half_done: [
        a_refused_last_step_of_an_eni_is_made_later,
        an_eni_is_registered_however_late_its_link,
        a_crash_before_the_attach_loses_no_eni,
    ],
    leaks: [an_eni_of_a_dead_node_is_collected, sandboxes_that_end_without_a_del_are_found],
    runtime: [a_del_needs_no_daemon, a_late_del_frees_no_other_sandbox, gc_is_answered],
}

impl Exhibit {
    /// Without the things that every exhibit says for itself.
    fn new(thread: &'static str, title: &'static str, setting: Scenario, probe: Probe) -> Self {
        Self {
            test: "",
            thread,
            title,
            elsewhere: "",
            here: "",
            setting,
            event: |scenario| scenario,
            minutes: 60,
            probe,
            naive: NaiveKind::Plain,
        }
    }

    /// The naive policy's best world, and our worst.
    pub fn play(&self) -> Outcome {
        let badness = |harm: &Harm| (harm.harmed, harm.count);
        let worst = |harms: Vec<Harm>| harms.into_iter().max_by_key(badness).expect("invariant: there are seeds");
        let best = |harms: Vec<Harm>| harms.into_iter().min_by_key(badness).expect("invariant: there are seeds");
        let naively = |scenario: &Scenario| self.probe.look(&self.naively(scenario, Telling::Nothing).0);
        let calm = worst(SEEDS.map(|seed| naively(&self.calm(seed))).collect());
        let ours = |seed| {
            let seen = watch::<Pool>(&self.scenario(seed), self.minutes, Telling::Nothing).0;
            seen.unwell().unwrap_or_else(|| self.probe.look(&seen))
        };
        Outcome {
            broken_without_event: calm.harmed.then_some(calm.text),
            naive: best(SEEDS.map(|seed| naively(&self.scenario(seed))).collect()),
            ours: worst(SEEDS.map(ours).collect()),
        }
    }

    /// What happens in its first world, with the naive policy and with ours.
    pub fn tell(&self, telling: Telling) -> String {
        let scenario = self.scenario(SEEDS.start);
        let (naive, naive_story) = self.naively(&scenario, telling);
        let (ours, our_story) = watch::<Pool>(&scenario, self.minutes, telling);
        let mut text = String::new();
        for (who, seen, story) in [("naive", naive, naive_story), ("ours", ours, our_story)] {
            let _ = write!(text, "{} {who}\n{story}", self.thread);
            for (rule, broken) in &seen.broken {
                let _ = writeln!(text, "{}: {} times, first: {}", rule.sentence(), broken.len(), broken.join("\n    "));
            }
            let _ = writeln!(text, "{who}: {}\n", self.probe.look(&seen).text);
        }
        text
    }

    fn calm(&self, seed: u64) -> Scenario {
        Scenario { seed, ..self.setting.clone() }
    }

    fn scenario(&self, seed: u64) -> Scenario {
        (self.event)(self.calm(seed))
    }

    fn naively(&self, scenario: &Scenario, telling: Telling) -> (Seen, String) {
        match self.naive {
            NaiveKind::Plain => watch::<Naive>(scenario, self.minutes, telling),
            NaiveKind::WithFallback => watch::<NaiveWithFallback>(scenario, self.minutes, telling),
        }
    }
}

/// Plays a scenario for so long, past whatever goes wrong.
fn watch<P: Policy>(scenario: &Scenario, minutes: u64, telling: Telling) -> (Seen, String) {
    let mut world: World<P> = World::new(scenario, telling);
    let end = world.now.plus_ms(minutes * MINUTE);
    let mut seen = Seen::default();
    while world.now < end {
        let next = world.now.plus_ms(1_000);
        while world.run_until(next).is_err() && seen.violations < MOST_VIOLATIONS {
            seen.note(std::mem::take(&mut world.node.watch.violations));
        }
        if seen.violations >= MOST_VIOLATIONS {
            break;
        }
        seen.look(&world);
    }
    seen.end(&world);
    (seen, world.story.to_string())
}

/// The exhibits as a table, and how many of how many held.
pub struct Tour {
    pub text: String,
    pub held: usize,
    pub of: usize,
}

pub fn tour(mut progress: impl FnMut(usize, usize)) -> Tour {
    let exhibits = exhibits();
    let mut rows = vec![["thread", "outage", "naive", "ours"].map(str::to_owned)];
    let (mut held, mut complaints) = (0, String::new());
    for (at, exhibit) in exhibits.iter().enumerate() {
        progress(at, exhibits.len());
        let outcome = exhibit.play();
        if outcome.held() {
            held += 1;
        } else {
            let _ = writeln!(complaints, "{} ({}): {}", exhibit.thread, exhibit.test, outcome.complaint());
        }
        let row = [exhibit.thread, exhibit.title, &outcome.naive.text, &outcome.ours.text];
        rows.push(row.map(str::to_owned));
    }
    progress(exhibits.len(), exhibits.len());
    let widths = [0, 1, 2].map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for [thread, title, naive, ours] in &rows {
        let _ = writeln!(
            text,
            "{thread:<a$}  {title:<b$}  {naive:<c$}  {ours}",
            a = widths[0],
            b = widths[1],
            c = widths[2]
        );
    }
    text.push_str(&complaints);
    Tour { text, held, of: exhibits.len() }
}

#[cfg(test)]
fn hold(test: &str) {
    let exhibit = exhibits().into_iter().find(|exhibit| exhibit.test == test);
    let outcome = exhibit.expect("the macro names each once").play();
    assert!(outcome.held(), "{}", outcome.complaint());
}

/// The page says what the exhibits say.
#[cfg(test)]
#[test]
fn the_page_shows_every_exhibit() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/museum.md"));
    let page = page.expect("docs/museum.md can be read");
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let sections: Vec<String> = page.split("\n## ").skip(1).map(flat).collect();
    assert_eq!(sections.len(), exhibits().len(), "one section for each exhibit");
    for exhibit in exhibits() {
        let title = format!("{}: {}", exhibit.thread, exhibit.title);
        let section = sections.iter().find(|section| section.starts_with(&title));
        let section = section.unwrap_or_else(|| panic!("docs/museum.md has no section \"{title}\""));
        let test = format!("`{}`", exhibit.test);
        for part in [exhibit.elsewhere, exhibit.here, &test] {
            assert!(!part.is_empty() && section.contains(part), "{title}: the page does not say: {part}");
        }
    }
    let suite = ["check", "gc_status_version"].map(|file| {
        let path = format!("{}/../../tests/conformance/{file}.rs", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).expect("the conformance suite can be read")
    });
    let named = page.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| word.starts_with("sec2_"));
    for test in named {
        assert!(suite.iter().any(|file| file.contains(&format!("fn {test}("))), "there is no test {test}");
    }
}
