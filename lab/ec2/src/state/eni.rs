//! Network interfaces: their addresses, their life, and how they hang on instances.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use flatwire_core::ids::{AttachmentId, DeviceIndex, EniId, InstanceId, MacAddress, SecurityGroupId, SubnetId, Time};
use flatwire_core::limits;
use ipnet::Ipv4Net;

use super::ipv6::Wanted6;
use super::pool::{AddressPool, PREFIX_LEN, PREFIX_SIZE, Refused};
use super::{State, Transition};
use crate::error::{ApiError, Kind};
use crate::view::{AttachmentInfo, AttachmentState, EniInfo, EniStatus, InstanceState, Tags};

/// Security groups an ENI may be in.
const GROUPS_MAX: usize = 5;
/// IPv4 slots of an ENI that hangs on no instance: as many as the largest type gives.
const DETACHED_SLOTS_MAX: u32 = 64;

/// What an ENI is to hold besides its primary address. At most one of the first four is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) addresses: Vec<Ipv4Addr>,
    pub(crate) count: u32,
    pub(crate) prefixes: Vec<Ipv4Net>,
    pub(crate) prefix_count: u32,
    pub(crate) ipv6: Wanted6,
}

impl Wanted {
    fn slots(&self) -> u32 {
        let named = u32::try_from(self.addresses.len() + self.prefixes.len()).unwrap_or(u32::MAX);
        named.saturating_add(self.count).saturating_add(self.prefix_count)
    }

    fn wants_prefixes(&self) -> bool {
        self.prefix_count > 0 || !self.prefixes.is_empty()
    }
}

/// What was taken from the subnet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) addresses: BTreeSet<Ipv4Addr>,
    pub(crate) prefixes: BTreeSet<Ipv4Net>,
}

/// The words for an address that is taken, and for a subnet that is full, depend on the action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Create,
    Assign,
}

#[derive(Debug, Clone)]
pub(crate) struct NewEni {
    pub(crate) subnet: SubnetId,
    pub(crate) groups: Vec<SecurityGroupId>,
    pub(crate) description: String,
    pub(crate) primary: Option<Ipv4Addr>,
    pub(crate) wanted: Wanted,
    pub(crate) tags: Tags,
    pub(crate) interface_type: String,
}

impl State {
    pub(crate) fn create_eni(&mut self, now: Time, new: NewEni) -> Result<EniId, ApiError> {
        let subnet = self.subnet(&new.subnet)?;
        let (vpc, zone) = (subnet.vpc.clone(), subnet.zone.name.clone());
        let groups = self.groups_for(&new.subnet, &new.groups)?;
        if !self.eni_limit_left() {
            return Err(ApiError::new(
                "NetworkInterfaceLimitExceeded",
                "You have reached the maximum number of network interfaces that you can create.",
            ));
        }
        if 1 + new.wanted.slots() > DETACHED_SLOTS_MAX {
            return Err(too_many_addresses());
        }
        let mut pool = subnet.pool.clone();
        let primary = match new.primary {
            Some(address) => {
                pool.take(address).map_err(|refused| refused_address(refused, address, On::Create))?;
                address
            }
            None => pool.pick(&mut self.rng).ok_or_else(ApiError::subnet_empty)?,
        };
        let taken = self.take(&mut pool, &new.wanted, On::Create)?;
        let ipv6 = self.take_ipv6(&new.subnet, &new.wanted.ipv6)?;
        self.put_pool(&new.subnet, pool);
        let id = EniId::new(self.fresh_id(Kind::Interface)).expect("invariant: fresh ids are well formed");
        let eni = EniInfo {
            id: id.clone(),
            mac: self.fresh_mac(),
            vpc,
            subnet: new.subnet,
            availability_zone: zone,
            primary_ipv4: primary,
            secondary: taken.addresses,
            prefixes: taken.prefixes,
            ipv6: ipv6.addresses,
            ipv6_prefixes: ipv6.prefixes,
            public: Default::default(),
            security_groups: groups,
            source_dest_check: true,
            tags: new.tags,
            description: new.description,
            status: EniStatus::Pending,
            attachment: None,
            interface_type: new.interface_type,
            created_at: now,
        };
        self.put_eni(now, eni);
        let ready = now.plus_ms(self.options.delays.eni_pending_ms);
        self.later(ready, Transition::EniAvailable(id.clone()));
        Ok(id)
    }

