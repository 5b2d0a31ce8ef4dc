//! The program: `ipamd::cli` without a probe.

fn main() -> anyhow::Result<()> {
    ipamd::cli::main(ipamd::probe::NoProbe)
}
