//! Somebody else's hands in a node's data path, under traffic: each thing that ipamd keeps in the kernel is flushed or
//! changed as the tools of the trade do it, while a pod on the primary ENI and one on a secondary one ping and stream to
//! another node. What is told: how long they were silent, when all was as before, and whether it was counted.
//!
//! Whether all is as before is judged by what `ip`, `nft` and /proc say, never by ipamd.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::client::Lab;
use crate::ctl::{Info, PodInfo, Request, Spec};
use crate::error::{Doing, Error, Result};
use crate::traffic::Tally;

/// A gap from here on is an interruption.
pub const INTERRUPTION_MS: u64 = 1_000;
/// What is not as it was by then never will be: ipamd looks every ten seconds whatever it hears.
const DEADLINE: Duration = Duration::from_secs(20);
/// The longest pause that this much damage leads to is shorter.
const REST: Duration = Duration::from_secs(90);
/// Echoes, and kilobytes of the stream, that must come back after a repair before the next thing is done.
const FLOWS_AGAIN: u64 = 30;

const NODE: &str = "node-1";

#[derive(Debug, Clone)]
pub struct Heal {
    pub bin_dir: Option<PathBuf>,
    pub name: String,
    /// Only the steps whose names contain one of these; all if there are none.
    pub only: Vec<String>,
    pub json: bool,
}

/// Something that somebody does to a node.
struct Step {
    name: &'static str,
    /// For a shell on the node.
    command: String,
    /// An ENI's link has another name from here on: its device and the name.
    renames: Option<(usize, &'static str)>,
}

/// What became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub name: String,
    pub command: String,
    /// The longest time without an echo, of both pods.
    pub ping_gap_ms: u64,
    /// The longest time in which neither stream came on.
    pub tcp_stalled_ms: u64,
    pub tcp_broken: bool,
    /// When everything was first seen as it had been; absent if it never was.
    pub repaired_ms: Option<u64>,
    /// What ipamd's metrics say it has put right, by kind.
    pub counted: BTreeMap<String, u64>,
}

impl Row {
    fn is_good(&self) -> bool {
        let uninterrupted = self.ping_gap_ms < INTERRUPTION_MS && self.tcp_stalled_ms < INTERRUPTION_MS;
        uninterrupted && !self.tcp_broken && self.repaired_ms.is_some() && !self.counted.is_empty()
    }
}

/// Names of the ENIs' links as they are now, by device.
type Names = Vec<String>;

/// Runs it all. True if nothing was interrupted, everything put right, and everything counted.
pub fn run(heal: &Heal) -> Result<bool> {
    let start = Instant::now();
    let say = |text: &str| {
        if !heal.json {
            println!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
        }
    };
    let program = std::env::current_exe().doing(|| "find the lab's own program".into())?;
    let nodes = ["t3.small", "t3.small"].into_iter().map(str::parse);
    let spec = Spec {
        name: heal.name.clone(),
        nodes: nodes.collect::<Result<_>>()?,
        bin_dir: heal.bin_dir.clone(),
        ..Spec::default()
    };
    let mut lab = Lab::start(&program, &spec)?;
    say("up: two t3.small, each with ipamd");
    let (near, far) = pods(&mut lab)?;
    let sends = |pod: &PodInfo| format!("{} ({})", pod.name, pod.address);
    say(&format!(
        "{} on the primary ENI and {} on a secondary one speak with {NODE}'s neighbour",
        sends(&near[0]),
        sends(&near[1])
    ));

    let mut echoes = Vec::new();
    let mut flows = Vec::new();
    for (from, to) in near.iter().zip(&far) {
        echoes.push(Talk::start(&lab, to, &["echo"])?);
        flows.push((Talk::start(&lab, from, &["ping", &to.address.to_string()])?, 1));
        flows.push((Talk::start(&lab, from, &["stream", &to.address.to_string()])?, 1_024));
    }
    let mut shell = Talk::shell(&lab)?;
    let (mut names, tables, address) = shape(&mut lab)?;
    let mut rows = Vec::new();
    say("100 pings a second and a stream each; now the hands of others");
    for step in steps(&names, &tables, &address) {
        if !heal.only.is_empty() && !heal.only.iter().any(|part| step.name.contains(part.as_str())) {
            continue;
        }
        let row = perform(&lab, &mut shell, &mut flows, &mut names, &step)?;
        say(&format!("{}: {}", step.name, if row.is_good() { "healed" } else { "WRONG" }));
        rows.push(row);
    }
    drop((flows, echoes, shell));
    if heal.json {
        println!("{}", serde_json::to_string(&rows).doing(|| "the report".into())?);
    } else {
        println!("\n{}", table(&rows, std::io::stdout().is_terminal()));
        let worst = rows.iter().map(|row| row.ping_gap_ms.max(row.tcp_stalled_ms)).max().unwrap_or(0);
        println!("heal: worst_gap_ms={worst}");
    }
    Ok(!rows.is_empty() && rows.iter().all(Row::is_good))
}