    /// Takes what is wanted out of `pool`, which is a copy: on an error it is dropped and nothing has happened.
    fn take(&mut self, pool: &mut AddressPool, wanted: &Wanted, on: On) -> Result<Taken, ApiError> {
        let mut taken = Taken::default();
        for address in &wanted.addresses {
            pool.take(*address).map_err(|refused| refused_address(refused, *address, on))?;
            taken.addresses.insert(*address);
        }
        for prefix in &wanted.prefixes {
            check_prefix(*prefix)?;
            pool.take_prefix(*prefix).map_err(|refused| refused_address(refused, prefix.network(), on))?;
            taken.prefixes.insert(*prefix);
        }
        if pool.available() < wanted.count {
            return Err(ApiError::subnet_empty());
        }
        for _ in 0..wanted.count {
            taken.addresses.insert(pool.pick(&mut self.rng).ok_or_else(ApiError::subnet_empty)?);
        }
        let enough = pool.free() / PREFIX_SIZE >= wanted.prefix_count;
        for _ in 0..wanted.prefix_count {
            let prefix = pool.pick_prefix(&mut self.rng).ok_or_else(|| match on {
                // Free addresses, but in no free block of sixteen.
                _ if enough => ApiError::fragmented(),
                On::Create => ApiError::subnet_empty(),
                On::Assign => ApiError::value("There aren't sufficient free Ipv4 addresses or prefixes"),
            })?;
            taken.prefixes.insert(prefix);
        }
        Ok(taken)
    }

    fn put_pool(&mut self, subnet: &SubnetId, pool: AddressPool) {
        if let Some(subnet) = self.subnets.get_mut(subnet) {
            subnet.pool = pool;
        }
    }

    /// AssignPrivateIpAddresses: what is new, and only that.
    pub(crate) fn assign(
        &mut self,
        now: Time,
        id: &EniId,
        wanted: &Wanted,
        allow_reassignment: bool,
    ) -> Result<Taken, ApiError> {
        let eni = self.eni(id)?.clone();
        let subnet = self.subnet(&eni.subnet)?;
        let mut wanted = wanted.clone();
        let mut moves: Vec<(EniId, Ipv4Addr)> = Vec::new();
        let mut refused: Vec<String> = Vec::new();
        for address in wanted.addresses.clone() {
            let Some(holder) = self.enis().values().find(|e| e.subnet == eni.subnet && e.holds(address)) else {
                continue;
            };
            if !allow_reassignment || holder.prefixes.iter().any(|p| p.contains(&address)) {
                refused.push(address.to_string());
            } else if holder.id != *id && holder.primary_ipv4 == address {
                // EC2's own words for the primary address of another ENI.
                return Err(ApiError::value("secondary-addresses"));
            } else if holder.id != *id {
                moves.push((holder.id.clone(), address));
            } else {
                // It is here already.
                wanted.addresses.retain(|other| *other != address);
            }
        }
        if !refused.is_empty() {
            let list = refused.join(", ");
            return Err(ApiError::value(format!("[{list}] assigned, but move is not allowed.")));
        }
        let limit = self.slots_of(&eni, wanted.wants_prefixes())?;
        if eni.slots().saturating_add(wanted.slots()) > limit {
            return Err(too_many_addresses());
        }
        let mut pool = subnet.pool.clone();
        for (_, address) in &moves {
            pool.give(*address);
        }
        let taken = self.take(&mut pool, &wanted, On::Assign)?;
        self.put_pool(&eni.subnet, pool);
        for (from, address) in moves {
            self.drop_public(now, &from, address);
            self.change_eni(now, &from, |eni| {
                eni.secondary.remove(&address);
            });
        }
        self.change_eni(now, id, |eni| {
            eni.secondary.extend(&taken.addresses);
            eni.prefixes.extend(&taken.prefixes);
        });
        Ok(taken)
    }

