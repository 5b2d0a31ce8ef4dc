//! The daemon dies at every point at which it changes something, on the live lab, and comes back.
//!
//! For each point: a node with running pods; the same daemon, told to die there; what leads it there; its death; and the
//! daemon that is shipped in its place. The running pods answer throughout, from outside the VPC. Afterwards everybody who
//! asked has an address of his own, EC2, ledger and kernel agree, and EC2 holds no ENI that nobody knows.
//!
//! `FLATWIRE_CRASH_POINT=after-create-eni` runs one point alone.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod recipes;
mod scene;

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ipamd::probe::Point;

use recipes::recipe;
use scene::Scene;

/// Labs at once: they wait more than they work.
const WORKERS: usize = 4;

#[test]
fn a_daemon_that_dies_at_any_point_costs_no_pod_its_address() {
    let only = std::env::var("FLATWIRE_CRASH_POINT").ok();
    let wanted = |point: &Point| only.as_ref().is_none_or(|only| point.to_string() == *only);
    let every = |point: Point| recipe(point.effect).arrivals.iter().map(move |arrival| (point, *arrival));
    let cases: VecDeque<(Point, u32)> = Point::all().filter(wanted).flat_map(every).collect();
    let total = cases.len();
    assert!(total > 0, "there is no point {only:?}");
    let (cases, failures) = (Mutex::new(cases), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some((point, arrival)) = { cases.lock().unwrap().pop_front() } {
                    let started = Instant::now();
                    // A thread of its own: a failed assertion ends this case and not the worker.
                    let outcome = std::thread::spawn(move || dies_at(point, arrival)).join();
                    let took = started.elapsed().as_secs_f64();
                    match outcome {
                        Ok(died_after) => {
                            println!(
                                "crash: {point}:{arrival}  died after {died_after:.1} s, all well after {took:.1} s"
                            );
                        }
                        Err(panic) => {
                            let why = said(panic.as_ref());
                            println!("crash: {point}:{arrival}  FAILED after {took:.1} s: {why}");
                            failures
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push(format!("{point}:{arrival}: {why}"));
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("crash: points={}/{total}", total - failures.len());
    assert!(failures.is_empty(), "{} of {total} failed:\n{}", failures.len(), failures.join("\n"));
}

fn dies_at(point: Point, arrival: u32) -> f64 {
    let recipe = recipe(point.effect);
    let mut scene = Scene::start(&recipe);
    (recipe.before)(&mut scene);
    scene.daemon_away();
    (recipe.away)(&mut scene);
    let watch = scene.watch();
    let started = Instant::now();
    let mut dying = scene.start_dying(point, arrival, &recipe);
    (recipe.provoke)(&mut scene);
    dying.wait();
    let died_after = started.elapsed().as_secs_f64();
    scene.daemon_back();
    scene.everybody_is_served();
    scene.all_agree();
    watch.nobody_fell_silent();
    (recipe.after)(&mut scene);
    scene.all_answer();
    scene.nothing_is_left();
    died_after
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}
