//! Which subnets may new ENIs be made in? The tags of the add-on decide, and EC2's count of free addresses orders.

use std::collections::{BTreeMap, BTreeSet};

use super::setback::Subject;
use super::{Op, Out, Pool};
use crate::ids::{SubnetId, Time};
use crate::plan::{AtMost, SubnetRoom};
use crate::ports::{CloudRequest, SubnetView, Want};

/// `0`: never for pods; any other value: for pods.
const ROLE_TAG: &str = "kubernetes.io/role/cni";
/// With tags of this kind a subnet is for the clusters they name.
const CLUSTER_TAG: &str = "cni.networking.k8s.aws/cluster/";
/// The list is read again after this, when the pool wants to grow.
const LIST_EVERY_MS: u64 = 600_000;

/// The subnets of this node's zone as EC2 last listed them.
#[derive(Debug, Clone, Default)]
pub struct Subnets {
    list: Vec<SubnetView>,
    read_at: Option<Time>,
    /// EC2 said something that the list does not: read it again.
    outdated: bool,
    /// What one call may ask for in a subnet that could not give more a moment ago.
    at_most: BTreeMap<SubnetId, AtMost>,
}

impl Subnets {
    pub fn arrived(&mut self, list: Vec<SubnetView>, now: Time) {
        (self.list, self.read_at, self.outdated) = (list, Some(now), false);
    }

    pub fn list(&self) -> &[SubnetView] {
        &self.list
    }

    pub fn get(&self, id: &SubnetId) -> Option<&SubnetView> {
        self.list.iter().find(|subnet| subnet.id == *id)
    }

    pub fn at_most(&self, id: &SubnetId) -> AtMost {
        self.at_most.get(id).copied().unwrap_or(AtMost::ANY)
    }

    /// The subnet could not give as much: half of it is asked for next. False when it was one already: there is none.
    pub fn ask_less(&mut self, id: &SubnetId, want: Want) -> bool {
        let at_most = self.at_most.entry(id.clone()).or_insert(AtMost::ANY);
        let half = (want.slots() / 2).max(1);
        match want {
            Want::Addresses(_) => at_most.addresses = half,
            Want::Prefixes(_) => at_most.prefixes = half,
        }
        want.slots() > 1
    }

    /// The subnet gave what was asked for: twice as much may be asked for next.
    pub fn gave(&mut self, id: &SubnetId, want: Want) {
        let Some(at_most) = self.at_most.get_mut(id) else { return };
        match want {
            Want::Addresses(n) => at_most.addresses = at_most.addresses.max(n.saturating_mul(2)),
            Want::Prefixes(n) => at_most.prefixes = at_most.prefixes.max(n.saturating_mul(2)),
        }
    }

    pub fn outdated(&mut self) {
        self.outdated = true;
    }
}

impl Pool {
    /// Reads the list if it is wanted and old. True while the first list is on its way: what may grow where is not known.
    pub(super) fn subnets_awaited(&mut self, now: Time, out: &mut Out) -> bool {
        let wanted = self.settings.subnet_discovery || self.settings.custom_networking;
        let Some(node) = self.ledger.node.clone().filter(|_| wanted) else { return false };
        let old = |at: Time| self.subnets.outdated || now.since_ms(at) >= LIST_EVERY_MS;
        let under_way = self.under_way(|op| *op == Op::Subnets);
        if self.subnets.read_at.is_none_or(old) && !under_way && self.may_call("DescribeSubnets", now) {
            let request =
                CloudRequest::DescribeSubnets { vpc: node.vpc, availability_zone: node.availability_zone.clone() };
            self.start(Op::Subnets, request, now, out);
        }
        // A list that cannot be had leaves the subnet of the primary ENI: that one is known.
        self.subnets.read_at.is_none() && self.under_way(|op| *op == Op::Subnets)
    }

    /// Subnets for new ENIs, best first, without those that EC2 said are empty a moment ago.
    pub(super) fn subnet_rooms(&self) -> Vec<SubnetRoom> {
        let usable = self.usable_subnets().into_iter();
        let usable =
            usable.filter(|subnet| !self.rests(&Subject::Subnet(subnet.clone())) && !self.is_being_sounded(subnet));
        let room = |subnet: SubnetId| SubnetRoom {
            singles_only: self.rests(&Subject::SubnetPrefixes(subnet.clone())),
            at_most: self.subnets.at_most(&subnet),
            subnet,
        };
        usable.map(room).collect()
    }

    /// The subnet could not give what was asked, and a smaller ask is under way: whatever else is missing waits for that.
    pub(super) fn is_being_sounded(&self, subnet: &SubnetId) -> bool {
        let asked_in = |op: &Op| match op {
            Op::Assign { eni, .. } => self.ledger.enis.get(eni).is_some_and(|eni| eni.subnet == *subnet),
            Op::Create { token } => self.ledger.creations.get(token).is_some_and(|c| c.subnet == *subnet),
            _ => false,
        };
        self.subnets.at_most(subnet) != AtMost::ANY && self.under_way(asked_in)
    }

    fn usable_subnets(&self) -> Vec<SubnetId> {
        if self.settings.custom_networking {
            return self.node_state.eni_config.iter().map(|config| config.subnet.clone()).collect();
        }
        let Some(primary) = self.primary_subnet() else { return Vec::new() };
        if self.subnets.get(&primary).is_none() {
            return vec![primary];
        }
        let mut usable: Vec<&SubnetView> =
            self.subnets.list.iter().filter(|subnet| self.is_for_pods(subnet, &primary)).collect();
        usable.sort_by_key(|subnet| (std::cmp::Reverse(subnet.free_addresses), subnet.id.clone()));
        usable.into_iter().map(|subnet| subnet.id.clone()).collect()
    }

    /// By its tags: never with role 0, always with another role unless it is another cluster's, and without a tag only as the
    /// primary's own subnet.
    fn is_for_pods(&self, subnet: &SubnetView, primary: &SubnetId) -> bool {
        let clusters: BTreeSet<&str> = subnet.tags.keys().filter_map(|key| key.strip_prefix(CLUSTER_TAG)).collect();
        match subnet.tags.get(ROLE_TAG).map(String::as_str) {
            Some("0") => false,
            None => subnet.id == *primary,
            Some(_) => {
                let cluster = self.settings.cluster_name.as_deref();
                clusters.is_empty() || cluster.is_none_or(|name| clusters.contains(name))
            }
        }
    }

    /// ENIs in this subnet serve no pods.
    pub(super) fn is_excluded(&self, subnet: &SubnetId) -> bool {
        let role = self.subnets.get(subnet).and_then(|subnet| subnet.tags.get(ROLE_TAG));
        !self.settings.custom_networking && role.is_some_and(|role| role == "0")
    }

    pub(super) fn primary_subnet(&self) -> Option<SubnetId> {
        let node = self.ledger.node.as_ref()?;
        self.ledger.enis.get(&node.primary_eni).map(|eni| eni.subnet.clone())
    }

    pub(super) fn free_in(&self, subnet: &SubnetId) -> Option<u32> {
        self.subnets.get(subnet).map(|subnet| subnet.free_addresses)
    }
}
