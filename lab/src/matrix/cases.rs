//! The ways there are, each with whom the far side must see.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::services::{Family, Service};
use super::{Families, On};
use crate::ctl::{EniInfo, Info, NodeInfo, PodInfo};
use crate::error::{Error, Result};
use crate::probe::PORT;

/// First of the addresses of Services: ranges of no VPC, as EKS has them.
const CLUSTER_IPS: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 10);
const CLUSTER_IPS6: Ipv6Addr = Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 0xa);
const NODE_PORTS: u16 = 30_000;

/// Whom the far side must see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Is(&'static str, IpAddr),
    /// kube-proxy masquerades with whichever address of the node the kernel picks.
    OneOf(&'static str, BTreeSet<IpAddr>),
    /// Nobody may answer.
    Nobody,
}

impl Seen {
    pub fn allows(&self, seen: Option<IpAddr>) -> bool {
        match (self, seen) {
            (Self::Is(_, address), Some(seen)) => *address == seen,
            (Self::OneOf(_, addresses), Some(seen)) => addresses.contains(&seen),
            (Self::Nobody, None) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(whose, address) => write!(f, "{whose} address {address}"),
            Self::OneOf(whose, addresses) => {
                let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                write!(f, "{whose} address ({})", addresses.join(" or "))
            }
            Self::Nobody => write!(f, "silence"),
        }
    }
}

/// One call.
#[derive(Debug, Clone)]
pub struct Case {
    pub row: String,
    pub from: String,
    pub to: SocketAddr,
    pub expected: Seen,
}

/// A pod with the Services that lead to it.
struct Pod {
    place: String,
    address: IpAddr,
    /// externalTrafficPolicy Cluster and Local.
    service: Service,
    local: Service,
}

struct Node {
    address: IpAddr,
    /// As the internet knows it.
    public: IpAddr,
    /// Its addresses on all ENIs.
    addresses: BTreeSet<IpAddr>,
    /// Its address on a secondary ENI, if it has one.
    second: Option<IpAddr>,
}

/// Everybody there is, as far as one family goes.
pub struct Scene {
    pub family: Family,
    pub services: Vec<Service>,
    pods: BTreeMap<(usize, On), Vec<Pod>>,
    nodes: Vec<Node>,
    peer: IpAddr,
    internet: IpAddr,
    to_internet: Service,
    to_peer: Service,
    to_host: Service,
    /// What pods of IPv6 alone call over IPv4.
    egress: Vec<(&'static str, SocketAddr, Seen)>,
}

impl Scene {
    pub fn new(
        families: Families,
        family: Family,
        info: &Info,
        pods: &BTreeMap<(&str, On), Vec<PodInfo>>,
    ) -> Result<Self> {
        let mut services = Services { family, list: Vec::new() };
        let mut nodes = Vec::new();
        for name in super::NODES {
            nodes.push(node(family, find(info, name)?)?);
        }
        let mut scene_pods: BTreeMap<(usize, On), Vec<Pod>> = BTreeMap::new();
        for (number, name) in super::NODES.iter().enumerate() {
            for on in families.enis() {
                for pod in pods.get(&(*name, *on)).into_iter().flatten().take(2) {
                    let id = format!("{}{}", pod.name.replace('-', ""), number + 1);
                    let address = pod.addresses.iter().copied().find(|address| family.has(*address));
                    let lacks = || Error::refused(format!("{} has no {} address", pod.name, family.name()));
                    let address = address.ok_or_else(lacks)?;
                    scene_pods.entry((number, *on)).or_default().push(Pod {
                        place: format!("{name}/{}", pod.name),
                        address,
                        service: services.add(&id, address, Some(name), false),
                        local: services.add(&format!("{id}l"), address, Some(name), true),
                    });
                }
            }
        }
        let peer = address(family, find(info, crate::world::PEER)?)?;
        let internet = internet(family, info);
        Ok(Self {
            family,
            to_internet: services.add("net", internet, None, false),
            to_peer: services.add("peer", peer, None, false),
            to_host: services.add("host", nodes[0].address, Some(super::NODES[0]), false),
            services: services.list,
            internet,
            pods: scene_pods,
            nodes,
            peer,
            egress: if families == Families::V6 { egress(info)? } else { Vec::new() },
        })
    }

    pub fn pods(&self) -> usize {
        self.pods.values().map(Vec::len).sum()
    }

