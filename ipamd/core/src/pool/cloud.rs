//! What EC2 and IMDS answer, and what follows from it.

use std::collections::BTreeSet;

use ipnet::{IpNet, Ipv4Net};

use super::grow::TAG_INSTANCE;
use super::setback::Subject;
use super::{Live, Note, Op, OpId, Out, Pool};
use crate::ids::{AttachmentId, DeviceIndex, EniId, Time};
use crate::ledger::{EniRecord, NodeFacts, Progress, Record};
use crate::limits;
use crate::pick;
use crate::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest, EniKind, EniStatus, EniView, Metadata, Want};

/// When EC2 and the ledger differ, EC2 is asked again after this.
pub const VERIFY_AGAIN_MS: u64 = 30_000;
/// An ENI EC2 says it does not know is believed gone only when it is older than this; a new one may not be visible yet.
const VISIBLE_AFTER_MS: u64 = 60_000;

/// Tag with which an operator takes an ENI out of our hands.
pub const NO_MANAGE_TAG: &str = "node.k8s.amazonaws.com/no_manage";

impl Pool {
    /// Finds out who this node is, what its type carries, and has EC2 confirm what the ledger says.
    pub(super) fn learn_node(&mut self, now: Time, out: &mut Out) {
        let asked = |pool: &Self, op: Op, action: &str| {
            pool.under_way(|o| *o == op) || pool.rests(&Subject::Action(action.to_owned()))
        };
        if !self.metadata_read && !asked(self, Op::Metadata, "ImdsRead") {
            self.start(Op::Metadata, CloudRequest::ReadMetadata, now, out);
        }
        let Some(node) = self.ledger.node.clone() else { return };
        if self.limits.is_none() && !asked(self, Op::Limits, "DescribeInstanceTypes") {
            let request = CloudRequest::DescribeInstanceType { instance_type: node.instance_type.clone() };
            self.start(Op::Limits, request, now, out);
        }
        if self.verify_due && self.metadata_read && !asked(self, Op::Verify, "DescribeNetworkInterfaces") {
            self.start(Op::Verify, CloudRequest::DescribeNode { instance: node.instance }, now, out);
        }
    }

    pub(super) fn cloud_answered(
        &mut self,
        id: OpId,
        result: Result<CloudReply, CloudError>,
        now: Time,
        out: &mut Out,
    ) {
        // An answer to a question nobody remembers (asked before a restart of this state) changes nothing.
        let Some((op, asked_at)) = self.ops.remove(&id) else { return };
        match (op, result) {
            (op, Err(error)) => self.cloud_refused(op, error, now, out),
            (Op::Metadata, Ok(CloudReply::Metadata(metadata))) => self.metadata_arrived(metadata, now, out),
            (Op::Limits, Ok(CloudReply::InstanceType(limits))) => {
                self.recovered(&Subject::Action("DescribeInstanceTypes".to_owned()));
                self.limits = Some(limits);
            }
            (Op::Verify, Ok(CloudReply::Enis(views))) => self.node_verified(&views, asked_at, now, out),
            (Op::ReadBack(_), Ok(CloudReply::Eni(view))) => {
                self.recovered(&Subject::Action("DescribeNetworkInterfaces".to_owned()));
                self.compare_slots(&view, asked_at, now, out);
            }
            (Op::Create { token }, Ok(CloudReply::Created(view))) => self.eni_created(&token, &view, now, out),
            (Op::Attach(eni), Ok(CloudReply::Attached { attachment })) => {
                self.eni_attached(&eni, attachment, now, out);
            }
            (Op::Settle(eni), Ok(CloudReply::Done)) => {
                self.recovered(&Subject::Eni(eni.clone()));
                self.advance(&eni, Progress::Settled, "settled", now, out);
            }
            (Op::Assign { eni, want }, Ok(CloudReply::Assigned(slots))) => {
                self.recovered(&Subject::Eni(eni.clone()));
                if matches!(want, Want::Prefixes(_)) {
                    self.recovered(&Subject::EniPrefixes(eni.clone()));
                }
                self.recovered(&Subject::Action("AssignPrivateIpAddresses".to_owned()));
                if let Some(subnet) = self.ledger.enis.get(&eni).map(|record| record.subnet.clone()) {
                    self.recovered(&Subject::Subnet(subnet));
                }
                self.gain(&eni, slots, now, out);
            }
            (Op::Delete(eni), Ok(CloudReply::Done)) => self.forget_eni(&eni, now, out),
            (op, Ok(reply)) => {
                let error = CloudError {
                    kind: CloudErrorKind::Transient,
                    action: format!("{op:?}"),
                    code: "Malformed".to_owned(),
                    message: format!("an answer of another kind: {reply:?}"),
                    request_id: None,
                };
                self.cloud_refused(op, error, now, out);
            }
        }
    }

