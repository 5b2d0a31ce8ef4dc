//! Services as kube-proxy makes them known to the kernel, in each of its modes and for either family: the chains, marks and
//! priorities are its, so that what stands beside them meets them as it would on a node.
//!
//! It makes text for `iptables-restore` and `nft`; it installs nothing.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use clap::ValueEnum;

/// A mode of kube-proxy, with the backend that iptables has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Mode {
    /// iptables, by ip_tables.
    Legacy,
    /// iptables, by nf_tables.
    Nft,
    /// nftables.
    Nftables,
}

/// What kube-proxy has rules for, each apart: it keeps the families in tables of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    pub fn has(self, address: IpAddr) -> bool {
        address.is_ipv6() == (self == Self::V6)
    }

    fn iptables(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    /// nft's words: of tables and of what it matches in packets, and the type of an address.
    fn nft(self) -> (&'static str, &'static str) {
        match self {
            Self::V4 => ("ip", "ipv4_addr"),
            Self::V6 => ("ip6", "ipv6_addr"),
        }
    }
}

/// Port of every ClusterIP.
pub const SERVICE_PORT: u16 = 80;

/// A Service with one endpoint, which is all it takes to know where a packet must come out.
#[derive(Debug, Clone)]
pub struct Service {
    /// Unique, and short enough for the name of a chain.
    pub name: String,
    pub cluster_ip: IpAddr,
    pub node_port: u16,
    /// externalTrafficPolicy is Local.
    pub local: bool,
    pub endpoint: SocketAddr,
    /// The node on which the endpoint is, if it is on one.
    pub node: Option<String>,
}

impl Service {
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.cluster_ip, SERVICE_PORT)
    }
}

const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Legacy => "iptables (legacy)",
            Self::Nft => "iptables (nft)",
            Self::Nftables => "nftables",
        }
    }

    /// A command that succeeds where this mode can be had.
    pub fn trial(self, family: Family) -> String {
        match self.iptables(family) {
            Some(program) => format!("{program} -w -t nat -S && {program} -w -t filter -S"),
            None => "nft list tables".to_owned(),
        }
    }

    /// The shell command that makes the Services known on a node.
    pub fn install(self, family: Family, node: &str, services: &[Service]) -> String {
        let (program, text) = match self.iptables(family) {
            Some(program) => (format!("{program}-restore -w --noflush"), iptables(node, services)),
            None => ("nft -f -".to_owned(), nftables(family, node, services)),
        };
        format!("{program} <<'END'\n{text}END\n")
    }

    /// The shell command that takes them away again, and nothing else.
    pub fn remove(self, family: Family) -> String {
        let Some(program) = self.iptables(family) else {
            return format!("nft delete table {} kube-proxy", family.nft().0);
        };
        // Flushed whole: nobody else uses iptables on a node of the lab.
        let tables = ["nat", "filter"].map(|table| format!("{program} -w -t {table} -F && {program} -w -t {table} -X"));
        tables.join(" && ")
    }

    fn iptables(self, family: Family) -> Option<String> {
        match self {
            Self::Legacy => Some(format!("{}-legacy", family.iptables())),
            Self::Nft => Some(format!("{}-nft", family.iptables())),
            Self::Nftables => None,
        }
    }
}

/// One chain per Service and endpoint, walked rule by rule.
fn iptables(node: &str, services: &[Service]) -> String {
    let (mut chains, mut rules, mut filter) = (String::new(), String::new(), String::new());
    let mut chain = |name: &str| writeln!(chains, ":{name} - [0:0]").expect("invariant: writing to a text succeeds");
    let mut say = |rule: String| rules.push_str(&format!("-A {rule}\n"));
    for name in ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"] {
        chain(name);
    }
    say("KUBE-MARK-MASQ -j MARK --or-mark 0x4000".to_owned());
    say("KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN".to_owned());
    say("KUBE-POSTROUTING -j MARK --xor-mark 0x4000".to_owned());
    say("KUBE-POSTROUTING -j MASQUERADE --random-fully".to_owned());
    for service in services {
        for protocol in PROTOCOLS {
            let Service { name, cluster_ip, node_port, endpoint, .. } = service;
            let id = format!("{}-{}", name.to_uppercase(), protocol.to_uppercase());
            let (svc, sep, ext, svl) = (
                format!("KUBE-SVC-{id}"),
                format!("KUBE-SEP-{id}"),
                format!("KUBE-EXT-{id}"),
                format!("KUBE-SVL-{id}"),
            );
            for name in [&svc, &sep, &ext, &svl] {
                chain(name);
            }
            say(format!("KUBE-SERVICES -d {cluster_ip} -p {protocol} -m {protocol} --dport {SERVICE_PORT} -j {svc}"));
            say(format!("{svc} -j {sep}"));
            say(format!("{sep} -s {} -j KUBE-MARK-MASQ", endpoint.ip()));
            say(format!("{sep} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}"));
            say(format!("KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {node_port} -j {ext}"));
            if !service.local {
                say(format!("{ext} -j KUBE-MARK-MASQ"));
                say(format!("{ext} -j {svc}"));
                continue;
            }
            say(format!("{ext} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ"));
            say(format!("{ext} -m addrtype --src-type LOCAL -j {svc}"));
            if service.node.as_deref() == Some(node) {
                say(format!("{ext} -j {svl}"));
                say(format!("{svl} -j {sep}"));
            } else {
                filter.push_str(&format!(
                    "-A KUBE-EXTERNAL-SERVICES -p {protocol} -m addrtype --dst-type LOCAL -m {protocol} --dport {node_port} \
                     -j DROP\n"
                ));
            }
        }
    }
    say("KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS".to_owned());
    format!(
        "*nat\n{chains}-I PREROUTING -j KUBE-SERVICES\n-I OUTPUT -j KUBE-SERVICES\n-I POSTROUTING -j KUBE-POSTROUTING\n\
         {rules}COMMIT\n\
         *filter\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-FORWARD - [0:0]\n\
         -I INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n-I FORWARD -j KUBE-FORWARD\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         {filter}COMMIT\n"
    )
}

