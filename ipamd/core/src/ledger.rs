//! What the ledger says: the records of the journal and the state they add up to.
//!
//! The store writes and reads the bytes; here is only the meaning. A state is the fold of its records, so replaying a
//! journal after a crash gives what the daemon knew when it died.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::ids::{
    AttachmentId, DeviceIndex, EniId, InstanceId, MacAddress, PodName, RouteTable, SandboxId, SecurityGroupId,
    SubnetId, Time, VpcId,
};
use crate::ports::Want;

/// One line of the journal: a fact that must survive a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Who this node is. A ledger of another instance (a copied disk image) is set aside by its reader.
    Node(NodeFacts),
    /// An ENI of ours and how far it has come; replaces what was known of it, but not its slots.
    Eni(EniRecord),
    /// The ENI is no longer ours. For a while a lagging reading may still show it.
    EniGone {
        eni: EniId,
        #[serde(default)]
        at: Time,
    },
    /// EC2 has confirmed that the ENI holds these slots.
    Held { eni: EniId, slots: BTreeSet<IpNet> },
    /// We decided to give these slots back. Written before EC2 is asked, so that nothing is handed out from them again;
    /// `Held` takes it back, `GivenUp` completes it.
    Releasing { eni: EniId, slots: BTreeSet<IpNet> },
    /// The ENI no longer holds these slots. For a while a lagging reading may still show them.
    GivenUp {
        eni: EniId,
        slots: BTreeSet<IpNet>,
        #[serde(default)]
        at: Time,
    },
    /// All slots of the ENI that EC2 did not show when it was last read: not handed out, not forgotten. Empty: all there.
    Unseen { eni: EniId, slots: BTreeSet<IpNet>, at: Time },
    /// EC2 did not show the ENI on this instance when it was last read (`None`: it shows it again).
    EniUnseen { eni: EniId, at: Option<Time> },
    /// A sandbox has this address. Written before the plugin hears of it.
    Allocated(Allocation),
    /// The sandbox is gone; the address cools from `at` on.
    Released { allocation: Allocation, at: Time },
    /// An ENI is about to be created under this client token; the same token finds it again after a crash.
    Creating(Creation),
    /// The creation came to its end, one way or the other.
    CreationEnded { token: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    pub instance: InstanceId,
    pub instance_type: String,
    pub region: String,
    pub availability_zone: String,
    pub vpc: VpcId,
    pub vpc_cidrs: Vec<IpNet>,
    pub primary_eni: EniId,
    /// Groups of the primary ENI, given to every ENI we create.
    pub security_groups: Vec<SecurityGroupId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EniRecord {
    pub id: EniId,
    pub mac: MacAddress,
    pub device: DeviceIndex,
    pub card: u32,
    pub subnet: SubnetId,
    pub subnet_cidr: Ipv4Net,
    pub primary_ipv4: Ipv4Addr,
    pub attachment: Option<AttachmentId>,
    pub progress: Progress,
    /// Made by us, by the tag it carries: only these are given back or have their groups changed.
    #[serde(default)]
    pub created: bool,
    /// As EC2 showed them last, or as we asked for; empty where only IMDS has been read.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupId>,
    /// Being given back since then: fenced, detached, deleted.
    #[serde(default)]
    pub leaving: Option<Time>,
}

impl EniRecord {
    pub fn table(&self) -> RouteTable {
        RouteTable::of_eni(self.card, self.device)
    }
}

/// How far an ENI has come in EC2. What the kernel knows of it is not recorded: it is read again at every start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Exists, belongs to no instance.
    Created,
    /// Attached; still survives the instance's end.
    Attached,
    /// Attached, and deleted with the instance: nothing is left to do in EC2.
    Settled,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    pub sandbox: SandboxId,
    pub pod: PodName,
    pub address: IpAddr,
    /// Follows from `address` and the ENI: see `crate::families`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<IpAddr>,
    pub eni: EniId,
    pub device: DeviceIndex,
    pub table: RouteTable,
    pub at: Time,
}

impl Allocation {
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [self.address].into_iter().chain(self.second)
    }

    /// One of its addresses is in the network.
    pub fn is_in(&self, net: &IpNet) -> bool {
        self.addresses().any(|address| net.contains(&address))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creation {
    pub token: String,
    pub subnet: SubnetId,
    pub want: Want,
    /// With a /80 of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ipv6_prefix: bool,
    pub security_groups: Vec<SecurityGroupId>,
    pub tags: BTreeMap<String, String>,
    pub since: Time,
}

/// Stands in a snapshot where a record has to name an ENI and none is meant.
const NO_ENI: &str = "eni-none";

/// Everything the ledger says at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LedgerState {
    pub node: Option<NodeFacts>,
    pub enis: BTreeMap<EniId, EniRecord>,
    /// Slots EC2 has confirmed and nobody has given up, by ENI.
    pub slots: BTreeMap<EniId, BTreeSet<IpNet>>,
    /// Of those: being given back.
    pub releasing: BTreeMap<EniId, BTreeSet<IpNet>>,
    /// Of those: not shown by EC2, since when.
    pub unseen: BTreeMap<EniId, BTreeMap<IpNet, Time>>,
    /// ENIs that EC2 does not show on this instance, since when.
    pub enis_unseen: BTreeMap<EniId, Time>,
    /// Given up a short while ago: a reading that still shows them may be old.
    pub given_up: BTreeMap<IpNet, Time>,
    /// ENIs gone a short while ago, likewise.
    pub forgotten: BTreeMap<EniId, Time>,
    pub pods: BTreeMap<SandboxId, Allocation>,
    /// When each address that once served a pod was freed: for the cool-down and for oldest-freed-first.
    pub freed: BTreeMap<IpAddr, Time>,
    pub creations: BTreeMap<String, Creation>,
}

