//! After the faults: everything must come right by itself, within a bounded time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flatwire_core::families::IPV6_WINDOW;
use flatwire_core::ids::{DeviceIndex, EniId, SubnetId, Time};
use flatwire_core::ledger::Progress;
use flatwire_core::limits;
use flatwire_core::pool::Event;
use flatwire_core::target::{Mode, PREFIX_SIZE, Wanted};
use ipnet::IpNet;
use lab_ec2::EniInfo;

use crate::cloud::list;
use crate::invariants::{Rule, TAG_INSTANCE, Violation};
use crate::node::Asker;
use crate::policy::Policy;
use crate::world::World;

/// How long between two looks.
const LOOK_EVERY_MS: u64 = 60_000;
/// Everything must hold for so many looks in a row.
const HOLDS_FOR: u32 = 3;
/// The longest rest after a failure is ten minutes and half again; several may follow each other.
const SOON_MS: u64 = 3_600_000;
/// Leaked ENIs are looked for every hour or two, marked, and deleted later.
const LEAKS_MS: u64 = 4 * 3_600_000;

type Check<P> = fn(&World<P>) -> Option<String>;

impl<P: Policy> World<P> {
    /// What is wrong now, and how long after the faults it may be.
    fn wrong(&self) -> Vec<(String, u64)> {
        let checks: [(Check<P>, u64); 9] = [
            (Self::daemon_runs, SOON_MS),
            (Self::pods_run, SOON_MS),
            (Self::nothing_is_under_way, SOON_MS),
            (Self::pool_is_as_wanted, SOON_MS),
            (Self::ledger_is_cloud, SOON_MS),
            (Self::ledger_is_runtime, SOON_MS),
            (Self::kernel_is_ledger, SOON_MS),
            (Self::audit_is_clean, SOON_MS),
            (Self::nothing_has_leaked, LEAKS_MS),
        ];
        checks.iter().filter_map(|(check, by)| Some((check(self)?, *by))).collect()
    }

    /// The whole of a scenario: its timeline, then quiet, then everything comes right.
    pub fn play(&mut self) -> Result<(), Violation> {
        if let Some(end) = self.timeline_ends() {
            self.run_until(end)?;
        }
        self.settle()
    }

    /// Runs until everything has been right for a while, or has been wrong for too long.
    pub fn settle(&mut self) -> Result<(), Violation> {
        let (begin, mut held) = (self.now, 0);
        // What has leaked may hold the very addresses that are missing.
        let mut leaked_at = begin;
        while held < HOLDS_FOR {
            self.clear_wrecks();
            self.node.ask(Asker::Audit, |request| Event::Audit { request });
            self.run(LOOK_EVERY_MS)?;
            let wrong = self.wrong();
            if self.nothing_has_leaked().is_some() {
                leaked_at = self.now;
            }
            held = if wrong.is_empty() { held + 1 } else { 0 };
            let late = |since: Time, by: &u64| self.now.since_ms(since) >= *by;
            let over = |(_, by): &(String, u64)| late(if *by == LEAKS_MS { begin } else { leaked_at }, by);
            if let Some((text, _)) = wrong.into_iter().find(over) {
                self.broken(Rule::Settles, text);
                return self.verdict();
            }
        }
        Ok(())
    }

    fn daemon_runs(&self) -> Option<String> {
        self.node.daemon().is_none().then(|| "the daemon is not running".to_owned())
    }

    fn pods_run(&self) -> Option<String> {
        let (pods, running) = (self.node.runtime.pods.len(), self.node.runtime.running());
        let able = usize::try_from(self.capacity()).unwrap_or(usize::MAX).min(pods);
        let could = self.node.daemon()?.free_now(self.now) > 0 || self.could_take(false);
        let could = could || self.node.settings.families.is_v6_only();
        (running < able && could).then(|| format!("{running} of {pods} pods run; {able} could"))
    }

