//! Pods whose words never reached us: sandboxes that ended without a DEL, and pods that another IPAM wired before us.

use std::collections::BTreeMap;

use super::{ImportedPod, Note, Out, Pool};
use crate::ids::{SandboxId, Time};
use crate::ledger::{Allocation, Record};
use crate::naming::{host_if_name, host_mac_of};
use crate::ports::EniView;

/// A sandbox younger than this may still be being wired.
pub const UNWIRED_GRACE_MS: u64 = 300_000;
/// The kernel is looked at twice, this far apart, before a sandbox is believed gone.
const SECOND_LOOK_MS: u64 = 30_000;
/// Interfaces of one pod that are looked for by name.
const INTERFACES: u32 = 4;

impl Pool {
    /// Releases sandboxes whose network namespace is gone: with it went the veth, and with that the route. Needs neither the
    /// runtime's DEL nor its GC.
    pub(super) fn release_dead_sandboxes(&mut self, now: Time, out: &mut Out) {
        let mut unwired = BTreeMap::new();
        let mut dead = Vec::new();
        for (sandbox, allocation) in &self.ledger.pods {
            if now.since_ms(allocation.at) < UNWIRED_GRACE_MS || self.is_wired(allocation) {
                continue;
            }
            let since = self.unwired.get(sandbox).copied().unwrap_or(now);
            match now.since_ms(since) >= SECOND_LOOK_MS {
                true => dead.push(allocation.clone()),
                false => {
                    unwired.insert(sandbox.clone(), since);
                }
            }
        }
        self.unwired = unwired;
        for allocation in dead {
            out.note(Note::SandboxGone { sandbox: allocation.sandbox.clone(), address: allocation.address });
            self.record(Record::Released { allocation, at: now }, out);
        }
    }

    /// The kernel shows the sandbox: by its route, or by its link where no younger sandbox of the same pod can own that.
    fn is_wired(&self, allocation: &Allocation) -> bool {
        if self.kernel.pods.routes.contains(&allocation.address) {
            return true;
        }
        if allocation.pod.name.is_empty() {
            return false;
        }
        let younger = |other: &Allocation| other.pod == allocation.pod && other.at > allocation.at;
        if self.ledger.pods.values().any(younger) {
            return false;
        }
        let prefix = &self.settings.veth_prefix;
        let pod = &allocation.pod;
        let mac = host_mac_of(&allocation.sandbox);
        (0..INTERFACES).any(|i| self.kernel.pods.has_link(&host_if_name(prefix, &pod.namespace, &pod.name, i), mac))
    }

    /// Takes over the pods of another IPAM. One whose address is on no ENI is kept all the same, as an orphan: what the
    /// metadata does not show today may be there tomorrow, and a running pod must not lose its address to a list.
    pub(super) fn import(&mut self, views: &[EniView], out: &mut Out) {
        let Some(node) = self.ledger.node.clone() else { return };
        for ImportedPod { sandbox, pod, address, at } in std::mem::take(&mut self.imported) {
            let holder = views.iter().find(|view| view.slots.iter().any(|slot| slot.contains(&address)));
            let primary = views.iter().find(|view| view.id == node.primary_eni);
            let Some(eni) = holder.or(primary) else { continue };
            let table = crate::ids::RouteTable::of_eni(eni.card, eni.device);
            let allocation = Allocation {
                sandbox: sandbox.clone(),
                pod,
                address,
                second: None,
                eni: eni.id.clone(),
                device: eni.device,
                table,
                at,
            };
            self.record(Record::Allocated(allocation), out);
            out.note(Note::Imported { sandbox, address, orphan: holder.is_none() });
        }
    }

    /// How many sandboxes the kernel has not shown at the last look.
    pub(super) fn is_unwired(&self, sandbox: &SandboxId) -> bool {
        self.unwired.contains_key(sandbox)
    }
}
