//! The node's nftables table, computed from the plan: which ENI a pod's packet leaves by, and what is translated.
//!
//! Two kinds of marks steer (`Marks`). The primary's, 0x80 by default, sends a packet to the primary ENI (rule 1024); the
//! bits beside it name a secondary ENI (rule 1536). Both are also kept in the connection where a later packet of it must
//! go the same way.
//!
//! Invariant: a connection from a pod is steered to the primary ENI exactly when it is translated to its address. Both
//! hang on one decision, taken once, on the connection's first packet, and remembered in the connection's mark (test
//! `packets_leave_by_the_eni_of_their_pod_and_outside_ones_translated`).
//!
//! | packet | what happens |
//! |---|---|
//! | first of a connection, pod → outside | `steer` sets the primary's mark on connection and packet; `source-nat` translates |
//! | later ones, pod → outside | `steer` restores the mark; conntrack translates |
//! | pod → VPC, or excluded | `steer` sets the ENI's bits by source; no translation |
//! | pod → service | kube-proxy's DNAT (−100) came first, so the decision (−90) sees the real destination |
//! | reply of a pod to whoever called it | not the first packet, so never the primary's by decision: the ENI's bits, by which it was called |
//! | outside → an address of the node (NodePort, host port) | `came-in` notes on the connection by which ENI; the reply is restored to that ENI, whose address it gets back, whether a pod here, a pod of another node or the host itself answers |
//! | pod → node, pod → pod here | bits are set and do not matter: tables local and rule 512 come first |
//! | node → anywhere | does not come in by a pod's link: untouched |
//! | no conntrack entry (invalid) | the ENI's bits; never the primary's |
//! | destination of AWS_EXTERNAL_SERVICE_CIDRS | main decides (rule 1535); where that is the primary ENI and the pod another's, `source-nat` translates |
//!
//! The add-on decides in a nat chain, which the kernel skips once kube-proxy's DNAT has taken the connection; a service
//! with endpoints outside the VPC is then not translated. A filter chain that asks for the first packet has no such gap.
//! Like the add-on, and unlike a rule bound to the primary link, `source-nat` translates what carries the mark wherever main
//! sends it, so destinations behind a tunnel of the node keep working.
//!
//! Maps lead to a chain per ENI and not to a mark: merging a looked-up value into the other bits of the mark needs
//! an operation on two registers, which kernels before 6.13 lack.
//!
//! `pass` holds pods' TCP to what ways out of the VPC carry, both ways, since an opening tells the far side how much to
//! send at once; and keeps pods away from the instance metadata where that is asked for.
//!
//! IPv6 has a table of its own with the little that it needs: nothing is translated there, and a rule by the ENI's one prefix
//! steers, so only what came in to an address of the node by an ENI is sent back by that one. `pass` it has too.
//!
//! Pods of IPv6 clusters reach IPv4 with addresses that mean something on their node only: whatever leaves from those is
//! translated, inside the VPC too, and nobody opens a connection to one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flatwire_core::families::{EGRESS, Families};
use flatwire_core::netplan::{EniPlan, NodePlan, PortChoice, Snat};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::nft::{Chain, Family, Hook, Map, Ports, Rule, Set, Table};

pub(crate) const FAMILY: Family = Family::Ip;
pub(crate) const TABLE: &str = "flatwire";

const VPC: &str = "vpc";
const NO_SNAT: &str = "no-snat";
const PEERED: &str = "peered";
const EGRESS_SET: &str = "egress";
const POD_ENI: &str = "pod-eni";
const ENI_OF_LINK: &str = "eni-of-link";
const WAY_BACK: &str = "way-back";
const DECIDE_PRIMARY: &str = "to-primary";
const RESTORE_PRIMARY: &str = "again-primary";
const OPENINGS: &str = "openings";
const IN_BY_PRIMARY: &str = "in-primary";

/// iptables' mangle.
const BEFORE_DNAT: i32 = -150;
/// kube-proxy's DNAT is at -100.
const AFTER_DNAT: i32 = -90;
const SOURCE_NAT: i32 = 100;
/// iptables' mangle: before whoever filters what is forwarded.
const BEFORE_FILTERS: i32 = -150;

