//! What happened, as data: for the log, the counters, and `explain`.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Failure;
use super::compare::list;
use crate::contest::Contest;
use crate::ids::{EniId, PodName, SandboxId, SubnetId};
use crate::ports::{CloudError, RepairKind, Want};

/// Something an operator would mention, as data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    NodeKnown {
        instance: String,
        instance_type: String,
        addresses: u32,
        from_ledger: bool,
    },
    ForeignLedger {
        ledger: String,
        node: String,
    },
    Grow {
        why: String,
        step: String,
    },
    CannotGrow {
        why: String,
        reason: String,
    },
    Gained {
        eni: EniId,
        slots: BTreeSet<IpNet>,
    },
    EniMoved {
        eni: EniId,
        to: &'static str,
        after_ms: u64,
    },
    CloudFailed {
        error: CloudError,
        retry_in_ms: u64,
    },
    /// EC2 shows something else than the ledger. Kept and reported, never acted on here.
    Differs {
        eni: EniId,
        text: String,
    },
    /// Slots are about to be given back, and why.
    Release {
        why: String,
        eni: EniId,
        slots: BTreeSet<IpNet>,
    },
    /// The ENI no longer holds these slots.
    GaveUp {
        eni: EniId,
        slots: BTreeSet<IpNet>,
    },
    /// A release was called off: somebody uses it, or EC2 refused.
    Kept {
        eni: EniId,
        text: String,
    },
    /// A difference between EC2 and the ledger was put right.
    Reconciled {
        eni: EniId,
        text: String,
    },
    /// A sandbox without link and route in the kernel was released.
    SandboxGone {
        sandbox: SandboxId,
        address: IpAddr,
    },
    /// An ENI of the cluster that belongs to no instance: marked, or collected.
    Leaked {
        eni: EniId,
        to: &'static str,
    },
    /// A pod of another IPAM's state file was taken over.
    Imported {
        sandbox: SandboxId,
        address: IpAddr,
        orphan: bool,
    },
    /// An operator, the API server or EC2 has said something new about this node.
    NodeStateChanged {
        text: String,
    },
    /// The subnet could not give all that one call asked for; the next asks for half.
    AskedTooMuch {
        subnet: SubnetId,
        want: Want,
        code: String,
    },
    /// A pod's patience ended without an address.
    Refused {
        pod: PodName,
        failure: Failure,
    },
    CooldownYielded {
        address: IpAddr,
        rested_ms: u64,
    },
    Repaired {
        kind: RepairKind,
        text: String,
    },
    /// Somebody changes it back again and again: it is let be for a while.
    Contested {
        contest: Contest,
        pause_ms: u64,
    },
    /// The kernel cannot do something that is wanted.
    KernelLacks {
        text: String,
    },
    KernelFailed {
        error: String,
    },
}

impl Note {
    pub(super) fn names_eni(&self, eni: &EniId) -> bool {
        match self {
            Self::Gained { eni: id, .. }
            | Self::EniMoved { eni: id, .. }
            | Self::Differs { eni: id, .. }
            | Self::Release { eni: id, .. }
            | Self::GaveUp { eni: id, .. }
            | Self::Kept { eni: id, .. }
            | Self::Reconciled { eni: id, .. }
            | Self::Leaked { eni: id, .. } => id == eni,
            Self::Grow { step, .. } => step.contains(eni.as_str()),
            _ => false,
        }
    }

    pub(super) fn names_slot(&self, slot: &IpNet) -> bool {
        match self {
            Self::Gained { slots, .. } | Self::Release { slots, .. } | Self::GaveUp { slots, .. } => {
                slots.contains(slot)
            }
            Self::CooldownYielded { address, .. }
            | Self::SandboxGone { address, .. }
            | Self::Imported { address, .. } => slot.contains(address),
            _ => false,
        }
    }

    pub(super) fn names_pod(&self, pod: &PodName) -> bool {
        matches!(self, Self::Refused { pod: name, .. } if name == pod)
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodeKnown { instance, instance_type, addresses, from_ledger } => {
                let from = if *from_ledger { "the ledger" } else { "the instance metadata" };
                write!(f, "this is {instance} ({instance_type}), with {addresses} addresses from {from}")
            }
            Self::ForeignLedger { ledger, node } => write!(f, "the ledger of {ledger} was set aside: this is {node}"),
            Self::Grow { why, step } => write!(f, "{step}, because {why}"),
            Self::CannotGrow { why, reason } => write!(f, "the pool cannot grow: {reason} ({why})"),
            Self::Gained { eni, slots } => write!(f, "{eni} gained {}", list(slots)),
            Self::EniMoved { eni, to, after_ms } => write!(f, "{eni}: {to} after {after_ms} ms"),
            Self::CloudFailed { error, retry_in_ms } => write!(f, "{error}; again in {retry_in_ms} ms"),
            Self::Differs { eni, text } => write!(f, "{eni}: {text}"),
            Self::Release { why, eni, slots } if slots.is_empty() => write!(f, "giving back {eni}, because {why}"),
            Self::Release { why, eni, slots } => write!(f, "giving back {} of {eni}, because {why}", list(slots)),
            Self::GaveUp { eni, slots } => write!(f, "{eni} no longer holds {}", list(slots)),
            Self::Kept { eni, text } => write!(f, "{eni}: not given back: {text}"),
            Self::Reconciled { eni, text } => write!(f, "{eni}: {text}"),
            Self::CooldownYielded { address, rested_ms } => {
                write!(f, "{address} given after {rested_ms} ms of its cool-down: nothing else was to be had")
            }
            Self::Repaired { text, .. } => write!(f, "put right in the kernel: {text}"),
            Self::Contested { contest, pause_ms } => write!(
                f,
                "{} was put right {} times and is changed back each time; it is let be for {} s",
                contest.object,
                contest.repairs,
                pause_ms / 1_000
            ),
            Self::KernelLacks { text } => f.write_str(text),
            Self::KernelFailed { error } => write!(f, "the node's routes could not be programmed: {error}"),
            Self::SandboxGone { sandbox, address } => {
                write!(f, "{address} released: the kernel shows neither link nor route of {sandbox}")
            }
            Self::Leaked { eni, to } => write!(f, "unattached {eni}: {to}"),
            Self::Imported { sandbox, address, orphan: false } => write!(f, "{sandbox} taken over with {address}"),
            Self::Imported { sandbox, address, orphan: true } => {
                write!(f, "{sandbox} taken over with {address}, which no ENI shows: kept, and given to nobody else")
            }
            Self::NodeStateChanged { text } => write!(f, "this node: {text}"),
            Self::AskedTooMuch { subnet, want, code } => {
                write!(f, "{subnet} cannot give {want} at once ({code}); half of that is asked for next")
            }
            Self::Refused { pod, failure } => write!(f, "pod {pod} got no address: {}", failure.message),
        }
    }
}
