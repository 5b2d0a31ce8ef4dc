//! EC2 without the wire: a request of the core's port in, its reply out, through the same faults, throttle, permissions
//! and state as the Query API. For worlds with a virtual clock, where reading and writing XML would be most of the work.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, Time};
use flatwire_core::limits;
use flatwire_core::ports::{CloudReply, CloudRequest, EniKind, EniStatus, EniView, Metadata, SubnetView, Want};
use ipnet::{IpNet, Ipv4Net};

use crate::access::Caller;
use crate::actions::{Call, visible};
use crate::ec2::World;
use crate::error::ApiError;
use crate::faults::Outcome;
use crate::filters::Page;
use crate::state::State;
use crate::state::eni::{NewEni, Wanted};
use crate::state::ipv6::Wanted6;
use crate::view::{AttachmentState, EniInfo, EniStatus as Life, Tags};

/// Which page of a `Describe*` is asked for; other actions have none.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageAsked<'a> {
    /// `MaxResults`.
    pub size: Option<u32>,
    /// `NextToken` of the page before.
    pub token: Option<&'a str>,
}

/// What became of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    pub result: Result<CloudReply, ApiError>,
    /// There is more: the token of the next page.
    pub next_token: Option<String>,
    /// Carried out, and `result` does not say so.
    pub lost: bool,
    /// No answer is to arrive: the connection breaks. It was carried out all the same.
    pub broken: bool,
    /// To be sent so much later.
    pub delay_ms: u64,
}

impl World {
    pub(crate) fn call(
        &mut self,
        now: Time,
        caller: &Caller,
        request: &CloudRequest,
        page: &PageAsked<'_>,
    ) -> Answered {
        let action = request.action();
        let (outcome, result) = self.meet(action, caller, |world| {
            let (_, call) = world.admit(now, caller, action, false)?;
            carry_out(&mut world.state, &call, request, page)
        });
        let lost = outcome == Outcome::LoseReply && result.is_ok();
        let (result, next_token) = match result {
            Ok(_) if lost => (Err(ApiError::internal()), None),
            Ok((reply, token)) => (Ok(reply), token),
            Err(error) => (Err(error), None),
        };
        let delay_ms = if let Outcome::Delay(ms) = outcome { ms } else { 0 };
        Answered { result, next_token, lost, broken: outcome == Outcome::Break, delay_ms }
    }

    pub(crate) fn metadata(&mut self, now: Time, id: &InstanceId) -> Result<Metadata, ApiError> {
        if let Some(status) = self.faults.decide_imds("meta-data/network/interfaces/macs") {
            return Err(ApiError { status, ..ApiError::new("ServiceUnavailable", format!("IMDS answered {status}")) });
        }
        let nobody = || ApiError::new("ServiceUnavailable", "there is no such instance");
        let instance = self.state.instances.get(id).ok_or_else(nobody)?;
        let (info, terminating) = (instance.info.clone(), instance.ending.is_some());
        let seen = self.enis_in_imds(now, id, info.launched_at);
        let primary = seen.iter().find(|(_, device, card)| *device == DeviceIndex::PRIMARY && *card == 0);
        let (primary_mac, primary_ipv4) = primary.map(|(eni, _, _)| (eni.mac, eni.primary_ipv4)).ok_or_else(nobody)?;
        let as_imds = |eni: &EniInfo| EniView {
            subnet_cidr: self.state.subnets.get(&eni.subnet).map(|subnet| subnet.cidr),
            attachment: None,
            status: EniStatus::Attached,
            description: String::new(),
            tags: BTreeMap::new(),
            kind: EniKind::Interface,
            ..view_of(eni)
        };
        let vpc = self.state.vpcs.get(&info.vpc);
        let v4 = vpc.iter().flat_map(|vpc| &vpc.cidrs).map(|association| IpNet::from(association.cidr));
        let vpc_cidrs = v4.chain(vpc.and_then(|vpc| vpc.ipv6).map(IpNet::from)).collect();
        Ok(Metadata {
            instance: id.clone(),
            instance_type: info.instance_type,
            region: self.state.options.region.clone(),
            availability_zone: info.availability_zone,
            primary_mac,
            primary_ipv4,
            vpc_cidrs,
            vpc: info.vpc,
            enis: seen.iter().map(|(eni, _, _)| as_imds(eni)).collect(),
            terminating,
        })
    }
}

type Reply = Result<(CloudReply, Option<String>), ApiError>;

