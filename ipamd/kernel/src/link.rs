//! Links: what the kernel says of them, and the verbs on them. A veth pair is made in one message with each end already
//! in its namespace under its name, so neither end is ever visible half made.

use std::fmt;
use std::os::fd::AsRawFd;

use flatwire_core::ids::MacAddress;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage,
};
use nix::errno::Errno;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::error::KernelError;
use crate::netlink::{Netlink, RouteRequest};
use crate::netns::Netns;

/// Longest interface name the kernel takes (IFNAMSIZ without its terminator).
pub const MAX_NAME_BYTES: usize = 15;

/// Interface group of the host ends of pods' veths. It is what tells a pod's /32 route from others in the main table: DHCP
/// clients put /32 routes to DNS servers there, and those are for the node and not for its pods.
pub const POD_GROUP: u32 = 70;

/// A link as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `veth`, `vlan`, …; `None` for hardware and loopback.
    pub kind: Option<String>,
    pub mac: Option<MacAddress>,
    pub mtu: u32,
    pub up: bool,
    /// Its interface group; 0 unless somebody set one.
    pub group: u32,
    /// Index of the other end of a veth, in the namespace it is in.
    pub peer: Option<u32>,
    /// The kernel's number, in this namespace, for the namespace of the other end; `None` where it is this one.
    pub peer_netns: Option<i32>,
    /// `None` where IPv6 is off.
    pub ipv6: Option<Ipv6Settings>,
}

/// What `net/ipv6/conf/LINK/` says, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Settings {
    pub accept_ra: i32,
    pub accept_redirects: i32,
    pub forwarding: i32,
}

impl Link {
    pub fn is_veth(&self) -> bool {
        self.kind.as_deref() == Some("veth")
    }

    pub(crate) fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: None,
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            group: 0,
            peer: None,
            peer_netns: None,
            ipv6: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(bytes) => {
                    link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress);
                }
                LinkAttribute::Group(group) => link.group = *group,
                LinkAttribute::Link(peer) => link.peer = Some(*peer),
                LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(*id),
                LinkAttribute::AfSpecUnspec(families) => link.ipv6 = families.iter().find_map(ipv6_settings),
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Kind(kind) = info {
                            link.kind = Some(kind.to_string());
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

fn ipv6_settings(family: &AfSpecUnspec) -> Option<Ipv6Settings> {
    let AfSpecUnspec::Inet6(attributes) = family else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet6::DevConf(conf) => Some(Ipv6Settings {
            accept_ra: conf.accept_ra,
            accept_redirects: conf.accept_redirects,
            forwarding: conf.forwarding,
        }),
        _ => None,
    })
}

/// One end of a veth pair to be made.
#[derive(Debug)]
pub struct VethEnd<'a> {
    pub name: String,
    /// Given at creation it stays: udev changes only addresses that the kernel made up.
    pub mac: Option<MacAddress>,
    /// In bytes; the kernel's default where `None`.
    pub mtu: Option<u32>,
    /// The namespace the end is made in; that of the connection where `None`.
    pub netns: Option<&'a Netns>,
    pub group: u32,
}

impl<'a> VethEnd<'a> {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), mac: None, mtu: None, netns: None, group: 0 }
    }

    pub fn mac(mut self, mac: MacAddress) -> Self {
        self.mac = Some(mac);
        self
    }

    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    pub fn group(mut self, group: u32) -> Self {
        self.group = group;
        self
    }

    pub fn in_netns(mut self, netns: &'a Netns) -> Self {
        self.netns = Some(netns);
        self
    }

    fn describe<T>(&self, mut builder: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
        builder = builder.name(self.name.clone());
        // One queue is what a pair gets anyhow. Not asked for, the kernel makes one per processor and takes them back, each end
        // behind a grace period of RCU with the lock of all of its network configuration held.
        builder = builder
            .append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1));
        if let Some(mac) = self.mac {
            builder = builder.address(mac.0.to_vec());
        }
        if let Some(mtu) = self.mtu {
            builder = builder.mtu(mtu);
        }
        if self.group != 0 {
            builder = builder.link_group(self.group);
        }
        if let Some(netns) = self.netns {
            builder = builder.setns_by_fd(netns.as_raw_fd());
        }
        builder
    }
}

impl fmt::Display for VethEnd<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.netns {
            Some(netns) => write!(f, "{} in {}", self.name, netns.path().display()),
            None => f.write_str(&self.name),
        }
    }
}

/// Refuses what the kernel would refuse with a bare "invalid argument", or would cut.
pub(crate) fn check_name(name: &str) -> Result<(), KernelError> {
    let bad = name.is_empty()
        || name.len() > MAX_NAME_BYTES
        || name == "."
        || name == ".."
        || name.bytes().any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace());
    if bad { Err(KernelError::BadName { name: name.to_owned() }) } else { Ok(()) }
}

