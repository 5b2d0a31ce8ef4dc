//! What people read: the network as a tree, the status as tables. Only text here, nothing is asked or decided.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::ctl::{EniInfo, Info, NodeInfo, PodInfo, Status, VpcInfo};
use crate::fabric::{EC2_INSIDE, IMDS};

/// What `lab up` says once everything is there.
pub fn welcome(info: &Info) -> String {
    let mut text = tree(info);
    let credentials = &info.credentials;
    let _ = write!(
        text,
        "\nEC2 API    http://{endpoint} on this machine, http://{EC2_INSIDE} inside; IMDS at http://{IMDS}\n\n  \
         export AWS_ENDPOINT_URL_EC2=http://{endpoint} AWS_REGION={region} AWS_DEFAULT_REGION={region}\n  \
         export AWS_ACCESS_KEY_ID={key} AWS_SECRET_ACCESS_KEY={secret}\n\n",
        endpoint = info.endpoint,
        region = info.region,
        key = credentials.access_key_id,
        secret = credentials.secret_access_key,
    );
    let name = if info.name == "default" { String::new() } else { format!("--name {} ", info.name) };
    for node in &info.nodes {
        let _ = writeln!(text, "  lab exec {name}{} -- bash", node.name);
    }
    let _ = writeln!(text, "  lab pod add {name}node-1 web; lab ping {name}node-1/web internet; lab status {name}\n");
    text.push_str("Ctrl-C or `lab down` ends it, and everything in it.\n");
    text
}

/// The flat network: VPCs, subnets, nodes, ENIs, and every pod under the ENI that holds its address.
pub fn tree(info: &Info) -> String {
    let mut text = String::new();
    let ipv6 = info.vpc.ipv6.map_or_else(String::new, |_| format!(" {}", info.internet_server6));
    let _ = writeln!(text, "internet  {}{ipv6} (a server outside)", info.internet_server);
    for (kind, vpc) in [("VPC", &info.vpc), ("peered VPC", &info.peer)] {
        let cidrs = vpc.cidrs.iter().map(ToString::to_string).chain(vpc.ipv6.map(|net| net.to_string()));
        let cidrs: Vec<String> = cidrs.collect();
        let _ = writeln!(text, "{kind}  {}  {}", cidrs.join(" "), vpc.id);
        subnets(&mut text, vpc, &info.nodes);
    }
    text
}

fn subnets(text: &mut String, vpc: &VpcInfo, nodes: &[NodeInfo]) {
    for (last, subnet) in with_last(&vpc.subnets) {
        let (branch, below) = limbs(last);
        let _ = writeln!(
            text,
            "{branch}subnet {}{}  {}  {} addresses free",
            subnet.cidr,
            subnet.ipv6.map_or_else(String::new, |net| format!(" {net}")),
            subnet.availability_zone,
            subnet.free_addresses
        );
        let here: Vec<&NodeInfo> =
            nodes.iter().filter(|node| node.address.is_some_and(|address| subnet.cidr.contains(&address))).collect();
        for (last, node) in with_last(&here) {
            machine(text, below, last, node);
        }
    }
}

fn machine(text: &mut String, indent: &str, last: bool, node: &NodeInfo) {
    let (branch, below) = limbs(last);
    let public = node.public.map_or_else(String::new, |public| format!("  public {public}"));
    let ipamd = if node.daemon == "none" { String::new() } else { format!("  ipamd {}", node.daemon) };
    let _ = writeln!(text, "{indent}{branch}{}  {}{public}{ipamd}", node.name, node.instance_type);
    for (last_eni, eni) in with_last(&node.enis) {
        interface(text, &format!("{indent}{below}"), last_eni, eni, &node.pods);
    }
}

