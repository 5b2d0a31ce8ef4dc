//! The VPC as namespaces and routes: one router per VPC, one cable per attached ENI, and exactly the routes that EC2's
//! state implies.
//!
//! `plan` says, from a view of EC2 and nothing else, what should be there; `Fabric::follow` makes it so by the
//! difference to what it made before. A router forwards to an address only while EC2 has it assigned to an ENI whose
//! link is there, and takes from an ENI only what carries a source assigned to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use flatwire_core::ids::{EniId, InstanceId, MacAddress, RouteTable, VpcId};
use flatwire_kernel::{Netlink, Netns, Route, VethEnd};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lab_ec2::{EniInfo, InstanceState, SubnetInfo, View, VpcView};

use crate::error::{Error, Result};
use crate::firewall::{self, Firewall};
use crate::guard::Guard;
use crate::ns::{Place, has_ipv6, sysctl};

/// Inside a VPC packets may be this large; on the way to the internet only `EDGE_MTU`.
pub const VPC_MTU: u32 = 9001;
pub const EDGE_MTU: u32 = 1500;

/// The instance metadata service, where EC2 has it.
pub const IMDS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The EC2 API inside every VPC; on AWS this would be a VPC endpoint.
pub const EC2_INSIDE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 250);
/// A server on the internet (TEST-NET-1, RFC 5737; the other two hold the account's public addresses).
pub const INTERNET_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// The same server over IPv6 (RFC 9637; the account's own IPv6 is of RFC 3849's range).
pub const INTERNET_SERVER6: Ipv6Addr = Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0x10);
/// The VPC's router on every ENI's link, as EC2 has it.
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0xec2, 0, 0, 0, 0, 0, 1);

/// The two ends of a link between routers.
const TRANSIT: [Far; 2] = [
    Far { ipv4: Ipv4Addr::new(169, 254, 255, 1), mac: MacAddress([0x02, 0, 0, 0, 0xff, 1]) },
    Far { ipv4: Ipv4Addr::new(169, 254, 255, 2), mac: MacAddress([0x02, 0, 0, 0, 0xff, 2]) },
];

/// The protocol numbers of routes that a DHCP client makes (RTPROT_DHCP), and that a router advertises (RTPROT_RA).
const DHCP: u8 = 16;
const ADVERTISED: u8 = 9;

const EDGE_LINK: &str = "igw";
const MAIN: u32 = RouteTable::MAIN.0;
const ANYWHERE: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0));
const ANYWHERE6: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0));
/// Of IPv4; what is local to a link in IPv6 no kernel forwards.
const LINK_LOCAL: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16));

/// What the fabric should look like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub routers: BTreeMap<VpcId, RouterPlan>,
    /// What the internet can reach, each with the VPC it leads to: public addresses, and blocks of IPv6.
    pub public: BTreeMap<IpNet, VpcId>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouterPlan {
    /// Addresses the router answers to itself: the gateway of each subnet, IMDS, the API.
    pub own: BTreeSet<IpAddr>,
    pub ports: BTreeMap<EniId, Port>,
    /// What a machine sets on its primary ENI when the link comes. Other ENIs appear bare.
    pub leases: BTreeMap<EniId, Lease>,
    /// Links to peered VPCs.
    pub peers: BTreeSet<VpcId>,
    pub edge: bool,
    pub routes: BTreeMap<IpNet, Hop>,
    pub firewall: Firewall,
}

/// One ENI as the router has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub instance: InstanceId,
    pub mac: MacAddress,
    pub primary: Ipv4Addr,
    /// Name of the link in the guest.
    pub guest_link: String,
}

/// What DHCP says, and DHCPv6 and the router's advertisement where the subnet has IPv6.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub addresses: Vec<IpNet>,
    /// Of the default routes.
    pub gateways: Vec<IpAddr>,
}

/// The far end of a cable, as routes name it. It is a permanent neighbour by both of its addresses: nobody ever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Far {
    ipv4: Ipv4Addr,
    mac: MacAddress,
}

impl Far {
    /// Its address for routes to such a destination.
    fn towards(self, destination: IpNet) -> IpAddr {
        match destination {
            IpNet::V4(_) => self.ipv4.into(),
            IpNet::V6(_) => link_local(self.mac).into(),
        }
    }

