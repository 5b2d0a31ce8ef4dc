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
    /// The ENI is no longer ours.
    EniGone { eni: EniId },
    /// EC2 has confirmed that the ENI holds these slots.
    Held { eni: EniId, slots: BTreeSet<IpNet> },
    /// We decided to give these slots up. Written before EC2 is asked, so that nothing is handed out from them again.
    GivenUp { eni: EniId, slots: BTreeSet<IpNet> },
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
    pub vpc_cidrs: Vec<Ipv4Net>,
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
    pub eni: EniId,
    pub device: DeviceIndex,
    pub table: RouteTable,
    pub at: Time,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creation {
    pub token: String,
    pub subnet: SubnetId,
    pub want: Want,
    pub security_groups: Vec<SecurityGroupId>,
    pub tags: BTreeMap<String, String>,
    pub since: Time,
}

/// Everything the ledger says at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LedgerState {
    pub node: Option<NodeFacts>,
    pub enis: BTreeMap<EniId, EniRecord>,
    /// Slots EC2 has confirmed and nobody has given up, by ENI.
    pub slots: BTreeMap<EniId, BTreeSet<IpNet>>,
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
                self.enis.insert(eni.id.clone(), eni.clone());
            }
            Record::EniGone { eni } => {
                self.enis.remove(eni);
                self.slots.remove(eni);
            }
            Record::Held { eni, slots } => self.slots.entry(eni.clone()).or_default().extend(slots),
            Record::GivenUp { eni, slots } => {
                if let Some(held) = self.slots.get_mut(eni) {
                    held.retain(|slot| !slots.contains(slot));
                }
                self.freed.retain(|address, _| !slots.iter().any(|slot| slot.contains(address)));
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

    /// The shortest journal that says the same: what a snapshot holds.
    pub fn as_records(&self) -> Vec<Record> {
        let mut records = Vec::new();
        records.extend(self.node.clone().map(Record::Node));
        records.extend(self.enis.values().cloned().map(Record::Eni));
        let held = self.slots.iter().filter(|(_, slots)| !slots.is_empty());
        records.extend(held.map(|(eni, slots)| Record::Held { eni: eni.clone(), slots: slots.clone() }));
        records.extend(self.freed.iter().filter_map(|(address, at)| self.freed_record(*address, *at)));
        records.extend(self.pods.values().cloned().map(Record::Allocated));
        records.extend(self.creations.values().cloned().map(Record::Creating));
        records
    }

    /// A freed address is written as the release of a nameless sandbox, so that the journal needs no further record kind.
    fn freed_record(&self, address: IpAddr, at: Time) -> Option<Record> {
        let (eni, _) = self.slots.iter().find(|(_, slots)| slots.iter().any(|slot| slot.contains(&address)))?;
        let record = self.enis.get(eni)?;
        let sandbox = SandboxId { network: String::new(), container_id: String::new(), if_name: address.to_string() };
        let allocation = Allocation {
            sandbox,
            pod: PodName::default(),
            address,
            eni: eni.clone(),
            device: record.device,
            table: record.table(),
            at,
        };
        Some(Record::Released { allocation, at })
    }
}
