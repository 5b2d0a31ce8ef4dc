//! The node's nftables table, computed from the plan: which ENI a pod's packet leaves by, and what is translated.
//!
//! Two marks steer. 0x80 sends a packet to the primary ENI (rule 1024); the bits 0x7f name a secondary ENI (rule 1536).
//! 0x80 is also kept in the connection, so that every later packet of it goes the same way.
//!
//! Invariant: a connection from a pod is steered to the primary ENI exactly when it is translated to its address. Both
//! hang on one decision, taken once, on the connection's first packet, and remembered in the connection's mark (test
//! `packets_leave_by_the_eni_of_their_pod_and_outside_ones_translated`).
//!
//! | packet | what happens |
//! |---|---|
//! | first of a connection, pod → outside | `steer` sets 0x80 on connection and packet; `source-nat` translates |
//! | later ones, pod → outside | `steer` restores 0x80; conntrack translates |
//! | pod → VPC, or excluded | `steer` sets the ENI's bits by source; no translation |
//! | pod → service | kube-proxy's DNAT (−100) came first, so the decision (−90) sees the real destination |
//! | reply of a pod to whoever called it | not the first packet, so never 0x80 by decision: the ENI's bits, by which it was called |
//! | outside → node address (NodePort, host port) | `node-port` sets 0x80 on the connection; the pod's reply is restored to it and leaves by the primary ENI, whose address it gets back |
//! | pod → node, pod → pod here | bits are set and do not matter: tables local and rule 512 come first |
//! | node → anywhere | does not come in by a pod's link: untouched |
//! | no conntrack entry (invalid) | the ENI's bits; never 0x80 |
//!
//! The add-on decides in a nat chain, which the kernel skips once kube-proxy's DNAT has taken the connection; a service
//! with endpoints outside the VPC is then not translated. A filter chain that asks for the first packet has no such gap.
//! Like the add-on, and unlike a rule bound to the primary link, `source-nat` translates what carries the mark wherever main
//! sends it, so destinations behind a tunnel of the node keep working.
//!
//! The map leads to a chain per ENI and not to a mark: merging a looked-up value into the other bits of the mark needs
//! an operation on two registers, which kernels before 6.13 lack.
//!
//! IPv4 only: IPv6 pods all are on the primary ENI and nothing is translated.

use std::collections::BTreeMap;

use flatwire_core::netplan::{ENI_MARK_MASK, NodePlan, PRIMARY_MARK, PortChoice, Snat};
use ipnet::{IpNet, Ipv4Net};

use crate::nft::{Chain, Family, Hook, Map, Ports, Rule, Set, Table};

pub(crate) const FAMILY: Family = Family::Ip;
pub(crate) const TABLE: &str = "flatwire";

const NO_SNAT: &str = "no-snat";
const POD_ENI: &str = "pod-eni";
const TO_PRIMARY: &str = "to-primary";

/// iptables' mangle.
const BEFORE_DNAT: i32 = -150;
/// kube-proxy's DNAT is at -100.
const AFTER_DNAT: i32 = -90;
const SOURCE_NAT: i32 = 100;

/// Branch ENIs of the add-on's security groups for pods: their packets leave as they are.
const BRANCH_LINKS: &str = "vlan";

/// The whole table. `primary` is the present name of the primary ENI's link.
pub(crate) fn table(plan: &NodePlan, primary: &str) -> Table {
    let mut table = Table::new(FAMILY, TABLE)
        .set(Set::addresses(NO_SNAT).networks(plan.no_snat.iter().copied()))
        .map(Map::to_chains(POD_ENI, sources(plan)));
    if plan.node_port {
        table = table.chain(
            Chain::filter("node-port", Hook::Prerouting, BEFORE_DNAT)
                .rule(Rule::new().iifname(primary).destination_local().ct_mark_set(PRIMARY_MARK)),
        );
    }
    for mark in plan.enis.iter().map(|eni| (eni.mark, &eni.id)).collect::<BTreeMap<_, _>>() {
        let (mark, id) = mark;
        table = table.chain(
            Chain::regular(eni_chain(mark)).rule(Rule::new().mark_replace(ENI_MARK_MASK, mark).comment(id.to_string())),
        );
    }
    table = table.chain(steer(plan));
    // Without any nat chain in the namespace the kernel stops translating the connections it already translates, so this
    // one stands, empty, where nothing new is translated.
    let mut source_nat = Chain::nat("source-nat", Hook::Postrouting, SOURCE_NAT);
    if let Snat::ToPrimary(ports) = plan.snat {
        table = table.chain(
            Chain::regular(TO_PRIMARY).rule(Rule::new().ct_mark_set(PRIMARY_MARK).mark_set(PRIMARY_MARK).counter()),
        );
        source_nat = source_nat.rule(
            Rule::new()
                .mark_has(PRIMARY_MARK)
                .oifname_prefix_not(BRANCH_LINKS)
                .counter()
                .snat(plan.primary.address, port_choice(ports)),
        );
    }
    table.chain(source_nat)
}

fn steer(plan: &NodePlan) -> Chain {
    let mut chain = Chain::filter("steer", Hook::Prerouting, AFTER_DNAT)
        .rule(Rule::new().iifname_prefix_not(&plan.veth_prefix).accept())
        // Also where nothing is translated any more: connections made while it was still are, to their end.
        .rule(Rule::new().ct_mark_has(PRIMARY_MARK).mark_set(PRIMARY_MARK).accept());
    if matches!(plan.snat, Snat::ToPrimary(_)) {
        chain = chain
            .rule(Rule::new().ct_unconfirmed().destination_not_in(NO_SNAT).destination_not_local().goto(TO_PRIMARY));
    }
    chain.rule(Rule::new().goto_by_source(POD_ENI))
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