fn carry_out(state: &mut State, call: &Call<'_>, request: &CloudRequest, page: &PageAsked<'_>) -> Reply {
    let now = call.now;
    let reply = match request {
        CloudRequest::ReadMetadata => return Err(ApiError::new("InvalidAction", "IMDS is not an EC2 action")),
        CloudRequest::DescribeNode { instance } => {
            let (enis, token) = describe(state, call, page, |eni| eni.is_on(instance))?;
            return Ok((CloudReply::Enis(enis), token));
        }
        CloudRequest::DescribeUnattached { vpc, tags } => {
            let wanted = |eni: &EniInfo| {
                eni.status == Life::Available
                    && eni.vpc == *vpc
                    && eni.tags.contains_key("node.k8s.amazonaws.com/instance_id")
                    && tags.iter().all(|(key, value)| eni.tags.get(key) == Some(value))
            };
            let (enis, token) = describe(state, call, page, wanted)?;
            return Ok((CloudReply::Enis(enis), token));
        }
        CloudRequest::DescribeEni { eni } => {
            let (enis, _) = describe(state, call, &PageAsked::default(), |seen| seen.id == *eni)?;
            let view = enis.into_iter().next().ok_or_else(|| crate::error::Kind::Interface.not_found(eni))?;
            CloudReply::Eni(view)
        }
        CloudRequest::DescribeSubnets { vpc, availability_zone } => {
            let here = state.subnets.values().filter(|s| s.vpc == *vpc && s.zone.name == *availability_zone);
            let views = here.map(|subnet| SubnetView {
                id: subnet.id.clone(),
                cidr: subnet.cidr,
                free_addresses: subnet.pool.available(),
                tags: subnet.tags.clone(),
            });
            let page = Page::of(call.action, page.size, page.token)?;
            let (views, token) = page.cut(call.action, views.collect(), |view| view.id.to_string());
            return Ok((CloudReply::Subnets(views), token));
        }
        CloudRequest::DescribeInstanceType { instance_type } => {
            let known = limits::lookup(instance_type).ok_or_else(|| {
                let text = format!("The following supplied instance types do not exist: [{instance_type}]");
                ApiError::new("InvalidInstanceType", text)
            })?;
            CloudReply::InstanceType(known.limits())
        }
        CloudRequest::CreateEni { subnet, security_groups, want, ipv6_prefix, description, tags, client_token } => {
            if !tags.is_empty() {
                call.permit("CreateTags")?;
            }
            check_tags(tags)?;
            let new = NewEni {
                subnet: subnet.clone(),
                groups: security_groups.clone(),
                description: description.clone(),
                primary: None,
                wanted: Wanted { ipv6: one_prefix(*ipv6_prefix), ..wanted(*want) },
                tags: tags.clone(),
                interface_type: "interface".to_owned(),
            };
            let fingerprint = format!("{new:?}");
            let known = state.recall(call.action, Some(client_token), &fingerprint)?;
            let id = match known.and_then(|ids| EniId::new(ids.first()?.as_str()).ok()) {
                Some(id) => id,
                None => {
                    let id = state.create_eni(now, new)?;
                    state.remember(call.action, Some(client_token), fingerprint, vec![id.to_string()]);
                    id
                }
            };
            CloudReply::Created(view_of(state.eni(&id)?))
        }
        CloudRequest::AttachEni { eni, instance, device, card } => {
            CloudReply::Attached { attachment: state.attach(now, eni, instance, *device, *card)? }
        }
        CloudRequest::SetDeleteOnTermination { eni, attachment } => {
            state.eni(eni)?;
            state.set_delete_on_termination(now, eni, attachment, true)?;
            CloudReply::Done
        }
        CloudRequest::SetSecurityGroups { eni, security_groups } => {
            state.eni(eni)?;
            state.set_groups(now, eni, security_groups)?;
            CloudReply::Done
        }
        CloudRequest::Assign { eni, want } => assigned(state, now, eni, &wanted(*want))?,
        CloudRequest::AssignNamed { eni, slots } => {
            let (addresses, prefixes) = split(slots);
            if !addresses.is_empty() && !prefixes.is_empty() {
                return Err(ApiError::combination("Private addresses and IPv4 prefixes exclude each other."));
            }
            assigned(state, now, eni, &Wanted { addresses, prefixes, ..Wanted::default() })?
        }
        CloudRequest::AssignIpv6Prefix { eni, prefix } => {
            let wanted = match prefix {
                Some(prefix) => Wanted6 { prefixes: vec![*prefix], ..Wanted6::default() },
                None => one_prefix(true),
            };
            let taken = state.assign_ipv6(now, eni, &wanted)?;
            CloudReply::Assigned(taken.prefixes.into_iter().map(IpNet::V6).collect())
        }
        CloudRequest::Unassign { eni, slots } => {
            let (addresses, prefixes) = split(slots);
            state.unassign(now, eni, &addresses, &prefixes)?;
            CloudReply::Done
        }
        CloudRequest::DetachEni { attachment, .. } => {
            state.detach(now, attachment, false)?;
            CloudReply::Done
        }
        CloudRequest::DeleteEni { eni } => {
            state.delete_eni(now, eni)?;
            CloudReply::Done
        }
        CloudRequest::TagEni { eni, tags } => {
            check_tags(tags)?;
            state.change_tags(now, &[eni.as_str()], |old| old.extend(tags.clone()))?;
            CloudReply::Done
        }
    };
    Ok((reply, None))
}

