//! One pod's wiring: made whole or not at all, and taken down whatever is left of it.
//!
//! Making it costs one message for the veth pair, whose pod end is born inside the pod's namespace, one datagram for the
//! pod side and one for the host side. Nothing is listed and nothing is executed. The pair alone can be made before the
//! address is known (`Pair`): it is down, and nothing leads to it.
//!
//! ```text
//! pod:  eth0 up, <pod>/32; 169.254.1.1/32 scope link; default via 169.254.1.1; neighbour 169.254.1.1 -> host end
//! host: eni… up;           <pod>/32 scope link, table main
//! ```
//!
//! An IPv6 address is wired the same way, with fe80::1 as the gateway, and a permanent neighbour on the host's end too. It is
//! used at once, without duplicate address detection: see `flatwire_core::families` for why it is unique.
//!
//! Invariant: a late DEL of a dead sandbox never touches the live one that now has its name or its address. Taking down
//! therefore asks, of the link and of each address, whether it is still this sandbox's (test
//! `a_late_del_leaves_the_next_sandbox_alone`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use flatwire_core::ids::{MacAddress, RouteTable};
use flatwire_core::netplan::priority;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use nix::errno::Errno;

pub use crate::check::{Expected, check};
pub use flatwire_core::naming::host_if_name;

use crate::address::{add_address, add_neighbour};
use crate::error::KernelError;
use crate::link::{
    Ipv6Settings, Link, POD_GROUP, VethEnd, check_name, delete_link, first_link, get_link, new_veth, set_up,
};
use crate::netlink::{Netlink, RouteRequest};
use crate::netns::{Netns, in_netns};
use crate::route::{Route, add_route, delete_route, first_route, match_route, replace_route};
use crate::rule::{Rule, add_rule, delete_rule_of};
use crate::sysctl;
use flatwire_core::naming::mac;

/// The add-on may have left several source rules for one address; more than this is somebody else's doing.
const MAX_RULES_PER_ADDRESS: u32 = 16;

/// What one interface of one pod shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodWiring {
    pub netns: PathBuf,
    /// Name inside the pod, CNI_IFNAME.
    pub pod_if: String,
    /// Name on the node, from `host_if_name`.
    pub host_if: String,
    /// In bytes.
    pub mtu: u32,
    pub address: IpAddr,
    /// Of the other family.
    pub second: Option<IpAddr>,
    /// Which interface of the pod this is: i gives the gateway 169.254.1.(i+1), and, above 0, routes in table i.
    pub gateway_index: u8,
    /// Identity of the sandbox; both MACs are derived from it.
    pub seed: String,
}

/// What is known of one interface of a pod before its address is.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'w> {
    pub pod_if: &'w str,
    pub host_if: &'w str,
    pub mtu: u32,
    pub seed: &'w str,
}

/// Both ends of a pod's interface as they are born: down, without an address, and no route leads there.
pub struct Pair {
    host: Netlink,
    link: Link,
}

/// The MACs of a wired pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wired {
    pub host_mac: MacAddress,
    pub pod_mac: MacAddress,
}

/// What is known of a pod's interface when it goes. All of it may be gone already, or belong to somebody else by now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodUnwiring {
    pub netns: Option<PathBuf>,
    pub pod_if: String,
    pub host_if: String,
    pub addresses: Vec<IpAddr>,
}

impl PodWiring {
    /// The MACs that `wire` gives.
    pub fn macs(&self) -> Wired {
        self.ends().macs()
    }

