//! `ipamd level`: shows or sets how much the daemon may do in EC2. An operator's brake for incidents: it is a file, so it
//! works with the daemon away, and holds across restarts.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flatwire_core::pool::{Level, Said};

use crate::config::NODE_STATE;
use crate::node_state;

const LEVELS: [Level; 3] = [Level::Normal, Level::NoRelease, Level::NoCloud];

#[derive(Args, Debug)]
pub struct LevelArgs {
    /// normal; no-release: nothing is given back; no-cloud: EC2 is not called at all. Shows the level if left out.
    #[arg(value_parser = PossibleValuesParser::new(LEVELS.map(node_state::level_name)).map(level_named))]
    level: Option<Level>,
    /// Take what the file says of the level out of it, so that an annotation or label flatwire.io/level holds again.
    #[arg(long, conflicts_with = "level")]
    clear: bool,
    /// Where the state of the node lies.
    #[arg(long, env = "FLATWIRE_NODE_STATE", default_value = NODE_STATE)]
    node_state: PathBuf,
}

fn level_named(name: String) -> Level {
    let named = LEVELS.into_iter().find(|level| node_state::level_name(*level) == name);
    named.expect("invariant: clap lets only these names through")
}

pub fn level(args: &LevelArgs) -> anyhow::Result<ExitCode> {
    let path = args.node_state.display();
    let said = node_state::read(&args.node_state)?;
    let in_file = said.level.unwrap_or_default();
    let before = node_state::level_name(in_file);
    if args.clear {
        if said.level.is_some() {
            write(args, &Said { level: None, ..said })?;
        }
        println!("{path} says none now; an annotation flatwire.io/level of the node would hold; see `ipamd status`");
        return Ok(ExitCode::SUCCESS);
    }
    let Some(level) = args.level else {
        println!("level {before}: {}", node_state::meaning(in_file));
        if said.level.is_none() {
            println!("{path} says none, so an annotation flatwire.io/level of the node would hold; see `ipamd status`");
        }
        return Ok(ExitCode::SUCCESS);
    };
    let name = node_state::level_name(level);
    if Some(level) == said.level {
        println!("level {name} already: {}", node_state::meaning(level));
        return Ok(ExitCode::SUCCESS);
    }
    write(args, &Said { level: Some(level), ..said })?;
    println!("level {name} (was {before}): {}", node_state::meaning(level));
    println!("written to {path}; a running daemon follows within 2 s, one that starts later from its start");
    Ok(ExitCode::SUCCESS)
}

fn write(args: &LevelArgs, said: &Said) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(said)?;
    text.push('\n');
    if let Some(folder) = args.node_state.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    Ok(flatwire_store::replace(&args.node_state, text.as_bytes())?)
}
