//! Readings that are old, torn or overtaken: by IMDS, by the runtime, and by somebody who writes the same ENIs.

use super::probe::Probe;
use super::{Exhibit, MINUTE};
use crate::invariants::Rule;
use crate::scenario::{Act, Scenario};

pub fn stale_metadata_brings_no_address_back() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 8, life_ms: None })
        .at(5 * MINUTE, Act::EndPods { count: 8 })
        .at(15 * MINUTE + 4_000, Act::Pods { count: 8, life_ms: None });
    Exhibit {
        elsewhere: "The pool is built from IMDS at start. IMDS still shows addresses that were given back a while ago, \
                    and a pod gets one that EC2 routes to nobody, or to another node.",
        here: "What was given up is in the ledger and is not taken back because a reading shows it; an address that only \
               IMDS shows is not handed out before EC2 has confirmed it.",
        event: |scenario| {
            scenario
                .at(5 * MINUTE - 1_000, Act::ImdsStands(true))
                .at(15 * MINUTE, Act::Kill { down_ms: 2_000 })
                .at(20 * MINUTE, Act::ImdsStands(false))
        },
        minutes: 30,
        ..Exhibit::new("amazon-vpc-cni-k8s#3887", "stale metadata brings back an address", setting, Probe::Dark)
    }
}

pub fn stale_metadata_takes_no_address_from_a_pod() -> Exhibit {
    let setting = Scenario::new(0)
        .instance_type("m5.xlarge")
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 12, life_ms: None })
        .at(10 * MINUTE, Act::Pods { count: 8, life_ms: None });
    Exhibit {
        elsewhere: "Where the number of addresses differs IMDS is taken to be right. A list that lags takes new addresses \
                    out of the pool with their pods, and brings them back as free: they are given to a second pod, or \
                    back to EC2 under the first.",
        here: "IMDS takes nothing away. What EC2 itself does not show is withheld at once, and given up only after two \
               readings a minute apart, and never while a pod lives there.",
        event: |scenario| scenario.at(25_000, Act::ImdsStands(true)).at(6 * MINUTE, Act::ImdsStands(false)),
        minutes: 20,
        ..Exhibit::new("amazon-vpc-cni-k8s#3019", "a lagging list unmakes live allocations", setting, Probe::Dark)
    }
}

pub fn no_pod_is_placed_on_an_eni_that_is_gone() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_ENI_TARGET", 1)
        .at(30_000, Act::Pods { count: 4, life_ms: None })
        .at(5 * MINUTE + 20_000, Act::Pods { count: 12, life_ms: None });
    Exhibit {
        elsewhere: "An ENI is detached behind the daemon's back. Its list of ENIs is old, so pods are placed on it all \
                    the same and have no network.",
        here: "The kernel is looked at every ten seconds: an ENI whose link is gone serves no new pod, and others take \
               its place.",
        event: |scenario| {
            scenario
                .at(5 * MINUTE - 5_000, Act::ImdsStands(true))
                .at(5 * MINUTE, Act::StealEni)
                .at(8 * MINUTE, Act::ImdsStands(false))
        },
        minutes: 30,
        ..Exhibit::new("amazon-vpc-cni-k8s#1967", "pods are placed on a detached ENI", setting, Probe::Dark)
    }
}

pub fn a_torn_list_after_a_restart_erases_nothing() -> Exhibit {
    let setting = Scenario::new(0)
        .var("ENABLE_PREFIX_DELEGATION", true)
        .var("WARM_PREFIX_TARGET", 1)
        .at(30_000, Act::Pods { count: 40, life_ms: None });
    Exhibit {
        elsewhere: "A restart meets a list of prefixes that is not whole. Allocations that match none are erased within a \
                    millisecond, in whole groups of sixteen, and the state file is overwritten.",
        here: "An allocation leaves the ledger by its own DEL, by GC, or when its sandbox is found dead; a list erases \
               none. What a list lacks is not handed out until EC2 has spoken.",
        event: |scenario| {
            // One restart in seven meets a list that lacks a prefix.
            (0..60).fold(scenario.at(5 * MINUTE - 1, Act::ImdsPartial(true)), |s, n| {
                s.at(5 * MINUTE + n * 15_000, Act::Kill { down_ms: 1_000 })
            })
        },
        minutes: 25,
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#3876",
            "a torn list at start erases allocations",
            setting,
            Probe::Breaks(Rule::Kept, "allocations of live pods erased"),
        )
    }
}

pub fn a_prefix_with_a_pod_route_is_not_given_back() -> Exhibit {
    let setting = Scenario::new(0)
        .var("ENABLE_PREFIX_DELEGATION", true)
        .var("WARM_PREFIX_TARGET", 1)
        .at(30_000, Act::Pods { count: 40, life_ms: None });
    Exhibit {
        elsewhere: "Sandboxes that run are presumed stale and taken out of the books. Their prefix looks empty and is \
                    unassigned: veth, route and rule are all there, and every packet is dropped by the VPC.",
        here: "The kernel has a veto. An address with a pod route is in use whatever the books say, and the kernel is \
               read once more between the decision to give something back and the call.",
        event: |scenario| scenario.at(10 * MINUTE, Act::StrayDels { count: 40 }),
        minutes: 120,
        ..Exhibit::new("amazon-vpc-cni-k8s#3824", "a prefix in use is unassigned", setting, Probe::Dark)
    }
}

pub fn what_another_writer_takes_is_put_back() -> Exhibit {
    let setting = Scenario::new(0).var("WARM_IP_TARGET", 1).at(30_000, Act::Pods { count: 8, life_ms: None });
    Exhibit {
        elsewhere: "Two write the same thing: the IPAM and a tool of the node's life cycle undo each other's changes, \
                    and pods lose their addresses in between. (In the report the thing is the node's object in the \
                    API server; here it is the ENI's list of addresses, which is all that the daemon shares with others.)",
        here: "Only the daemon writes its ledger. What somebody else has taken from an ENI under a running pod is \
               reported, and assigned again by name once two readings of EC2 agree.",
        event: |scenario| (0..4).fold(scenario, |s, n| s.at((10 + n) * MINUTE, Act::StealSlot)),
        minutes: 120,
        ..Exhibit::new("cilium#35404", "two writers undo each other", setting, Probe::Dark)
    }
}
