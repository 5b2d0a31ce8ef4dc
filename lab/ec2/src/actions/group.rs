//! The actions on security groups.

use flatwire_core::ids::{SecurityGroupId, VpcId};

use super::{Call, Query, done, named, tag_specification, write_tags};
use crate::error::{ApiError, Kind};
use crate::params::Reader;
use crate::state::State;
use crate::state::group::{RuleSpec, SecurityGroup};
use crate::view::{RuleInfo, RulePeer};
use crate::xml::Xml;

pub(super) fn create(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let name = p.required("GroupName")?;
    let description = p.required("GroupDescription")?;
    let vpc: Option<VpcId> = p.opt_id(Kind::Vpc, "VpcId")?;
    let tags = tag_specification(call, p, "security-group")?;
    p.end_or_dry_run()?;
    let vpc = vpc.ok_or_else(|| ApiError::new("VPCIdNotSpecified", "No default VPC for this user"))?;
    let id = state.create_group(&vpc, name, description, tags)?;
    let group = state.group(&id)?;
    let mut xml = Xml::new();
    xml.leaf("return", true).leaf("groupId", &id).leaf("securityGroupArn", arn(state, &id));
    write_tags(&mut xml, &group.tags);
    Ok(xml)
}

pub(super) fn delete(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SecurityGroupId = p.required_id(Kind::Group, "GroupId")?;
    p.end_or_dry_run()?;
    state.delete_group(&id)?;
    let mut xml = done();
    xml.leaf("groupId", id);
    Ok(xml)
}

fn egress(call: &Call<'_>) -> bool {
    call.action.ends_with("Egress")
}

pub(super) fn authorize(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SecurityGroupId = p.required_id(Kind::Group, "GroupId")?;
    let specs = specs(call, p)?;
    p.ignore(&["TagSpecification"]);
    p.end_or_dry_run()?;
    if specs.is_empty() {
        return Err(ApiError::missing("IpPermissions"));
    }
    let made = state.authorize(&id, specs)?;
    let mut xml = done();
    xml.list("securityGroupRuleSet", made, |xml, rule| {
        xml.leaf("securityGroupRuleId", &rule.id)
            .leaf("groupId", &id)
            .leaf("groupOwnerId", &state.options.account_id)
            .leaf("isEgress", rule.egress)
            .leaf("ipProtocol", &rule.protocol)
            .leaf("fromPort", rule.from.unwrap_or(-1))
            .leaf("toPort", rule.to.unwrap_or(-1));
        match &rule.peer {
            RulePeer::Ipv4(cidr) => xml.leaf("cidrIpv4", cidr),
            RulePeer::Ipv6(cidr) => xml.leaf("cidrIpv6", cidr),
            RulePeer::PrefixList(list) => xml.leaf("prefixListId", list),
            RulePeer::Group(group) => xml.element("referencedGroupInfo", |xml| {
                xml.leaf("groupId", group).leaf("userId", &state.options.account_id);
            }),
        };
        xml.leaf("description", &rule.description);
    });
    Ok(xml)
}

pub(super) fn revoke(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let id: SecurityGroupId = p.required_id(Kind::Group, "GroupId")?;
    let specs = specs(call, p)?;
    let ids: Vec<String> = p.ids(Kind::GroupRule, "SecurityGroupRuleId")?;
    p.end_or_dry_run()?;
    if specs.is_empty() && ids.is_empty() {
        return Err(ApiError::missing("IpPermissions"));
    }
    state.revoke(&id, egress(call), &specs, &ids)?;
    Ok(done())
}

/// `IpPermissions.N`, or the one rule that the older parameters spell: a rule per peer.
fn specs(call: &Call<'_>, p: &Reader<'_>) -> Result<Vec<RuleSpec>, ApiError> {
    let mut specs = Vec::new();
    for permission in p.structs("IpPermissions")? {
        let protocol = protocol(permission.required("IpProtocol")?);
        let (from, to) = (port(&permission, "FromPort")?, port(&permission, "ToPort")?);
        let spec = |peer, description| RuleSpec {
            egress: egress(call),
            protocol: protocol.clone(),
            from: from.filter(|_| protocol != "-1"),
            to: to.filter(|_| protocol != "-1"),
            peer,
            description,
        };
        for range in permission.structs("IpRanges")? {
            range.required("CidrIp")?;
            let Some(cidr) = range.cidr("CidrIp")? else { continue };
            specs.push(spec(RulePeer::Ipv4(cidr.trunc()), range.text("Description")));
        }
        for range in permission.structs("Ipv6Ranges")? {
            let text = range.required("CidrIpv6")?;
            let cidr: ipnet::Ipv6Net = text.parse().map_err(|_| ApiError::bad_value("cidrIpv6", text))?;
            specs.push(spec(RulePeer::Ipv6(cidr.trunc()), range.text("Description")));
        }
        for group in permission.structs("Groups")? {
            group.ignore(&["UserId", "VpcId", "VpcPeeringConnectionId", "PeeringStatus", "GroupName"]);
            let id = group.required_id(Kind::Group, "GroupId")?;
            specs.push(spec(RulePeer::Group(id), group.text("Description")));
        }
        for list in permission.structs("PrefixListIds")? {
            let id = list.required("PrefixListId")?.to_owned();
            specs.push(spec(RulePeer::PrefixList(id), list.text("Description")));
        }
    }
    if let Some(cidr) = p.cidr("CidrIp")? {
        let protocol = protocol(p.required("IpProtocol")?);
        specs.push(RuleSpec {
            egress: egress(call),
            from: port(p, "FromPort")?.filter(|_| protocol != "-1"),
            to: port(p, "ToPort")?.filter(|_| protocol != "-1"),
            protocol,
            peer: RulePeer::Ipv4(cidr.trunc()),
            description: String::new(),
        });
    }
    Ok(specs)
}

