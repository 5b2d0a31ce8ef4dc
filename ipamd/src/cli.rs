//! The verbs of `ipamd`.

use clap::{Parser, Subcommand};

use crate::probe::Probe;
use crate::{config, run, status};

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

/// Does what the command line asks; a daemon tells `probe` of its effects.
pub fn main(probe: impl Probe) -> anyhow::Result<()> {
    match Cli::parse().verb {
        Verb::Run(args) => run::run(*args, probe),
        Verb::Status(args) => status::status(&args),
        Verb::Version => {
            println!("ipamd {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
