//! What a VPC's router does to packets beside routing them: the source check, the edge's one-to-one address
//! translation, the ENIs' security groups, and the counters of what is dropped without a word. One nftables table per
//! family, replaced whole in one transaction.
//!
//! Translation is stateless, as an internet gateway's is: the address in the packet is rewritten and nothing
//! remembered. IPv6 is not translated: its addresses are public as they are.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::slice;

use ipnet::{IpNet, Ipv6Net};
use netlink_packet_core::{
    DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, ExpressionAttribute, Expressions, Hook, InetHookNumber, ListAttribute,
    NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

use crate::error::{Doing, Result};
use crate::guard::{Allow, Detail, Guard};
use crate::ns::{Place, has_ipv6};

const TABLE: &str = "fabric";
const LINK_LOCAL: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10));
const MULTICAST: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8));
const SUBSYSTEM: u16 = 10;
const NESTED: u16 = 0x8000;

/// The rules of one router as data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Links whose packets must carry a source that is routed back to them, each with the name it is counted under.
    pub checked: BTreeMap<String, String>,
    /// The link to the internet, if the VPC has a gateway.
    pub edge: Option<String>,
    /// Private addresses with a public one.
    pub public: BTreeMap<Ipv4Addr, Ipv4Addr>,
    /// Links of ENIs, with what their security groups let through.
    pub guards: BTreeMap<String, Guard>,
}

/// Names of the counters that are not a link's.
pub const UNASSIGNED: &str = "unassigned";
pub const NO_PUBLIC: &str = "no-public";
/// By a security group.
pub const DENIED: &str = "denied";

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    chain: &'static str,
    counted_as: String,
    expressions: Vec<Expressions>,
}

/// What the two families differ in, as far as rules go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// Those that this kernel has; IPv6 can be left out when it boots.
    fn here() -> &'static [Self] {
        if has_ipv6() { &[Self::V4, Self::V6] } else { &[Self::V4] }
    }

    fn of_tables(self) -> NetfilterProtoFamily {
        match self {
            Self::V4 => NetfilterProtoFamily::IPv4,
            Self::V6 => NetfilterProtoFamily::IPv6,
        }
    }

    fn has(self, net: IpNet) -> bool {
        matches!((self, net), (Self::V4, IpNet::V4(_)) | (Self::V6, IpNet::V6(_)))
    }

    /// The packet's source address.
    fn source(self) -> Expressions {
        match self {
            Self::V4 => part(NETWORK, SOURCE, 4),
            Self::V6 => part(NETWORK, 8, 16),
        }
    }

    fn destination(self) -> Expressions {
        match self {
            Self::V4 => part(NETWORK, DESTINATION, 4),
            Self::V6 => part(NETWORK, 24, 16),
        }
    }
}

impl Firewall {
    fn rules(&self, family: Family) -> Vec<Rule> {
        let mut rules = Vec::new();
        let mut rule = |chain, counted_as: &str, parts: &[&[Expressions]]| {
            rules.push(Rule { chain, counted_as: counted_as.to_owned(), expressions: parts.concat() });
        };
        if family == Family::V6 {
            // Neighbour discovery and its like: between the ends of one cable, and never forwarded.
            for (address, net) in [(family.source(), LINK_LOCAL), (family.destination(), MULTICAST)] {
                rule("arrive", "", &[&[address], &within(net), &[verdict(NF_ACCEPT)]]);
            }
        }
        for (link, name) in &self.checked {
            rule(
                "arrive",
                name,
                &[&[meta(IIFNAME), equals(&link_name(link)), source_unroutable(), equals(&[0; 4])], &drop()],
            );
        }
        if let (Some(edge), Family::V4) = (&self.edge, family) {
            let edge = link_name(edge);
            for (private, public) in &self.public {
                let from_edge = [meta(IIFNAME), equals(&edge), family.destination(), equals(&public.octets())];
                rule("arrive", "", &[&from_edge, &[value(&private.octets()), store(DESTINATION)]]);
                let to_edge = [meta(OIFNAME), equals(&edge), family.source(), equals(&private.octets())];
                rule("pass", "", &[&to_edge, &[verdict(NF_ACCEPT)]]);
                rule("leave", "", &[&to_edge, &[value(&public.octets()), store(SOURCE)]]);
            }
            rule("pass", NO_PUBLIC, &[&[meta(OIFNAME), equals(&edge)], &drop()]);
        }
        let (egress, ingress) =
            (self.guarded(family, |guard| &guard.egress), self.guarded(family, |guard| &guard.ingress));
        let guarded = !egress.is_empty() || !ingress.is_empty();
        for (chain, key, peer, guards) in
            [("egress", IIFNAME, family.destination(), egress), ("ingress", OIFNAME, family.source(), ingress)]
        {
            if guarded {
                rule(chain, "", &[&established()]);
            }
            for (link, allows) in guards {
                let here = [meta(key), equals(&link_name(link))];
                for allow in allows {
                    rule(chain, "", &[&here, slice::from_ref(&peer), &let_through(allow)]);
                }
                rule(chain, DENIED, &[&here, &drop()]);
            }
        }
        rule("arrive", "", &[&[destination_kind(), equals(&RTN_LOCAL.to_ne_bytes()), verdict(NF_ACCEPT)]]);
        rule("arrive", UNASSIGNED, &[&[destination_unroutable(), equals(&[0; 4])], &drop()]);
        rules
    }

