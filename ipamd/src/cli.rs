//! The verbs of `ipamd`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::probe::Probe;
use crate::{audit, config, explain, install, level, preflight, run, status};

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
    /// Compare EC2, the ledger and the kernel (exit code 0: they agree, 1: they differ, 2: could not be done).
    Audit(audit::AuditArgs),
    /// Say why a pod, an address, an ENI or the target is as it is.
    Explain(explain::ExplainArgs),
    /// Show or set how much the daemon may do in EC2.
    Level(level::LevelArgs),
    /// Check whether this node has what the daemon needs (exit code 1: something is missing).
    Preflight(Box<preflight::PreflightArgs>),
    /// Put the plugin on this node; the daemon puts the conflist there once it can serve.
    Install(install::InstallArgs),
    /// Take conflist, plugin, rules and tables away again; only what is ours, and only with the daemon away.
    Uninstall(install::UninstallArgs),
    /// Show the version.
    Version,
}

/// Does what the command line asks; a daemon tells `probe` of its effects.
pub fn main(probe: impl Probe) -> ExitCode {
    let verb = Cli::parse().verb;
    // An audit that could not be done is not one that found something.
    let code_of_failure = if matches!(verb, Verb::Audit(_)) { 2 } else { 1 };
    let done = match verb {
        Verb::Run(args) => run::run(*args, probe).map(|()| ExitCode::SUCCESS),
        Verb::Status(args) => status::status(&args),
        Verb::Audit(args) => audit::audit(&args),
        Verb::Explain(args) => explain::explain(&args),
        Verb::Level(args) => level::level(&args),
        Verb::Preflight(args) => preflight::preflight(&args),
        Verb::Install(args) => install::install(&args),
        Verb::Uninstall(args) => install::uninstall(&args),
        Verb::Version => {
            println!("ipamd {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("ipamd: {error:#}");
        ExitCode::from(code_of_failure)
    })
}
