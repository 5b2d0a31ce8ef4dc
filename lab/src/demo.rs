//! The whole thing once through, judged: nodes, pods on several ENIs and in prefixes, every pair of them talking, and
//! the proof that what EC2 says is what packets do. What should happen is worked out from EC2's own state, never from
//! ipamd's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use lab_ec2::View;
use serde_json::Value;

use crate::client::Lab;
use crate::cloud::PEER_VPC;
use crate::ctl::{Info, NodeSpec, PodInfo, Probe, Request, Spec};
use crate::error::{Doing, Error, Result};
use crate::picture;

#[derive(Debug, Clone)]
pub struct Demo {
    pub pods: usize,
    pub nodes: Vec<NodeSpec>,
    pub bin_dir: Option<PathBuf>,
    pub name: String,
}

/// One way of talking, as the summary lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    SameNode,
    OtherNode,
    PodToNode,
    NodeToPod,
    PodToPeer,
    PeerToPod,
    PodToInternet,
}

impl Kind {
    fn text(self) -> &'static str {
        match self {
            Self::SameNode => "pod → pod, same node",
            Self::OtherNode => "pod → pod, other node",
            Self::PodToNode => "pod → node",
            Self::NodeToPod => "node → pod",
            Self::PodToPeer => "pod → peered VPC",
            Self::PeerToPod => "peered VPC → pod",
            Self::PodToInternet => "pod → internet",
        }
    }

    /// What the far side must see, in words.
    fn expectation(self) -> &'static str {
        match self {
            Self::NodeToPod => "the node's address",
            Self::PeerToPod => "the peer's address",
            Self::PodToInternet => "the node's public address",
            _ => "the pod's own address",
        }
    }
}

/// One pair with what must and what did happen.
#[derive(Debug, Clone)]
struct Pair {
    kind: Kind,
    from: String,
    to: String,
    expected: IpAddr,
    probe: Probe,
}

impl Pair {
    fn is_good(&self) -> bool {
        let expected = Some(self.expected);
        self.probe.rtt_us.is_some() && self.probe.seen == expected && self.probe.seen_tcp == expected
    }

    /// Somebody answered, and saw another source than the true one, on a path where nothing may be translated.
    fn is_translated(&self) -> bool {
        let other = |seen: Option<IpAddr>| seen.is_some_and(|source| source != self.expected);
        self.kind != Kind::PodToInternet && (other(self.probe.seen) || other(self.probe.seen_tcp))
    }

    fn describe(&self) -> String {
        let say = |seen: Option<IpAddr>| seen.map_or("nothing".into(), |source| source.to_string());
        format!(
            "{} → {} ({}): echo {}, udp saw {}, tcp saw {}, expected {}",
            self.from,
            self.to,
            self.probe.target,
            self.probe.rtt_us.map_or("lost".into(), |us| format!("{us} µs")),
            say(self.probe.seen),
            say(self.probe.seen_tcp),
            self.expected
        )
    }
}

struct Stage {
    start: Instant,
    colour: bool,
    faults: Vec<String>,
}

impl Stage {
    fn say(&self, text: &str) {
        let at = self.start.elapsed().as_secs_f64();
        if self.colour {
            println!("\x1b[2m{at:>6.1} s\x1b[0m  {text}");
        } else {
            println!("{at:>6.1} s  {text}");
        }
    }

    fn fault(&mut self, text: String) {
        let mark = if self.colour { "\x1b[31mwrong\x1b[0m" } else { "wrong" };
        println!("          {mark}: {text}");
        self.faults.push(text);
    }

    fn check(&mut self, good: bool, text: impl FnOnce() -> String) {
        if !good {
            self.fault(text());
        }
    }
}