    /// Links that one side of the groups does not let everything of the family through, with what it does let through.
    fn guarded(&self, family: Family, side: fn(&Guard) -> &Vec<Allow>) -> Vec<(&str, Vec<&Allow>)> {
        let of_family = |guard| side(guard).iter().filter(|allow| family.has(allow.peer)).collect::<Vec<_>>();
        let all = self.guards.iter().map(|(link, guard)| (link.as_str(), of_family(guard)));
        all.filter(|(_, allows)| !allows.iter().any(|allow| allow.is_everything())).collect()
    }

    /// Replaces the router's tables by these, all or nothing.
    pub fn install(&self, place: &Place) -> Result<()> {
        let batch = Family::here().iter().flat_map(|family| self.table(*family)).collect();
        place.run(|| transact(batch))?.doing(|| "replace the router's nftables".into())
    }

    fn table(&self, family: Family) -> Vec<Change> {
        let table = || TableMessage { attributes: vec![TableAttribute::Name(TABLE.into())] };
        let create = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK;
        let mut batch = vec![
            (create, NfTablesMessage::NewTable(table())),
            (NLM_F_REQUEST | NLM_F_ACK, NfTablesMessage::DeleteTable(table())),
            (create, NfTablesMessage::NewTable(table())),
        ];
        for (name, hook, priority) in [
            ("arrive", InetHookNumber::PreRouting, -300i32),
            ("egress", InetHookNumber::Forward, -20),
            ("ingress", InetHookNumber::Forward, -10),
            ("pass", InetHookNumber::Forward, 0),
            ("leave", InetHookNumber::PostRouting, 100),
        ] {
            let attributes = vec![
                ChainAttribute::Table(TABLE.into()),
                ChainAttribute::Name(name.into()),
                ChainAttribute::Hook(vec![Hook::Number(hook.into()), Hook::Priority(priority.cast_unsigned())]),
                ChainAttribute::Policy(NF_ACCEPT),
                ChainAttribute::Type("filter".into()),
            ];
            batch.push((create, NfTablesMessage::NewChain(ChainMessage { attributes })));
        }
        for rule in self.rules(family) {
            let mut attributes = vec![
                RuleAttribute::Table(TABLE.into()),
                RuleAttribute::Chain(rule.chain.into()),
                RuleAttribute::Expressions(rule.expressions.into_iter().map(ListAttribute::from).collect()),
            ];
            if !rule.counted_as.is_empty() {
                attributes.push(RuleAttribute::UserData(rule.counted_as.into_bytes()));
            }
            batch.push((create | NLM_F_APPEND, NfTablesMessage::NewRule(RuleMessage { attributes })));
        }
        batch.into_iter().map(|(flags, message)| (family, flags, message)).collect()
    }
}

/// One message of a transaction, with the family and flags it is sent with.
type Change = (Family, u16, NfTablesMessage);

/// Packets dropped so far, by the names rules are counted under.
pub fn counters(place: &Place) -> Result<BTreeMap<String, u64>> {
    let dump = || Family::here().iter().map(|family| dump_rules(*family)).collect::<std::io::Result<Vec<_>>>();
    let rules = place.run(dump)?.doing(|| "read the router's nftables".into())?;
    let mut counts = BTreeMap::new();
    for rule in rules.into_iter().flatten() {
        let mut name = None;
        let mut packets = None;
        for attribute in rule.attributes {
            match attribute {
                RuleAttribute::UserData(bytes) => name = String::from_utf8(bytes).ok(),
                RuleAttribute::Expressions(list) => packets = list.iter().find_map(counted),
                _ => {}
            }
        }
        if let (Some(name), Some(packets)) = (name, packets) {
            *counts.entry(name).or_default() += packets;
        }
    }
    Ok(counts)
}

