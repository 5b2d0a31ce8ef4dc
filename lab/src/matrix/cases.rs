//! The ways there are, each with whom the far side must see.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use super::On;
use super::services::Service;
use crate::ctl::{Info, NodeInfo, PodInfo};
use crate::error::{Error, Result};
use crate::probe::PORT;

/// First of the addresses of Services: a range of no VPC, as EKS has it.
const CLUSTER_IPS: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 10);
const NODE_PORTS: u16 = 30_000;

/// Whom the far side must see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Is(&'static str, Ipv4Addr),
    /// kube-proxy masquerades with whichever address of the node the kernel picks.
    OneOf(&'static str, BTreeSet<Ipv4Addr>),
    /// Nobody may answer.
    Nobody,
}

impl Seen {
    pub fn allows(&self, seen: Option<IpAddr>) -> bool {
        match (self, seen) {
            (Self::Is(_, address), Some(seen)) => *address == seen,
            (Self::OneOf(_, addresses), Some(seen)) => addresses.iter().any(|address| *address == seen),
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
    pub to: SocketAddrV4,
    pub expected: Seen,
}

/// A pod with the Services that lead to it.
struct Pod {
    place: String,
    address: Ipv4Addr,
    /// externalTrafficPolicy Cluster and Local.
    service: Service,
    local: Service,
}

struct Node {
    address: Ipv4Addr,
    public: Ipv4Addr,
    /// Primary addresses of its ENIs.
    addresses: BTreeSet<Ipv4Addr>,
    /// The primary address of a secondary ENI.
    second: Ipv4Addr,
}

/// Everybody there is.
pub struct Scene {
    pub services: Vec<Service>,
    pods: BTreeMap<(usize, On), Vec<Pod>>,
    nodes: Vec<Node>,
    peer: Ipv4Addr,
    internet: Ipv4Addr,
    to_internet: Service,
    to_peer: Service,
    to_host: Service,
}

impl Scene {
    pub fn new(info: &Info, pods: &BTreeMap<(&str, On), Vec<PodInfo>>) -> Result<Self> {
        let mut services = Services::default();
        let mut nodes = Vec::new();
        for name in super::NODES {
            nodes.push(node(find(info, name)?)?);
        }
        let mut scene_pods: BTreeMap<(usize, On), Vec<Pod>> = BTreeMap::new();
        for (number, name) in super::NODES.iter().enumerate() {
            for on in On::BOTH {
                for pod in pods.get(&(*name, on)).into_iter().flatten().take(2) {
                    let id = format!("{}{}", pod.name.replace('-', ""), number + 1);
                    let lacks = || Error::refused(format!("{} has no IPv4 address", pod.name));
                    let address = pod.ipv4().ok_or_else(lacks)?;
                    scene_pods.entry((number, on)).or_default().push(Pod {
                        place: format!("{name}/{}", pod.name),
                        address,
                        service: services.add(&id, address, Some(name), false),
                        local: services.add(&format!("{id}l"), address, Some(name), true),
                    });
                }
            }
        }
        let peer = address(find(info, crate::world::PEER)?)?;
        let host = address(find(info, super::NODES[0])?)?;
        Ok(Self {
            to_internet: services.add("net", info.internet_server, None, false),
            to_peer: services.add("peer", peer, None, false),
            to_host: services.add("host", host, Some(super::NODES[0]), false),
            internet: info.internet_server,
            services: services.0,
            pods: scene_pods,
            nodes,
            peer,
        })
    }

    pub fn pods(&self) -> usize {
        self.pods.values().map(Vec::len).sum()
    }

    /// Every case with the pod in question on that ENI. Rows have the same names whatever the ENI.
    pub fn cases(&self, on: On) -> Vec<Case> {
        let other = if on == On::Primary { On::Secondary } else { On::Primary };
        let pod = |node: usize, on: On, which: usize| &self.pods[&(node, on)][which];
        let (pod_here, same, unlike) = (pod(0, on, 0), pod(0, on, 1), pod(0, other, 0));
        let (remote, remote_unlike) = (pod(1, on, 0), pod(1, other, 0));
        let (here, there) = (&self.nodes[0], &self.nodes[1]);
        let (server, peer) = (self.internet, self.peer);

        let own = Seen::Is("the pod's own", pod_here.address);
        let node = Seen::Is("the node's", here.address);
        let public = Seen::Is("the node's public", here.public);
        let masqueraded = Seen::OneOf("the node's", here.addresses.clone());
        let caller = |address| Seen::Is("the caller's own", address);
        let at = |address: Ipv4Addr| SocketAddrV4::new(address, PORT);
        let node_port = |address: Ipv4Addr, service: &Service| SocketAddrV4::new(address, service.node_port);

        let mut cases = Vec::new();
        let mut case = |row: &str, from: &str, to: SocketAddrV4, expected: &Seen| {
            cases.push(Case { row: row.to_owned(), from: from.to_owned(), to, expected: expected.clone() });
        };
        let from = pod_here.place.as_str();
        case("pod → ClusterIP → pod here, ENI alike", from, same.service.address(), &own);
        case("pod → ClusterIP → pod here, other ENI", from, unlike.service.address(), &own);
        case("pod → ClusterIP → pod elsewhere, ENI alike", from, remote.service.address(), &own);
        case("pod → ClusterIP → pod elsewhere, other ENI", from, remote_unlike.service.address(), &own);
        case("pod → ClusterIP → the node itself", from, self.to_host.address(), &own);
        case("pod → ClusterIP → endpoint on the internet", from, self.to_internet.address(), &public);
        case("pod → ClusterIP → endpoint in the peered VPC", from, self.to_peer.address(), &node);
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

        let (second, outside) = (here.second, here.public);
        case("internet → NodePort → pod here", "internet", node_port(outside, &pod_here.service), &masqueraded);
        case("internet → NodePort, Local → pod here", "internet", node_port(outside, &pod_here.local), &caller(server));
        case("internet → NodePort → pod elsewhere", "internet", node_port(outside, &remote.service), &masqueraded);
        case("internet → NodePort, Local, pod elsewhere", "internet", node_port(outside, &remote.local), &Seen::Nobody);
        case("internet → NodePort → the node itself", "internet", node_port(outside, &self.to_host), &caller(server));
        let far = there.address;
        case("VPC → NodePort → pod here", "node-2", node_port(here.address, &pod_here.service), &masqueraded);
        case("VPC → NodePort, Local → pod here", "node-2", node_port(here.address, &pod_here.local), &caller(far));
        case(
            "VPC → NodePort at a secondary ENI → pod here",
            "node-2",
            node_port(second, &pod_here.service),
            &masqueraded,
        );
        case("VPC → the same, Local", "node-2", node_port(second, &pod_here.local), &caller(far));
        case("peer → NodePort → pod here", "peer", node_port(here.address, &pod_here.service), &masqueraded);
        case("peer → NodePort, Local → pod here", "peer", node_port(here.address, &pod_here.local), &caller(peer));
        case("peer → NodePort → pod elsewhere", "peer", node_port(here.address, &remote.service), &masqueraded);
        case(
            "peer → NodePort at a secondary ENI → pod here",
            "peer",
            node_port(second, &pod_here.service),
            &masqueraded,
        );
        case("peer → the same, Local", "peer", node_port(second, &pod_here.local), &caller(peer));
        case("peer → the same → pod elsewhere", "peer", node_port(second, &remote.service), &masqueraded);
        case("peer → the same → the node itself", "peer", node_port(second, &self.to_host), &caller(peer));

        case("pod → internet", from, at(server), &public);
        case("pod → peered VPC", from, at(peer), &node);
        case("pod → pod here", from, at(unlike.address), &own);
        case("pod → pod elsewhere", from, at(remote.address), &own);
        case("pod → another node", from, at(there.address), &own);
        case("pod → its node", from, at(here.address), &own);
        case("pod → its node's secondary ENI", from, at(second), &own);
        case("its node → pod", "node-1", at(pod_here.address), &masqueraded);
        case("another node → pod", "node-2", at(pod_here.address), &caller(there.address));
        case("pod elsewhere → pod", &remote.place, at(pod_here.address), &caller(remote.address));
        case("peered VPC → pod", "peer", at(pod_here.address), &caller(peer));
        case("peered VPC → the node's secondary ENI", "peer", at(second), &caller(peer));
        case("its node → ClusterIP → pod", "node-1", pod_here.service.address(), &masqueraded);
        case("its node → ClusterIP → pod elsewhere", "node-1", remote.service.address(), &masqueraded);
        case("its node → ClusterIP → internet", "node-1", self.to_internet.address(), &public);
        cases
    }
}

#[derive(Default)]
struct Services(Vec<Service>);

impl Services {
    fn add(&mut self, name: &str, endpoint: Ipv4Addr, node: Option<&str>, local: bool) -> Service {
        let number = u16::try_from(self.0.len()).expect("invariant: a scene has a few Services");
        let service = Service {
            name: name.to_owned(),
            cluster_ip: Ipv4Addr::from(u32::from(CLUSTER_IPS) + u32::from(number)),
            node_port: NODE_PORTS + number,
            local,
            endpoint: SocketAddrV4::new(endpoint, PORT),
            node: node.map(str::to_owned),
        };
        self.0.push(service.clone());
        service
    }
}

fn find<'a>(info: &'a Info, name: &str) -> Result<&'a NodeInfo> {
    let found = info.nodes.iter().find(|node| node.name == name);
    found.ok_or_else(|| Error::refused(format!("the lab has no machine {name}")))
}

fn address(node: &NodeInfo) -> Result<Ipv4Addr> {
    node.address.ok_or_else(|| Error::refused(format!("{} has no address", node.name)))
}

fn node(info: &NodeInfo) -> Result<Node> {
    let lacks = |what: &str| Error::refused(format!("{} has no {what}", info.name));
    let second = info.enis.iter().find(|eni| eni.device > 0).map(|eni| eni.primary);
    Ok(Node {
        address: address(info)?,
        public: info.public.ok_or_else(|| lacks("public address"))?,
        addresses: info.enis.iter().map(|eni| eni.primary).collect(),
        second: second.ok_or_else(|| lacks("secondary ENI"))?,
    })
}
