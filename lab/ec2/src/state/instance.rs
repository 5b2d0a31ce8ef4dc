//! Instances: launch with their interfaces, termination, and what becomes of the interfaces.

use std::net::Ipv4Addr;

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, SecurityGroupId, SubnetId, Time};
use flatwire_core::limits::{self, InstanceType};

use super::eni::{NewEni, Wanted, no_prefixes, too_many_addresses};
use super::{State, TERMINATED_VISIBLE_MS, Transition};
use crate::error::{ApiError, Kind};
use crate::view::{Ending, EniStatus, InstanceInfo, InstanceState, Tags};

#[derive(Debug, Clone)]
pub(crate) struct Instance {
    pub(crate) info: InstanceInfo,
    pub(crate) reservation: String,
    pub(crate) launch_index: u32,
    pub(crate) client_token: Option<String>,
    pub(crate) key_name: Option<String>,
    /// `HttpTokens` is `required`.
    pub(crate) tokens_required: bool,
    /// Announced, and not carried out by itself.
    pub(crate) ending: Option<(Ending, Time)>,
}

/// One launch, with all its interfaces spelt out.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) image: String,
    pub(crate) instance_type: String,
    pub(crate) min: u32,
    pub(crate) max: u32,
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) tags: Tags,
    pub(crate) eni_tags: Tags,
    pub(crate) hop_limit: u32,
    pub(crate) tokens_required: bool,
    pub(crate) role: Option<String>,
    pub(crate) client_token: Option<String>,
    pub(crate) key_name: Option<String>,
    pub(crate) user_data: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Interface {
    pub(crate) device: DeviceIndex,
    pub(crate) card: u32,
    /// An ENI that exists, instead of a new one.
    pub(crate) existing: Option<EniId>,
    pub(crate) subnet: Option<SubnetId>,
    pub(crate) groups: Vec<SecurityGroupId>,
    pub(crate) description: String,
    pub(crate) primary: Option<Ipv4Addr>,
    pub(crate) wanted: Wanted,
    /// `None` leaves it to the subnet.
    pub(crate) public: Option<bool>,
    pub(crate) delete_on_termination: bool,
    pub(crate) interface_type: String,
}

impl State {
    pub(crate) fn instance(&self, id: &InstanceId) -> Result<&Instance, ApiError> {
        self.instances.get(id).ok_or_else(|| Kind::Instance.not_found(id))
    }

    /// RunInstances: as many as fit between min and max, or none.
    pub(crate) fn launch(&mut self, now: Time, launch: &Launch) -> Result<Vec<InstanceId>, ApiError> {
        let kind = limits::lookup(&launch.instance_type)
            .ok_or_else(|| ApiError::value(format!("Invalid value '{}' for InstanceType.", launch.instance_type)))?;
        check_interfaces(kind, launch)?;
        let reservation = format!("r-{}", self.rng.hex17());
        let mut launched = Vec::new();
        for index in 0..launch.max {
            match self.launch_one(now, launch, &reservation, index) {
                Ok(id) => launched.push(id),
                Err(_) if index >= launch.min => break,
                Err(error) => {
                    for id in launched {
                        self.undo_launch(now, &id);
                    }
                    return Err(error);
                }
            }
        }
        Ok(launched)
    }

    fn launch_one(
        &mut self,
        now: Time,
        launch: &Launch,
        reservation: &str,
        index: u32,
    ) -> Result<InstanceId, ApiError> {
        let id = InstanceId::new(self.fresh_id(Kind::Instance)).expect("invariant: fresh ids are well formed");
        let mut made: Vec<(EniId, &Interface)> = Vec::new();
        for interface in &launch.interfaces {
            match self.interface_for(now, launch, interface) {
                Ok(eni) => made.push((eni, interface)),
                Err(error) => {
                    for (eni, interface) in made {
                        if interface.existing.is_none() {
                            self.drop_eni(now, &eni);
                        }
                    }
                    return Err(error);
                }
            }
        }
        let primary = made.iter().find(|(_, i)| i.device == DeviceIndex::PRIMARY && i.card == 0);
        let Some((primary, _)) = primary else {
            return Err(ApiError::combination("A network interface at device index 0 is required."));
        };
        let eni = self.eni(primary)?.clone();
        let run_ms = self.options.delays.run_ms;
        for (eni, interface) in &made {
            let (device, card, delete) = (interface.device, interface.card, interface.delete_on_termination);
            self.hang(now, eni, &id, device, card, delete, run_ms, run_ms);
            let wants_public = interface.public.unwrap_or_else(|| {
                let subnet = self.eni(eni).ok().and_then(|eni| self.subnets.get(&eni.subnet));
                interface.existing.is_none() && subnet.is_some_and(|subnet| subnet.public_on_launch)
            });
            if wants_public {
                self.auto_public(now, eni);
            }
        }
        let info = InstanceInfo {
            id: id.clone(),
            instance_type: launch.instance_type.clone(),
            state: InstanceState::Pending,
            subnet: eni.subnet,
            vpc: eni.vpc,
            availability_zone: eni.availability_zone,
            image: launch.image.clone(),
            tags: launch.tags.clone(),
            hop_limit: launch.hop_limit,
            role: launch.role.clone(),
            launched_at: now,
            user_data: launch.user_data.clone(),
        };
        let instance = Instance {
            info,
            reservation: reservation.to_owned(),
            launch_index: index,
            client_token: launch.client_token.clone(),
            key_name: launch.key_name.clone(),
            tokens_required: launch.tokens_required,
            ending: None,
        };
        self.instances.insert(id.clone(), instance);
        self.later(now.plus_ms(run_ms), Transition::InstanceRunning(id.clone()));
        self.changed();
        Ok(id)
    }