/// Maps from addresses and ports to a chain per Service, and one per endpoint.
fn nftables(family: Family, node: &str, services: &[Service]) -> String {
    let (ip, address) = family.nft();
    let (mut ips, mut node_ports, mut silent, mut chains) = (Vec::new(), Vec::new(), Vec::new(), String::new());
    for service in services {
        for protocol in PROTOCOLS {
            let Service { name, cluster_ip, node_port, endpoint, .. } = service;
            let id = format!("{name}-{protocol}");
            ips.push(format!("{cluster_ip} . {protocol} . {SERVICE_PORT} : goto service-{id}"));
            node_ports.push(format!("{protocol} . {node_port} : goto external-{id}"));
            let external = match (service.local, service.node.as_deref() == Some(node)) {
                (false, _) => format!("jump mark-for-masquerade\n goto service-{id}"),
                (true, here) => {
                    let own = format!(
                        "fib saddr type local jump mark-for-masquerade\n fib saddr type local goto service-{id}"
                    );
                    if here {
                        format!("{own}\n numgen random mod 1 vmap {{ 0 : goto endpoint-{id} }}")
                    } else {
                        silent.push(format!("{protocol} . {node_port} : drop"));
                        own
                    }
                }
            };
            chains.push_str(&format!(
                " chain endpoint-{id} {{\n {ip} saddr {} jump mark-for-masquerade\n meta l4proto {protocol} dnat to {endpoint}\n }}\n\
                 chain service-{id} {{\n numgen random mod 1 vmap {{ 0 : goto endpoint-{id} }}\n }}\n\
                 chain external-{id} {{\n {external}\n }}\n",
                endpoint.ip()
            ));
        }
    }
    let elements = |entries: Vec<String>| match entries.is_empty() {
        true => String::new(),
        false => format!("elements = {{ {} }}", entries.join(", ")),
    };
    format!(
        "table {ip} kube-proxy {{
 chain mark-for-masquerade {{
  meta mark set meta mark | 0x4000
 }}
{chains}
 map service-ips {{
  type {address} . inet_proto . inet_service : verdict
  {}
 }}
 map service-nodeports {{
  type inet_proto . inet_service : verdict
  {}
 }}
 map no-endpoint-nodeports {{
  type inet_proto . inet_service : verdict
  {}
 }}
 chain services {{
  {ip} daddr . meta l4proto . th dport vmap @service-ips
  fib daddr type local meta l4proto . th dport vmap @service-nodeports
 }}
 chain masquerading {{
  meta mark & 0x4000 == 0 return
  meta mark set meta mark ^ 0x4000
  masquerade fully-random
 }}
 chain nodeport-endpoints-check {{
  fib daddr type local meta l4proto . th dport vmap @no-endpoint-nodeports
 }}
 chain filter-input {{
  type filter hook input priority -110; policy accept;
  ct state new jump nodeport-endpoints-check
 }}
 chain nat-prerouting {{
  type nat hook prerouting priority -100; policy accept;
  jump services
 }}
 chain nat-output {{
  type nat hook output priority -100; policy accept;
  jump services
 }}
 chain nat-postrouting {{
  type nat hook postrouting priority 100; policy accept;
  jump masquerading
 }}
}}
",
        elements(ips),
        elements(node_ports),
        elements(silent)
    )
}
