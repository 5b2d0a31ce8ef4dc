//! `ipamd status`: asks the running daemon's introspection page and prints the pool, the ENIs and the pods.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use flatwire_core::pool::PoolStatus;

use crate::config::INTROSPECTION;

const TIMEOUT: Duration = Duration::from_secs(3);
const MAX_BYTES: u64 = 16 << 20;

#[derive(Args, Debug)]
pub struct StatusArgs {
    /// The whole state as JSON.
    #[arg(long)]
    json: bool,
    /// Address of the daemon's introspection pages.
    #[arg(long, env = "INTROSPECTION_BIND_ADDRESS", default_value = INTROSPECTION)]
    introspection: SocketAddr,
}

/// Exit code 0: pods can be given addresses; an error otherwise, after the tables.
pub fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let body = fetch(args.introspection, "/v1/status")?;
    if args.json {
        print!("{body}");
        return Ok(());
    }
    let status: PoolStatus = serde_json::from_str(&body).context("the daemon answered something else than a status")?;
    print!("{}", render(&status));
    match status.failure.filter(|_| !status.ready) {
        Some(failure) => bail!("no pod can be given an address: {}", failure.message),
        None => Ok(()),
    }
}

/// One GET to an address on this machine; not worth an HTTP library in a command that an operator waits for.
fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let hint = || format!("ask ipamd on {address}; is it running here, and is DISABLE_INTROSPECTION unset?");
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).with_context(hint)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").with_context(hint)?;
    let mut answer = String::new();
    stream.take(MAX_BYTES).read_to_string(&mut answer).with_context(hint)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| anyhow!("ipamd on {address} did not answer HTTP"))?;
    let first = head.lines().next().unwrap_or_default();
    if !first.contains(" 200 ") {
        bail!("ipamd on {address} answered {first}: {}", body.trim());
    }
    Ok(body.to_owned())
}

fn render(status: &PoolStatus) -> String {
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
    if let Some(target) = &status.target {
        out += &format!("target {}  ({})\n", target.wanted, target.why);
    }
    for setback in status.setbacks.iter().filter(|s| !s.over) {
        out += &format!("rests  {} on {}: {} {}\n", setback.action, setback.object, setback.code, setback.message);
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

/// Columns as wide as their widest cell, two spaces apart.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let mut widths = vec![0usize; head.len()];
    for row in std::iter::once(&head).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_tail() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long name".to_owned(), "22".to_owned()]];
        assert_eq!(table(&["NAME", "N"], &rows), "NAME       N\na          1\nlong name  22\n");
        assert_eq!(table(&["NAME"], &[]), "");
    }
}