    fn metadata_arrived(&mut self, metadata: Metadata, now: Time, out: &mut Out) {
        self.recovered(&Subject::Action("ImdsRead".to_owned()));
        let Some(primary) = metadata.enis.iter().find(|eni| eni.mac == metadata.primary_mac).cloned() else {
            let error = CloudError {
                kind: CloudErrorKind::Transient,
                action: "ImdsRead".to_owned(),
                code: "Malformed".to_owned(),
                message: format!("the primary MAC {} is not in the list of ENIs", metadata.primary_mac),
                request_id: None,
            };
            self.set_back(Subject::Action("ImdsRead".to_owned()), "the instance metadata".to_owned(), error, now, out);
            return;
        };
        self.metadata_read = true;
        let facts = NodeFacts {
            instance: metadata.instance,
            instance_type: metadata.instance_type,
            region: metadata.region,
            availability_zone: metadata.availability_zone,
            vpc: metadata.vpc,
            vpc_cidrs: metadata.vpc_cidrs,
            primary_eni: primary.id.clone(),
            security_groups: primary.security_groups.clone(),
        };
        let first_boot = match &self.ledger.node {
            None => true,
            Some(known) if known.instance != facts.instance => {
                // A ledger from a copied disk: its addresses are another instance's.
                let (ledger, node) = (known.instance.to_string(), facts.instance.to_string());
                out.note(Note::ForeignLedger { ledger, node });
                self.live.clear();
                true
            }
            Some(_) => false,
        };
        if self.ledger.node.as_ref() != Some(&facts) {
            self.limits = limits::lookup(&facts.instance_type).map(|t| t.limits());
            self.record(Record::Node(facts.clone()), out);
        }
        self.imds = metadata.enis.iter().map(|eni| (eni.id.clone(), eni.clone())).collect();
        if first_boot {
            // Nothing was ever given up on this node, so what IMDS shows on the primary ENI may be served at once.
            self.verify_due |= metadata.enis.len() > 1;
        }
        if !self.ledger.enis.contains_key(&primary.id) {
            self.adopt(&primary, now, out);
        }
        for view in &metadata.enis {
            let known = self.ledger.slots.get(&view.id).cloned().unwrap_or_default();
            if let Some(live) = self.live.get_mut(&view.id) {
                live.quarantined = view.slots.difference(&known).copied().collect();
                // IMDS may lag, so this fences until EC2 has spoken, and forgets nothing.
                if self.verify_due {
                    live.missing = known.difference(&view.slots).copied().collect();
                }
                self.verify_due |= !live.quarantined.is_empty();
            }
        }
        let addresses = self.ledger.slots.values().flatten().map(pick::size).sum();
        let NodeFacts { instance, instance_type, .. } = facts;
        let instance = instance.to_string();
        out.note(Note::NodeKnown { instance, instance_type, addresses, from_ledger: !first_boot });
    }

    /// EC2's own list of this instance's ENIs: adopts what is ours and unknown, reports what differs, deletes nothing.
    fn node_verified(&mut self, views: &[EniView], asked_at: Time, now: Time, out: &mut Out) {
        self.recovered(&Subject::Action("DescribeNetworkInterfaces".to_owned()));
        self.verify_due = false;
        self.unadopted = false;
        self.foreign_devices.clear();
        for view in views {
            if !is_ours(view) {
                if view.card == 0 {
                    self.foreign_devices.insert(view.device);
                }
                continue;
            }
            if self.ledger.enis.contains_key(&view.id) {
                self.refresh(view, now, out);
            } else {
                self.adopt(view, now, out);
            }
            self.compare_slots(view, asked_at, now, out);
        }
        let seen: BTreeSet<&EniId> = views.iter().map(|view| &view.id).collect();
        for (id, eni) in &self.ledger.enis {
            let Some(live) = self.live.get_mut(id) else { continue };
            if live.changed_at >= asked_at && !seen.contains(id) {
                continue;
            }
            let was_gone = live.gone;
            live.gone = eni.progress >= Progress::Attached && !seen.contains(id);
            if live.gone {
                self.verify_at = Some(now.plus_ms(VERIFY_AGAIN_MS));
            }
            if live.gone && !was_gone {
                out.note(Note::Differs { eni: id.clone(), text: "EC2 does not show it on this instance".to_owned() });
            }
        }
    }