fn describe(
    state: &State,
    call: &Call<'_>,
    page: &PageAsked<'_>,
    wanted: impl Fn(&EniInfo) -> bool,
) -> Result<(Vec<EniView>, Option<String>), ApiError> {
    let page = Page::of(call.action, page.size, page.token)?;
    let found = visible(state, call.now).into_iter().filter(|eni| wanted(eni)).collect();
    let (found, token) = page.cut(call.action, found, |eni| eni.id.to_string());
    Ok((found.iter().map(|eni| view_of(eni)).collect(), token))
}

fn assigned(state: &mut State, now: Time, eni: &EniId, wanted: &Wanted) -> Result<CloudReply, ApiError> {
    let taken = state.assign(now, eni, wanted, false)?;
    let addresses = taken.addresses.into_iter().map(|address| IpNet::V4(Ipv4Net::from(address)));
    Ok(CloudReply::Assigned(addresses.chain(taken.prefixes.into_iter().map(IpNet::V4)).collect()))
}

fn wanted(want: Want) -> Wanted {
    match want {
        Want::Addresses(count) => Wanted { count, ..Wanted::default() },
        Want::Prefixes(prefix_count) => Wanted { prefix_count, ..Wanted::default() },
    }
}

fn one_prefix(wanted: bool) -> Wanted6 {
    Wanted6 { prefix_count: u32::from(wanted), ..Wanted6::default() }
}

fn split(slots: &BTreeSet<IpNet>) -> (Vec<Ipv4Addr>, Vec<Ipv4Net>) {
    let v4 = slots.iter().filter_map(|slot| if let IpNet::V4(net) = slot { Some(*net) } else { None });
    let (single, prefixes): (Vec<Ipv4Net>, Vec<Ipv4Net>) = v4.partition(|net| net.prefix_len() == 32);
    (single.iter().map(Ipv4Net::addr).collect(), prefixes)
}

fn check_tags(tags: &Tags) -> Result<(), ApiError> {
    tags.iter().try_for_each(|(key, value)| crate::state::tags::check(key, value))
}

/// An ENI as DescribeNetworkInterfaces shows it.
fn view_of(eni: &EniInfo) -> EniView {
    let attachment = eni.attachment.as_ref();
    let addresses = eni.secondary.iter().map(|address| IpNet::V4(Ipv4Net::from(*address)));
    EniView {
        id: eni.id.clone(),
        mac: eni.mac,
        device: attachment.map_or(DeviceIndex(0), |a| a.device),
        card: attachment.map_or(0, |a| a.card),
        subnet: eni.subnet.clone(),
        subnet_cidr: None,
        primary_ipv4: eni.primary_ipv4,
        slots: addresses
            .chain(eni.prefixes.iter().copied().map(IpNet::V4))
            .chain(eni.ipv6_prefixes.iter().copied().map(IpNet::V6))
            .collect(),
        security_groups: eni.security_groups.clone(),
        attachment: attachment.map(|a| a.id.clone()),
        status: match attachment.map(|a| a.state) {
            Some(AttachmentState::Attaching) => EniStatus::Attaching,
            Some(AttachmentState::Attached) => EniStatus::Attached,
            Some(AttachmentState::Detaching) => EniStatus::Detaching,
            None => EniStatus::Available,
        },
        description: eni.description.clone(),
        tags: eni.tags.clone(),
        kind: match eni.interface_type.as_str() {
            "interface" => EniKind::Interface,
            "trunk" => EniKind::Trunk,
            "efa" | "efa-only" => EniKind::Efa,
            _ => EniKind::Other,
        },
    }
}
