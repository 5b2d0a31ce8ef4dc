//! Routes, as far as this project uses them: unicast by one link or by one gateway, with a table and a protocol number
//! by which ours are told from everybody else's.

use std::fmt;
use std::net::IpAddr;

use flatwire_core::ids::RouteTable;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use nix::errno::Errno;

use crate::address::family;
use crate::error::KernelError;
use crate::netlink::{Netlink, RouteRequest};

/// The protocol number of our routes and rules. Free in iproute2's `rt_protos` and in what routing daemons use.
pub const PROTOCOL: u8 = 70;

/// A route of one namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub destination: IpNet,
    pub table: u32,
    pub via: Option<IpAddr>,
    /// Index of the link it leaves by; none for a blackhole.
    pub link: Option<u32>,
    /// Address the node speaks from on this route.
    pub source: Option<IpAddr>,
    /// The destination is on the link itself. Set by `on_link` routes without a gateway.
    pub link_scope: bool,
    /// Take the gateway for reachable though no route says so.
    pub onlink: bool,
    /// Packets are dropped in silence.
    pub blackhole: bool,
    pub protocol: u8,
}

impl Route {
    /// A route in the main table to what is on the link itself; `via` makes it one through a gateway.
    pub fn to(destination: IpNet) -> Self {
        Self {
            destination: destination.trunc(),
            table: RouteTable::MAIN.0,
            via: None,
            link: None,
            source: None,
            link_scope: true,
            onlink: false,
            blackhole: false,
            protocol: PROTOCOL,
        }
    }

    /// A route to one address.
    pub fn to_host(address: IpAddr) -> Self {
        Self::to(IpNet::from(address))
    }

    /// The default route of the gateway's family, through it.
    pub fn default_via(gateway: IpAddr) -> Self {
        let everything = match gateway {
            IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
        };
        Self::to(everything).via(gateway)
    }

    pub fn via(mut self, gateway: IpAddr) -> Self {
        self.via = Some(gateway);
        self.link_scope = false;
        self
    }

    pub fn table(mut self, table: u32) -> Self {
        self.table = table;
        self
    }

    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    pub fn onlink(mut self) -> Self {
        self.onlink = true;
        self
    }

    pub fn protocol(mut self, protocol: u8) -> Self {
        self.protocol = protocol;
        self
    }

