//! The lab's simulated body: the core's pool in a world with a virtual clock, in which one seed decides everything.
//!
//! A `World` is one node on one `lab_ec2::Ec2`: a `Node` holds the policy that is judged (the real `Pool`, or a worse one to
//! compare it with), its journal as bytes, its kernel as data, and a runtime that adds and deletes pods. A `Scenario` says
//! what the world is made of and what is done to it when; it is written by hand, or drawn from a seed. After every step the
//! `invariants` are checked; when faults have ended, `settle` says what must have come right.
//!
//! Nothing here decides for the pool, and nothing knows a socket, a file, a thread or the clock.

mod cloud;
mod dice;
mod draw;
pub mod fleet;
mod invariants;
mod journal;
mod kernel;
mod museum;
mod naive;
mod neighbours;
mod node;
mod policy;
mod queue;
mod run;
mod runtime;
mod scenario;
mod settle;
mod shape;
mod story;
mod tally;
mod world;

pub use cloud::Cloud;
pub use dice::Dice;
pub use invariants::{Rule, Violation};
pub use museum::{Exhibit, Tour, exhibits, tour};
pub use naive::{Naive, NaiveWithFallback};
pub use node::{Node, Pace, Scene};
pub use policy::Policy;
pub use run::{Failure, report, run_scenario, run_seed, tell_seed};
pub use runtime::Habits;
pub use scenario::{Act, Scenario, SubnetPlan};
pub use shape::{Shape, Tariff};
pub use story::{Story, Telling};
pub use tally::{Calls, Tally};
pub use world::World;