pub(crate) fn new_veth(a: &VethEnd<'_>, b: &VethEnd<'_>) -> RouteRequest {
    // The peer may not be told to be up: it is configured before the two ends are tied, and the kernel answers ENOTCONN.
    let peer = b.describe(LinkMessageBuilder::<LinkUnspec>::default()).build();
    let pair = a
        .describe(LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth))
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    RouteRequest::new(
        format!("create the veth pair {a} and {b}"),
        RouteNetlinkMessage::NewLink(pair),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

pub(crate) fn get_link(name: &str) -> RouteRequest {
    let wanted = LinkUnspec::new_with_name(name)
        .append_extra_attribute(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]))
        .build();
    RouteRequest::new(format!("look up interface {name}"), RouteNetlinkMessage::GetLink(wanted), 0)
}

pub(crate) fn set_up(index: u32, name: &str) -> RouteRequest {
    let message = LinkUnspec::new_with_index(index).up().build();
    RouteRequest::new(format!("bring interface {name} up"), RouteNetlinkMessage::SetLink(message), 0)
}

pub(crate) fn delete_link(index: u32, name: &str) -> RouteRequest {
    let message = LinkUnspec::new_with_index(index).build();
    RouteRequest::new(format!("delete interface {name}"), RouteNetlinkMessage::DelLink(message), 0)
}

/// The link in the answers to `get_link`.
pub(crate) fn first_link(messages: &[RouteNetlinkMessage]) -> Option<Link> {
    messages.iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(Link::parse(link)),
        _ => None,
    })
}

impl Netlink {
    /// The link of that name, or `None`.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        if check_name(name).is_err() {
            return Ok(None);
        }
        match self.one(get_link(name)).await {
            Ok(answers) => Ok(first_link(&answers)),
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every link of the namespace, by index.
    pub async fn links(&self) -> Result<Vec<Link>, KernelError> {
        let wanted = LinkMessageBuilder::<LinkUnspec>::default()
            .append_extra_attribute(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]))
            .build();
        let messages = self.dump("list interfaces", RouteNetlinkMessage::GetLink(wanted)).await?;
        let mut links: Vec<Link> = messages
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(Link::parse(link)),
                _ => None,
            })
            .collect();
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    /// The index of a link that must exist.
    pub async fn index(&self, name: &str) -> Result<u32, KernelError> {
        let link = self.link(name).await?.ok_or_else(|| KernelError::NoSuchLink { name: name.to_owned() })?;
        Ok(link.index)
    }

    /// Makes a veth pair, each end in its namespace from the start. Both ends are down.
    pub async fn veth(&self, a: &VethEnd<'_>, b: &VethEnd<'_>) -> Result<(), KernelError> {
        check_name(&a.name)?;
        check_name(&b.name)?;
        self.one(new_veth(a, b)).await.map(drop)
    }

    pub async fn set_up(&self, name: &str) -> Result<(), KernelError> {
        let index = self.index(name).await?;
        self.one(set_up(index, name)).await.map(drop)
    }

    pub async fn set_down(&self, name: &str) -> Result<(), KernelError> {
        let message = LinkUnspec::new_with_index(self.index(name).await?).down().build();
        self.set_link(format!("bring interface {name} down"), message).await
    }

    /// In bytes.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), KernelError> {
        let message = LinkUnspec::new_with_index(self.index(name).await?).mtu(mtu).build();
        self.set_link(format!("set the MTU of {name} to {mtu}"), message).await
    }

    /// Puts a link into an interface group.
    pub async fn set_group(&self, name: &str, group: u32) -> Result<(), KernelError> {
        let message = LinkUnspec::new_with_index(self.index(name).await?).link_group(group).build();
        self.set_link(format!("put interface {name} into group {group}"), message).await
    }

    /// Gives a link another name; most kernels want it down for that.
    pub async fn rename(&self, name: &str, new_name: &str) -> Result<(), KernelError> {
        check_name(new_name)?;
        let message = LinkUnspec::new_with_index(self.index(name).await?).name(new_name).build();
        self.set_link(format!("rename interface {name} to {new_name}"), message).await
    }

    /// Moves a link into another namespace; it loses its addresses and routes and is down there.
    pub async fn move_to(&self, name: &str, netns: &Netns) -> Result<(), KernelError> {
        let message = LinkUnspec::new_with_index(self.index(name).await?).setns_by_fd(netns.as_raw_fd()).build();
        self.set_link(format!("move interface {name} to {}", netns.path().display()), message).await
    }

    /// Deletes a link, a veth together with its other end; absent means done.
    pub async fn delete_link(&self, name: &str) -> Result<(), KernelError> {
        let Some(link) = self.link(name).await? else { return Ok(()) };
        match self.one(delete_link(link.index, name)).await {
            Err(e) if !e.is_absent() => Err(e),
            _ => Ok(()),
        }
    }

    async fn set_link(&self, operation: String, message: LinkMessage) -> Result<(), KernelError> {
        self.one(RouteRequest::new(operation, RouteNetlinkMessage::SetLink(message), 0)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_the_kernel_would_refuse_or_cut() {
        for good in ["eth0", "eni5f6d6b7710e", "a", "fifteen-bytes-x"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "sixteen-bytes-xx", "a/b", "a b", "a:1", "a\0b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
