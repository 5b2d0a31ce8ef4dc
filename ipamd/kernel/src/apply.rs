//! One run over the node: what the plan says is made so, and made so again where somebody has changed it.
//!
//! Level-triggered: each run reads what stands, changes what differs and says what it changed. A second one right after
//! says nothing. Invariant: nothing is ever deleted that does not carry our protocol number (routes, rules), is not our
//! nftables table, or does not stand in the way on an ENI of the plan (a pod's address on the ENI itself, the kernel's
//! subnet route in main); test `what_is_not_ours_is_left_alone`.
//!
//! A run remembers what stood at its end. What stood then and does not now was undone by somebody, and is a repair to be
//! told and counted; the rest is new with the plan.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flatwire_core::ids::{EniId, MacAddress, RouteTable};
use flatwire_core::netplan::{EniPlan, IPV6_ROUTER, Look, Marks, NodePlan, priority};
use flatwire_core::ports::{KernelReport, Repair, RepairKind};
use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::route::{RouteMessage, RouteScope};
use nix::errno::Errno;

use crate::address::{LinkAddress, add_address, delete_address};
use crate::error::KernelError;
use crate::link::{Link, POD_GROUP};
use crate::netns::in_netns;
use crate::nft::{Family, Fingerprint, Table};
use crate::node::NodeKernel;
use crate::route::{PROTOCOL, Route, add_again, add_route, delete_route, replace_route};
use crate::rule::{Rule, add_rule, delete_rule};
use crate::ruleset;
use crate::sysctl::{self, Sysctl};

/// The kernel's number for routes it adds by itself (RTPROT_KERNEL).
const KERNEL_PROTOCOL: u8 = 2;

/// The suppression of everything but host routes.
const SHORTER_THAN_HOST: u32 = 31;
const SHORTER_THAN_IPV6_HOST: u32 = 127;

/// The group of links that nobody put into one.
const DEFAULT_GROUP: u32 = 0;

/// Repairs of failed runs that are kept for the next report.
const MAX_UNTOLD: usize = 1000;

/// What one run leaves to the next.
#[derive(Default)]
pub(crate) struct Memory {
    /// A run has come to its end.
    ran: bool,
    /// Objects that stood as planned at the end of the last run.
    stood: BTreeSet<String>,
    /// Each family's table as this process last wrote or verified it.
    rulesets: BTreeMap<Family, (Table, Fingerprint)>,
    /// Index and name of each ENI's link.
    links: BTreeMap<EniId, (u32, String)>,
    /// The node's own routes by the primary ENI, as they were while there was a default route.
    node_routes: Vec<RouteMessage>,
    /// Repairs made by runs that then failed.
    untold: VecDeque<Repair>,
    /// What the kernel lacks is said once.
    lacking: BTreeSet<String>,
}

/// What stands in the kernel, read once per run.
struct State {
    links: Vec<Link>,
    addresses: Vec<LinkAddress>,
    messages: Vec<RouteMessage>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
}

/// One run: what it read, and what it says.
pub(crate) struct Run<'a> {
    kernel: &'a NodeKernel,
    plan: &'a NodePlan,
    look: &'a Look,
    memory: &'a mut Memory,
    state: State,
    stands: BTreeSet<String>,
    /// Addresses, routes and rules that are not as planned and are let be.
    let_be: usize,
    report: KernelReport,
    errors: Vec<KernelError>,
}

