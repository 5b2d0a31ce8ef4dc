//! A table as the messages of one transaction: away with the old one, in with the new one.

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook as HookAttribute, InetHookNumber, ListAttribute, NfTablesMessage,
    RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
    SetFlags, SetMessage, TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};

use super::expression::{IFNAMSIZ, interface};
use super::table::{Chain, Entries, Family, Hook, Range, Table, Target};
use crate::nl::Request;

pub(super) type NftRequest = Request<NetfilterMessage>;

/// An attribute may not exceed 64 KiB, and each element of a set is one within one.
const ELEMENTS_PER_MESSAGE: usize = 500;

/// Type numbers that nft knows and the kernel only keeps, so that listings show addresses as addresses.
const TYPE_IPV4_ADDRESS: u32 = 7;
const TYPE_MARK: u32 = 19;
const TYPE_LINK_NAME: u32 = 41;
const TYPE_VERDICT: u32 = 0xffff_ff00;
const ADDRESS_BYTES: u32 = 4;
const MARK_BYTES: u32 = 4;

/// Type number and length of what a set is looked up by.
const ADDRESS: (u32, u32) = (TYPE_IPV4_ADDRESS, ADDRESS_BYTES);
const ACCEPT: u32 = 1;

pub(super) fn family(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::Ip => NetfilterProtoFamily::IPv4,
        Family::Ip6 => NetfilterProtoFamily::IPv6,
    }
}

pub(super) fn request(of: Family, operation: impl Into<String>, message: NfTablesMessage, flags: u16) -> NftRequest {
    let header = NetfilterHeader::new(family(of), 0, 0);
    NftRequest::new(operation, NetfilterMessage::new(header, message), flags)
}

/// Wraps messages into a transaction.
pub(super) fn transaction(operation: &str, messages: Vec<NftRequest>) -> Vec<NftRequest> {
    const SUBSYSTEM_NFTABLES: u16 = 10;
    let bracket = |message| {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM_NFTABLES);
        NftRequest::new(operation, NetfilterMessage::new(header, message), 0)
    };
    let mut requests = vec![bracket(ControlMessage::BatchBegin)];
    requests.extend(messages);
    requests.push(bracket(ControlMessage::BatchEnd));
    requests
}

/// Deletes a table whether or not it is there: adding comes first, and does nothing to one that is.
pub(super) fn remove(of: Family, name: &str) -> Vec<NftRequest> {
    let named = || TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
    vec![
        request(of, format!("add nftables table {name}"), NfTablesMessage::NewTable(named()), NLM_F_CREATE),
        request(of, format!("delete nftables table {name}"), NfTablesMessage::DeleteTable(named()), 0),
    ]
}

pub(super) fn add(table: &Table) -> Vec<NftRequest> {
    let mut requests = Vec::new();
    let attributes = vec![TableAttribute::Name(table.name.clone()), TableAttribute::UserData(comment(&table.digest()))];
    requests.push(request(
        table.family,
        format!("add nftables table {}", table.name),
        NfTablesMessage::NewTable(TableMessage { attributes }),
        NLM_F_CREATE,
    ));
    // Maps lead to chains and rules look sets up, so: chains, then sets and maps, then rules.
    for chain in &table.chains {
        requests.push(new_chain(table, chain));
    }
    let mut id = 0;
    for set in &table.sets {
        id += 1;
        requests.push(new_set(table, &set.name, id, ADDRESS, Vec::new(), SetFlags::Interval));
        requests.extend(new_elements(table, &set.name, &set.ranges, |()| None));
    }
    for map in &table.maps {
        id += 1;
        let mut data = if map.to_chains {
            vec![SetAttribute::DataType(TYPE_VERDICT)]
        } else {
            vec![SetAttribute::DataType(TYPE_IPV4_ADDRESS), SetAttribute::DataLen(ADDRESS_BYTES)]
        };
        let (key, flags) = match &map.entries {
            Entries::Ranges(_) => (ADDRESS, SetFlags::Interval | SetFlags::Map),
            Entries::Marks(_) => ((TYPE_MARK, MARK_BYTES), SetFlags::Map),
            Entries::Links(_) => ((TYPE_LINK_NAME, u32::try_from(IFNAMSIZ).unwrap_or(0)), SetFlags::Map),
        };
        if key != ADDRESS {
            data.push(SetAttribute::UserData(in_host_order()));
        }
        requests.push(new_set(table, &map.name, id, key, data, flags));
        requests.extend(match &map.entries {
            Entries::Ranges(ranges) => new_elements(table, &map.name, ranges, |target| Some(target_data(target))),
            Entries::Marks(marks) => {
                let elements = marks.iter().map(|(mark, target)| (mark.to_ne_bytes().to_vec(), target));
                new_exact_elements(table, &map.name, elements)
            }
            Entries::Links(links) => {
                let elements = links.iter().map(|(name, target)| (interface(name), target));
                new_exact_elements(table, &map.name, elements)
            }
        });
    }
    for chain in &table.chains {
        requests.extend(chain.rules.iter().enumerate().map(|(position, rule)| {
            let mut attributes = vec![
                RuleAttribute::Table(table.name.clone()),
                RuleAttribute::Chain(chain.name.clone()),
                RuleAttribute::Expressions(rule.expressions.iter().cloned().map(ListAttribute::from).collect()),
            ];
            attributes.extend(rule.comment.as_deref().map(|text| RuleAttribute::UserData(comment(text))));
            request(
                table.family,
                format!("add rule {} of nftables chain {} {}", position + 1, table.name, chain.name),
                NfTablesMessage::NewRule(RuleMessage { attributes }),
                NLM_F_CREATE | NLM_F_APPEND,
            )
        }));
    }
    requests
}

