//! What an ENI's security groups let through, as data: for each direction the packets that may begin a connection.
//! What belongs to a connection already passes, as in EC2, where groups are stateful.
//!
//! Not as in EC2: a connection is remembered once per VPC and not once per ENI, so a reply that leaves by another ENI than
//! the one it was asked through passes, too. IPv6 rules and prefix lists allow nothing.

use std::net::Ipv4Addr;

use flatwire_core::ids::SecurityGroupId;
use ipnet::Ipv4Net;
use lab_ec2::{EniInfo, RuleInfo, RulePeer, View};

const ICMP: u8 = 1;
const ANYWHERE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);

/// One ENI's link, and what may begin there. `None` where everything may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    pub egress: Option<Vec<Allow>>,
    pub ingress: Option<Vec<Allow>>,
}

/// Packets that a rule lets through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Allow {
    /// Destination of what goes out, source of what comes in.
    pub peer: Ipv4Net,
    /// All if absent.
    pub protocol: Option<u8>,
    pub detail: Detail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    Any,
    /// Destination ports, both included.
    Ports(u16, u16),
    /// Type of an ICMP message, and its code if that matters.
    Icmp(u8, Option<u8>),
}

impl Guard {
    /// Of the groups that the ENI has in this view; `None` if they let everything through both ways.
    pub fn of(view: &View, eni: &EniInfo) -> Option<Self> {
        let allowed = |egress: bool| {
            let groups = view.security_groups.iter().filter(|group| eni.security_groups.contains(&group.id));
            let rules = groups.flat_map(|group| &group.rules).filter(|rule| rule.egress == egress);
            let mut allows: Vec<Allow> = rules.flat_map(|rule| allows(view, rule)).collect();
            allows.sort();
            allows.dedup();
            let open = allows.iter().any(|allow| allow.protocol.is_none() && allow.peer == ANYWHERE);
            (!open).then_some(allows)
        };
        let guard = Self { egress: allowed(true), ingress: allowed(false) };
        (guard.egress.is_some() || guard.ingress.is_some()).then_some(guard)
    }
}

fn allows(view: &View, rule: &RuleInfo) -> Vec<Allow> {
    let protocol = match rule.protocol.as_str() {
        "-1" => None,
        "icmp" => Some(ICMP),
        "tcp" => Some(6),
        "udp" => Some(17),
        number => match number.parse() {
            Ok(number) => Some(number),
            // Of IPv6, or nothing that EC2 knows.
            Err(_) => return Vec::new(),
        },
    };
    let byte = |value: Option<i32>| value.and_then(|value| u8::try_from(value).ok());
    let port = |value: Option<i32>| value.and_then(|value| u16::try_from(value).ok());
    let detail = match protocol {
        Some(ICMP) => byte(rule.from).map_or(Detail::Any, |kind| Detail::Icmp(kind, byte(rule.to))),
        Some(6 | 17) => match (port(rule.from), port(rule.to)) {
            (Some(from), Some(to)) => Detail::Ports(from, to),
            _ => Detail::Any,
        },
        _ => Detail::Any,
    };
    let peers = match &rule.peer {
        RulePeer::Ipv4(net) => vec![*net],
        RulePeer::Group(group) => members(view, group),
        RulePeer::Ipv6(_) | RulePeer::PrefixList(_) => Vec::new(),
    };
    peers.into_iter().map(|peer| Allow { peer, protocol, detail }).collect()
}

/// Addresses of the ENIs in a group.
fn members(view: &View, group: &SecurityGroupId) -> Vec<Ipv4Net> {
    let enis = view.enis.iter().filter(|eni| eni.security_groups.contains(group));
    enis.flat_map(|eni| {
        let addresses = eni.secondary.iter().chain([&eni.primary_ipv4]).map(|address| Ipv4Net::from(*address));
        addresses.chain(eni.prefixes.iter().copied()).collect::<Vec<_>>()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use flatwire_core::ids::Time;
    use lab_ec2::{Ec2, Options, RunInstance, Tags};

    use super::*;

    const NOW: Time = Time(1_000_000);

    fn account() -> Ec2 {
        let ec2 = Ec2::new(Options::default());
        let vpc = ec2.create_vpc(NOW, "10.0.0.0/16".parse().unwrap(), "a").unwrap();
        let subnet = ec2.create_subnet(NOW, &vpc, "10.0.0.0/24".parse().unwrap(), None, Tags::new()).unwrap();
        ec2.run_instance(NOW, &RunInstance::new("m5.large", subnet)).unwrap();
        ec2
    }

    fn rule(protocol: &str, from: i32, to: i32, peer: RulePeer) -> RuleInfo {
        let (from, to) = (Some(from), Some(to));
        RuleInfo {
            id: String::new(),
            egress: false,
            protocol: protocol.to_owned(),
            from,
            to,
            peer,
            description: String::new(),
        }
    }

    #[test]
    fn the_group_a_vpc_is_born_with_lets_its_members_in_and_everything_out() {
        let ec2 = account();
        let view = ec2.view(NOW);
        let eni = view.enis.first().unwrap();
        let guard = Guard::of(&view, eni).expect("strangers may not come in");
        assert_eq!(guard.egress, None);
        let own = Allow { peer: eni.primary_ipv4.into(), protocol: None, detail: Detail::Any };
        assert_eq!(guard.ingress, Some(vec![own]));
    }

    #[test]
    fn an_open_group_needs_no_guard() {
        let ec2 = account();
        let vpc = ec2.view(NOW).vpcs[0].id.clone();
        ec2.open_default_group(NOW, &vpc).unwrap();
        let view = ec2.view(NOW);
        assert_eq!(Guard::of(&view, &view.enis[0]), None);
    }

    #[test]
    fn ports_and_kinds_of_icmp_are_what_the_rule_says() {
        let view = account().view(NOW);
        let any = || RulePeer::Ipv4(ANYWHERE);
        let detail = |rule: &RuleInfo| allows(&view, rule).first().map(|allow| (allow.protocol, allow.detail));
        assert_eq!(detail(&rule("tcp", 80, 90, any())), Some((Some(6), Detail::Ports(80, 90))));
        assert_eq!(detail(&rule("udp", -1, -1, any())), Some((Some(17), Detail::Any)));
        assert_eq!(detail(&rule("icmp", -1, -1, any())), Some((Some(1), Detail::Any)));
        assert_eq!(detail(&rule("icmp", 8, -1, any())), Some((Some(1), Detail::Icmp(8, None))));
        assert_eq!(detail(&rule("icmp", 3, 4, any())), Some((Some(1), Detail::Icmp(3, Some(4)))));
        assert_eq!(detail(&rule("50", 0, 0, any())), Some((Some(50), Detail::Any)));
        assert_eq!(detail(&rule("icmpv6", -1, -1, any())), None);
        assert_eq!(detail(&rule("-1", -1, -1, RulePeer::PrefixList("pl-1".to_owned()))), None);
    }
}