    /// An ENI that is there and that the ledger does not know.
    fn adopt(&mut self, view: &EniView, now: Time, out: &mut Out) {
        let Some(subnet_cidr) = self.subnet_cidr(view) else {
            // Without the subnet's CIDR there is no gateway. IMDS may show it later; until then the ENI only takes a place.
            let text = "the IPv4 CIDR of its subnet is not known; it is not used".to_owned();
            out.note(Note::Differs { eni: view.id.clone(), text });
            if view.card == 0 {
                self.foreign_devices.insert(view.device);
            }
            self.unadopted = true;
            self.verify_at = Some(now.plus_ms(VERIFY_AGAIN_MS));
            return;
        };
        // IMDS does not show whether an ENI goes with its instance; the primary does, as the launch arranged it.
        let progress = match view.device {
            DeviceIndex::PRIMARY => Progress::Settled,
            _ => Progress::Attached,
        };
        let record = EniRecord {
            id: view.id.clone(),
            mac: view.mac,
            device: view.device,
            card: view.card,
            subnet: view.subnet.clone(),
            subnet_cidr,
            primary_ipv4: view.primary_ipv4,
            attachment: view.attachment.clone(),
            progress,
            created: self.made_by_us(view),
            security_groups: view.security_groups.clone(),
            leaving: None,
        };
        self.record(Record::Eni(record), out);
        self.live.insert(view.id.clone(), Live::new(now));
        self.gain(&view.id, view.slots.clone(), now, out);
        out.note(Note::EniMoved { eni: view.id.clone(), to: "adopted", after_ms: 0 });
    }

    /// A known ENI as EC2 shows it now: an attach whose answer was lost shows here.
    fn refresh(&mut self, view: &EniView, now: Time, out: &mut Out) {
        let Some(record) = self.ledger.enis.get(&view.id).cloned() else { return };
        let mut next = record.clone();
        if view.attachment.is_some() {
            next.attachment = view.attachment.clone();
            next.device = view.device;
            next.card = view.card;
            next.progress = record.progress.max(Progress::Attached);
        }
        if next != record {
            if let Some(live) = self.live.get_mut(&view.id) {
                live.since = now;
            }
            self.record(Record::Eni(next), out);
        }
    }

    /// What EC2 shows on an ENI against what the ledger says: more is adopted, less is fenced off and reported.
    fn compare_slots(&mut self, view: &EniView, asked_at: Time, now: Time, out: &mut Out) {
        let held = self.ledger.slots.get(&view.id).cloned().unwrap_or_default();
        let more: BTreeSet<IpNet> = view.slots.difference(&held).copied().collect();
        let less: BTreeSet<IpNet> = held.difference(&view.slots).copied().collect();
        if let Some(live) = self.live.get_mut(&view.id) {
            live.quarantined.clear();
            live.gone = false;
            if live.changed_at >= asked_at {
                // The reading is older than what EC2 has answered since: it may add, and says nothing about what it lacks.
                self.gain(&view.id, more, now, out);
                return;
            }
            if !less.is_empty() {
                self.verify_at = Some(now.plus_ms(VERIFY_AGAIN_MS));
            }
            if live.missing != less && !less.is_empty() {
                let text = format!("EC2 does not show {} any more", list(&less));
                out.note(Note::Differs { eni: view.id.clone(), text });
            }
            live.missing = less;
        }
        self.gain(&view.id, more, now, out);
    }

    fn eni_created(&mut self, token: &str, view: &EniView, now: Time, out: &mut Out) {
        self.recovered(&Subject::Action("CreateNetworkInterface".to_owned()));
        self.recovered(&Subject::Subnet(view.subnet.clone()));
        // New ENIs are made in a subnet that an ENI of this node is in, so its CIDR is known; should it not be, the intent
        // stays open and finds the ENI again.
        let Some(subnet_cidr) = self.subnet_cidr(view) else { return };
        if self.ledger.creations.get(token).is_some_and(|creation| matches!(creation.want, Want::Prefixes(_))) {
            self.recovered(&Subject::SubnetPrefixes(view.subnet.clone()));
        }
        self.record(Record::CreationEnded { token: token.to_owned() }, out);
        if self.ledger.enis.contains_key(&view.id) {
            return;
        }
        let record = EniRecord {
            id: view.id.clone(),
            mac: view.mac,
            device: self.free_device(),
            card: 0,
            subnet: view.subnet.clone(),
            subnet_cidr,
            primary_ipv4: view.primary_ipv4,
            attachment: None,
            progress: Progress::Created,
            created: true,
            security_groups: view.security_groups.clone(),
            leaving: None,
        };
        self.record(Record::Eni(record), out);
        self.live.insert(view.id.clone(), Live::new(now));
        self.gain(&view.id, view.slots.clone(), now, out);
        out.note(Note::EniMoved { eni: view.id.clone(), to: "created", after_ms: 0 });
    }

