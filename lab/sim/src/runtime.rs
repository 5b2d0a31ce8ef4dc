//! The kubelet, the runtime and the plugin: pods come and go, and between them and the daemon everything that can be
//! lost, repeated or cut off is, as often as the habits say.
//!
//! Orders of effects are the plugin's own: ADD asks the daemon and then wires; DEL unwires and then tells the daemon, or
//! leaves the release on disk when it is away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flatwire_core::ids::{EniId, PodName, SandboxId, Time};
use flatwire_core::ledger::Allocation;
use flatwire_core::naming::host_if_name;
use flatwire_core::pick::slot_of;
use flatwire_core::pool::{Event, RequestId};
use ipnet::IpNet;

use crate::dice::Dice;
use crate::kernel::SandboxNo;
use crate::node::{Asker, Happening, Node, PodStep, Scene};
use crate::policy::Policy;

const NETWORK: &str = "aws-cni";

/// How often things go wrong between runtime, plugin and daemon, in percent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Habits {
    /// The daemon's answer to an ADD never arrives.
    pub answer_lost: u32,
    /// The plugin is killed, at each of its steps.
    pub plugin_dies: u32,
    /// The plugin cannot wire the pod, undoes all and releases the address.
    pub wiring_fails: u32,
    /// No DEL ever comes: the pod's namespace just goes.
    pub del_lost: u32,
    /// DEL comes again.
    pub del_again: u32,
    /// DEL leaves the pod's route in the kernel for a while.
    pub route_stays: u32,
    /// A pod is deleted while its ADD is under way.
    pub cut_short: u32,
    /// A new pod has the name of an earlier one.
    pub name_again: u32,
    /// The plugin says how long it waits, in milliseconds; 0 if it does not say.
    pub patience_ms: u64,
    /// The daemon hears how many pods are bound to this node.
    pub tell_scheduled: bool,
    /// The kubelet's pause before it tries a pod again, half as long again at most; 0 for a short one that grows.
    pub again_ms: u64,
}

/// A step of the plugin, for one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Add,
    AddFails,
    Veth,
    Route,
    Del,
    Tell,
    /// A route that a DEL left behind goes after all.
    RouteGoes,
}

#[derive(Debug, Clone)]
pub struct Pod {
    pub name: PodName,
    pub sandbox: Option<SandboxNo>,
    pub running: bool,
    /// ADDs that failed so far.
    failures: u32,
}

#[derive(Debug, Clone)]
pub struct Sandbox {
    pub id: SandboxId,
    pub pod: u32,
    /// Name of its host link.
    pub link: String,
    pub address: Option<IpAddr>,
    pub second: Option<IpAddr>,
    /// Of the address.
    pub eni: Option<EniId>,
    /// While the plugin waits for the daemon.
    pub request: Option<RequestId>,
    /// A plugin holds the answer and may still wire.
    pub plugin: bool,
    /// It has had its link, and its namespace still stands.
    pub wired: bool,
    /// A DEL was begun.
    pub ending: bool,
    /// It was taken for gone, and runs on.
    pub stray: bool,
    tells: u32,
}

impl Sandbox {
    /// Its addresses are in these slots of its ENI; the one for egress is in none and needs none.
    pub fn is_routed(&self, by_eni: &BTreeMap<EniId, BTreeSet<IpNet>>) -> bool {
        let of_ec2 = self.address.into_iter().chain(self.second.filter(IpAddr::is_ipv6));
        let slots = self.eni.as_ref().and_then(|eni| by_eni.get(eni));
        slots.is_some_and(|slots| { of_ec2 }.all(|address| slot_of(slots, &address).is_some()))
    }

    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.address.into_iter().chain(self.second)
    }

    /// Packets may come from or go to its address, now or in a moment.
    pub fn is_live(&self) -> bool {
        self.address.is_some() && (self.plugin || self.wired)
    }
}

impl Runtime {
    /// Sandboxes that were taken for gone and run on.
    pub fn strays(&self) -> impl Iterator<Item = &Sandbox> {
        self.sandboxes.values().filter(|sandbox| sandbox.stray)
    }
}

#[derive(Debug)]
pub struct Runtime {
    pub habits: Habits,
    pub pods: BTreeMap<u32, Pod>,
    pub sandboxes: BTreeMap<SandboxNo, Sandbox>,
    /// The queue on disk, with the time each release was written.
    pub releases: BTreeMap<SandboxId, Time>,
    next_pod: u32,
    next_sandbox: SandboxNo,
    dice: Dice,
}