    pub fn ends(&self) -> Ends<'_> {
        Ends { pod_if: &self.pod_if, host_if: &self.host_if, mtu: self.mtu, seed: &self.seed }
    }

    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [self.address].into_iter().chain(self.second)
    }

    pub(crate) fn gateway(&self, address: IpAddr) -> IpAddr {
        gateway(address, self.gateway_index)
    }

    /// The table, in the pod, of this interface's routes.
    pub(crate) fn pod_table(&self) -> u32 {
        match self.gateway_index {
            0 => RouteTable::MAIN.0,
            further => u32::from(further),
        }
    }

    /// The rule, in the pod, that leads to `pod_table`; a pod's first interface needs none.
    pub(crate) fn pod_rule(&self, address: IpAddr) -> Option<Rule> {
        const BEFORE_MAIN: u32 = 1;
        (self.gateway_index > 0).then(|| Rule::lookup(BEFORE_MAIN, self.pod_table()).from(IpNet::from(address)))
    }

    fn check(&self) -> Result<(), KernelError> {
        let bad = |what, why| Err(KernelError::BadInput { what, why });
        for address in self.addresses() {
            if address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast(address) {
                return bad(format!("pod address {address}"), "it is not a unicast address of a network");
            }
        }
        match self.second {
            Some(second) if second.is_ipv6() == self.address.is_ipv6() => {
                bad(format!("second pod address {second}"), "it is of the same family as the first")
            }
            _ => Ok(()),
        }
    }
}

/// What a pod sends to from this address on its interface `index`: link-local, the same for every pod, answered by nobody but
/// the neighbour entry.
pub fn gateway(address: IpAddr, index: u8) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(169, 254, 1, index.saturating_add(1))),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, u16::from(index) + 1)),
    }
}

impl Ends<'_> {
    fn macs(&self) -> Wired {
        Wired { host_mac: mac(self.seed, "host"), pod_mac: mac(self.seed, "pod") }
    }
}

