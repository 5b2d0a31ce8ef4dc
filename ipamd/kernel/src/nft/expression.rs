//! One rule, written as the conditions it has and what it does, in order.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Meta, MetaKey, Operator, Payload, Register, Verdict,
    VerdictAttribute,
};

use super::table::Family;

/// Where everything is loaded; no rule here needs two values at once.
const REGISTER: Register = Register::Reg1;

pub(super) const IFNAMSIZ: usize = 16;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// Where an address stands in the header, and its length.
const SOURCE: (u32, u32) = (12, 4);
const DESTINATION: (u32, u32) = (16, 4);
const SOURCE_V6: (u32, u32) = (8, 16);
const DESTINATION_V6: (u32, u32) = (24, 16);
const TCP: u8 = 6;
const TCP_FLAGS_OFFSET: u32 = 13;
const TCP_SYN: u8 = 0x02;
const LOOKUP_INVERTED: u32 = 1;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// How a translation chooses the source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ports {
    /// The original one where it is free.
    Keep,
    Random,
    FullyRandom,
}

/// Conditions and actions, in the order they are written: the first condition that fails ends the rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub(super) expressions: Vec<Expressions>,
    pub(super) comment: Option<String>,
}

// The expressions are a foreign type without Hash; equal rules print the same.
impl Hash for Rule {
    fn hash<H: Hasher>(&self, state: &mut H) {
        format!("{self:?}").hash(state);
    }
}

/// Conditions.
impl Rule {
    pub fn new() -> Self {
        Self::default()
    }

    /// The packet came in by this link.
    pub fn iifname(self, name: &str) -> Self {
        self.meta(MetaKey::Iifname).compare(Operator::Equal, interface(name))
    }

    /// The packet came in by a link whose name starts with this.
    pub fn iifname_prefix(self, prefix: &str) -> Self {
        self.meta(MetaKey::Iifname).compare(Operator::Equal, prefix.as_bytes().to_vec())
    }

    pub fn iifname_prefix_not(self, prefix: &str) -> Self {
        self.meta(MetaKey::Iifname).compare(Operator::NotEqual, prefix.as_bytes().to_vec())
    }

    /// The packet leaves by this link.
    pub fn oifname(self, name: &str) -> Self {
        self.meta(MetaKey::Oifname).compare(Operator::Equal, interface(name))
    }

    pub fn oifname_prefix_not(self, prefix: &str) -> Self {
        self.meta(MetaKey::Oifname).compare(Operator::NotEqual, prefix.as_bytes().to_vec())
    }

    pub fn source(self, address: Ipv4Addr) -> Self {
        self.payload(SOURCE).compare(Operator::Equal, address.octets().to_vec())
    }

    /// In a table of the address's family.
    pub fn destination(self, address: IpAddr) -> Self {
        let place = if address.is_ipv4() { DESTINATION } else { DESTINATION_V6 };
        self.payload(place).compare(Operator::Equal, octets(address))
    }

    /// In a table of the network's family.
    pub fn source_within(self, net: impl Into<IpNet>) -> Self {
        let net = net.into();
        self.payload(if net.addr().is_ipv4() { SOURCE } else { SOURCE_V6 }).within(net)
    }

    /// In a table of the network's family.
    pub fn destination_within(self, net: impl Into<IpNet>) -> Self {
        let net = net.into();
        self.payload(if net.addr().is_ipv4() { DESTINATION } else { DESTINATION_V6 }).within(net)
    }

    pub fn source_in(self, set: &str) -> Self {
        self.payload(SOURCE).look_up(set, 0)
    }

    pub fn source_not_in(self, set: &str) -> Self {
        self.payload(SOURCE).look_up(set, LOOKUP_INVERTED)
    }

    pub fn destination_in(self, set: &str) -> Self {
        self.payload(DESTINATION).look_up(set, 0)
    }

    pub fn destination_not_in(self, set: &str) -> Self {
        self.payload(DESTINATION).look_up(set, LOOKUP_INVERTED)
    }

    /// The destination is an address of this host.
    pub fn destination_local(self) -> Self {
        self.destination_type().compare(Operator::Equal, fib::LOCAL.to_ne_bytes().to_vec())
    }

    pub fn destination_not_local(self) -> Self {
        self.destination_type().compare(Operator::NotEqual, fib::LOCAL.to_ne_bytes().to_vec())
    }

    /// The source is not routed to the link the packet came in by: it is not assigned there.
    pub fn fib_source_not_by_input(self) -> Self {
        self.fib(fib::SOURCE | fib::INPUT | fib::PRESENT, fib::RESULT_LINK).compare(Operator::Equal, vec![0])
    }

