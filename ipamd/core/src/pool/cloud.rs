//! What is asked of EC2 and IMDS, what they answer, and what follows from it. How their readings are held against the
//! ledger is `compare.rs`.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::grow::DESCRIBE;
use super::ipv6;
use super::setback::Subject;
use super::{Live, Note, Op, OpId, Out, Pool};
use crate::ids::{AttachmentId, DeviceIndex, EniId, SubnetId, Time};
use crate::ledger::{EniRecord, Progress, Record};
use crate::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest, EniView, Want};

/// When EC2 and the ledger differ, EC2 is asked again after this.
pub const VERIFY_AGAIN_MS: u64 = 30_000;
/// An ENI EC2 says it does not know is believed gone only when it is older than this; a new one may not be visible yet.
const VISIBLE_AFTER_MS: u64 = 60_000;

impl Op {
    /// The EC2 action behind it.
    fn action(&self) -> &'static str {
        match self {
            Self::Metadata => "ImdsRead",
            Self::Limits => "DescribeInstanceTypes",
            Self::Verify | Self::ReadBack(_) | Self::Leaks => DESCRIBE,
            Self::Subnets => "DescribeSubnets",
            Self::Create { .. } => "CreateNetworkInterface",
            Self::Attach(_) => "AttachNetworkInterface",
            Self::Settle(_) | Self::Groups { .. } => "ModifyNetworkInterfaceAttribute",
            Self::Assign { .. } | Self::Reclaim { .. } => "AssignPrivateIpAddresses",
            Self::AssignIpv6 { .. } => ipv6::ASSIGN,
            Self::Unassign { .. } => "UnassignPrivateIpAddresses",
            Self::Detach(_) => "DetachNetworkInterface",
            Self::Delete(_) | Self::Collect(_) => "DeleteNetworkInterface",
            Self::Mark(_) => "CreateTags",
            Self::Program { .. } => "kernel",
        }
    }

    /// The ENI a change is about: no two changes of one ENI are under way at once.
    pub(super) fn changes(&self) -> Option<&EniId> {
        match self {
            Self::Attach(eni)
            | Self::Settle(eni)
            | Self::Assign { eni, .. }
            | Self::AssignIpv6 { eni, .. }
            | Self::Reclaim { eni, .. }
            | Self::Unassign { eni, .. }
            | Self::Detach(eni)
            | Self::Delete(eni)
            | Self::Groups { eni, .. } => Some(eni),
            _ => None,
        }
    }
}

