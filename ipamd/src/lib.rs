//! ipamd: the Flatwire node daemon, and the operator's command line on the same binary.
//!
//! Table of contents: `cli` (the verbs), `config` (paths and addresses), `run` (the composition root), `driver` (the loop
//! that owns the pool and carries out its wishes), `probe` (where effects begin and end), `grpc` (the plugin's socket),
//! `http` (metrics and introspection), `notes` (the pool's notes as log lines and counters), `status` (what `ipamd status`
//! prints). It is a library so that the crash suite runs the very same daemon with a probe of its own.

pub mod cli;
pub mod probe;

mod config;
mod driver;
mod grpc;
mod http;
mod metrics;
mod notes;
mod run;
mod status;