    /// All of these bits of the packet's mark are set.
    pub fn mark_has(self, bits: u32) -> Self {
        self.meta(MetaKey::Mark).bits(bits, 0).compare(Operator::Equal, bits.to_ne_bytes().to_vec())
    }

    /// Any of these bits of the packet's mark is set.
    pub fn mark_has_any(self, bits: u32) -> Self {
        self.meta(MetaKey::Mark).bits(bits, 0).compare(Operator::NotEqual, 0u32.to_ne_bytes().to_vec())
    }

    /// The packet goes the way of its connection's first one.
    pub fn ct_original(self) -> Self {
        self.ct(ct::DIRECTION).compare(Operator::Equal, vec![ct::ORIGINAL])
    }

    /// The packet goes against the way of its connection's first one.
    pub fn ct_reply(self) -> Self {
        self.ct(ct::DIRECTION).compare(Operator::NotEqual, vec![ct::ORIGINAL])
    }

    /// The packet leaves by a link whose name starts with this.
    pub fn oifname_prefix(self, prefix: &str) -> Self {
        self.meta(MetaKey::Oifname).compare(Operator::Equal, prefix.as_bytes().to_vec())
    }

    /// The packet opens a TCP connection or answers the opening.
    pub fn tcp_syn(self) -> Self {
        let mut rule = self.meta(MetaKey::L4Proto).compare(Operator::Equal, vec![TCP]);
        rule.expressions.push(Expressions::Payload(vec![
            Payload::DestinationRegister(REGISTER),
            Payload::Base(TRANSPORT_HEADER),
            Payload::Offset(TCP_FLAGS_OFFSET),
            Payload::Len(1),
        ]));
        rule.masked(vec![TCP_SYN], vec![0]).compare(Operator::Equal, vec![TCP_SYN])
    }

    /// The packet is the very first of its connection.
    pub fn ct_unconfirmed(self) -> Self {
        self.ct(ct::STATUS).bits(ct::CONFIRMED, 0).compare(Operator::Equal, 0u32.to_ne_bytes().to_vec())
    }
}

/// Actions.
impl Rule {
    /// Counts packets and bytes that come this far.
    pub fn counter(self) -> Self {
        self.other("counter", Vec::new())
    }

    /// Sets these bits of the packet's mark, leaving the others.
    pub fn mark_set(self, bits: u32) -> Self {
        self.mark_replace(bits, bits)
    }

    /// Writes `value` under `mask` in the packet's mark, leaving the other bits.
    pub fn mark_replace(self, mask: u32, value: u32) -> Self {
        let mut rule = self.meta(MetaKey::Mark).bits(!mask, value & mask);
        rule.expressions.push(Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(REGISTER)]));
        rule
    }

    /// Writes `value` under `mask` in the connection's mark, leaving the other bits.
    pub fn ct_mark_replace(self, mask: u32, value: u32) -> Self {
        self.ct(ct::MARK)
            .bits(!mask, value & mask)
            .other("ct", vec![be32(ct::ATTRIBUTE_KEY, ct::MARK), be32(ct::ATTRIBUTE_SOURCE, REGISTER.into())])
    }

    /// Lowers the segment size that an opening of TCP announces to this; a smaller one stays.
    pub fn mss_at_most(self, bytes: u16) -> Self {
        let place = vec![
            DefaultNla::new(exthdr::ATTRIBUTE_KIND, vec![exthdr::MAXIMUM_SEGMENT_SIZE]),
            be32(exthdr::ATTRIBUTE_OFFSET, 2),
            be32(exthdr::ATTRIBUTE_LENGTH, 2),
            be32(exthdr::ATTRIBUTE_OPERATION, exthdr::TCP_OPTION),
            be32(exthdr::ATTRIBUTE_SOURCE, REGISTER.into()),
        ];
        self.load(bytes.to_be_bytes().to_vec()).other("exthdr", place)
    }

    /// Drops the packet and tells its sender that this is forbidden, in a table of this family.
    pub fn reject(self, family: Family) -> Self {
        let code = match family {
            Family::Ip => reject::ADMINISTRATIVELY_PROHIBITED,
            Family::Ip6 => reject::ADMINISTRATIVELY_PROHIBITED_V6,
        };
        let code = DefaultNla::new(reject::ATTRIBUTE_CODE, vec![code]);
        self.other("reject", vec![be32(reject::ATTRIBUTE_KIND, reject::ICMP_UNREACHABLE), code])
    }

    pub fn accept(self) -> Self {
        self.verdict(Verdict::Other(NF_ACCEPT), None)
    }

    pub fn drop(self) -> Self {
        self.verdict(Verdict::Other(NF_DROP), None)
    }

    /// Goes on in another chain, without coming back.
    pub fn goto(self, chain: &str) -> Self {
        self.verdict(Verdict::Goto, Some(chain))
    }

    /// Goes on in the chain that a map has for the source address; nothing happens to a source that it lacks.
    pub fn goto_by_source(self, map: &str) -> Self {
        self.payload(SOURCE).goto_by_map(map)
    }

    /// Goes on in the chain that a map has for the link the packet came in by.
    pub fn goto_by_input(self, map: &str) -> Self {
        self.meta(MetaKey::Iifname).goto_by_map(map)
    }

    /// Goes on in the chain that a map has for these bits of the connection's mark.
    pub fn goto_by_ct_mark(self, bits: u32, map: &str) -> Self {
        self.ct(ct::MARK).bits(bits, 0).goto_by_map(map)
    }

    fn goto_by_map(mut self, map: &str) -> Self {
        self.expressions.push(Expressions::Lookup(vec![
            Lookup::Set(map.to_owned()),
            Lookup::SourceRegister(REGISTER),
            Lookup::DestinationRegister(Register::Verdict),
        ]));
        self
    }

    /// Gives the connection this source address.
    pub fn snat(self, address: Ipv4Addr, ports: Ports) -> Self {
        self.load(address.octets().to_vec()).nat(nat::SOURCE, ports)
    }

    /// Gives the connection this destination address.
    pub fn dnat(self, address: Ipv4Addr) -> Self {
        self.load(address.octets().to_vec()).nat(nat::DESTINATION, Ports::Keep)
    }

    /// Gives the connection the source that a map has for its source; nothing happens to one that it lacks.
    pub fn snat_by_source(self, map: &str) -> Self {
        self.payload(SOURCE).translate(map).nat(nat::SOURCE, Ports::Keep)
    }

    /// Gives the connection the destination that a map has for its destination.
    pub fn dnat_by_destination(self, map: &str) -> Self {
        self.payload(DESTINATION).translate(map).nat(nat::DESTINATION, Ports::Keep)
    }

    /// A note that `nft list ruleset` shows beside the rule.
    pub fn comment(mut self, text: impl Into<String>) -> Self {
        self.comment = Some(text.into());
        self
    }
}

