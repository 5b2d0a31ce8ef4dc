//! What EC2 and IMDS show, held against the ledger. More than the ledger knows is adopted, less is fenced off, and neither is
//! forgotten on the word of one reading: readings lag, tear and lie, so two must agree before the ledger lets go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::cloud::VERIFY_AGAIN_MS;
use super::grow::TAG_INSTANCE;
use super::setback::Subject;
use super::{Live, METADATA_EVERY_MS, Note, Out, Pool, READINGS_LAG_MS, VERIFY_EVERY_MS};
use crate::ids::{DeviceIndex, EniId, Time};
use crate::ledger::{EniRecord, NodeFacts, Progress, Record};
use crate::limits;
use crate::pick;
use crate::ports::{CloudError, CloudErrorKind, EniKind, EniStatus, EniView, Metadata};

/// Tag with which an operator takes an ENI out of our hands.
pub const NO_MANAGE_TAG: &str = "node.k8s.amazonaws.com/no_manage";
/// What EC2 has not shown for this long, in two readings at least, is believed gone if nothing lives on it.
pub(super) const BELIEVED_AFTER_MS: u64 = 60_000;
/// How long an ENI that EC2 called full is taken to have no more room than it showed: what it held that moment may have been
/// more, so it is tried again.
const LEARNED_MS: u64 = 1_000_000;