fn counted(element: &ListAttribute<ExpressionAttribute>) -> Option<u64> {
    let ListAttribute::Element(attributes) = element else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        ExpressionAttribute::Data(Expressions::Other { expression_type, attributes })
            if expression_type == "counter" =>
        {
            attributes.iter().find(|nla| netlink_packet_core::Nla::kind(*nla) == 2).and_then(|nla| {
                let mut bytes = [0; 8];
                netlink_packet_core::Nla::emit_value(nla, bytes.get_mut(..netlink_packet_core::Nla::value_len(nla))?);
                Some(u64::from_be_bytes(bytes))
            })
        }
        _ => None,
    })
}

// What follows is the vocabulary of nf_tables (include/uapi/linux/netfilter/nf_tables.h), as far as it is used above.
// Register 1 carries every intermediate value.

const REGISTER: u32 = 1;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const IIFNAME: u32 = 6;
const OIFNAME: u32 = 7;
const L4PROTO: u32 = 16;
const RTN_LOCAL: u32 = 2;
/// Offsets in the IPv4 header.
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const CHECKSUM: u32 = 10;
/// Headers of a packet.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// Bits of a connection's state.
const ESTABLISHED: u32 = 2;
const RELATED: u32 = 4;

fn expression(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.into(), attributes }
}

fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    DefaultNla::new(kind | NESTED, bytes)
}

/// A link's name as the kernel compares it: padded to 16 bytes.
fn link_name(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    for (to, from) in padded.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    padded
}

fn meta(key: u32) -> Expressions {
    expression("meta", vec![number(1, REGISTER), number(2, key)])
}

fn equals(bytes: &[u8]) -> Expressions {
    compare(0, bytes)
}

/// What belongs to a connection, or is an error about one.
fn established() -> Vec<Expressions> {
    let state = expression("ct", vec![number(1, REGISTER), number(2, 0)]);
    let known = ESTABLISHED | RELATED;
    vec![state, masked(&known.to_ne_bytes()), unequal(&[0; 4]), verdict(NF_ACCEPT)]
}

/// Accepts what the rule allows; the register holds the peer's address.
fn let_through(allow: &Allow) -> Vec<Expressions> {
    let mut parts = within(allow.peer).to_vec();
    if let Some(protocol) = allow.protocol {
        parts.extend([meta(L4PROTO), equals(&[protocol])]);
    }
    match allow.detail {
        Detail::Any => {}
        Detail::Ports(from, to) => {
            parts.extend([part(TRANSPORT, 2, 2), compare(5, &from.to_be_bytes()), compare(3, &to.to_be_bytes())]);
        }
        Detail::Icmp(kind, code) => {
            parts.extend([part(TRANSPORT, 0, 1), equals(&[kind])]);
            parts.extend(code.into_iter().flat_map(|code| [part(TRANSPORT, 1, 1), equals(&[code])]));
        }
    }
    parts.push(verdict(NF_ACCEPT));
    parts
}