/// Runs the demo. True if everything was as it should be; the last line printed is the summary.
pub fn run(demo: &Demo) -> Result<bool> {
    let mut stage = Stage { start: Instant::now(), colour: std::io::stdout().is_terminal(), faults: Vec::new() };
    let program = std::env::current_exe().doing(|| "find the lab's own program".into())?;
    let spec = Spec {
        name: demo.name.clone(),
        nodes: demo.nodes.clone(),
        bin_dir: demo.bin_dir.clone(),
        // As an operator of peered VPCs sets it: what is not the VPC's own is translated to the node's address
        // otherwise.
        env: BTreeMap::from([("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS".to_owned(), PEER_VPC.to_string())]),
        ..Spec::default()
    };
    let kinds: Vec<String> = demo.nodes.iter().map(describe_node).collect();
    stage.say(&format!("a VPC, a peered VPC, an internet edge, and {} nodes: {}", kinds.len(), kinds.join(", ")));
    let mut lab = Lab::start(&program, &spec)?;
    let nodes: Vec<String> =
        lab.info().nodes.iter().filter(|node| node.daemon != "none").map(|node| node.name.clone()).collect();
    stage.say(&format!("up; EC2 API on http://{}, ipamd serving on {}", lab.info().endpoint, nodes.join(" and ")));

    let mut add_ms = add_pods(&lab, &nodes, demo.pods)?;
    add_ms.sort_by(f64::total_cmp);
    let (p50, slowest) = (percentile(&add_ms, 50), add_ms.last().copied().unwrap_or(0.0));
    lab.settle()?;
    stage.say(&format!(
        "{} pods wired by aws-cni: ADD p50 {p50:.1} ms, max {slowest:.1} ms (waiting for EC2 included)",
        add_ms.len()
    ));

    let info: Info = lab.ask(&Request::Info)?;
    let view = lab.view()?;
    println!("\n{}", picture::tree(&info));
    let pods: Vec<PodInfo> = lab.ask(&Request::Pods)?;
    print_adds(&nodes, &pods);
    check_spread(&mut stage, &view, &info, &pods);

    let pairs = matrix(&mut lab, &mut stage, &info, &view, &pods, &nodes)?;
    let good = pairs.iter().filter(|pair| pair.is_good()).count();
    let nat_free = !pairs.is_empty() && !pairs.iter().any(Pair::is_translated);
    stage.say(&format!("{good} of {} pairs talk as they should", pairs.len()));
    println!("\n{}", table(&pairs));
    for pair in pairs.iter().filter(|pair| !pair.is_good()).take(10) {
        stage.fault(pair.describe());
    }
    let status = lab.status()?;
    let calls: u64 = status.calls.values().sum();
    println!("{}", picture::calls(&status.calls));
    let drops = status.drops;
    stage.check(drops.spoofed == 0, || format!("{} packets left by the wrong ENI", drops.spoofed));

    truth(&mut lab, &mut stage, &view, &pods)?;
    empty(&mut lab, &mut stage, &pods, &nodes)?;

    println!(
        "demo: pairs={good}/{} nat_free={} ec2_calls={calls} add_p50_ms={p50:.1}",
        pairs.len(),
        if nat_free { "yes" } else { "no" }
    );
    Ok(stage.faults.is_empty() && nat_free && good == pairs.len())
}

fn describe_node(spec: &NodeSpec) -> String {
    match spec.prefixes {
        0 => spec.instance_type.clone(),
        1 => format!("{} with a /28", spec.instance_type),
        n => format!("{} with {n} /28s", spec.instance_type),
    }
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// Each node's pods one after the other, the nodes at the same time.
fn add_pods(lab: &Lab, nodes: &[String], count: usize) -> Result<Vec<f64>> {
    let mut workers = Vec::new();
    for node in nodes {
        workers.push((node.clone(), lab.connect()?));
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = (workers.into_iter())
            .map(|(node, mut control)| {
                scope.spawn(move || -> Result<Vec<f64>> {
                    let mut took = Vec::new();
                    for number in 1..=count {
                        let pod: PodInfo =
                            control.ask(&Request::PodAdd { node: node.clone(), name: format!("pod-{number}") })?;
                        took.push(pod.add_ms);
                    }
                    Ok(took)
                })
            })
            .collect();
        let mut all = Vec::new();
        for worker in running {
            all.extend(worker.join().map_err(|_| Error::refused("a worker panicked"))??);
        }
        Ok(all)
    })
}

/// How long each ADD took, in the order of asking: the ones that waited for EC2 stand out.
fn print_adds(nodes: &[String], pods: &[PodInfo]) {
    println!("ADD in ms, pod by pod");
    for node in nodes {
        let mut of_node: Vec<&PodInfo> = pods.iter().filter(|pod| pod.node == *node).collect();
        of_node.sort_by_key(|pod| pod.name.rsplit('-').next().and_then(|n| n.parse::<u32>().ok()));
        let times: Vec<String> = of_node.iter().map(|pod| format!("{:.0}", pod.add_ms)).collect();
        println!("  {node}  {}", times.join(" "));
    }
    println!();
}