    /// Addresses that the node can have for pods, as the limits allow.
    fn capacity(&self) -> u32 {
        let settings = &self.node.settings;
        let ledger = self.node.daemon().map(Policy::ledger);
        let Some(node) = ledger.and_then(|ledger| ledger.node.as_ref()) else { return 0 };
        let Some(kind) = limits::lookup(&node.instance_type) else { return 0 };
        if !settings.provisioning {
            let families = settings.families;
            let serves = |eni: &&&EniInfo| {
                let placed = !settings.custom_networking || !is_primary(eni);
                placed && (!families.has_v6() || !eni.ipv6_prefixes.is_empty())
            };
            let picked_from = |slot: &IpNet| families.picks_from(slot);
            let slots = |enis: &[&EniInfo]| {
                let all = enis.iter().filter(serves).flat_map(|eni| slots(eni));
                all.filter(picked_from).collect::<Vec<IpNet>>()
            };
            return self.with_enis_here(slots).iter().map(flatwire_core::pick::size).sum();
        }
        if settings.families.is_v6_only() {
            return IPV6_WINDOW.min(settings.max_pods);
        }
        let foreign = self.with_enis_here(|enis| {
            let of_others = enis.iter().filter(|eni| !is_primary(eni) && !eni.tags.contains_key(TAG_INSTANCE));
            u32::try_from(of_others.count()).unwrap_or(u32::MAX)
        });
        let enis = kind.max_enis.min(settings.max_eni.unwrap_or(u32::MAX)).saturating_sub(foreign);
        let enis = enis - u32::from(settings.trunk_reserve).min(enis);
        let usable = enis - u32::from(settings.custom_networking).min(enis);
        let size = if settings.mode == Mode::Prefixes && kind.takes_prefixes() { PREFIX_SIZE } else { 1 };
        (usable * (kind.ipv4_per_eni - 1) * size).min(settings.max_pods)
    }

    fn nothing_is_under_way(&self) -> Option<String> {
        let ledger = self.node.daemon()?.ledger();
        if !self.node.settings.provisioning {
            return None;
        }
        let unfinished = ledger.enis.values().find(|eni| eni.progress < Progress::Settled || eni.leaving.is_some());
        if let Some(eni) = unfinished {
            return Some(format!("{} stays {:?}, leaving since {:?}", eni.id, eni.progress, eni.leaving));
        }
        let creation = ledger.creations.values().next();
        creation.map(|creation| format!("the creation {} is never ended", creation.token))
    }

    fn pool_is_as_wanted(&self) -> Option<String> {
        let target = self.node.daemon()?.target(self.now)?;
        if !self.node.settings.provisioning {
            return None;
        }
        if target.wanted != Wanted::Enough && self.could_take(matches!(target.wanted, Wanted::Prefixes(_))) {
            return Some(format!("the pool wants {}: {}", target.wanted, target.why));
        }
        let idle = self.idle_slot(target.surplus)?;
        Some(format!("{idle} is idle, and the pool holds {} more than it should: {}", target.surplus, target.why))
    }

    /// A slot without a pod that is no larger than that. A prefix goes as a whole or not at all.
    fn idle_slot(&self, surplus: u32) -> Option<IpNet> {
        let ledger = self.node.daemon()?.ledger();
        let used = |slot: &IpNet| {
            ledger.pods.values().any(|pod| pod.is_in(slot))
                || self.node.kernel.routes.keys().any(|address| slot.contains(address))
        };
        let slots = ledger.slots.values().flatten().copied();
        let picked_from = |slot: &IpNet| self.node.settings.families.picks_from(slot);
        let small = |slot: &IpNet| flatwire_core::pick::size(slot) <= surplus;
        slots.into_iter().find(|slot| picked_from(slot) && small(slot) && !used(slot))
    }

    /// There is a free slot on an ENI of the node or room for another ENI, and a subnet that could fill it.
    fn could_take(&self, prefix: bool) -> bool {
        let settings = &self.node.settings;
        let ledger = self.node.daemon().map(Policy::ledger);
        let node = ledger.and_then(|ledger| ledger.node.as_ref());
        let Some(kind) = node.and_then(|node| limits::lookup(&node.instance_type)) else { return false };
        // Asked first: the look at the ENIs holds EC2.
        let rooms: BTreeMap<&SubnetId, (u32, bool)> =
            self.subnets.iter().filter_map(|subnet| Some((subnet, self.ec2.room(self.now, subnet)?))).collect();
        let gives = |subnet: &SubnetId, more: u32| {
            let (addresses, block) = rooms.get(subnet).copied().unwrap_or_default();
            if prefix { block && addresses >= 16 + more } else { addresses > more }
        };
        let most = kind.max_enis.min(settings.max_eni.unwrap_or(u32::MAX));
        self.with_enis_here(|enis| {
            let ours = |eni: &&&EniInfo| {
                eni.tags.contains_key(TAG_INSTANCE) || (is_primary(eni) && !settings.custom_networking)
            };
            let slot = |eni: &&EniInfo| eni.slots() < kind.ipv4_per_eni && gives(&eni.subnet, 0);
            let reserve = usize::from(settings.trunk_reserve);
            let room = usize::try_from(most).is_ok_and(|most| enis.len() + reserve < most);
            enis.iter().filter(ours).any(slot) || room && self.eligible.iter().any(|subnet| gives(subnet, 1))
        })
    }

