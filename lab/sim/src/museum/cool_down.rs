//! Addresses that a pod has just left.

use super::probe::Probe;
use super::{Exhibit, MINUTE};
use crate::invariants::Rule;
use crate::scenario::{Act, Scenario};

pub fn cooling_addresses_are_not_available() -> Exhibit {
    let setting = Scenario::new(0)
        .instance_type("m5.xlarge")
        .var("WARM_IP_TARGET", 2)
        .var("MINIMUM_IP_TARGET", 20)
        .at(20_000, Act::Pods { count: 16, life_ms: None });
    Exhibit {
        elsewhere: "Addresses that cool down are counted as available, so the pool does not grow, and pods of a node \
                    with churn wait for half a minute and more although the subnet has addresses.",
        here: "A cooling address is not available, so the pool grows by what the churn needs; when it cannot, the \
               longest-cooling address is given rather than failing the pod.",
        event: |scenario| {
            (2..12).fold(scenario, |s, minute| {
                s.at(minute * MINUTE, Act::EndPods { count: 60 })
                    .at(minute * MINUTE + 3_000, Act::Pods { count: 16, life_ms: None })
            })
        },
        minutes: 20,
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#2896",
            "cooling addresses count as available",
            setting,
            Probe::Waits { secs: 20 },
        )
    }
}

pub fn a_restart_keeps_the_cool_down() -> Exhibit {
    let mut setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 4)
        .var("MINIMUM_IP_TARGET", 20)
        .at(30_000, Act::Pods { count: 8, life_ms: None });
    for minute in 2..8 {
        setting = setting
            .at(minute * MINUTE, Act::EndPods { count: 4 })
            .at(minute * MINUTE + 12_000, Act::Pods { count: 4, life_ms: None });
    }
    Exhibit {
        elsewhere: "The cool-down lives in memory. After a restart during churn an address that a pod left a moment \
                    ago is given to the next one, while its old peers still send to it.",
        here: "The time of release is in the ledger, and the cool-down goes on where it was.",
        event: |scenario| {
            (2..8).fold(scenario, |s, minute| s.at(minute * MINUTE + 5_000, Act::Kill { down_ms: 1_000 }))
        },
        minutes: 15,
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#1127",
            "a restart forgets the cool-down",
            setting,
            Probe::Breaks(Rule::CoolDown, "addresses given again too soon"),
        )
    }
}