impl Pool {
    /// Finds out who this node is, what its type carries, and has EC2 confirm what the ledger says.
    pub(super) fn learn_node(&mut self, now: Time, out: &mut Out) {
        let metadata_due = !self.metadata_read || self.metadata_at.is_some_and(|at| at <= now);
        if metadata_due && !self.under_way(|op| *op == Op::Metadata) && self.may_call("ImdsRead", now) {
            self.metadata_at = None;
            self.start(Op::Metadata, CloudRequest::ReadMetadata, now, out);
        }
        let unread = self.live.values().any(|live| live.read_due);
        if !self.may_read() || !(unread || self.verify_due || self.limits.is_none()) {
            return;
        }
        let Some(node) = &self.ledger.node else { return };
        let (instance, instance_type) = (node.instance.clone(), node.instance_type.clone());
        let limits_due = self.limits.is_none() && !self.under_way(|op| *op == Op::Limits);
        if limits_due && self.may_call("DescribeInstanceTypes", now) {
            let request = CloudRequest::DescribeInstanceType { instance_type };
            self.start(Op::Limits, request, now, out);
        }
        let unread: Vec<EniId> = self.live.iter().filter(|(_, live)| live.read_due).map(|(id, _)| id.clone()).collect();
        for eni in unread {
            if !self.may_call(DESCRIBE, now) {
                break;
            }
            if let Some(live) = self.live.get_mut(&eni) {
                live.read_due = false;
            }
            self.start(Op::ReadBack(eni.clone()), CloudRequest::DescribeEni { eni }, now, out);
        }
        let verify_due = self.verify_due && self.metadata_read && !self.under_way(|op| *op == Op::Verify);
        if verify_due && self.may_call(DESCRIBE, now) {
            self.start(Op::Verify, CloudRequest::DescribeNode { instance }, now, out);
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
        if result.is_ok() {
            self.recovered(&Subject::Action(op.action().into()));
            self.bucket(op.action(), now).passed();
        }
        match (op, result.map(|reply| self.without_other_families(reply))) {
            (op, Err(error)) => self.cloud_refused(op, error, now, out),
            (Op::Metadata, Ok(CloudReply::Metadata(metadata))) => self.metadata_arrived(metadata, now, out),
            (Op::Limits, Ok(CloudReply::InstanceType(limits))) => self.limits = Some(limits),
            (Op::Verify, Ok(CloudReply::Enis(views))) => self.node_verified(&views, asked_at, now, out),
            (Op::ReadBack(_), Ok(CloudReply::Eni(view))) => self.eni_read_back(&view, asked_at, now, out),
            (Op::Subnets, Ok(CloudReply::Subnets(subnets))) => {
                self.subnets.arrived(subnets, now);
                self.version += 1;
            }
            (Op::Leaks, Ok(CloudReply::Enis(views))) => self.leaks_found(&views, now, out),
            (Op::Mark(eni), Ok(CloudReply::Done)) => self.leak_marked(&eni, now, out),
            (Op::Collect(eni), Ok(CloudReply::Done)) => self.leak_collected(&eni, out),
            (Op::Create { token }, Ok(CloudReply::Created(view))) => self.eni_created(&token, &view, now, out),
            (Op::Attach(eni), Ok(CloudReply::Attached { attachment })) => {
                self.eni_attached(&eni, attachment, now, out);
            }
            (Op::Settle(eni), Ok(CloudReply::Done)) => {
                self.recovered(&Subject::Eni(eni.clone()));
                self.advance(&eni, Progress::Settled, "settled", now, out);
            }
            (Op::Groups { eni, groups }, Ok(CloudReply::Done)) => {
                self.recovered(&Subject::Groups(eni.clone()));
                if let Some(record) = self.ledger.enis.get(&eni).cloned() {
                    self.record(Record::Eni(EniRecord { security_groups: groups, ..record }), out);
                    let text = "its security groups follow those of the node".to_owned();
                    out.note(Note::Reconciled { eni, text });
                }
            }
            (Op::Assign { eni, want }, Ok(CloudReply::Assigned(slots))) => {
                self.recovered(&Subject::Eni(eni.clone()));
                if matches!(want, Want::Prefixes(_)) {
                    self.recovered(&Subject::EniPrefixes(eni.clone()));
                }
                if let Some(subnet) = self.ledger.enis.get(&eni).map(|record| record.subnet.clone()) {
                    self.subnets.gave(&subnet, want);
                    self.recovered(&Subject::Subnet(subnet));
                }
                self.gain(&eni, slots, now, out);
            }
            (Op::AssignIpv6 { eni, prefix: None }, Ok(CloudReply::Assigned(slots))) => {
                self.recovered(&Subject::Ipv6(eni.clone()));
                self.gain(&eni, slots, now, out);
            }
            (Op::AssignIpv6 { eni, prefix: Some(prefix) }, Ok(CloudReply::Assigned(_))) => {
                self.reclaimed(&eni, &BTreeSet::from([IpNet::V6(prefix)]), now, out);
            }
            (Op::Reclaim { eni, slots }, Ok(CloudReply::Assigned(_))) => self.reclaimed(&eni, &slots, now, out),
            (Op::Unassign { eni, slots }, Ok(CloudReply::Done)) => {
                self.recovered(&Subject::Eni(eni.clone()));
                self.gave_up(&eni, slots, now, out);
            }
            (Op::Detach(eni), Ok(CloudReply::Done)) => {
                self.recovered(&Subject::Eni(eni.clone()));
                self.advance(&eni, Progress::Created, "detached", now, out);
            }
            (Op::Delete(eni), Ok(CloudReply::Done)) => self.forget_eni(&eni, "deleted", now, out),
            (op, Ok(reply)) => {
                let error = CloudError {
                    kind: CloudErrorKind::Transient,
                    action: op.action().to_owned(),
                    code: "Malformed".to_owned(),
                    message: format!("an answer of another kind: {reply:?}"),
                    request_id: None,
                };
                self.cloud_refused(op, error, now, out);
            }
        }
    }

    fn eni_created(&mut self, token: &str, view: &EniView, now: Time, out: &mut Out) {
        if let Some(want) = self.ledger.creations.get(token).map(|creation| creation.want) {
            self.subnets.gave(&view.subnet, want);
        }
        self.recovered(&Subject::Subnet(view.subnet.clone()));
        // Without the subnet's CIDR there is no gateway: the intent stays open and finds the ENI again.
        let Some(subnet_cidr) = self.subnet_cidr(view) else {
            self.subnets.outdated();
            let error = CloudError {
                kind: CloudErrorKind::NotFound,
                action: "CreateNetworkInterface".to_owned(),
                code: "UnknownSubnet".to_owned(),
                message: format!("the IPv4 CIDR of {} is not known yet", view.subnet),
                request_id: None,
            };
            self.set_back(Subject::Subnet(view.subnet.clone()), view.subnet.to_string(), error, now, out);
            return;
        };
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
        if let Some(record) = self.ledger.enis.get(eni).cloned() {
            self.record(Record::Eni(EniRecord { attachment: Some(attachment), ..record }), out);
        }
        self.advance(eni, Progress::Attached, "attached", now, out);
    }

    pub(super) fn advance(&mut self, eni: &EniId, progress: Progress, to: &'static str, now: Time, out: &mut Out) {
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
            live.gained.extend(slots.iter().map(|slot| (*slot, now)));
        }
        self.record(Record::Held { eni: eni.clone(), slots: slots.clone() }, out);
        out.note(Note::Gained { eni: eni.clone(), slots });
    }

