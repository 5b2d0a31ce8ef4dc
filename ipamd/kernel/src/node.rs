//! The node's side of the data path: reading what stands, having `apply` make it what the plan says, and taking it away.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use flatwire_core::families::EGRESS;
use flatwire_core::ids::RouteTable;
use flatwire_core::netplan::{Look, NodePlan};
use flatwire_core::ports::{Kernel, KernelReport, PodsSeen};
use tokio::sync::Mutex;

use crate::apply::{Memory, Run};
use crate::conntrack::Conntrack;
use crate::error::KernelError;
use crate::link::Link;
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::nft::{Family, Nft};
use crate::route::{PROTOCOL, Route, delete_route};
use crate::rule::{Rule, delete_rule};
use crate::ruleset;
use crate::watch::Watch;

/// The kernel of one node.
pub struct NodeKernel {
    pub(crate) netns: Netns,
    pub(crate) nl: Netlink,
    pub(crate) nft: Nft,
    pub(crate) conntrack: Conntrack,
    watch: Mutex<Watch>,
    memory: Mutex<Memory>,
}

/// A link with what the node's audit asks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLink {
    pub link: Link,
    /// How many addresses it has, of any family and scope.
    pub addresses: usize,
}

impl Kernel for NodeKernel {
    type Error = KernelError;

    async fn apply(&self, plan: &NodePlan, look: &Look) -> Result<KernelReport, KernelError> {
        check(plan)?;
        let mut memory = self.memory.lock().await;
        Run::new(self, plan, look, &mut memory).await?.node().await
    }

    async fn changed(&self) -> Result<(), KernelError> {
        self.watch.lock().await.changed().await
    }

    async fn pods(&self) -> Result<PodsSeen, KernelError> {
        let links = self.nl.links().await?;
        let veths: BTreeSet<u32> = links.iter().filter(|link| link.is_veth()).map(|link| link.index).collect();
        let (up, down): (Vec<Link>, Vec<Link>) = links.into_iter().filter(Link::is_veth).partition(|link| link.up);
        let mut routes = self.nl.routes().await?;
        routes.extend(self.nl.routes_of(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).await?);
        let routes = routes
            .into_iter()
            .filter(|route| is_host_route(route) && route.link.is_some_and(|link| veths.contains(&link)))
            .map(|route| route.destination.addr())
            .collect();
        Ok(PodsSeen {
            routes,
            links: up.into_iter().map(|link| link.name).collect(),
            down: down.into_iter().filter_map(|link| Some((link.name, link.mac?))).collect(),
        })
    }
}

