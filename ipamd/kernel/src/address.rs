//! Addresses and neighbours of a link.

use std::net::IpAddr;

use flatwire_core::ids::MacAddress;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use crate::error::KernelError;
use crate::netlink::{Netlink, RouteRequest};

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// An address of some link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkAddress {
    /// Index of the link.
    pub link: u32,
    pub address: IpNet,
    /// Link- or host-scoped, such as fe80::/10 and 127.0.0.1.
    pub local_scope: bool,
    /// Not used yet: it is still to be found unique, or its link has had no carrier.
    pub tentative: bool,
}

fn address_message(link: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = link;
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message
}

/// `prefix_route`: whether the kernel shall add the subnet's route to the main table by itself.
pub(crate) fn add_address(link: u32, name: &str, address: IpNet, prefix_route: bool) -> RouteRequest {
    let mut message = address_message(link, address);
    if address.addr().is_ipv6() {
        // EC2 and the ledger vouch for it being the only one; detection would cost the pod a second or two.
        message.header.flags |= AddressHeaderFlags::Nodad;
    }
    if !prefix_route {
        // This flag does not fit the header's eight bits, and the attribute overrides the header.
        let mut flags = AddressFlags::Noprefixroute;
        if address.addr().is_ipv6() {
            flags |= AddressFlags::Nodad;
        }
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    RouteRequest::new(
        format!("add address {address} to {name}"),
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(crate) fn delete_address(link: u32, name: &str, address: IpNet) -> RouteRequest {
    RouteRequest::new(
        format!("remove address {address} from {name}"),
        RouteNetlinkMessage::DelAddress(address_message(link, address)),
        0,
    )
}

/// A permanent neighbour entry.
pub(crate) fn add_neighbour(link: u32, name: &str, address: IpAddr, mac: MacAddress) -> RouteRequest {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = link;
    message.header.state = NeighbourState::Permanent;
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    RouteRequest::new(
        format!("add neighbour {address} at {mac} on {name}"),
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

impl Netlink {
    /// Adds an address with its prefix; the kernel adds the route of its subnet. Being there already means done.
    pub async fn address(&self, name: &str, address: IpNet) -> Result<(), KernelError> {
        let link = self.index(name).await?;
        done_if(self.one(add_address(link, name, address, true)).await, Errno::EEXIST)
    }

    /// Removes an address; absent means done.
    pub async fn remove_address(&self, name: &str, address: IpNet) -> Result<(), KernelError> {
        let link = self.index(name).await?;
        done_if(self.one(delete_address(link, name, address)).await, Errno::EADDRNOTAVAIL)
    }

    /// Every address of the namespace.
    pub async fn addresses(&self) -> Result<Vec<LinkAddress>, KernelError> {
        let messages = self.dump("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
        Ok(messages
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) => parse_address(message),
                _ => None,
            })
            .collect())
    }

    /// Sets a permanent neighbour entry, in place of any other for that address.
    pub async fn neighbour(&self, name: &str, address: IpAddr, mac: MacAddress) -> Result<(), KernelError> {
        let link = self.index(name).await?;
        self.one(add_neighbour(link, name, address, mac)).await.map(drop)
    }

    /// The permanent neighbour entry of an address on a link.
    pub(crate) async fn permanent_neighbour(
        &self,
        link: u32,
        address: IpAddr,
    ) -> Result<Option<MacAddress>, KernelError> {
        let mut wanted = NeighbourMessage::default();
        wanted.header.family = family(address);
        let messages = self.dump("list neighbours", RouteNetlinkMessage::GetNeighbour(wanted)).await?;
        Ok(messages.iter().find_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => parse_neighbour(message, link, address),
            _ => None,
        }))
    }
}

fn done_if<T>(result: Result<T, KernelError>, errno: Errno) -> Result<(), KernelError> {
    match result {
        Err(e) if e.errno() != Some(errno) => Err(e),
        _ => Ok(()),
    }
}

fn parse_address(message: &AddressMessage) -> Option<LinkAddress> {
    // On a point-to-point link ADDRESS is the other side's and LOCAL ours; elsewhere they are the same or LOCAL is absent.
    let (mut own, mut tentative) = (None, message.header.flags.contains(AddressHeaderFlags::Tentative));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(flags) => tentative |= flags.contains(AddressFlags::Tentative),
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) if own.is_none() => own = Some(*address),
            _ => {}
        }
    }
    Some(LinkAddress {
        link: message.header.index,
        address: IpNet::new(own?, message.header.prefix_len).ok()?,
        local_scope: !matches!(message.header.scope, AddressScope::Universe),
        tentative,
    })
}

fn parse_neighbour(message: &NeighbourMessage, link: u32, address: IpAddr) -> Option<MacAddress> {
    if message.header.ifindex != link || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ours, mut mac) = (false, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ours = IpAddr::V4(*v4) == address,
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ours = IpAddr::V6(*v6) == address,
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress);
            }
            _ => {}
        }
    }
    mac.filter(|_| ours)
}
