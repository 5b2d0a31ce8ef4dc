//! What the world tells of itself: machines, ENIs, pods, drops and calls. Nothing here changes anything.

use std::collections::BTreeMap;

use flatwire_core::ids::VpcId;
use lab_ec2::View;

use crate::ctl::{Drops, EniInfo, Info, NodeInfo, Status, SubnetInfo, VpcInfo};
use crate::error::chain;
use crate::fabric::{INTERNET_SERVER, INTERNET_SERVER6};
use crate::firewall::{DENIED, NO_PUBLIC, UNASSIGNED};
use crate::node::Node;
use crate::world::World;

impl World {
    pub(crate) async fn info(&self) -> Info {
        let view = self.cloud.view();
        let drops = self.all_drops().await;
        let vpc = |id: &VpcId| {
            let mut subnets: Vec<_> = (view.subnets.iter())
                .filter(|subnet| subnet.vpc == *id)
                .map(|subnet| SubnetInfo {
                    id: subnet.id.to_string(),
                    cidr: subnet.cidr,
                    ipv6: subnet.ipv6,
                    availability_zone: subnet.availability_zone.clone(),
                    free_addresses: subnet.free_addresses,
                })
                .collect();
            subnets.sort_by_key(|subnet| subnet.cidr);
            let known = view.vpcs.iter().find(|vpc| vpc.id == *id);
            VpcInfo {
                id: id.to_string(),
                cidrs: known.map(|vpc| vpc.cidrs.clone()).unwrap_or_default(),
                ipv6: known.and_then(|vpc| vpc.ipv6),
                subnets,
            }
        };
        let machines: Vec<_> = self.lock(&self.nodes).values().cloned().collect();
        let mut nodes = Vec::new();
        for node in machines {
            nodes.push(self.node_info(&view, &node, &drops).await);
        }
        nodes.sort_by(|a: &NodeInfo, b| a.name.cmp(&b.name));
        Info {
            name: self.spec.name.clone(),
            endpoint: self.endpoint,
            region: self.spec.region.clone(),
            credentials: self.cloud.credentials.clone(),
            vpc: vpc(&self.cloud.vpc),
            peer: vpc(&self.cloud.peer_vpc),
            internet_server: INTERNET_SERVER,
            internet_server6: INTERNET_SERVER6,
            ipamd: self.programs.as_ref().map(|programs| programs.ipamd.clone()),
            nodes,
        }
    }

    async fn node_info(&self, view: &View, node: &Node, drops: &BTreeMap<String, u64>) -> NodeInfo {
        let instance = view.instance(&node.instance);
        let enis = view.enis_of(&node.instance);
        let fabric = self.fabric.lock().await;
        NodeInfo {
            name: node.name.clone(),
            instance: node.instance.to_string(),
            instance_type: instance.map(|info| info.instance_type.clone()).unwrap_or_default(),
            availability_zone: instance.map(|info| info.availability_zone.clone()).unwrap_or_default(),
            address: enis.first().map(|eni| eni.primary_ipv4),
            public: enis.first().and_then(|eni| eni.public.get(&eni.primary_ipv4).copied()),
            ipv6: enis.first().and_then(|eni| eni.ipv6.first().copied()),
            enis: (enis.iter())
                .map(|eni| EniInfo {
                    id: eni.id.to_string(),
                    device: eni.attachment.as_ref().map_or(0, |attachment| attachment.device.0),
                    mac: eni.mac.to_string(),
                    subnet: eni.subnet.to_string(),
                    primary: eni.primary_ipv4,
                    secondary: eni.secondary.iter().copied().collect(),
                    prefixes: eni.prefixes.iter().copied().collect(),
                    ipv6: eni.ipv6.iter().copied().collect(),
                    ipv6_prefixes: eni.ipv6_prefixes.iter().copied().collect(),
                    status: eni.attachment.as_ref().map_or_else(String::new, |a| a.state.to_string()),
                    link: fabric.guest_link(&eni.id),
                    spoofed: drops.get(eni.id.as_str()).copied().unwrap_or(0),
                })
                .collect(),
            daemon: node.daemon_state().await.to_owned(),
            pods: node.pods.list(),
            files: match (&self.spec.keep, node.files.file_name()) {
                (Some(keep), Some(name)) => keep.join(name),
                _ => node.files.clone(),
            },
        }
    }

    async fn all_drops(&self) -> BTreeMap<String, u64> {
        let mut total: BTreeMap<String, u64> = BTreeMap::new();
        let fabric = self.fabric.lock().await;
        for vpc in [&self.cloud.vpc, &self.cloud.peer_vpc] {
            match fabric.drops(vpc) {
                Ok(drops) => drops.into_iter().for_each(|(name, count)| *total.entry(name).or_default() += count),
                Err(error) => tracing::warn!(error = chain(&error), "drop counters are not readable"),
            }
        }
        total
    }

    pub(crate) async fn status(&self) -> Status {
        let all = self.all_drops().await;
        let named = |name: &str| all.get(name).copied().unwrap_or(0);
        let (unassigned, no_public, denied) = (named(UNASSIGNED), named(NO_PUBLIC), named(DENIED));
        let spoofed = all.values().sum::<u64>() - unassigned - no_public - denied;
        Status {
            info: self.info().await,
            calls: self.cloud.calls(),
            drops: Drops { spoofed, unassigned, no_public, denied },
            fabric_ms: self.followed.borrow().took_ms,
        }
    }
}
