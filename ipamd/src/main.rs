//! The program: `ipamd::cli` without a probe.

use std::process::ExitCode;

fn main() -> ExitCode {
    ipamd::cli::main(ipamd::probe::NoProbe)
}