/// A pod on the primary ENI and one on a secondary, and likewise two on the other node.
fn pods(lab: &mut Lab) -> Result<(Vec<PodInfo>, Vec<PodInfo>)> {
    let mut both = Vec::new();
    for node in [NODE, "node-2"] {
        // Three fit the primary ENI of a t3.small.
        let mut pods = Vec::new();
        for number in 1..=5 {
            pods.push(lab.pod_add(node, &format!("pod-{number}"))?);
        }
        let view = lab.view()?;
        let device = |pod: &PodInfo| {
            let eni = view.enis.iter().find(|eni| eni.holds(pod.address))?;
            eni.attachment.as_ref().map(|attachment| attachment.device.0)
        };
        let find = |primary: bool| pods.iter().find(|pod| device(pod).is_some_and(|device| (device == 0) == primary));
        let (Some(first), Some(second)) = (find(true), find(false)) else {
            return Err(Error::refused(format!("the pods of {node} are not on two ENIs")));
        };
        both.push(vec![first.clone(), second.clone()]);
    }
    lab.settle()?;
    let far = both.pop().unwrap_or_default();
    Ok((both.pop().unwrap_or_default(), far))
}

/// Names of the node's ENI links, their tables, and the address of the first secondary one.
fn shape(lab: &mut Lab) -> Result<(Names, Vec<u64>, String)> {
    let info: Info = lab.ask(&Request::Info)?;
    let node = info.nodes.into_iter().find(|node| node.name == NODE);
    let mut enis = node.map(|node| node.enis).unwrap_or_default();
    enis.sort_by_key(|eni| eni.device);
    let names: Names = enis.iter().filter_map(|eni| eni.link.clone()).collect();
    let status = status(lab)?;
    let tables = status["enis"].as_array().into_iter().flatten().filter(|eni| eni["device"] != 0);
    let tables = tables.filter_map(|eni| eni["table"].as_u64()).collect();
    let shown: Value = serde_json::from_str(&lab.run(NODE, &["ip", "-j", "-4", "addr", "show", "dev", &names[1]])?)
        .doing(|| "addresses by ip".into())?;
    let own = &shown[0]["addr_info"][0];
    let address = format!("{}/{}", own["local"].as_str().unwrap_or_default(), own["prefixlen"]);
    Ok((names, tables, address))
}

fn status(lab: &Lab) -> Result<Value> {
    let ipamd = lab.ipamd()?;
    serde_json::from_str(&lab.run(NODE, &[&ipamd, "status", "--json"])?).doing(|| "the status of ipamd".into())
}

fn steps(names: &Names, tables: &[u64], address: &str) -> Vec<Step> {
    let (primary, secondary) = (&names[0], &names[1]);
    let step = |name, command: String| Step { name, command, renames: None };
    let both = |command: &str| format!("for link in {primary} {secondary}; do {command}; done");
    let tables = tables.iter().map(|table| format!("ip route flush table {table}")).collect::<Vec<_>>().join("; ");
    vec![
        step(
            "all rules flushed",
            "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default".into(),
        ),
        step("our rules deleted", "ip rule flush protocol 70".into()),
        step("every ENI's table flushed", tables),
        step("pods' host routes flushed", "ip route flush table main protocol 70".into()),
        step("table main flushed", "ip route flush table main".into()),
        step("every nftables table flushed", "nft flush ruleset".into()),
        step("our nftables table deleted", "nft delete table ip flatwire".into()),
        step("MTU lowered", both("ip link set $link mtu 1300")),
        step("rp_filter strict", both("echo 1 > /proc/sys/net/ipv4/conf/$link/rp_filter")),
        step("forwarding off", "echo 0 > /proc/sys/net/ipv4/ip_forward".into()),
        step("ENI address removed", format!("ip addr del {address} dev {secondary}")),
        step("secondary ENI set down", format!("ip link set {secondary} down")),
        step("primary ENI set down", format!("ip link set {primary} down")),
        Step { renames: Some((1, "renamed1")), ..step("secondary ENI renamed", rename(secondary, "renamed1")) },
        Step { renames: Some((0, "renamed0")), ..step("primary ENI renamed", rename(primary, "renamed0")) },
    ]
}

