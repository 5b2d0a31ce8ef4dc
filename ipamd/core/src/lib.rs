//! Pure decisions of the Flatwire address pool.
//!
//! `core` is a state machine: facts come in as events together with the time, wishes go out as commands. It knows no file,
//! socket, clock or environment, so that the daemon, the simulator and `ipamd explain` run the very same code.

pub mod ids;
pub mod netplan;
pub mod ports;