    async fn is_neighbour(self, net: &Netlink, link: &str) -> Result<()> {
        net.neighbour(link, self.ipv4.into(), self.mac).await?;
        if has_ipv6() {
            net.neighbour(link, link_local(self.mac).into(), self.mac).await?;
        }
        Ok(())
    }
}

/// The address that a link gives itself (RFC 4291, appendix A).
fn link_local(mac: MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

impl Port {
    fn far(&self) -> Far {
        Far { ipv4: self.primary, mac: self.mac }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hop {
    Eni(EniId),
    Peer(VpcId),
    Internet,
    Nowhere,
}

/// The fabric that EC2's state implies at the moment of the view.
pub fn plan(view: &View) -> Plan {
    let mut plan = Plan::default();
    for vpc in &view.vpcs {
        let mut router = RouterPlan { edge: vpc.internet_gateway, ..RouterPlan::default() };
        let outside = if vpc.internet_gateway { Hop::Internet } else { Hop::Nowhere };
        router.own.extend([IMDS, EC2_INSIDE].map(IpAddr::from));
        router.routes.insert(LINK_LOCAL, Hop::Nowhere);
        router.routes.insert(ANYWHERE, outside.clone());
        if let Some(block) = vpc.ipv6 {
            router.routes.insert(ANYWHERE6, outside);
            plan.public.extend(router.edge.then(|| (block.into(), vpc.id.clone())));
        }
        router.routes.extend(vpc.nets().map(|net| (net, Hop::Nowhere)));
        plan.routers.insert(vpc.id.clone(), router);
    }
    for subnet in &view.subnets {
        if let Some(router) = plan.routers.get_mut(&subnet.vpc) {
            router.own.insert(gateway(subnet.cidr).into());
            router.own.extend(subnet.ipv6.map(|net| IpAddr::from(first(net))));
        }
    }
    for (a, b) in &view.peerings {
        for (near, far) in [(a, b), (b, a)] {
            let nets = view.vpcs.iter().filter(|vpc| vpc.id == *far).flat_map(VpcView::nets);
            if let Some(router) = plan.routers.get_mut(near) {
                router.peers.insert(far.clone());
                router.routes.extend(nets.map(|net| (net, Hop::Peer(far.clone()))));
            }
        }
    }
    for eni in view.enis.iter().filter(|eni| eni.link_is_up(view.now) && is_plugged_in(view, eni)) {
        connect(&mut plan, view, eni);
    }
    for (id, router) in &mut plan.routers {
        let peers: Vec<_> = router.peers.iter().map(|peer| (peer_link(peer), peer.to_string())).collect();
        router.firewall.checked.extend(peers);
        router.firewall.edge = router.edge.then(|| EDGE_LINK.to_owned());
        plan.public.extend(router.firewall.public.values().map(|public| (IpAddr::from(*public).into(), id.clone())));
    }
    plan
}

/// A machine on its way out has no links any more, although its ENIs stay attached for a while.
fn is_plugged_in(view: &View, eni: &EniInfo) -> bool {
    let instance = eni.attachment.as_ref().and_then(|attachment| view.instance(&attachment.instance));
    instance.is_some_and(|instance| matches!(instance.state, InstanceState::Pending | InstanceState::Running))
}

fn connect(plan: &mut Plan, view: &View, eni: &EniInfo) {
    let (Some(router), Some(attachment), Some(subnet)) =
        (plan.routers.get_mut(&eni.vpc), eni.attachment.as_ref(), view.subnet(&eni.subnet))
    else {
        return;
    };
    if attachment.card == 0 && attachment.device.0 == 0 {
        router.leases.insert(eni.id.clone(), lease(eni, subnet));
    }
    router.ports.insert(
        eni.id.clone(),
        Port {
            instance: attachment.instance.clone(),
            mac: eni.mac,
            primary: eni.primary_ipv4,
            guest_link: match attachment.card {
                0 => format!("eth{}", attachment.device),
                card => format!("eth{card}{:02}", attachment.device.0),
            },
        },
    );
    router.routes.extend(eni.nets().map(|net| (net, Hop::Eni(eni.id.clone()))));
    if eni.source_dest_check {
        router.firewall.checked.insert(port_link(&eni.id), eni.id.to_string());
    }
    router.firewall.guards.insert(port_link(&eni.id), Guard::of(view, eni));
    if router.edge {
        router.firewall.public.extend(&eni.public);
    }
}

/// IPv6 is leased one address at a time; what else is of the subnet is reached through the router, too.
fn lease(eni: &EniInfo, subnet: &SubnetInfo) -> Lease {
    let mut lease = Lease {
        addresses: vec![Ipv4Net::new_assert(eni.primary_ipv4, subnet.cidr.prefix_len()).into()],
        gateways: vec![gateway(subnet.cidr).into()],
    };
    if subnet.ipv6.is_some() {
        lease.addresses.extend(eni.ipv6.first().map(|address| IpNet::from(IpAddr::from(*address))));
        lease.gateways.push(ROUTER6.into());
    }
    lease
}

/// The VPC's own address on a subnet: base + 1.
pub fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).wrapping_add(1))
}

