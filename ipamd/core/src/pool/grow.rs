//! Growing the pool: target and plan turned into calls, and ENIs moved along from creation to service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::compare::BELIEVED_AFTER_MS;
use super::setback::{Setback, Subject};
use super::{MAX_CREATIONS, Note, Op, Out, Pool, STUCK_ENI_MS};
use crate::ids::{EniId, SecurityGroupId, SubnetId, Time};
use crate::ledger::{Creation, EniRecord, NodeFacts, Progress, Record};
use crate::pick;
use crate::plan::{self, EniRoom, Means, Step};
use crate::ports::{CloudErrorKind as K, CloudRequest, Want};
use crate::target::{self, Counts, Frame, Mode, PREFIX_SIZE, Target, Wanted};

/// Tags and description of the add-on: its collector of leaked ENIs and its IAM policies know them.
pub(super) const TAG_INSTANCE: &str = "node.k8s.amazonaws.com/instance_id";
const TAG_CREATED: &str = "node.k8s.amazonaws.com/createdAt";
pub(super) const TAG_CLUSTER: &str = "cluster.k8s.amazonaws.com/name";
pub(super) const DESCRIBE: &str = "DescribeNetworkInterfaces";
/// Refusals in a row after which readings are not waited for.
const UNREADABLE_AFTER: u32 = 2;
const ASSIGN: &str = "AssignPrivateIpAddresses";
pub(super) const ATTACH: &str = "AttachNetworkInterface";
pub(super) const CREATE: &str = "CreateNetworkInterface";
const TAG_OWNER: (&str, &str) = ("eks:eni:owner", "amazon-vpc-cni");

impl Pool {
    /// Takes the next step of every ENI that is not in service yet; a crash in between resumes here.
    pub(super) fn advance_enis(&mut self, now: Time, out: &mut Out) {
        if !self.may_change() {
            return;
        }
        self.follow_groups(now, out);
        let creations: Vec<Creation> = self.ledger.creations.values().cloned().collect();
        let unfinished = |eni: &&EniRecord| eni.progress < Progress::Settled && eni.leaving.is_none();
        let unfinished: Vec<_> = self.ledger.enis.values().filter(unfinished).cloned().collect();
        if creations.is_empty() && unfinished.is_empty() {
            return;
        }
        let Some(node) = self.ledger.node.clone() else { return };
        if !creations.is_empty() {
            // Without the CIDR of its subnet a new ENI cannot be used.
            self.subnets_awaited(now, out);
        }
        for creation in creations {
            self.create(&node, creation, now, out);
        }
        for eni in unfinished {
            let busy = self.under_way(|op| op.changes() == Some(&eni.id));
            // An ENI found attached after a restart is settled once EC2 has said how it is attached.
            if busy || self.is_gone(&eni.id) || self.verify_due || self.rests(&Subject::Eni(eni.id.clone())) {
                continue;
            }
            match (eni.progress, eni.attachment) {
                (Progress::Created, _) if self.full_without(&eni.id, now) => {
                    // One of its addresses may have been a pod's, until somebody took it away and EC2 gave it to this ENI.
                    let lived_on = self.ledger.slots.get(&eni.id).is_some_and(|slots| self.is_lived_on(slots));
                    if lived_on || !self.may_give_back() || !self.may_call("DeleteNetworkInterface", now) {
                        continue;
                    }
                    self.start(Op::Delete(eni.id.clone()), CloudRequest::DeleteEni { eni: eni.id }, now, out);
                }
                (Progress::Created, _) if !self.may_call(ATTACH, now) => {}
                (Progress::Created, _) => {
                    let instance = node.instance.clone();
                    let request =
                        CloudRequest::AttachEni { eni: eni.id.clone(), instance, device: eni.device, card: eni.card };
                    self.start(Op::Attach(eni.id), request, now, out);
                }
                (_, Some(_)) if !self.may_call("ModifyNetworkInterfaceAttribute", now) => {}
                (_, Some(attachment)) => {
                    let request = CloudRequest::SetDeleteOnTermination { eni: eni.id.clone(), attachment };
                    self.start(Op::Settle(eni.id), request, now, out);
                }
                (_, None) => self.verify_due = true,
            }
        }
    }

