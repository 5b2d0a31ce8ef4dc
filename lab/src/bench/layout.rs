//! The ways of wiring a node that are compared. Each knows how to prepare a node, how to wire a pod that is measured, and
//! how to add pods that only fill the node up; nothing here measures.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use flatwire_core::ids::RouteTable;
use flatwire_core::netplan::{Look, priority};
use flatwire_core::ports::Kernel as _;
use flatwire_kernel::pod::{PodWiring, wire_bare};
use flatwire_kernel::{Batch, NodeKernel, POD_GROUP, Route, Rule, VethEnd};
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::{LinkBridge, LinkUnspec, LinkVxlan};
use serde::{Deserialize, Serialize};

use super::site::{Machine, mac, without_ipv6};
use crate::error::{Error, Result};
use crate::fabric::{Guest, VPC_MTU};
use crate::ns::Place;

/// Outer headers of VXLAN over IPv4: Ethernet, IP, UDP, VXLAN.
const VXLAN_HEADERS: u32 = 50;
const VXLAN_PORT: u16 = 4789;
/// The protocol number of rules that `ip rule` makes; what carries ours is taken back by the next `apply`.
const NOT_OURS: u8 = 3;
const BRIDGE: &str = "cbr0";
const OVERLAY: &str = "vxlan0";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Ours: one rule, and an nftables map from prefixes to ENIs.
    Flat,
    /// The add-on's two rules per pod, everything else as ours.
    PodRules,
    /// Pods on a bridge with a prefix of the VPC; the node routes.
    Bridge,
    /// Pods on a bridge with addresses of their own; VXLAN between the nodes.
    Vxlan,
    /// Whatever plugin was given on the command line.
    Given,
}

/// A pod that is measured.
#[derive(Debug, Clone)]
pub struct Pod {
    pub place: Place,
    pub address: Ipv4Addr,
}

/// A node with its measured pods and those that fill it up.
pub struct Node {
    layout: Layout,
    /// Which of the two nodes of an overlay this is: 0 or 1.
    side: u8,
    machine: Machine,
    kernel: NodeKernel,
    pub measured: Vec<Pod>,
    /// How many pods there are, the measured ones included.
    pods: usize,
}

impl Layout {
    pub const COMPARED: [Self; 4] = [Self::Flat, Self::PodRules, Self::Bridge, Self::Vxlan];

    pub fn name(self) -> &'static str {
        match self {
            Self::Flat => "flatwire",
            Self::PodRules => "per-pod rules",
            Self::Bridge => "bridge",
            Self::Vxlan => "vxlan",
            Self::Given => "given plugin",
        }
    }
}

impl Node {
    /// Wires so many pods to be measured.
    pub async fn new(layout: Layout, machine: Machine, side: u8, measured: u8) -> Result<Self> {
        let kernel = NodeKernel::in_namespace(machine.guest.place.netns()?)?;
        let mut node = Self { layout, side, machine, kernel, measured: Vec::new(), pods: 0 };
        node.prepare().await?;
        for number in 0..measured {
            let pod = node.wire(number).await?;
            node.measured.push(pod);
        }
        node.pods = node.measured.len();
        node.follow().await?;
        Ok(node)
    }

    async fn prepare(&self) -> Result<()> {
        if !matches!(self.layout, Layout::Bridge | Layout::Vxlan) {
            return Ok(());
        }
        let net = &self.machine.guest.net;
        let mut batch = Batch::default();
        // With a MAC of its own: it would otherwise take one of its ports', and change with them.
        let own = mac(8, self.side.into()).0.to_vec();
        batch.new_link("a bridge", LinkBridge::new(BRIDGE).address(own).mtu(self.mtu()).build());
        net.run(batch).await?;
        net.address(BRIDGE, gateway(self.subnet()?).into()).await?;
        Ok(())
    }