/// Branch ENIs of the add-on's security groups for pods: their packets leave as they are.
const BRANCH_LINKS: &str = "vlan";

const IMDS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const IMDS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));

/// Headers without options: what of the MTU is not the segment.
const TCP_HEADER_BYTES: u32 = 20;
const HEADER_BYTES: u32 = 20;
const HEADER_BYTES_V6: u32 = 40;

/// Private networks of IPv6 (RFC 4193), which no internet gateway carries.
const PRIVATE_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);

/// The whole table. `primary` is the present name of the primary ENI's link, `links` those of the secondary ENIs that
/// have appeared.
pub(crate) fn table(plan: &NodePlan, primary: &str, links: &[(String, &EniPlan)]) -> Table {
    let marks = plan.marks;
    let vpc = vpc_v4(plan);
    let excluded = if egress(plan) { Vec::new() } else { vpc.iter().chain(&plan.exclude_snat).copied().collect() };
    let mut table = Table::new(FAMILY, TABLE)
        .set(Set::addresses(NO_SNAT).networks(excluded))
        .set(Set::addresses(VPC).networks(vpc))
        .set(Set::addresses(PEERED).networks(peered(plan)))
        .map(Map::to_chains(POD_ENI, sources(plan)));
    if egress(plan) {
        table = table.set(Set::addresses(EGRESS_SET).networks([EGRESS]));
    }
    table = ways(table, plan, primary, links)
        .chain(steer(plan))
        .chain(host_replies(plan))
        .chain(openings(plan))
        .chain(pass(plan, FAMILY));
    // Without any nat chain in the namespace the kernel stops translating the connections it already translates, so this
    // one stands, empty, where nothing new is translated.
    let mut source_nat = Chain::nat("source-nat", Hook::Postrouting, SOURCE_NAT);
    if let Snat::ToPrimary(ports) = plan.snat {
        let snat = |rule: Rule| rule.counter().snat(plan.primary.address, port_choice(ports));
        table = table.chain(
            Chain::regular(DECIDE_PRIMARY)
                .rule(Rule::new().ct_mark_replace(marks.mask(), marks.primary).mark_set(marks.primary).counter()),
        );
        source_nat = source_nat.rule(snat(Rule::new().mark_has(marks.primary).oifname_prefix_not(BRANCH_LINKS)));
        if !plan.external_services.is_empty() {
            source_nat = source_nat.rule(snat(Rule::new().oifname(primary).mark_has_any(marks.eni_mask)));
        }
    }
    table.chain(source_nat)
}

/// IPv6's table.
pub(crate) fn table_v6(plan: &NodePlan, primary: &str, links: &[(String, &EniPlan)]) -> Table {
    let steer = Chain::filter("steer", Hook::Prerouting, AFTER_DNAT).rules(answers(plan));
    ways(Table::new(Family::Ip6, TABLE), plan, primary, links)
        .chain(steer)
        .chain(host_replies(plan))
        .chain(openings_v6(plan))
        .chain(pass(plan, Family::Ip6))
}

/// By which ENI a connection came in, and a chain per ENI that sends a packet by it.
fn ways(mut table: Table, plan: &NodePlan, primary: &str, links: &[(String, &EniPlan)]) -> Table {
    let marks = plan.marks;
    let ways = plan.enis.iter().map(|eni| (eni.mark, eni_chain(eni.mark)));
    table = table.map(Map::of_marks(WAY_BACK, ways.chain([(marks.primary, RESTORE_PRIMARY.to_owned())])));
    if plan.node_port {
        table = came_in(table, plan, primary, links);
    }
    for eni in &plan.enis {
        table = table.chain(
            Chain::regular(eni_chain(eni.mark))
                .rule(Rule::new().mark_replace(marks.eni_mask, eni.mark).comment(eni.id.to_string())),
        );
    }
    table.chain(Chain::regular(RESTORE_PRIMARY).rule(Rule::new().mark_set(marks.primary)))
}

