//! The world: a clock that only moves to what is due next, EC2, one node, its neighbours, and a timeline of what is done
//! to them. One thread, one seed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, SubnetId, Time};
use flatwire_core::pool::{EniConfig, Level};
use flatwire_core::settings::Settings;
use ipnet::IpNet;
use lab_ec2::{Buckets, Caller, Delays, Ec2, Faults, ImdsRule, Options, RunInstance, Tags, When};

use crate::cloud::Cloud;
use crate::dice::Dice;
use crate::invariants::{Rule, TAG_INSTANCE, Violation};
use crate::neighbours::Neighbours;
use crate::node::{Node, Pace, Scene};
use crate::policy::Policy;
use crate::queue::Queue;
use crate::runtime::Habits;
use crate::scenario::{Act, Scenario};
use crate::settle::slots;
use crate::story::{Story, Telling};
use crate::tally::Tally;

/// Wall time when a world begins.
const BEGIN: Time = Time(1_800_000_000_000);
const NODE_KEY: &str = "AKIANODE";
/// Tag by which a subnet is found for new ENIs.
const TAG_SUBNET: &str = "kubernetes.io/role/cni";
const TAG_CLUSTER: &str = "cluster.k8s.amazonaws.com/name";
const TAG_NO_MANAGE: &str = "node.k8s.amazonaws.com/no_manage";
/// Every action a node may need.
const ACTIONS: &[&str] = &[
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "CreateTags",
    "DeleteNetworkInterface",
    "DescribeInstanceTypes",
    "DescribeNetworkInterfaces",
    "DescribeSubnets",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "UnassignPrivateIpAddresses",
];

pub struct World<P> {
    pub now: Time,
    pub ec2: Ec2,
    pub node: Node<P>,
    pub story: Story,
    pub tally: Tally,
    pub neighbours: Neighbours,
    instance: InstanceId,
    pub(crate) subnets: Vec<SubnetId>,
    /// Subnets that new ENIs may be made in.
    pub(crate) eligible: Vec<SubnetId>,
    operators: Vec<EniId>,
    faults: Faults,
    acts: Queue<Act>,
    dice: Dice,
}

