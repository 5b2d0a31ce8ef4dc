//! Routing policy rules of the shapes this project uses and has to recognise.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use crate::error::KernelError;
use crate::netlink::{Netlink, RouteRequest};
use crate::route::PROTOCOL;

/// The kernel's way to say that a rule suppresses nothing.
const NO_SUPPRESSION: u32 = u32::MAX;

/// One rule that looks a table up. Two rules are equal when they do the same; the protocol number only says who
/// made one.
#[derive(Debug, Clone, Eq)]
pub struct Rule {
    /// Of IPv6 packets, not of IPv4 ones.
    pub v6: bool,
    pub priority: u32,
    pub table: u32,
    pub from: Option<IpNet>,
    pub to: Option<IpNet>,
    /// Mark and mask.
    pub fwmark: Option<(u32, u32)>,
    /// Ignore what the table says with a prefix of this length or shorter.
    pub suppress_prefixlength: Option<u32>,
    /// Ignore what the table says by a link of this group.
    pub suppress_group: Option<u32>,
    pub iif: Option<String>,
    pub protocol: u8,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        let deed = |rule: &Self| {
            let selector = (rule.v6, rule.priority, rule.from, rule.to, rule.fwmark, rule.iif.clone());
            (selector, rule.table, rule.suppress_prefixlength, rule.suppress_group)
        };
        deed(self) == deed(other)
    }
}

impl Rule {
    /// Looks up `table` for every IPv4 packet, until narrowed.
    pub fn lookup(priority: u32, table: u32) -> Self {
        Self {
            v6: false,
            priority,
            table,
            from: None,
            to: None,
            fwmark: None,
            suppress_prefixlength: None,
            suppress_group: None,
            iif: None,
            protocol: PROTOCOL,
        }
    }

    pub fn v6(mut self) -> Self {
        self.v6 = true;
        self
    }

    pub fn from(mut self, net: IpNet) -> Self {
        self.v6 = matches!(net, IpNet::V6(_));
        self.from = Some(net);
        self
    }

    pub fn to(mut self, net: IpNet) -> Self {
        self.v6 = matches!(net, IpNet::V6(_));
        // A rule to anywhere is one without a destination; so the kernel tells it.
        self.to = Some(net).filter(|net| net.prefix_len() > 0);
        self
    }

    pub fn fwmark(mut self, mark: u32, mask: u32) -> Self {
        self.fwmark = Some((mark, mask));
        self
    }

    pub fn suppress_prefixlength(mut self, length: u32) -> Self {
        self.suppress_prefixlength = Some(length);
        self
    }

    pub fn suppress_group(mut self, group: u32) -> Self {
        self.suppress_group = Some(group);
        self
    }

    pub fn iif(mut self, name: impl Into<String>) -> Self {
        self.iif = Some(name.into());
        self
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = if self.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.header.action = RuleAction::ToTable;
        message.header.table = u8::try_from(self.table).unwrap_or(0);
        message.attributes.push(RuleAttribute::Priority(self.priority));
        message.attributes.push(RuleAttribute::Table(self.table));
        message.attributes.push(RuleAttribute::Protocol(RouteProtocol::from(self.protocol)));
        if let Some(net) = self.from {
            message.header.src_len = net.prefix_len();
            message.attributes.push(RuleAttribute::Source(net.addr()));
        }
        if let Some(net) = self.to {
            message.header.dst_len = net.prefix_len();
            message.attributes.push(RuleAttribute::Destination(net.addr()));
        }
        if let Some((mark, mask)) = self.fwmark {
            message.attributes.push(RuleAttribute::FwMark(mark));
            message.attributes.push(RuleAttribute::FwMask(mask));
        }
        message.attributes.extend(self.suppress_prefixlength.map(RuleAttribute::SuppressPrefixLen));
        message.attributes.extend(self.suppress_group.map(RuleAttribute::SuppressIfGroup));
        message.attributes.extend(self.iif.clone().map(RuleAttribute::Iifname));
        message
    }

