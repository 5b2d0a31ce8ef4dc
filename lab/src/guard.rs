//! What an ENI's security groups let through, as data: for each direction the packets that may begin a connection.
//! What belongs to a connection already passes, as in EC2, where groups are stateful.
//!
//! Not as in EC2: a connection is remembered once per VPC and not once per ENI, so a reply that leaves by another ENI than
//! the one it was asked through passes, too. Prefix lists allow nothing.

use flatwire_core::ids::SecurityGroupId;
use ipnet::IpNet;
use lab_ec2::{EniInfo, RuleInfo, RulePeer, View};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// What may begin at one ENI, of both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    pub egress: Vec<Allow>,
    pub ingress: Vec<Allow>,
}

/// Packets that a rule lets through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Allow {
    /// Destination of what goes out, source of what comes in.
    pub peer: IpNet,
    /// All if absent.
    pub protocol: Option<u8>,
    pub detail: Detail,
}

impl Allow {
    /// True for everything there is of the peer's family.
    pub fn is_everything(&self) -> bool {
        self.protocol.is_none() && self.peer.prefix_len() == 0
    }
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
    /// Of the groups that the ENI has in this view. Where everything of a family is allowed, nothing else of it is said,
    /// so that what the members of a group hold does not matter there.
    pub fn of(view: &View, eni: &EniInfo) -> Self {
        let allowed = |egress: bool| {
            let groups = view.security_groups.iter().filter(|group| eni.security_groups.contains(&group.id));
            let rules = groups.flat_map(|group| &group.rules).filter(|rule| rule.egress == egress);
            let mut allows: Vec<Allow> = rules.flat_map(|rule| allows(view, rule)).collect();
            allows.sort();
            allows.dedup();
            let open: Vec<IpNet> =
                allows.iter().filter(|allow| allow.is_everything()).map(|allow| allow.peer).collect();
            allows.retain(|allow| allow.is_everything() || !open.iter().any(|net| net.contains(&allow.peer)));
            allows
        };
        Self { egress: allowed(true), ingress: allowed(false) }
    }
}

fn allows(view: &View, rule: &RuleInfo) -> Vec<Allow> {
    let protocol = match rule.protocol.as_str() {
        "-1" => None,
        "icmp" => Some(ICMP),
        "icmpv6" => Some(ICMPV6),
        "tcp" => Some(6),
        "udp" => Some(17),
        number => match number.parse() {
            Ok(number) => Some(number),
            // Nothing that EC2 knows.
            Err(_) => return Vec::new(),
        },
    };
    let byte = |value: Option<i32>| value.and_then(|value| u8::try_from(value).ok());
    let port = |value: Option<i32>| value.and_then(|value| u16::try_from(value).ok());
    let detail = match protocol {
        Some(ICMP | ICMPV6) => byte(rule.from).map_or(Detail::Any, |kind| Detail::Icmp(kind, byte(rule.to))),
        Some(6 | 17) => match (port(rule.from), port(rule.to)) {
            (Some(from), Some(to)) => Detail::Ports(from, to),
            _ => Detail::Any,
        },
        _ => Detail::Any,
    };
    let peers = match &rule.peer {
        RulePeer::Ipv4(net) => vec![IpNet::V4(*net)],
        RulePeer::Ipv6(net) => vec![IpNet::V6(*net)],
        RulePeer::Group(group) => members(view, group),
        RulePeer::PrefixList(_) => Vec::new(),
    };
    peers.into_iter().map(|peer| Allow { peer, protocol, detail }).collect()
}

/// What the ENIs in a group hold.
fn members(view: &View, group: &SecurityGroupId) -> Vec<IpNet> {
    view.enis.iter().filter(|eni| eni.security_groups.contains(group)).flat_map(EniInfo::nets).collect()
}

#[cfg(test)]
mod tests {
    use flatwire_core::ids::Time;
    use std::net::IpAddr;

    use ipnet::{Ipv4Net, Ipv6Net};
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

    fn anybody() -> RulePeer {
        RulePeer::Ipv4(Ipv4Net::default())
    }

    #[test]
    fn the_group_a_vpc_is_born_with_lets_its_members_in_and_everything_out() {
        let ec2 = account();
        let view = ec2.view(NOW);
        let eni = view.enis.first().unwrap();
        let guard = Guard::of(&view, eni);
        assert!(guard.egress.iter().all(Allow::is_everything) && guard.egress.len() == 1);
        let own = Allow { peer: IpAddr::from(eni.primary_ipv4).into(), protocol: None, detail: Detail::Any };
        assert_eq!(guard.ingress, [own], "strangers may not come in");
    }

    #[test]
    fn an_open_group_lets_in_what_the_vpc_has_of_either_family_and_says_no_more() {
        let everything = |net| Allow { peer: net, protocol: None, detail: Detail::Any };
        let ec2 = account();
        let vpc = ec2.view(NOW).vpcs[0].id.clone();
        let guard = || {
            let view = ec2.view(NOW);
            Guard::of(&view, &view.enis[0])
        };
        ec2.open_default_group(NOW, &vpc).unwrap();
        assert_eq!(guard().ingress, [everything(IpNet::V4(Ipv4Net::default()))]);

        // Members are let in by the group's first rule, over IPv6 too.
        let block = ec2.give_vpc_ipv6(NOW, &vpc).unwrap();
        let eni = ec2.view(NOW).enis[0].clone();
        ec2.give_subnet_ipv6(NOW, &eni.subnet, block.subnets(64).unwrap().next().unwrap()).unwrap();
        let prefix = ec2.assign_ipv6_prefixes(NOW, &eni.id, 1).unwrap()[0];
        assert_eq!(guard().ingress, [everything(IpNet::V4(Ipv4Net::default())), everything(prefix.into())]);
        let everybody = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())].map(everything);
        assert_eq!(guard().egress, everybody);
    }

    #[test]
    fn ports_and_kinds_of_icmp_are_what_the_rule_says() {
        let view = account().view(NOW);
        let detail = |rule: &RuleInfo| allows(&view, rule).first().map(|allow| (allow.protocol, allow.detail));
        assert_eq!(detail(&rule("tcp", 80, 90, anybody())), Some((Some(6), Detail::Ports(80, 90))));
        assert_eq!(detail(&rule("udp", -1, -1, anybody())), Some((Some(17), Detail::Any)));
        assert_eq!(detail(&rule("icmp", -1, -1, anybody())), Some((Some(1), Detail::Any)));
        assert_eq!(detail(&rule("icmp", 8, -1, anybody())), Some((Some(1), Detail::Icmp(8, None))));
        assert_eq!(detail(&rule("icmp", 3, 4, anybody())), Some((Some(1), Detail::Icmp(3, Some(4)))));
        assert_eq!(detail(&rule("50", 0, 0, anybody())), Some((Some(50), Detail::Any)));
        assert_eq!(detail(&rule("icmpv6", 128, -1, anybody())), Some((Some(58), Detail::Icmp(128, None))));
        assert_eq!(detail(&rule("58", 128, 0, anybody())), Some((Some(58), Detail::Icmp(128, Some(0)))));
        assert_eq!(detail(&rule("nonsense", -1, -1, anybody())), None);
        assert_eq!(detail(&rule("-1", -1, -1, RulePeer::PrefixList("pl-1".to_owned()))), None);
    }
}