    fn eni_attached(&mut self, eni: &EniId, attachment: AttachmentId, now: Time, out: &mut Out) {
        self.recovered(&Subject::Eni(eni.clone()));
        self.recovered(&Subject::Action("AttachNetworkInterface".to_owned()));
        if let Some(record) = self.ledger.enis.get(eni).cloned() {
            self.record(Record::Eni(EniRecord { attachment: Some(attachment), ..record }), out);
        }
        self.advance(eni, Progress::Attached, "attached", now, out);
    }

    fn advance(&mut self, eni: &EniId, progress: Progress, to: &'static str, now: Time, out: &mut Out) {
        let Some(record) = self.ledger.enis.get(eni).cloned() else { return };
        self.record(Record::Eni(EniRecord { progress, ..record }), out);
        if let Some(live) = self.live.get_mut(eni) {
            let after_ms = now.since_ms(live.since);
            live.changed_at = now;
            if progress == Progress::Attached {
                live.since = now;
            }
            out.note(Note::EniMoved { eni: eni.clone(), to, after_ms });
        }
    }

    /// New slots, confirmed by EC2.
    pub(super) fn gain(&mut self, eni: &EniId, slots: BTreeSet<IpNet>, now: Time, out: &mut Out) {
        if slots.is_empty() || !self.ledger.enis.contains_key(eni) {
            return;
        }
        if let Some(live) = self.live.get_mut(eni) {
            live.changed_at = now;
        }
        self.record(Record::Held { eni: eni.clone(), slots: slots.clone() }, out);
        out.note(Note::Gained { eni: eni.clone(), slots });
    }

    fn forget_eni(&mut self, eni: &EniId, now: Time, out: &mut Out) {
        self.recovered(&Subject::Eni(eni.clone()));
        self.record(Record::EniGone { eni: eni.clone(), at: now }, out);
        self.live.remove(eni);
        out.note(Note::EniMoved { eni: eni.clone(), to: "deleted", after_ms: 0 });
    }