fn is_broadcast(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// Wires a pod. If any step fails, what was made is removed before the error returns. Needs a tokio runtime with I/O and
/// time enabled.
pub async fn wire(wiring: &PodWiring) -> Result<Wired, KernelError> {
    let netns = Netns::open(&wiring.netns)?;
    if netns.is_own()? {
        return Err(KernelError::BadInput {
            what: format!("network namespace {}", wiring.netns.display()),
            why: "it is the node's own",
        });
    }
    let pod = Netlink::in_namespace(&netns)?;
    wire_in(wiring, &netns, &pod, None).await
}

/// As `wire`, for a caller who has the pod's namespace open, knows it not to be the node's own, and has a connection to it;
/// and perhaps the pair already, made of the same `ends`.
pub async fn wire_in(
    wiring: &PodWiring,
    netns: &Netns,
    pod: &Netlink,
    pair: Option<Pair>,
) -> Result<Wired, KernelError> {
    let pair = match (wiring.check(), pair) {
        (Ok(()), Some(pair)) => Ok(pair),
        (Ok(()), None) => Pair::make_with_room(pod, wiring, netns).await,
        (Err(error), pair) => Err(remove_after(error, pair).await),
    }?;
    match configure(&pair, pod, wiring, netns).await {
        Ok(()) => Ok(wiring.macs()),
        Err(error) => Err(remove_after(error, Some(pair)).await),
    }
}

/// The first error is the one to tell.
async fn remove_after(error: KernelError, pair: Option<Pair>) -> KernelError {
    if let Some(pair) = pair {
        let _ = pair.remove().await;
    }
    error
}

impl Pair {
    /// Nothing is removed to make room for it: a name that is taken is an error.
    pub async fn make(ends: &Ends<'_>, netns: &Netns) -> Result<Self, KernelError> {
        check_name(ends.pod_if)?;
        check_name(ends.host_if)?;
        let host = Netlink::open()?;
        let link = create(&host, ends, netns).await?;
        let pair = Self { host, link };
        match refuse_advertisements(&pair.link) {
            Ok(()) => Ok(pair),
            Err(error) => Err(remove_after(error, Some(pair)).await),
        }
    }

    async fn make_with_room(pod: &Netlink, wiring: &PodWiring, netns: &Netns) -> Result<Self, KernelError> {
        match Self::make(&wiring.ends(), netns).await {
            Err(e) if e.errno() == Some(Errno::EEXIST) => {
                make_room(&Netlink::open()?, pod, wiring).await?;
                Self::make(&wiring.ends(), netns).await
            }
            made => made,
        }
    }

    /// With a link go its other end, its addresses and every route.
    pub async fn remove(self) -> Result<(), KernelError> {
        self.host.one(delete_link(self.link.index, &self.link.name)).await.map(drop)
    }
}

/// Makes the pair and returns its host end.
async fn create(host: &Netlink, ends: &Ends<'_>, netns: &Netns) -> Result<Link, KernelError> {
    let macs = ends.macs();
    let host_end = VethEnd::new(ends.host_if).mac(macs.host_mac).mtu(ends.mtu).group(POD_GROUP);
    let pod_end = VethEnd::new(ends.pod_if).mac(macs.pod_mac).mtu(ends.mtu).in_netns(netns);
    let answers = host.all(vec![new_veth(&host_end, &pod_end), get_link(ends.host_if)]).await?;
    let link = answers.last().and_then(|messages| first_link(messages));
    link.ok_or_else(|| KernelError::NoSuchLink { name: ends.host_if.to_owned() })
}

/// Before the link is up, or the kernel would already have listened to a pod's router advertisements. The link says itself
/// what it was born with, and mostly that is right: files are opened for what is not.
fn refuse_advertisements(link: &Link) -> Result<(), KernelError> {
    let born = |setting: fn(&Ipv6Settings) -> i32| link.ipv6.as_ref().map(setting);
    let wanted = [
        ("accept_ra", born(|ipv6| ipv6.accept_ra), 0),
        ("accept_redirects", born(|ipv6| ipv6.accept_redirects), 1),
        ("forwarding", born(|ipv6| ipv6.forwarding), 0),
    ];
    for (name, _, value) in wanted.iter().filter(|(_, born, value)| *born != Some(*value)) {
        sysctl::set(&format!("net/ipv6/conf/{}/{name}", link.name), &value.to_string())?;
    }
    Ok(())
}

/// One of the two names is taken. A veth of our host name that leads into another namespace is left from an earlier
/// sandbox of the same pod, and goes; anything else stays, and is named.
async fn make_room(host: &Netlink, pod: &Netlink, wiring: &PodWiring) -> Result<(), KernelError> {
    if pod.link(&wiring.pod_if).await?.is_some() {
        return Err(KernelError::PodInterfaceTaken { name: wiring.pod_if.clone(), netns: wiring.netns.clone() });
    }
    let Some(link) = host.link(&wiring.host_if).await? else { return Ok(()) };
    if link.is_veth() && link.peer_netns.is_some() {
        return host.delete_link(&wiring.host_if).await;
    }
    let kind = match &link.kind {
        Some(kind) if link.is_veth() => format!("{kind} with both ends on the node"),
        Some(kind) => kind.clone(),
        None => "a device".to_owned(),
    };
    Err(KernelError::HostInterfaceTaken { name: wiring.host_if.clone(), kind })
}

async fn configure(pair: &Pair, pod: &Netlink, wiring: &PodWiring, netns: &Netns) -> Result<(), KernelError> {
    let Pair { host, link } = pair;
    let pod_link = link.peer.ok_or_else(|| KernelError::NoSuchLink { name: wiring.pod_if.clone() })?;
    if wiring.addresses().any(|address| address.is_ipv6()) {
        enable_ipv6(netns, &wiring.pod_if)?;
    }
    exchange(host, pod, wiring, link.index, pod_link).await
}

/// The messages behind the one that makes the pair.
async fn exchange(
    host: &Netlink,
    pod: &Netlink,
    wiring: &PodWiring,
    link: u32,
    pod_link: u32,
) -> Result<(), KernelError> {
    pod.all(pod_side(wiring, pod_link)).await?;
    let mut requests = vec![set_up(link, &wiring.host_if)];
    for address in wiring.addresses() {
        requests.push(replace_route(&Route::to_host(address).link(link)));
        if address.is_ipv6() {
            // To ask for it, the node would need an address on this link, and would first wait for that to be proven unique.
            requests.push(add_neighbour(link, &wiring.host_if, address, wiring.macs().pod_mac));
        }
    }
    host.all(requests).await?;
    // The end that came up first, without a carrier, sends nothing until the kernel's link watch has run, up to a second
    // later. Asking for the link makes it run at once (kernels from 6.8 on), so that no first packet is lost.
    pod.one(get_link(&wiring.pod_if)).await?;
    Ok(())
}

/// The netlink messages of `wire` and nothing else, over connections that stand: the floor that wiring is measured against.
pub async fn wire_bare(host: &Netlink, pod: &Netlink, wiring: &PodWiring, netns: &Netns) -> Result<(), KernelError> {
    let link = create(host, &wiring.ends(), netns).await?;
    let pod_link = link.peer.ok_or_else(|| KernelError::NoSuchLink { name: wiring.pod_if.clone() })?;
    exchange(host, pod, wiring, link.index, pod_link).await
}

fn pod_side(wiring: &PodWiring, link: u32) -> Vec<RouteRequest> {
    let table = wiring.pod_table();
    let mut requests = vec![set_up(link, &wiring.pod_if)];
    for address in wiring.addresses() {
        let gateway = wiring.gateway(address);
        requests.extend([
            add_address(link, &wiring.pod_if, IpNet::from(address), true),
            add_route(&Route::to_host(gateway).table(table).link(link)),
            add_route(&Route::default_via(gateway).table(table).link(link)),
        ]);
        requests.extend(wiring.pod_rule(address).map(|rule| add_rule(&rule)));
        requests.push(add_neighbour(link, &wiring.pod_if, gateway, wiring.macs().host_mac));
    }
    requests
}

/// Runtimes may start a sandbox with IPv6 switched off.
fn enable_ipv6(netns: &Netns, pod_if: &str) -> Result<(), KernelError> {
    let keys = [format!("net/ipv6/conf/{pod_if}/disable_ipv6"), "net/ipv6/conf/lo/disable_ipv6".to_owned()];
    in_netns(netns, || Ok(keys.iter().try_for_each(|key| sysctl::set(key, "0").map(drop))))
        .map_err(|source| KernelError::Netns { operation: "enter", path: netns.path().to_owned(), source })?
}

/// Takes down what is left of a pod's wiring. Absent means done; every step is tried, and all errors are told.
pub async fn unwire(unwiring: &PodUnwiring) -> Result<(), KernelError> {
    let netns = match unwiring.netns.as_ref().map(Netns::open) {
        Some(Err(e)) if !e.is_absent() => return Err(e),
        opened => opened.and_then(Result::ok),
    };
    let host = Netlink::open()?;
    let found = look(&host, unwiring, netns.as_ref()).await?;

    let mut requests = Vec::new();
    for address in &found.ours {
        if let Some(link) = &found.link {
            requests.push(delete_route(&Route::to_host(*address).link(link.index)));
        }
        // Left by the add-on where this pod is older than the take-over.
        requests.push(delete_rule_of(priority::TO_PODS, None, Some(*address)));
        requests.push(delete_rule_of(priority::FROM_PODS, Some(*address), None));
    }
    requests.extend(found.link.as_ref().map(|link| delete_link(link.index, &link.name)));

    let mut errors = Vec::new();
    if !requests.is_empty() {
        let outcomes = host.batch(requests).await?;
        errors.extend(outcomes.into_iter().filter_map(Result::err).filter(|e| !e.is_absent()));
    }
    for address in &found.ours {
        if let Err(e) = delete_further_rules(&host, *address).await {
            errors.push(e);
        }
    }
    if let (None, Some(netns)) = (&found.link, &netns)
        && let Err(e) = delete_pod_end(netns, unwiring).await
    {
        errors.push(e);
    }
    KernelError::collect(format!("take down interface {} of a pod", unwiring.host_if), errors)
}

/// What of the wiring is there and is this sandbox's.
struct Found {
    link: Option<Link>,
    /// Addresses that no other link holds.
    ours: Vec<IpAddr>,
}

async fn look(host: &Netlink, unwiring: &PodUnwiring, netns: Option<&Netns>) -> Result<Found, KernelError> {
    let mut requests = Vec::new();
    requests.push(get_link(&unwiring.host_if));
    requests.push(get_nsid(netns));
    requests.extend(unwiring.addresses.iter().map(|address| match_route(*address)));
    let mut outcomes = host.batch(requests).await?.into_iter();
    let named = match outcomes.next().unwrap_or_else(|| Ok(Vec::new())) {
        Err(e) if !e.is_absent() => return Err(e),
        answers => first_link(&answers.unwrap_or_default()).filter(Link::is_veth),
    };
    // A namespace without a number and an address without a route are both answered with an error, which means absent.
    let mut answers = Vec::new();
    for outcome in outcomes {
        answers.push(match outcome {
            Err(e) if is_no_answer(&e) => return Err(e),
            answer => answer.unwrap_or_default(),
        });
    }
    let mut answers = answers.into_iter();
    let mut answer = || answers.next().unwrap_or_default();
    let nsid = parse_nsid(&answer()).filter(|_| netns.is_some());
    // Only a route to this very address counts, and not the default route.
    let routes: Vec<(IpAddr, Option<u32>)> = unwiring
        .addresses
        .iter()
        .map(|address| {
            let route = first_route(&answer()).filter(|route| route.destination == IpNet::from(*address));
            (*address, route.and_then(|route| route.link))
        })
        .collect();

    // The name alone proves nothing: the pod's next sandbox has the same.
    let link = named.filter(|link| {
        let into_our_namespace = nsid.is_some() && link.peer_netns == nsid;
        into_our_namespace || routes.iter().any(|(_, by)| *by == Some(link.index))
    });
    let index = link.as_ref().map(|link| link.index);
    let ours = routes.iter().filter(|(_, by)| by.is_none() || *by == index).map(|(address, _)| *address).collect();
    Ok(Found { link, ours })
}

/// Asks for the number by which the host's namespace knows another one.
fn get_nsid(netns: Option<&Netns>) -> RouteRequest {
    let mut message = NsidMessage::default();
    let fd = netns.and_then(|netns| u32::try_from(netns.as_raw_fd()).ok());
    message.attributes.extend(fd.map(NsidAttribute::Fd));
    RouteRequest::new("look up the namespace's number", RouteNetlinkMessage::GetNsId(message), 0)
}

fn parse_nsid(messages: &[RouteNetlinkMessage]) -> Option<i32> {
    messages.iter().find_map(|message| match message {
        RouteNetlinkMessage::NewNsId(message) => message.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) if *id >= 0 => Some(*id),
            _ => None,
        }),
        _ => None,
    })
}

