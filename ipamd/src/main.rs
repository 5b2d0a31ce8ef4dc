//! ipamd: the Flatwire node daemon, and the operator's command line on the same binary.
//!
//! Table of contents: `config` (paths and addresses), `driver` (the loop that owns the pool and carries out its wishes),
//! `grpc` (the plugin's socket), `http` (metrics and introspection), `notes` (the pool's notes as log lines and counters),
//! `status` (what `ipamd status` prints).

mod config;
mod driver;
mod grpc;
mod http;
mod metrics;
mod notes;
mod run;
mod status;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "ipamd", version, about = "Flatwire's node daemon: VPC addresses for pods", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the daemon: keep the pool, serve the plugin.
    Run(Box<config::RunArgs>),
    /// Show the pool, the ENIs and the pods of this node.
    Status(status::StatusArgs),
    /// Show the version.
    Version,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().verb {
        Verb::Run(args) => run::run(*args),
        Verb::Status(args) => status::status(&args),
        Verb::Version => {
            println!("ipamd {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