impl Runtime {
    pub fn new(habits: Habits, dice: Dice) -> Self {
        Self {
            habits,
            pods: BTreeMap::new(),
            sandboxes: BTreeMap::new(),
            releases: BTreeMap::new(),
            next_pod: 1,
            next_sandbox: 1,
            dice,
        }
    }

    /// The sandbox with this id, if the runtime still knows it.
    pub fn by_id(&self, id: &SandboxId) -> Option<(SandboxNo, &Sandbox)> {
        let number = id.container_id.strip_prefix('c')?.parse().ok()?;
        self.sandboxes.get(&number).map(|sandbox| (number, sandbox))
    }

    pub fn running(&self) -> usize {
        self.pods.values().filter(|pod| pod.running).count()
    }

    fn happens(&mut self, percent: u32) -> bool {
        percent > 0 && self.dice.percent(percent)
    }
}

impl<P: Policy> Node<P> {
    /// So many pods are bound to this node; each ends by itself after about `life_ms`, if that is given.
    pub fn start_pods(&mut self, count: u32, life_ms: Option<u64>, now: Time) {
        for _ in 0..count {
            let number = self.runtime.next_pod;
            self.runtime.next_pod += 1;
            let again = self.runtime.happens(self.runtime.habits.name_again);
            let again = again.then(|| format!("again-{}", number % 3));
            let taken = |name: &String| self.runtime.pods.values().any(|pod| pod.name.name == *name);
            let name = again.filter(|name| !taken(name)).unwrap_or_else(|| format!("p{number}"));
            let name = PodName { namespace: "sim".to_owned(), name };
            self.runtime.pods.insert(number, Pod { name, sandbox: None, running: false, failures: 0 });
            let at = now.plus_ms(self.runtime.dice.between(0, 50));
            self.queue.push(at, Happening::Pod(number, PodStep::Starts));
            if let Some(life_ms) = life_ms {
                let at = at.plus_ms(self.runtime.dice.between(life_ms / 4, life_ms * 2));
                self.queue.push(at, Happening::Pod(number, PodStep::Ends));
            }
        }
        self.pods_changed(now);
    }

    /// So many pods are deleted, whichever.
    pub fn end_pods(&mut self, count: u32, now: Time) {
        for _ in 0..count {
            let Some(number) = self.runtime.dice.any(self.runtime.pods.keys().copied()) else { return };
            self.queue.push(now.plus_ms(self.runtime.dice.between(0, 2_000)), Happening::Pod(number, PodStep::Ends));
        }
    }

    /// Nobody deletes pods any more.
    pub fn keep_pods(&mut self) {
        self.queue.retain(|happening| !matches!(happening, Happening::Pod(_, PodStep::Ends)));
    }

    /// Pods that were taken for gone end after all.
    pub fn end_strays(&mut self, now: Time) {
        for sandbox in self.runtime.strays() {
            self.queue.push(now, Happening::Pod(sandbox.pod, PodStep::Ends));
        }
    }

    /// The daemon hears a DEL for so many pods that run on.
    pub fn stray_dels(&mut self, count: u32) {
        // What neither the ledger nor the kernel shows nobody can know.
        let routed = |sandbox: &&Sandbox| sandbox.address.is_some_and(|a| self.kernel.routes.contains_key(&a));
        let wired = self.runtime.sandboxes.values().filter(|sandbox| sandbox.wired && !sandbox.ending).filter(routed);
        let mut sandboxes: Vec<SandboxId> = wired.map(|sandbox| sandbox.id.clone()).collect();
        for _ in 0..count.min(u32::try_from(sandboxes.len()).unwrap_or(u32::MAX)) {
            let sandbox = self.runtime.dice.pick(&sandboxes).clone();
            sandboxes.retain(|other| *other != sandbox);
            self.runtime
                .sandboxes
                .values_mut()
                .filter(|known| known.id == sandbox)
                .for_each(|known| known.stray = true);
            self.ask(Asker::Queue(sandbox.clone()), |request| Event::Del { request, sandbox });
        }
    }

    fn pods_changed(&mut self, now: Time) {
        if self.runtime.habits.tell_scheduled {
            let count = u32::try_from(self.runtime.pods.len()).unwrap_or(u32::MAX);
            self.tell_state(now, |state| state.scheduled_pods = Some(count));
        }
    }