/// Every pod's address is EC2's, on an ENI of the pod's own node, nobody else's, and never the ENI's own.
fn check_spread(stage: &mut Stage, view: &View, info: &Info, pods: &[PodInfo]) {
    let mut enis = BTreeSet::new();
    let mut prefixes = BTreeSet::new();
    let mut addresses = BTreeSet::new();
    for pod in pods {
        let node = info.nodes.iter().find(|node| node.name == pod.node);
        let eni = view.enis.iter().find(|eni| eni.holds(pod.address));
        let instance = eni.and_then(|eni| eni.attachment.as_ref()).map(|attachment| attachment.instance.to_string());
        stage.check(instance == node.map(|node| node.instance.clone()), || {
            format!("EC2 does not route {} to {}, where {} has it", pod.address, pod.node, pod.name)
        });
        stage.check(addresses.insert(pod.address), || format!("{} is given twice", pod.address));
        if let Some(eni) = eni {
            stage.check(eni.primary_ipv4 != pod.address, || format!("{} is {}'s own address", pod.address, eni.id));
            enis.insert(eni.id.clone());
            let prefix = |net: &IpNet| net.prefix_len() < net.max_prefix_len() && net.contains(&pod.address);
            prefixes.extend(eni.nets().filter(prefix));
        }
    }
    stage.say(&format!("{} pods on {} ENIs and in {} prefixes", pods.len(), enis.len(), prefixes.len()));
}

fn matrix(
    lab: &mut Lab,
    stage: &mut Stage,
    info: &Info,
    view: &View,
    pods: &[PodInfo],
    nodes: &[String],
) -> Result<Vec<Pair>> {
    let full = |pod: &PodInfo| format!("{}/{}", pod.node, pod.name);
    let by_name: BTreeMap<String, &PodInfo> = pods.iter().map(|pod| (full(pod), pod)).collect();
    let primary = |node: &str| info.nodes.iter().find(|known| known.name == node).and_then(|known| known.address);
    let public = |node: &str| {
        let private = primary(node)?;
        view.enis.iter().find_map(|eni| eni.public.get(&private).copied())
    };
    let mut pairs = Vec::new();
    let mut take = |from: &str,
                    kind_of: &dyn Fn(&str) -> Kind,
                    expected: &dyn Fn(Kind) -> Option<IpAddr>,
                    to: Vec<&str>|
     -> Result<()> {
        for probe in lab.probe(from, &to)? {
            let kind = kind_of(&probe.to);
            // Without an expectation nothing can be right.
            let expected = expected(kind).unwrap_or(Ipv4Addr::UNSPECIFIED.into());
            pairs.push(Pair { kind, from: from.to_owned(), to: probe.to.clone(), expected, probe });
        }
        Ok(())
    };
    stage.say("every pair: echo, UDP and TCP, and the source the far side saw");
    for pod in pods {
        let from = full(pod);
        let kind_of = |to: &str| match (to, by_name.get(to)) {
            (_, Some(other)) if other.node == pod.node => Kind::SameNode,
            (_, Some(_)) => Kind::OtherNode,
            ("internet", _) => Kind::PodToInternet,
            ("peer", _) => Kind::PodToPeer,
            _ => Kind::PodToNode,
        };
        let expected = |kind| match kind {
            Kind::PodToInternet => public(&pod.node).map(IpAddr::from),
            _ => Some(pod.address),
        };
        let others = by_name.keys().map(String::as_str).filter(|to| *to != from);
        let to = others.chain(nodes.iter().map(String::as_str)).chain(["peer", "internet"]).collect();
        take(&from, &kind_of, &expected, to)?;
    }
    for (from, kind) in nodes.iter().map(|node| (node.as_str(), Kind::NodeToPod)).chain([("peer", Kind::PeerToPod)]) {
        take(from, &|_| kind, &|_| primary(from).map(IpAddr::from), by_name.keys().map(String::as_str).collect())?;
    }
    Ok(pairs)
}

/// One line per kind: how many, how many right, what was seen, and how fast.
fn table(pairs: &[Pair]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<24} {:>6} {:>6}   {:<28} {:>9} {:>9}",
        "", "pairs", "ok", "source as seen", "rtt p50", "p99"
    );
    let kinds: BTreeSet<Kind> = pairs.iter().map(|pair| pair.kind).collect();
    for kind in kinds {
        let these: Vec<&Pair> = pairs.iter().filter(|pair| pair.kind == kind).collect();
        let good = these.iter().filter(|pair| pair.is_good()).count();
        let mut rtts: Vec<f64> = these.iter().filter_map(|pair| pair.probe.rtt_us).filter_map(micros).collect();
        rtts.sort_by(f64::total_cmp);
        let seen = match (these.iter().any(|pair| pair.is_translated()), good == these.len()) {
            (true, _) => "another address",
            (false, true) => kind.expectation(),
            (false, false) => "not always anything",
        };
        let _ = writeln!(
            text,
            "{:<24} {:>6} {good:>6}   {seen:<28} {:>6.0} µs {:>6.0} µs",
            kind.text(),
            these.len(),
            percentile(&rtts, 50),
            percentile(&rtts, 99)
        );
    }
    text
}

