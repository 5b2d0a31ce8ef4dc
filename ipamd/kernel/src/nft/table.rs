//! Tables, chains, sets and maps as data.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha1::{Digest, Sha1};

use super::expression::Rule;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    Ip,
    Ip6,
}

/// Where in a packet's way a chain is consulted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    pub(super) family: Family,
    pub(super) name: String,
    pub(super) sets: Vec<Set>,
    pub(super) maps: Vec<Map>,
    pub(super) chains: Vec<Chain>,
}

impl Table {
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self { family, name: name.into(), sets: Vec::new(), maps: Vec::new(), chains: Vec::new() }
    }

    pub fn set(mut self, set: Set) -> Self {
        self.sets.push(set);
        self
    }

    pub fn map(mut self, map: Map) -> Self {
        self.maps.push(map);
        self
    }

    pub fn chain(mut self, chain: Chain) -> Self {
        self.chains.push(chain);
        self
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A short text that is the same for the same content. It stands in the kernel as the table's comment, where an
    /// operator can see it and a restarted daemon finds it.
    pub fn digest(&self) -> String {
        let hash = Sha1::digest(format!("{self:?}"));
        let mut text = String::from("content ");
        for byte in hash.iter().take(8) {
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }
}

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Chain {
    pub(super) name: String,
    pub(super) base: Option<Base>,
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Base {
    pub kind: &'static str,
    pub hook: Hook,
    pub priority: i32,
}

impl Chain {
    /// Consulted for every packet at a hook; lower priorities first. Accepts what no rule decides.
    pub fn filter(name: impl Into<String>, hook: Hook, priority: i32) -> Self {
        Self::based(name, Base { kind: "filter", hook, priority })
    }

    /// Consulted for the first packet of a connection only; its translation then holds for the rest.
    pub fn nat(name: impl Into<String>, hook: Hook, priority: i32) -> Self {
        Self::based(name, Base { kind: "nat", hook, priority })
    }

    /// Consulted for every packet the host itself sends; one whose mark changes is routed anew.
    pub fn route(name: impl Into<String>, priority: i32) -> Self {
        Self::based(name, Base { kind: "route", hook: Hook::Output, priority })
    }

    /// Reached only from other chains.
    pub fn regular(name: impl Into<String>) -> Self {
        Self { name: name.into(), base: None, rules: Vec::new() }
    }

    fn based(name: impl Into<String>, base: Base) -> Self {
        Self { name: name.into(), base: Some(base), rules: Vec::new() }
    }

    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    pub fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }
}

/// A named set of IPv4 networks; a single address is a /32.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    pub(super) name: String,
    pub(super) ranges: Vec<Range<()>>,
}

impl Set {
    pub fn addresses(name: impl Into<String>) -> Self {
        Self { name: name.into(), ranges: Vec::new() }
    }

    /// Networks may overlap or touch; the set holds what they cover together.
    pub fn networks(mut self, networks: impl IntoIterator<Item = Ipv4Net>) -> Self {
        self.ranges = disjoint(networks.into_iter().map(|net| (net, ())));
        self
    }
}

/// What a map leads to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A regular chain of the same table, without return.
    Goto(String),
    /// An address, for translation.
    Address(Ipv4Addr),
}

/// A named map to one kind of `Target`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Map {
    pub(super) name: String,
    pub(super) to_chains: bool,
    pub(super) entries: Entries,
}

/// What a map is looked up by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Entries {
    /// IPv4 networks.
    Ranges(Vec<Range<Target>>),
    /// Bits of a mark.
    Marks(BTreeMap<u32, Target>),
    /// Names of links.
    Links(BTreeMap<String, Target>),
}

impl Map {
    /// Leads to chains, for `Rule::goto_by_source`. Where networks overlap the more specific one counts.
    pub fn to_chains(name: impl Into<String>, entries: impl IntoIterator<Item = (Ipv4Net, impl Into<String>)>) -> Self {
        let entries = entries.into_iter().map(|(net, chain)| (net, Target::Goto(chain.into())));
        Self { name: name.into(), to_chains: true, entries: Entries::Ranges(disjoint(entries)) }
    }

    /// Leads from marks to chains, for `Rule::goto_by_ct_mark`.
    pub fn of_marks(name: impl Into<String>, entries: impl IntoIterator<Item = (u32, String)>) -> Self {
        let entries = entries.into_iter().map(|(mark, chain)| (mark, Target::Goto(chain))).collect();
        Self { name: name.into(), to_chains: true, entries: Entries::Marks(entries) }
    }

    /// Leads from names of links to chains, for `Rule::goto_by_input`.
    pub fn of_links(name: impl Into<String>, entries: impl IntoIterator<Item = (String, String)>) -> Self {
        let entries = entries.into_iter().map(|(link, chain)| (link, Target::Goto(chain))).collect();
        Self { name: name.into(), to_chains: true, entries: Entries::Links(entries) }
    }

    /// Leads to addresses, for `Rule::dnat_by_destination` and `Rule::snat_by_source`.
    pub fn to_addresses(name: impl Into<String>, entries: impl IntoIterator<Item = (Ipv4Addr, Ipv4Addr)>) -> Self {
        let entries = entries.into_iter().map(|(from, to)| (Ipv4Net::from(from), Target::Address(to)));
        Self { name: name.into(), to_chains: false, entries: Entries::Ranges(disjoint(entries)) }
    }
}