async fn delete_further_rules(host: &Netlink, address: IpAddr) -> Result<(), KernelError> {
    for _ in 0..MAX_RULES_PER_ADDRESS {
        match host.one(delete_rule_of(priority::FROM_PODS, Some(address), None)).await {
            Ok(_) => {}
            Err(e) if e.is_absent() => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The kernel did not say what is so; anything else it says here means that there is none.
fn is_no_answer(error: &KernelError) -> bool {
    let passing =
        [Errno::EPERM, Errno::EACCES, Errno::ENOBUFS, Errno::ENOMEM, Errno::EINTR, Errno::EAGAIN, Errno::EBUSY];
    !error.is_absent() && error.errno().is_none_or(|errno| passing.contains(&errno))
}

/// The host end is not where its name says, but the pod may still have its own.
async fn delete_pod_end(netns: &Netns, unwiring: &PodUnwiring) -> Result<(), KernelError> {
    let pod = Netlink::in_namespace(netns)?;
    let Some(link) = pod.link(&unwiring.pod_if).await?.filter(Link::is_veth) else { return Ok(()) };
    // A path such as /proc/PID/ns/net may lead to another pod by now, whose interface has the same name.
    let held = pod.addresses().await?;
    let is_ours = |address: &IpAddr| held.iter().any(|a| a.link == link.index && a.address.addr() == *address);
    if unwiring.addresses.is_empty() || unwiring.addresses.iter().any(is_ours) {
        pod.delete_link(&unwiring.pod_if).await?;
    }
    Ok(())
}