fn micros(us: u64) -> Option<f64> {
    u32::try_from(us).ok().map(f64::from)
}

/// Takes one pod's address away through the API, and gives it back: exactly that pod's traffic stops, and resumes.
fn truth(lab: &mut Lab, stage: &mut Stage, view: &View, pods: &[PodInfo]) -> Result<()> {
    let held = |pod: &PodInfo| view.enis.iter().find(|eni| pod.ipv4().is_some_and(|own| eni.secondary.contains(&own)));
    // A pod with an address of its own (one inside a prefix cannot be taken away alone), on a secondary ENI if
    // possible.
    let secondary = pods.iter().rev().find(|pod| held(pod).is_some_and(|eni| eni.public.is_empty()));
    let Some(victim) = secondary.or_else(|| pods.iter().find(|pod| held(pod).is_some())) else {
        stage.say("no pod has an address of its own; the truth test is left out");
        return Ok(());
    };
    let Some(eni) = held(victim) else { return Ok(()) };
    let name = format!("{}/{}", victim.node, victim.name);
    let address = victim.address.to_string();
    let Some(witness) = pods.iter().find(|pod| pod.node != victim.node) else {
        stage.say("the truth test needs pods on two nodes; left out");
        return Ok(());
    };
    let witness = format!("{}/{}", witness.node, witness.name);
    let targets: Vec<String> =
        pods.iter().map(|pod| format!("{}/{}", pod.node, pod.name)).filter(|to| *to != witness).collect();
    let before = lab.status()?.drops;
    let call = |lab: &Lab, action| {
        lab.ec2().call(action, &[("NetworkInterfaceId", eni.id.as_str()), ("PrivateIpAddress.1", &address)])
    };

    call(lab, "UnassignPrivateIpAddresses")?;
    stage.say(&format!("{address} unassigned from {} through the EC2 API, behind everybody's back", eni.id));
    let silent = silent_ones(lab, &witness, &targets)?;
    stage.check(silent == BTreeSet::from([name.clone()]), || {
        format!("{name} alone should be silent for {witness}, but these are: {silent:?}")
    });
    let out = lab.probe(&name, &[witness.as_str()])?;
    stage.check(out.iter().all(|probe| probe.seen.is_none()), || format!("{name} still reaches {witness}"));
    let after = lab.status()?.drops;
    stage.check(after.spoofed > before.spoofed && after.unassigned > before.unassigned, || {
        "the fabric counted no drop in at least one direction".into()
    });
    stage.say(&format!(
        "{name} is silent, the other {} are not; {} packets dropped by the source check, {} bound for nobody",
        targets.len() - silent.len(),
        after.spoofed - before.spoofed,
        after.unassigned - before.unassigned
    ));

    call(lab, "AssignPrivateIpAddresses")?;
    let silent = silent_ones(lab, &witness, &targets)?;
    stage.check(silent.is_empty(), || format!("silent after the address came back: {silent:?}"));
    stage.say(&format!("{address} assigned again: {} of {} answer", targets.len() - silent.len(), targets.len()));
    Ok(())
}

fn silent_ones(lab: &mut Lab, from: &str, targets: &[String]) -> Result<BTreeSet<String>> {
    let to: Vec<&str> = targets.iter().map(String::as_str).collect();
    let probes = lab.probe(from, &to)?;
    Ok(probes.into_iter().filter(|probe| probe.seen.is_none()).map(|probe| probe.to).collect())
}