impl LedgerState {
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Node(facts) => {
                if self.node.as_ref().is_some_and(|known| known.instance != facts.instance) {
                    *self = Self::default();
                }
                self.node = Some(facts.clone());
            }
            Record::Eni(eni) => {
                self.forgotten.remove(&eni.id);
                self.enis.insert(eni.id.clone(), eni.clone());
            }
            Record::EniGone { eni, at } => {
                let held = self.slots.remove(eni).unwrap_or_default();
                self.gave_up(held.iter(), *at);
                self.enis.remove(eni);
                self.releasing.remove(eni);
                self.unseen.remove(eni);
                self.enis_unseen.remove(eni);
                self.forgotten.insert(eni.clone(), *at);
            }
            Record::Held { eni, slots } => {
                self.slots.entry(eni.clone()).or_default().extend(slots);
                drop_from(&mut self.releasing, eni, |slot| slots.contains(slot));
                for slot in slots {
                    self.given_up.remove(slot);
                }
            }
            Record::Releasing { eni, slots } => {
                let held = self.slots.get(eni).cloned().unwrap_or_default();
                self.releasing.entry(eni.clone()).or_default().extend(slots.intersection(&held));
            }
            Record::GivenUp { eni, slots, at } => {
                drop_from(&mut self.slots, eni, |slot| slots.contains(slot));
                drop_from(&mut self.releasing, eni, |slot| slots.contains(slot));
                if let Some(unseen) = self.unseen.get_mut(eni) {
                    unseen.retain(|slot, _| !slots.contains(slot));
                }
                self.unseen.retain(|_, slots| !slots.is_empty());
                self.gave_up(slots.iter(), *at);
            }
            Record::Unseen { eni, slots, at } => {
                let before = self.unseen.remove(eni).unwrap_or_default();
                let since = |slot: &IpNet| before.get(slot).copied().unwrap_or(*at);
                let now: BTreeMap<IpNet, Time> = slots.iter().map(|slot| (*slot, since(slot))).collect();
                if !now.is_empty() {
                    self.unseen.insert(eni.clone(), now);
                }
            }
            Record::EniUnseen { eni, at: Some(at) } => {
                self.enis_unseen.entry(eni.clone()).or_insert(*at);
            }
            Record::EniUnseen { eni, at: None } => {
                self.enis_unseen.remove(eni);
            }
            Record::Allocated(allocation) => {
                self.pods.insert(allocation.sandbox.clone(), allocation.clone());
            }
            Record::Released { allocation, at } => {
                self.pods.remove(&allocation.sandbox);
                self.freed.insert(allocation.address, *at);
            }
            Record::Creating(creation) => {
                self.creations.insert(creation.token.clone(), creation.clone());
            }
            Record::CreationEnded { token } => {
                self.creations.remove(token);
            }
        }
    }

    /// These are no longer an ENI's. EC2 may have given one to another ENI of ours before we heard that the first had let go:
    /// then it is held.
    fn gave_up<'s>(&mut self, slots: impl Iterator<Item = &'s IpNet>, at: Time) {
        for slot in slots {
            if !self.slots.values().any(|held| held.contains(slot)) {
                self.freed.retain(|address, _| !slot.contains(address));
                self.given_up.insert(*slot, at);
            }
        }
    }

    /// Takes back a record that could not be written. Only what somebody would have been told is taken back; the rest is
    /// true all the same and is written again later.
    pub fn revert(&mut self, record: &Record) {
        match record {
            Record::Allocated(allocation) => {
                self.pods.remove(&allocation.sandbox);
            }
            Record::Released { allocation, .. } => {
                self.freed.remove(&allocation.address);
                self.pods.insert(allocation.sandbox.clone(), allocation.clone());
            }
            _ => {}
        }
    }

    pub fn replay<'r>(records: impl IntoIterator<Item = &'r Record>) -> Self {
        let mut state = Self::default();
        for record in records {
            state.apply(record);
        }
        state
    }

    /// How many records `as_records` makes, or a few more, without making them: this is asked with every pod.
    pub fn record_count(&self) -> usize {
        let unseen: usize = self.unseen.values().map(BTreeMap::len).sum();
        let enis = self.forgotten.len() + self.enis.len() + self.enis_unseen.len() + self.creations.len();
        let slots = self.slots.len() + self.releasing.len() + unseen + self.given_up.len();
        usize::from(self.node.is_some()) + enis + slots + self.freed.len() + self.pods.len()
    }

    /// The shortest journal that says the same: what a snapshot holds. Only the rest of addresses that no ENI holds any more
    /// is left out. What is gone comes before what is there, so that no record takes back what an earlier one says.
    pub fn as_records(&self) -> Vec<Record> {
        let mut records = Vec::new();
        records.extend(self.node.clone().map(Record::Node));
        records.extend(self.forgotten.iter().map(|(eni, at)| Record::EniGone { eni: eni.clone(), at: *at }));
        records.extend(self.enis.values().cloned().map(Record::Eni));
        let held = self.slots.iter().filter(|(_, slots)| !slots.is_empty());
        records.extend(held.map(|(eni, slots)| Record::Held { eni: eni.clone(), slots: slots.clone() }));
        let leaving = self.releasing.iter();
        records.extend(leaving.map(|(eni, slots)| Record::Releasing { eni: eni.clone(), slots: slots.clone() }));
        for (eni, slots) in &self.unseen {
            // The record carries one time for all: oldest first, so that each slot keeps its own.
            let mut by_age: Vec<(Time, IpNet)> = slots.iter().map(|(slot, at)| (*at, *slot)).collect();
            by_age.sort_unstable();
            let mut so_far = BTreeSet::new();
            for (at, slot) in by_age {
                so_far.insert(slot);
                records.push(Record::Unseen { eni: eni.clone(), slots: so_far.clone(), at });
            }
        }
        let unseen = self.enis_unseen.iter();
        records.extend(unseen.map(|(eni, at)| Record::EniUnseen { eni: eni.clone(), at: Some(*at) }));
        // Whose it was matters no more, and another ENI may hold it by now: these name none that there is.
        let nobody = EniId::new(NO_ENI).expect("invariant: NO_ENI is an ENI id");
        let given_up = self.given_up.iter().map(|(slot, at)| (BTreeSet::from([*slot]), *at));
        records.extend(given_up.map(|(slots, at)| Record::GivenUp { eni: nobody.clone(), slots, at }));
        let held = |address: &IpAddr| self.slots.values().flatten().any(|slot| slot.contains(address));
        let freed = self.freed.iter().filter(|(address, _)| held(address));
        records.extend(freed.map(|(address, at)| freed_record(nobody.clone(), *address, *at)));
        records.extend(self.pods.values().cloned().map(Record::Allocated));
        records.extend(self.creations.values().cloned().map(Record::Creating));
        records
    }
}