    /// ENIs we made have the security groups that new ones would get; those of others are theirs.
    fn follow_groups(&mut self, now: Time, out: &mut Out) {
        let Some(groups) = self.wanted_groups() else { return };
        let differs = |eni: &&EniRecord| {
            let known = &eni.security_groups;
            let same = known.len() == groups.len() && known.iter().all(|group| groups.contains(group));
            eni.created && eni.progress == Progress::Settled && eni.leaving.is_none() && !known.is_empty() && !same
        };
        let others: Vec<EniId> = self.ledger.enis.values().filter(differs).map(|eni| eni.id.clone()).collect();
        if others.is_empty() {
            return;
        }
        let groups = groups.to_vec();
        for eni in others {
            let busy = self.under_way(|op| op.changes() == Some(&eni)) || self.is_gone(&eni);
            let rests = self.rests(&Subject::Groups(eni.clone())) || self.unmanaged.contains(&eni);
            if !busy && !rests && self.may_call("ModifyNetworkInterfaceAttribute", now) {
                let request = CloudRequest::SetSecurityGroups { eni: eni.clone(), security_groups: groups.clone() };
                self.start(Op::Groups { eni, groups: groups.clone() }, request, now, out);
            }
        }
    }

    /// Groups of the ENIConfig where it names any, else of the primary ENI.
    fn wanted_groups(&self) -> Option<&[SecurityGroupId]> {
        let node = self.ledger.node.as_ref()?;
        let config = self.node_state.eni_config.as_ref().filter(|_| self.settings.custom_networking);
        let configured = config.map(|config| &config.security_groups).filter(|groups| !groups.is_empty());
        let groups = configured.unwrap_or(&node.security_groups);
        (!groups.is_empty()).then_some(groups.as_slice())
    }

    /// Compares the pool with its target and asks EC2 for what is missing.
    pub(super) fn grow(&mut self, now: Time, out: &mut Out) {
        if !self.may_grow() {
            return;
        }
        let Some(target) = self.target(now) else { return };
        let singles = self.idle_singles();
        let back_to_prefixes = target.wanted == Wanted::Enough && singles > target.spare && !self.winding_down();
        if target.wanted == Wanted::Enough && !back_to_prefixes || self.subnets_awaited(now, out) {
            return;
        }
        let Some(means) = self.means(now) else { return };
        let mut plan = plan::plan(target.wanted, target.needed, &means);
        if back_to_prefixes {
            plan.steps.extend(plan::upgrade(singles, &means));
        }
        // Said once per cause: a pool that cannot grow must not be silent, nor repeat itself at every look.
        let stopped = (plan.unmet > 0 && plan.steps.is_empty()).then(|| self.why_no_address(now, now));
        if let Some(failure) = stopped.as_ref().filter(|failure| self.cannot_grow != Some(failure.reason)) {
            out.note(Note::CannotGrow { why: target.why.to_string(), reason: failure.message.clone() });
        }
        self.cannot_grow = stopped.map(|failure| failure.reason);
        for step in plan.steps {
            match step {
                Step::Assign { eni, want } => {
                    if !self.may_call(ASSIGN, now) {
                        break;
                    }
                    out.note(Note::Grow { why: target.why.to_string(), step: format!("assign {want} to {eni}") });
                    let request = CloudRequest::Assign { eni: eni.clone(), want };
                    self.start(Op::Assign { eni, want }, request, now, out);
                }
                Step::Create { subnet, want } => {
                    // A subnet that is short is asked once at a time.
                    let room = self.ledger.creations.len() < MAX_CREATIONS && !self.is_being_sounded(&subnet);
                    if !room || !self.may_call(CREATE, now) {
                        break;
                    }
                    let Some(node) = self.ledger.node.clone() else { return };
                    out.note(Note::Grow {
                        why: target.why.to_string(),
                        step: format!("create an ENI in {subnet} with {want}"),
                    });
                    self.tokens += 1;
                    let token = format!("fw-{}-{:x}-{:x}", node.instance, now.0, self.tokens);
                    let creation = self.creation(&node, token, subnet, want, now);
                    self.record(Record::Creating(creation.clone()), out);
                    self.create(&node, creation, now, out);
                }
            }
        }
    }