    fn interface_for(&mut self, now: Time, launch: &Launch, interface: &Interface) -> Result<EniId, ApiError> {
        if let Some(id) = &interface.existing {
            if self.eni(id)?.attachment.is_some() {
                return Err(ApiError::new("InvalidNetworkInterface.InUse", format!("Interface: [{id}] in use.")));
            }
            return Ok(id.clone());
        }
        let Some(subnet) = interface.subnet.clone() else {
            return Err(ApiError::new("VPCIdNotSpecified", "No default VPC for this user."));
        };
        let id = self.create_eni(
            now,
            NewEni {
                subnet,
                groups: interface.groups.clone(),
                description: interface.description.clone(),
                primary: interface.primary,
                wanted: interface.wanted.clone(),
                tags: launch.eni_tags.clone(),
                interface_type: interface.interface_type.clone(),
            },
        )?;
        Ok(id)
    }

    fn undo_launch(&mut self, now: Time, id: &InstanceId) {
        self.release_enis(now, id, true);
        self.instances.remove(id);
        self.changed();
    }

    /// TerminateInstances for one instance: the state before, and after.
    pub(crate) fn terminate(&mut self, now: Time, id: &InstanceId) -> Result<(InstanceState, InstanceState), ApiError> {
        let before = self.instance(id)?.info.state;
        if matches!(before, InstanceState::ShuttingDown | InstanceState::Terminated) {
            return Ok((before, before));
        }
        if let Some(instance) = self.instances.get_mut(id) {
            instance.info.state = InstanceState::ShuttingDown;
        }
        self.later(now.plus_ms(self.options.delays.terminate_ms), Transition::InstanceTerminated(id.clone()));
        self.changed();
        Ok((before, InstanceState::ShuttingDown))
    }

    /// From now on the metadata service tells the instance that it will be taken away.
    pub(crate) fn announce_end(&mut self, now: Time, id: &InstanceId, ending: Ending) -> Result<(), ApiError> {
        let instance = self.instances.get_mut(id).ok_or_else(|| Kind::Instance.not_found(id))?;
        instance.ending = Some((ending, now));
        self.changed();
        Ok(())
    }

    pub(super) fn finish_termination(&mut self, now: Time, id: &InstanceId) {
        let Some(instance) = self.instances.get_mut(id) else { return };
        instance.info.state = InstanceState::Terminated;
        self.release_enis(now, id, false);
        self.later(now.plus_ms(TERMINATED_VISIBLE_MS), Transition::ForgetInstance(id.clone()));
        self.changed();
    }

    /// ENIs with DeleteOnTermination go with the instance, the others are left behind as `available`.
    fn release_enis(&mut self, now: Time, id: &InstanceId, all: bool) {
        let enis: Vec<(EniId, bool)> = self
            .enis()
            .values()
            .filter_map(|eni| {
                let attachment = eni.attachment.as_ref().filter(|a| a.instance == *id)?;
                Some((eni.id.clone(), attachment.delete_on_termination))
            })
            .collect();
        for (eni, delete) in enis {
            if delete || all {
                self.drop_eni(now, &eni);
            } else {
                self.change_eni(now, &eni, |eni| {
                    eni.attachment = None;
                    eni.status = EniStatus::Available;
                });
            }
        }
    }
}

/// What the type does not permit is refused before anything is made.
fn check_interfaces(kind: &InstanceType, launch: &Launch) -> Result<(), ApiError> {
    let mut seen = Vec::new();
    for interface in &launch.interfaces {
        let place = (interface.card, interface.device);
        if seen.contains(&place) {
            return Err(ApiError::combination(format!(
                "Each network interface requires a unique device index; {} is given twice.",
                interface.device
            )));
        }
        seen.push(place);
        let limit = usize::try_from(interface.card).ok().and_then(|card| kind.cards.get(card)).copied().unwrap_or(0);
        let count = seen.iter().filter(|(card, _)| *card == interface.card).count();
        if count > usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(ApiError::new(
                "AttachmentLimitExceeded",
                format!("Interface count {count} exceeds the limit for {}", kind.name),
            ));
        }
        let wanted = &interface.wanted;
        let named = u32::try_from(wanted.addresses.len() + wanted.prefixes.len()).unwrap_or(u32::MAX);
        let slots = named.saturating_add(wanted.count).saturating_add(wanted.prefix_count).saturating_add(1);
        if slots > kind.ipv4_per_eni {
            return Err(too_many_addresses());
        }
        if (wanted.prefix_count > 0 || !wanted.prefixes.is_empty()) && !kind.takes_prefixes() {
            return Err(no_prefixes(kind.name));
        }
    }
    Ok(())
}