/// Answers to what `came-in` noted go back by the ENI that was called.
fn answers(plan: &NodePlan) -> [Rule; 2] {
    [
        Rule::new().iifname_prefix_not(&plan.veth_prefix).ct_original().accept(),
        // Also where nothing is translated any more: connections made while it was still are, to their end.
        Rule::new().goto_by_ct_mark(plan.marks.mask(), WAY_BACK),
    ]
}

/// Answers of the host itself: the way is chosen before the address by which it was called is put back.
fn host_replies(plan: &NodePlan) -> Chain {
    let rule = Rule::new().ct_reply().goto_by_ct_mark(plan.marks.eni_mask, WAY_BACK);
    Chain::route("host-replies", BEFORE_DNAT).rule(rule)
}

/// Pods reach IPv4 with addresses of this node alone.
fn egress(plan: &NodePlan) -> bool {
    plan.families == Families::V6 { egress: true }
}

/// By which ENI a connection to an address of the node came in.
fn came_in(mut table: Table, plan: &NodePlan, primary: &str, links: &[(String, &EniPlan)]) -> Table {
    let marks = plan.marks;
    let note = |name: String, mark| {
        Chain::regular(name).rule(Rule::new().ct_original().destination_local().ct_mark_replace(marks.mask(), mark))
    };
    let mut by_link = vec![(primary.to_owned(), IN_BY_PRIMARY.to_owned())];
    table = table.chain(note(IN_BY_PRIMARY.to_owned(), marks.primary));
    for (link, eni) in links {
        let chain = format!("in-{}", eni.mark);
        by_link.push((link.clone(), chain.clone()));
        table = table.chain(note(chain, eni.mark));
    }
    table
        .map(Map::of_links(ENI_OF_LINK, by_link))
        .chain(Chain::filter("came-in", Hook::Prerouting, BEFORE_DNAT).rule(Rule::new().goto_by_input(ENI_OF_LINK)))
}

fn steer(plan: &NodePlan) -> Chain {
    let mut chain = Chain::filter("steer", Hook::Prerouting, AFTER_DNAT)
        .rules(answers(plan))
        .rule(Rule::new().iifname_prefix_not(&plan.veth_prefix).accept());
    if matches!(plan.snat, Snat::ToPrimary(_)) {
        chain = chain.rule(
            Rule::new().ct_unconfirmed().destination_not_in(NO_SNAT).destination_not_local().goto(DECIDE_PRIMARY),
        );
    }
    chain.rule(Rule::new().goto_by_source(POD_ENI))
}

/// What passes between pods and others.
fn pass(plan: &NodePlan, family: Family) -> Chain {
    let mut chain = Chain::filter("pass", Hook::Forward, BEFORE_FILTERS);
    if plan.block_imds {
        let imds = if family == FAMILY { IMDS } else { IMDS_V6 };
        chain = chain.rule(Rule::new().iifname_prefix(&plan.veth_prefix).destination(imds).counter().reject(family));
    }
    if family == FAMILY && egress(plan) {
        chain = chain.rule(Rule::new().ct_unconfirmed().destination_in(EGRESS_SET).counter().reject(family));
    }
    chain.rule(Rule::new().tcp_syn().goto(OPENINGS))
}

/// Packets that open TCP connections.
fn openings(plan: &NodePlan) -> Chain {
    let pods = plan.veth_prefix.as_str();
    let segment = |mtu| segment(mtu, HEADER_BYTES);
    let (outside, peered) = (segment(plan.path_mtus.outside), segment(plan.path_mtus.peered));
    Chain::regular(OPENINGS)
        .rule(Rule::new().iifname_prefix(pods).destination_in(PEERED).mss_at_most(peered).accept())
        .rule(Rule::new().oifname_prefix(pods).source_in(PEERED).mss_at_most(peered).accept())
        .rule(Rule::new().iifname_prefix(pods).destination_not_in(VPC).mss_at_most(outside))
        .rule(Rule::new().oifname_prefix(pods).source_not_in(VPC).mss_at_most(outside))
}