    /// Before EC2 has confirmed the ledger, what seems missing may be there. A pod that waits does not wait for readings that
    /// are refused again and again: a few addresses too many can be given back, a start held up for minutes cannot.
    pub(super) fn may_grow(&self) -> bool {
        let unread = self.live.values().any(|live| live.read_due);
        let asking = unread || self.under_way(|op| matches!(op, Op::Verify | Op::ReadBack(_)));
        let reading = self.setbacks.get(&Subject::Action(DESCRIBE.into()));
        let refused = |setback: &Setback| matches!(setback.kind, K::Throttled | K::Denied);
        let unreadable = reading.is_some_and(|setback| refused(setback) && setback.failures >= UNREADABLE_AFTER);
        let waited_for = !self.waiting.is_empty();
        let read = !self.verify_due && !asking;
        let wanted = !self.winding_down() || waited_for;
        self.may_change() && wanted && (read || unreadable && waited_for)
    }

    /// Attached long ago and its link has not come, while the kernel does what it is told otherwise.
    pub(super) fn is_stuck(&self, eni: &EniId, now: Time) -> bool {
        let late = self.live.get(eni).is_some_and(|l| !l.programmed && now.since_ms(l.since) > STUCK_ENI_MS);
        late && self.kernel.report.missing_links.contains(eni)
    }

    fn create(&mut self, node: &NodeFacts, creation: Creation, now: Time, out: &mut Out) {
        let under_way = self.under_way(|op| matches!(op, Op::Create { token } if *token == creation.token));
        let rests = self.rests(&Subject::Subnet(creation.subnet.clone()));
        if under_way || rests || !self.may_call(CREATE, now) {
            return;
        }
        let request = CloudRequest::CreateEni {
            subnet: creation.subnet,
            security_groups: creation.security_groups,
            want: creation.want,
            ipv6_prefix: creation.ipv6_prefix,
            description: format!("aws-K8S-{}", node.instance),
            tags: creation.tags,
            client_token: creation.token.clone(),
        };
        self.start(Op::Create { token: creation.token }, request, now, out);
    }

    /// Everything the call will say is in the intent: a repeated creation must say the same, whatever was configured since.
    fn creation(&self, node: &NodeFacts, token: String, subnet: SubnetId, want: Want, now: Time) -> Creation {
        let mut tags = self.settings.eni_tags.clone();
        tags.insert(TAG_INSTANCE.to_owned(), node.instance.to_string());
        tags.insert(TAG_CREATED.to_owned(), now.rfc3339());
        if let Some(cluster) = &self.settings.cluster_name {
            tags.insert(TAG_CLUSTER.to_owned(), cluster.clone());
            tags.insert(TAG_OWNER.0.to_owned(), TAG_OWNER.1.to_owned());
        }
        Creation {
            token,
            subnet,
            want,
            ipv6_prefix: self.creates_with_ipv6(),
            security_groups: self.wanted_groups().unwrap_or_default().to_vec(),
            tags,
            since: now,
        }
    }

    /// What is still wanted; `None` until the node's limits are known.
    pub fn target(&self, now: Time) -> Option<Target> {
        if self.settings.families.is_v6_only() {
            return Some(Target::one_prefix());
        }
        Some(target::target(self.settings.policy, &self.frame()?, &self.counts(now)))
    }

    pub(super) fn frame(&self) -> Option<Frame> {
        let limits = self.limits.as_ref()?;
        let mode = if limits.prefixes { self.settings.mode } else { Mode::Addresses };
        let slots_per_eni =
            limits.ipv4_per_eni.saturating_sub(1).min(self.learned_slots.map_or(u32::MAX, |(slots, _)| slots));
        Some(Frame { mode, slots_per_eni, max_pods: self.settings.max_pods })
    }

    /// The pool in numbers. Capacity on its way counts as held, so that it is not asked for twice.
    pub(super) fn counts(&self, now: Time) -> Counts {
        let waiting = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        let mut counts = Counts { waiting, scheduled: self.node_state.scheduled_pods, ..self.counts_of_slots(now) };
        for want in self.ops.values().filter_map(|(op, _)| match op {
            Op::Assign { want, .. } => Some(*want),
            _ => None,
        }) {
            add_coming(&mut counts, want);
        }
        for creation in self.ledger.creations.values() {
            add_coming(&mut counts, creation.want);
        }
        counts
    }