    /// UnassignPrivateIpAddresses: all of it or nothing.
    pub(crate) fn unassign(
        &mut self,
        now: Time,
        id: &EniId,
        addresses: &[Ipv4Addr],
        prefixes: &[Ipv4Net],
    ) -> Result<(), ApiError> {
        let eni = self.eni(id)?;
        if addresses.contains(&eni.primary_ipv4) {
            return Err(ApiError::value(format!(
                "The primary private IP address {} of interface {id} cannot be unassigned.",
                eni.primary_ipv4
            )));
        }
        let all_here =
            addresses.iter().all(|a| eni.secondary.contains(a)) && prefixes.iter().all(|p| eni.prefixes.contains(p));
        if !all_here {
            return Err(ApiError::value(format!("Some of the specified addresses are not assigned to interface {id}")));
        }
        let subnet = eni.subnet.clone();
        let in_prefixes = eni.public.keys().copied().filter(|a| prefixes.iter().any(|p| p.contains(a)));
        let mapped: Vec<Ipv4Addr> = in_prefixes.chain(addresses.iter().copied()).collect();
        for address in mapped {
            self.drop_public(now, id, address);
        }
        if let Some(subnet) = self.subnets.get_mut(&subnet) {
            addresses.iter().for_each(|a| subnet.pool.give(*a));
            prefixes.iter().for_each(|p| subnet.pool.give_prefix(*p));
        }
        self.change_eni(now, id, |eni| {
            eni.secondary.retain(|a| !addresses.contains(a));
            eni.prefixes.retain(|p| !prefixes.contains(p));
        });
        Ok(())
    }

    /// AttachNetworkInterface, with the refusals in the order in which EC2 finds them.
    pub(crate) fn attach(
        &mut self,
        now: Time,
        id: &EniId,
        instance: &InstanceId,
        device: DeviceIndex,
        card: u32,
    ) -> Result<AttachmentId, ApiError> {
        let eni = self.eni(id)?;
        let host = self.instance(instance)?;
        match host.info.state {
            InstanceState::Running => {}
            InstanceState::Pending | InstanceState::ShuttingDown | InstanceState::Terminated => {
                return Err(ApiError::state(format!(
                    "Instance '{instance}' is not 'running' or 'stopped'; it is '{}'.",
                    host.info.state
                )));
            }
        }
        if eni.attachment.is_some() {
            return Err(ApiError::new("InvalidNetworkInterface.InUse", format!("Interface: [{id}] in use.")));
        }
        if eni.availability_zone != host.info.availability_zone {
            return Err(ApiError::combination(format!(
                "You may not attach a network interface to an instance if they are not in the same availability zone \
                 ('{}' and '{}').",
                eni.availability_zone, host.info.availability_zone
            )));
        }
        let kind = limits::lookup(&host.info.instance_type).ok_or_else(ApiError::internal)?;
        let on_card = usize::try_from(card).ok().and_then(|card| kind.cards.get(card)).copied();
        let Some(limit) = on_card else {
            return Err(ApiError::value(format!(
                "Network card index {card} is not valid for instance type {}.",
                kind.name
            )));
        };
        let attached =
            || self.enis().values().filter_map(|e| e.attachment.as_ref()).filter(|a| a.instance == *instance);
        if attached().any(|a| a.card == card && a.device == device) {
            return Err(ApiError::value(format!(
                "Instance '{instance}' already has an interface attached at device index '{device}'."
            )));
        }
        let count = u32::try_from(attached().filter(|a| a.card == card).count()).unwrap_or(u32::MAX) + 1;
        if count > limit {
            return Err(ApiError::new(
                "AttachmentLimitExceeded",
                format!("Interface count {count} exceeds the limit for {}", kind.name),
            ));
        }
        if eni.slots() > kind.ipv4_per_eni {
            return Err(ApiError::new(
                "InvalidInterface.IpAddressLimitExceeded",
                format!("The interface {id} has more private addresses than {} permits.", kind.name),
            ));
        }
        if !eni.prefixes.is_empty() && !kind.takes_prefixes() {
            return Err(no_prefixes(kind.name));
        }
        Ok(self.hang(
            now,
            id,
            instance,
            device,
            card,
            false,
            self.options.delays.attach_ms,
            self.options.delays.link_ms,
        ))
    }