impl Rule {
    fn meta(mut self, key: MetaKey) -> Self {
        self.expressions.push(Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(REGISTER)]));
        self
    }

    fn payload(mut self, (offset, length): (u32, u32)) -> Self {
        self.expressions.push(Expressions::Payload(vec![
            Payload::DestinationRegister(REGISTER),
            Payload::Base(NETWORK_HEADER),
            Payload::Offset(offset),
            Payload::Len(length),
        ]));
        self
    }

    fn compare(mut self, operator: Operator, value: Vec<u8>) -> Self {
        self.expressions.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(REGISTER),
            Cmp::Op(operator),
            Cmp::Data(DataAttribute::Value(value)),
        ]));
        self
    }

    /// The loaded address is in this network.
    fn within(self, net: IpNet) -> Self {
        let mask = octets(net.netmask());
        let nothing = vec![0; mask.len()];
        self.masked(mask, nothing).compare(Operator::Equal, octets(net.network()))
    }

    fn look_up(mut self, set: &str, flags: u32) -> Self {
        self.expressions.push(Expressions::Lookup(vec![
            Lookup::Set(set.to_owned()),
            Lookup::SourceRegister(REGISTER),
            Lookup::Flags(flags),
        ]));
        self
    }

    /// Replaces what is loaded by what a map has for it.
    fn translate(mut self, map: &str) -> Self {
        self.expressions.push(Expressions::Lookup(vec![
            Lookup::Set(map.to_owned()),
            Lookup::SourceRegister(REGISTER),
            Lookup::DestinationRegister(REGISTER),
        ]));
        self
    }

    /// (loaded & keep) ^ flip
    fn bits(self, keep: u32, flip: u32) -> Self {
        self.masked(keep.to_ne_bytes().to_vec(), flip.to_ne_bytes().to_vec())
    }

    fn masked(mut self, keep: Vec<u8>, flip: Vec<u8>) -> Self {
        self.expressions.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(REGISTER),
            Bitwise::DestinationRegister(REGISTER),
            Bitwise::Length(u32::try_from(keep.len()).expect("invariant: a mask has a few bytes")),
            Bitwise::Mask(DataAttribute::Value(keep)),
            Bitwise::Xor(DataAttribute::Value(flip)),
        ]));
        self
    }

    fn load(mut self, value: Vec<u8>) -> Self {
        self.expressions.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(REGISTER),
            Immediate::Data(DataAttribute::Value(value)),
        ]));
        self
    }

    fn verdict(mut self, verdict: Verdict, chain: Option<&str>) -> Self {
        let mut attributes = vec![VerdictAttribute::Code(verdict)];
        attributes.extend(chain.map(|chain| VerdictAttribute::Chain(chain.to_owned())));
        self.expressions.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(DataAttribute::Verdict(attributes)),
        ]));
        self
    }

    fn ct(self, key: u32) -> Self {
        self.other("ct", vec![be32(ct::ATTRIBUTE_KEY, key), be32(ct::ATTRIBUTE_DESTINATION, REGISTER.into())])
    }

    fn destination_type(self) -> Self {
        self.fib(fib::DESTINATION, fib::RESULT_TYPE)
    }

    fn fib(self, flags: u32, result: u32) -> Self {
        self.other(
            "fib",
            vec![
                be32(fib::ATTRIBUTE_DESTINATION, REGISTER.into()),
                be32(fib::ATTRIBUTE_RESULT, result),
                be32(fib::ATTRIBUTE_FLAGS, flags),
            ],
        )
    }

    fn nat(self, kind: u32, ports: Ports) -> Self {
        let mut attributes = vec![
            be32(nat::ATTRIBUTE_KIND, kind),
            be32(nat::ATTRIBUTE_FAMILY, nat::FAMILY_IPV4),
            be32(nat::ATTRIBUTE_ADDRESS, REGISTER.into()),
        ];
        match ports {
            Ports::Keep => {}
            Ports::Random => attributes.push(be32(nat::ATTRIBUTE_FLAGS, nat::RANDOM)),
            Ports::FullyRandom => attributes.push(be32(nat::ATTRIBUTE_FLAGS, nat::FULLY_RANDOM)),
        }
        self.other("nat", attributes)
    }

    /// Expressions that netlink-packet-netfilter has no type for.
    fn other(mut self, name: &str, attributes: Vec<DefaultNla>) -> Self {
        self.expressions.push(Expressions::Other { expression_type: name.to_owned(), attributes });
        self
    }
}