/// The router's address in an IPv6 subnet, by which its ICMPv6 errors are sent.
fn first(subnet: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(subnet.network()).wrapping_add(1))
}

/// Link names carry the end of an id: a name has 15 bytes, and the end is the random part.
fn short(kind: &str, id: &str) -> String {
    let tail: Vec<char> = id.chars().rev().take(15 - kind.len()).collect();
    kind.chars().chain(tail.into_iter().rev()).collect()
}

fn port_link(eni: &EniId) -> String {
    short("eni-", eni.as_str())
}

fn peer_link(vpc: &VpcId) -> String {
    short("pcx-", vpc.as_str())
}

fn vpc_link(vpc: &VpcId) -> String {
    short("vpc-", vpc.as_str())
}

/// The machine behind an instance: where its links go.
#[derive(Clone)]
pub struct Guest {
    pub place: Place,
    pub net: Arc<Netlink>,
}

impl Guest {
    /// Speaks with the place's own kernel, and brings its loopback up.
    pub async fn at(place: Place) -> Result<Self> {
        let net = Netlink::in_namespace(&place.netns()?)?;
        net.set_up("lo").await?;
        Ok(Self { place, net: Arc::new(net) })
    }
}

/// The fabric as it stands.
pub struct Fabric {
    routers: BTreeMap<VpcId, Router>,
    internet: Guest,
    public: BTreeMap<IpNet, VpcId>,
}

struct Router {
    place: Place,
    net: Netlink,
    own: BTreeSet<IpAddr>,
    ports: BTreeMap<EniId, Port>,
    /// Each peered VPC, with the far end of the link to it.
    peers: BTreeMap<VpcId, Far>,
    edge: bool,
    routes: BTreeMap<IpNet, Hop>,
    firewall: Option<Firewall>,
    /// What earlier rule sets counted: replacing the rules starts their counters anew.
    counted: BTreeMap<String, u64>,
}

impl Fabric {
    pub async fn new() -> Result<Self> {
        let place = Place::new()?;
        place.publish("internet")?;
        let internet = Guest::at(place).await?;
        internet.net.address("lo", IpAddr::from(INTERNET_SERVER).into()).await?;
        if has_ipv6() {
            internet.net.address("lo", IpAddr::from(INTERNET_SERVER6).into()).await?;
        }
        Ok(Self { routers: BTreeMap::new(), internet, public: BTreeMap::new() })
    }

    pub fn internet(&self) -> &Place {
        &self.internet.place
    }

    pub fn router(&self, vpc: &VpcId) -> Option<&Place> {
        self.routers.get(vpc).map(|router| &router.place)
    }

    pub fn routers(&self) -> impl Iterator<Item = (&VpcId, &Place)> {
        self.routers.iter().map(|(vpc, router)| (vpc, &router.place))
    }

    /// True where the ENI's cable is laid.
    pub fn is_connected(&self, eni: &EniId) -> bool {
        self.routers.values().any(|router| router.ports.contains_key(eni))
    }

    /// Name of the ENI's link on its machine, once it has appeared.
    pub fn guest_link(&self, eni: &EniId) -> Option<String> {
        self.routers.values().find_map(|router| router.ports.get(eni)).map(|port| port.guest_link.clone())
    }