    /// Ties an ENI to an instance; everything has been checked.
    #[expect(clippy::too_many_arguments, reason = "one place that writes every field of an attachment")]
    pub(crate) fn hang(
        &mut self,
        now: Time,
        id: &EniId,
        instance: &InstanceId,
        device: DeviceIndex,
        card: u32,
        delete_on_termination: bool,
        attach_ms: u64,
        link_ms: u64,
    ) -> AttachmentId {
        let attachment =
            AttachmentId::new(self.fresh_id(Kind::Attachment)).expect("invariant: fresh ids are well formed");
        let link_at = now.plus_ms(link_ms);
        let info = AttachmentInfo {
            id: attachment.clone(),
            instance: instance.clone(),
            device,
            card,
            state: AttachmentState::Attaching,
            delete_on_termination,
            attached_at: now,
            link_at,
        };
        self.change_eni(now, id, |eni| {
            eni.status = EniStatus::InUse;
            eni.attachment = Some(info);
        });
        self.later(now.plus_ms(attach_ms), Transition::Attached(id.clone(), attachment.clone()));
        self.later(link_at, Transition::LinkUp(id.clone(), attachment.clone()));
        attachment
    }

    pub(crate) fn detach(&mut self, now: Time, attachment: &AttachmentId, force: bool) -> Result<(), ApiError> {
        let found = self.enis().values().find_map(|eni| {
            let a = eni.attachment.as_ref().filter(|a| a.id == *attachment)?;
            Some((eni.id.clone(), a.clone()))
        });
        let Some((id, info)) = found else { return Err(Kind::Attachment.not_found(attachment)) };
        if info.device == DeviceIndex::PRIMARY && info.card == 0 {
            return Err(ApiError::new(
                "OperationNotPermitted",
                "The network interface at device index 0 and networkCard index 0 cannot be detached.",
            ));
        }
        match info.state {
            AttachmentState::Attached => {}
            AttachmentState::Attaching if force => {}
            AttachmentState::Attaching | AttachmentState::Detaching => {
                return Err(ApiError::state(format!("The attachment '{attachment}' is {}.", info.state)));
            }
        }
        self.change_eni(now, &id, |eni| {
            if let Some(a) = eni.attachment.as_mut() {
                a.state = AttachmentState::Detaching;
            }
        });
        let due = now.plus_ms(if force { 0 } else { self.options.delays.detach_ms });
        self.later(due, Transition::Detached(id, attachment.clone()));
        Ok(())
    }

    pub(crate) fn delete_eni(&mut self, now: Time, id: &EniId) -> Result<(), ApiError> {
        if self.eni(id)?.attachment.is_some() {
            return Err(ApiError::value(format!("Network interface '{id}' is currently in use.")));
        }
        self.drop_eni(now, id);
        Ok(())
    }

    /// Removes an ENI whatever its state, and gives its addresses back.
    pub(crate) fn drop_eni(&mut self, now: Time, id: &EniId) {
        let public: Vec<Ipv4Addr> =
            self.enis().get(id).map(|eni| eni.public.keys().copied().collect()).unwrap_or_default();
        for address in public {
            self.drop_public(now, id, address);
        }
        let Some(eni) = self.remove_eni(now, id) else { return };
        if let Some(subnet) = self.subnets.get_mut(&eni.subnet) {
            subnet.pool.give(eni.primary_ipv4);
            eni.secondary.iter().for_each(|a| subnet.pool.give(*a));
            eni.prefixes.iter().for_each(|p| subnet.pool.give_prefix(*p));
        }
    }

