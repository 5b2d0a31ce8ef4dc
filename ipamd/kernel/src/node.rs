//! The node's side of the data path: what the plan says, made so, and made so again.
//!
//! Level-triggered: each call reads what stands, changes what differs and says what it changed. A second call right after
//! says nothing. Invariant: nothing is ever deleted that does not carry our protocol number (routes, rules), is not our
//! nftables table, or does not stand in the way on an ENI of the plan (a pod's address on the ENI itself, the kernel's
//! subnet route in main); test `what_is_not_ours_is_left_alone`.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;

use flatwire_core::ids::{EniId, MacAddress, RouteTable};
use flatwire_core::netplan::{EniPlan, Marks, NodePlan, priority};
use flatwire_core::ports::{Kernel, KernelReport, PodsSeen};
use ipnet::{IpNet, Ipv4Net};
use tokio::sync::Mutex;

use crate::address::{LinkAddress, add_address, delete_address};
use crate::error::KernelError;
use crate::link::{Link, POD_GROUP};
use crate::netlink::Netlink;
use crate::netns::{Netns, in_netns};
use crate::nft::{Fingerprint, Nft};
use crate::route::{PROTOCOL, Route, delete_route, replace_route};
use crate::rule::{Rule, add_rule, delete_rule};
use crate::ruleset;
use crate::sysctl::{self, Sysctl};

/// The kernel's number for routes it adds by itself (RTPROT_KERNEL).
const KERNEL_PROTOCOL: u8 = 2;

/// The suppression of everything but host routes.
const SHORTER_THAN_HOST: u32 = 31;

/// The group of links that nobody put into one.
const DEFAULT_GROUP: u32 = 0;

/// Repairs of failed runs that are kept for the next report.
const MAX_UNTOLD: usize = 1000;

/// The kernel of one node.
pub struct NodeKernel {
    netns: Netns,
    nl: Netlink,
    nft: Nft,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    /// The digest and fingerprint of the table as this process last wrote or verified it.
    ruleset: Option<(String, Fingerprint)>,
    /// Repairs made by runs that then failed.
    untold: VecDeque<String>,
    /// Complaints are made once.
    complained: BTreeSet<String>,
}

/// A link with what the node's audit asks of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLink {
    pub link: Link,
    /// How many addresses it has, of any family and scope.
    pub addresses: usize,
}

/// What stands in the kernel, read once per run.
struct State {
    links: Vec<Link>,
    addresses: Vec<LinkAddress>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
}

/// One run: what it read, and what it says.
struct Run<'a> {
    kernel: &'a NodeKernel,
    state: State,
    report: KernelReport,
    errors: Vec<KernelError>,
}

impl Kernel for NodeKernel {
    type Error = KernelError;

    async fn apply(&self, plan: &NodePlan) -> Result<KernelReport, KernelError> {
        check(plan)?;
        let mut memory = self.memory.lock().await;
        let mut run = Run {
            kernel: self,
            state: self.read().await?,
            report: KernelReport { repaired: memory.untold.drain(..).collect(), ..KernelReport::default() },
            errors: Vec::new(),
        };
        run.node(plan, &mut memory).await;
        if run.errors.is_empty() {
            return Ok(run.report);
        }
        memory.untold.extend(run.report.repaired);
        while memory.untold.len() > MAX_UNTOLD {
            memory.untold.pop_front();
        }
        KernelError::collect("program the node", run.errors)?;
        Ok(KernelReport::default())
    }

    async fn pods(&self) -> Result<PodsSeen, KernelError> {
        let links = self.nl.links().await?;
        let veths: BTreeSet<u32> = links.iter().filter(|link| link.is_veth()).map(|link| link.index).collect();
        let names = links.into_iter().filter(|link| link.is_veth()).map(|link| link.name).collect();
        let mut routes = self.nl.routes().await?;
        routes.extend(self.nl.routes_of(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)).await?);
        let routes = routes
            .into_iter()
            .filter(|route| is_host_route(route) && route.link.is_some_and(|link| veths.contains(&link)))
            .map(|route| route.destination.addr())
            .collect();
        Ok(PodsSeen { routes, links: names })
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
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

impl NodeKernel {
    /// The kernel as the calling thread's namespace sees it.
    pub fn open() -> Result<Self, KernelError> {
        Self::in_namespace(Netns::current()?)
    }

