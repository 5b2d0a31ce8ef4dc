//! ipamd: the Flatwire node daemon, and the operator's command line on the same binary.
//!
//! Table of contents. The daemon: `run` (the composition root), `config` (paths and addresses), `driver` (the loop that owns
//! the pool and carries out its wishes), `node_state` (what is said of the node from outside), `grpc` (the plugin's socket),
//! `http` (metrics and introspection), `kube` (the pool as the API server's adapter sees it), `install` (putting the plugin on a node and taking it away), `notes` (the pool's notes as log lines and counters), `probe` (where effects begin
//! and end). The operator's command line: `cli` (the verbs), one file per verb (`status`, `audit`, `explain`, `level`,
//! `preflight`), `ask` and `table` beneath them. It is a library so that the crash suite runs the very same daemon with a
//! probe of its own.

pub mod cli;
pub mod probe;

mod ask;
mod audit;
mod config;
mod driver;
mod explain;
mod grpc;
mod http;
mod install;
mod kube;
mod level;
mod metrics;
mod node_state;
mod notes;
mod preflight;
mod run;
mod status;
mod table;
