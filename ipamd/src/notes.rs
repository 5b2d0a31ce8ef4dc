//! The pool's notes as log lines and counters: the one place where what happened is put into words for the log.

use std::collections::BTreeSet;

use flatwire_core::pool::Note;
use ipnet::IpNet;

use crate::metrics::Metrics;

fn list(slots: &BTreeSet<IpNet>) -> String {
    slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

pub fn note(note: &Note, metrics: &Metrics) {
    match note {
        Note::NodeKnown { instance, instance_type, addresses, from_ledger } => {
            tracing::info!(instance, instance_type, addresses, from_ledger, "node known");
        }
        Note::ForeignLedger { ledger, node } => {
            tracing::warn!(ledger, node, "the ledger is another instance's and was set aside");
        }
        Note::Grow { why, step } => tracing::info!(why, step, "growing the pool"),
        Note::CannotGrow { why, reason } => tracing::warn!(why, reason, "the pool cannot grow"),
        Note::Gained { eni, slots } => {
            tracing::info!(%eni, slots = list(slots), "addresses gained");
        }
        Note::EniMoved { eni, to, after_ms } => {
            metrics.eni_event(to);
            tracing::info!(%eni, to, after_ms, "eni");
        }
        Note::CloudFailed { error, retry_in_ms } => {
            metrics.error(&error.action);
            let request_id = error.request_id.as_deref().unwrap_or("none");
            tracing::warn!(
                action = error.action,
                code = error.code,
                message = error.message,
                request_id,
                retry_in_ms,
                "a call failed"
            );
        }
        Note::Differs { eni, text } => tracing::warn!(%eni, text, "ec2 and the ledger differ; kept and fenced off"),
        Note::Release { why, eni, slots } => tracing::info!(%eni, slots = list(slots), why, "giving back"),
        Note::GaveUp { eni, slots } => {
            metrics.released(slots);
            tracing::info!(%eni, slots = list(slots), "given back");
        }
        Note::Kept { eni, text } => tracing::info!(%eni, text, "not given back"),
        Note::Reconciled { eni, text } => {
            metrics.cloud_repairs.inc();
            tracing::warn!(%eni, text, "put right between ec2 and the ledger");
        }
        Note::SandboxGone { sandbox, address } => {
            metrics.dead_sandboxes.inc();
            tracing::warn!(%sandbox, %address, "released without a DEL: the kernel shows neither its link nor its route");
        }
        Note::Leaked { eni, to } => {
            metrics.leaked_eni(to);
            tracing::warn!(%eni, to, "an unattached eni of the cluster");
        }
        Note::Imported { sandbox, address, orphan } => {
            tracing::info!(%sandbox, %address, orphan, "taken over from another ipam's state");
        }
        Note::NodeStateChanged { text } => tracing::info!(text, "said of this node"),
        // Logged and counted where it is answered, with the request's own fields.
        Note::Refused { .. } => {}
        Note::CooldownYielded { address, rested_ms } => {
            metrics.cooldown_yielded.inc();
            tracing::info!(%address, rested_ms, "nothing else is free: a cooling address is given early");
        }
        Note::Repaired { kind, text } => {
            metrics.repaired(*kind);
            tracing::warn!(kind = kind.as_str(), text, "put right in the kernel");
        }
        Note::Contested { contest, pause_ms } => {
            tracing::warn!(
                object = contest.object,
                repairs = contest.repairs,
                pause_ms,
                "somebody changes this back again and again; it is let be for a while: find out who, see `ipamd audit`"
            );
        }
        Note::KernelLacks { text } => tracing::warn!(text, "the kernel cannot do something that is wanted"),
        Note::KernelFailed { error } => {
            metrics.error("kernel");
            tracing::error!(error, "the node's data path could not be programmed");
        }
        // Told in its own words: it has nothing to count.
        other => tracing::info!("{other}"),
    }
}
