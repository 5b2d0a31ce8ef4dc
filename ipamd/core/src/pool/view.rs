//! The pool as others see it: its state for `ipamd status`, and the answer to "why is there no address?".

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::setback::{Setback, Subject};
use super::{NodeState, Op, Part, Pool};
use crate::contest::Contest;
use crate::ids::{DeviceIndex, EniId, MacAddress, RouteTable, SubnetId, Time};
use crate::ledger::{Allocation, NodeFacts, Progress};
use crate::ports::{CloudErrorKind, InstanceLimits};
use crate::settings::Settings;
use crate::target::{Counts, Mode, Wanted};

/// Why a pod has no address. The values of the contract's `Reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Starting,
    Assigning,
    Attaching,
    Cooling,
    SubnetEmpty,
    Fragmented,
    Throttled,
    Denied,
    InstanceLimit,
    CloudUnavailable,
    ProvisioningDisabled,
    /// The journal could not be written, so nothing was promised.
    Ledger,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Assigning => "assigning",
            Self::Attaching => "attaching",
            Self::Cooling => "cooling",
            Self::SubnetEmpty => "subnet_empty",
            Self::Fragmented => "fragmented",
            Self::Throttled => "throttled",
            Self::Denied => "denied",
            Self::InstanceLimit => "instance_limit",
            Self::CloudUnavailable => "cloud_unavailable",
            Self::ProvisioningDisabled => "provisioning_disabled",
            Self::Ledger => "ledger",
        })
    }
}

/// A reason with the sentence a person reads: what is missing, of which object, since when, and what happens next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub reason: Reason,
    pub message: String,
    /// The same request may succeed later without anybody's doing.
    pub retryable: bool,
}

impl Failure {
    pub fn retryable(reason: Reason, message: String) -> Self {
        Self { reason, message, retryable: true }
    }
}

/// Everything `ipamd status` shows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolStatus {
    pub node: Option<NodeFacts>,
    pub limits: Option<InstanceLimits>,
    /// An ADD that came now would be given an address, at once or within its patience.
    pub ready: bool,
    /// Why not, or why not at once.
    pub failure: Option<Failure>,
    pub counts: Counts,
    /// Addresses that could be given this moment.
    pub free: u32,
    pub mode: Mode,
    pub target: Option<TargetRow>,
    pub max_enis: u32,
    pub max_addresses: u32,
    pub enis: Vec<EniRow>,
    pub pods: Vec<Allocation>,
    pub setbacks: Vec<Setback>,
    /// What somebody else keeps changing back in the kernel.
    #[serde(default)]
    pub contests: Vec<Contest>,
    /// What operators and the API server say of this node.
    pub node_state: NodeState,
    /// EC2 has announced the end of this instance.
    pub terminating: bool,
    pub settings: Settings,
    pub now: Time,
}

impl PoolStatus {
    /// The node holds addresses for pods, given or to be given. `ready` says less: EC2 may still be being asked for the first
    /// one, and refuse.
    pub fn holds_addresses(&self) -> bool {
        self.free > 0 || self.counts.cooling > 0 || !self.pods.is_empty()
    }
}

/// What is still wanted, and what that follows from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetRow {
    pub wanted: Wanted,
    pub why: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EniRow {
    pub id: EniId,
    pub mac: MacAddress,
    pub device: DeviceIndex,
    pub table: RouteTable,
    pub subnet: SubnetId,
    pub primary_ipv4: Ipv4Addr,
    /// created, attaching link, in service, gone.
    pub state: String,
    pub addresses: u32,
    pub prefixes: u32,
    pub pods: u32,
    pub slots: Vec<String>,
    /// Slots EC2 does not show any more.
    pub missing: Vec<String>,
    /// Slots only IMDS shows.
    pub quarantined: Vec<String>,
}

