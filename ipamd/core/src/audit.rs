//! What differs between the three views of the truth: EC2, the ledger and the kernel. Pure: the same views give the same
//! findings. Each names the safe repair and whether ipamd makes it by itself; nothing is repaired here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::contest::Contest;
use crate::ids::{EniId, SandboxId, Time};
use crate::ledger::{Allocation, LedgerState, Progress};
use crate::naming::{host_if_of, host_mac_of};
use crate::ports::{EniStatus, EniView, KernelReport, PodsSeen};

/// A comparison, with the age of what was compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditReport {
    /// When EC2 was read; `None` if it could not be: then only ledger and kernel are compared.
    pub cloud_read_at: Option<Time>,
    /// When the kernel was read.
    pub kernel_read_at: Option<Time>,
    pub findings: Vec<Finding>,
}

impl AuditReport {
    /// All three views were read, and agree.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.cloud_read_at.is_some() && self.kernel_read_at.is_some()
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    pub kind: FindingKind,
    /// The ENI, slot, address or sandbox it is about.
    pub object: String,
    /// What each side says.
    pub text: String,
    /// What puts it right without risk to a running pod.
    pub repair: String,
    /// ipamd does that by itself.
    pub automatic: bool,
}

/// The kinds of differences; also metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// Two sandboxes of the ledger have one address.
    SharedAddress,
    /// A pod's address is on no ENI of this node in EC2.
    PodAddressNotInCloud,
    /// A pod's address is in no slot of the ledger.
    PodAddressNotHeld,
    /// The ledger holds a slot that EC2 does not show.
    SlotNotInCloud,
    /// EC2 shows a slot that the ledger does not hold.
    SlotNotInLedger,
    /// The ledger knows an ENI that EC2 does not show on this instance.
    EniNotInCloud,
    /// EC2 shows an ENI of ours that the ledger does not know.
    EniNotInLedger,
    /// An ENI's link, table or rules do not stand.
    EniNotProgrammed,
    /// A sandbox of the ledger has neither route nor link in the kernel.
    PodNotWired,
    /// A pod route of the kernel belongs to no sandbox of the ledger.
    RouteWithoutPod,
    /// Somebody else keeps changing something of ours in the kernel.
    KernelContested,
}

impl FindingKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SharedAddress => "shared_address",
            Self::PodAddressNotInCloud => "pod_address_not_in_cloud",
            Self::PodAddressNotHeld => "pod_address_not_held",
            Self::SlotNotInCloud => "slot_not_in_cloud",
            Self::SlotNotInLedger => "slot_not_in_ledger",
            Self::EniNotInCloud => "eni_not_in_cloud",
            Self::EniNotInLedger => "eni_not_in_ledger",
            Self::EniNotProgrammed => "eni_not_programmed",
            Self::PodNotWired => "pod_not_wired",
            Self::RouteWithoutPod => "route_without_pod",
            Self::KernelContested => "kernel_contested",
        }
    }
}

/// The three views. `cloud` holds the ENIs that are ours to use, and is `None` when EC2 could not be read.
#[derive(Debug, Clone, Copy)]
pub struct Views<'v> {
    pub cloud: Option<&'v [EniView]>,
    pub ledger: &'v LedgerState,
    pub kernel: &'v PodsSeen,
    pub data_path: &'v KernelReport,
    pub veth_prefix: &'v str,
    pub contests: &'v [Contest],
}

/// Every difference, worst first.
pub fn audit(views: &Views<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    within_ledger(views.ledger, &mut findings);
    if let Some(cloud) = views.cloud {
        cloud_against_ledger(cloud, views.ledger, &mut findings);
    }
    kernel_against_ledger(views, &mut findings);
    findings.extend(views.contests.iter().map(contested));
    findings.sort();
    findings
}

fn within_ledger(ledger: &LedgerState, findings: &mut Vec<Finding>) {
    let mut holders: BTreeMap<IpAddr, Vec<&SandboxId>> = BTreeMap::new();
    for (sandbox, allocation) in &ledger.pods {
        holders.entry(allocation.address).or_default().push(sandbox);
        let held = ledger.slots.values().flatten().any(|slot| slot.contains(&allocation.address));
        if !held {
            findings.push(Finding {
                kind: FindingKind::PodAddressNotHeld,
                object: allocation.address.to_string(),
                text: format!("pod {} ({sandbox}) has it, and no slot of the ledger holds it", allocation.pod),
                repair: "kept for the pod and given to nobody else; it ends with the pod".to_owned(),
                automatic: true,
            });
        }
    }
    for (address, sandboxes) in holders.into_iter().filter(|(_, sandboxes)| sandboxes.len() > 1) {
        let names: Vec<String> = sandboxes.iter().map(ToString::to_string).collect();
        findings.push(Finding {
            kind: FindingKind::SharedAddress,
            object: address.to_string(),
            text: format!("the ledger gives it to {}", names.join(" and ")),
            repair: "delete the pod whose route is not in the kernel, then the others; report this as a bug".to_owned(),
            automatic: false,
        });
    }
}

