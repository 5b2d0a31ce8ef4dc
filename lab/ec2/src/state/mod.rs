//! The account as data: objects by id, the transitions that are due, and what of it is already visible.
//!
//! Operations validate everything before they change anything, so a refused request leaves no trace. Time and
//! randomness come in; nothing here knows a socket, a clock or XML.

pub(crate) mod address;
pub(crate) mod eni;
pub(crate) mod group;
pub(crate) mod history;
pub(crate) mod instance;
pub(crate) mod ipv6;
pub(crate) mod pool;
pub(crate) mod tags;
pub(crate) mod throttle;
pub(crate) mod vpc;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use flatwire_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId, Time, VpcId};

use crate::error::{ApiError, Kind};
use crate::options::Options;
use crate::rng::Rng;
use crate::view::{AttachmentState, EniInfo, EniStatus, InstanceState, SecurityGroupInfo, SubnetInfo, View, VpcView};

use self::address::PublicAddress;
use self::group::SecurityGroup;
use self::history::History;
use self::instance::Instance;
use self::throttle::Throttle;
use self::vpc::{Gateway, Peering, Subnet, Vpc};

/// Terminated instances stay listed for this long.
const TERMINATED_VISIBLE_MS: u64 = 3_600_000;
/// Idempotency tokens remembered, per action; the oldest give way.
const TOKENS_MAX: usize = 10_000;

pub(crate) struct State {
    pub(crate) options: Options,
    pub(crate) rng: Rng,
    pub(crate) version: u64,
    pub(crate) vpcs: BTreeMap<VpcId, Vpc>,
    pub(crate) subnets: BTreeMap<SubnetId, Subnet>,
    pub(crate) groups: BTreeMap<SecurityGroupId, SecurityGroup>,
    pub(crate) gateways: BTreeMap<String, Gateway>,
    pub(crate) peerings: BTreeMap<String, Peering>,
    pub(crate) addresses: BTreeMap<Ipv4Addr, PublicAddress>,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    enis: BTreeMap<EniId, EniInfo>,
    pub(crate) history: History,
    transitions: BTreeMap<(Time, u64), Transition>,
    transition_count: u64,
    tokens: BTreeMap<(String, String), Token>,
    token_count: u64,
    pub(crate) throttle: Throttle,
}

/// Something that happens by itself, later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transition {
    EniAvailable(EniId),
    Attached(EniId, AttachmentId),
    /// The guest's link appears: nothing in EC2 changes, but those who watch must look.
    LinkUp(EniId, AttachmentId),
    Detached(EniId, AttachmentId),
    InstanceRunning(InstanceId),
    InstanceTerminated(InstanceId),
    ForgetInstance(InstanceId),
}

/// What a client token was used for.
#[derive(Debug, Clone)]
struct Token {
    fingerprint: String,
    results: Vec<String>,
    number: u64,
}

