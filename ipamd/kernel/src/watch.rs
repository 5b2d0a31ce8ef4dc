//! Hearing from the kernel that something has changed which the plan may speak of: links, addresses, routes, rules, the
//! reverse path filter and forwarding, and our nftables table.
//!
//! What is heard is a reason to look and nothing more: no state is kept from it, so an event that was lost costs nothing as
//! long as its loss is known (ENOBUFS), and our own changes cause one look that finds nothing. The filter below leaves out
//! what pods that come and go do to the kernel by the dozen; where it cannot tell, it says yes.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::route::RouteType;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::errno::Errno;

use crate::error::KernelError;
use crate::link::{Link, POD_GROUP};
use crate::netns::Netns;
use crate::nl::Socket;
use crate::route::{PROTOCOL, Route};
use crate::ruleset;

/// RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV6_RULE, _IPV4_NETCONF.
const ROUTE_GROUPS: [u32; 8] = [1, 5, 7, 8, 9, 11, 19, 24];
/// NFNLGRP_NFTABLES.
const NFTABLES_GROUP: u32 = 7;

/// Nothing new for this long, and what belongs together has been told.
const QUIET: Duration = Duration::from_millis(5);
/// No longer than this, whatever else goes on.
const AT_MOST: Duration = Duration::from_millis(25);

const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
/// RTPROT_KERNEL.
const KERNEL_PROTOCOL: u8 = 2;

/// Sockets that hear of one namespace's changes.
pub(crate) struct Watch {
    route: Socket,
    nftables: Socket,
}

impl Watch {
    pub fn in_namespace(netns: &Netns) -> Result<Self, KernelError> {
        let mut route = Socket::open_in(netns, NETLINK_ROUTE)?;
        route.join(&ROUTE_GROUPS)?;
        let mut nftables = Socket::open_in(netns, NETLINK_NETFILTER)?;
        nftables.join(&[NFTABLES_GROUP])?;
        Ok(Self { route, nftables })
    }

    /// Waits until something has changed that matters, and then until it is quiet for a moment.
    pub async fn changed(&mut self) -> Result<(), KernelError> {
        loop {
            self.readable().await?;
            // Most likely a pod that comes or goes, of which the kernel tells in several messages. Nothing is read before all
            // of them are there, and until then the plugin has the processor.
            tokio::time::sleep(QUIET).await;
            if self.drain()? {
                break;
            }
        }
        let end = tokio::time::Instant::now() + AT_MOST;
        // A timeout is the quiet that was waited for.
        while let Ok(more) = tokio::time::timeout(QUIET, self.readable()).await {
            more?;
            self.drain()?;
            if tokio::time::Instant::now() >= end {
                break;
            }
        }
        Ok(())
    }

    /// Reads all that has been told so far; true if some of it matters.
    fn drain(&mut self) -> Result<bool, KernelError> {
        let route = drain(&mut self.route, route_matters)?;
        Ok(drain(&mut self.nftables, nftables_matters)? || route)
    }

    async fn readable(&self) -> Result<(), KernelError> {
        let (mut route, mut nftables) = (pin!(self.route.readable()), pin!(self.nftables.readable()));
        poll_fn(|context| match route.as_mut().poll(context) {
            Poll::Pending => nftables.as_mut().poll(context),
            ready => ready,
        })
        .await
        .map_err(failed)
    }
}

fn drain(socket: &mut Socket, matters: impl Fn(&NetlinkHeader, &[u8]) -> bool) -> Result<bool, KernelError> {
    let mut some = false;
    loop {
        match socket.heard() {
            Ok(None) => return Ok(some),
            Ok(Some(messages)) => some |= messages.iter().any(|(header, content)| matters(header, content)),
            Err(e) if e.raw_os_error().map(Errno::from_raw) == Some(Errno::ENOBUFS) => some = true,
            Err(source) => return Err(failed(source)),
        }
    }
}

fn failed(source: io::Error) -> KernelError {
    KernelError::Exchange { operation: "hear of changes".to_owned(), source }
}

fn route_matters(header: &NetlinkHeader, content: &[u8]) -> bool {
    match header.message_type {
        RTM_NEWNETCONF => netconf_matters(content),
        RTM_DELNETCONF => false,
        _ => match RouteNetlinkMessage::deserialize(header, content) {
            Ok(message) => message_matters(&message),
            Err(_) => true,
        },
    }
}

fn message_matters(message: &RouteNetlinkMessage) -> bool {
    match message {
        // Links of pods come and go with their pods.
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let link = Link::parse(link);
            !(link.is_veth() && link.group == POD_GROUP)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => !is_link_local(address),
        // The plugin's and our own: nothing is missing for being there.
        RouteNetlinkMessage::NewRoute(route) => {
            let foreign = |route: Route| route.protocol != PROTOCOL && route.protocol != KERNEL_PROTOCOL;
            is_routed(route.header.kind) && Route::parse(route).is_none_or(foreign)
        }
        RouteNetlinkMessage::DelRoute(route) => {
            const LOCAL: u32 = 255;
            let local = |route: &Route| route.table == LOCAL;
            let of_a_link = |route: &Route| route.destination.addr().is_ipv6() && route.protocol == KERNEL_PROTOCOL;
            is_routed(route.header.kind) && Route::parse(route).is_none_or(|route| !local(&route) && !of_a_link(&route))
        }
        RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => true,
        _ => false,
    }
}

/// Local, broadcast and multicast routes are the kernel's own business.
fn is_routed(kind: RouteType) -> bool {
    matches!(kind, RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit)
}

/// Every link gives itself one, pods' too.
fn is_link_local(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Address(std::net::IpAddr::V6(address)) => address.is_unicast_link_local(),
        _ => false,
    })
}

/// A new link tells of all its settings at once; somebody who changes one tells of that one.
fn netconf_matters(content: &[u8]) -> bool {
    const FAMILY_BYTES: usize = 4;
    const NETCONFA_IFINDEX: u16 = 1;
    let attributes = NlasIterator::new(content.get(FAMILY_BYTES..).unwrap_or_default()).flatten();
    attributes.filter(|attribute| attribute.kind() != NETCONFA_IFINDEX).count() == 1
}

/// Only our table: others change theirs all the time. The first attribute of everything in a table is the table's name.
fn nftables_matters(header: &NetlinkHeader, content: &[u8]) -> bool {
    const GENERIC_HEADER_BYTES: usize = 4;
    const NFT_MSG_NEWGEN: u16 = 15;
    const TABLE_NAME: u16 = 1;
    if header.message_type & 0xff == NFT_MSG_NEWGEN {
        return false;
    }
    let mut attributes = NlasIterator::new(content.get(GENERIC_HEADER_BYTES..).unwrap_or_default()).flatten();
    let named = attributes.find(|attribute| attribute.kind() == TABLE_NAME);
    named.is_none_or(|name| name.value().strip_suffix(&[0]).unwrap_or(name.value()) == ruleset::TABLE.as_bytes())
}