    /// What the slots hold. Looked at several times a step and changed by few, so it is counted once a version.
    fn counts_of_slots(&self, now: Time) -> Counts {
        if let Some((version, until, counts)) = self.counted.get()
            && version == self.version
            && now < until
        {
            return counts;
        }
        let mut counts = Counts::default();
        let pods: BTreeSet<IpAddr> = self.ledger.pods.values().map(|a| a.address).collect();
        let cooldown_ms = self.settings.cooldown_ms();
        for (id, slots) in &self.ledger.slots {
            if !self.serves_pods(id) || self.is_stuck(id, now) {
                continue;
            }
            let counted = |slot: &&IpNet| self.settings.families.picks_from(slot) && !self.is_withheld(id, slot);
            for slot in slots.iter().filter(counted) {
                let size = pick::size(slot);
                let range = pick::range(slot);
                let held = count(pods.range(range.clone()));
                let orphans = count(self.kernel.pods.routes.range(range.clone()).filter(|a| !pods.contains(*a)));
                let cooling = |(address, freed_at): &(&IpAddr, &Time)| {
                    let taken = pods.contains(*address) || self.kernel.pods.routes.contains(*address);
                    !taken && now.since_ms(**freed_at) < cooldown_ms
                };
                let cool = count(self.ledger.freed.range(range).filter(cooling));
                counts.total += size;
                counts.orphans += orphans;
                counts.cooling += cool;
                counts.assigned += held;
                if size == PREFIX_SIZE {
                    counts.prefixes += 1;
                    counts.free_prefixes += u32::from(held + orphans + cool == 0);
                }
            }
        }
        // A cool-down ends; an ENI on its way may turn out stuck.
        let on_its_way =
            self.live.values().filter(|live| !live.programmed).map(|live| live.since.plus_ms(STUCK_ENI_MS + 1));
        let until = on_its_way.filter(|at| *at > now).chain(self.next_cooled(now)).min().unwrap_or(Time(u64::MAX));
        self.counted.set(Some((self.version, until, counts)));
        counts
    }

    /// What may be used for growing.
    pub(super) fn means(&self, now: Time) -> Option<Means> {
        let frame = self.frame()?;
        // EC2 gives its tokens by and by: what it throttles is waited for, what it denies is not.
        let throttled = !self.may_call(ASSIGN, now);
        let setback = self.setbacks.get(&Subject::Action(ASSIGN.into()));
        let denied = setback.is_some_and(|s| !s.over && s.kind != K::Throttled);
        let mut enis: Vec<_> = self.ledger.enis.values().collect();
        enis.sort_by_key(|eni| (eni.card, eni.device));
        let mut rooms = Vec::new();
        let mut later = self.room_beside_creations(&frame);
        for eni in enis {
            let Some(live) = self.live.get(&eni.id).filter(|_| self.serves_pods(&eni.id)) else { continue };
            let held = self.ledger.slots.get(&eni.id).into_iter().flatten().chain(&live.quarantined);
            let held = held.filter(|slot| matches!(slot, IpNet::V4(_))).count();
            let free_slots = frame.slots_per_eni.saturating_sub(u32::try_from(held).unwrap_or(u32::MAX));
            let busy = self.is_changing(&eni.id);
            let rests = !self.setbacks.is_empty()
                && (self.rests(&Subject::Eni(eni.id.clone())) || self.rests(&Subject::Subnet(eni.subnet.clone())));
            let refused = rests || denied || self.is_stuck(&eni.id, now);
            // What came of its last call is not known yet: asked again it might be given twice.
            let unread = live.read_due || self.under_way(|op| matches!(op, Op::ReadBack(id) if *id == eni.id));
            let waits =
                busy || unread || throttled || self.is_being_sounded(&eni.subnet) || eni.progress == Progress::Created;
            let singles_only = !self.setbacks.is_empty() && self.rests(&Subject::EniPrefixes(eni.id.clone()));
            if waits && !refused {
                let size = if singles_only { 1 } else { frame.slot_size() };
                later += free_slots.saturating_sub(self.slots_coming_to(&eni.id)) * size;
            }
            rooms.push(EniRoom {
                eni: eni.id.clone(),
                free_slots,
                resting: waits || refused,
                singles_only,
                at_most: self.subnets.at_most(&eni.subnet),
            });
        }
        Some(Means {
            mode: frame.mode,
            enis: rooms,
            new_enis: if self.terminating { 0 } else { self.eni_room(now) },
            slots_per_eni: frame.slots_per_eni,
            subnets: match self.may_call(CREATE, now) {
                true => self.subnet_rooms(),
                false => Vec::new(),
            },
            later,
            spare_enis: self.may_spare(now),
        })
    }

