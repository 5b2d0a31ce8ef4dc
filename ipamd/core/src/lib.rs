//! Pure decisions of the Flatwire address pool.
//!
//! `core` is a state machine: facts come in as events together with the time, wishes go out as commands. It knows no file,
//! socket, clock or environment, so that the daemon, the simulator and `ipamd explain` run the very same code.
//!
//! Read in this order: `ports` (what is asked of the world), `pool` (the state machine), and the questions it asks, one
//! small pure module each: `target` (how many addresses), `plan` (where from), `pick` (which one).

pub mod audit;
pub mod bucket;
pub mod contest;
pub mod error;
pub mod families;
pub mod ids;
pub mod ledger;
pub mod limits;
pub mod naming;
pub mod netplan;
pub mod pick;
pub mod plan;
pub mod pool;
pub mod ports;
pub mod release;
pub mod settings;
pub mod target;