    /// Slot by slot, for every ENI that is ours to use.
    fn ledger_is_cloud(&self) -> Option<String> {
        let ledger = self.node.daemon()?.ledger();
        let cloud: BTreeSet<(EniId, IpNet)> = self.with_enis_here(|enis| {
            let managed = enis.iter().filter(|eni| ledger.enis.contains_key(&eni.id));
            managed.flat_map(|eni| slots(eni).map(|slot| (eni.id.clone(), slot))).collect()
        });
        let held = ledger.slots.iter().flat_map(|(eni, slots)| slots.iter().map(move |slot| (eni.clone(), *slot)));
        let held: BTreeSet<(EniId, IpNet)> = held.collect();
        if held != cloud {
            let missing = list(cloud.difference(&held).map(|(eni, slot)| format!("{slot} on {eni}")));
            let extra = list(held.difference(&cloud).map(|(eni, slot)| format!("{slot} on {eni}")));
            return Some(format!("only EC2 shows [{missing}]; only the ledger holds [{extra}]"));
        }
        let here = self.with_enis_here(|enis| enis.iter().map(|eni| eni.id.clone()).collect::<BTreeSet<EniId>>());
        let gone = ledger.enis.keys().find(|id| !here.contains(*id));
        gone.map(|id| format!("the ledger knows {id}, which is not on this instance"))
    }

    fn ledger_is_runtime(&self) -> Option<String> {
        let ledger = self.node.daemon()?.ledger();
        let live = self.node.runtime.sandboxes.values().filter(|sandbox| sandbox.is_live());
        let live: BTreeSet<(String, Option<IpAddr>)> =
            live.map(|sandbox| (sandbox.id.container_id.clone(), sandbox.address)).collect();
        let held: BTreeSet<(String, Option<IpAddr>)> =
            ledger.pods.values().map(|a| (a.sandbox.container_id.clone(), Some(a.address))).collect();
        (live != held).then(|| {
            let only = |a: &BTreeSet<(String, Option<IpAddr>)>, b| list(a.difference(b).map(|(id, _)| id));
            format!("only the runtime knows [{}]; only the ledger knows [{}]", only(&live, &held), only(&held, &live))
        })
    }

    fn kernel_is_ledger(&self) -> Option<String> {
        let ledger = self.node.daemon()?.ledger();
        let secondary = ledger.enis.values().filter(|eni| eni.device != DeviceIndex::PRIMARY);
        let planned: BTreeSet<&EniId> = secondary.map(|eni| &eni.id).collect();
        let programmed: BTreeSet<&EniId> = self.node.kernel.programmed().collect();
        let differs = planned != programmed || !self.node.kernel.ruleset_stands();
        differs.then(|| format!("programmed are [{}], the ledger has [{}]", list(programmed), list(planned)))
    }

    fn audit_is_clean(&self) -> Option<String> {
        let Some(report) = &self.node.audit else { return Some("no audit was answered".to_owned()) };
        (!report.is_clean()).then(|| {
            let findings = report.findings.iter().map(|f| format!("{} {}: {};", f.kind.as_str(), f.object, f.text));
            format!("the audit is not clean: {}", list(findings))
        })
    }

    fn nothing_has_leaked(&self) -> Option<String> {
        let ledger = self.node.daemon()?.ledger();
        let instance = &self.node.cloud.instance;
        self.ec2.with_enis(self.now, |enis| {
            let made = |eni: &&EniInfo| eni.tags.get(TAG_INSTANCE).map(String::as_str) == Some(instance.as_str());
            let lost =
                enis.values().filter(made).find(|eni| !eni.is_on(instance) && !ledger.enis.contains_key(&eni.id));
            lost.map(|eni| format!("{} is ours, attached to nothing, and nobody knows it", eni.id))
        })
    }

    fn with_enis_here<T>(&self, look: impl FnOnce(&[&EniInfo]) -> T) -> T {
        let instance = &self.node.cloud.instance;
        self.ec2.with_enis(self.now, |enis| {
            let here: Vec<&EniInfo> = enis.values().filter(|eni| eni.is_on(instance)).collect();
            look(&here)
        })
    }

    /// What EC2 routes to pods of this node, by ENI.
    pub(crate) fn routed(&self) -> BTreeMap<EniId, BTreeSet<IpNet>> {
        self.with_enis_here(|enis| enis.iter().map(|eni| (eni.id.clone(), slots(eni).collect())).collect())
    }
}

fn is_primary(eni: &EniInfo) -> bool {
    eni.attachment.as_ref().is_some_and(|attachment| attachment.device == DeviceIndex::PRIMARY)
}

/// What an ENI holds beside its own address.
pub(crate) fn slots(eni: &EniInfo) -> impl Iterator<Item = IpNet> {
    let single = eni.secondary.iter().map(|address| IpNet::from(IpAddr::V4(*address)));
    let prefixes = eni.prefixes.iter().map(|prefix| IpNet::V4(*prefix));
    single.chain(prefixes).chain(eni.ipv6_prefixes.iter().map(|prefix| IpNet::V6(*prefix)))
}