impl<'a> Run<'a> {
    pub async fn new(
        kernel: &'a NodeKernel,
        plan: &'a NodePlan,
        look: &'a Look,
        memory: &'a mut Memory,
    ) -> Result<Self, KernelError> {
        let nl = &kernel.nl;
        // Links before routes: a pod's link comes up and gets its route in one datagram.
        let links = nl.links().await?;
        let addresses = nl.addresses().await?;
        let messages = nl.route_messages(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).await?;
        let mut routes: Vec<Route> = messages.iter().filter_map(Route::parse).collect();
        // At first, to find what a life with other families has left.
        let v6 = plan.families.has_v6() || !memory.ran || look.pods.iter().any(|pod| pod.address.is_ipv6());
        if v6 {
            routes.extend(nl.routes_of(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).await?);
        }
        let state = State { links, addresses, messages, routes, rules: nl.rules().await? };
        let report = KernelReport { repaired: memory.untold.drain(..).collect(), ..KernelReport::default() };
        // What is let be stays what it was: the repair that is made later still is one.
        let stands = memory.stood.intersection(&look.let_be).cloned().collect();
        let errors = Vec::new();
        Ok(Self { kernel, plan, look, memory, state, stands, let_be: 0, report, errors })
    }

    pub async fn node(mut self) -> Result<KernelReport, KernelError> {
        self.all().await;
        self.memory.stood = mem::take(&mut self.stands);
        self.memory.ran = true;
        if self.errors.is_empty() {
            return Ok(self.report);
        }
        self.memory.untold.extend(self.report.repaired);
        while self.memory.untold.len() > MAX_UNTOLD {
            self.memory.untold.pop_front();
        }
        KernelError::collect("program the node", self.errors)?;
        Ok(KernelReport::default())
    }