    pub(crate) fn pod_steps(&mut self, number: u32, step: PodStep, now: Time, scene: &mut Scene<'_>) {
        let Some(pod) = self.runtime.pods.get_mut(&number) else { return };
        match step {
            PodStep::Starts if pod.sandbox.is_none() => {
                let sandbox = self.runtime.next_sandbox;
                self.runtime.next_sandbox += 1;
                pod.sandbox = Some(sandbox);
                let link = host_if_name(&self.settings.veth_prefix, &pod.name.namespace, &pod.name.name, 0);
                let id = SandboxId {
                    network: NETWORK.to_owned(),
                    container_id: format!("c{sandbox}"),
                    if_name: "eth0".to_owned(),
                };
                let new = Sandbox {
                    id,
                    pod: number,
                    link,
                    address: None,
                    second: None,
                    eni: None,
                    request: None,
                    plugin: false,
                    wired: false,
                    ending: false,
                    stray: false,
                    tells: 0,
                };
                self.runtime.sandboxes.insert(sandbox, new);
                self.later(sandbox, Step::Add, 1, 80, now);
            }
            PodStep::Starts => {}
            PodStep::Ends => {
                let Some(sandbox) = pod.sandbox else {
                    self.runtime.pods.remove(&number);
                    return self.pods_changed(now);
                };
                if !pod.running && !self.runtime.happens(self.runtime.habits.cut_short) {
                    // The kubelet waits for the ADD to end, one way or the other.
                    self.queue.push(now.plus_ms(1_000), Happening::Pod(number, PodStep::Ends));
                    return;
                }
                self.runtime.pods.remove(&number);
                self.pods_changed(now);
                scene.tally.saw("pods ended");
                self.end_sandbox(sandbox, now, scene);
            }
        }
    }

    /// The runtime takes a sandbox down, or forgets to say so.
    fn end_sandbox(&mut self, number: SandboxNo, now: Time, scene: &mut Scene<'_>) {
        let lost = self.runtime.happens(self.runtime.habits.del_lost);
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        if let Some(request) = sandbox.request.take() {
            self.asked.remove(&request);
            self.watch.replied(request);
            if self.daemon.is_some() {
                self.inbox.push(Event::Abandoned { request });
            }
        }
        sandbox.plugin = false;
        if lost {
            scene.story.tell(now, "runtime", || format!("c{number} goes without a DEL"));
            scene.tally.fault("DEL lost");
            self.kernel.drop_sandbox(number);
            self.runtime.sandboxes.remove(&number);
            return;
        }
        sandbox.ending = true;
        self.later(number, Step::Del, 5, 150, now);
    }

    fn later(&mut self, sandbox: SandboxNo, step: Step, least_ms: u64, most_ms: u64, now: Time) {
        let at = now.plus_ms(self.runtime.dice.between(least_ms, most_ms));
        self.queue.push(at, Happening::Sandbox(sandbox, step));
    }