/// The register's address is of this network.
fn within(net: IpNet) -> [Expressions; 2] {
    [masked(&octets(net.netmask())), equals(&octets(net.network()))]
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The register's bits under a mask.
fn masked(mask: &[u8]) -> Expressions {
    let length = u32::try_from(mask.len()).unwrap_or(0);
    let data = |kind, bytes: &[u8]| nested(kind, &[DefaultNla::new(1, bytes.to_vec())]);
    let registers = [number(1, REGISTER), number(2, REGISTER), number(3, length)];
    expression("bitwise", [registers.as_slice(), &[data(4, mask), data(5, &vec![0; mask.len()])]].concat())
}

fn unequal(bytes: &[u8]) -> Expressions {
    compare(1, bytes)
}

/// How the register must stand to the bytes: 0 equal, 1 not, 3 at most, 5 at least.
fn compare(how: u32, bytes: &[u8]) -> Expressions {
    let data = nested(3, &[DefaultNla::new(1, bytes.to_vec())]);
    expression("cmp", vec![number(1, REGISTER), number(2, how), data])
}

/// Some bytes of the packet's network or transport header.
fn part(header: u32, offset: u32, length: u32) -> Expressions {
    expression("payload", vec![number(1, REGISTER), number(2, header), number(3, offset), number(4, length)])
}

/// Writes an address into the IPv4 header and mends its checksum and, through the pseudo header, that of TCP or UDP.
fn store(offset: u32) -> Expressions {
    let place = [number(5, REGISTER), number(2, 1), number(3, offset), number(4, 4)];
    let checksums = [number(6, 1), number(7, CHECKSUM), number(8, 1)];
    expression("payload", [place.as_slice(), checksums.as_slice()].concat())
}

fn value(bytes: &[u8]) -> Expressions {
    expression("immediate", vec![number(1, REGISTER), nested(2, &[DefaultNla::new(1, bytes.to_vec())])])
}

fn verdict(code: u32) -> Expressions {
    expression("immediate", vec![number(1, 0), nested(2, &[nested(2, &[number(1, code)])])])
}

fn drop() -> [Expressions; 2] {
    let zero = |kind| DefaultNla::new(kind, vec![0; 8]);
    [expression("counter", vec![zero(1), zero(2)]), verdict(NF_DROP)]
}

/// Index of the link by which the source would be answered, looked up on the link the packet came from; 0 if there is
/// no such route. `fib saddr . iif oif`.
fn source_unroutable() -> Expressions {
    expression("fib", vec![number(1, REGISTER), number(2, 1), number(3, 1 | 8)])
}

/// Index of the link that leads to the destination; 0 if none does, or the router is it. `fib daddr oif`.
fn destination_unroutable() -> Expressions {
    expression("fib", vec![number(1, REGISTER), number(2, 1), number(3, 2)])
}

/// Kind of the destination. `fib daddr type`; a route to nowhere does not show here.
fn destination_kind() -> Expressions {
    expression("fib", vec![number(1, REGISTER), number(2, 3), number(3, 2)])
}

fn message(family: NetfilterProtoFamily, inner: impl Into<NetfilterMessageInner>, flags: u16) -> Vec<u8> {
    let resource = if family == NetfilterProtoFamily::Unspec { SUBSYSTEM } else { 0 };
    let mut message = NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, resource), inner));
    message.header.flags = flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn open() -> std::io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // The kernel has answered by the time `send` returns, so an empty socket means that nothing is to come.
    socket.set_non_blocking(true)?;
    Ok(socket)
}

fn transact(batch: Vec<Change>) -> std::io::Result<()> {
    let socket = open()?;
    let last = batch.len();
    let mut bytes = message(NetfilterProtoFamily::Unspec, ControlMessage::BatchBegin, NLM_F_REQUEST);
    for (number, (family, flags, one)) in (1..).zip(batch) {
        // Refusals are always told, and one answer is enough: hundreds would not fit.
        let flags = if number == last { flags | NLM_F_ACK } else { flags & !NLM_F_ACK };
        bytes.extend(message(family.of_tables(), one, flags));
    }
    bytes.extend(message(NetfilterProtoFamily::Unspec, ControlMessage::BatchEnd, NLM_F_REQUEST));
    // Without root a large batch may still be too large; then sending says so.
    let _ = setsockopt(&socket.as_fd(), sockopt::SndBufForce, &bytes.len().saturating_mul(2));
    socket.send(&bytes, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for reply in split(&datagram)? {
            if let NetlinkPayload::Error(error) = reply.payload {
                return if error.code.is_some() { Err(error.to_io()) } else { Ok(()) };
            }
        }
    }
}

fn dump_rules(family: Family) -> std::io::Result<Vec<RuleMessage>> {
    let socket = open()?;
    let attributes = vec![RuleAttribute::Table(TABLE.into())];
    let ask = NfTablesMessage::GetRule(RuleMessage { attributes });
    socket.send(&message(family.of_tables(), ask, NLM_F_REQUEST | NLM_F_DUMP), 0)?;
    let mut rules = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for reply in split(&datagram)? {
            match reply.payload {
                NetlinkPayload::Done(_) => return Ok(rules),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(NetfilterMessage {
                    inner: NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)),
                    ..
                }) => rules.push(rule),
                _ => {}
            }
        }
    }
}

/// The messages of one datagram.
fn split(datagram: &[u8]) -> std::io::Result<Vec<NetlinkMessage<NetfilterMessage>>> {
    let garbled = |error: netlink_packet_core::DecodeError| std::io::Error::other(error.to_string());
    let mut messages = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let length = usize::try_from(NetlinkBuffer::new_checked(rest).map_err(garbled)?.length()).unwrap_or(usize::MAX);
        messages.push(NetlinkMessage::deserialize(rest).map_err(garbled)?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}
