//! The /80 of each ENI that pods live on. It is a slot like the others: held, confirmed, missed and reclaimed with them. But one
//! is enough for any number of pods, so it has no target, and it goes only with its ENI.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};

use super::setback::Subject;
use super::{Op, Out, Pool};
use crate::families::{self, Families};
use crate::ids::{DeviceIndex, EniId, Time};
use crate::ledger::EniRecord;
use crate::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest, EniView};

pub(super) const ASSIGN: &str = "AssignIpv6Addresses";

impl Pool {
    /// Asks for the /80 of every ENI that is to have one and has none.
    pub(super) fn give_ipv6_prefixes(&mut self, now: Time, out: &mut Out) {
        if !self.settings.families.has_v6() || !self.may_grow() {
            return;
        }
        let without = |eni: &&EniRecord| self.wants_ipv6_prefix(eni) && self.ipv6_prefix(&eni.id).is_none();
        let without: Vec<EniId> = self.ledger.enis.values().filter(without).map(|eni| eni.id.clone()).collect();
        for eni in without {
            let rests = self.rests(&Subject::Ipv6(eni.clone())) || self.rests(&Subject::Eni(eni.clone()));
            if !rests && !self.is_changing(&eni) && self.may_call(ASSIGN, now) {
                let request = CloudRequest::AssignIpv6Prefix { eni: eni.clone(), prefix: None };
                self.start(Op::AssignIpv6 { eni, prefix: None }, request, now, out);
            }
        }
    }

    /// Pods live, or are to live, on it. In IPv6 clusters that is the primary ENI alone, whose /80 outlasts any number of pods.
    fn wants_ipv6_prefix(&self, eni: &EniRecord) -> bool {
        let place = !self.settings.families.is_v6_only() || eni.device == DeviceIndex::PRIMARY;
        place && self.serves_pods(&eni.id)
    }

    /// New ENIs come with one where pods are to have both families.
    pub(super) fn creates_with_ipv6(&self) -> bool {
        self.settings.families == Families::Dual
    }

    /// The /80 by which pods' second addresses on the ENI are made.
    pub(super) fn ipv6_prefix(&self, eni: &EniId) -> Option<Ipv6Net> {
        families::ipv6_prefix(self.ledger.slots.get(eni)?)
    }

    pub(super) fn second(&self, eni: &EniId, first: IpAddr) -> Option<IpAddr> {
        self.settings.families.second(self.ipv6_prefix(eni), first)
    }

    /// The second address of whoever has, or had, this first one.
    pub(super) fn second_of(&self, first: &IpAddr) -> Option<IpAddr> {
        if !self.settings.families.has_v6() {
            return None;
        }
        let (eni, _) = self.ledger.slots.iter().find(|(_, slots)| slots.iter().any(|slot| slot.contains(first)))?;
        self.second(eni, *first)
    }

    /// First addresses that nobody can have, because the kernel routes their second ones to a pod.
    pub(super) fn firsts_of_routes(&self) -> impl Iterator<Item = IpAddr> {
        let families = self.settings.families;
        let slots = self.ledger.slots.values().filter(move |_| families.has_v6());
        let first =
            move |prefix| self.kernel.pods.routes.iter().filter_map(move |second| families.first(prefix, *second));
        slots.filter_map(families::ipv6_prefix).flat_map(first)
    }

    pub(super) fn ipv6_assign_refused(
        &mut self,
        eni: EniId,
        prefix: Option<Ipv6Net>,
        error: CloudError,
        now: Time,
        out: &mut Out,
    ) {
        let kind = error.kind;
        let subject = match (kind, prefix) {
            (CloudErrorKind::Throttled | CloudErrorKind::Denied, _) => Subject::Action(error.action.clone().into()),
            (_, None) => Subject::Ipv6(eni.clone()),
            (_, Some(_)) => Subject::Lost(eni.clone()),
        };
        self.set_back(subject, eni.to_string(), error, now, out);
        if kind.outcome_unknown() || kind == CloudErrorKind::EniFull {
            // As for IPv4: read what came, rather than ask twice.
            self.read_back(eni);
        }
    }

    /// What a node of IPv4 pods is told of IPv6 is none of its business, whoever assigned it.
    pub(super) fn without_other_families(&self, reply: CloudReply) -> CloudReply {
        if self.settings.families.has_v6() {
            return reply;
        }
        let bare = |mut view: EniView| {
            view.slots.retain(|slot| matches!(slot, IpNet::V4(_)));
            view
        };
        match reply {
            CloudReply::Metadata(mut metadata) => {
                metadata.enis = metadata.enis.into_iter().map(bare).collect();
                CloudReply::Metadata(metadata)
            }
            CloudReply::Enis(views) => CloudReply::Enis(views.into_iter().map(bare).collect()),
            CloudReply::Eni(view) => CloudReply::Eni(bare(view)),
            CloudReply::Created(view) => CloudReply::Created(bare(view)),
            other => other,
        }
    }
}
