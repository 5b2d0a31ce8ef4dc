//! The node's kernel as data: which ENIs are programmed, and the veths and routes of pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flatwire_core::ids::EniId;
use flatwire_core::netplan::NodePlan;
use flatwire_core::ports::{KernelReport, PodsSeen, Repair, RepairKind};
use ipnet::IpNet;

/// A sandbox, by its number in this world.
pub type SandboxNo = u32;

#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// The ruleset and the primary ENI's part stand.
    primary: bool,
    /// Secondary ENIs whose table and rules stand, with the sources steered to each.
    tables: BTreeMap<EniId, BTreeSet<IpNet>>,
    /// Pods' /32 routes.
    pub routes: BTreeMap<IpAddr, SandboxNo>,
    /// Pods' host links by name.
    pub links: BTreeMap<String, SandboxNo>,
    /// Undone by somebody since it was last programmed; `None` is the ruleset.
    undone: BTreeSet<Option<EniId>>,
    /// Programming fails with this.
    pub broken: Option<String>,
}

impl Kernel {
    /// Makes it so; `link` says whether an ENI's link is there.
    pub fn apply(&mut self, plan: &NodePlan, link: impl Fn(&EniId) -> bool) -> Result<KernelReport, String> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut report = KernelReport::default();
        if !self.primary {
            let undone = self.undone.contains(&None);
            report.repaired.push(Repair {
                kind: RepairKind::Nftables,
                object: "ruleset".to_owned(),
                text: "the ruleset was not there".to_owned(),
                undone,
            });
        }
        self.primary = true;
        report.programmed.insert(plan.primary.id.clone());
        self.tables.retain(|id, _| plan.enis.iter().any(|eni| eni.id == *id));
        for eni in &plan.enis {
            if !link(&eni.id) {
                self.tables.remove(&eni.id);
                report.missing_links.insert(eni.id.clone());
                continue;
            }
            if self.tables.get(&eni.id) != Some(&eni.sources) {
                let object = format!("table {} of {}", eni.table, eni.id);
                let text = format!("{object} was not as planned");
                let undone = self.undone.contains(&Some(eni.id.clone()));
                report.repaired.push(Repair { kind: RepairKind::Route, object, text, undone });
                self.tables.insert(eni.id.clone(), eni.sources.clone());
            }
            report.programmed.insert(eni.id.clone());
        }
        self.undone.clear();
        Ok(report)
    }

    pub fn pods(&self) -> PodsSeen {
        PodsSeen {
            routes: self.routes.keys().copied().collect(),
            links: self.links.keys().cloned().collect(),
            ..PodsSeen::default()
        }
    }

    /// Packets of this address leave by this secondary ENI.
    pub fn steers(&self, address: IpAddr, eni: &EniId) -> bool {
        self.primary && self.tables.get(eni).is_some_and(|sources| sources.iter().any(|net| net.contains(&address)))
    }

    pub fn ruleset_stands(&self) -> bool {
        self.primary
    }

    /// Somebody flushes one ENI's table.
    pub fn flush(&mut self, eni: &EniId) {
        self.tables.remove(eni);
        self.undone.insert(Some(eni.clone()));
    }

    pub fn flush_ruleset(&mut self) {
        self.primary = false;
        self.undone.insert(None);
    }

    pub fn programmed(&self) -> impl ExactSizeIterator<Item = &EniId> {
        self.tables.keys()
    }

    /// A sandbox's network namespace is gone, and with it everything of it in the kernel.
    pub fn drop_sandbox(&mut self, sandbox: SandboxNo) {
        self.routes.retain(|_, of| *of != sandbox);
        self.links.retain(|_, of| *of != sandbox);
    }
}