    /// Makes the fabric what the plan says. What cannot be done is reported at the end and tried again by the next
    /// call; everything else is done all the same. Ports of guests that are not there are left for later.
    pub async fn follow(&mut self, plan: &Plan, guests: &BTreeMap<InstanceId, Guest>) -> Vec<Error> {
        let mut errors = Vec::new();
        let gone: Vec<VpcId> = self.routers.keys().filter(|vpc| !plan.routers.contains_key(vpc)).cloned().collect();
        for vpc in gone {
            self.routers.remove(&vpc);
            errors.extend(Place::unpublish(vpc.as_str()).err());
        }
        for vpc in plan.routers.keys() {
            if !self.routers.contains_key(vpc) {
                match Router::new(vpc).await {
                    Ok(router) => drop(self.routers.insert(vpc.clone(), router)),
                    Err(error) => errors.push(error),
                }
            }
        }
        if let Err(error) = self.join_routers(plan).await {
            errors.push(error);
        }
        for (vpc, wanted) in &plan.routers {
            if let Some(router) = self.routers.get_mut(vpc) {
                router.follow(wanted, guests, &mut errors).await;
            }
        }
        if let Err(error) = self.publish_addresses(&plan.public).await {
            errors.push(error);
        }
        errors
    }

    /// Packets dropped so far, by ENI id, peer, `unassigned`, `no-public` and `denied`.
    pub fn drops(&self, vpc: &VpcId) -> Result<BTreeMap<String, u64>> {
        let Some(router) = self.routers.get(vpc) else { return Ok(BTreeMap::new()) };
        let mut total = router.counted.clone();
        if router.firewall.is_some() {
            for (name, count) in firewall::counters(&router.place)? {
                *total.entry(name).or_default() += count;
            }
        }
        Ok(total)
    }

    /// Lays and removes the links between peered routers, and to the internet.
    async fn join_routers(&mut self, plan: &Plan) -> Result<()> {
        for (vpc, wanted) in &plan.routers {
            let Some(router) = self.routers.get_mut(vpc) else { continue };
            let unpeered: Vec<VpcId> =
                router.peers.keys().filter(|peer| !wanted.peers.contains(peer)).cloned().collect();
            for peer in unpeered {
                // One removal takes both ends.
                router.net.delete_link(&peer_link(&peer)).await?;
                router.peers.remove(&peer);
                router.routes.retain(|_, hop| *hop != Hop::Peer(peer.clone()));
            }
            if wanted.edge && !router.edge {
                let name = vpc_link(vpc);
                let internet = &self.internet;
                join(&router.net, EDGE_LINK, &internet.net, &internet.place.netns()?, &name, EDGE_MTU).await?;
                router.edge = true;
            }
            if !wanted.edge && router.edge {
                router.net.delete_link(EDGE_LINK).await?;
                router.edge = false;
                router.routes.retain(|_, hop| *hop != Hop::Internet);
            }
            for peer in wanted.peers.iter().filter(|peer| *peer > vpc) {
                self.peer(vpc, peer).await?;
            }
        }
        Ok(())
    }

    async fn peer(&mut self, a: &VpcId, b: &VpcId) -> Result<()> {
        let (Some(near), Some(far)) = (self.routers.get(a), self.routers.get(b)) else { return Ok(()) };
        if near.peers.contains_key(b) {
            return Ok(());
        }
        join(&near.net, &peer_link(b), &far.net, &far.place.netns()?, &peer_link(a), VPC_MTU).await?;
        for (vpc, peer, far) in [(a, b, TRANSIT[1]), (b, a, TRANSIT[0])] {
            if let Some(router) = self.routers.get_mut(vpc) {
                router.peers.insert(peer.clone(), far);
            }
        }
        Ok(())
    }

    async fn publish_addresses(&mut self, wanted: &BTreeMap<IpNet, VpcId>) -> Result<()> {
        let net = &self.internet.net;
        let stale: Vec<_> = self.public.iter().filter(|(a, vpc)| wanted.get(a) != Some(vpc)).map(|(a, _)| *a).collect();
        for address in stale {
            net.delete_route(address, MAIN).await?;
            self.public.remove(&address);
        }
        for (address, vpc) in wanted {
            if !self.public.contains_key(address) {
                let back = Route::to(*address).via(TRANSIT[0].towards(*address)).onlink();
                net.route(&vpc_link(vpc), &back).await?;
                self.public.insert(*address, vpc.clone());
            }
        }
        Ok(())
    }
}