    /// Addresses that ENIs being made could take beside what they are made with.
    fn room_beside_creations(&self, frame: &Frame) -> u32 {
        let coming = self.ledger.creations.values().filter(|c| !self.rests(&Subject::Subnet(c.subnet.clone())));
        coming.map(|creation| frame.slots_per_eni.saturating_sub(creation.want.slots()) * frame.slot_size()).sum()
    }

    fn slots_coming_to(&self, eni: &EniId) -> u32 {
        let coming = self.ops.values().filter_map(|(op, _)| match op {
            Op::Assign { eni: id, want } if id == eni => Some(want.slots()),
            _ => None,
        });
        coming.sum()
    }

    /// Head-room is worth an ENI of its own when no pod waits, nothing else is on its way, and others do not need the calls
    /// that takes more.
    fn may_spare(&self, now: Time) -> bool {
        let quiet = |action: &str| self.buckets.get(action).is_none_or(|bucket| !bucket.yields(now));
        let on_its_way = |id: &EniId| {
            let programmed = self.live.get(id).is_none_or(|live| live.programmed);
            self.serves_pods(id) && !programmed && !self.is_stuck(id, now)
        };
        self.waiting.is_empty()
            && self.ledger.creations.is_empty()
            && !self.ledger.enis.keys().any(on_its_way)
            && [CREATE, ATTACH].into_iter().all(quiet)
    }