    pub(super) fn forget_eni(&mut self, eni: &EniId, why: &'static str, now: Time, out: &mut Out) {
        self.recovered(&Subject::Eni(eni.clone()));
        self.record(Record::EniGone { eni: eni.clone(), at: now }, out);
        self.live.remove(eni);
        out.note(Note::EniMoved { eni: eni.clone(), to: why, after_ms: 0 });
    }

    /// A call failed. What rests, and what is looked at again, hangs on the class of the error.
    fn cloud_refused(&mut self, op: Op, error: CloudError, now: Time, out: &mut Out) {
        use CloudErrorKind as K;
        let kind = error.kind;
        let by_action = Subject::Action(error.action.clone().into());
        match op {
            Op::Metadata => {
                self.metadata_at = Some(now);
                self.set_back(Subject::Action("ImdsRead".into()), "the instance metadata".to_owned(), error, now, out);
            }
            Op::Limits | Op::Verify | Op::ReadBack(_) | Op::Subnets | Op::Leaks => {
                if let Op::ReadBack(eni) = op {
                    // Gone or not to be seen yet: the whole list tells. Otherwise the same question again.
                    match kind {
                        K::NotFound => self.verify_due = true,
                        _ => self.read_back(eni),
                    }
                }
                // EC2 has had its chance: what the ledger says is served.
                self.stop_doubting();
                self.set_back(by_action, "this node".to_owned(), error, now, out);
            }
            Op::Mark(_) => self.set_back(by_action, "an unattached ENI".to_owned(), error, now, out),
            Op::Collect(eni) if kind == K::NotFound => self.leak_collected(&eni, out),
            Op::Collect(_) => self.set_back(by_action, "an unattached ENI".to_owned(), error, now, out),
            Op::Reclaim { eni, .. } => {
                self.set_back(Subject::Lost(eni.clone()), eni.to_string(), error, now, out);
                self.verify_due |= kind.outcome_unknown();
            }
            Op::AssignIpv6 { eni, prefix } => self.ipv6_assign_refused(eni, prefix, error, now, out),
            Op::Groups { eni, .. } => {
                self.set_back(Subject::Groups(eni.clone()), eni.to_string(), error, now, out);
            }
            Op::Unassign { .. } | Op::Detach(_) => {
                let Some(eni) = op.changes().cloned() else { return };
                self.set_back(of_action_or_eni(&error, &eni), eni.to_string(), error, now, out);
                // Busy and throttled calls are simply made again.
                match kind {
                    K::Throttled | K::Busy => {}
                    _ => self.release_refused(&op, kind.outcome_unknown() || kind == K::NotFound, out),
                }
                if kind.outcome_unknown() || kind == K::NotFound {
                    self.read_back(eni);
                }
            }
            Op::Assign { eni, want } => {
                let kind = short_of(kind, want);
                let subnet = self.ledger.enis.get(&eni).map(|record| record.subnet.clone());
                let subject = match (kind, subnet) {
                    (K::Throttled | K::Denied, _) => by_action,
                    (K::Fragmented, _) => Subject::EniPrefixes(eni.clone()),
                    (K::SubnetEmpty, Some(subnet)) => Subject::Subnet(subnet),
                    _ => Subject::Eni(eni.clone()),
                };
                let subnet = self.ledger.enis.get(&eni).map(|record| record.subnet.clone());
                if matches!(kind, K::SubnetEmpty | K::Fragmented)
                    && subnet.is_some_and(|subnet| self.asked_too_much(&subnet, want, &error, out))
                {
                    return;
                }
                let object = match &subject {
                    Subject::Subnet(subnet) => subnet.to_string(),
                    _ => eni.to_string(),
                };
                self.set_back(subject, object, error, now, out);
                if kind.outcome_unknown() || kind == K::EniFull {
                    // The call has no client token: read the ENI and adopt what came, rather than ask twice.
                    self.read_back(eni);
                }
            }
            Op::Create { token } => {
                let creation = self.ledger.creations.get(&token).cloned();
                let kind = creation.as_ref().map_or(kind, |creation| short_of(kind, creation.want));
                let subject = match (kind, &creation) {
                    (K::Fragmented, Some(c)) => Subject::SubnetPrefixes(c.subnet.clone()),
                    (K::SubnetEmpty, Some(c)) => Subject::Subnet(c.subnet.clone()),
                    _ => by_action,
                };
                if matches!(kind, K::SubnetEmpty | K::Fragmented)
                    && let Some(c) = &creation
                    && self.asked_too_much(&c.subnet, c.want, &error, out)
                {
                    self.record(Record::CreationEnded { token }, out);
                    return;
                }
                let object = creation.map_or_else(|| "a new ENI".to_owned(), |c| c.subnet.to_string());
                self.set_back(subject, object, error, now, out);
                // The token makes a repeated creation find the first: only a definite no ends the intent.
                if !kind.outcome_unknown() && kind != K::Throttled {
                    self.record(Record::CreationEnded { token }, out);
                }
            }
            Op::Attach(eni) if kind == K::NotFound && self.is_lost(&eni, now) => {
                self.forget_eni(&eni, "gone before it was attached", now, out);
            }
            Op::Attach(eni) => {
                if kind == K::InstanceFull {
                    let attached = self.ledger.enis.values().filter(|e| e.progress >= Progress::Attached).count();
                    let foreign = self.foreign.len();
                    self.learned_max_enis = u32::try_from(attached + foreign).ok();
                }
                if kind == K::DeviceTaken
                    && let Some(record) = self.ledger.enis.get(&eni).cloned()
                {
                    self.foreign.insert(record.device, None);
                    let device = self.free_device();
                    self.record(Record::Eni(EniRecord { device, ..record }), out);
                }
                // An attach whose answer was lost, or an ENI that is in use: EC2's list says which it is.
                // Where the instance is full, it says of how many, others' included.
                self.verify_due |= kind.outcome_unknown() || matches!(kind, K::Busy | K::InstanceFull);
                self.set_back(of_action_or_eni(&error, &eni), eni.to_string(), error, now, out);
            }
            Op::Delete(eni) if kind == K::NotFound => self.forget_eni(&eni, "deleted", now, out),
            Op::Settle(eni) | Op::Delete(eni) => {
                if kind == K::Busy {
                    // Perhaps it was never detached.
                    self.verify_by(now.plus_ms(VERIFY_AGAIN_MS));
                }
                self.set_back(of_action_or_eni(&error, &eni), eni.to_string(), error, now, out);
            }
            Op::Program { .. } => {}
        }
    }