impl Pool {
    pub fn status(&self, now: Time) -> PoolStatus {
        let counts = self.counts(now);
        let pods = self.pods_by_eni();
        let free = self.free_now(now);
        let sizes = self.slot_sizes();
        let mut enis: Vec<EniRow> = self
            .ledger
            .enis
            .values()
            .map(|eni| {
                let live = self.live.get(&eni.id);
                let (addresses, prefixes) = sizes.get(&eni.id).copied().unwrap_or_default();
                let texts = |slots: Option<&std::collections::BTreeSet<ipnet::IpNet>>| {
                    slots.into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>()
                };
                EniRow {
                    id: eni.id.clone(),
                    mac: eni.mac,
                    device: eni.device,
                    table: eni.table(),
                    subnet: eni.subnet.clone(),
                    primary_ipv4: eni.primary_ipv4,
                    state: self.eni_state(&eni.id).to_owned(),
                    addresses,
                    prefixes,
                    pods: pods.get(&eni.id).copied().unwrap_or(0),
                    slots: texts(self.ledger.slots.get(&eni.id)),
                    missing: self
                        .ledger
                        .unseen
                        .get(&eni.id)
                        .into_iter()
                        .flatten()
                        .map(|(slot, _)| slot.to_string())
                        .collect(),
                    quarantined: texts(live.map(|l| &l.quarantined)),
                }
            })
            .collect();
        enis.sort_by_key(|row| row.device);
        let frame = self.frame();
        let can_serve = free > 0 || counts.cooling > 0 || self.capacity_is_coming(now);
        let failure = (free == 0).then(|| self.why_no_address(now, now));
        PoolStatus {
            node: self.ledger.node.clone(),
            limits: self.limits.clone(),
            ready: self.ledger.node.is_some() && can_serve,
            failure,
            counts,
            free,
            mode: frame.map_or(self.settings.mode, |f| f.mode),
            target: self.target(now).map(|target| TargetRow { wanted: target.wanted, why: target.why.to_string() }),
            max_enis: self.max_enis(),
            max_addresses: frame.map_or(0, |f| f.addresses_per_eni() * self.max_enis()),
            enis,
            pods: self.ledger.pods.values().cloned().collect(),
            setbacks: self.setbacks.values().cloned().collect(),
            contests: self.kernel.contests.fought_over().cloned().collect(),
            node_state: self.node_state.clone(),
            terminating: self.terminating,
            settings: self.settings.clone(),
            now,
        }
    }

    /// Addresses that could be given this moment.
    pub fn free_now(&self, now: Time) -> u32 {
        let used = self.in_use();
        let free = self.candidates(&self.pods_by_eni()).into_iter().flat_map(|c| crate::pick::addresses(&c.slot));
        let free = free.filter(|address| !used.contains(address) && self.cooling_since(address, now).is_none());
        u32::try_from(free.count()).unwrap_or(u32::MAX)
    }

