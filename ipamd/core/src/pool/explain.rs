//! Why? Answers from recorded reasons: the state as it is, and the notes of what led there. Nothing is worked out anew.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::compare::list;
use super::{Answer, Note, Out, Pool, RequestId, Setback};
use crate::audit::{self, AuditReport, Views};
use crate::ids::{EniId, PodName, Time};
use crate::ledger::Allocation;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    Pod(PodName),
    Address(IpAddr),
    Eni(EniId),
    /// Why does the pool want what it wants?
    Target,
}

/// The answer, oldest first; lines without a time are about now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub lines: Vec<ExplainLine>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainLine {
    pub at: Option<Time>,
    pub text: String,
}

impl Explanation {
    fn now(&mut self, text: impl Into<String>) {
        self.lines.push(ExplainLine { at: None, text: text.into() });
    }

    fn at(&mut self, at: Time, text: impl Into<String>) {
        self.lines.push(ExplainLine { at: Some(at), text: text.into() });
    }
}

impl Pool {
    pub fn explain(&self, question: &Question, now: Time) -> Explanation {
        let mut answer = Explanation::default();
        match question {
            Question::Pod(pod) => self.explain_pod(pod, now, &mut answer),
            Question::Address(address) => self.explain_address(*address, now, &mut answer),
            Question::Eni(eni) => self.explain_eni(eni, &mut answer),
            Question::Target => self.explain_target(now, &mut answer),
        }
        answer
    }

    fn explain_pod(&self, pod: &PodName, now: Time, answer: &mut Explanation) {
        self.recall(answer, |note| note.names_pod(pod));
        for waiter in self.waiting.iter().filter(|waiter| waiter.pod == *pod) {
            answer.at(waiter.since, format!("{} asked for an address and waits", waiter.sandbox));
            answer.now(self.why_no_address(waiter.since, now).message);
        }
        let held: Vec<&Allocation> = self.ledger.pods.values().filter(|a| a.pod == *pod).collect();
        for allocation in &held {
            answer.at(allocation.at, format!("{} got {}", allocation.sandbox, allocation.address));
            self.explain_address(allocation.address, now, answer);
        }
        if answer.lines.is_empty() {
            answer.now(format!(
                "nothing is known of pod {pod}: it has not asked, or that is longer ago than is remembered"
            ));
        }
    }

    fn explain_address(&self, address: IpAddr, now: Time, answer: &mut Explanation) {
        let slot = self
            .ledger
            .slots
            .iter()
            .find_map(|(eni, slots)| slots.iter().find(|slot| slot.contains(&address)).map(|slot| (eni, *slot)));
        match slot {
            Some((eni, slot)) => {
                self.recall(answer, |note| note.names_slot(&slot));
                answer.now(format!("{address} is in {slot} on {eni}, {}", self.eni_state(eni)));
                if self.ledger.releasing.get(eni).is_some_and(|slots| slots.contains(&slot)) {
                    answer.now(format!("{slot} is being given back and is not handed out"));
                }
                if let Some(since) = self.ledger.unseen.get(eni).and_then(|unseen| unseen.get(&slot)) {
                    answer.at(*since, format!("EC2 did not show {slot}; it is not handed out until it does"));
                }
            }
            None => answer.now(match self.ledger.given_up.iter().find(|(slot, _)| slot.contains(&address)) {
                Some((slot, at)) => format!("{slot} was given up {} s ago", now.since_ms(*at) / 1_000),
                None => format!("{address} is in no slot of this node"),
            }),
        }
        for allocation in self.ledger.pods.values().filter(|a| a.address == address) {
            let wired = match self.is_unwired(&allocation.sandbox) {
                true => "; the kernel shows neither its link nor its route",
                false => "",
            };
            answer.now(format!("pod {} ({}) has it{wired}", allocation.pod, allocation.sandbox));
        }
        let routed = self.kernel.pods.routes.contains(&address);
        if routed && !self.ledger.pods.values().any(|a| a.address == address) {
            answer.now(
                "no sandbox has it, and the kernel routes it to a pod: it stays out of use while that route stands",
            );
        }
        if let Some(at) = self.ledger.freed.get(&address) {
            answer.at(*at, format!("{address} was freed"));
            if let Some(since) = self.cooling_since(&address, now) {
                let left = self.settings.cooldown_ms().saturating_sub(now.since_ms(since)) / 1_000;
                answer.now(format!("it is cooling for {left} s more"));
            }
        }
    }