/// A freed address is written as the release of a nameless sandbox, so that the journal needs no further record kind.
fn freed_record(eni: EniId, address: IpAddr, at: Time) -> Record {
    let sandbox = SandboxId { network: String::new(), container_id: String::new(), if_name: address.to_string() };
    let (device, table) = (DeviceIndex::PRIMARY, RouteTable::MAIN);
    Record::Released {
        allocation: Allocation { sandbox, pod: PodName::default(), address, second: None, eni, device, table, at },
        at,
    }
}

fn drop_from(slots: &mut BTreeMap<EniId, BTreeSet<IpNet>>, eni: &EniId, which: impl Fn(&IpNet) -> bool) {
    if let Some(held) = slots.get_mut(eni) {
        held.retain(|slot| !which(slot));
        if held.is_empty() {
            slots.remove(eni);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eni(id: &str, device: u32) -> Record {
        Record::Eni(EniRecord {
            id: EniId::new(id).unwrap(),
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            device: DeviceIndex(device),
            card: 0,
            subnet: SubnetId::new("subnet-a").unwrap(),
            subnet_cidr: "10.0.0.0/24".parse().unwrap(),
            primary_ipv4: Ipv4Addr::new(10, 0, 0, 10),
            attachment: None,
            progress: Progress::Settled,
            created: true,
            security_groups: Vec::new(),
            leaving: None,
        })
    }

    /// EC2 takes a slot from one ENI and gives it to another of ours, and the second answer comes first.
    #[test]
    fn a_slot_that_moved_between_our_enis_survives_a_snapshot() {
        let (a, b) = (EniId::new("eni-a").unwrap(), EniId::new("eni-b").unwrap());
        let slots = BTreeSet::from(["10.0.0.15/32".parse().unwrap()]);
        for (from, to) in [(&a, &b), (&b, &a)] {
            let records = [
                eni("eni-a", 1),
                eni("eni-b", 2),
                Record::Held { eni: from.clone(), slots: slots.clone() },
                Record::Releasing { eni: from.clone(), slots: slots.clone() },
                Record::Held { eni: to.clone(), slots: slots.clone() },
                Record::GivenUp { eni: from.clone(), slots: slots.clone(), at: Time(9) },
            ];
            let state = LedgerState::replay(&records);
            assert_eq!(state.slots, BTreeMap::from([(to.clone(), slots.clone())]));
            assert_eq!(LedgerState::replay(&state.as_records()), state);
            assert_eq!(state.record_count(), state.as_records().len());
        }
    }
}