fn cloud_against_ledger(cloud: &[EniView], ledger: &LedgerState, findings: &mut Vec<Finding>) {
    let shown: BTreeMap<&EniId, &EniView> = cloud.iter().map(|view| (&view.id, view)).collect();
    for (id, eni) in &ledger.enis {
        let pods = ledger.pods.values().filter(|a| a.eni == *id).count();
        let Some(view) = shown.get(id) else {
            if eni.progress >= Progress::Attached && eni.leaving.is_none() {
                findings.push(Finding {
                    kind: FindingKind::EniNotInCloud,
                    object: id.to_string(),
                    text: format!("the ledger has it as device {} with {pods} pods; EC2 does not show it", eni.device),
                    repair: match pods {
                        0 => "forgotten after a second reading".to_owned(),
                        _ => "its pods have no network: delete them, then it is forgotten".to_owned(),
                    },
                    automatic: pods == 0,
                });
            }
            continue;
        };
        let held = ledger.slots.get(id).cloned().unwrap_or_default();
        for slot in held.difference(&view.slots) {
            let users: Vec<_> = ledger.pods.values().filter(|a| a.is_in(slot)).collect();
            let (kind, repair) = match users.is_empty() {
                true => (FindingKind::SlotNotInCloud, "given up after a second reading".to_owned()),
                false => (
                    FindingKind::PodAddressNotInCloud,
                    "assigned to the ENI again by name, if it is still free".to_owned(),
                ),
            };
            let text = format!("the ledger has it on {id} with {} pods; EC2 does not show it there", users.len());
            findings.push(Finding { kind, object: slot.to_string(), text, repair, automatic: true });
        }
        for slot in view.slots.difference(&held) {
            findings.push(Finding {
                kind: FindingKind::SlotNotInLedger,
                object: slot.to_string(),
                text: format!("EC2 shows it on {id}; the ledger does not hold it"),
                repair: "adopted, once a reading cannot be older than its release".to_owned(),
                automatic: true,
            });
        }
    }
    for view in cloud.iter().filter(|view| !ledger.enis.contains_key(&view.id)) {
        if view.status == EniStatus::Detaching {
            continue;
        }
        findings.push(Finding {
            kind: FindingKind::EniNotInLedger,
            object: view.id.to_string(),
            text: format!("EC2 shows it as device {}; the ledger does not know it", view.device),
            repair: "adopted".to_owned(),
            automatic: true,
        });
    }
}

fn contested(contest: &Contest) -> Finding {
    Finding {
        kind: FindingKind::KernelContested,
        object: contest.object.clone(),
        text: format!("put right {} times of late, and somebody has changed it back each time", contest.repairs),
        repair:
            "find who writes it (systemd-networkd, NetworkManager, firewalld, another agent) and make that leave it \
                 alone; ipamd tries again every few minutes at the latest"
                .to_owned(),
        automatic: false,
    }
}

fn kernel_against_ledger(views: &Views<'_>, findings: &mut Vec<Finding>) {
    let Views { ledger, kernel, data_path, veth_prefix, .. } = views;
    for (id, eni) in &ledger.enis {
        if eni.progress >= Progress::Attached && eni.leaving.is_none() && !data_path.programmed.contains(id) {
            let why = match data_path.missing_links.contains(id) {
                true => "its link has not come",
                false => "its table and rules do not stand",
            };
            findings.push(Finding {
                kind: FindingKind::EniNotProgrammed,
                object: id.to_string(),
                text: format!("attached as device {}, and {why}", eni.device),
                repair: "tried again until the link is there; no pod is placed on it meanwhile".to_owned(),
                automatic: true,
            });
        }
    }
    let with_pod: BTreeSet<IpAddr> = ledger.pods.values().flat_map(Allocation::addresses).collect();
    for allocation in ledger.pods.values() {
        if kernel.routes.contains(&allocation.address) {
            continue;
        }
        let link = host_if_of(veth_prefix, &allocation.sandbox, &allocation.pod);
        let (text, repair, automatic) = match kernel.has_link(&link, host_mac_of(&allocation.sandbox)) {
            true => (
                format!("pod {} has its link {link} and no route on the node", allocation.pod),
                "put back once the link is up; if it stays so, restart the pod".to_owned(),
                false,
            ),
            false => (
                format!("pod {} ({}) has neither link nor route", allocation.pod, allocation.sandbox),
                "released after a grace and a second look".to_owned(),
                true,
            ),
        };
        findings.push(Finding {
            kind: FindingKind::PodNotWired,
            object: allocation.address.to_string(),
            text,
            repair,
            automatic,
        });
    }
    let ours = |address: &IpAddr| {
        let inside = |slots: &BTreeSet<IpNet>| slots.iter().any(|slot| slot.contains(address));
        ledger.slots.values().any(inside)
    };
    for address in kernel.routes.iter().filter(|address| !with_pod.contains(*address) && ours(address)) {
        findings.push(Finding {
            kind: FindingKind::RouteWithoutPod,
            object: address.to_string(),
            text: "the kernel routes it to a pod; no sandbox of the ledger has it".to_owned(),
            repair: "kept out of use while the route stands; delete the pod, or its link if nobody owns it".to_owned(),
            automatic: false,
        });
    }
}
