//! What stays behind when those who should clean up are gone.

use super::probe::Probe;
use super::{Exhibit, MINUTE};
use crate::runtime::Habits;
use crate::scenario::{Act, Scenario};

pub fn an_eni_of_a_dead_node_is_collected() -> Exhibit {
    let setting = Scenario::new(0)
        .var("CLUSTER_NAME", "sim")
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 4, life_ms: None });
    Exhibit {
        elsewhere: "A node dies between detaching an ENI and deleting it. The ENI stays, and later blocks the deletion of \
                    its security group, subnet and VPC.",
        here: "ENIs go with their instance from the moment they are attached; an unattached one of this cluster is marked \
               by whoever finds it, and deleted by the same node ten minutes later if it still belongs to nobody.",
        event: |scenario| scenario.at(10 * MINUTE, Act::DeadNode { enis: 4 }),
        minutes: 240,
        ..Exhibit::new("amazon-vpc-cni-k8s#69", "ENIs of a dead node block the subnet", setting, Probe::Leaked)
    }
}

pub fn sandboxes_that_end_without_a_del_are_found() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 15, life_ms: None })
        .at(10 * MINUTE, Act::EndPods { count: 15 });
    Exhibit {
        elsewhere: "A DEL never comes, or comes when there is nothing left to look at. The allocation stays until the \
                    daemon is restarted, and the node runs full of pods that do not exist.",
        here: "A sandbox that the kernel shows neither by link nor by route, at two looks and after a time of grace, is \
               gone and released.",
        event: |scenario| Scenario { habits: Habits { del_lost: 100, ..scenario.habits }, ..scenario },
        minutes: 30,
        ..Exhibit::new("amazon-vpc-cni-k8s#3109", "a missed DEL leaks an address", setting, Probe::Kept)
    }
}
