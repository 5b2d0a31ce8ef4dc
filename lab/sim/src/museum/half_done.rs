//! ENIs that were being made when something came in between.

use lab_ec2::{Delays, Fault, FaultRule, When};

use super::probe::Probe;
use super::{Exhibit, MINUTE};
use crate::scenario::{Act, Scenario};

/// More pods than the primary ENI carries.
fn two_enis() -> Scenario {
    Scenario::new(0).var("WARM_IP_TARGET", 2).at(30_000, Act::Pods { count: 12, life_ms: None })
}

pub fn a_refused_last_step_of_an_eni_is_made_later() -> Exhibit {
    Exhibit {
        elsewhere: "An ENI is created and attached, and then ModifyNetworkInterfaceAttribute is throttled. The way back is \
                    throttled too and not tried again, so every attempt leaves an ENI behind.",
        here: "Every step is in the ledger. The one that was refused is made again when its action's bucket allows, and \
               nothing is undone.",
        event: |scenario| {
            let throttled = |action: &str| FaultRule {
                action: action.to_owned(),
                access_key: None,
                when: When::Always,
                fault: Fault::Error {
                    code: "RequestLimitExceeded".to_owned(),
                    message: "Request limit exceeded.".to_owned(),
                },
            };
            scenario
                .at(0, Act::Faults(vec![throttled("Modify*"), throttled("Delete*")]))
                .at(6 * MINUTE, Act::Faults(Vec::new()))
        },
        ..Exhibit::new("amazon-vpc-cni-k8s#537", "a throttled set-up leaves ENIs behind", two_enis(), Probe::Leaked)
    }
}

pub fn an_eni_is_registered_however_late_its_link() -> Exhibit {
    Exhibit {
        elsewhere: "The set-up of an ENI fails after it was attached, and the ENI is dropped from the books. It takes its \
                    place on the instance all the same: the node is at its limit, AttachmentLimitExceeded comes back every \
                    five seconds, and pods get no address.",
        here: "An attached ENI stays in the ledger and counts, and its link is waited for as long as it takes. One that \
               EC2 shows and the ledger does not know is adopted.",
        event: |scenario| scenario.at(0, Act::Delays(Delays { link_ms: 10 * MINUTE, ..Delays::default() })),
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#3833",
            "attached ENIs that nobody registers",
            two_enis(),
            Probe::Waits { secs: 15 * 60 },
        )
    }
}

pub fn a_crash_before_the_attach_loses_no_eni() -> Exhibit {
    let mut setting = Scenario::new(0).instance_type("m5.4xlarge").var("WARM_ENI_TARGET", 1);
    for wave in 0..6 {
        setting = setting.at((1 + 4 * wave) * MINUTE, Act::Pods { count: 29, life_ms: None });
    }
    Exhibit {
        elsewhere: "A restart between creating an ENI and attaching it: nobody has written down that it exists, and it is \
                    neither attached nor deleted.",
        here: "The intention is in the ledger before EC2 is called. After a restart the same client token finds the same \
               ENI, and its way goes on.",
        event: |scenario| {
            (0..6).fold(scenario, |s, wave| {
                (0..8).fold(s, |s, n| s.at((1 + 4 * wave) * MINUTE + n * 5_800, Act::Kill { down_ms: 500 }))
            })
        },
        ..Exhibit::new("amazon-vpc-cni-k8s#66", "a crash loses an ENI being made", setting, Probe::Leaked)
    }
}