/// Older kernels rename only what is down.
fn rename(from: &str, to: &str) -> String {
    format!("ip link set {from} name {to} 2>/dev/null || (ip link set {from} down; ip link set {from} name {to})")
}

fn perform(lab: &Lab, shell: &mut Talk, flows: &mut [(Talk, u64)], names: &mut Names, step: &Step) -> Result<Row> {
    await_rest(lab)?;
    let counted_before = repairs(shell)?;
    let before = snapshot(shell, names)?;
    for (flow, _) in flows.iter_mut() {
        flow.tally()?;
    }
    shell.ask(&step.command)?;
    let done = Instant::now();
    if let Some((device, name)) = step.renames {
        name.clone_into(&mut names[device]);
    }
    let repaired_ms = loop {
        let now = snapshot(shell, names)?;
        if now == before {
            break Some(u64::try_from(done.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
        if done.elapsed() > DEADLINE {
            let only_in = |one: &str, other: &str| {
                let lines = one.lines().filter(|line| !other.lines().any(|known| known == *line));
                lines.map(|line| format!("\n  {line}")).collect::<String>()
            };
            eprintln!("{}: was{}\nand is{}", step.name, only_in(&before, &now), only_in(&now, &before));
            break None;
        }
    };
    let (mut ping_gap_ms, mut tcp_stalled_ms, mut tcp_broken) = (0, 0, false);
    for (flow, unit) in flows {
        let mut back = 0;
        // The first answer may be all from before; a gap that is under way shows in the next.
        for turn in 0.. {
            let tally = flow.tally()?;
            let gap = if *unit == 1 { &mut ping_gap_ms } else { &mut tcp_stalled_ms };
            *gap = tally.longest_gap_ms.max(*gap);
            tcp_broken |= tally.broken;
            back += if turn == 0 { 0 } else { tally.back };
            if back >= FLOWS_AGAIN * *unit || tally.broken || done.elapsed() > DEADLINE {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let mut counted = repairs(shell)?;
    counted.retain(|kind, count| {
        *count -= counted_before.get(kind).copied().unwrap_or(0).min(*count);
        *count > 0
    });
    let command = step.command.clone();
    Ok(Row { name: step.name.into(), command, ping_gap_ms, tcp_stalled_ms, tcp_broken, repaired_ms, counted })
}

/// What is put right too often is let be for a while: here each thing is to be met at its best.
fn await_rest(lab: &Lab) -> Result<()> {
    let start = Instant::now();
    loop {
        let status = status(lab)?;
        let now = status["now"].as_u64().unwrap_or(0);
        let rests = |contest: &Value| contest["until"].as_u64().is_some_and(|until| until > now);
        if !status["contests"].as_array().into_iter().flatten().any(rests) {
            return Ok(());
        }
        if start.elapsed() > REST {
            return Err(Error::Deadline { what: "the end of a pause in repairs".into(), seconds: REST.as_secs() });
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The data path as the tools show it, with the links' present names taken out.
fn snapshot(shell: &mut Talk, names: &Names) -> Result<String> {
    let links = names.join(" ");
    let mut text = shell.ask(&format!(
        "ip rule | sort; ip -4 route show table all | sed 's/ linkdown//' | sort; nft -s list ruleset; sysctl net.ipv4.ip_forward
         for link in {links}; do
           ip -o -4 addr show dev $link | sed 's/^[0-9]*: //; s/\\\\.*//'
           ip -o link show dev $link | grep -o 'mtu [0-9]*\\|[<,]UP[,>]\\|LOWER_UP'
           cat /proc/sys/net/ipv4/conf/$link/rp_filter
         done"
    ))?;
    for (device, name) in names.iter().enumerate() {
        text = text.replace(name.as_str(), &format!("eni-link-{device}"));
    }
    // Sorted by name above, and the name may be another one now; the table's comment is a digest of it, names included.
    let mut lines: Vec<&str> =
        text.lines().map(str::trim).filter(|line| !line.starts_with("comment \"content")).collect();
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

/// ipamd's counter of repairs, by kind.
fn repairs(shell: &mut Talk) -> Result<BTreeMap<String, u64>> {
    let page = shell
        .ask("exec 3<>/dev/tcp/127.0.0.1/61678; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3; exec 3>&-")?;
    let lines = page.lines().filter_map(|line| line.strip_prefix("flatwire_kernel_repairs_total{kind=\""));
    let parsed = lines.filter_map(|line| {
        let (kind, count) = line.split_once("\"}")?;
        Some((kind.to_owned(), count.trim().parse().ok()?))
    });
    Ok(parsed.collect())
}

fn table(rows: &[Row], colour: bool) -> String {
    let mut text = String::new();
    let what = "what was done";
    let width = rows.iter().map(|row| row.name.len()).chain([what.len()]).max().unwrap_or(0);
    let _ = writeln!(text, "{what:<width$}  {:>11}  {:>11}  {:>11}  counted", "ping gap", "tcp stalled", "repaired in");
    for row in rows {
        let ms = |value: u64| format!("{value} ms");
        let counted: Vec<String> = row.counted.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let line = format!(
            "{:<width$}  {:>11}  {:>11}  {:>11}  {}",
            row.name,
            ms(row.ping_gap_ms),
            if row.tcp_broken { "broken".to_owned() } else { ms(row.tcp_stalled_ms) },
            row.repaired_ms.map_or("never".to_owned(), ms),
            if counted.is_empty() { "no".to_owned() } else { format!("yes: {}", counted.join(", ")) }
        );
        let _ = match row.is_good() || !colour {
            true => writeln!(text, "{line}"),
            false => writeln!(text, "\x1b[31m{line}\x1b[0m"),
        };
    }
    text
}

/// A program in a place of the lab that is spoken with line by line; it ends with this value.
struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Talk {
    /// The lab's own traffic in a pod.
    fn start(lab: &Lab, pod: &PodInfo, what: &[&str]) -> Result<Self> {
        let own = std::env::current_exe().doing(|| "find the lab's own program".into())?;
        let own = own.display().to_string();
        let command: Vec<&str> = [own.as_str(), "__traffic"].iter().chain(what).copied().collect();
        let mut talk = Self::spawn(lab, &format!("{}/{}", pod.node, pod.name), &command)?;
        match talk.line()?.as_str() {
            "ready" => Ok(talk),
            other => Err(Error::refused(format!("{} in {} said {other:?}", what.join(" "), pod.name))),
        }
    }

    fn shell(lab: &Lab) -> Result<Self> {
        Self::spawn(lab, NODE, &["bash"])
    }

    fn spawn(lab: &Lab, place: &str, command: &[&str]) -> Result<Self> {
        let own = std::env::current_exe().doing(|| "find the lab's own program".into())?;
        let mut child = Command::new(own)
            .args(["exec", "--name", lab.name(), place, "--"])
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .doing(|| format!("start {} in {place}", command.join(" ")))?;
        let input = child.stdin.take();
        let output = child.stdout.take().expect("invariant: asked for above");
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).doing(|| "hear from a program of the lab".into())?;
        match line.strip_suffix('\n') {
            Some(line) => Ok(line.to_owned()),
            None => Err(Error::refused("a program of the lab ended before it answered")),
        }
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().expect("invariant: taken only when it ends");
        writeln!(input, "{text}").and_then(|()| input.flush()).doing(|| "speak with a program of the lab".into())
    }

    fn tally(&mut self) -> Result<Tally> {
        self.say("")?;
        let line = self.line()?;
        serde_json::from_str(&line).doing(|| format!("the tally {line:?}"))
    }

    /// Has a shell run commands, and returns what they printed.
    fn ask(&mut self, commands: &str) -> Result<String> {
        const END: &str = "--that was all--";
        self.say(&format!("{commands}\necho; echo '{END}'"))?;
        let mut said = String::new();
        loop {
            match self.line()? {
                line if line == END => return Ok(said),
                line => said.push_str(&(line + "\n")),
            }
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_good_only_if_nothing_was_interrupted_and_all_was_counted() {
        let good = Row {
            name: "x".into(),
            command: "x".into(),
            ping_gap_ms: 40,
            tcp_stalled_ms: 230,
            tcp_broken: false,
            repaired_ms: Some(30),
            counted: [("rule".to_owned(), 2)].into(),
        };
        assert!(good.is_good());
        assert!(!Row { ping_gap_ms: INTERRUPTION_MS, ..good.clone() }.is_good());
        assert!(!Row { tcp_stalled_ms: INTERRUPTION_MS, ..good.clone() }.is_good());
        assert!(!Row { tcp_broken: true, ..good.clone() }.is_good());
        assert!(!Row { repaired_ms: None, ..good.clone() }.is_good());
        assert!(!Row { counted: BTreeMap::new(), ..good.clone() }.is_good());
        let text = table(&[good], false);
        let (header, row) = text.split_once('\n').unwrap();
        assert_eq!(header.find("counted"), row.find("yes: rule 2"), "{text}");
        assert_eq!(row.split_whitespace().take(7).collect::<Vec<_>>(), ["x", "40", "ms", "230", "ms", "30", "ms"]);
    }
}