    /// EC2 refuses a whole call when the subnet cannot give all of it: less is asked for at once, down to one. False when
    /// one was too much: then there is none.
    fn asked_too_much(&mut self, subnet: &SubnetId, want: Want, error: &CloudError, out: &mut Out) -> bool {
        self.subnets.outdated();
        let less = self.subnets.ask_less(subnet, want);
        if less {
            out.note(Note::AskedTooMuch { subnet: subnet.clone(), want, code: error.code.clone() });
        }
        less
    }

    /// Has the ENI read by its id before anything else is done to it.
    pub(super) fn read_back(&mut self, eni: EniId) {
        if let Some(live) = self.live.get_mut(&eni) {
            live.read_due = true;
        }
    }

    /// A change of the ENI is under way, or the outcome of the last one is not known yet.
    pub(super) fn is_changing(&self, eni: &EniId) -> bool {
        let unread = self.live.get(eni).is_some_and(|live| live.read_due);
        unread || self.under_way(|op| op.changes() == Some(eni) || matches!(op, Op::ReadBack(id) if id == eni))
    }

    /// Old enough to be visible if it were there, and nothing lives on it: somebody else has deleted it.
    fn is_lost(&self, eni: &EniId, now: Time) -> bool {
        let old = self.live.get(eni).is_some_and(|live| now.since_ms(live.since) > VISIBLE_AFTER_MS);
        old && !self.ledger.pods.values().any(|allocation| allocation.eni == *eni)
    }