/// Deletes every pod and looks in all three places for what may have stayed; then ends the nodes, and looks in the cloud.
fn empty(lab: &mut Lab, stage: &mut Stage, pods: &[PodInfo], nodes: &[String]) -> Result<()> {
    let mut took = Vec::new();
    for pod in pods {
        took.push(lab.pod_del(&pod.node, &pod.name)?);
    }
    took.sort_by(f64::total_cmp);
    stage.say(&format!("{} pods deleted: DEL p50 {:.1} ms", took.len(), percentile(&took, 50)));
    for node in nodes {
        // The kernel takes namespaces apart in its own time.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut veths = veths(lab, node)?;
        while !veths.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            veths = self::veths(lab, node)?;
        }
        stage.check(veths.is_empty(), || format!("links of pods are left on {node}: {}", veths.join(", ")));
        let routes = lab.run(node, &["cat", "/proc/self/net/route"])?;
        let stale = routes.lines().filter(|line| line.starts_with("eni")).count();
        stage.check(stale == 0, || format!("{stale} routes of pods are left on {node}"));

        let ledger = ledger(lab, node)?;
        let assigned = ledger["counts"]["assigned"].as_u64();
        stage.check(assigned == Some(0), || format!("{node}'s ledger has {assigned:?} addresses in use"));
        let held = ledger["counts"]["total"].as_u64().unwrap_or(0);
        let view = lab.view()?;
        let info: Info = lab.ask(&Request::Info)?;
        let instance = info.nodes.iter().find(|known| known.name == *node).map(|known| known.instance.clone());
        let on_node = view
            .enis
            .iter()
            .filter(|eni| eni.attachment.as_ref().map(|attachment| attachment.instance.to_string()) == instance);
        let in_cloud: u64 = on_node
            .map(|eni| eni.secondary.len() + 16 * eni.prefixes.len())
            .map(|count| u64::try_from(count).unwrap_or(0))
            .sum();
        stage.check(held == in_cloud, || format!("{node}'s ledger holds {held} addresses, EC2 {in_cloud}"));
        stage.say(&format!(
            "{node}: kernel without pods, ledger without pods, and {held} warm addresses in both ledger and EC2"
        ));
    }
    let before: BTreeSet<String> = nodes_enis(lab, nodes)?;
    for node in nodes {
        lab.ask::<()>(&Request::NodeRemove { node: node.clone() })?;
    }
    lab.settle()?;
    let left: Vec<String> =
        lab.view()?.enis.iter().map(|eni| eni.id.to_string()).filter(|id| before.contains(id)).collect();
    stage.check(left.is_empty(), || format!("EC2 still has {} of the nodes: {}", left.len(), left.join(", ")));
    stage.say(&format!(
        "{} terminated: EC2 has deleted their {} ENIs with every address",
        nodes.join(" and "),
        before.len()
    ));
    Ok(())
}

/// Every ENI that is on one of the nodes.
fn nodes_enis(lab: &mut Lab, nodes: &[String]) -> Result<BTreeSet<String>> {
    let info: Info = lab.ask(&Request::Info)?;
    let of_nodes = info.nodes.iter().filter(|node| nodes.contains(&node.name));
    Ok(of_nodes.flat_map(|node| node.enis.iter().map(|eni| eni.id.clone())).collect())
}

fn veths(lab: &Lab, node: &str) -> Result<Vec<String>> {
    let table = lab.run(node, &["cat", "/proc/self/net/dev"])?;
    let names = table.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    Ok(names.filter(|name| name.starts_with("eni")).map(str::to_owned).collect())
}

/// The node's ledger as ipamd tells it.
fn ledger(lab: &Lab, node: &str) -> Result<Value> {
    let program = lab.ipamd()?;
    let text = lab.run(node, &[&program, "status", "--json"])?;
    serde_json::from_str(&text).doing(|| format!("the status of {node}'s ipamd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(kind: Kind, expected: [u8; 4], seen: Option<[u8; 4]>) -> Pair {
        let seen = seen.map(IpAddr::from);
        let probe = Probe {
            from: "a".into(),
            to: "b".into(),
            target: Ipv4Addr::LOCALHOST.into(),
            rtt_us: Some(10),
            seen,
            seen_tcp: seen,
        };
        Pair { kind, from: "a".into(), to: "b".into(), expected: expected.into(), probe }
    }

    #[test]
    fn a_pair_is_good_only_if_the_true_source_was_seen() {
        assert!(pair(Kind::OtherNode, [10, 0, 0, 9], Some([10, 0, 0, 9])).is_good());
        let translated = pair(Kind::OtherNode, [10, 0, 0, 9], Some([10, 0, 0, 1]));
        assert!(!translated.is_good() && translated.is_translated());
        let silent = pair(Kind::OtherNode, [10, 0, 0, 9], None);
        assert!(!silent.is_good() && !silent.is_translated());
        // Towards the internet the edge translates; only the wrong public address is wrong.
        assert!(!pair(Kind::PodToInternet, [198, 51, 100, 1], Some([198, 51, 100, 2])).is_translated());
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list() {
        assert!((percentile(&[1.0, 2.0, 3.0], 50) - 2.0).abs() < f64::EPSILON);
        assert!((percentile(&[1.0], 99) - 1.0).abs() < f64::EPSILON);
        assert!(percentile(&[], 50).abs() < f64::EPSILON);
    }
}