    pub(crate) fn sandbox_steps(&mut self, number: SandboxNo, step: Step, now: Time, scene: &mut Scene<'_>) {
        if step == Step::RouteGoes {
            self.kernel.drop_sandbox(number);
            return;
        }
        let habits = self.runtime.habits;
        let Some(sandbox) = self.runtime.sandboxes.get(&number).cloned() else { return };
        match step {
            Step::Add if !sandbox.ending => self.asks(number, now, scene),
            Step::AddFails if !sandbox.ending => self.add_failed(number, now, scene),
            Step::Veth | Step::Route if !sandbox.plugin => {}
            Step::Veth | Step::Route if self.runtime.happens(habits.plugin_dies) => {
                scene.story.tell(now, "plugin", || format!("killed before it could wire c{number}"));
                scene.tally.fault("plugin killed");
                self.add_failed(number, now, scene);
            }
            Step::Veth if self.runtime.happens(habits.wiring_fails) => {
                scene.story.tell(now, "plugin", || format!("cannot wire c{number}, releases its address"));
                scene.tally.fault("wiring failed");
                self.tell(number, now, scene);
                self.add_failed(number, now, scene);
            }
            Step::Veth => {
                // A link of that name is of an earlier sandbox of the same pod: the plugin takes it away.
                if let Some(earlier) = self.kernel.links.insert(sandbox.link, number) {
                    self.lose_link(earlier);
                }
                if let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) {
                    sandbox.wired = true;
                }
                self.later(number, Step::Route, 1, 5, now);
            }
            Step::Route => self.wired(number, now, scene),
            Step::Del => self.unwires(number, now, scene),
            Step::Tell => self.tell(number, now, scene),
            Step::Add | Step::AddFails | Step::RouteGoes => {}
        }
    }

    fn asks(&mut self, number: SandboxNo, now: Time, scene: &mut Scene<'_>) {
        let patience_ms = Some(self.runtime.habits.patience_ms).filter(|ms| *ms > 0);
        let Some(sandbox) = self.runtime.sandboxes.get(&number) else { return };
        let id = sandbox.id.clone();
        let pod = self.runtime.pods.get(&sandbox.pod).map(|pod| pod.name.clone()).unwrap_or_default();
        // A release of an earlier life of this sandbox must not hit the answer.
        self.runtime.releases.remove(&id);
        scene.story.tell(now, "plugin", || format!("ADD c{number} for {pod}"));
        let add = |request| Event::Add { request, sandbox: id, pod, patience_ms };
        match self.ask(Asker::Add(number), add) {
            Some(request) => {
                if let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) {
                    sandbox.request = Some(request);
                }
                self.watch.asked(request, patience_ms, now);
            }
            None => self.add_failed(number, now, scene),
        }
    }

    /// The daemon handed out an address.
    pub(crate) fn added(&mut self, number: SandboxNo, allocation: &Allocation, now: Time, scene: &mut Scene<'_>) {
        scene.story.tell(now, "ipamd", || format!("c{number} gets {} on {}", allocation.address, allocation.eni));
        scene.tally.saw("addresses handed out");
        self.check_handed_out(number, allocation, now, scene);
        let lost = self.runtime.happens(self.runtime.habits.answer_lost);
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        sandbox.request = None;
        sandbox.address = Some(allocation.address);
        sandbox.second = allocation.second;
        sandbox.eni = Some(allocation.eni.clone());
        if lost {
            scene.story.tell(now, "plugin", || format!("never hears the answer for c{number}"));
            scene.tally.fault("answer lost");
            return self.add_failed(number, now, scene);
        }
        sandbox.plugin = true;
        self.later(number, Step::Veth, 1, 8, now);
    }

    fn wired(&mut self, number: SandboxNo, now: Time, scene: &mut Scene<'_>) {
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        sandbox.plugin = false;
        let (Some(address), pod) = (sandbox.address, sandbox.pod) else { return };
        self.kernel.routes.extend(sandbox.addresses().map(|address| (address, number)));
        scene.story.tell(now, "plugin", || format!("c{number} runs with {address}"));
        scene.tally.saw("pods started");
        if let Some(pod) = self.runtime.pods.get_mut(&pod) {
            pod.running = true;
        }
    }

    /// The runtime takes the failed sandbox down, and the kubelet tries again with a new one.
    pub(crate) fn add_failed(&mut self, number: SandboxNo, now: Time, scene: &mut Scene<'_>) {
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        sandbox.plugin = false;
        sandbox.request = None;
        let pod = sandbox.pod;
        if let Some(known) = self.runtime.pods.get_mut(&pod) {
            known.sandbox = None;
            known.failures += 1;
            let pause = match self.runtime.habits.again_ms {
                0 => self.runtime.dice.between(2_000, 12_000) * u64::from(known.failures.min(6)),
                least => self.runtime.dice.between(least, least * 3 / 2),
            };
            let at = now.plus_ms(pause);
            self.queue.push(at, Happening::Pod(pod, PodStep::Starts));
        }
        self.end_sandbox(number, now, scene);
    }

    /// DEL: the kernel first.
    fn unwires(&mut self, number: SandboxNo, now: Time, scene: &mut Scene<'_>) {
        if !P::QUEUES_RELEASES && self.daemon.is_none() {
            scene.story.tell(now, "plugin", || format!("DEL c{number} fails: no daemon"));
            return self.later(number, Step::Del, 5_000, 20_000, now);
        }
        let habits = self.runtime.habits;
        let (stays, dies) = (self.runtime.happens(habits.route_stays), self.runtime.happens(habits.plugin_dies));
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        let routed = sandbox.address.is_some_and(|address| self.kernel.routes.get(&address) == Some(&number));
        (sandbox.wired, sandbox.plugin) = (false, false);
        if stays && routed {
            self.kernel.links.retain(|_, of| *of != number);
            scene.story.tell(now, "kernel", || format!("the route of c{number} stays behind"));
            scene.tally.fault("route left behind");
            self.later(number, Step::RouteGoes, 5_000, 120_000, now);
        } else {
            self.kernel.drop_sandbox(number);
        }
        scene.story.tell(now, "plugin", || format!("DEL c{number}"));
        if dies {
            scene.story.tell(now, "plugin", || format!("killed before it could release c{number}"));
            scene.tally.fault("plugin killed");
            return self.later(number, Step::Tell, 1_000, 20_000, now);
        }
        self.later(number, Step::Tell, 1, 6, now);
    }

    /// DEL: then the ledger.
    fn tell(&mut self, number: SandboxNo, now: Time, _: &mut Scene<'_>) {
        let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) else { return };
        sandbox.tells += 1;
        let id = sandbox.id.clone();
        if self.ask(Asker::Del(number), |request| Event::Del { request, sandbox: id }).is_none() {
            self.queue_release(number, now);
        }
    }

    /// The daemon did not take it: the release waits on disk.
    pub(crate) fn queue_release(&mut self, number: SandboxNo, now: Time) {
        let Some(sandbox) = self.runtime.sandboxes.get(&number) else { return };
        let first = self.runtime.releases.is_empty();
        self.runtime.releases.insert(sandbox.id.clone(), now);
        if first && self.daemon.is_some() {
            self.queue.push(now.plus_ms(2_000), Happening::DrainsReleases { life: self.life });
        }
        if sandbox.ending {
            self.runtime.sandboxes.remove(&number);
        }
    }

    /// The daemon took the release.
    pub(crate) fn deleted(&mut self, number: SandboxNo, now: Time) {
        let Some(sandbox) = self.runtime.sandboxes.get(&number) else { return };
        if !sandbox.ending {
            return;
        }
        if sandbox.tells < 4 && self.runtime.happens(self.runtime.habits.del_again) {
            return self.later(number, Step::Tell, 500, 15_000, now);
        }
        self.runtime.sandboxes.remove(&number);
    }

    /// A sandbox's host link goes, and its routes with it: the pod lives on without a network.
    pub fn lose_link(&mut self, number: SandboxNo) {
        self.kernel.drop_sandbox(number);
        if let Some(sandbox) = self.runtime.sandboxes.get_mut(&number) {
            sandbox.wired = false;
        }
    }

    /// Pods that have no network any more are deleted: those without a link or route, and those whose address EC2 does
    /// not route to their ENI.
    pub fn delete_wrecks(&mut self, routed: &BTreeMap<EniId, BTreeSet<IpNet>>, now: Time) {
        let whole = |number: SandboxNo| {
            let sandbox = self.runtime.sandboxes.get(&number)?;
            Some(sandbox.is_routed(routed) && self.kernel.routes.get(&sandbox.address?) == Some(&number))
        };
        let wrecked = |pod: &Pod| pod.running && !pod.sandbox.and_then(whole).unwrap_or(false);
        let wrecks: Vec<u32> = self.runtime.pods.iter().filter(|(_, pod)| wrecked(pod)).map(|(n, _)| *n).collect();
        for number in wrecks {
            self.queue.push(now, Happening::Pod(number, PodStep::Ends));
        }
    }

    /// The runtime says which sandboxes it knows; the rest may go.
    pub fn gc(&mut self) {
        let valid: BTreeSet<(String, String)> = self
            .runtime
            .sandboxes
            .values()
            .filter(|sandbox| !sandbox.ending)
            .map(|sandbox| (sandbox.id.container_id.clone(), sandbox.id.if_name.clone()))
            .collect();
        self.ask(Asker::Gc, |request| Event::Gc { request, network: NETWORK.to_owned(), valid });
    }

    /// GC: each stale sandbox is taken down in the kernel and then released, as by DEL.
    pub(crate) fn collect(&mut self, stale: &[Allocation], now: Time, scene: &mut Scene<'_>) {
        for allocation in stale {
            scene.tally.saw("sandboxes collected by GC");
            match self.runtime.by_id(&allocation.sandbox).map(|(number, _)| number) {
                Some(number) => self.later(number, Step::Del, 1, 50, now),
                None => {
                    let sandbox = allocation.sandbox.clone();
                    self.ask(Asker::Queue(sandbox.clone()), |request| Event::Del { request, sandbox });
                }
            }
        }
    }
}