/// As `openings`. Nothing is excluded from translation in IPv6, so what is peered is known by being private.
fn openings_v6(plan: &NodePlan) -> Chain {
    let pods = plan.veth_prefix.as_str();
    let segment = |mtu| segment(mtu, HEADER_BYTES_V6);
    let (outside, peered) = (segment(plan.path_mtus.outside), segment(plan.path_mtus.peered));
    let out = || Rule::new().iifname_prefix(pods);
    let back = || Rule::new().oifname_prefix(pods);
    let vpc = plan.vpc.iter().filter(|net| net.addr().is_ipv6());
    let within = vpc.flat_map(|net| [out().destination_within(*net).accept(), back().source_within(*net).accept()]);
    Chain::regular(OPENINGS)
        .rules(within)
        .rule(out().destination_within(PRIVATE_V6).mss_at_most(peered).accept())
        .rule(back().source_within(PRIVATE_V6).mss_at_most(peered).accept())
        .rule(out().mss_at_most(outside))
        .rule(back().mss_at_most(outside))
}

fn segment(mtu: u32, header: u32) -> u16 {
    u16::try_from(mtu.saturating_sub(header + TCP_HEADER_BYTES)).unwrap_or(u16::MAX)
}

fn vpc_v4(plan: &NodePlan) -> Vec<Ipv4Net> {
    let v4 = |net: &IpNet| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    };
    plan.vpc.iter().filter_map(v4).collect()
}

/// Exclusions that are private networks outside the VPC. An exclusion of everything, by which some turn translation off,
/// says nothing of the way to the internet.
fn peered(plan: &NodePlan) -> Vec<Ipv4Net> {
    const PRIVATE: [Ipv4Net; 4] = [
        Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
        Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
        Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
        Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    ];
    let vpc = vpc_v4(plan);
    let mut outside = Vec::new();
    for net in plan.exclude_snat.iter().filter(|net| PRIVATE.iter().any(|private| private.contains(*net))) {
        // Of an exclusion around the VPC only what is not the VPC.
        let mut rest = vec![*net];
        for vpc in &vpc {
            rest = rest.into_iter().flat_map(|net| without(net, *vpc)).collect();
        }
        outside.extend(rest);
    }
    outside
}

/// What of a network is not in the other.
fn without(net: Ipv4Net, other: Ipv4Net) -> Vec<Ipv4Net> {
    if other.contains(&net) {
        return Vec::new();
    }
    if !net.contains(&other) {
        return vec![net];
    }
    let halves = net.subnets(net.prefix_len() + 1).into_iter().flatten();
    halves.flat_map(|half| without(half, other)).collect()
}

fn sources(plan: &NodePlan) -> Vec<(Ipv4Net, String)> {
    let mut entries = Vec::new();
    for eni in &plan.enis {
        entries.extend(eni.sources.iter().filter_map(|source| match source {
            IpNet::V4(net) => Some((*net, eni_chain(eni.mark))),
            IpNet::V6(_) => None,
        }));
    }
    entries
}

fn eni_chain(mark: u32) -> String {
    format!("eni-{mark}")
}

fn port_choice(choice: PortChoice) -> Ports {
    match choice {
        PortChoice::FullyRandom => Ports::FullyRandom,
        PortChoice::Random => Ports::Random,
        PortChoice::Keep => Ports::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::without;

    #[test]
    fn a_network_without_another_is_the_rest_of_it() {
        let cut = |net: &str, other: &str| -> Vec<String> {
            without(net.parse().unwrap(), other.parse().unwrap()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(cut("10.0.0.0/14", "10.1.0.0/16"), ["10.0.0.0/16", "10.2.0.0/15"]);
        assert!(cut("10.0.0.0/16", "10.0.0.0/16").is_empty());
        assert!(cut("10.1.0.0/16", "10.0.0.0/8").is_empty());
        assert_eq!(cut("10.1.0.0/16", "10.2.0.0/16"), ["10.1.0.0/16"]);
    }
}