fn be32(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) fn interface(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

// Numbers of include/uapi/linux/netfilter/nf_tables.h and its neighbours.

mod ct {
    pub const ATTRIBUTE_DESTINATION: u16 = 1;
    pub const ATTRIBUTE_KEY: u16 = 2;
    pub const ATTRIBUTE_SOURCE: u16 = 4;
    pub const DIRECTION: u32 = 1;
    pub const STATUS: u32 = 2;
    pub const MARK: u32 = 3;
    /// IPS_CONFIRMED: the first packet has passed the last hook.
    pub const CONFIRMED: u32 = 1 << 3;
    /// IP_CT_DIR_ORIGINAL.
    pub const ORIGINAL: u8 = 0;
}

mod fib {
    pub const ATTRIBUTE_DESTINATION: u16 = 1;
    pub const ATTRIBUTE_RESULT: u16 = 2;
    pub const ATTRIBUTE_FLAGS: u16 = 3;
    pub const SOURCE: u32 = 1 << 0;
    pub const DESTINATION: u32 = 1 << 1;
    pub const INPUT: u32 = 1 << 3;
    pub const PRESENT: u32 = 1 << 5;
    pub const RESULT_LINK: u32 = 1;
    pub const RESULT_TYPE: u32 = 3;
    /// RTN_LOCAL.
    pub const LOCAL: u32 = 2;
}

mod exthdr {
    pub const ATTRIBUTE_KIND: u16 = 2;
    pub const ATTRIBUTE_OFFSET: u16 = 3;
    pub const ATTRIBUTE_LENGTH: u16 = 4;
    pub const ATTRIBUTE_OPERATION: u16 = 6;
    pub const ATTRIBUTE_SOURCE: u16 = 7;
    pub const TCP_OPTION: u32 = 1;
    pub const MAXIMUM_SEGMENT_SIZE: u8 = 2;
}

mod reject {
    pub const ATTRIBUTE_KIND: u16 = 1;
    pub const ATTRIBUTE_CODE: u16 = 2;
    pub const ICMP_UNREACHABLE: u32 = 0;
    pub const ADMINISTRATIVELY_PROHIBITED: u8 = 13;
    pub const ADMINISTRATIVELY_PROHIBITED_V6: u8 = 1;
}

mod nat {
    pub const ATTRIBUTE_KIND: u16 = 1;
    pub const ATTRIBUTE_FAMILY: u16 = 2;
    pub const ATTRIBUTE_ADDRESS: u16 = 3;
    pub const ATTRIBUTE_FLAGS: u16 = 7;
    pub const SOURCE: u32 = 0;
    pub const DESTINATION: u32 = 1;
    pub const FAMILY_IPV4: u32 = 2;
    pub const RANDOM: u32 = 1 << 2;
    pub const FULLY_RANDOM: u32 = 1 << 4;
}