fn protocol(text: &str) -> String {
    match text {
        "6" => "tcp",
        "17" => "udp",
        "1" => "icmp",
        "all" => "-1",
        other => other,
    }
    .to_ascii_lowercase()
}

fn port(p: &Reader<'_>, name: &str) -> Result<Option<i32>, ApiError> {
    p.opt(name).map(|text| text.parse().map_err(|_| ApiError::bad_value(name, text))).transpose()
}

const FILTERS: &[&str] = &["description", "group-id", "group-name", "owner-id", "vpc-id"];

pub(super) fn describe(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids: Vec<SecurityGroupId> = p.ids(Kind::Group, "GroupId")?;
    let names = p.list("GroupName")?;
    let query = Query::read(call, p, FILTERS, !ids.is_empty() || !names.is_empty(), 1_000)?;
    let groups: Vec<&SecurityGroup> = named(&ids, state.groups.iter(), Kind::Group)?
        .into_iter()
        .filter(|group| names.is_empty() || names.contains(&group.name.as_str()))
        .filter(|group| {
            query.filters.keep(&group.tags, |name| match name {
                "description" => vec![group.description.clone()],
                "group-id" => vec![group.id.to_string()],
                "group-name" => vec![group.name.clone()],
                "owner-id" => vec![state.options.account_id.clone()],
                "vpc-id" => vec![group.vpc.to_string()],
                _ => Vec::new(),
            })
        })
        .collect();
    let (page, token) = query.cut(state, call, groups, |group| group.id.to_string())?;
    let mut xml = Xml::new();
    xml.list("securityGroupInfo", page, |xml, group| {
        xml.leaf("ownerId", &state.options.account_id)
            .leaf("groupId", &group.id)
            .leaf("groupName", &group.name)
            .leaf("groupDescription", &group.description)
            .leaf("vpcId", &group.vpc)
            .leaf("securityGroupArn", arn(state, &group.id));
        for (element, egress) in [("ipPermissions", false), ("ipPermissionsEgress", true)] {
            let rules = group.rules.iter().filter(|rule| rule.egress == egress);
            xml.list(element, rules, |xml, rule| write_permission(xml, state, rule));
        }
        write_tags(xml, &group.tags);
    });
    xml.opt("nextToken", token);
    Ok(xml)
}

/// EC2 merges rules that differ in their peer only; one permission per rule says the same.
fn write_permission(xml: &mut Xml, state: &State, rule: &RuleInfo) {
    xml.leaf("ipProtocol", &rule.protocol).opt("fromPort", rule.from).opt("toPort", rule.to);
    let description = Some(&rule.description).filter(|text| !text.is_empty());
    match &rule.peer {
        RulePeer::Ipv4(cidr) => xml.list("ipRanges", [cidr], |xml, cidr| {
            xml.leaf("cidrIp", cidr).opt("description", description);
        }),
        RulePeer::Ipv6(cidr) => xml.list("ipv6Ranges", [cidr], |xml, cidr| {
            xml.leaf("cidrIpv6", cidr).opt("description", description);
        }),
        RulePeer::PrefixList(list) => xml.list("prefixListIds", [list], |xml, list| {
            xml.leaf("prefixListId", list).opt("description", description);
        }),
        RulePeer::Group(group) => xml.list("groups", [group], |xml, group| {
            xml.leaf("userId", &state.options.account_id).leaf("groupId", group).opt("description", description);
        }),
    };
}

fn arn(state: &State, id: &SecurityGroupId) -> String {
    format!("arn:aws:ec2:{}:{}:security-group/{id}", state.options.region, state.options.account_id)
}