fn interface(text: &mut String, indent: &str, last: bool, eni: &EniInfo, pods: &[PodInfo]) {
    let (branch, below) = limbs(last);
    let link = eni.link.clone().unwrap_or_else(|| eni.status.clone());
    let ipv6 = eni.ipv6.iter().map(|address| format!("  {address}")).collect::<String>();
    let held = match (eni.secondary.len(), eni.prefixes.len() + eni.ipv6_prefixes.len()) {
        (0, 0) => String::new(),
        (0, prefixes) => format!("  + {}", count(prefixes, "prefix", "prefixes")),
        (addresses, 0) => format!("  + {}", count(addresses, "address", "addresses")),
        (a, p) => format!("  + {}, {}", count(a, "address", "addresses"), count(p, "prefix", "prefixes")),
    };
    let _ = writeln!(text, "{indent}{branch}{link:<5} {:<15}{ipv6}  {}{held}", eni.primary.to_string(), eni.id);
    let indent = format!("{indent}{below}");
    let inside = |nets: &[IpNet]| -> Vec<(IpAddr, &str)> {
        let all = pods.iter().flat_map(|pod| pod.addresses.iter().map(|address| (*address, pod.name.as_str())));
        all.filter(|(address, _)| nets.iter().any(|net| net.contains(address))).collect()
    };
    let single: Vec<IpNet> = eni.secondary.iter().map(|address| IpAddr::from(*address).into()).collect();
    list(text, &indent, "", &inside(&single));
    let prefixes = eni.prefixes.iter().copied().map(|net| (IpNet::V4(net), " of 16"));
    for (prefix, of) in prefixes.chain(eni.ipv6_prefixes.iter().copied().map(|net| (IpNet::V6(net), ""))) {
        let inside = inside(&[prefix]);
        let label = format!("{prefix}  {}{of} used  ", inside.len());
        if inside.is_empty() {
            let _ = writeln!(text, "{indent}  {label}");
        } else {
            list(text, &indent, &label, &inside);
        }
    }
}

/// Pods with their addresses, as many on a line as fit.
fn list(text: &mut String, indent: &str, label: &str, pods: &[(IpAddr, &str)]) {
    const WIDTH: usize = 110;
    let mut pods: Vec<_> = pods.to_vec();
    pods.sort();
    let pad = " ".repeat(label.chars().count());
    let mut line = String::new();
    let mut first = true;
    for (address, name) in pods {
        let item = format!("{name} {address}");
        if !line.is_empty() && indent.chars().count() + pad.len() + line.len() + item.len() > WIDTH {
            let _ = writeln!(text, "{indent}  {}{line}", if first { label } else { &pad });
            (line, first) = (String::new(), false);
        }
        if !line.is_empty() {
            line.push_str(", ");
        }
        line.push_str(&item);
    }
    if !line.is_empty() {
        let _ = writeln!(text, "{indent}  {}{line}", if first { label } else { &pad });
    }
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn limbs(last: bool) -> (&'static str, &'static str) {
    if last { ("└─ ", "   ") } else { ("├─ ", "│  ") }
}

fn with_last<T>(items: &[T]) -> impl Iterator<Item = (bool, &T)> {
    items.iter().enumerate().map(|(index, item)| (index + 1 == items.len(), item))
}

/// `lab status`: the tree, then what the fabric dropped and what EC2 was asked.
pub fn status(status: &Status) -> String {
    let mut text = tree(&status.info);
    let drops = &status.drops;
    let _ = writeln!(
        text,
        "\ndropped   {} spoofed, {} to nobody, {} without a public address, {} by a security group   \
         (fabric follows in {:.1} ms)",
        drops.spoofed, drops.unassigned, drops.no_public, drops.denied, status.fabric_ms
    );
    for node in &status.info.nodes {
        for eni in node.enis.iter().filter(|eni| eni.spoofed > 0) {
            let _ = writeln!(text, "          {} spoofed on {} of {}", eni.spoofed, eni.id, node.name);
        }
    }
    text.push_str(&calls(&status.calls));
    text
}

/// EC2 calls by action, most frequent first.
pub fn calls(calls: &BTreeMap<String, u64>) -> String {
    let mut sorted: Vec<_> = calls.iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    let mut text = format!("EC2 calls {}\n", calls.values().sum::<u64>());
    for (action, count) in sorted {
        let _ = writeln!(text, "  {count:>6}  {action}");
    }
    text
}