    fn explain_eni(&self, eni: &EniId, answer: &mut Explanation) {
        self.recall(answer, |note| note.names_eni(eni));
        let Some(record) = self.ledger.enis.get(eni) else {
            let other = self.foreign.values().flatten().any(|id| id == eni);
            answer.now(match other {
                true => format!("{eni} is on this instance and not ours to use"),
                false => format!("{eni} is not known here"),
            });
            return;
        };
        let slots = self.ledger.slots.get(eni).cloned().unwrap_or_default();
        answer.now(format!("{eni} is device {} in {}, {}", record.device, record.subnet, self.eni_state(eni)));
        answer.now(format!(
            "it holds {}",
            if slots.is_empty() { "no address for pods".to_owned() } else { list(&slots) }
        ));
        if let Some(since) = record.leaving {
            answer.at(since, "it is being given back");
        }
        if self.unmanaged.contains(eni) {
            answer.now("its owner has taken it out of our hands by a tag");
        }
        for setback in self.setbacks.values().filter(|s| s.object.contains(eni.as_str())) {
            answer.at(setback.since, format!("{} fails: {}: {}", setback.action, setback.code, setback.message));
        }
    }

    fn explain_target(&self, now: Time, answer: &mut Explanation) {
        self.recall(answer, |note| matches!(note, Note::Grow { .. } | Note::CannotGrow { .. } | Note::Release { .. }));
        match self.target(now) {
            Some(target) => {
                answer.now(target.why.to_string());
                answer.now(format!("wanted: {}; {} more than the target", target.wanted, target.spare));
            }
            None => answer.now("the instance is not known yet, so nothing can be wanted"),
        }
        for setback in self.setbacks.values().filter(|setback| !setback.over) {
            let Setback { action, object, code, failures, .. } = setback;
            answer.at(setback.since, format!("{action} rests for {object} after {failures} refusals ({code})"));
        }
    }

    fn recall(&self, answer: &mut Explanation, which: impl Fn(&Note) -> bool) {
        for (at, note) in self.history.iter().filter(|(_, note)| which(note)) {
            answer.at(*at, note.to_string());
        }
    }

    pub(super) fn audit_asked(&mut self, request: RequestId, now: Time, out: &mut Out) {
        if self.audits.len() >= MAX_AUDITS {
            out.reply(request, Answer::Audited(self.audit()));
            return;
        }
        self.verify_due |= self.may_read();
        self.kernel.recheck_at = Some(now);
        self.audits.push((request, now));
    }

    /// Answers audits once both other views are newer than the question, or it has waited enough.
    pub(super) fn answer_audits(&mut self, now: Time, out: &mut Out) {
        if self.audits.is_empty() {
            return;
        }
        let kernel_at = self.kernel.read_at;
        let cloud_at = self.cloud_seen.as_ref().map(|(at, _)| *at);
        let newest_change = self.live.values().map(|live| live.changed_at).max().unwrap_or_default();
        let asked = self.audits.iter().map(|(_, at)| *at).max().unwrap_or_default();
        if cloud_at.is_some_and(|at| at <= newest_change || at < asked) {
            // Something changed in EC2 since it was read, and comparing with that reading would find ghosts; or what came
            // was on its way already when the question was asked.
            self.verify_due = self.may_read();
        }
        if kernel_at.is_some_and(|at| at < asked) {
            self.kernel.recheck_at = Some(now);
        }
        let may_read = self.may_read();
        let fresh = |asked: Time| {
            let kernel = kernel_at.is_some_and(|at| at >= asked);
            let cloud = !may_read || cloud_at.is_some_and(|at| at >= asked && at > newest_change);
            kernel && cloud
        };
        let (ready, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.audits)
            .into_iter()
            .partition(|(_, asked)| fresh(*asked) || now.since_ms(*asked) >= super::AUDIT_PATIENCE_MS);
        self.audits = waiting;
        for (request, asked) in ready {
            let mut report = self.audit();
            report.cloud_read_at = report.cloud_read_at.filter(|at| *at >= asked);
            report.kernel_read_at = report.kernel_read_at.filter(|at| *at >= asked);
            out.reply(request, Answer::Audited(report));
        }
    }

    /// What differs by the last readings.
    pub fn audit(&self) -> AuditReport {
        let contests: Vec<_> = self.kernel.contests.fought_over().cloned().collect();
        let views = Views {
            cloud: self.cloud_seen.as_ref().map(|(_, views)| views.as_slice()),
            ledger: &self.ledger,
            kernel: &self.kernel.pods,
            data_path: &self.kernel.report,
            veth_prefix: &self.settings.veth_prefix,
            contests: &contests,
        };
        AuditReport {
            cloud_read_at: self.cloud_seen.as_ref().map(|(at, _)| *at),
            kernel_read_at: self.kernel.read_at,
            findings: audit::audit(&views),
        }
    }
}

/// Audits that wait at once; one more is answered from what is known.
const MAX_AUDITS: usize = 16;
