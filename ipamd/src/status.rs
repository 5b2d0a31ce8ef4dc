//! `ipamd status`: asks the running daemon's introspection page and prints the pool, the ENIs and the pods.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use flatwire_core::pool::{Level, NodeState, Part, PoolStatus};
use flatwire_kube::Health;
use serde::Deserialize;

use crate::ask::{AT_ONCE, Daemon};
use crate::node_state;
use crate::table::table;

#[derive(Args, Debug)]
pub struct StatusArgs {
    /// The whole state as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// The daemon's page.
#[derive(Deserialize)]
struct Page {
    #[serde(flatten)]
    pool: PoolStatus,
    /// `None`: the API server is not called.
    kubernetes: Option<Health>,
}

/// Exit code 0: pods can be given addresses; an error otherwise, after the tables.
pub fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let body = args.daemon.get("/v1/status", AT_ONCE)?;
    if args.json {
        print!("{body}");
        return Ok(ExitCode::SUCCESS);
    }
    let Page { pool: status, kubernetes } =
        serde_json::from_str(&body).context("the daemon answered something else than a status")?;
    print!("{}", render(&status, kubernetes.as_ref()));
    match status.failure.filter(|_| !status.ready) {
        Some(failure) => bail!("no pod can be given an address: {}", failure.message),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn render(status: &PoolStatus, kubernetes: Option<&Health>) -> String {
    let mut out = String::new();
    let counts = &status.counts;
    match &status.node {
        Some(node) => {
            out += &format!("node   {}  {}  {}\n", node.instance, node.instance_type, node.availability_zone);
        }
        None => out += "node   not known yet\n",
    }
    out += &format!(
        "pool   {} held, {} in use, {} free, {} cooling, {} waiting; {} prefixes\n",
        counts.total, counts.assigned, status.free, counts.cooling, counts.waiting, counts.prefixes
    );
    if status.node_state.level != Level::Normal {
        let level = node_state::level_name(status.node_state.level);
        out += &format!("level  {level}: {}\n", node_state::meaning(status.node_state.level));
    }
    if status.node_state.unschedulable || status.terminating {
        let what = if status.terminating { "EC2 has announced the end of this instance" } else { "unschedulable" };
        out += &format!("drain  {what}\n");
    }
    for (part, source) in &status.node_state.sources {
        out += &format!("said   {part} {}: {source}\n", said(&status.node_state, *part));
    }
    if let Some(health) = kubernetes {
        out += &api_server(health);
    }
    if let Some(target) = &status.target {
        out += &format!("target {}  ({})\n", target.wanted, target.why);
    }
    for setback in status.setbacks.iter().filter(|s| !s.over) {
        out += &format!("rests  {} on {}: {} {}\n", setback.action, setback.object, setback.code, setback.message);
    }
    for contest in &status.contests {
        let let_be = contest.until.since_ms(status.now) / 1_000;
        let next = match let_be {
            0 => "watched".to_owned(),
            seconds => format!("let be for {seconds} s more"),
        };
        out += &format!("fight  {}: put right {} times and changed back; {next}\n", contest.object, contest.repairs);
    }
    let enis: Vec<Vec<String>> = status
        .enis
        .iter()
        .map(|eni| {
            vec![
                eni.id.to_string(),
                eni.device.to_string(),
                eni.table.to_string(),
                eni.primary_ipv4.to_string(),
                eni.state.clone(),
                eni.addresses.to_string(),
                eni.prefixes.to_string(),
                eni.pods.to_string(),
            ]
        })
        .collect();
    out += &format!("\n{} of {} ENIs\n", status.enis.len(), status.max_enis);
    out += &table(&["ENI", "DEVICE", "TABLE", "ADDRESS", "STATE", "IPS", "PREFIXES", "PODS"], &enis);
    let mut pods: Vec<_> = status.pods.iter().collect();
    pods.sort_by(|a, b| (&a.pod, &a.sandbox).cmp(&(&b.pod, &b.sandbox)));
    let pods: Vec<Vec<String>> = pods
        .into_iter()
        .map(|a| {
            let container: String = a.sandbox.container_id.chars().take(13).collect();
            let age = status.now.since_ms(a.at) / 1_000;
            vec![a.pod.to_string(), a.address.to_string(), a.eni.to_string(), container, format!("{age}s")]
        })
        .collect();
    out += &format!("\n{} pods\n", pods.len());
    out += &table(&["POD", "ADDRESS", "ENI", "SANDBOX", "AGE"], &pods);
    out
}

/// What holds of a part of the node's state.
fn said(state: &NodeState, part: Part) -> String {
    match part {
        Part::Level => node_state::level_name(state.level).to_owned(),
        Part::Unschedulable => state.unschedulable.to_string(),
        Part::ScheduledPods => state.scheduled_pods.map_or("unknown".to_owned(), |pods| pods.to_string()),
        Part::EniConfig => state.eni_config.as_ref().map_or("none".to_owned(), |config| config.subnet.to_string()),
        Part::Sizing => "of its own".to_owned(),
    }
}

fn api_server(health: &Health) -> String {
    let watches: Vec<String> = health
        .watches
        .iter()
        .map(|(resource, watch)| match (&watch.error, watch.heard_secs) {
            (Some(error), None) => format!("{resource} never heard of: {error}"),
            (Some(error), Some(secs)) => format!("{resource} heard of {secs} s ago: {error}"),
            (None, Some(secs)) => format!("{resource} heard of {secs} s ago"),
            (None, None) => format!("{resource} not heard of yet"),
        })
        .collect();
    let mut out = format!("api    {}: {}; {} writes wait\n", health.server, watches.join(", "), health.queued);
    for complaint in &health.complaints {
        out += &format!("api    set aside: {complaint}\n");
    }
    out
}