    /// Lays the overlay's tunnel to the other node.
    pub async fn tunnel_to(&self, far: &Self) -> Result<()> {
        if self.layout != Layout::Vxlan {
            return Ok(());
        }
        let net = &self.machine.guest.net;
        let tunnel = LinkVxlan::new(OVERLAY, 1)
            .local(self.machine.primary.primary_ipv4)
            .remote(far.machine.primary.primary_ipv4)
            .port(VXLAN_PORT)
            .learning(false)
            .address(mac(9, self.side.into()).0.to_vec())
            .mtu(self.mtu())
            .up()
            .build();
        let mut batch = Batch::default();
        batch.new_link("a VXLAN tunnel", tunnel);
        net.run(batch).await?;
        let far_end = IpAddr::from(far.subnet()?.network());
        net.neighbour(OVERLAY, far_end, mac(9, far.side.into())).await?;
        net.route(OVERLAY, &Route::to(far.subnet()?.into()).via(far_end).onlink()).await?;
        Ok(())
    }

    /// Adds pods until there are so many, the measured ones included.
    pub async fn grow(&mut self, pods: usize) -> Result<()> {
        let numbers: Vec<usize> = (self.pods..pods).collect();
        if numbers.is_empty() {
            return Ok(());
        }
        let (here, there) = (&self.machine.guest, &self.machine.crowd);
        let netns = there.place.netns()?;
        let name = |end: &str, number: usize| format!("{end}{number}");
        let mut pairs = Batch::default();
        for number in &numbers {
            let group = if self.is_flat() { POD_GROUP } else { 0 };
            let host = VethEnd::new(name("eni", *number)).mtu(self.mtu()).group(group);
            pairs.veth(&host, &VethEnd::new(name("pod", *number)).mtu(self.mtu()).in_netns(&netns));
        }
        here.net.run(pairs).await?;
        let bridge = if self.is_flat() { None } else { Some(here.net.index(BRIDGE).await?) };
        let (mut ends, mut links) = (Batch::default(), Batch::default());
        for number in &numbers {
            ends.set_link("a pod's end", LinkUnspec::new_with_name(&name("pod", *number)).up().build());
            let link = LinkUnspec::new_with_name(&name("eni", *number)).up();
            links.set_link(
                "a pod's link",
                bridge.into_iter().fold(link, |link, bridge| link.controller(bridge)).build(),
            );
        }
        there.net.run(ends).await?;
        here.net.run(links).await?;
        if self.is_flat() {
            let mut routes = Batch::default();
            let indexes: BTreeMap<String, u32> =
                here.net.links().await?.into_iter().map(|link| (link.name, link.index)).collect();
            for (number, (address, _)) in self.machine.pod_addresses().iter().enumerate().take(pods).skip(self.pods) {
                if let Some(index) = indexes.get(&name("eni", number)) {
                    routes.route(*index, &Route::to_host((*address).into()));
                }
            }
            here.net.run(routes).await?;
        }
        self.pods = pods;
        self.follow().await
    }

    /// Has the node's rules say what the layout wants with the pods there are.
    async fn follow(&self) -> Result<()> {
        let mut plan = self.machine.plan(self.pods);
        match self.layout {
            Layout::Flat => drop(self.kernel.apply(&plan, &Look::default()).await?),
            Layout::PodRules => {
                // Only the way in which a packet finds its table differs.
                plan.enis.iter_mut().for_each(|eni| eni.sources.clear());
                self.kernel.apply(&plan, &Look::default()).await?;
                self.per_pod_rules().await?;
            }
            Layout::Bridge | Layout::Vxlan | Layout::Given => {}
        }
        Ok(())
    }