/// Addresses from first to last, both included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Range<T> {
    pub first: u32,
    pub last: u32,
    pub value: T,
}

/// Cuts networks, which nest or are apart, into ranges that do not overlap: the most specific network counts, and
/// neighbours with the same value are one range. The kernel refuses a set whose intervals overlap.
fn disjoint<T: Clone + PartialEq>(networks: impl IntoIterator<Item = (Ipv4Net, T)>) -> Vec<Range<T>> {
    let mut sorted: Vec<(Ipv4Net, T)> = networks.into_iter().map(|(net, value)| (net.trunc(), value)).collect();
    // Outer before inner; of the same network twice the first counts.
    sorted.sort_by_key(|(net, _)| (net.network(), net.prefix_len()));
    sorted.dedup_by_key(|(net, _)| *net);

    let mut ranges: Vec<Range<T>> = Vec::new();
    let mut emit = |first: u64, last: u64, value: &T| {
        let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else { return };
        match ranges.last_mut() {
            Some(before) if before.value == *value && before.last.checked_add(1) == Some(first) => before.last = last,
            _ => ranges.push(Range { first, last, value: value.clone() }),
        }
    };
    // Networks around the current place, outermost first, and the first address not decided yet. Wider than an address,
    // so that there is a place behind the last one.
    let mut around: Vec<(u64, &T)> = Vec::new();
    let mut cursor = 0u64;
    let ends = sorted.iter().map(|(net, value)| {
        (u64::from(u32::from(net.network())), Some((u64::from(u32::from(net.broadcast())), value)))
    });
    for (start, opened) in ends.chain([(1 << 32, None)]) {
        while let Some((last, value)) = around.last().copied().filter(|(last, _)| *last < start) {
            if cursor <= last {
                emit(cursor, last, value);
                cursor = last + 1;
            }
            around.pop();
        }
        if let Some((_, value)) = around.last()
            && cursor < start
        {
            emit(cursor, start - 1, value);
        }
        cursor = start;
        around.extend(opened);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::disjoint;

    fn cut(networks: &[(&str, char)]) -> Vec<(String, String, char)> {
        let text = |address: u32| Ipv4Addr::from(address).to_string();
        disjoint(networks.iter().map(|(net, value)| (net.parse().unwrap(), *value)))
            .into_iter()
            .map(|range| (text(range.first), text(range.last), range.value))
            .collect()
    }

    #[test]
    fn ranges_do_not_overlap_and_the_specific_counts() {
        let range = |first: &str, last: &str, value| (first.to_owned(), last.to_owned(), value);
        assert_eq!(cut(&[]), []);
        assert_eq!(cut(&[("0.0.0.0/0", 'a')]), [range("0.0.0.0", "255.255.255.255", 'a')]);
        assert_eq!(
            cut(&[("10.0.0.0/30", 'a'), ("10.0.0.4/30", 'a'), ("10.0.0.8/32", 'b')]),
            [range("10.0.0.0", "10.0.0.7", 'a'), range("10.0.0.8", "10.0.0.8", 'b')]
        );
        assert_eq!(
            cut(&[("10.0.0.5/32", 'b'), ("10.0.0.0/28", 'a'), ("10.0.0.6/32", 'c'), ("10.0.0.15/32", 'd')]),
            [
                range("10.0.0.0", "10.0.0.4", 'a'),
                range("10.0.0.5", "10.0.0.5", 'b'),
                range("10.0.0.6", "10.0.0.6", 'c'),
                range("10.0.0.7", "10.0.0.14", 'a'),
                range("10.0.0.15", "10.0.0.15", 'd'),
            ]
        );
        assert_eq!(
            cut(&[("255.255.255.254/31", 'a'), ("0.0.0.0/32", 'a'), ("10.0.0.0/8", 'a'), ("10.0.0.0/8", 'b')]),
            [
                range("0.0.0.0", "0.0.0.0", 'a'),
                range("10.0.0.0", "10.255.255.255", 'a'),
                range("255.255.255.254", "255.255.255.255", 'a'),
            ]
        );
    }

    #[test]
    fn ranges_say_what_the_most_specific_network_says_of_every_address() {
        // A small deterministic sweep: networks within 10.0.0.0/24 of all sizes, checked address by address.
        let mut state = 7u32;
        let mut next = |bound: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % bound
        };
        for _ in 0..200 {
            let mut networks: Vec<(ipnet::Ipv4Net, u32)> = Vec::new();
            for value in 0..next(12) {
                let length = 24 + u8::try_from(next(9)).unwrap();
                let net = ipnet::Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + next(256)), length).unwrap().trunc();
                if networks.iter().all(|(other, _)| *other != net) {
                    networks.push((net, value));
                }
            }
            let ranges = disjoint(networks.clone());
            for address in 0x0a00_0000..0x0a00_0100u32 {
                let wanted = networks
                    .iter()
                    .filter(|(net, _)| net.contains(&Ipv4Addr::from(address)))
                    .max_by_key(|(net, _)| net.prefix_len())
                    .map(|(_, value)| *value);
                let found: Vec<u32> = ranges
                    .iter()
                    .filter(|range| (range.first..=range.last).contains(&address))
                    .map(|range| range.value)
                    .collect();
                assert_eq!(found, Vec::from_iter(wanted), "{networks:?} at {}", Ipv4Addr::from(address));
            }
        }
    }
}