/// A route of the main table to one address on the link itself.
fn is_host_route(route: &Route) -> bool {
    let destination = route.destination;
    route.table == RouteTable::MAIN.0
        && destination.prefix_len() == destination.max_prefix_len()
        && route.via.is_none()
        && !is_link_local(destination.addr())
        && !destination.addr().is_multicast()
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        // Pods of IPv6 clusters have one of these for IPv4.
        IpAddr::V4(v4) => v4.is_link_local() && !EGRESS.contains(&v4),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

impl NodeKernel {
    /// The kernel as the calling thread's namespace sees it.
    pub fn open() -> Result<Self, KernelError> {
        Self::in_namespace(Netns::current()?)
    }

    pub fn in_namespace(netns: Netns) -> Result<Self, KernelError> {
        // Heard from the start, so that nothing between the first reading and the first wait is missed.
        let watch = Mutex::new(Watch::in_namespace(&netns)?);
        let (nl, nft) = (Netlink::in_namespace(&netns)?, Nft::in_namespace(&netns)?);
        let conntrack = Conntrack::in_namespace(&netns)?;
        Ok(Self { netns, nl, nft, conntrack, watch, memory: Mutex::default() })
    }

    /// Every link of the node, by index.
    pub async fn links(&self) -> Result<Vec<NodeLink>, KernelError> {
        let addresses = self.nl.addresses().await?;
        let with_count = |link: Link| {
            let addresses = addresses.iter().filter(|address| address.link == link.index).count();
            NodeLink { link, addresses }
        };
        Ok(self.nl.links().await?.into_iter().map(with_count).collect())
    }

    /// Removes from the node what `apply` made: rules, the ENIs' tables and the nftables table. Pods keep their wiring,
    /// ENIs their addresses, and sysctls their values, which others may rely on by now.
    pub async fn clear(&self) -> Result<(), KernelError> {
        let mut memory = self.memory.lock().await;
        *memory = Memory::default();
        let mut requests: Vec<_> = self.our_rules().await?.iter().map(delete_rule).collect();
        requests.extend(self.our_table_routes().await?.iter().map(delete_route));
        let mut errors = Vec::new();
        if !requests.is_empty() {
            let outcomes = self.nl.batch(requests).await?;
            errors.extend(outcomes.into_iter().filter_map(Result::err).filter(|e| !e.is_absent()));
        }
        for family in [ruleset::FAMILY, Family::Ip6] {
            if let Err(e) = self.nft.remove(family, ruleset::TABLE).await {
                errors.push(e);
            }
        }
        KernelError::collect("clear the node", errors)
    }

    /// Everything of ours that is in the kernel, a sentence each; empty on a node that never saw us, or no longer does.
    pub async fn leftovers(&self, veth_prefix: &str) -> Result<Vec<String>, KernelError> {
        let mut found = Vec::new();
        let veths = |link: &Link| link.is_veth() && link.name.starts_with(veth_prefix);
        found.extend(self.nl.links().await?.iter().filter(|l| veths(l)).map(|link| format!("interface {}", link.name)));
        let mut routes = self.nl.routes().await?;
        routes.extend(self.nl.routes_of(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).await?);
        found.extend(routes.iter().filter(|route| route.protocol == PROTOCOL).map(|route| format!("route {route}")));
        found.extend(self.our_rules().await?.iter().map(|rule| format!("rule {rule}")));
        for (family, of) in [(ruleset::FAMILY, ""), (Family::Ip6, " of IPv6")] {
            if self.nft.exists(family, ruleset::TABLE).await? {
                found.push(format!("nftables table {}{of}", ruleset::TABLE));
            }
        }
        Ok(found)
    }

    async fn our_rules(&self) -> Result<Vec<Rule>, KernelError> {
        Ok(self.nl.rules().await?.into_iter().filter(|rule| rule.protocol == PROTOCOL).collect())
    }

    async fn our_table_routes(&self) -> Result<Vec<Route>, KernelError> {
        let ours = |route: &Route| route.protocol == PROTOCOL && route.table != RouteTable::MAIN.0;
        let mut routes = self.nl.routes().await?;
        routes.extend(self.nl.routes_of(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).await?);
        Ok(routes.into_iter().filter(ours).collect())
    }
}

/// Refuses a plan that would do harm whatever the kernel holds.
fn check(plan: &NodePlan) -> Result<(), KernelError> {
    let bad = |what: String, why| Err(KernelError::BadInput { what, why });
    if plan.veth_prefix.is_empty() {
        return bad("veth prefix \"\"".to_owned(), "every link would be a pod's");
    }
    let (mut marks, mut tables) = (BTreeSet::new(), BTreeSet::new());
    if plan.marks.primary == 0 || plan.marks.primary & plan.marks.eni_mask != 0 {
        return bad(format!("mark {:#x} of the primary ENI", plan.marks.primary), "it is not its alone");
    }
    for eni in &plan.enis {
        if eni.mark == 0 || eni.mark & !plan.marks.eni_mask != 0 || !marks.insert(eni.mark) {
            return bad(format!("mark {:#x} of {}", eni.mark, eni.id), "it is not one ENI's alone under the mask");
        }
        // 0 unspecified, 253 default, 254 main, 255 local.
        if matches!(eni.table.0, 0 | 253..=255) || !tables.insert(eni.table) {
            return bad(format!("table {} of {}", eni.table, eni.id), "it is not one ENI's alone");
        }
    }
    Ok(())
}
