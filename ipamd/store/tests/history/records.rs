//! Records of every kind, over so few ENIs, slots and sandboxes that they get in each other's way.

use std::collections::{BTreeMap, BTreeSet};

use flatwire_core::ids::{
    AttachmentId, DeviceIndex, EniId, InstanceId, MacAddress, PodName, SandboxId, SecurityGroupId, SubnetId, Time,
    VpcId,
};
use flatwire_core::ledger::{Allocation, Creation, EniRecord, NodeFacts, Progress, Record};
use flatwire_core::ports::Want;
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const SLOTS: [&str; 8] = [
    "10.0.0.5/32",
    "10.0.0.6/32",
    "10.0.0.16/28",
    "10.0.0.17/32",
    "10.0.0.32/28",
    "10.0.1.9/32",
    "10.0.1.48/28",
    "2001:db8::/80",
];
const ADDRESSES: [&str; 7] = ["10.0.0.5", "10.0.0.6", "10.0.0.17", "10.0.0.31", "10.0.1.9", "192.0.2.1", "2001:db8::7"];

/// Up to so many records in any order.
pub fn history(most: usize) -> impl Strategy<Value = Vec<Record>> {
    prop::collection::vec(record(), 0..=most)
}

fn record() -> impl Strategy<Value = Record> {
    prop_oneof![
        1 => node().prop_map(Record::Node),
        3 => eni_record().prop_map(Record::Eni),
        1 => (eni(), time()).prop_map(|(eni, at)| Record::EniGone { eni, at }),
        5 => (eni(), slots()).prop_map(|(eni, slots)| Record::Held { eni, slots }),
        2 => (eni(), slots()).prop_map(|(eni, slots)| Record::Releasing { eni, slots }),
        2 => (eni(), slots(), time()).prop_map(|(eni, slots, at)| Record::GivenUp { eni, slots, at }),
        3 => (eni(), slots(), time()).prop_map(|(eni, slots, at)| Record::Unseen { eni, slots, at }),
        2 => (eni(), prop::option::of(time())).prop_map(|(eni, at)| Record::EniUnseen { eni, at }),
        5 => allocation().prop_map(Record::Allocated),
        4 => (allocation(), time()).prop_map(|(allocation, at)| Record::Released { allocation, at }),
        1 => creation().prop_map(Record::Creating),
        1 => token().prop_map(|token| Record::CreationEnded { token }),
    ]
}

pub fn eni() -> impl Strategy<Value = EniId> {
    select(vec!["eni-1", "eni-2", "eni-3"]).prop_map(|id| EniId::new(id).unwrap())
}

fn slots() -> impl Strategy<Value = BTreeSet<IpNet>> {
    let all: Vec<IpNet> = SLOTS.iter().map(|slot| slot.parse().unwrap()).collect();
    subsequence(all, 1..=3).prop_map(|slots| slots.into_iter().collect())
}

fn time() -> impl Strategy<Value = Time> {
    (0u64..50).prop_map(Time)
}

/// Texts as they come from outside: any signs, quotes and line ends among them.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[a-z0-9.-]{0,8}", 1 => "\\PC{0,6}", 1 => any::<String>().prop_map(|s| s.chars().take(6).collect())]
}

fn group() -> impl Strategy<Value = SecurityGroupId> {
    "sg-[0-9a-f]{1,3}".prop_map(|id| SecurityGroupId::new(id).unwrap())
}

fn subnet() -> impl Strategy<Value = SubnetId> {
    "subnet-[0-9a-f]{1,3}".prop_map(|id| SubnetId::new(id).unwrap())
}

fn tags() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(text(), text(), 0..3)
}

fn node() -> impl Strategy<Value = NodeFacts> {
    let groups = prop::collection::vec(group(), 0..3);
    (select(vec!["i-1", "i-1", "i-1", "i-2"]), text(), text(), eni(), groups).prop_map(
        |(instance, instance_type, region, primary_eni, security_groups)| NodeFacts {
            instance: InstanceId::new(instance).unwrap(),
            instance_type,
            availability_zone: format!("{region}a"),
            region,
            vpc: VpcId::new("vpc-1").unwrap(),
            vpc_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
            primary_eni,
            security_groups,
        },
    )
}

fn eni_record() -> impl Strategy<Value = EniRecord> {
    let progress = select(vec![Progress::Created, Progress::Attached, Progress::Settled]);
    let attachment = prop::option::of("eni-attach-[0-9a-f]{1,3}");
    let groups = prop::collection::vec(group(), 0..3);
    let place = (eni(), any::<[u8; 6]>(), 0u32..8, 0u32..3, subnet(), any::<u32>());
    (place, attachment, progress, any::<bool>(), groups, prop::option::of(time())).prop_map(
        |((id, mac, device, card, subnet, address), attachment, progress, created, security_groups, leaving)| {
            EniRecord {
                id,
                mac: MacAddress(mac),
                device: DeviceIndex(device),
                card,
                subnet,
                subnet_cidr: "10.0.0.0/20".parse().unwrap(),
                primary_ipv4: address.into(),
                attachment: attachment.map(|id| AttachmentId::new(id).unwrap()),
                progress,
                created,
                security_groups,
                leaving,
            }
        },
    )
}

fn allocation() -> impl Strategy<Value = Allocation> {
    let sandbox = (text(), select(vec!["c1", "c2", "c3", "c4", ""]), select(vec!["eth0", "eth0", "net1"]));
    let address = select(ADDRESSES.to_vec());
    let second = prop::option::of(select(vec!["2600:1f13:0:1:2:0:a00:1", "169.254.172.9"]));
    (sandbox, text(), text(), (address, second), eni(), 0u32..4, time()).prop_map(
        |((network, container_id, if_name), namespace, name, (address, second), eni, device, at)| Allocation {
            sandbox: SandboxId { network, container_id: container_id.to_owned(), if_name: if_name.to_owned() },
            pod: PodName { namespace, name },
            address: address.parse().unwrap(),
            second: second.map(|text| text.parse().unwrap()),
            eni,
            device: DeviceIndex(device),
            table: flatwire_core::ids::RouteTable::of_eni(0, DeviceIndex(device)),
            at,
        },
    )
}

fn token() -> impl Strategy<Value = String> {
    "t[0-2]"
}

fn creation() -> impl Strategy<Value = Creation> {
    let want = prop_oneof![(0u32..20).prop_map(Want::Addresses), (0u32..20).prop_map(Want::Prefixes)];
    (token(), subnet(), (want, any::<bool>()), prop::collection::vec(group(), 0..3), tags(), time()).prop_map(
        |(token, subnet, (want, ipv6_prefix), security_groups, tags, since)| Creation {
            token,
            subnet,
            want,
            ipv6_prefix,
            security_groups,
            tags,
            since,
        },
    )
}
