//! The others in the subnet: they hold addresses, take what is free, and take at once what somebody gives back.

use std::collections::BTreeSet;

use flatwire_core::ids::{EniId, SubnetId, Time};
use flatwire_core::ports::CloudRequest;
use ipnet::IpNet;
use lab_ec2::{Caller, Ec2, PageAsked};

use crate::dice::Dice;

/// Slots of an ENI that hangs on no instance, its own address not counted.
const SLOTS_MOST: usize = 60;

#[derive(Debug)]
pub struct Neighbours {
    subnets: Vec<SubnetId>,
    enis: Vec<EniId>,
    caller: Caller,
    dice: Dice,
    /// What a node gives back is taken at once.
    pub greedy: bool,
}

impl Neighbours {
    pub fn new(subnets: Vec<SubnetId>, dice: Dice) -> Self {
        Self { subnets, enis: Vec::new(), caller: Caller::lab("123456789012"), dice, greedy: false }
    }

    /// Takes so many addresses (or /28s) anywhere in the subnets, as far as there are any.
    pub fn take(&mut self, ec2: &Ec2, now: Time, count: u32, prefixes: bool) {
        for _ in 0..count {
            let subnet = self.dice.pick(&self.subnets).clone();
            let Some(eni) = self.with_room(ec2, now, &subnet) else { continue };
            let _ = match prefixes {
                true => ec2.assign_prefixes(now, &eni, 1).map(drop),
                false => ec2.assign_addresses(now, &eni, 1).map(drop),
            };
        }
    }

    /// Gives back so many addresses.
    pub fn give(&mut self, ec2: &Ec2, now: Time, count: u32) {
        for _ in 0..count {
            let Some(eni) = self.dice.any(self.enis.iter().cloned()) else { return };
            let held = ec2.with_enis(now, |enis| {
                let eni = enis.get(&eni)?;
                Some((eni.secondary.iter().next().copied(), eni.prefixes.iter().next().copied()))
            });
            let Some((address, prefix)) = held else { continue };
            let _ = ec2.unassign(now, &eni, address.as_slice(), prefix.as_slice());
        }
    }

    /// Leaves: everything is free again.
    pub fn leave(&mut self, ec2: &Ec2, now: Time) {
        for eni in self.enis.drain(..) {
            let _ = ec2.delete_eni(now, &eni);
        }
        self.greedy = false;
    }

    /// Somebody gave these back.
    pub fn grab(&mut self, ec2: &Ec2, now: Time, slots: BTreeSet<IpNet>) {
        if !self.greedy {
            return;
        }
        for slot in slots {
            let subnet = self.dice.pick(&self.subnets).clone();
            let Some(eni) = self.with_room(ec2, now, &subnet) else { return };
            let request = CloudRequest::AssignNamed { eni, slots: BTreeSet::from([slot]) };
            let _ = ec2.call(now, &self.caller, &request, &PageAsked::default());
        }
    }

    fn with_room(&mut self, ec2: &Ec2, now: Time, subnet: &SubnetId) -> Option<EniId> {
        let roomy = ec2.with_enis(now, |enis| {
            let fits = |id: &&EniId| {
                enis.get(*id)
                    .is_some_and(|eni| eni.subnet == *subnet && eni.secondary.len() + eni.prefixes.len() < SLOTS_MOST)
            };
            self.enis.iter().find(fits).cloned()
        });
        if roomy.is_some() {
            return roomy;
        }
        let eni = ec2.create_eni(now, subnet, &[], "a neighbour", Default::default()).ok()?;
        self.enis.push(eni.clone());
        Some(eni)
    }
}