impl State {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            rng: Rng::new(options.seed),
            throttle: Throttle::new(options.throttle.clone()),
            history: History::new(),
            version: 0,
            vpcs: BTreeMap::new(),
            subnets: BTreeMap::new(),
            groups: BTreeMap::new(),
            gateways: BTreeMap::new(),
            peerings: BTreeMap::new(),
            addresses: BTreeMap::new(),
            instances: BTreeMap::new(),
            enis: BTreeMap::new(),
            transitions: BTreeMap::new(),
            transition_count: 0,
            tokens: BTreeMap::new(),
            token_count: 0,
            options,
        }
    }

    /// A new id that no object has had: 16 random digits do not repeat within a seed's life.
    pub(crate) fn fresh_id(&mut self, kind: Kind) -> String {
        format!("{}{}", kind.prefix(), self.rng.hex17())
    }

    pub(crate) fn changed(&mut self) {
        self.version += 1;
    }

    // ENIs change only through the next four, so that their history is whole.

    pub(crate) fn enis(&self) -> &BTreeMap<EniId, EniInfo> {
        &self.enis
    }

    pub(crate) fn eni(&self, id: &EniId) -> Result<&EniInfo, ApiError> {
        self.enis.get(id).ok_or_else(|| Kind::Interface.not_found(id))
    }

    pub(crate) fn put_eni(&mut self, now: Time, eni: EniInfo) {
        let lag_ms = self.options.delays.imds_lag_ms.max(self.options.describe_lag_ms);
        self.history.record(now, lag_ms, &eni.id, self.enis.get(&eni.id), Some(&eni));
        self.enis.insert(eni.id.clone(), eni);
        self.changed();
    }

    pub(crate) fn remove_eni(&mut self, now: Time, id: &EniId) -> Option<EniInfo> {
        let lag_ms = self.options.delays.imds_lag_ms.max(self.options.describe_lag_ms);
        let removed = self.enis.remove(id)?;
        self.history.record(now, lag_ms, id, Some(&removed), None);
        self.changed();
        Some(removed)
    }

    /// Changes one ENI that exists; does nothing if it does not.
    pub(crate) fn change_eni(&mut self, now: Time, id: &EniId, change: impl FnOnce(&mut EniInfo)) {
        if let Some(mut eni) = self.enis.get(id).cloned() {
            change(&mut eni);
            self.put_eni(now, eni);
        }
    }

    pub(crate) fn later(&mut self, due: Time, transition: Transition) {
        self.transition_count += 1;
        self.transitions.insert((due, self.transition_count), transition);
    }

    pub(crate) fn next_transition(&self) -> Option<Time> {
        self.transitions.keys().next().map(|(due, _)| *due)
    }

    /// Carries out every transition that is due, each at its own time and in order.
    pub(crate) fn advance(&mut self, now: Time) {
        while let Some(entry) = self.transitions.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((due, _), transition) = entry.remove_entry();
            self.carry_out(due, transition);
        }
        let lag_ms = self.options.delays.imds_lag_ms.max(self.options.describe_lag_ms);
        self.history.prune(now, lag_ms);
    }

    fn carry_out(&mut self, now: Time, transition: Transition) {
        match transition {
            Transition::EniAvailable(id) => self.change_eni(now, &id, |eni| {
                if eni.status == EniStatus::Pending {
                    eni.status = EniStatus::Available;
                }
            }),
            Transition::Attached(id, attachment) => self.change_eni(now, &id, |eni| {
                if let Some(a) = eni.attachment.as_mut().filter(|a| a.id == attachment)
                    && a.state == AttachmentState::Attaching
                {
                    a.state = AttachmentState::Attached;
                }
            }),
            Transition::LinkUp(id, attachment) => {
                if self.enis.get(&id).and_then(|eni| eni.attachment.as_ref()).is_some_and(|a| a.id == attachment) {
                    self.changed();
                }
            }
            Transition::Detached(id, attachment) => self.change_eni(now, &id, |eni| {
                if eni.attachment.as_ref().is_some_and(|a| a.id == attachment) {
                    eni.attachment = None;
                    eni.status = EniStatus::Available;
                }
            }),
            Transition::InstanceRunning(id) => {
                if let Some(instance) = self.instances.get_mut(&id)
                    && instance.info.state == InstanceState::Pending
                {
                    instance.info.state = InstanceState::Running;
                    self.changed();
                }
            }
            Transition::InstanceTerminated(id) => self.finish_termination(now, &id),
            Transition::ForgetInstance(id) => {
                if self.instances.remove(&id).is_some() {
                    self.changed();
                }
            }
        }
    }

    /// What the token gave before: `Ok(None)` if it is new, refused if it was used for something else.
    pub(crate) fn recall(
        &self,
        action: &str,
        token: Option<&str>,
        fingerprint: &str,
    ) -> Result<Option<Vec<String>>, ApiError> {
        let Some(known) = token.and_then(|token| self.tokens.get(&(action.to_owned(), token.to_owned()))) else {
            return Ok(None);
        };
        if known.fingerprint != fingerprint {
            return Err(ApiError::new(
                "IdempotentParameterMismatch",
                "The client token was used for a request with other parameters.",
            ));
        }
        Ok(Some(known.results.clone()))
    }

    pub(crate) fn remember(&mut self, action: &str, token: Option<&str>, fingerprint: String, results: Vec<String>) {
        let Some(token) = token else { return };
        self.token_count += 1;
        let number = self.token_count;
        self.tokens.insert((action.to_owned(), token.to_owned()), Token { fingerprint, results, number });
        if self.tokens.len() > TOKENS_MAX
            && let Some(oldest) = self.tokens.iter().min_by_key(|(_, token)| token.number).map(|(key, _)| key.clone())
        {
            self.tokens.remove(&oldest);
        }
    }

    pub(crate) fn view(&self, now: Time) -> View {
        View {
            now,
            version: self.version,
            vpcs: self
                .vpcs
                .values()
                .map(|vpc| VpcView {
                    id: vpc.id.clone(),
                    ipv6: vpc.ipv6,
                    cidrs: vpc.cidrs.iter().map(|association| association.cidr).collect(),
                    internet_gateway: self.gateways.values().any(|gateway| gateway.vpc.as_ref() == Some(&vpc.id)),
                    tags: vpc.tags.clone(),
                })
                .collect(),
            peerings: self
                .peerings
                .values()
                .filter(|peering| peering.status == vpc::PeeringStatus::Active)
                .map(|peering| (peering.requester.clone(), peering.accepter.clone()))
                .collect(),
            subnets: self.subnets.values().map(Subnet::info).collect::<Vec<SubnetInfo>>(),
            instances: self.instances.values().map(|instance| instance.info.clone()).collect(),
            enis: self.enis.values().cloned().collect(),
            security_groups: self.groups.values().map(SecurityGroup::info).collect::<Vec<SecurityGroupInfo>>(),
        }
    }
}