    /// The lowest device number that nothing of ours or anybody else's has.
    fn free_device(&self) -> DeviceIndex {
        let taken = |device: DeviceIndex| {
            self.foreign.contains_key(&device)
                || self.ledger.enis.values().any(|eni| {
                    let detached = eni.leaving.is_some() && eni.progress == Progress::Created;
                    !self.is_gone(&eni.id) && !detached && eni.card == 0 && eni.device == device
                })
        };
        let mut device = DeviceIndex(1);
        while taken(device) {
            device = DeviceIndex(device.0 + 1);
        }
        device
    }
}

/// What a refused change of an ENI lets rest: the action where EC2 would refuse it for any ENI, else the ENI.
fn of_action_or_eni(error: &CloudError, eni: &EniId) -> Subject {
    match error.kind {
        CloudErrorKind::Throttled | CloudErrorKind::Denied => Subject::Action(error.action.clone().into()),
        _ => Subject::Eni(eni.clone()),
    }
}

/// EC2's two words for "nothing left" by what was asked: a subnet too empty for one prefix may have single addresses all the
/// same, and one that lacks blocks for a single address is empty.
fn short_of(kind: CloudErrorKind, want: Want) -> CloudErrorKind {
    match (kind, want) {
        (CloudErrorKind::SubnetEmpty, Want::Prefixes(1)) => CloudErrorKind::Fragmented,
        (CloudErrorKind::Fragmented, Want::Addresses(_)) => CloudErrorKind::SubnetEmpty,
        _ => kind,
    }
}