    pub fn in_namespace(netns: Netns) -> Result<Self, KernelError> {
        let (nl, nft) = (Netlink::in_namespace(&netns)?, Nft::in_namespace(&netns)?);
        Ok(Self { netns, nl, nft, memory: Mutex::default() })
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
        memory.ruleset = None;
        let mut requests: Vec<_> = self.our_rules().await?.iter().map(delete_rule).collect();
        requests.extend(self.our_table_routes().await?.iter().map(delete_route));
        let mut errors = Vec::new();
        if !requests.is_empty() {
            let outcomes = self.nl.batch(requests).await?;
            errors.extend(outcomes.into_iter().filter_map(Result::err).filter(|e| !e.is_absent()));
        }
        if let Err(e) = self.nft.remove(ruleset::FAMILY, ruleset::TABLE).await {
            errors.push(e);
        }
        KernelError::collect("clear the node", errors)
    }

    /// Everything of ours that is in the kernel, a sentence each; empty on a node that never saw us, or no longer does.
    pub async fn leftovers(&self, veth_prefix: &str) -> Result<Vec<String>, KernelError> {
        let mut found = Vec::new();
        let veths = |link: &Link| link.is_veth() && link.name.starts_with(veth_prefix);
        found.extend(self.nl.links().await?.iter().filter(|l| veths(l)).map(|link| format!("interface {}", link.name)));
        let mut routes = self.nl.routes().await?;
        routes.extend(self.nl.routes_of(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)).await?);
        found.extend(routes.iter().filter(|route| route.protocol == PROTOCOL).map(|route| format!("route {route}")));
        found.extend(self.our_rules().await?.iter().map(|rule| format!("rule {rule}")));
        if self.nft.exists(ruleset::FAMILY, ruleset::TABLE).await? {
            found.push(format!("nftables table {}", ruleset::TABLE));
        }
        Ok(found)
    }

    async fn our_rules(&self) -> Result<Vec<Rule>, KernelError> {
        Ok(self.nl.rules().await?.into_iter().filter(|rule| rule.protocol == PROTOCOL).collect())
    }

    async fn our_table_routes(&self) -> Result<Vec<Route>, KernelError> {
        let ours = |route: &Route| route.protocol == PROTOCOL && route.table != RouteTable::MAIN.0;
        Ok(self.nl.routes().await?.into_iter().filter(ours).collect())
    }