    pub(crate) fn set_groups(&mut self, now: Time, id: &EniId, groups: &[SecurityGroupId]) -> Result<(), ApiError> {
        let subnet = self.eni(id)?.subnet.clone();
        let groups = self.groups_for(&subnet, groups)?;
        self.change_eni(now, id, |eni| eni.security_groups = groups);
        Ok(())
    }

    pub(crate) fn set_delete_on_termination(
        &mut self,
        now: Time,
        id: &EniId,
        attachment: &AttachmentId,
        value: bool,
    ) -> Result<(), ApiError> {
        if self.eni(id)?.attachment.as_ref().is_none_or(|a| a.id != *attachment) {
            return Err(Kind::Attachment.not_found(attachment));
        }
        self.change_eni(now, id, |eni| {
            if let Some(a) = eni.attachment.as_mut() {
                a.delete_on_termination = value;
            }
        });
        Ok(())
    }

    /// The groups of an ENI in this subnet: those named, or the VPC's default group.
    fn groups_for(&self, subnet: &SubnetId, named: &[SecurityGroupId]) -> Result<Vec<SecurityGroupId>, ApiError> {
        let vpc = &self.subnet(subnet)?.vpc;
        if named.is_empty() {
            return Ok(vec![self.vpc(vpc)?.default_group.clone()]);
        }
        if named.len() > GROUPS_MAX {
            return Err(ApiError::new(
                "SecurityGroupsPerInterfaceLimitExceeded",
                format!("The maximum number of security groups per interface is {GROUPS_MAX}."),
            ));
        }
        for id in named {
            let group = self.group(id)?;
            if group.vpc != *vpc {
                return Err(ApiError::new(
                    "InvalidParameter",
                    format!("Security group {id} and subnet {subnet} belong to different networks."),
                ));
            }
        }
        Ok(named.to_vec())
    }

    /// IPv4 slots this ENI may have; refuses prefixes where the type takes none.
    fn slots_of(&self, eni: &EniInfo, prefixes: bool) -> Result<u32, ApiError> {
        let Some(attachment) = &eni.attachment else { return Ok(DETACHED_SLOTS_MAX) };
        let host = self.instance(&attachment.instance)?;
        let kind = limits::lookup(&host.info.instance_type).ok_or_else(ApiError::internal)?;
        if prefixes && !kind.takes_prefixes() {
            return Err(no_prefixes(kind.name));
        }
        Ok(kind.ipv4_per_eni)
    }

    fn fresh_mac(&mut self) -> MacAddress {
        loop {
            let [.., a, b, c, d, e, kind] = self.rng.next().to_be_bytes();
            let mac = MacAddress([if kind < 128 { 0x02 } else { 0x0e }, a, b, c, d, e]);
            if self.enis().values().all(|eni| eni.mac != mac) {
                return mac;
            }
        }
    }
}

pub(crate) fn too_many_addresses() -> ApiError {
    ApiError::new("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit.")
}

pub(crate) fn no_prefixes(instance_type: &str) -> ApiError {
    ApiError::new(
        "Unsupported",
        format!("The instance type {instance_type} does not support prefixes on its network interfaces."),
    )
}

fn check_prefix(prefix: Ipv4Net) -> Result<(), ApiError> {
    if prefix.prefix_len() == PREFIX_LEN && prefix.trunc() == prefix {
        return Ok(());
    }
    Err(ApiError::value(format!("The prefix {prefix} is not valid: it must be an aligned /{PREFIX_LEN}.")))
}

fn refused_address(refused: Refused, address: Ipv4Addr, on: On) -> ApiError {
    match (refused, on) {
        (Refused::Outside, _) => {
            ApiError::value(format!("Address {address} does not fall within the subnet's address range"))
        }
        (Refused::Reserved, _) => ApiError::value(format!("Address {address} is in subnet's reserved address range")),
        (Refused::Taken, On::Create) => {
            ApiError::new("InvalidIPAddress.InUse", format!("Address {address} is already in use"))
        }
        (Refused::Taken, On::Assign) => ApiError::value(format!("[{address}] assigned, but move is not allowed.")),
    }
}