impl Pool {
    pub(super) fn metadata_arrived(&mut self, metadata: Metadata, now: Time, out: &mut Out) {
        let Some(primary) = metadata.enis.iter().find(|eni| eni.mac == metadata.primary_mac).cloned() else {
            let error = CloudError {
                kind: CloudErrorKind::Transient,
                action: "ImdsRead".to_owned(),
                code: "Malformed".to_owned(),
                message: format!("the primary MAC {} is not in the list of ENIs", metadata.primary_mac),
                request_id: None,
            };
            self.set_back(Subject::Action("ImdsRead".into()), "the instance metadata".to_owned(), error, now, out);
            return;
        };
        let first_reading = !std::mem::replace(&mut self.metadata_read, true);
        self.metadata_at = Some(now.plus_ms(METADATA_EVERY_MS + self.random() % (METADATA_EVERY_MS / 4)));
        if metadata.terminating != std::mem::replace(&mut self.terminating, metadata.terminating) {
            let text = if metadata.terminating { "EC2 has announced its end" } else { "its end is called off" };
            out.note(Note::NodeStateChanged { text: text.to_owned() });
        }
        let known_groups = self.ledger.node.as_ref().map(|node| node.security_groups.clone()).unwrap_or_default();
        let facts = NodeFacts {
            instance: metadata.instance,
            instance_type: metadata.instance_type,
            region: metadata.region,
            availability_zone: metadata.availability_zone,
            vpc: metadata.vpc,
            vpc_cidrs: metadata.vpc_cidrs,
            primary_eni: primary.id.clone(),
            // No ENI is without a group: an empty list is a reading that failed.
            security_groups: match primary.security_groups.is_empty() {
                true => known_groups,
                false => primary.security_groups.clone(),
            },
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
        let news = self.ledger.node.as_ref() != Some(&facts);
        if news {
            let same_type = self.limits.as_ref().is_some_and(|limits| limits.instance_type == facts.instance_type);
            if !same_type {
                self.limits = limits::lookup(&facts.instance_type).map(|t| t.limits());
            }
            self.record(Record::Node(facts.clone()), out);
        }
        self.imds = metadata.enis.iter().map(|eni| (eni.id.clone(), eni.clone())).collect();
        if !self.ledger.enis.contains_key(&primary.id) {
            self.adopt(&primary, now, out);
        }
        if self.settings.imds_only {
            self.trust_metadata(&metadata.enis, now, out);
        } else {
            self.doubt_metadata(&metadata.enis, first_reading && !first_boot, now);
        }
        if first_boot && !self.settings.imds_only {
            // Nothing to compare yet; what others do to this node's ENIs later must be seen all the same.
            self.verify_by(now.plus_ms(VERIFY_EVERY_MS));
        }
        if first_boot {
            self.import(&metadata.enis, out);
        }
        if news || first_reading {
            let slots = self.ledger.slots.values().flatten().filter(|slot| self.settings.families.picks_from(slot));
            let addresses = slots.map(pick::size).sum();
            let NodeFacts { instance, instance_type, .. } = facts;
            let instance = instance.to_string();
            out.note(Note::NodeKnown { instance, instance_type, addresses, from_ledger: !first_boot });
        }
    }

    /// With EC2 out of bounds the metadata is all there is.
    fn trust_metadata(&mut self, views: &[EniView], now: Time, out: &mut Out) {
        self.verify_due = false;
        for view in views {
            if !self.is_ours(view) {
                continue;
            }
            match self.ledger.slots.get(&view.id) {
                _ if !self.ledger.enis.contains_key(&view.id) => self.adopt(view, now, out),
                held => {
                    let more = view.slots.difference(held.unwrap_or(&BTreeSet::new())).copied().collect();
                    self.gain(&view.id, more, now, out);
                }
            }
        }
    }

    /// What only the metadata shows waits for EC2's word; so does, after a restart, what only the ledger says. Later EC2 is
    /// asked, once for each slot, about what the metadata does not show although it is too old for that to be a lag.
    fn doubt_metadata(&mut self, views: &[EniView], after_restart: bool, now: Time) {
        for view in views {
            let Some(live) = self.live.get_mut(&view.id) else {
                let known = self.foreign.values().flatten().any(|id| *id == view.id);
                self.verify_due |= !known && !self.ledger.forgotten.contains_key(&view.id);
                continue;
            };
            let held = self.ledger.slots.get(&view.id).cloned().unwrap_or_default();
            let more = view.slots.difference(&held).filter(|slot| !self.ledger.given_up.contains_key(*slot));
            live.quarantined = more.copied().collect();
            self.verify_due |= !live.quarantined.is_empty();
            let old = |slot: &IpNet| live.gained.get(slot).is_none_or(|at| now.since_ms(*at) >= READINGS_LAG_MS);
            let lacking: BTreeSet<IpNet> = held.difference(&view.slots).filter(|slot| old(slot)).copied().collect();
            self.verify_due |= !lacking.is_subset(&live.lacking);
            live.lacking.extend(lacking);
            if after_restart {
                live.doubted = held.difference(&view.slots).copied().collect();
            }
        }
    }

    /// EC2's own list of this instance's ENIs.
    pub(super) fn node_verified(&mut self, views: &[EniView], asked_at: Time, now: Time, out: &mut Out) {
        self.verify_due = false;
        self.version += 1;
        self.verify_at = None;
        let spread = self.random() % (VERIFY_EVERY_MS / 2);
        self.verify_by(now.plus_ms(VERIFY_EVERY_MS + spread));
        self.unadopted = false;
        self.foreign.clear();
        self.unmanaged.clear();
        self.stop_doubting();
        for view in views {
            if !self.is_ours(view) {
                self.not_ours(view);
                continue;
            }
            if self.ledger.enis.contains_key(&view.id) {
                self.refresh(view, asked_at, now, out);
            } else {
                self.adopt(view, now, out);
            }
            self.compare_slots(view, asked_at, now, out);
        }
        self.compare_enis(views, asked_at, now, out);
        let here = u32::try_from(views.iter().filter(|view| view.card == 0).count()).unwrap_or(u32::MAX);
        self.learned_max_enis = self.learned_max_enis.map(|learned| learned.max(here));
        let ours = views.iter().filter(|view| self.is_ours(view) && !self.ledger.forgotten.contains_key(&view.id));
        self.cloud_seen = Some((asked_at, ours.cloned().collect()));
    }

    /// Asks EC2 again at `at` or earlier.
    pub(super) fn verify_by(&mut self, at: Time) {
        self.verify_at = Some(self.verify_at.map_or(at, |before| before.min(at)));
    }

    pub(super) fn stop_doubting(&mut self) {
        for live in self.live.values_mut() {
            live.doubted.clear();
        }
    }

    fn not_ours(&mut self, view: &EniView) {
        if self.ledger.enis.contains_key(&view.id) {
            self.unmanaged.insert(view.id.clone());
        } else if view.card == 0 {
            self.foreign.insert(view.device, Some(view.id.clone()));
        }
    }

    /// ENIs of the ledger that EC2 does not show, and those it shows again.
    fn compare_enis(&mut self, views: &[EniView], asked_at: Time, now: Time, out: &mut Out) {
        let seen: BTreeSet<&EniId> = views.iter().map(|view| &view.id).collect();
        let records: Vec<EniRecord> = self.ledger.enis.values().cloned().collect();
        for eni in records {
            let old = self.live.get(&eni.id).is_some_and(|live| live.changed_at >= asked_at);
            let since = self.ledger.enis_unseen.get(&eni.id).copied();
            match (seen.contains(&eni.id), since) {
                (true, Some(_)) => self.record(Record::EniUnseen { eni: eni.id, at: None }, out),
                (true, None) => {}
                (false, _) if old || eni.progress < Progress::Attached => {}
                // Its detachment was under way: this is how it shows when the answer was lost.
                (false, _) if eni.leaving.is_some() => self.advance(&eni.id, Progress::Created, "detached", now, out),
                (false, None) => {
                    let text = "EC2 does not show it on this instance".to_owned();
                    out.note(Note::Differs { eni: eni.id.clone(), text });
                    self.record(Record::EniUnseen { eni: eni.id, at: Some(now) }, out);
                    self.verify_by(now.plus_ms(VERIFY_AGAIN_MS));
                }
                (false, Some(since)) => {
                    self.verify_by(now.plus_ms(VERIFY_AGAIN_MS));
                    if asked_at.since_ms(since) >= BELIEVED_AFTER_MS && !self.somebody_lives_on(&eni.id) {
                        self.forget_eni(&eni.id, "forgotten: EC2 does not show it", now, out);
                    }
                }
            }
        }
    }

    /// A pod of the ledger or a pod route of the kernel is on the ENI.
    pub(super) fn somebody_lives_on(&self, eni: &EniId) -> bool {
        let slots = self.ledger.slots.get(eni);
        let inside = |address: &IpAddr| slots.is_some_and(|slots| slots.iter().any(|s| s.contains(address)));
        let here = |address: &IpAddr| inside(address) && !self.lives_on_another(address, eni);
        self.ledger.pods.values().any(|a| a.eni == *eni || here(&a.address)) || self.kernel.pods.routes.iter().any(here)
    }

    /// A pod has the address from another ENI, which EC2 has given it since.
    fn lives_on_another(&self, address: &IpAddr, eni: &EniId) -> bool {
        let given = |of: &EniId| {
            let mut slots = self.ledger.slots.get(of).into_iter().flatten();
            let unseen = self.ledger.unseen.get(of);
            slots.any(|slot| slot.contains(address) && unseen.is_none_or(|unseen| !unseen.contains_key(slot)))
        };
        let mut others = self.ledger.pods.values().filter(|a| a.eni != *eni);
        others.any(|a| a.addresses().any(|one| one == *address) && given(&a.eni))
    }

    /// An ENI that is there and that the ledger does not know.
    fn adopt(&mut self, view: &EniView, now: Time, out: &mut Out) {
        if self.ledger.forgotten.contains_key(&view.id) {
            // A reading may be older than what it shows: should the ENI still be there later, it is taken up again.
            self.verify_by(now.plus_ms(READINGS_LAG_MS));
            return;
        }
        let Some(subnet_cidr) = self.subnet_cidr(view) else {
            // Without the subnet's CIDR there is no gateway. IMDS may show it later; until then the ENI only takes a place.
            let text = "the IPv4 CIDR of its subnet is not known; it is not used".to_owned();
            out.note(Note::Differs { eni: view.id.clone(), text });
            if view.card == 0 {
                self.foreign.insert(view.device, Some(view.id.clone()));
            }
            self.unadopted = true;
            self.verify_by(now.plus_ms(VERIFY_AGAIN_MS));
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
        self.gain_from_reading(&view.id, view.slots.clone(), now, out);
        out.note(Note::EniMoved { eni: view.id.clone(), to: "adopted", after_ms: 0 });
    }

    /// A known ENI as EC2 shows it now: an attach whose answer was lost shows here.
    fn refresh(&mut self, view: &EniView, asked_at: Time, now: Time, out: &mut Out) {
        let Some(record) = self.ledger.enis.get(&view.id).cloned() else { return };
        let mut next = record.clone();
        next.created |= self.made_by_us(view);
        // It was detached: a reading that shows it attached is believed only when it cannot be older than that.
        let detached = record.leaving.is_some() && record.progress == Progress::Created;
        let lags = |live: &Live| asked_at.since_ms(live.changed_at) < READINGS_LAG_MS;
        let lagging = detached && self.live.get(&view.id).is_none_or(lags);
        if view.attachment.is_some() && !lagging {
            next.attachment = view.attachment.clone();
            next.device = view.device;
            next.card = view.card;
            next.progress = record.progress.max(Progress::Attached);
        }
        if self.live.get(&view.id).is_none_or(|live| live.changed_at < asked_at) {
            next.security_groups = view.security_groups.clone();
        }
        if next != record {
            if let Some(live) = self.live.get_mut(&view.id).filter(|_| next.progress != record.progress) {
                live.since = now;
            }
            self.record(Record::Eni(next), out);
        }
    }

    /// One ENI read by its id, after a call whose outcome is not known.
    pub(super) fn eni_read_back(&mut self, view: &EniView, asked_at: Time, now: Time, out: &mut Out) {
        let Some(record) = self.ledger.enis.get(&view.id).cloned() else { return };
        let full = self.setbacks.get(&Subject::Eni(view.id.clone())).is_some_and(|s| s.kind == CloudErrorKind::EniFull);
        if full && let Ok(slots) = u32::try_from(ipv4_slots(view)) {
            let least = self.learned_slots.map_or(slots, |(learned, _)| learned.min(slots));
            self.learned_slots = Some((least, now.plus_ms(LEARNED_MS)));
        }
        if record.leaving.is_some() && record.progress >= Progress::Attached && view.status == EniStatus::Available {
            self.advance(&view.id, Progress::Created, "detached", now, out);
        }
        self.compare_slots(view, asked_at, now, out);
    }

    /// What EC2 shows on an ENI against what the ledger says: more is adopted, less is fenced off and reported.
    fn compare_slots(&mut self, view: &EniView, asked_at: Time, now: Time, out: &mut Out) {
        let eni = &view.id;
        let held = self.ledger.slots.get(eni).cloned().unwrap_or_default();
        let more: BTreeSet<IpNet> = view.slots.difference(&held).copied().collect();
        // So many do fit, whatever an older reading has taught.
        let fits = u32::try_from(ipv4_slots(view)).unwrap_or(u32::MAX);
        self.learned_slots = self.learned_slots.map(|(learned, until)| (learned.max(fits), until));
        let Some(live) = self.live.get_mut(eni) else { return };
        live.quarantined.clear();
        if live.changed_at >= asked_at {
            // The reading is older than what EC2 has answered since: it may add, and says nothing about what it lacks.
            self.gain_from_reading(eni, more, now, out);
            return;
        }
        let fenced_at = live.fenced_at;
        let releasing = self.ledger.releasing.get(eni).cloned().unwrap_or_default();
        let (gone, less): (BTreeSet<IpNet>, BTreeSet<IpNet>) =
            held.difference(&view.slots).partition(|slot| releasing.contains(*slot));
        if !gone.is_empty() {
            self.gave_up(eni, gone, now, out);
        }
        // Long after the last attempt to give it back it is still there: it was not given back.
        let kept: BTreeSet<IpNet> = releasing.intersection(&view.slots).copied().collect();
        if !kept.is_empty() && fenced_at.is_some_and(|at| asked_at.since_ms(at) >= READINGS_LAG_MS) {
            self.keep(eni, kept, "EC2 still shows them", out);
        }
        self.compare_missing(eni, less, asked_at, now, out);
        self.gain_from_reading(eni, more, now, out);
    }

    /// Slots of the ledger that EC2 does not show: fenced at once; believed after a second reading.
    fn compare_missing(&mut self, eni: &EniId, less: BTreeSet<IpNet>, asked_at: Time, now: Time, out: &mut Out) {
        let before: BTreeMap<IpNet, Time> = self.ledger.unseen.get(eni).cloned().unwrap_or_default();
        let new: BTreeSet<IpNet> = less.iter().filter(|slot| !before.contains_key(*slot)).copied().collect();
        if !new.is_empty() {
            let text = format!("EC2 does not show {} any more", list(&new));
            out.note(Note::Differs { eni: eni.clone(), text });
        }
        if !less.iter().eq(before.keys()) {
            self.record(Record::Unseen { eni: eni.clone(), slots: less.clone(), at: now }, out);
        }
        if less.is_empty() {
            return;
        }
        self.verify_by(now.plus_ms(VERIFY_AGAIN_MS));
        let believed = |slot: &&IpNet| before.get(*slot).is_some_and(|at| asked_at.since_ms(*at) >= BELIEVED_AFTER_MS);
        let (lived_in, empty): (BTreeSet<IpNet>, BTreeSet<IpNet>) =
            less.iter().filter(believed).partition(|slot| self.somebody_lives_in(slot) && !self.moved(slot, eni));
        if !empty.is_empty() {
            let text = format!("{} given up in the ledger: EC2 has not shown it in two readings", list(&empty));
            out.note(Note::Reconciled { eni: eni.clone(), text });
            self.record(Record::GivenUp { eni: eni.clone(), slots: empty, at: now }, out);
        }
        if !lived_in.is_empty() {
            self.reclaim(eni, lived_in, now, out);
        }
    }

    /// It has come back in another shape: on another ENI of ours, or within a prefix. Whoever lives there lives in that.
    fn moved(&self, slot: &IpNet, from: &EniId) -> bool {
        let covers = |eni: &EniId, held: &IpNet| held.contains(slot) && (eni != from || held != slot);
        self.ledger.slots.iter().any(|(eni, slots)| slots.iter().any(|held| covers(eni, held)))
    }

    /// A pod of the ledger or a pod route of the kernel is in the slot.
    pub(super) fn is_lived_on(&self, slots: &BTreeSet<IpNet>) -> bool {
        slots.iter().any(|slot| self.somebody_lives_in(slot))
    }

    pub(super) fn somebody_lives_in(&self, slot: &IpNet) -> bool {
        self.ledger.pods.values().any(|a| a.is_in(slot))
            || self.kernel.pods.routes.iter().any(|address| slot.contains(address))
    }

    /// Slots a reading shows. What was given up a short while ago is not taken back on its word.
    fn gain_from_reading(&mut self, eni: &EniId, slots: BTreeSet<IpNet>, now: Time, out: &mut Out) {
        let (old, new): (BTreeSet<IpNet>, BTreeSet<IpNet>) =
            slots.into_iter().partition(|slot| self.ledger.given_up.contains_key(slot));
        if !old.is_empty() {
            self.verify_by(now.plus_ms(READINGS_LAG_MS));
        }
        self.gain(eni, new, now, out);
    }

    /// The subnet's CIDR, from wherever it is known.
    pub(super) fn subnet_cidr(&self, view: &EniView) -> Option<Ipv4Net> {
        let by_neighbour = || {
            let known = self.ledger.enis.values().map(|e| (&e.subnet, Some(e.subnet_cidr)));
            let seen = self.imds.values().map(|e| (&e.subnet, e.subnet_cidr));
            let listed = self.subnets.list().iter().map(|s| (&s.id, Some(s.cidr)));
            known
                .chain(seen)
                .chain(listed)
                .find(|(subnet, cidr)| **subnet == view.subnet && cidr.is_some())
                .and_then(|(_, cidr)| cidr)
        };
        view.subnet_cidr.or_else(by_neighbour)
    }

    /// By the tag every IPAM of this contract puts on the ENIs it makes.
    pub(super) fn made_by_us(&self, view: &EniView) -> bool {
        let instance = self.ledger.node.as_ref().map(|node| node.instance.as_str());
        view.device != DeviceIndex::PRIMARY && view.tags.get(TAG_INSTANCE).map(String::as_str) == instance
    }

    /// Ours to use: an ordinary interface on the default card, attached, and not taken out of our hands by its owner.
    fn is_ours(&self, view: &EniView) -> bool {
        let attached = matches!(view.status, EniStatus::Attached | EniStatus::Attaching);
        if view.card != 0 || view.kind != EniKind::Interface || !attached {
            return false;
        }
        let managed = match view.tags.get(NO_MANAGE_TAG) {
            Some(value) => value != "true",
            None => self.settings.manage_untagged || self.settings.imds_only || self.made_by_us(view),
        };
        managed || view.device == DeviceIndex::PRIMARY
    }
}

/// IPv6 has slots of its own.
fn ipv4_slots(view: &EniView) -> usize {
    view.slots.iter().filter(|slot| matches!(slot, IpNet::V4(_))).count()
}

pub(super) fn list(slots: &BTreeSet<IpNet>) -> String {
    slots.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
