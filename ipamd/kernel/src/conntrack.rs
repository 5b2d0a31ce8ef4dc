//! Forgetting connections: what the kernel remembers of an address that its pod has left, so that the next pod with that
//! address starts without flows, translations and marks of a stranger.
//!
//! Raw messages, because only four things are needed of an entry: its two tuples, its zone and its id. An entry is found by
//! its original source (the pod called) or its reply source (the pod was called, through a service or not), and deleted
//! by what the kernel itself printed of it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use nix::libc::{AF_INET, AF_INET6};
use tokio::sync::Mutex;

use crate::error::KernelError;
use crate::netns::Netns;
use crate::nl::{Raw, Request, Socket};

/// NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_GET, _DELETE and _GET_STATS.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const STATISTICS: u16 = 0x105;

/// Attributes of an entry, of its tuples, and of their addresses.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const STATISTICS_ENTRIES: u16 = 1;
const V4_SOURCE: u16 = 1;
const V6_SOURCE: u16 = 3;
/// Which parts of the two tuples in a filter count.
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
const BY_SOURCE: u32 = 1;
const NESTED: u16 = 0x8000;

const GENERIC_HEADER_BYTES: usize = 4;

/// A pass over the kernel's table costs as much as listing so many connections: its 262144 buckets (with more than 4 GiB of
/// memory) are locked one after the other, which takes ten milliseconds.
const PASS_IN_CONNECTIONS: usize = 6_000;
/// Deletions sent in one datagram.
const AT_ONCE: usize = 256;

/// A connection to the conntrack table of one namespace.
pub(crate) struct Conntrack {
    socket: Mutex<Socket>,
}

/// A message of ctnetlink as bytes behind its netlink header.
#[derive(Debug, Clone)]
struct Message {
    kind: u16,
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, family: u8, attributes: &[u8]) -> Self {
        let mut bytes = vec![family, 0, 0, 0];
        bytes.extend_from_slice(attributes);
        Self { kind, bytes }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self { kind: header.message_type, bytes: payload.to_vec() })
    }
}

impl Conntrack {
    pub fn in_namespace(netns: &Netns) -> Result<Self, KernelError> {
        Ok(Self { socket: Mutex::new(Socket::open_in(netns, NETLINK_NETFILTER)?) })
    }

    /// Forgets every connection of these addresses, and says how many there were.
    ///
    /// The kernel has no index by address: it passes over its whole table, once for each tuple and address it chooses by, or
    /// once for a list of everything, from which is chosen here. What is quicker is done.
    pub async fn forget(&self, addresses: &BTreeSet<IpAddr>) -> Result<usize, KernelError> {
        if addresses.is_empty() {
            return Ok(0);
        }
        let mut socket = self.socket.lock().await;
        let question = Request::new("count connections", Message::new(STATISTICS, 0, &[]), 0);
        let connections = socket.one(question).await?.first().and_then(|answer: &Message| count_of(&answer.bytes));
        let mut found: BTreeSet<(u8, Vec<u8>)> = BTreeSet::new();
        for (family, v6) in [(AF_INET, false), (AF_INET6, true)] {
            let family = u8::try_from(family).expect("invariant: both fit a byte");
            let these = addresses.iter().filter(|address| address.is_ipv6() == v6);
            let mut wanted: Vec<Vec<u8>> = these.flat_map(|one| [filter(*one, true), filter(*one, false)]).collect();
            let spared = wanted.len().saturating_sub(1);
            if spared > 0 && connections.is_some_and(|count| count <= spared * PASS_IN_CONNECTIONS) {
                wanted = vec![Vec::new()];
            }
            for wanted in &wanted {
                // Kernels before 5.8 do not choose and show everything, so what comes is looked at all the same.
                let list = Message::new(GET, family, wanted);
                let keys = socket.dump_as("list connections", list, |Raw(entry)| key_of(&entry, addresses)).await?;
                found.extend(keys.into_iter().map(|key| (family, key)));
            }
        }
        let count = found.len();
        let requests: Vec<Request<Message>> = found
            .into_iter()
            .map(|(family, key)| Request::new("forget a connection", Message::new(DELETE, family, &key), 0))
            .collect();
        let mut requests = requests.into_iter();
        loop {
            let some: Vec<_> = requests.by_ref().take(AT_ONCE).collect();
            if some.is_empty() {
                return Ok(count);
            }
            for outcome in socket.batch(some).await? {
                // It may have ended by itself.
                outcome.map(drop).or_else(|e| if e.errno() == Some(Errno::ENOENT) { Ok(()) } else { Err(e) })?;
            }
        }
    }
}

