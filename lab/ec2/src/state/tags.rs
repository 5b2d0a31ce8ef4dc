//! Tags of every object that has some.

use flatwire_core::ids::{EniId, InstanceId, SecurityGroupId, SubnetId, Time, VpcId};

use super::State;
use crate::error::{ApiError, Kind};
use crate::view::Tags;

const TAGS_MAX: usize = 50;
const KEY_MAX: usize = 127;
const VALUE_MAX: usize = 255;

/// Refuses keys and values that EC2 refuses.
pub(crate) fn check(key: &str, value: &str) -> Result<(), ApiError> {
    if key.is_empty() || key.chars().count() > KEY_MAX {
        return Err(ApiError::value(format!(
            "Tag key exceeds the maximum length of {KEY_MAX} characters or is empty: '{key}'"
        )));
    }
    if value.chars().count() > VALUE_MAX {
        return Err(ApiError::value(format!("Tag value exceeds the maximum length of {VALUE_MAX} characters")));
    }
    let lower = key.to_ascii_lowercase();
    if lower.starts_with("aws:") {
        return Err(ApiError::value(format!("Tag keys starting with 'aws:' are reserved for internal use: '{key}'")));
    }
    Ok(())
}

impl State {
    /// Every resource that has tags, with its type as EC2 names it.
    pub(crate) fn all_tags(&self) -> Vec<(String, &'static str, &Tags)> {
        let mut all: Vec<(String, &'static str, &Tags)> = Vec::new();
        all.extend(self.vpcs.values().map(|x| (x.id.to_string(), "vpc", &x.tags)));
        all.extend(self.subnets.values().map(|x| (x.id.to_string(), "subnet", &x.tags)));
        all.extend(self.groups.values().map(|x| (x.id.to_string(), "security-group", &x.tags)));
        all.extend(self.enis().values().map(|x| (x.id.to_string(), "network-interface", &x.tags)));
        all.extend(self.instances.values().map(|x| (x.info.id.to_string(), "instance", &x.info.tags)));
        all.extend(self.gateways.values().map(|x| (x.id.clone(), "internet-gateway", &x.tags)));
        all.extend(self.peerings.values().map(|x| (x.id.clone(), "vpc-peering-connection", &x.tags)));
        all.extend(self.addresses.values().filter_map(|x| Some((x.allocation.clone()?, "elastic-ip", &x.tags))));
        let reservations = self.subnets.values().flat_map(|subnet| subnet.reservations.values());
        all.extend(reservations.map(|x| (x.id.clone(), "subnet-cidr-reservation", &x.tags)));
        all.sort();
        all
    }

    fn tags_of(&self, id: &str) -> Result<Tags, ApiError> {
        let found = self.all_tags().into_iter().find(|(known, _, _)| known == id);
        found.map(|(_, _, tags)| tags.clone()).ok_or_else(|| unknown_resource(id))
    }

    /// Changes the tags of several resources: all of them or none.
    pub(crate) fn change_tags(&mut self, now: Time, ids: &[&str], change: impl Fn(&mut Tags)) -> Result<(), ApiError> {
        let mut changed = Vec::new();
        for id in ids {
            let mut tags = self.tags_of(id)?;
            change(&mut tags);
            if tags.len() > TAGS_MAX {
                return Err(ApiError::new(
                    "TagLimitExceeded",
                    format!("The maximum number of Tags for a resource has been reached: {TAGS_MAX}"),
                ));
            }
            changed.push((*id, tags));
        }
        for (id, tags) in changed {
            self.set_tags(now, id, tags);
        }
        self.changed();
        Ok(())
    }

    fn set_tags(&mut self, now: Time, id: &str, tags: Tags) {
        if let Ok(eni) = EniId::new(id)
            && self.enis().contains_key(&eni)
        {
            return self.change_eni(now, &eni, |eni| eni.tags = tags);
        }
        let slot = self.slot_of(id);
        if let Some(slot) = slot {
            *slot = tags;
        }
    }

    fn slot_of(&mut self, id: &str) -> Option<&mut Tags> {
        let kind = id.split('-').next().unwrap_or("");
        match kind {
            "vpc" => self.vpcs.get_mut(&VpcId::new(id).ok()?).map(|x| &mut x.tags),
            "subnet" => self.subnets.get_mut(&SubnetId::new(id).ok()?).map(|x| &mut x.tags),
            "sg" => self.groups.get_mut(&SecurityGroupId::new(id).ok()?).map(|x| &mut x.tags),
            "i" => self.instances.get_mut(&InstanceId::new(id).ok()?).map(|x| &mut x.info.tags),
            "igw" => self.gateways.get_mut(id).map(|x| &mut x.tags),
            "pcx" => self.peerings.get_mut(id).map(|x| &mut x.tags),
            "eipalloc" => {
                self.addresses.values_mut().find(|x| x.allocation.as_deref() == Some(id)).map(|x| &mut x.tags)
            }
            "scr" => self.subnets.values_mut().find_map(|subnet| subnet.reservations.get_mut(id)).map(|x| &mut x.tags),
            _ => None,
        }
    }
}

/// An id that names nothing: not found if its kind is known, else malformed in EC2's general words.
fn unknown_resource(id: &str) -> ApiError {
    let kinds = [
        Kind::Vpc,
        Kind::Subnet,
        Kind::Interface,
        Kind::Instance,
        Kind::Group,
        Kind::Gateway,
        Kind::Peering,
        Kind::Allocation,
        Kind::Reservation,
    ];
    match kinds.into_iter().find(|kind| id.starts_with(kind.prefix())) {
        Some(kind) => kind.check(id).err().unwrap_or_else(|| kind.not_found(id)),
        None => ApiError::new("InvalidID", format!("The ID '{id}' is not valid")),
    }
}
