//! Security groups and their rules: kept and described; the fabric does with them what it does.

use std::net::{Ipv4Addr, Ipv6Addr};

use flatwire_core::ids::{SecurityGroupId, VpcId};
use ipnet::{Ipv4Net, Ipv6Net};

use super::State;
use crate::error::{ApiError, Kind};
use crate::view::{RuleInfo, RulePeer, SecurityGroupInfo, Tags};

/// Rules a group may have in one direction.
const RULES_MAX: usize = 60;
const EVERYBODY: RulePeer = RulePeer::Ipv4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0));
const EVERYBODY6: RulePeer = RulePeer::Ipv6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0));

#[derive(Debug, Clone)]
pub(crate) struct SecurityGroup {
    pub(crate) id: SecurityGroupId,
    pub(crate) vpc: VpcId,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) rules: Vec<RuleInfo>,
    pub(crate) tags: Tags,
}

impl SecurityGroup {
    pub(crate) fn info(&self) -> SecurityGroupInfo {
        SecurityGroupInfo {
            id: self.id.clone(),
            vpc: self.vpc.clone(),
            name: self.name.clone(),
            rules: self.rules.clone(),
            tags: self.tags.clone(),
        }
    }
}

/// A rule without an id: what requests speak of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuleSpec {
    pub(crate) egress: bool,
    pub(crate) protocol: String,
    pub(crate) from: Option<i32>,
    pub(crate) to: Option<i32>,
    pub(crate) peer: RulePeer,
    pub(crate) description: String,
}

impl RuleSpec {
    fn is(&self, rule: &RuleInfo) -> bool {
        (self.egress, &self.protocol, self.from, self.to, &self.peer)
            == (rule.egress, &rule.protocol, rule.from, rule.to, &rule.peer)
    }

    fn with_id(self, id: String) -> RuleInfo {
        RuleInfo {
            id,
            egress: self.egress,
            protocol: self.protocol,
            from: self.from,
            to: self.to,
            peer: self.peer,
            description: self.description,
        }
    }
}

impl State {
    pub(crate) fn group(&self, id: &SecurityGroupId) -> Result<&SecurityGroup, ApiError> {
        self.groups.get(id).ok_or_else(|| Kind::Group.not_found(id))
    }

    /// The group a VPC is born with: its members may reach each other, and everything else.
    pub(super) fn default_group(&mut self, vpc: &VpcId) -> SecurityGroupId {
        let id = self.new_group(vpc, "default", "default VPC security group", Tags::new());
        let spec = all_traffic(false, RulePeer::Group(id.clone()));
        let rule = spec.with_id(self.fresh_id(Kind::GroupRule));
        if let Some(group) = self.groups.get_mut(&id) {
            group.rules.push(rule);
        }
        id
    }

    pub(crate) fn open_default_group(&mut self, vpc: &VpcId) -> Result<(), ApiError> {
        let everybody = everybody(self.vpc(vpc)?.ipv6.is_some());
        let id = self.groups.values().find(|group| group.vpc == *vpc && group.name == "default").map(|g| g.id.clone());
        let id = id.expect("invariant: every VPC has its default group, which cannot be deleted");
        self.authorize(&id, everybody.map(|peer| all_traffic(false, peer)).collect()).map(drop)
    }

    /// What EC2 does for a VPC that gets its IPv6 block: groups that let all IPv4 out, as they were born, let all IPv6
    /// out as well; what somebody has changed is left alone.
    pub(super) fn let_ipv6_out(&mut self, vpc: &VpcId) -> Result<(), ApiError> {
        let as_born = |group: &SecurityGroup| {
            let mut out = group.rules.iter().filter(|rule| rule.egress);
            out.next().is_some_and(|rule| all_traffic(true, EVERYBODY).is(rule)) && out.next().is_none()
        };
        let groups = self.groups.values().filter(|group| group.vpc == *vpc && as_born(group));
        for id in groups.map(|group| group.id.clone()).collect::<Vec<_>>() {
            self.authorize(&id, vec![all_traffic(true, EVERYBODY6)])?;
        }
        Ok(())
    }

    fn new_group(&mut self, vpc: &VpcId, name: &str, description: &str, tags: Tags) -> SecurityGroupId {
        let id = SecurityGroupId::new(self.fresh_id(Kind::Group)).expect("invariant: fresh ids are well formed");
        let everybody = everybody(self.vpcs.get(vpc).is_some_and(|vpc| vpc.ipv6.is_some()));
        let rules = everybody.map(|peer| all_traffic(true, peer).with_id(self.fresh_id(Kind::GroupRule))).collect();
        let group = SecurityGroup {
            id: id.clone(),
            vpc: vpc.clone(),
            name: name.to_owned(),
            description: description.to_owned(),
            rules,
            tags,
        };
        self.groups.insert(id.clone(), group);
        self.changed();
        id
    }