    pub(crate) fn link(mut self, index: u32) -> Self {
        self.link = Some(index);
        self
    }

    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.destination.addr());
        message.header.destination_prefix_length = self.destination.prefix_len();
        // Numbers above 255 only fit the attribute.
        message.header.table = u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.header.protocol = RouteProtocol::from(self.protocol);
        message.header.scope = if self.link_scope && self.destination.addr().is_ipv4() && !self.blackhole {
            RouteScope::Link
        } else {
            RouteScope::Universe
        };
        message.header.kind = if self.blackhole { RouteType::BlackHole } else { RouteType::Unicast };
        if self.onlink {
            message.header.flags |= RouteFlags::Onlink;
        }
        let attributes = &mut message.attributes;
        if self.destination.prefix_len() > 0 {
            attributes.push(RouteAttribute::Destination(route_address(self.destination.addr())));
        }
        attributes.push(RouteAttribute::Table(self.table));
        attributes.extend(self.via.map(|via| RouteAttribute::Gateway(route_address(via))));
        attributes.extend(self.link.map(RouteAttribute::Oif));
        attributes.extend(self.source.map(|source| RouteAttribute::PrefSource(route_address(source))));
        message
    }

    /// `None` for what this project never makes (multipath, unreachable, …).
    pub(crate) fn parse(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let blackhole = header.kind == RouteType::BlackHole;
        if !blackhole && header.kind != RouteType::Unicast {
            return None;
        }
        let everything = match header.address_family {
            netlink_packet_route::AddressFamily::Inet => IpNet::V4(ipnet::Ipv4Net::default()),
            netlink_packet_route::AddressFamily::Inet6 => IpNet::V6(ipnet::Ipv6Net::default()),
            _ => return None,
        };
        let mut route = Self::to(everything).protocol(u8::from(header.protocol)).table(u32::from(header.table));
        route.blackhole = blackhole;
        route.onlink = header.flags.contains(RouteFlags::Onlink);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => {
                    route.destination = IpNet::new(ip_address(address)?, header.destination_prefix_length).ok()?;
                }
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Gateway(address) => route.via = ip_address(address),
                RouteAttribute::Oif(link) => route.link = Some(*link),
                RouteAttribute::PrefSource(address) => route.source = ip_address(address),
                RouteAttribute::MultiPath(_) => return None,
                _ => {}
            }
        }
        route.link_scope = route.via.is_none() && !route.blackhole;
        Some(route)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.blackhole {
            f.write_str("blackhole ")?;
        }
        if self.destination.prefix_len() == 0 {
            f.write_str("default")?
        } else {
            write!(f, "{}", self.destination)?
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if self.table != RouteTable::MAIN.0 {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn ip_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

pub(crate) fn add_route(route: &Route) -> RouteRequest {
    RouteRequest::new(
        format!("add route {route}"),
        RouteNetlinkMessage::NewRoute(route.message()),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(crate) fn replace_route(route: &Route) -> RouteRequest {
    RouteRequest::new(
        format!("set route {route}"),
        RouteNetlinkMessage::NewRoute(route.message()),
        NLM_F_CREATE | NLM_F_REPLACE,
    )
}

/// A route as the kernel once showed it, for the case that it is not there any more.
pub(crate) fn add_again(message: &RouteMessage) -> RouteRequest {
    let what = Route::parse(message).map_or_else(|| "a route".to_owned(), |route| format!("route {route}"));
    let message = RouteNetlinkMessage::NewRoute(message.clone());
    RouteRequest::new(format!("add {what} again"), message, NLM_F_CREATE | NLM_F_EXCL)
}

/// Matches by destination, table, link and gateway; the scope and protocol do not matter.
pub(crate) fn delete_route(route: &Route) -> RouteRequest {
    let mut message = route.message();
    message.header.scope = RouteScope::NoWhere;
    message.header.protocol = RouteProtocol::Unspec;
    RouteRequest::new(format!("delete route {route}"), RouteNetlinkMessage::DelRoute(message), 0)
}

/// Asks for the table entry that decides where the node sends packets for an address.
pub(crate) fn match_route(address: IpAddr) -> RouteRequest {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = IpNet::from(address).max_prefix_len();
    message.header.flags = RouteFlags::FibMatch;
    message.attributes.push(RouteAttribute::Destination(route_address(address)));
    RouteRequest::new(format!("look up the route to {address}"), RouteNetlinkMessage::GetRoute(message), 0)
}

/// The route in the answers to `match_route`.
pub(crate) fn first_route(messages: &[RouteNetlinkMessage]) -> Option<Route> {
    messages.iter().find_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Route::parse(route),
        _ => None,
    })
}

impl Netlink {
    /// Sets a route that leaves by the named link, in place of another to the same destination in the same table.
    pub async fn route(&self, link: &str, route: &Route) -> Result<(), KernelError> {
        let route = route.clone().link(self.index(link).await?);
        self.one(replace_route(&route)).await.map(drop)
    }

    /// Drops, in silence, what goes to a destination that nothing more specific covers.
    pub async fn blackhole(&self, destination: IpNet, table: u32) -> Result<(), KernelError> {
        let mut route = Route::to(destination).table(table);
        route.blackhole = true;
        self.one(replace_route(&route)).await.map(drop)
    }

    /// Deletes the route to a destination from a table, whatever it leads to; absent means done.
    pub async fn delete_route(&self, destination: IpNet, table: u32) -> Result<(), KernelError> {
        let mut message = Route::to(destination).table(table).message();
        message.header.scope = RouteScope::NoWhere;
        message.header.protocol = RouteProtocol::Unspec;
        message.header.kind = RouteType::Unspec;
        let operation = format!("delete the route to {destination} from table {table}");
        match self.one(RouteRequest::new(operation, RouteNetlinkMessage::DelRoute(message), 0)).await {
            Err(e) if e.errno() != Some(Errno::ESRCH) => Err(e),
            _ => Ok(()),
        }
    }

    /// Every IPv4 route of the namespace that this type can say, all tables.
    pub async fn routes(&self) -> Result<Vec<Route>, KernelError> {
        self.routes_of(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)).await
    }

    /// As `routes`, for the family of an address.
    pub(crate) async fn routes_of(&self, like: IpAddr) -> Result<Vec<Route>, KernelError> {
        Ok(self.route_messages(like).await?.iter().filter_map(Route::parse).collect())
    }

    /// As `routes_of`, with all that the kernel says of each.
    pub(crate) async fn route_messages(&self, like: IpAddr) -> Result<Vec<RouteMessage>, KernelError> {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family(like);
        let messages = self.dump("list routes", RouteNetlinkMessage::GetRoute(wanted)).await?;
        let route = |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(route).collect())
    }
}