/// Lays a cable between two routers. Both ends know each other for good, so nobody ever asks.
async fn join(
    near: &Netlink,
    near_name: &str,
    far: &Netlink,
    far_netns: &Netns,
    far_name: &str,
    mtu: u32,
) -> Result<()> {
    // What an earlier attempt left half done.
    near.delete_link(near_name).await?;
    let [first, second] = TRANSIT;
    let here = VethEnd::new(near_name).mac(first.mac).mtu(mtu);
    let there = VethEnd::new(far_name).mac(second.mac).mtu(mtu).in_netns(far_netns);
    near.veth(&here, &there).await?;
    for (net, name, other) in [(near, near_name, second), (far, far_name, first)] {
        net.set_up(name).await?;
        other.is_neighbour(net, name).await?;
    }
    Ok(())
}

impl Router {
    async fn new(vpc: &VpcId) -> Result<Self> {
        let place = Place::new()?;
        place.run(|| {
            for (key, value) in [
                ("net/ipv4/ip_forward", "1"),
                // The source check is nftables', which counts per ENI.
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv4/conf/all/send_redirects", "0"),
                ("net/ipv4/conf/default/send_redirects", "0"),
                // A VPC answers for every address it knows.
                ("net/ipv4/conf/default/proxy_arp", "1"),
                ("net/ipv6/conf/all/forwarding", "1"),
                // Its links have the addresses that are set below and no others, and those without delay.
                ("net/ipv6/conf/default/addr_gen_mode", "1"),
                ("net/ipv6/conf/default/accept_dad", "0"),
            ] {
                if has_ipv6() || !key.starts_with("net/ipv6") {
                    sysctl(key, value)?;
                }
            }
            Ok::<(), Error>(())
        })??;
        place.publish(vpc.as_str())?;
        let net = Netlink::in_namespace(&place.netns()?)?;
        net.set_up("lo").await?;
        Ok(Self {
            place,
            net,
            own: BTreeSet::new(),
            ports: BTreeMap::new(),
            peers: BTreeMap::new(),
            edge: false,
            routes: BTreeMap::new(),
            firewall: None,
            counted: BTreeMap::new(),
        })
    }

    /// Routes that are to go go first, so that nothing leads to a cable about to be cut; the rules stand before a new
    /// cable carries anything; routes come last.
    async fn follow(&mut self, wanted: &RouterPlan, guests: &BTreeMap<InstanceId, Guest>, errors: &mut Vec<Error>) {
        let mut keep = |result: Result<()>| errors.extend(result.err());
        keep(self.follow_own(&wanted.own).await);
        let stale: Vec<IpNet> = self.routes.keys().filter(|net| !wanted.routes.contains_key(net)).copied().collect();
        for net in stale {
            keep(self.remove_route(net).await);
        }
        let unplugged: Vec<EniId> = (self.ports.iter())
            .filter(|(eni, port)| wanted.ports.get(*eni) != Some(*port))
            .map(|(eni, _)| eni.clone())
            .collect();
        for eni in unplugged {
            keep(self.unplug(&eni).await);
        }
        keep(self.follow_firewall(&wanted.firewall));
        for (eni, port) in &wanted.ports {
            if !self.ports.contains_key(eni)
                && let Some(guest) = guests.get(&port.instance)
            {
                keep(self.plug(eni, port, wanted.leases.get(eni), guest).await);
            }
        }
        for (net, hop) in &wanted.routes {
            if self.routes.get(net) != Some(hop) {
                keep(self.add_route(*net, hop).await);
            }
        }
    }