    /// A call failed. What rests, and what is looked at again, hangs on the class of the error.
    fn cloud_refused(&mut self, op: Op, error: CloudError, now: Time, out: &mut Out) {
        use CloudErrorKind as K;
        let kind = error.kind;
        let by_action = Subject::Action(error.action.clone());
        match op {
            Op::Metadata => {
                self.set_back(
                    Subject::Action("ImdsRead".to_owned()),
                    "the instance metadata".to_owned(),
                    error,
                    now,
                    out,
                );
            }
            Op::Limits | Op::Verify | Op::ReadBack(_) => {
                self.verify_due |= matches!(op, Op::ReadBack(_));
                self.set_back(by_action, "this node".to_owned(), error, now, out);
            }
            Op::Assign { eni, .. } => {
                let subnet = self.ledger.enis.get(&eni).map(|record| record.subnet.clone());
                let subject = match (kind, subnet) {
                    (K::Throttled | K::Denied, _) => by_action,
                    (K::Fragmented, _) => Subject::EniPrefixes(eni.clone()),
                    (K::SubnetEmpty, Some(subnet)) => Subject::Subnet(subnet),
                    _ => Subject::Eni(eni.clone()),
                };
                let object = match &subject {
                    Subject::Subnet(subnet) => subnet.to_string(),
                    _ => eni.to_string(),
                };
                self.set_back(subject, object, error, now, out);
                if kind.outcome_unknown() || kind == K::EniFull {
                    // The call has no client token: read the ENI and adopt what came, rather than ask twice.
                    self.start(Op::ReadBack(eni.clone()), CloudRequest::DescribeEni { eni }, now, out);
                }
            }
            Op::Create { token } => {
                let creation = self.ledger.creations.get(&token).cloned();
                let subject = match (kind, &creation) {
                    (K::Fragmented, Some(c)) => Subject::SubnetPrefixes(c.subnet.clone()),
                    (K::SubnetEmpty, Some(c)) => Subject::Subnet(c.subnet.clone()),
                    _ => by_action,
                };
                let object = creation.map_or_else(|| "a new ENI".to_owned(), |c| c.subnet.to_string());
                self.set_back(subject, object, error, now, out);
                // The token makes a repeated creation find the first: only a definite no ends the intent.
                if !kind.outcome_unknown() && kind != K::Throttled {
                    self.record(Record::CreationEnded { token }, out);
                }
            }
            Op::Attach(eni) if kind == K::NotFound && self.is_lost(&eni, now) => self.forget_eni(&eni, now, out),
            Op::Attach(eni) => {
                if kind == K::InstanceFull {
                    let attached = self.ledger.enis.values().filter(|e| e.progress >= Progress::Attached).count();
                    let foreign = self.foreign_devices.len();
                    self.learned_max_enis = u32::try_from(attached + foreign).ok();
                }
                if kind == K::DeviceTaken
                    && let Some(record) = self.ledger.enis.get(&eni).cloned()
                {
                    self.foreign_devices.insert(record.device);
                    let device = self.free_device();
                    self.record(Record::Eni(EniRecord { device, ..record }), out);
                }
                // An attach whose answer was lost, or an ENI that is in use: EC2's list says which it is.
                self.verify_due |= kind.outcome_unknown() || kind == K::Busy;
                self.set_back(Subject::Eni(eni.clone()), eni.to_string(), error, now, out);
            }
            Op::Delete(eni) if kind == K::NotFound => self.forget_eni(&eni, now, out),
            Op::Settle(eni) | Op::Delete(eni) => {
                self.set_back(Subject::Eni(eni.clone()), eni.to_string(), error, now, out);
            }
            Op::Program { .. } => {}
        }
    }

    /// Old enough to be visible if it were there, and nothing lives on it: somebody else has deleted it.
    fn is_lost(&self, eni: &EniId, now: Time) -> bool {
        let old = self.live.get(eni).is_some_and(|live| now.since_ms(live.since) > VISIBLE_AFTER_MS);
        old && !self.ledger.pods.values().any(|allocation| allocation.eni == *eni)
    }

    /// The subnet's CIDR, from wherever it is known.
    fn subnet_cidr(&self, view: &EniView) -> Option<Ipv4Net> {
        let by_neighbour = || {
            let known = self.ledger.enis.values().map(|e| (&e.subnet, Some(e.subnet_cidr)));
            let seen = self.imds.values().map(|e| (&e.subnet, e.subnet_cidr));
            known
                .chain(seen)
                .find(|(subnet, cidr)| **subnet == view.subnet && cidr.is_some())
                .and_then(|(_, cidr)| cidr)
        };
        view.subnet_cidr.or_else(by_neighbour)
    }

    /// By the tag every IPAM of this contract puts on the ENIs it makes.
    fn made_by_us(&self, view: &EniView) -> bool {
        let instance = self.ledger.node.as_ref().map(|node| node.instance.as_str());
        view.device != DeviceIndex::PRIMARY && view.tags.get(TAG_INSTANCE).map(String::as_str) == instance
    }

    /// The lowest device number that nothing of ours or anybody else's has.
    fn free_device(&self) -> DeviceIndex {
        let taken = |device: DeviceIndex| {
            self.foreign_devices.contains(&device)
                || self.ledger.enis.values().any(|eni| {
                    let gone = self.live.get(&eni.id).is_some_and(|live| live.gone);
                    !gone && eni.card == 0 && eni.device == device
                })
        };
        let mut device = DeviceIndex(1);
        while taken(device) {
            device = DeviceIndex(device.0 + 1);
        }
        device
    }
}

/// Ours to use: an ordinary interface on the default card, attached, and not taken out of our hands by its owner.
fn is_ours(view: &EniView) -> bool {
    let unmanaged = view.tags.get(NO_MANAGE_TAG).is_some_and(|value| value == "true");
    let attached = matches!(view.status, EniStatus::Attached | EniStatus::Attaching);
    view.card == 0 && view.kind == EniKind::Interface && attached && (!unmanaged || view.device == DeviceIndex::PRIMARY)
}

fn list(slots: &BTreeSet<IpNet>) -> String {
    slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