    /// `None` for a rule that does something this type cannot say; such a rule is never ours.
    pub(crate) fn parse(message: &RuleMessage) -> Option<Self> {
        if message.header.action != RuleAction::ToTable || message.header.tos != 0 || !message.header.flags.is_empty() {
            return None;
        }
        let mut rule = Self::lookup(0, u32::from(message.header.table));
        rule.protocol = 0;
        rule.v6 = message.header.family == AddressFamily::Inet6;
        let (mut mark, mut mask) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => rule.priority = *priority,
                RuleAttribute::Table(table) => rule.table = *table,
                RuleAttribute::Protocol(protocol) => rule.protocol = u8::from(*protocol),
                RuleAttribute::Source(address) => rule.from = IpNet::new(*address, message.header.src_len).ok(),
                RuleAttribute::Destination(address) => rule.to = IpNet::new(*address, message.header.dst_len).ok(),
                RuleAttribute::FwMark(value) => mark = Some(*value),
                RuleAttribute::FwMask(value) => mask = Some(*value),
                RuleAttribute::SuppressPrefixLen(NO_SUPPRESSION) | RuleAttribute::SuppressIfGroup(NO_SUPPRESSION) => {}
                RuleAttribute::SuppressPrefixLen(length) => rule.suppress_prefixlength = Some(*length),
                RuleAttribute::SuppressIfGroup(group) => rule.suppress_group = Some(*group),
                RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
                RuleAttribute::Realm(_) => {}
                _ => return None,
            }
        }
        rule.fwmark = mark.map(|mark| (mark, mask.unwrap_or(u32::MAX)));
        Some(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "ipv6 " } else { "" };
        write!(f, "{family}{}:", self.priority)?;
        if let Some(net) = self.from {
            write!(f, " from {net}")?;
        }
        if let Some(net) = self.to {
            write!(f, " to {net}")?;
        }
        if let Some((mark, mask)) = self.fwmark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        if let Some(name) = &self.iif {
            write!(f, " iif {name}")?;
        }
        write!(f, " lookup {}", flatwire_core::ids::RouteTable(self.table))?;
        if let Some(length) = self.suppress_prefixlength {
            write!(f, " suppress_prefixlength {length}")?;
        }
        if let Some(group) = self.suppress_group {
            write!(f, " suppress_ifgroup {group}")?;
        }
        Ok(())
    }
}

pub(crate) fn add_rule(rule: &Rule) -> RouteRequest {
    // The kernel knows no REPLACE for rules: it would add a second, identical one.
    RouteRequest::new(
        format!("add rule {rule}"),
        RouteNetlinkMessage::NewRule(rule.message()),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(crate) fn delete_rule(rule: &Rule) -> RouteRequest {
    let mut message = rule.message();
    if rule.protocol == 0 {
        message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
    }
    RouteRequest::new(format!("delete rule {rule}"), RouteNetlinkMessage::DelRule(message), 0)
}

/// Deletes one rule of that priority `from` or `to` an address, whichever table it looks up and whoever made it.
pub(crate) fn delete_rule_of(priority: u32, from: Option<IpAddr>, to: Option<IpAddr>) -> RouteRequest {
    let mut rule = Rule::lookup(priority, 0);
    rule.from = from.map(IpNet::from);
    rule.to = to.map(IpNet::from);
    rule.v6 = from.or(to).is_some_and(|address| address.is_ipv6());
    let mut message = rule.message();
    message.header.action = RuleAction::Unspec;
    message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_) | RuleAttribute::Table(_)));
    let which = match (from, to) {
        (Some(address), _) => format!("from {address}"),
        (_, Some(address)) => format!("to {address}"),
        _ => "for everything".to_owned(),
    };
    RouteRequest::new(format!("delete rule {priority}: {which}"), RouteNetlinkMessage::DelRule(message), 0)
}

impl Netlink {
    /// Adds a rule; being there already means done.
    pub async fn rule(&self, rule: &Rule) -> Result<(), KernelError> {
        match self.one(add_rule(rule)).await {
            Err(e) if e.errno() != Some(Errno::EEXIST) => Err(e),
            _ => Ok(()),
        }
    }

    /// Deletes a rule that does exactly this; absent means done.
    pub async fn delete_rule(&self, rule: &Rule) -> Result<(), KernelError> {
        match self.one(delete_rule(rule)).await {
            Err(e) if !e.is_absent() => Err(e),
            _ => Ok(()),
        }
    }

    /// Every rule this type can say, IPv4's first, each family in the kernel's order.
    pub async fn rules(&self) -> Result<Vec<Rule>, KernelError> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RuleMessage::default();
            wanted.header.family = family;
            let messages = match self.dump("list rules", RouteNetlinkMessage::GetRule(wanted)).await {
                // A kernel without IPv6.
                Err(e) if matches!(e.errno(), Some(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)) => continue,
                messages => messages?,
            };
            rules.extend(messages.iter().filter_map(|message| match message {
                // Asked for a family it does not know, the kernel may tell of all.
                RouteNetlinkMessage::NewRule(rule) if rule.header.family == family => Rule::parse(rule),
                _ => None,
            }));
        }
        Ok(rules)
    }
}