    /// Every case with the pod in question on that ENI. Rows have the same names whatever the ENI.
    pub fn cases(&self, on: On) -> Vec<Case> {
        let other = if on == On::Primary { On::Secondary } else { On::Primary };
        let pod = |node: usize, on: On, which: usize| &self.pods[&(node, on)][which];
        let (pod_here, same, remote) = (pod(0, on, 0), pod(0, on, 1), pod(1, on, 0));
        let (here, there) = (&self.nodes[0], &self.nodes[1]);
        let (server, peer) = (self.internet, self.peer);

        let own = Seen::Is("the pod's own", pod_here.address);
        let node = Seen::Is("the node's", here.address);
        let public = Seen::Is("the node's public", here.public);
        // Whom those outside the VPC see: nothing of IPv6 is translated.
        let (to_internet, to_peer) = match self.family {
            Family::V4 => (&public, &node),
            Family::V6 => (&own, &own),
        };
        let masqueraded = Seen::OneOf("the node's", here.addresses.clone());
        let caller = |address| Seen::Is("the caller's own", address);
        let at = |address: IpAddr| SocketAddr::new(address, PORT);
        let node_port = |address: IpAddr, service: &Service| SocketAddr::new(address, service.node_port);

        let mut cases = Vec::new();
        let mut case = |row: &str, from: &str, to: SocketAddr, expected: &Seen| {
            cases.push(Case { row: row.to_owned(), from: from.to_owned(), to, expected: expected.clone() });
        };
        let from = pod_here.place.as_str();
        case("pod → ClusterIP → pod here, ENI alike", from, same.service.address(), &own);
        case("pod → ClusterIP → pod elsewhere, ENI alike", from, remote.service.address(), &own);
        let mut unlike = same;
        if self.pods.contains_key(&(0, other)) {
            unlike = pod(0, other, 0);
            case("pod → ClusterIP → pod here, other ENI", from, unlike.service.address(), &own);
            case("pod → ClusterIP → pod elsewhere, other ENI", from, pod(1, other, 0).service.address(), &own);
        }
        case("pod → ClusterIP → the node itself", from, self.to_host.address(), &own);
        case("pod → ClusterIP → endpoint on the internet", from, self.to_internet.address(), to_internet);
        case("pod → ClusterIP → endpoint in the peered VPC", from, self.to_peer.address(), to_peer);
        case("pod → ClusterIP → itself", from, pod_here.service.address(), &masqueraded);
        case("pod → NodePort of its node → pod here", from, node_port(here.address, &unlike.service), &masqueraded);
        case(
            "pod → NodePort of its node → pod elsewhere",
            from,
            node_port(here.address, &remote.service),
            &masqueraded,
        );
        case("pod → NodePort of its node → itself", from, node_port(here.address, &pod_here.service), &masqueraded);
        let there_masqueraded = Seen::OneOf("the other node's", there.addresses.clone());
        case(
            "pod → NodePort elsewhere → pod there",
            from,
            node_port(there.address, &remote.service),
            &there_masqueraded,
        );
        case("pod → NodePort elsewhere → pod here", from, node_port(there.address, &same.service), &there_masqueraded);
        case("pod → NodePort elsewhere, Local → pod there", from, node_port(there.address, &remote.local), &own);

        let outside = here.public;
        case("internet → NodePort → pod here", "internet", node_port(outside, &pod_here.service), &masqueraded);
        case("internet → NodePort, Local → pod here", "internet", node_port(outside, &pod_here.local), &caller(server));
        case("internet → NodePort → pod elsewhere", "internet", node_port(outside, &remote.service), &masqueraded);
        case("internet → NodePort, Local, pod elsewhere", "internet", node_port(outside, &remote.local), &Seen::Nobody);
        case("internet → NodePort → the node itself", "internet", node_port(outside, &self.to_host), &caller(server));
        let far = there.address;
        case("VPC → NodePort → pod here", "node-2", node_port(here.address, &pod_here.service), &masqueraded);
        case("VPC → NodePort, Local → pod here", "node-2", node_port(here.address, &pod_here.local), &caller(far));
        case("peer → NodePort → pod here", "peer", node_port(here.address, &pod_here.service), &masqueraded);
        case("peer → NodePort, Local → pod here", "peer", node_port(here.address, &pod_here.local), &caller(peer));
        case("peer → NodePort → pod elsewhere", "peer", node_port(here.address, &remote.service), &masqueraded);

        if let Some(second) = here.second {
            case(
                "VPC → NodePort at a secondary ENI → pod here",
                "node-2",
                node_port(second, &pod_here.service),
                &masqueraded,
            );
            case("VPC → the same, Local", "node-2", node_port(second, &pod_here.local), &caller(far));
            case(
                "peer → NodePort at a secondary ENI → pod here",
                "peer",
                node_port(second, &pod_here.service),
                &masqueraded,
            );
            case("peer → the same, Local", "peer", node_port(second, &pod_here.local), &caller(peer));
            case("peer → the same → pod elsewhere", "peer", node_port(second, &remote.service), &masqueraded);
            case("peer → the same → the node itself", "peer", node_port(second, &self.to_host), &caller(peer));
            case("pod → its node's secondary ENI", from, at(second), &own);
            case("peered VPC → the node's secondary ENI", "peer", at(second), &caller(peer));
        }

        case("pod → internet", from, at(server), to_internet);
        case("pod → peered VPC", from, at(peer), to_peer);
        for (row, to, expected) in &self.egress {
            case(row, from, *to, expected);
        }
        case("pod → pod here", from, at(unlike.address), &own);
        case("pod → pod elsewhere", from, at(remote.address), &own);
        case("pod → another node", from, at(there.address), &own);
        case("pod → its node", from, at(here.address), &own);
        case("its node → pod", "node-1", at(pod_here.address), &masqueraded);
        case("another node → pod", "node-2", at(pod_here.address), &caller(there.address));
        case("pod elsewhere → pod", &remote.place, at(pod_here.address), &caller(remote.address));
        case("peered VPC → pod", "peer", at(pod_here.address), &caller(peer));
        if self.family == Family::V6 {
            case("internet → pod", "internet", at(pod_here.address), &caller(server));
        }
        case("its node → ClusterIP → pod", "node-1", pod_here.service.address(), &masqueraded);
        case("its node → ClusterIP → pod elsewhere", "node-1", remote.service.address(), &masqueraded);
        case("its node → ClusterIP → internet", "node-1", self.to_internet.address(), &public);
        cases
    }
}

struct Services {
    family: Family,
    list: Vec<Service>,
}

impl Services {
    fn add(&mut self, name: &str, endpoint: IpAddr, node: Option<&str>, local: bool) -> Service {
        let number = u16::try_from(self.list.len()).expect("invariant: a scene has a few Services");
        let service = Service {
            name: name.to_owned(),
            cluster_ip: match self.family {
                Family::V4 => Ipv4Addr::from(u32::from(CLUSTER_IPS) + u32::from(number)).into(),
                Family::V6 => Ipv6Addr::from(u128::from(CLUSTER_IPS6) + u128::from(number)).into(),
            },
            node_port: NODE_PORTS + number,
            local,
            endpoint: SocketAddr::new(endpoint, PORT),
            node: node.map(str::to_owned),
        };
        self.list.push(service.clone());
        service
    }
}

fn find<'a>(info: &'a Info, name: &str) -> Result<&'a NodeInfo> {
    let found = info.nodes.iter().find(|node| node.name == name);
    found.ok_or_else(|| Error::refused(format!("the lab has no machine {name}")))
}