    pub(super) fn eni_state(&self, id: &EniId) -> &'static str {
        let record = self.ledger.enis.get(id);
        match (record.map(|r| r.progress), self.live.get(id)) {
            _ if self.is_gone(id) => "gone from EC2",
            _ if record.is_some_and(|r| r.leaving.is_some()) => "being given back",
            (Some(Progress::Created), _) => "created",
            (_, Some(live)) if live.programmed => "in service",
            _ if self.kernel.report.missing_links.contains(id) => "waiting for its link",
            _ => "being programmed",
        }
    }

    /// Why a pod that asked at `since` has no address, in words an operator can act on.
    pub fn why_no_address(&self, since: Time, now: Time) -> Failure {
        let waited = seconds(now.since_ms(since));
        if self.ledger.node.is_none() {
            let why = match self.setbacks.get(&Subject::Action("ImdsRead".into())) {
                Some(s) => format!("the instance metadata service does not answer ({}: {})", s.code, s.message),
                None => "the instance metadata has not been read yet".to_owned(),
            };
            return Failure::retryable(Reason::Starting, format!("ipamd is starting: {why}"));
        }
        if let Some(s) = self.setbacks.get(&Subject::Kernel) {
            let message = format!("the node's routes could not be programmed: {}", s.message);
            return Failure::retryable(Reason::Starting, message);
        }
        if let Some(why) = self.why_unchangeable() {
            let message = format!("every address of this node is in use and {why}");
            return Failure { reason: Reason::ProvisioningDisabled, message, retryable: true };
        }
        if let Some(failure) = self.worst_setback(now) {
            return failure;
        }
        if let Some((eni, since)) = self.eni_on_its_way() {
            let message = format!(
                "ENI {eni} is being attached since {}; its addresses are served as soon as its link and routes stand \
                 (waited {waited})",
                seconds(now.since_ms(since))
            );
            return Failure::retryable(Reason::Attaching, message);
        }
        let asked = self
            .ops
            .values()
            .find(|(op, _)| matches!(op, Op::Assign { .. } | Op::AssignIpv6 { .. } | Op::Create { .. }));
        if let Some((_, since)) = asked {
            let message = format!(
                "EC2 was asked for more addresses {} ago and has not answered (waited {waited})",
                seconds(now.since_ms(*since))
            );
            return Failure::retryable(Reason::Assigning, message);
        }
        let counts = self.counts(now);
        if counts.cooling > 0 {
            let message = format!(
                "{} of {} addresses were freed less than {} s ago and are not reused yet; they are given early only when \
                 nothing else can be had",
                counts.cooling, counts.total, self.settings.cooldown_secs
            );
            return Failure::retryable(Reason::Cooling, message);
        }
        if self.wanted(now) != Wanted::Enough && !self.could_grow(now) || counts.assigned >= counts.total {
            let message = format!(
                "the instance is full: {} of {} addresses in use on {} of {} ENIs ({}); pods must leave, or the node \
                 needs a larger type or prefix delegation",
                counts.assigned,
                counts.total,
                self.ledger.enis.len(),
                self.max_enis(),
                self.ledger.node.as_ref().map_or("unknown type", |n| n.instance_type.as_str()),
            );
            return Failure::retryable(Reason::InstanceLimit, message);
        }
        Failure::retryable(Reason::Assigning, format!("an address is on its way (waited {waited})"))
    }

    /// What forbids taking more from EC2, if anything does.
    fn why_unchangeable(&self) -> Option<String> {
        if self.settings.imds_only {
            return Some("ENABLE_IMDS_ONLY_MODE forbids taking more".to_owned());
        }
        if !self.settings.provisioning {
            return Some("DISABLE_NETWORK_RESOURCE_PROVISIONING forbids taking more".to_owned());
        }
        if !self.may_read() {
            // The file wins over what the Node says, so it is no remedy for that.
            let on_node = |by: &&String| by.starts_with("annotation ") || by.starts_with("label ");
            let by = self.node_state.sources.get(&Part::Level);
            let lift = by.filter(on_node).map_or("`ipamd level normal` lifts it", |_| "without it EC2 is called again");
            let by = by.map_or("an operator", String::as_str);
            return Some(format!("the level is no-cloud, says {by}; {lift}"));
        }
        if self.settings.custom_networking && self.node_state.eni_config.is_none() {
            let why = self.node_state.sources.get(&Part::EniConfig);
            let why = why.map_or("nobody has named one", String::as_str);
            return Some(format!(
                "custom networking is on and no ENIConfig is known for this node ({why}): without one no ENI can be made"
            ));
        }
        None
    }

    fn eni_on_its_way(&self) -> Option<(&EniId, Time)> {
        self.live.iter().find(|(id, live)| !live.programmed && self.serves_pods(id)).map(|(id, live)| (id, live.since))
    }

    fn subnet_of(&self, subject: &Subject) -> Option<SubnetId> {
        match subject {
            Subject::Subnet(subnet) | Subject::SubnetPrefixes(subnet) => Some(subnet.clone()),
            Subject::Eni(eni) | Subject::EniPrefixes(eni) => self.ledger.enis.get(eni).map(|eni| eni.subnet.clone()),
            _ => None,
        }
    }

    /// The setback that stands most in the way, as a failure.
    fn worst_setback(&self, now: Time) -> Option<Failure> {
        let rank = |kind: CloudErrorKind| match kind {
            CloudErrorKind::Denied => 0,
            CloudErrorKind::SubnetEmpty => 1,
            CloudErrorKind::AccountFull => 2,
            CloudErrorKind::InstanceFull => 3,
            CloudErrorKind::Throttled => 4,
            CloudErrorKind::Invalid => 5,
            CloudErrorKind::Fragmented => 6,
            _ => 7,
        };
        // What rests now and would bring addresses; anything else is history, or does not stand in a pod's way.
        let brings =
            |s: &Setback| !matches!(s.action.as_str(), "ModifyNetworkInterfaceAttribute" | "DeleteNetworkInterface");
        let setbacks = self.setbacks.iter().filter(|(subject, s)| **subject != Subject::Kernel && !s.over && brings(s));
        let (subject, s) = setbacks.min_by_key(|(_, s)| rank(s.kind))?;
        let subnet = self.subnet_of(subject);
        let free = subnet.as_ref().and_then(|subnet| self.free_in(subnet));
        let free = free.map_or_else(String::new, |free| format!(", {free} free by EC2's count"));
        let subnet = subnet.map_or_else(|| "the subnet".to_owned(), |subnet| subnet.to_string());
        let since = seconds(now.since_ms(s.since));
        let next = match s.until.since_ms(now) {
            0 => "it is being tried again".to_owned(),
            ms => format!("next try in {}", seconds(ms)),
        };
        let Setback { action, object, code, message, failures, .. } = s;
        let (reason, text) = match s.kind {
            CloudErrorKind::SubnetEmpty => {
                (Reason::SubnetEmpty, format!("{subnet} has no free address for {object}, since {since}{free}; {next}"))
            }
            CloudErrorKind::Fragmented => (
                Reason::Fragmented,
                format!(
                    "{subnet} has no free /28 for {object}, since {since}{free}; single addresses are taken meanwhile, {next}"
                ),
            ),
            CloudErrorKind::Throttled => {
                (Reason::Throttled, format!("EC2 throttles {action} ({failures} refusals since {since}); {next}"))
            }
            CloudErrorKind::Denied => (
                Reason::Denied,
                format!("the node's role may not call ec2:{action} ({code}: {message}); allow it in IAM, {next}"),
            ),
            CloudErrorKind::InstanceFull | CloudErrorKind::AccountFull => {
                (Reason::InstanceLimit, format!("{action}: {message} ({code}), since {since}; {next}"))
            }
            _ => (
                Reason::CloudUnavailable,
                format!("{action} fails since {since} ({failures} times, last {code}: {message}); {next}"),
            ),
        };
        Some(Failure::retryable(reason, text))
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1_000, ms % 1_000 / 100)
}
