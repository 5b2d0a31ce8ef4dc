//! Public addresses: which stands for which private one. The lab takes them from a documentation range.

use std::net::Ipv4Addr;

use flatwire_core::ids::{EniId, Time};

use super::State;
use crate::error::{ApiError, Kind};
use crate::view::Tags;

/// Public addresses come from 198.51.100.0/24 and 203.0.113.0/24 (RFC 5737): nothing real ever answers there.
const RANGES: [u32; 2] = [0xc633_6400, 0xcb00_7100];

#[derive(Debug, Clone)]
pub(crate) struct PublicAddress {
    pub(crate) public: Ipv4Addr,
    /// `None` for an address that came with the launch and goes with the ENI.
    pub(crate) allocation: Option<String>,
    pub(crate) association: Option<Association>,
    pub(crate) tags: Tags,
}

#[derive(Debug, Clone)]
pub(crate) struct Association {
    pub(crate) id: String,
    pub(crate) eni: EniId,
    pub(crate) private: Ipv4Addr,
}

impl State {
    fn fresh_public(&self) -> Option<Ipv4Addr> {
        RANGES
            .iter()
            .flat_map(|base| (1..255u32).map(move |n| Ipv4Addr::from(base + n)))
            .find(|address| !self.addresses.contains_key(address))
    }

    pub(crate) fn allocate_address(&mut self, tags: Tags) -> Result<PublicAddress, ApiError> {
        let public = self.fresh_public().ok_or_else(|| {
            ApiError::new("AddressLimitExceeded", "The maximum number of addresses has been reached.")
        })?;
        let allocation = Some(self.fresh_id(Kind::Allocation));
        let address = PublicAddress { public, allocation, association: None, tags };
        self.addresses.insert(public, address.clone());
        self.changed();
        Ok(address)
    }

    /// The public address that comes with a launch; without one left the ENI simply has none.
    pub(super) fn auto_public(&mut self, now: Time, eni: &EniId) {
        let (Some(public), Ok(private)) = (self.fresh_public(), self.eni(eni).map(|eni| eni.primary_ipv4)) else {
            return;
        };
        self.addresses.insert(public, PublicAddress { public, allocation: None, association: None, tags: Tags::new() });
        self.associate(now, public, eni, private);
    }

    pub(crate) fn by_allocation(&self, allocation: &str) -> Result<&PublicAddress, ApiError> {
        let found = self.addresses.values().find(|a| a.allocation.as_deref() == Some(allocation));
        found.ok_or_else(|| Kind::Allocation.not_found(allocation))
    }

    /// AssociateAddress: `private` is the primary address where it is not named.
    pub(crate) fn associate_address(
        &mut self,
        now: Time,
        public: Ipv4Addr,
        eni: &EniId,
        private: Option<Ipv4Addr>,
        allow_reassociation: bool,
    ) -> Result<String, ApiError> {
        let holder = self.eni(eni)?;
        let private = private.unwrap_or(holder.primary_ipv4);
        if !holder.holds(private) {
            return Err(ApiError::value(format!("The address {private} is not assigned to interface {eni}.")));
        }
        let vpc = holder.vpc.clone();
        if !self.gateways.values().any(|gateway| gateway.vpc.as_ref() == Some(&vpc)) {
            return Err(ApiError::new(
                "Gateway.NotAttached",
                format!("Network {vpc} is not attached to any internet gateway"),
            ));
        }
        let address = self.addresses.get(&public);
        let current = address.and_then(|address| address.association.clone());
        let taken = self.eni(eni)?.public.get(&private).copied().filter(|other| *other != public);
        if !allow_reassociation
            && let Some(id) = current.as_ref().map(|a| a.id.clone()).or(taken.map(|other| other.to_string()))
        {
            return Err(ApiError::new(
                "Resource.AlreadyAssociated",
                format!("resource {public} is already associated with associate-id {id}"),
            ));
        }
        if let Some(current) = current {
            self.drop_public(now, &current.eni, current.private);
        }
        self.drop_public(now, eni, private);
        Ok(self.associate(now, public, eni, private))
    }

    fn associate(&mut self, now: Time, public: Ipv4Addr, eni: &EniId, private: Ipv4Addr) -> String {
        let id = self.fresh_id(Kind::Association);
        if let Some(address) = self.addresses.get_mut(&public) {
            address.association = Some(Association { id: id.clone(), eni: eni.clone(), private });
        }
        self.change_eni(now, eni, |eni| {
            eni.public.insert(private, public);
        });
        id
    }

    /// Parts a private address from its public one, if it has one. An address that came with a launch is gone with it.
    pub(super) fn drop_public(&mut self, now: Time, eni: &EniId, private: Ipv4Addr) {
        let Some(public) = self.eni(eni).ok().and_then(|eni| eni.public.get(&private).copied()) else { return };
        self.change_eni(now, eni, |eni| {
            eni.public.remove(&private);
        });
        match self.addresses.get_mut(&public) {
            Some(address) if address.allocation.is_some() => address.association = None,
            _ => {
                self.addresses.remove(&public);
            }
        }
        self.changed();
    }

    pub(crate) fn disassociate_address(&mut self, now: Time, association: &str) -> Result<(), ApiError> {
        let found = self.addresses.values().find_map(|a| a.association.clone().filter(|a| a.id == association));
        let found = found.ok_or_else(|| Kind::Association.not_found(association))?;
        self.drop_public(now, &found.eni, found.private);
        Ok(())
    }

    pub(crate) fn release_address(&mut self, allocation: &str) -> Result<(), ApiError> {
        let address = self.by_allocation(allocation)?;
        if address.association.is_some() {
            return Err(ApiError::new("InvalidIPAddress.InUse", format!("Address {} is in use.", address.public)));
        }
        let public = address.public;
        self.addresses.remove(&public);
        self.changed();
        Ok(())
    }
}