impl<P: Policy> World<P> {
    /// A world in which the node has just been launched. A scenario that cannot be set up is a mistake in it.
    pub fn new(scenario: &Scenario, telling: Telling) -> Self {
        let mut dice = Dice::new(scenario.seed);
        let options =
            Options { seed: dice.number(), throttle: scenario.throttle.then(Buckets::published), ..Options::default() };
        let ec2 = Ec2::new(options);
        let now = BEGIN;
        let fits = "invariant: a scenario can be set up";
        let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse().expect(fits), "sim").expect(fits);
        let subnets: Vec<SubnetId> = scenario
            .subnets
            .iter()
            .map(|plan| {
                let tags =
                    if plan.tagged { Tags::from([(TAG_SUBNET.to_owned(), "1".to_owned())]) } else { Tags::new() };
                ec2.create_subnet(now, &vpc, plan.cidr.parse().expect(fits), None, tags).expect(fits)
            })
            .collect();
        let settings = |name: &str| scenario.vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone());
        let settings = Settings::parse(settings).expect("invariant: a scenario's variables are allowed");
        if settings.families.has_v6() {
            let block = ec2.give_vpc_ipv6(now, &vpc).expect(fits);
            for (subnet, block) in subnets.iter().zip(block.subnets(64).expect(fits)) {
                ec2.give_subnet_ipv6(now, subnet, block).expect(fits);
            }
        }
        let subnet = subnets.first().cloned().expect("invariant: a scenario has a subnet");
        let run = RunInstance {
            ipv4_prefix_count: scenario.prefixes_at_launch,
            secondary_private_ip_address_count: scenario.addresses_at_launch,
            ipv6_prefix_count: scenario.ipv6_prefixes_at_launch,
            ..RunInstance::new(scenario.instance_type, subnet.clone())
        };
        let instance = ec2.run_instance(now, &run).expect(fits);
        let now = now.plus_ms(2_000);
        ec2.advance(now);
        let caller = Caller { access_key: NODE_KEY.to_owned(), ..Caller::lab("123456789012") };
        let cloud = Cloud {
            caller,
            instance: instance.clone(),
            page_size: scenario.page_size,
            describe_lag_ms: 0,
            imds_partial: false,
            imds_stands: None,
        };
        let mut node = Node::new(settings, cloud, scenario.habits, scenario.pace, dice.split(), now);
        if let Some(at) = scenario.eni_config {
            let subnet = subnets.get(at).cloned().expect("invariant: the ENIConfig names a subnet of the scenario");
            node.tell_state(now, |state| state.eni_config = Some(EniConfig { subnet, security_groups: Vec::new() }));
        }
        let mut acts = Queue::default();
        for (ms, act) in &scenario.acts {
            acts.push(now.plus_ms(*ms), act.clone());
        }
        let neighbours = Neighbours::new(subnets.clone(), dice.split());
        Self {
            now,
            ec2,
            node,
            story: Story::new(telling, now),
            tally: Tally { seeds: 1, ..Tally::default() },
            neighbours,
            instance,
            eligible: eligible(scenario, &subnets),
            subnets,
            operators: Vec::new(),
            faults: Faults::default(),
            acts,
            dice,
        }
    }

    /// Lets time run until then, or until something happens that must not.
    pub fn run_until(&mut self, until: Time) -> Result<(), Violation> {
        loop {
            let due = [self.node.next(), self.acts.next()].into_iter().flatten().min();
            let Some(due) = due.filter(|due| *due <= until) else { break };
            self.tally.node_ms += due.since_ms(self.now);
            self.now = self.now.max(due);
            while let Some(act) = self.acts.pop(self.now) {
                self.act(act);
            }
            let mut scene = Scene { ec2: &self.ec2, story: &mut self.story, tally: &mut self.tally };
            self.node.advance(self.now, &mut scene);
            let given_back = std::mem::take(&mut self.node.given_back);
            if !given_back.is_empty() {
                self.neighbours.grab(&self.ec2, self.now, given_back);
            }
            self.verdict()?;
        }
        self.tally.node_ms += until.since_ms(self.now);
        self.now = self.now.max(until);
        Ok(())
    }

    pub fn run(&mut self, ms: u64) -> Result<(), Violation> {
        self.run_until(self.now.plus_ms(ms))
    }

    /// Nothing is left on the timeline.
    pub fn timeline_ends(&self) -> Option<Time> {
        self.acts.last()
    }

    pub(crate) fn verdict(&mut self) -> Result<(), Violation> {
        match self.node.watch.violations.first() {
            Some(violation) => Err(violation.clone()),
            None => Ok(()),
        }
    }

    /// Does this to the world, now.
    pub fn act(&mut self, act: Act) {
        let now = self.now;
        self.story.tell(now, "world", || format!("{act:?}"));
        match act {
            Act::Pods { count, life_ms } => self.node.start_pods(count, life_ms, now),
            Act::EndPods { count } => self.node.end_pods(count, now),
            Act::Gc => self.node.gc(),
            Act::Crash { effects, down_ms } => self.node.crash_after(effects, down_ms),
            Act::Kill { down_ms } => {
                let mut scene = Scene { ec2: &self.ec2, story: &mut self.story, tally: &mut self.tally };
                self.node.dies(now, down_ms, &mut scene);
            }
            Act::StrayDels { count } => self.node.stray_dels(count),
            Act::DiskFull(full) => self.node.journal.full = full,
            Act::Faults(mut rules) => {
                for rule in &mut rules {
                    rule.access_key = Some(NODE_KEY.to_owned());
                }
                self.faults.calls = rules;
                self.ec2.set_faults(self.faults.clone());
            }
            Act::ImdsFails(0) => {
                self.faults.imds.clear();
                self.ec2.set_faults(self.faults.clone());
            }
            Act::ImdsFails(per_million) => {
                let when = When::PerMillion(per_million);
                self.faults.imds = vec![ImdsRule { path: "meta-data".to_owned(), when, status: 503 }];
                self.ec2.set_faults(self.faults.clone());
            }
            Act::ImdsPartial(partial) => self.node.cloud.imds_partial = partial,
            Act::ImdsStands(stands) => {
                let now_shown = stands.then(|| self.ec2.metadata(now, &self.instance).ok());
                self.node.cloud.imds_stands = now_shown.flatten();
            }
            Act::Deny(denied) => {
                let allowed: BTreeSet<String> =
                    ACTIONS.iter().filter(|action| !denied.contains(action)).map(|a| (*a).to_owned()).collect();
                self.node.cloud.caller.allow = (!denied.is_empty()).then_some(allowed);
            }
            Act::Delays(delays) => self.ec2.set_delays(delays),
            Act::DescribeLag(ms) => {
                self.ec2.set_describe_lag(ms);
                self.node.cloud.describe_lag_ms = ms;
            }
            Act::Drain { action, calls } => self.ec2.drain(now, action, calls),
            Act::Take { count, prefixes } => self.neighbours.take(&self.ec2, now, count, prefixes),
            Act::Give { count } => self.neighbours.give(&self.ec2, now, count),
            Act::Greedy(greedy) => self.neighbours.greedy = greedy,
            Act::FlushTable => {
                if let Some(eni) = self.dice.any(self.node.kernel.programmed().cloned()) {
                    self.node.kernel.flush(&eni);
                    self.node.watch.flushed_in_kernel(Some(eni), now);
                    self.tally.fault("table flushed");
                }
            }
            Act::FlushRuleset => {
                self.node.kernel.flush_ruleset();
                self.node.watch.flushed_in_kernel(None, now);
                self.tally.fault("ruleset flushed");
            }
            Act::FlushPodRoute => {
                // What neither the ledger nor the kernel knows of, nobody can keep from harm.
                let strays: BTreeSet<_> = self.node.runtime.strays().filter_map(|sandbox| sandbox.address).collect();
                let known = self.node.kernel.routes.keys().copied().filter(|address| !strays.contains(address));
                let known: Vec<IpAddr> = known.collect();
                if let Some(address) = self.dice.any(known.into_iter()) {
                    self.node.kernel.routes.remove(&address);
                    self.tally.fault("pod route flushed");
                }
            }
            Act::DropLink => {
                if let Some(number) = self.dice.any(self.node.kernel.links.values().copied()) {
                    self.node.lose_link(number);
                    self.tally.fault("pod link removed");
                }
            }
            Act::KernelBroken(broken) => {
                self.node.kernel.broken = broken.then(|| "netlink: no buffer space available".to_owned());
            }
            Act::OperatorAttaches { no_manage } => self.operator_attaches(no_manage),
            Act::OperatorDetaches => self.operator_detaches(),
            Act::DeadNode { enis } => self.dead_node(enis),
            Act::StealSlot => self.steal_slot(),
            Act::StealEni => self.steal_eni(),
            Act::Level(level) => self.node.tell_state(now, |state| state.level = level),
            Act::Unschedulable(yes) => self.node.tell_state(now, |state| state.unschedulable = yes),
            Act::Pace(pace) => self.node.pace = pace,
            Act::Quiet => self.quiet(),
        }
    }

    fn operator_attaches(&mut self, no_manage: bool) {
        let tags = match no_manage {
            true => Tags::from([(TAG_NO_MANAGE.to_owned(), "true".to_owned())]),
            false => Tags::new(),
        };
        let Some(subnet) = self.subnets.first() else { return };
        let Ok(eni) = self.ec2.create_eni(self.now, subnet, &[], "an operator's", tags) else { return };
        let taken: BTreeSet<u32> = self.enis_here().iter().map(|(_, device)| device.0).collect();
        let device = (1..15).rev().find(|device| !taken.contains(device)).unwrap_or(1);
        match self.ec2.attach_eni(self.now, &eni, &self.instance, DeviceIndex(device), 0) {
            Ok(_) => self.operators.push(eni),
            Err(_) => drop(self.ec2.delete_eni(self.now, &eni)),
        }
    }

    fn operator_detaches(&mut self) {
        if let Some(eni) = self.operators.pop() {
            self.detach(&eni);
        }
    }

    fn detach(&mut self, eni: &EniId) {
        let attachment = self.ec2.with_enis(self.now, |enis| Some(enis.get(eni)?.attachment.as_ref()?.id.clone()));
        if let Some(attachment) = attachment
            && self.ec2.detach_eni(self.now, &attachment).is_ok()
        {
            self.node.watch.taken_in_cloud(eni, None, self.now);
            self.tally.fault("ENI detached by others");
        }
    }

    fn dead_node(&mut self, enis: u32) {
        let tags = Tags::from([
            (TAG_INSTANCE.to_owned(), "i-0dead".to_owned()),
            (TAG_CLUSTER.to_owned(), self.node.settings.cluster_name.clone().unwrap_or_default()),
        ]);
        let Some(subnet) = self.subnets.first() else { return };
        for _ in 0..enis {
            let _ = self.ec2.create_eni(self.now, subnet, &[], "aws-K8S-i-0dead", tags.clone());
        }
    }

    fn steal_slot(&mut self) {
        let all: Vec<(EniId, IpNet)> = self.ec2.with_enis(self.now, |enis| {
            let here = enis.values().filter(|eni| eni.is_on(&self.instance));
            // A /28 is not taken: pods of many would go with it, and nothing new would be seen.
            let small = |slot: &IpNet| !matches!(slot, IpNet::V4(net) if net.prefix_len() < 32);
            here.flat_map(|eni| slots(eni).filter(small).map(|slot| (eni.id.clone(), slot))).collect()
        });
        let Some((eni, slot)) = self.dice.any(all.into_iter()) else { return };
        let taken = match slot {
            IpNet::V4(net) => self.ec2.unassign(self.now, &eni, &[net.addr()], &[]),
            IpNet::V6(net) => self.ec2.unassign_ipv6_prefixes(self.now, &eni, &[net]),
        };
        if taken.is_ok() {
            self.node.watch.taken_in_cloud(&eni, Some(slot), self.now);
            self.tally.fault("slot taken by others");
            self.neighbours.grab(&self.ec2, self.now, BTreeSet::from([slot]));
        }
    }

    fn steal_eni(&mut self) {
        let here = self.enis_here().into_iter().filter(|(_, device)| *device != DeviceIndex::PRIMARY);
        let here: Vec<EniId> = here.map(|(eni, _)| eni).collect();
        if let Some(eni) = self.dice.any(here.into_iter()) {
            self.detach(&eni);
        }
    }

    fn enis_here(&self) -> Vec<(EniId, DeviceIndex)> {
        self.ec2.with_enis(self.now, |enis| {
            let here = enis.values().filter(|eni| eni.is_on(&self.instance));
            here.filter_map(|eni| Some((eni.id.clone(), eni.attachment.as_ref()?.device))).collect()
        })
    }

    fn quiet(&mut self) {
        let now = self.now;
        self.faults = Faults::default();
        self.ec2.set_faults(Faults::default());
        self.ec2.set_delays(Delays::default());
        self.ec2.set_describe_lag(0);
        self.node.cloud.describe_lag_ms = 0;
        self.neighbours.leave(&self.ec2, now);
        self.node.cloud.caller.allow = None;
        self.node.cloud.imds_partial = false;
        self.node.cloud.imds_stands = None;
        self.node.journal.full = false;
        self.node.kernel.broken = None;
        self.node.pace = Pace { cloud_ms: 300, kernel_ms: 20, slow_percent: 0 };
        let Habits { patience_ms, tell_scheduled, .. } = self.node.runtime.habits;
        self.node.runtime.habits = Habits { patience_ms, tell_scheduled, ..Habits::default() };
        self.node.keep_pods();
        self.node.end_strays(self.now);
        self.node.spare();
        self.node.tell_state(now, |state| {
            state.level = Level::Normal;
            state.unschedulable = false;
        });
    }

    /// Pods whose address others have taken in EC2, or whose link is gone, have no network; an operator deletes them.
    pub(crate) fn clear_wrecks(&mut self) {
        let routed = self.routed();
        self.node.delete_wrecks(&routed, self.now);
    }

    /// Raises what only a whole world can see.
    pub(crate) fn broken(&mut self, rule: Rule, text: String) {
        self.node.watch.broken(rule, text);
    }
}

/// The ENIConfig's subnet; else the node's own and, with discovery, those that are tagged.
fn eligible(scenario: &Scenario, subnets: &[SubnetId]) -> Vec<SubnetId> {
    if let Some(subnet) = scenario.eni_config.and_then(|at| subnets.get(at)) {
        return vec![subnet.clone()];
    }
    let discovery = !scenario.vars.iter().any(|(name, value)| *name == "ENABLE_SUBNET_DISCOVERY" && value == "false");
    let plans = scenario.subnets.iter().enumerate().zip(subnets);
    plans.filter(|((at, plan), _)| *at == 0 || discovery && plan.tagged).map(|(_, subnet)| subnet.clone()).collect()
}