    async fn follow_own(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<()> {
        for address in self.own.difference(wanted) {
            self.net.remove_address("lo", (*address).into()).await?;
        }
        for address in wanted.difference(&self.own) {
            self.net.address("lo", (*address).into()).await?;
        }
        self.own = wanted.clone();
        Ok(())
    }

    fn follow_firewall(&mut self, wanted: &Firewall) -> Result<()> {
        if self.firewall.as_ref() == Some(wanted) {
            return Ok(());
        }
        let so_far = if self.firewall.is_some() { firewall::counters(&self.place)? } else { BTreeMap::new() };
        wanted.install(&self.place)?;
        for (name, count) in so_far {
            *self.counted.entry(name).or_default() += count;
        }
        self.firewall = Some(wanted.clone());
        Ok(())
    }

    async fn plug(&mut self, eni: &EniId, port: &Port, lease: Option<&Lease>, guest: &Guest) -> Result<()> {
        let name = port_link(eni);
        // The router's end has the ENI's address with one bit turned: unlike any ENI's, like on every run.
        let mut mac = port.mac;
        mac.0[1] ^= 0x80;
        // What an earlier attempt left half done.
        self.net.delete_link(&name).await?;
        let netns = guest.place.netns()?;
        let here = VethEnd::new(&name).mac(mac).mtu(VPC_MTU);
        let there = VethEnd::new(&port.guest_link).mac(port.mac).mtu(VPC_MTU).in_netns(&netns);
        self.net.veth(&here, &there).await?;
        self.net.set_up(&name).await?;
        // Answer for others at once: a VPC has no reason to wait.
        self.place.run(|| sysctl(&format!("net/ipv4/neigh/{name}/proxy_delay"), "0"))??;
        port.far().is_neighbour(&self.net, &name).await?;
        if has_ipv6() {
            self.net.address(&name, IpAddr::from(ROUTER6).into()).await?;
        }
        if let Some(lease) = lease {
            guest.net.set_up(&port.guest_link).await?;
            for address in &lease.addresses {
                guest.net.address(&port.guest_link, *address).await?;
            }
            for gateway in &lease.gateways {
                let protocol = if gateway.is_ipv4() { DHCP } else { ADVERTISED };
                guest.net.route(&port.guest_link, &Route::default_via(*gateway).protocol(protocol)).await?;
            }
        }
        self.ports.insert(eni.clone(), port.clone());
        Ok(())
    }

    async fn unplug(&mut self, eni: &EniId) -> Result<()> {
        self.net.delete_link(&port_link(eni)).await?;
        self.ports.remove(eni);
        // The kernel dropped the routes with the link.
        self.routes.retain(|_, hop| !matches!(hop, Hop::Eni(to) if to == eni));
        Ok(())
    }

    /// The link and the neighbour a hop stands for; `None` while its link is not there.
    fn via(&self, hop: &Hop) -> Option<(String, Far)> {
        match hop {
            Hop::Nowhere => None,
            Hop::Eni(eni) => self.ports.get(eni).map(|port| (port_link(eni), port.far())),
            Hop::Internet => self.edge.then(|| (EDGE_LINK.to_owned(), TRANSIT[1])),
            Hop::Peer(peer) => self.peers.get(peer).map(|far| (peer_link(peer), *far)),
        }
    }

    async fn add_route(&mut self, net: IpNet, hop: &Hop) -> Result<()> {
        match self.via(hop) {
            Some((link, far)) => {
                let route = Route::to(net).via(far.towards(net)).onlink();
                self.net.route(&link, &route).await?;
            }
            None if *hop == Hop::Nowhere => self.net.blackhole(net, MAIN).await?,
            None => return Ok(()),
        }
        self.routes.insert(net, hop.clone());
        Ok(())
    }

    async fn remove_route(&mut self, net: IpNet) -> Result<()> {
        self.net.delete_route(net, MAIN).await?;
        self.routes.remove(&net);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lab_ec2::{Delays, Ec2, Options, RunInstance, Tags};

    use super::*;
    use flatwire_core::ids::{DeviceIndex, Time};

    const NOW: Time = Time(1_000_000);

    struct Account {
        ec2: Ec2,
        vpc: VpcId,
        instance: InstanceId,
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn net4(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn account(delays: Delays) -> Account {
        let ec2 = Ec2::new(Options { delays, ..Options::default() });
        let vpc = ec2.create_vpc(NOW, net4("10.0.0.0/16"), "a").unwrap();
        ec2.create_internet_gateway(NOW, &vpc).unwrap();
        let subnet = ec2.create_subnet(NOW, &vpc, net4("10.0.16.0/20"), None, Tags::new()).unwrap();
        let run = RunInstance { public_ip: true, ..RunInstance::new("m5.large", subnet) };
        let instance = ec2.run_instance(NOW, &run).unwrap();
        ec2.advance(NOW);
        Account { ec2, vpc, instance }
    }

    impl RouterPlan {
        fn leading_to(&self, eni: &EniId) -> BTreeSet<IpNet> {
            let to_it = |(net, hop): (&IpNet, &Hop)| (*hop == Hop::Eni(eni.clone())).then_some(*net);
            self.routes.iter().filter_map(to_it).collect()
        }
    }

    impl Account {
        fn router(&self, now: Time) -> RouterPlan {
            plan(&self.ec2.view(now)).routers.remove(&self.vpc).unwrap()
        }

        fn first(&self, now: Time) -> EniInfo {
            self.ec2.view(now).enis_of(&self.instance).into_iter().next().unwrap().clone()
        }
    }

    #[test]
    fn every_assigned_address_has_a_route_and_the_rest_of_the_vpc_leads_nowhere() {
        let account = account(Delays::NONE);
        let eni = account.first(NOW);
        let added = account.ec2.assign_addresses(NOW, &eni.id, 2).unwrap();
        let prefix = account.ec2.assign_prefixes(NOW, &eni.id, 1).unwrap()[0];
        let router = account.router(NOW);
        let mut expected: BTreeSet<IpNet> = added.iter().map(|address| IpAddr::from(*address).into()).collect();
        expected.extend([IpNet::from(prefix), IpAddr::from(eni.primary_ipv4).into()]);
        assert_eq!(router.leading_to(&eni.id), expected);
        assert_eq!(router.routes[&net("10.0.0.0/16")], Hop::Nowhere);
        assert_eq!(router.routes[&ANYWHERE], Hop::Internet);

        account.ec2.unassign(NOW, &eni.id, &added, &[]).unwrap();
        assert!(!account.router(NOW).routes.contains_key(&IpAddr::from(added[0]).into()));
    }

    #[test]
    fn ipv6_is_routed_as_ipv4_is_and_reached_from_the_internet_as_it_is() {
        let account = account(Delays::NONE);
        let eni = account.first(NOW);
        let before = plan(&account.ec2.view(NOW));
        assert!(before.routers[&account.vpc].routes.keys().all(|net| matches!(net, IpNet::V4(_))));
        assert!(before.public.keys().all(|net| matches!(net, IpNet::V4(_))));

        let block = account.ec2.give_vpc_ipv6(NOW, &account.vpc).unwrap();
        let subnet = block.subnets(64).unwrap().next().unwrap();
        account.ec2.give_subnet_ipv6(NOW, &eni.subnet, subnet).unwrap();
        let prefix = account.ec2.assign_ipv6_prefixes(NOW, &eni.id, 1).unwrap()[0];
        let router = account.router(NOW);
        assert_eq!(router.leading_to(&eni.id), BTreeSet::from([prefix.into(), IpAddr::from(eni.primary_ipv4).into()]));
        assert_eq!((&router.routes[&block.into()], &router.routes[&ANYWHERE6]), (&Hop::Nowhere, &Hop::Internet));
        assert!(router.own.contains(&first(subnet).into()));
        assert_eq!(plan(&account.ec2.view(NOW)).public[&block.into()], account.vpc);
        assert_eq!(router.ports, before.routers[&account.vpc].ports, "no cable is touched");

        account.ec2.unassign_ipv6_prefixes(NOW, &eni.id, &[prefix]).unwrap();
        assert!(!account.router(NOW).routes.contains_key(&prefix.into()));
    }

    #[test]
    fn a_machine_is_leased_its_first_ipv6_address_and_the_router() {
        let account = account(Delays::NONE);
        let subnet = account.first(NOW).subnet;
        let block = account.ec2.give_vpc_ipv6(NOW, &account.vpc).unwrap();
        account.ec2.give_subnet_ipv6(NOW, &subnet, block.subnets(64).unwrap().next().unwrap()).unwrap();
        let run = RunInstance { ipv6_address_count: 2, ipv6_prefix_count: 1, ..RunInstance::new("m5.large", subnet) };
        let instance = account.ec2.run_instance(NOW, &run).unwrap();
        let view = account.ec2.view(NOW);
        let eni = view.enis_of(&instance)[0];
        let lease = &account.router(NOW).leases[&eni.id];
        let first = eni.ipv6.first().unwrap();
        assert_eq!(lease.addresses[1..], [IpAddr::from(*first).into()]);
        assert_eq!(lease.gateways, [IpAddr::from([10, 0, 16, 1]), ROUTER6.into()]);
        assert_eq!(account.router(NOW).leading_to(&eni.id).len(), 4);
    }

    #[test]
    fn a_links_own_address_follows_from_its_mac() {
        let address = link_local(MacAddress([0x02, 0x11, 0x22, 0x33, 0x44, 0x55]));
        assert_eq!(address.to_string(), "fe80::11:22ff:fe33:4455");
    }

    #[test]
    fn a_port_is_there_only_while_the_link_is() {
        let account = account(Delays { link_ms: 700, ..Delays::NONE });
        let primary = account.first(NOW);
        let address = Ipv4Net::new(primary.primary_ipv4, 20).unwrap();
        let lease = Lease { addresses: vec![address.into()], gateways: vec![[10, 0, 16, 1].into()] };
        assert_eq!(account.router(NOW).leases, BTreeMap::from([(primary.id.clone(), lease)]));
        let second = account.ec2.create_eni(NOW, &primary.subnet, &[], "", Tags::new()).unwrap();
        let attachment = account.ec2.attach_eni(NOW, &second, &account.instance, DeviceIndex(1), 0).unwrap();
        assert!(!account.router(NOW.plus_ms(699)).ports.contains_key(&second));
        let later = NOW.plus_ms(700);
        let router = account.router(later);
        assert_eq!(router.ports[&second].guest_link, "eth1");
        assert!(!router.leases.contains_key(&second), "it appears bare");
        account.ec2.detach_eni(later, &attachment).unwrap();
        assert!(!account.router(later).ports.contains_key(&second));
    }

    #[test]
    fn a_terminating_machine_is_unplugged_at_once() {
        let account = account(Delays { terminate_ms: 5_000, ..Delays::NONE });
        account.ec2.terminate_instance(NOW, &account.instance).unwrap();
        assert_eq!(account.router(NOW).ports.len(), 0);
    }

    #[test]
    fn the_source_check_follows_its_attribute_and_the_edge_its_addresses() {
        let account = account(Delays::NONE);
        let eni = account.first(NOW);
        let firewall = account.router(NOW).firewall;
        assert_eq!(firewall.checked.values().collect::<Vec<_>>(), [eni.id.as_str()]);
        assert_eq!(firewall.public, eni.public);
        assert_eq!(firewall.public.len(), 1);
        account.ec2.set_source_dest_check(NOW, &eni.id, false).unwrap();
        assert_eq!(account.router(NOW).firewall.checked.len(), 0);
    }

    #[test]
    fn peered_vpcs_have_routes_to_each_other_and_to_nobody_else() {
        let account = account(Delays::NONE);
        let other = account.ec2.create_vpc(NOW, net4("10.99.0.0/16"), "b").unwrap();
        let block = IpNet::from(account.ec2.give_vpc_ipv6(NOW, &other).unwrap());
        assert_eq!(account.router(NOW).peers.len(), 0);
        account.ec2.peer_vpcs(NOW, &account.vpc, &other).unwrap();
        let plan = plan(&account.ec2.view(NOW));
        assert_eq!(plan.routers[&account.vpc].routes[&net("10.99.0.0/16")], Hop::Peer(other.clone()));
        assert_eq!(plan.routers[&other].routes[&net("10.0.0.0/16")], Hop::Peer(account.vpc.clone()));
        // No way to the internet through somebody else's gateway.
        assert_eq!(plan.routers[&other].routes[&ANYWHERE], Hop::Nowhere);
        assert_eq!(plan.routers[&account.vpc].routes[&block], Hop::Peer(other.clone()));
        assert_eq!(plan.routers[&other].routes[&ANYWHERE6], Hop::Nowhere);
        assert!(!plan.public.contains_key(&block));
    }

    #[test]
    fn link_names_fit_the_kernel() {
        assert_eq!(short("eni-", "eni-0123456789abcdef0"), "eni-6789abcdef0");
        assert_eq!(short("eni-", "eni-0123456789abcdef0").len(), 15);
    }
}