    pub(crate) fn create_group(
        &mut self,
        vpc: &VpcId,
        name: &str,
        description: &str,
        tags: Tags,
    ) -> Result<SecurityGroupId, ApiError> {
        self.vpc(vpc)?;
        if name.starts_with("sg-") {
            return Err(ApiError::value(format!("Invalid security group name '{name}': it may not start with 'sg-'.")));
        }
        if self.groups.values().any(|group| group.vpc == *vpc && group.name == name) {
            return Err(ApiError::new(
                "InvalidGroup.Duplicate",
                format!("The security group '{name}' already exists for VPC '{vpc}'"),
            ));
        }
        Ok(self.new_group(vpc, name, description, tags))
    }

    pub(crate) fn delete_group(&mut self, id: &SecurityGroupId) -> Result<(), ApiError> {
        let group = self.group(id)?;
        if group.name == "default" {
            return Err(ApiError::new(
                "CannotDelete",
                format!("the specified group: \"{id}\" name: \"default\" cannot be deleted by a user"),
            ));
        }
        let in_rules = self
            .groups
            .values()
            .any(|other| other.id != *id && other.rules.iter().any(|r| r.peer == RulePeer::Group(id.clone())));
        if in_rules || self.enis().values().any(|eni| eni.security_groups.contains(id)) {
            return Err(ApiError::new("DependencyViolation", format!("resource {id} has a dependent object")));
        }
        self.groups.remove(id);
        self.changed();
        Ok(())
    }

    pub(crate) fn authorize(&mut self, id: &SecurityGroupId, specs: Vec<RuleSpec>) -> Result<Vec<RuleInfo>, ApiError> {
        let group = self.group(id)?;
        for spec in &specs {
            if group.rules.iter().any(|rule| spec.is(rule)) {
                return Err(ApiError::new(
                    "InvalidPermission.Duplicate",
                    format!("the specified rule \"peer: {:?}\" already exists", spec.peer),
                ));
            }
            if let RulePeer::Group(peer) = &spec.peer {
                self.group(peer)?;
            }
        }
        for egress in [false, true] {
            let old = group.rules.iter().filter(|rule| rule.egress == egress).count();
            if old + specs.iter().filter(|spec| spec.egress == egress).count() > RULES_MAX {
                return Err(ApiError::new(
                    "RulesPerSecurityGroupLimitExceeded",
                    "The maximum number of rules per security group has been reached.",
                ));
            }
        }
        let made: Vec<RuleInfo> = specs.into_iter().map(|spec| spec.with_id(self.fresh_id(Kind::GroupRule))).collect();
        if let Some(group) = self.groups.get_mut(id) {
            group.rules.extend(made.iter().cloned());
        }
        self.changed();
        Ok(made)
    }

    /// Revokes rules by what they say and by id.
    pub(crate) fn revoke(
        &mut self,
        id: &SecurityGroupId,
        egress: bool,
        specs: &[RuleSpec],
        ids: &[String],
    ) -> Result<Vec<RuleInfo>, ApiError> {
        let group = self.group(id)?;
        let named = |rule: &RuleInfo| ids.contains(&rule.id) && rule.egress == egress;
        if let Some(unknown) = ids.iter().find(|id| !group.rules.iter().any(|rule| rule.id == **id && named(rule))) {
            return Err(Kind::GroupRule.not_found(unknown));
        }
        if specs.iter().any(|spec| !group.rules.iter().any(|rule| spec.is(rule))) {
            return Err(ApiError::new(
                "InvalidPermission.NotFound",
                "The specified rule does not exist in this security group.",
            ));
        }
        let goes = |rule: &RuleInfo| named(rule) || specs.iter().any(|spec| spec.is(rule));
        let gone = group.rules.iter().filter(|rule| goes(rule)).cloned().collect();
        if let Some(group) = self.groups.get_mut(id) {
            group.rules.retain(|rule| !goes(rule));
        }
        self.changed();
        Ok(gone)
    }
}

/// All there are in a VPC with or without an IPv6 block.
fn everybody(ipv6: bool) -> impl Iterator<Item = RulePeer> {
    [EVERYBODY].into_iter().chain(ipv6.then_some(EVERYBODY6))
}

fn all_traffic(egress: bool, peer: RulePeer) -> RuleSpec {
    RuleSpec { egress, protocol: "-1".to_owned(), from: None, to: None, peer, description: String::new() }
}