    /// The kernel walks rules of one priority in the order they were added. The measured pods stand in the middle, as
    /// the average pod of a node does.
    async fn per_pod_rules(&self) -> Result<()> {
        let net = &self.machine.guest.net;
        let is_theirs =
            |rule: &Rule| [priority::TO_PODS, priority::FROM_PODS].contains(&rule.priority) && rule.fwmark.is_none();
        let mut batch = Batch::default();
        for rule in net.rules().await?.iter().filter(|rule| is_theirs(rule)) {
            batch.delete_rule(rule);
        }
        let mut pods: Vec<(Ipv4Addr, RouteTable)> = self.machine.pod_addresses();
        pods.truncate(self.pods);
        let measured = self.measured.len();
        let middle = pods.len().saturating_sub(measured) / 2;
        pods.get_mut(..middle + measured).unwrap_or_default().rotate_left(measured);
        for (address, table) in pods {
            let pod = IpNet::from(IpAddr::from(address));
            for rule in [
                Rule::lookup(priority::TO_PODS, RouteTable::MAIN.0).to(pod),
                Rule::lookup(priority::FROM_PODS, table.0).from(pod),
            ] {
                batch.rule(&Rule { protocol: NOT_OURS, ..rule });
            }
        }
        Ok(net.run(batch).await?)
    }

    async fn wire(&self, number: u8) -> Result<Pod> {
        let place = Place::new()?;
        place.run(without_ipv6)??;
        let pod = Guest::at(place.clone()).await?;
        let address = match self.is_flat() {
            true => self.wire_flat(&pod, number).await?,
            false => self.wire_bridged(&pod, number).await?,
        };
        Ok(Pod { place, address })
    }

    /// As the plugin does it.
    async fn wire_flat(&self, pod: &Guest, number: u8) -> Result<Ipv4Addr> {
        let addresses = self.machine.pod_addresses();
        let (address, _) = addresses.get(usize::from(number)).ok_or_else(|| Error::refused("no address is left"))?;
        let wiring = PodWiring {
            netns: "measured".into(),
            pod_if: "eth0".into(),
            host_if: format!("eni{number}"),
            mtu: self.mtu(),
            address: (*address).into(),
            second: None,
            gateway_index: 0,
            seed: address.to_string(),
        };
        wire_bare(&self.machine.guest.net, &pod.net, &wiring, &pod.place.netns()?).await?;
        Ok(*address)
    }

    /// As the reference `bridge` plugin does it, with the bridge as the gateway.
    async fn wire_bridged(&self, pod: &Guest, number: u8) -> Result<Ipv4Addr> {
        let net = &self.machine.guest.net;
        let host_if = format!("eni{number}");
        let netns = pod.place.netns()?;
        let end = VethEnd::new("eth0").mtu(self.mtu()).in_netns(&netns);
        net.veth(&VethEnd::new(&host_if).mtu(self.mtu()), &end).await?;
        let mut batch = Batch::default();
        let port = LinkUnspec::new_with_name(&host_if).up().controller(net.index(BRIDGE).await?).build();
        batch.set_link("a pod's link", port);
        net.run(batch).await?;
        let subnet = self.subnet()?;
        let address = nth(subnet, u32::from(number) + 2);
        pod.net.set_up("eth0").await?;
        pod.net.address("eth0", Ipv4Net::new_assert(address, subnet.prefix_len()).into()).await?;
        pod.net.route("eth0", &Route::default_via(gateway(subnet).addr().into())).await?;
        Ok(address)
    }

    fn is_flat(&self) -> bool {
        matches!(self.layout, Layout::Flat | Layout::PodRules)
    }

    fn mtu(&self) -> u32 {
        if self.layout == Layout::Vxlan { VPC_MTU - VXLAN_HEADERS } else { VPC_MTU }
    }

    /// Where pods behind a bridge have their addresses.
    fn subnet(&self) -> Result<Ipv4Net> {
        match self.layout {
            Layout::Vxlan => Ok(Ipv4Net::new_assert(Ipv4Addr::new(10, 244, self.side, 0), 24)),
            _ => self.machine.bridged(),
        }
    }
}

fn nth(subnet: Ipv4Net, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + number)
}

fn gateway(subnet: Ipv4Net) -> Ipv4Net {
    Ipv4Net::new_assert(nth(subnet, 1), subnet.prefix_len())
}