    async fn read(&self) -> Result<State, KernelError> {
        Ok(State {
            links: self.nl.links().await?,
            addresses: self.nl.addresses().await?,
            routes: self.nl.routes().await?,
            rules: self.nl.rules().await?,
        })
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

impl Run<'_> {
    async fn node(&mut self, plan: &NodePlan, memory: &mut Memory) {
        self.sysctls(plan, memory);
        let primary = self.link_of(plan.primary.mac);
        match &primary {
            None => {
                self.report.missing_links.insert(plan.primary.id.clone());
            }
            Some(link) => {
                let before = self.errors.len();
                self.link(link, plan.mtu).await;
                self.programmed_since(before, &plan.primary.id);
            }
        }
        let marks = plan.marks;
        let mut node_rules = vec![
            Rule::lookup(priority::TO_PODS, RouteTable::MAIN.0)
                .suppress_prefixlength(SHORTER_THAN_HOST)
                .suppress_group(DEFAULT_GROUP),
            Rule::lookup(priority::TO_PRIMARY, RouteTable::MAIN.0).fwmark(marks.primary, marks.primary),
        ];
        let to_main = |cidr: &Ipv4Net| Rule::lookup(priority::TO_EXTERNAL, RouteTable::MAIN.0).to(IpNet::V4(*cidr));
        node_rules.extend(plan.external_services.iter().map(to_main));
        self.rules(&node_rules).await;
        let (mut wanted_rules, mut wanted_routes) = (node_rules, Vec::new());
        for eni in &plan.enis {
            let rules = eni_rules(eni, marks);
            wanted_rules.extend(rules.iter().cloned());
            let Some(link) = self.link_of(eni.mac) else {
                self.report.missing_links.insert(eni.id.clone());
                continue;
            };
            let before = self.errors.len();
            self.link(&link, plan.mtu).await;
            self.addresses(&link, eni).await;
            let routes = eni_routes(&link, eni);
            self.routes(&routes).await;
            self.rules(&rules).await;
            wanted_routes.extend(routes);
            self.programmed_since(before, &eni.id);
        }
        self.pod_links(&plan.veth_prefix).await;
        // Marks come last: a packet that carries one finds its table.
        if let Some(primary) = primary
            && let Err(e) = self.ruleset(plan, &primary.name, memory).await
        {
            self.errors.push(e);
        }
        self.departed(&wanted_rules, &wanted_routes).await;
    }

    /// By MAC: names change, and come late. Of several links with one MAC the first is the device itself.
    fn link_of(&self, mac: MacAddress) -> Option<Link> {
        self.state.links.iter().find(|link| link.mac == Some(mac)).cloned()
    }

    fn programmed_since(&mut self, errors_before: usize, eni: &EniId) {
        if self.errors.len() == errors_before {
            self.report.programmed.insert(eni.clone());
        }
    }

    /// MTU and state of an ENI's link.
    async fn link(&mut self, link: &Link, mtu: u32) {
        let name = &link.name;
        if link.mtu != mtu {
            let done = self.kernel.nl.set_mtu(name, mtu).await;
            self.note(done, || format!("MTU of {name} set from {} to {mtu}", link.mtu));
        }
        if !link.up {
            let done = self.kernel.nl.set_up(name).await;
            self.note(done, || format!("interface {name} brought up"));
        }
    }

    async fn addresses(&mut self, link: &Link, eni: &EniPlan) {
        let name = &link.name;
        let own = eni_address(eni);
        let here: Vec<IpNet> =
            self.state.addresses.iter().filter(|a| a.link == link.index).map(|address| address.address).collect();
        if !here.contains(&own) {
            let done = self.kernel.nl.one(add_address(link.index, name, own, false)).await.map(drop);
            self.note(done, || format!("address {own} added to {name}"));
        }
        // A pod's address on the ENI itself would make its packets the node's own (images that configure every
        // secondary address do that).
        let is_pods = |address: &IpNet| eni.sources.iter().any(|source| source.contains(&address.addr()));
        for address in here.into_iter().filter(|address| *address != own && is_pods(address)) {
            let done = self.kernel.nl.one(delete_address(link.index, name, address)).await.map(drop);
            self.note(done, || format!("pod address {address} removed from {name}"));
        }
        // Where somebody else added the ENI's address the kernel put its subnet into main, and the node would reach
        // its neighbours by this ENI with the primary's address.
        let subnet = IpNet::V4(eni.subnet.trunc());
        let stray = |route: &&Route| {
            route.table == RouteTable::MAIN.0
                && route.protocol == KERNEL_PROTOCOL
                && route.link == Some(link.index)
                && route.destination == subnet
        };
        let strays: Vec<Route> = self.state.routes.iter().filter(stray).cloned().collect();
        for route in strays {
            let done = self.kernel.nl.one(delete_route(&route)).await.map(drop);
            self.note(done, || format!("the kernel's route {route} by {name} removed from table main"));
        }
    }

    async fn routes(&mut self, wanted: &[Route]) {
        for route in wanted {
            let same = |other: &Route| {
                (other.table, other.destination, other.via, other.link)
                    == (route.table, route.destination, route.via, route.link)
            };
            if !self.state.routes.iter().any(same) {
                let done = self.kernel.nl.one(replace_route(route)).await.map(drop);
                self.note(done, || format!("route {route} set"));
            }
        }
    }

    async fn rules(&mut self, wanted: &[Rule]) {
        for rule in wanted {
            if !self.state.rules.contains(rule) {
                let done = match self.kernel.nl.one(add_rule(rule)).await {
                    Err(e) if e.errno() == Some(nix::errno::Errno::EEXIST) => continue,
                    done => done.map(drop),
                };
                if done.is_ok() {
                    self.state.rules.push(rule.clone());
                }
                self.note(done, || format!("rule {rule} added"));
            }
        }
    }

    /// Pods that the add-on wired are found by its own rules, and by ours once they are in the group.
    async fn pod_links(&mut self, veth_prefix: &str) {
        let outside =
            |link: &&Link| link.is_veth() && link.name.starts_with(veth_prefix) && link.group == DEFAULT_GROUP;
        let pods: Vec<String> = self.state.links.iter().filter(outside).map(|link| link.name.clone()).collect();
        for name in pods {
            match self.kernel.nl.set_group(&name, POD_GROUP).await {
                // The pod may go at any time.
                Err(e) if e.is_absent() => {}
                done => self.note(done, || format!("interface {name} put into group {POD_GROUP}")),
            }
        }
    }

    async fn ruleset(&mut self, plan: &NodePlan, primary: &str, memory: &mut Memory) -> Result<(), KernelError> {
        let nft = &self.kernel.nft;
        let links: Vec<_> = plan.enis.iter().filter_map(|eni| Some((self.link_of(eni.mac)?.name, eni))).collect();
        let table = ruleset::table(plan, primary, &links);
        let digest = table.digest();
        let sentence = match &mut memory.ruleset {
            Some((known, fingerprint)) if *known == digest => {
                if nft.unchanged(&table, fingerprint).await? {
                    return Ok(());
                }
                Some("had been changed or removed by somebody, and was written again")
            }
            // After a restart the table is written once more, for nobody can say whether it was touched; where its
            // comment says that it has the right content there is nothing to tell.
            _ => (!nft.has_digest(&table).await?).then_some("written"),
        };
        memory.ruleset = None;
        memory.ruleset = Some((digest, nft.replace_and_watch(&table).await?));
        self.report.repaired.extend(sentence.map(|text| format!("nftables table {} {text}", table.name())));
        Ok(())
    }

    /// Removes our rules and routes of what is no longer in the plan.
    async fn departed(&mut self, wanted_rules: &[Rule], wanted_routes: &[Route]) {
        let ours = |rule: &&Rule| rule.protocol == PROTOCOL && !wanted_rules.contains(rule);
        let rules: Vec<Rule> = self.state.rules.iter().filter(ours).cloned().collect();
        for rule in rules {
            match self.kernel.nl.delete_rule(&rule).await {
                Err(e) => self.errors.push(e),
                Ok(()) => self.report.repaired.push(format!("rule {rule} deleted")),
            }
        }
        let place = |route: &Route| (route.table, route.destination);
        let wanted: BTreeSet<_> = wanted_routes.iter().map(place).collect();
        let ours = |route: &&Route| {
            route.protocol == PROTOCOL && route.table != RouteTable::MAIN.0 && !wanted.contains(&place(route))
        };
        let routes: Vec<Route> = self.state.routes.iter().filter(ours).cloned().collect();
        for route in routes {
            match self.kernel.nl.one(delete_route(&route)).await {
                Err(e) if !e.is_absent() => self.errors.push(e),
                _ => self.report.repaired.push(format!("route {route} deleted")),
            }
        }
    }

    fn sysctls(&mut self, plan: &NodePlan, memory: &mut Memory) {
        let mut wishes = vec![("net/ipv4/ip_forward".to_owned(), "1")];
        let macs = [plan.primary.mac].into_iter().chain(plan.enis.iter().map(|eni| eni.mac));
        // Packets of a pod's connection may come by one ENI and their reverse route lead by another: loose, not strict.
        wishes.extend(
            macs.filter_map(|mac| self.link_of(mac))
                .map(|link| (format!("net/ipv4/conf/{}/rp_filter", link.name), "2")),
        );
        let set = || Ok(wishes.iter().map(|(key, value)| sysctl::set(key, value)).collect::<Vec<_>>());
        let outcomes = match in_netns(&self.kernel.netns, set) {
            Ok(outcomes) => outcomes,
            Err(source) => {
                let path = self.kernel.netns.path().to_owned();
                return self.errors.push(KernelError::Netns { operation: "write the sysctls of", path, source });
            }
        };
        for ((key, value), outcome) in wishes.iter().zip(outcomes) {
            match outcome {
                Ok(Sysctl::Stood) => {}
                Ok(Sysctl::Changed) => self.report.repaired.push(format!("sysctl {key} set to {value}")),
                Ok(Sysctl::Unknown) => self.complain(memory, format!("sysctl {key} does not exist; {value} is wanted")),
                Ok(Sysctl::ReadOnly) => self.complain(memory, format!("sysctl {key} is read-only; {value} is wanted")),
                Err(e) => self.errors.push(e),
            }
        }
    }

    /// Says once what cannot be mended.
    fn complain(&mut self, memory: &mut Memory, text: String) {
        if memory.complained.insert(text.clone()) {
            self.report.repaired.push(text);
        }
    }

    fn note(&mut self, done: Result<(), KernelError>, sentence: impl FnOnce() -> String) {
        match done {
            Ok(()) => self.report.repaired.push(sentence()),
            Err(e) => self.errors.push(e),
        }
    }
}

fn eni_address(eni: &EniPlan) -> IpNet {
    IpNet::V4(Ipv4Net::new(eni.address, eni.subnet.prefix_len()).unwrap_or_else(|_| Ipv4Net::from(eni.address)))
}

fn eni_routes(link: &Link, eni: &EniPlan) -> Vec<Route> {
    let gateway = IpAddr::V4(eni.gateway());
    let routes = [Route::to_host(gateway), Route::default_via(gateway)];
    routes.into_iter().map(|route| route.table(eni.table.0).link(link.index)).collect()
}

fn eni_rules(eni: &EniPlan, marks: Marks) -> Vec<Rule> {
    vec![
        Rule::lookup(priority::FROM_PODS, eni.table.0).fwmark(eni.mark, marks.eni_mask),
        Rule::lookup(priority::FROM_ENI, eni.table.0).from(IpNet::from(IpAddr::V4(eni.address))),
    ]
}