    async fn all(&mut self) {
        let plan = self.plan;
        self.sysctls();
        let primary = self.link_of(plan.primary.mac);
        match &primary {
            None => {
                self.report.missing_links.insert(plan.primary.id.clone());
            }
            Some(link) => {
                let before = self.trouble();
                self.link(&plan.primary.id, link).await;
                self.programmed_since(before, &plan.primary.id);
                self.node_routes(link).await;
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
        if plan.families.has_v6() {
            node_rules.extend([
                Rule::lookup(priority::TO_PODS, RouteTable::MAIN.0)
                    .v6()
                    .suppress_prefixlength(SHORTER_THAN_IPV6_HOST)
                    .suppress_group(DEFAULT_GROUP),
                Rule::lookup(priority::TO_PRIMARY, RouteTable::MAIN.0).v6().fwmark(marks.primary, marks.primary),
            ]);
        }
        let before = self.trouble();
        self.rules(&node_rules).await;
        let mut shared = self.trouble() == before;
        let (mut wanted_rules, mut wanted_routes) = (node_rules, Vec::new());
        for eni in &plan.enis {
            let rules = eni_rules(eni, marks);
            wanted_rules.extend(rules.iter().cloned());
            let Some(link) = self.link_of(eni.mac) else {
                self.report.missing_links.insert(eni.id.clone());
                continue;
            };
            let before = self.trouble();
            self.link(&eni.id, &link).await;
            self.addresses(&link, eni).await;
            let routes = eni_routes(&link, eni);
            self.routes(&routes).await;
            self.rules(&rules).await;
            wanted_routes.extend(routes);
            match self.speaks(&link, eni) {
                true => self.programmed_since(before, &eni.id),
                false => drop(self.report.missing_links.insert(eni.id.clone())),
            }
        }
        self.pod_links().await;
        self.pod_routes().await;
        // Marks come last: a packet that carries one finds its table.
        if let Some(primary) = primary {
            for table in self.tables(&primary.name) {
                match self.ruleset(table).await {
                    Ok(stands) => shared &= stands,
                    Err(e) => self.errors.push(e),
                }
            }
            if let Err(e) = self.departed_table().await {
                self.errors.push(e);
            }
        }
        if !shared {
            // What steers to the secondary ENIs is not all there, and is let be: no pod is to be placed on them.
            self.report.programmed.retain(|id| *id == plan.primary.id);
        }
        self.departed(&wanted_rules, &wanted_routes).await;
        self.forget().await;
    }

    /// True where an object is to be put right: it is not as planned, and nobody fights over it.
    fn is_wrong(&mut self, object: &str, as_planned: bool) -> bool {
        if as_planned {
            self.stands.insert(object.to_owned());
            return false;
        }
        !self.look.let_be.contains(object)
    }

    /// Takes note of what became of putting an object right.
    fn made(&mut self, kind: RepairKind, object: String, done: Result<(), KernelError>, text: String) {
        let undone = self.memory.stood.contains(&object);
        match done {
            Err(e) => {
                self.errors.push(e);
                // Still to be told when it succeeds.
                self.stands.extend(undone.then_some(object));
            }
            Ok(()) => {
                self.stands.insert(object.clone());
                self.report.repaired.push(Repair { kind, object, text, undone });
            }
        }
    }

    /// As `made`, for what stood in the way and was removed: it is somebody's doing unless it was ours.
    fn removed(&mut self, kind: RepairKind, object: String, done: Result<(), KernelError>, text: String) {
        match done {
            Err(e) if !e.is_absent() => self.errors.push(e),
            _ => {
                let undone = self.memory.ran && !self.memory.stood.contains(&object);
                self.report.repaired.push(Repair { kind, object, text, undone });
            }
        }
    }

    /// By MAC: names change, and come late. Of several links with one MAC the first is the device itself.
    fn link_of(&self, mac: MacAddress) -> Option<Link> {
        self.state.links.iter().find(|link| link.mac == Some(mac)).cloned()
    }

    fn trouble(&self) -> usize {
        self.errors.len() + self.let_be
    }

    fn programmed_since(&mut self, trouble_before: usize, eni: &EniId) {
        if self.trouble() == trouble_before {
            self.report.programmed.insert(eni.clone());
        }
    }

    /// Name, MTU and state of an ENI's link.
    async fn link(&mut self, eni: &EniId, link: &Link) {
        let (name, mtu) = (&link.name, self.plan.mtu);
        let before = self.memory.links.insert(eni.clone(), (link.index, name.clone()));
        if let Some((index, old)) = before.filter(|(index, old)| *index == link.index && old != name) {
            // Nothing hangs on the name but what is written by it in this run; routes and rules go by the link's number.
            let text = format!("interface {old} (number {index}) of {eni} is called {name} now, and was followed");
            let object = format!("name of {eni}'s interface");
            self.report.repaired.push(Repair { kind: RepairKind::Link, object, text, undone: true });
        }
        let object = format!("MTU of {name}");
        if self.is_wrong(&object, link.mtu == mtu) {
            let done = self.kernel.nl.set_mtu(name, mtu).await;
            self.made(RepairKind::Link, object, done, format!("MTU of {name} set from {} to {mtu}", link.mtu));
        }
        let object = format!("interface {name}");
        if self.is_wrong(&object, link.up) {
            let done = self.kernel.nl.set_up(name).await;
            self.made(RepairKind::Link, object, done, format!("interface {name} brought up"));
        }
    }

    async fn addresses(&mut self, link: &Link, eni: &EniPlan) {
        let name = &link.name;
        let own = eni_address(eni);
        let here: Vec<IpNet> =
            self.state.addresses.iter().filter(|a| a.link == link.index).map(|address| address.address).collect();
        let object = format!("address {own} of {name}");
        if self.is_wrong(&object, here.contains(&own)) {
            let done = self.kernel.nl.one(add_address(link.index, name, own, false)).await.map(drop);
            self.made(RepairKind::Address, object, done, format!("address {own} added to {name}"));
        } else if !here.contains(&own) {
            self.let_be += 1;
        }
        // A pod's address on the ENI itself would make its packets the node's own (images that configure every
        // secondary address do that).
        let is_pods = |address: &IpNet| eni.sources.iter().any(|source| source.contains(&address.addr()));
        for address in here.into_iter().filter(|address| *address != own && is_pods(address)) {
            let object = format!("pod address {address} on {name}");
            if self.is_wrong(&object, false) {
                let done = self.kernel.nl.one(delete_address(link.index, name, address)).await.map(drop);
                self.removed(RepairKind::Address, object, done, format!("pod address {address} removed from {name}"));
            }
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
            let object = format!("the kernel's route {route} by {name}");
            if self.is_wrong(&object, false) {
                let done = self.kernel.nl.one(delete_route(&route)).await.map(drop);
                let text = format!("{object} removed from table main");
                self.removed(RepairKind::Route, object, done, text);
            }
        }
    }

    /// The router is asked for from the link's own address of IPv6, which a new link has only after a second or two: until
    /// then the first packets of pods would wait.
    fn speaks(&self, link: &Link, eni: &EniPlan) -> bool {
        let own = |address: &LinkAddress| {
            let link_local = matches!(address.address.addr(), IpAddr::V6(v6) if v6.is_unicast_link_local());
            address.link == link.index && link_local && !address.tentative
        };
        eni.ipv6_sources().next().is_none() || self.state.addresses.iter().any(own)
    }

    async fn routes(&mut self, wanted: &[Route]) {
        for route in wanted {
            let same = |other: &Route| {
                (other.table, other.destination, other.via, other.link)
                    == (route.table, route.destination, route.via, route.link)
            };
            let stands = self.state.routes.iter().any(same);
            let object = format!("route {route}");
            if self.is_wrong(&object, stands) {
                let done = self.kernel.nl.one(replace_route(route)).await.map(drop);
                self.made(RepairKind::Route, object, done, format!("route {route} set"));
            } else if !stands {
                self.let_be += 1;
            }
        }
    }

    async fn rules(&mut self, wanted: &[Rule]) {
        for rule in wanted {
            let stands = self.state.rules.contains(rule);
            let object = format!("rule {rule}");
            if self.is_wrong(&object, stands) {
                let done = match self.kernel.nl.one(add_rule(rule)).await {
                    Err(e) if e.errno() == Some(Errno::EEXIST) => {
                        self.stands.insert(object);
                        continue;
                    }
                    done => done.map(drop),
                };
                if done.is_ok() {
                    self.state.rules.push(rule.clone());
                }
                self.made(RepairKind::Rule, object, done, format!("rule {rule} added"));
            } else if !stands {
                self.let_be += 1;
            }
        }
    }

    /// The way out of the node itself is its DHCP client's. But those set it once, and a flushed main table then cuts the
    /// node off for good, pods on the primary ENI with it. So the routes by the primary ENI are remembered as they were
    /// while there was a default route, and put back, as they were, when main has no default route at all, the link is up
    /// and has its address: whoever takes the ENI down, moves the default route elsewhere or gives the lease back is not
    /// in the way of this.
    async fn node_routes(&mut self, link: &Link) {
        let primary = IpAddr::V4(self.plan.primary.address);
        let in_main = |(message, route): (&RouteMessage, Route)| {
            (route.table == RouteTable::MAIN.0).then(|| (message.clone(), route))
        };
        let main: Vec<(RouteMessage, Route)> =
            (self.state.messages.iter()).filter_map(|message| in_main((message, Route::parse(message)?))).collect();
        if main.iter().any(|(_, route)| route.destination.prefix_len() == 0) {
            let by_primary = |route: &Route| route.link == Some(link.index) && route.protocol != PROTOCOL;
            self.memory.node_routes =
                main.into_iter().filter(|(_, r)| by_primary(r)).map(|(message, _)| message).collect();
            return;
        }
        let has_address = self.state.addresses.iter().any(|a| a.link == link.index && a.address.addr() == primary);
        if !link.up || !has_address {
            return;
        }
        let mut gone: Vec<RouteMessage> = self.memory.node_routes.clone();
        gone.retain(|message| !main.iter().any(|(there, _)| there == message));
        // What a gateway is reached by comes before what goes through it.
        gone.sort_by_key(|message| {
            (message.header.scope != RouteScope::Link, message.header.destination_prefix_length == 0)
        });
        for message in gone {
            let Some(route) = Route::parse(&message).filter(|route| route.link == Some(link.index)) else { continue };
            let object = format!("the node's route {route}");
            // It stood, or would not be known.
            self.memory.stood.insert(object.clone());
            if self.is_wrong(&object, false) {
                match self.kernel.nl.one(add_again(&message)).await {
                    Err(e) if e.errno() == Some(Errno::EEXIST) => {}
                    done => {
                        let text = format!("{object} by {} put back into table main", link.name);
                        self.made(RepairKind::NodeRoute, object, done.map(drop), text);
                    }
                }
            }
        }
    }

    /// Pods that the add-on wired are found by its own rules, and by ours once they are in the group.
    async fn pod_links(&mut self) {
        let prefix = &self.plan.veth_prefix;
        let outside = |link: &&Link| link.is_veth() && link.name.starts_with(prefix) && link.group == DEFAULT_GROUP;
        let pods: Vec<String> = self.state.links.iter().filter(outside).map(|link| link.name.clone()).collect();
        for name in pods {
            let object = format!("group of interface {name}");
            if self.is_wrong(&object, false) {
                match self.kernel.nl.set_group(&name, POD_GROUP).await {
                    // The pod may go at any time.
                    Err(e) if e.is_absent() => {}
                    done => {
                        let text = format!("interface {name} put into group {POD_GROUP}");
                        self.removed(RepairKind::Link, object, done, text);
                    }
                }
            }
        }
    }

    /// Host routes of pods whose links stand without. See `PodPlan` for why this can neither make an orphan nor get in the
    /// way of the plugin; held by `a_pods_host_route_is_put_back_only_by_its_own_link`.
    async fn pod_routes(&mut self) {
        let by_name: BTreeMap<&str, &Link> = self.state.links.iter().map(|link| (link.name.as_str(), link)).collect();
        let mut by_address: BTreeMap<IpAddr, Vec<Option<u32>>> = BTreeMap::new();
        let host = |route: &&Route| {
            route.table == RouteTable::MAIN.0 && route.destination.prefix_len() == route.destination.max_prefix_len()
        };
        for route in self.state.routes.iter().filter(host) {
            by_address.entry(route.destination.addr()).or_default().push(route.link);
        }
        let mut wanted = Vec::new();
        for pod in &self.look.pods {
            let Some(link) = by_name.get(pod.link.as_str()) else { continue };
            let proven = link.mac == Some(pod.mac);
            if !link.is_veth() || !link.up || link.peer_netns.is_none() || !(proven || pod.settled) {
                continue;
            }
            let routes = by_address.get(&pod.address).map(Vec::as_slice).unwrap_or_default();
            // Where the name is all the proof there is, a route elsewhere is somebody's who may know better.
            let stands = if proven { routes.contains(&Some(link.index)) } else { !routes.is_empty() };
            if !stands {
                let route = Route::to_host(pod.address).link(link.index);
                let request = if proven { replace_route(&route) } else { add_route(&route) };
                wanted.push((pod.address, link.name.clone(), request));
            }
        }
        wanted.retain(|(address, ..)| !self.look.let_be.contains(&pod_object(*address)));
        if wanted.is_empty() {
            return;
        }
        let (about, requests): (Vec<_>, Vec<_>) =
            wanted.into_iter().map(|(address, link, request)| ((address, link), request)).unzip();
        let outcomes = match self.kernel.nl.batch(requests).await {
            Ok(outcomes) => outcomes,
            Err(e) => return self.errors.push(e),
        };
        for ((address, link), outcome) in about.into_iter().zip(outcomes) {
            match outcome {
                // The pod is going this moment, or somebody else was quicker.
                Err(e) if e.is_absent() || matches!(e.errno(), Some(Errno::ENETDOWN | Errno::EEXIST)) => {}
                Err(e) => self.errors.push(e),
                Ok(_) => {
                    let text = format!("host route of pod {address} by {link} put back");
                    // The link comes up and gets its route in one datagram, so this one has been there.
                    let object = pod_object(address);
                    self.report.repaired.push(Repair { kind: RepairKind::PodRoute, object, text, undone: true });
                }
            }
        }
    }

    fn tables(&self, primary: &str) -> Vec<Table> {
        let links: Vec<_> = self.plan.enis.iter().filter_map(|eni| Some((self.link_of(eni.mac)?.name, eni))).collect();
        let v6 = self.plan.families.has_v6().then(|| ruleset::table_v6(self.plan, primary, &links));
        [ruleset::table(self.plan, primary, &links)].into_iter().chain(v6).collect()
    }

    /// IPv6 may have been switched off since another life of the daemon wrote its table.
    async fn departed_table(&mut self) -> Result<(), KernelError> {
        if self.memory.ran || self.plan.families.has_v6() {
            return Ok(());
        }
        let nft = &self.kernel.nft;
        match nft.exists(Family::Ip6, ruleset::TABLE).await? {
            true => nft.remove(Family::Ip6, ruleset::TABLE).await,
            false => Ok(()),
        }
    }

    /// True where the table stands at the end.
    async fn ruleset(&mut self, table: Table) -> Result<bool, KernelError> {
        let nft = &self.kernel.nft;
        let object = match table.family() {
            ruleset::FAMILY => format!("nftables table {}", table.name()),
            _ => format!("nftables table {} of IPv6", table.name()),
        };
        let touched = match self.memory.rulesets.get_mut(&table.family()) {
            Some((known, fingerprint)) => Some(!nft.unchanged(known, fingerprint).await?),
            None => None,
        };
        let same = self.memory.rulesets.get(&table.family()).is_some_and(|(known, _)| *known == table);
        if touched == Some(false) && same {
            self.stands.insert(object);
            return Ok(true);
        }
        // After a restart the table is written once more, for nobody can say whether it was touched; where its comment says
        // that it has the right content there is nothing to tell.
        let told = touched.is_some() || !nft.has_digest(&table).await?;
        if !self.is_wrong(&object, false) {
            return Ok(false);
        }
        let fingerprint = nft.replace_and_watch(&table).await?;
        self.memory.rulesets.insert(table.family(), (table, fingerprint));
        let undone = touched == Some(true);
        let text = match undone {
            true => format!("{object} had been changed or removed by somebody, and was written again"),
            false => format!("{object} written"),
        };
        self.stands.insert(object.clone());
        if told {
            self.report.repaired.push(Repair { kind: RepairKind::Nftables, object, text, undone });
        }
        Ok(true)
    }

    /// Removes our rules and routes of what is no longer in the plan.
    async fn departed(&mut self, wanted_rules: &[Rule], wanted_routes: &[Route]) {
        let ours = |rule: &&Rule| rule.protocol == PROTOCOL && !wanted_rules.contains(rule);
        let rules: Vec<Rule> = self.state.rules.iter().filter(ours).cloned().collect();
        for rule in rules {
            let object = format!("rule {rule}");
            if self.is_wrong(&object, false) {
                let done = self.kernel.nl.one(delete_rule(&rule)).await.map(drop);
                self.removed(RepairKind::Rule, object, done, format!("rule {rule} deleted"));
            }
        }
        let place = |route: &Route| (route.table, route.destination);
        let wanted: BTreeSet<_> = wanted_routes.iter().map(place).collect();
        let ours = |route: &&Route| {
            route.protocol == PROTOCOL && route.table != RouteTable::MAIN.0 && !wanted.contains(&place(route))
        };
        let routes: Vec<Route> = self.state.routes.iter().filter(ours).cloned().collect();
        for route in routes {
            let object = format!("route {route}");
            if self.is_wrong(&object, false) {
                let done = self.kernel.nl.one(delete_route(&route)).await.map(drop);
                self.removed(RepairKind::Route, object, done, format!("route {route} deleted"));
            }
        }
    }

    fn sysctls(&mut self) {
        let mut wishes = vec![("net/ipv4/ip_forward".to_owned(), "1")];
        let plan = self.plan;
        if plan.families.has_v6() {
            // A router stops listening to others unless told to; so told before it is one, it keeps the way out it has learnt.
            let primary = self.link_of(plan.primary.mac);
            wishes.extend(primary.map(|link| (format!("net/ipv6/conf/{}/accept_ra", link.name), "2")));
            wishes.push(("net/ipv6/conf/all/forwarding".to_owned(), "1"));
            let links = plan.enis.iter().filter_map(|eni| self.link_of(eni.mac));
            wishes.extend(links.map(|link| (format!("net/ipv6/conf/{}/disable_ipv6", link.name), "0")));
        }
        let macs = [plan.primary.mac].into_iter().chain(plan.enis.iter().map(|eni| eni.mac));
        // Packets of a pod's connection may come by one ENI and their reverse route lead by another: loose, not strict.
        wishes.extend(
            macs.filter_map(|mac| self.link_of(mac))
                .map(|link| (format!("net/ipv4/conf/{}/rp_filter", link.name), "2")),
        );
        wishes.retain(|(key, _)| !self.look.let_be.contains(&format!("sysctl {key}")));
        let set = || Ok(wishes.iter().map(|(key, value)| sysctl::set(key, value)).collect::<Vec<_>>());
        let outcomes = match in_netns(&self.kernel.netns, set) {
            Ok(outcomes) => outcomes,
            Err(source) => {
                let path = self.kernel.netns.path().to_owned();
                return self.errors.push(KernelError::Netns { operation: "write the sysctls of", path, source });
            }
        };
        for ((key, value), outcome) in wishes.iter().zip(outcomes) {
            let object = format!("sysctl {key}");
            match outcome {
                Ok(Sysctl::Stood) => drop(self.stands.insert(object)),
                Ok(Sysctl::Changed) => {
                    let text = format!("{object} set to {value}");
                    self.made(RepairKind::Sysctl, object, Ok(()), text);
                }
                Ok(Sysctl::Unknown) => self.lacks(format!("{object} does not exist; {value} is wanted")),
                Ok(Sysctl::ReadOnly) => self.lacks(format!("{object} is read-only; {value} is wanted")),
                Err(e) => self.errors.push(e),
            }
        }
    }

    /// Drops what the kernel remembers of addresses that pods have left.
    async fn forget(&mut self) {
        if let Err(e) = self.kernel.conntrack.forget(&self.look.left).await {
            // A kernel without ctnetlink: as it is with the add-on.
            self.lacks(format!("connections of addresses that pods have left are not forgotten: {e}"));
        }
    }

    /// Says once what cannot be mended.
    fn lacks(&mut self, text: String) {
        if self.memory.lacking.insert(text.clone()) {
            self.report.lacking.push(text);
        }
    }
}

fn pod_object(address: IpAddr) -> String {
    format!("host route of pod {address}")
}

fn eni_address(eni: &EniPlan) -> IpNet {
    IpNet::V4(Ipv4Net::new(eni.address, eni.subnet.prefix_len()).unwrap_or_else(|_| Ipv4Net::from(eni.address)))
}

fn eni_routes(link: &Link, eni: &EniPlan) -> Vec<Route> {
    let gateway = IpAddr::V4(eni.gateway());
    let routes = [Route::to_host(gateway), Route::default_via(gateway)];
    let v6 = eni.ipv6_sources().next().map(|_| Route::default_via(IpAddr::V6(IPV6_ROUTER)));
    routes.into_iter().chain(v6).map(|route| route.table(eni.table.0).link(link.index)).collect()
}

fn eni_rules(eni: &EniPlan, marks: Marks) -> Vec<Rule> {
    let mut rules = vec![
        Rule::lookup(priority::FROM_PODS, eni.table.0).fwmark(eni.mark, marks.eni_mask),
        Rule::lookup(priority::FROM_ENI, eni.table.0).from(IpNet::from(IpAddr::V4(eni.address))),
    ];
    let v6 = |net| Rule::lookup(priority::FROM_IPV6, eni.table.0).from(net);
    rules.extend(eni.ipv6_sources().map(v6));
    if eni.ipv6_sources().next().is_some() {
        rules.push(Rule::lookup(priority::FROM_PODS, eni.table.0).v6().fwmark(eni.mark, marks.eni_mask));
    }
    rules
}