fn address(family: Family, node: &NodeInfo) -> Result<IpAddr> {
    let address = match family {
        Family::V4 => node.address.map(IpAddr::from),
        Family::V6 => node.ipv6.map(IpAddr::from),
    };
    address.ok_or_else(|| Error::refused(format!("{} has no {} address", node.name, family.name())))
}

fn internet(family: Family, info: &Info) -> IpAddr {
    match family {
        Family::V4 => info.internet_server.into(),
        Family::V6 => info.internet_server6.into(),
    }
}

fn node(family: Family, info: &NodeInfo) -> Result<Node> {
    let address = address(family, info)?;
    let lacks = || Error::refused(format!("{} has no public address", info.name));
    let on = |eni: &EniInfo| match family {
        Family::V4 => Some(eni.primary.into()),
        Family::V6 => eni.ipv6.first().copied().map(IpAddr::from),
    };
    Ok(Node {
        address,
        public: match family {
            Family::V4 => info.public.ok_or_else(lacks)?.into(),
            Family::V6 => address,
        },
        addresses: info.enis.iter().filter_map(on).collect(),
        second: info.enis.iter().filter(|eni| eni.device > 0).find_map(on),
    })
}

/// Within the VPC too, pods of IPv6 alone are their node.
fn egress(info: &Info) -> Result<Vec<(&'static str, SocketAddr, Seen)>> {
    let [here, there] = super::NODES.map(|name| find(info, name).and_then(|machine| node(Family::V4, machine)));
    let (here, there) = (here?, there?);
    let peer = address(Family::V4, find(info, crate::world::PEER)?)?;
    let node = Seen::Is("the node's", here.address);
    Ok(vec![
        (
            "pod → internet, over IPv4",
            SocketAddr::new(internet(Family::V4, info), PORT),
            Seen::Is("the node's public", here.public),
        ),
        ("pod → peered VPC, over IPv4", SocketAddr::new(peer, PORT), node.clone()),
        ("pod → another node, over IPv4", SocketAddr::new(there.address, PORT), node),
    ])
}