/// What names the entry to the kernel, if it is one of an address's.
fn key_of(entry: &[u8], addresses: &BTreeSet<IpAddr>) -> Option<Vec<u8>> {
    let attributes = || NlasIterator::new(entry.get(GENERIC_HEADER_BYTES..).unwrap_or_default()).flatten();
    let of = |kind: u16| attributes().find(move |attribute| attribute.kind() & !NESTED == kind);
    let is_left =
        |tuple: u16| of(tuple).and_then(|t| source_of(t.value())).is_some_and(|source| addresses.contains(&source));
    if !is_left(TUPLE_ORIG) && !is_left(TUPLE_REPLY) {
        return None;
    }
    let mut key = attribute(TUPLE_ORIG | NESTED, of(TUPLE_ORIG)?.value());
    for kind in [ZONE, ID] {
        key.extend(of(kind).map(|found| attribute(kind, found.value())).unwrap_or_default());
    }
    Some(key)
}

/// How many connections there are, of the kernel's statistics.
fn count_of(statistics: &[u8]) -> Option<usize> {
    let mut attributes = NlasIterator::new(statistics.get(GENERIC_HEADER_BYTES..).unwrap_or_default()).flatten();
    let entries = attributes.find(|attribute| attribute.kind() & !NESTED == STATISTICS_ENTRIES)?;
    usize::try_from(u32::from_be_bytes(entries.value().try_into().ok()?)).ok()
}

fn source_of(tuple: &[u8]) -> Option<IpAddr> {
    let addresses = NlasIterator::new(tuple).flatten().find(|attribute| attribute.kind() & !NESTED == TUPLE_IP)?;
    NlasIterator::new(addresses.value()).flatten().find_map(|attribute| match attribute.kind() {
        V4_SOURCE => <[u8; 4]>::try_from(attribute.value()).ok().map(IpAddr::from),
        V6_SOURCE => <[u8; 16]>::try_from(attribute.value()).ok().map(IpAddr::from),
        _ => None,
    })
}

/// Entries whose original tuple, or else whose reply, comes from an address.
fn filter(address: IpAddr, orig: bool) -> Vec<u8> {
    let source = match address {
        IpAddr::V4(v4) => attribute(V4_SOURCE, &v4.octets()),
        IpAddr::V6(v6) => attribute(V6_SOURCE, &v6.octets()),
    };
    let (tuple, orig_flags, reply_flags) = if orig { (TUPLE_ORIG, BY_SOURCE, 0) } else { (TUPLE_REPLY, 0, BY_SOURCE) };
    let mut flags = attribute(FILTER_ORIG_FLAGS, &orig_flags.to_ne_bytes());
    flags.extend(attribute(FILTER_REPLY_FLAGS, &reply_flags.to_ne_bytes()));
    let mut bytes = attribute(tuple | NESTED, &attribute(TUPLE_IP | NESTED, &source));
    bytes.extend(attribute(FILTER | NESTED, &flags));
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: usize = 4;
    let length = u16::try_from(HEADER_BYTES + value.len()).expect("invariant: tuples are short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_counted() {
        let answer = [&[0, 0, 0, 0], &*attribute(2, &[0, 4, 0, 0]), &*attribute(STATISTICS_ENTRIES, &[0, 0, 1, 2])];
        assert_eq!(count_of(&answer.concat()), Some(258));
        assert_eq!(count_of(&[0, 0, 0, 0]), None);
    }
}