fn new_chain(table: &Table, chain: &Chain) -> NftRequest {
    let mut attributes = vec![ChainAttribute::Table(table.name.clone()), ChainAttribute::Name(chain.name.clone())];
    if let Some(base) = chain.base {
        attributes.push(ChainAttribute::Type(base.kind.to_owned()));
        attributes.push(ChainAttribute::Hook(vec![
            HookAttribute::Number(hook_number(base.hook).into()),
            HookAttribute::Priority(base.priority.cast_unsigned()),
        ]));
        attributes.push(ChainAttribute::Policy(ACCEPT));
    }
    request(
        table.family,
        format!("add nftables chain {} {}", table.name, chain.name),
        NfTablesMessage::NewChain(ChainMessage { attributes }),
        NLM_F_CREATE,
    )
}

fn hook_number(hook: Hook) -> InetHookNumber {
    match hook {
        Hook::Prerouting => InetHookNumber::PreRouting,
        Hook::Input => InetHookNumber::LocalIn,
        Hook::Forward => InetHookNumber::Forward,
        Hook::Output => InetHookNumber::LocalOut,
        Hook::Postrouting => InetHookNumber::PostRouting,
    }
}

fn new_set(
    table: &Table,
    name: &str,
    id: u32,
    (key_type, key_bytes): (u32, u32),
    data: Vec<SetAttribute>,
    flags: SetFlags,
) -> NftRequest {
    let mut attributes = vec![
        SetAttribute::Table(table.name.clone()),
        SetAttribute::Name(name.to_owned()),
        SetAttribute::Flags(flags),
        SetAttribute::KeyType(key_type),
        SetAttribute::KeyLen(key_bytes),
        SetAttribute::Id(id),
    ];
    attributes.extend(data);
    request(
        table.family,
        format!("add nftables set {} {name}", table.name),
        NfTablesMessage::NewSet(SetMessage { attributes }),
        NLM_F_CREATE,
    )
}

fn new_elements<T>(
    table: &Table,
    set: &str,
    ranges: &[Range<T>],
    data: impl Fn(&T) -> Option<DataAttribute>,
) -> Vec<NftRequest> {
    let key = |address: u32| SetElementAttribute::Key(DataAttribute::Value(address.to_be_bytes().to_vec()));
    let mut elements = Vec::new();
    for range in ranges {
        let mut start = vec![key(range.first)];
        start.extend(data(&range.value).map(SetElementAttribute::Data));
        elements.push(ListAttribute::Element(start));
        // Ends are exclusive; behind the last address there is none to name, and an open end means just that.
        if let Some(end) = range.last.checked_add(1) {
            elements
                .push(ListAttribute::Element(vec![key(end), SetElementAttribute::Flags(SetElementFlags::IntervalEnd)]));
        }
    }
    element_messages(table, set, elements)
}

fn new_exact_elements<'a>(
    table: &Table,
    set: &str,
    entries: impl Iterator<Item = (Vec<u8>, &'a Target)>,
) -> Vec<NftRequest> {
    let element = |(key, target): (Vec<u8>, &Target)| {
        let key = SetElementAttribute::Key(DataAttribute::Value(key));
        ListAttribute::Element(vec![key, SetElementAttribute::Data(target_data(target))])
    };
    element_messages(table, set, entries.map(element).collect())
}

fn element_messages(table: &Table, set: &str, elements: Vec<ListAttribute<SetElementAttribute>>) -> Vec<NftRequest> {
    elements
        .chunks(ELEMENTS_PER_MESSAGE)
        .map(|chunk| {
            let attributes = vec![
                SetElementList::Table(table.name.clone()),
                SetElementList::Set(set.to_owned()),
                SetElementList::Elements(chunk.to_vec()),
            ];
            request(
                table.family,
                format!("fill nftables set {} {set}", table.name),
                NfTablesMessage::NewSetElement(SetElementMessage { attributes }),
                NLM_F_CREATE,
            )
        })
        .collect()
}

fn target_data(target: &Target) -> DataAttribute {
    match target {
        Target::Goto(chain) => {
            DataAttribute::Verdict(vec![VerdictAttribute::Code(Verdict::Goto), VerdictAttribute::Chain(chain.clone())])
        }
        Target::Address(address) => DataAttribute::Value(address.octets().to_vec()),
    }
}

/// The user data by which nft knows that keys are in the machine's own byte order: type 0, length, 1.
fn in_host_order() -> Vec<u8> {
    let mut bytes = vec![0, 4];
    bytes.extend(1u32.to_ne_bytes());
    bytes
}

/// The user data by which nft knows a comment: type 0, length, text with its zero.
pub(super) fn comment(text: &str) -> Vec<u8> {
    const LONGEST: usize = 127;
    let text: String = text.chars().filter(|c| c.is_ascii() && !c.is_ascii_control()).take(LONGEST).collect();
    let mut bytes = vec![0, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend(text.into_bytes());
    bytes.push(0);
    bytes
}