    /// ENIs that could still be created.
    pub(super) fn eni_room(&self, now: Time) -> u32 {
        // A detachment takes EC2 a while after it has said yes; what only its deletion is refused for is off.
        let detached = |eni: &EniRecord| {
            let refused = self.setbacks.get(&Subject::Eni(eni.id.clone())).map(|setback| setback.kind);
            let is_off = refused.is_some_and(|kind| !matches!(kind, K::Busy | K::Throttled));
            eni.leaving.is_some() && eni.progress == Progress::Created && is_off
        };
        let here =
            self.ledger.enis.values().filter(|eni| !self.is_believed_gone(&eni.id, now) && !detached(eni)).count();
        let trunk = usize::from(self.settings.trunk_reserve && self.limits.as_ref().is_some_and(|l| l.prefixes));
        let taken = here + self.ledger.creations.len() + self.foreign.len().max(trunk);
        self.max_enis().saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX))
    }

    /// One that EC2 does not show takes its place until that is believed: a reading may be older than the ENI.
    fn is_believed_gone(&self, eni: &EniId, now: Time) -> bool {
        self.ledger.enis_unseen.get(eni).is_some_and(|at| now.since_ms(*at) >= BELIEVED_AFTER_MS)
    }

    pub(super) fn max_enis(&self) -> u32 {
        let by_type = self.limits.as_ref().map_or(0, |limits| limits.max_enis);
        let learned = self.learned_max_enis.unwrap_or(u32::MAX);
        by_type.min(self.settings.max_eni.unwrap_or(u32::MAX)).min(learned)
    }

    /// The instance carries as many ENIs as it may, this unattached one not counted: it has no future.
    fn full_without(&self, eni: &EniId, now: Time) -> bool {
        let attached =
            |e: &&EniRecord| e.id != *eni && e.progress >= Progress::Attached && !self.is_believed_gone(&e.id, now);
        let taken = self.ledger.enis.values().filter(attached).count() + self.foreign.len();
        self.limits.is_some() && u32::try_from(taken).is_ok_and(|taken| taken >= self.max_enis())
    }

    /// Something under way will bring addresses, or the next settle will start it.
    pub(super) fn capacity_is_coming(&self, now: Time) -> bool {
        let call = self.under_way(|op| {
            matches!(
                op,
                Op::Assign { .. }
                    | Op::AssignIpv6 { .. }
                    | Op::Create { .. }
                    | Op::Attach(_)
                    | Op::Metadata
                    | Op::Verify
                    | Op::ReadBack(_)
            )
        });
        let soon = |id: &EniId| {
            let live = self.live.get(id);
            let primary = self.ledger.node.as_ref().is_some_and(|node| node.primary_eni == *id);
            let slots = self.ledger.slots.get(id);
            live.is_some_and(|l| {
                let untold = !primary && slots.is_some_and(|slots| !slots.is_subset(&l.told));
                let on_its_way = !l.programmed && now.since_ms(l.since) <= STUCK_ENI_MS;
                self.serves_pods(id) && (on_its_way || (l.programmed && untold && !self.rests(&Subject::Kernel)))
            })
        };
        call || self.ledger.enis.keys().any(soon) || self.could_grow(now)
    }

    /// The plan has a step that nothing stands in the way of.
    pub(super) fn could_grow(&self, now: Time) -> bool {
        let plan = self
            .target(now)
            .zip(self.means(now))
            .map(|(target, means)| plan::plan(target.wanted, target.needed, &means));
        self.may_grow() && plan.is_some_and(|plan| !plan.steps.is_empty())
    }

    /// The ENI is one that pods may be placed on.
    pub(super) fn serves_pods(&self, id: &EniId) -> bool {
        let Some(eni) = self.ledger.enis.get(id) else { return false };
        let left_out = self.settings.custom_networking && eni.device == crate::ids::DeviceIndex::PRIMARY;
        let ours = !self.unmanaged.contains(id) && !self.is_excluded(&eni.subnet);
        !left_out && ours && eni.leaving.is_none() && !self.is_gone(id)
    }

    /// The slot is held and not to be handed out: EC2 does not show it, or it is being given back.
    pub(super) fn is_withheld(&self, eni: &EniId, slot: &IpNet) -> bool {
        let unseen = self.ledger.unseen.get(eni).is_some_and(|slots| slots.contains_key(slot));
        unseen || self.ledger.releasing.get(eni).is_some_and(|slots| slots.contains(slot))
    }

    /// Single addresses that serve nobody, on a node that would rather have prefixes.
    pub(super) fn idle_singles(&self) -> u32 {
        if self.settings.families.is_v6_only() || self.frame().is_none_or(|frame| frame.mode == Mode::Addresses) {
            return 0;
        }
        let held = self.ledger.slots.iter().filter(|(eni, _)| self.serves_pods(eni));
        let singles = held.flat_map(|(eni, slots)| slots.iter().filter(move |slot| !self.is_withheld(eni, slot)));
        let idle = singles
            .filter(|slot| matches!(slot, IpNet::V4(_)) && pick::size(slot) == 1 && !self.somebody_lives_in(slot));
        u32::try_from(idle.count()).unwrap_or(0)
    }

    /// Slots by ENI, for the view.
    pub(super) fn slot_sizes(&self) -> BTreeMap<EniId, (u32, u32)> {
        let sizes = |slots: &std::collections::BTreeSet<IpNet>| {
            let prefixes = slots.iter().filter(|slot| pick::size(slot) > 1).count();
            (u32::try_from(slots.len() - prefixes).unwrap_or(0), u32::try_from(prefixes).unwrap_or(0))
        };
        self.ledger.slots.iter().map(|(eni, slots)| (eni.clone(), sizes(slots))).collect()
    }

    pub(super) fn wanted(&self, now: Time) -> Wanted {
        self.target(now).map_or(Wanted::Enough, |t| t.wanted)
    }
}

fn add_coming(counts: &mut Counts, want: Want) {
    match want {
        Want::Addresses(n) => counts.total += n,
        Want::Prefixes(n) => {
            counts.total += n * PREFIX_SIZE;
            counts.prefixes += n;
            counts.free_prefixes += n;
        }
    }
}

fn count(items: impl Iterator) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}
