//! Subnets without a prefix, and an API without a token.

use lab_ec2::{Fault, FaultRule, When};

use super::probe::Probe;
use super::{Exhibit, MINUTE, NaiveKind};
use crate::scenario::{Act, Scenario};

/// Scattered over the /22 they leave half of its addresses free, and hardly ever a whole /28.
const SCATTERED: u32 = 520;

fn with_prefixes() -> Scenario {
    Scenario::new(0).var("ENABLE_PREFIX_DELEGATION", true).var("WARM_PREFIX_TARGET", 1)
}

pub fn a_fragmented_subnet_still_gives_addresses() -> Exhibit {
    let setting = with_prefixes()
        .at(30_000, Act::Pods { count: 10, life_ms: None })
        .at(5 * MINUTE, Act::Pods { count: 40, life_ms: None });
    Exhibit {
        elsewhere: "A /28 must be contiguous. In a fragmented subnet every prefix is refused with \
                    InsufficientCidrBlocks, and pods stay without an address beside hundreds of free ones.",
        here: "That ENI takes single addresses for a while; prefixes are asked for again later.",
        event: |scenario| scenario.at(2 * MINUTE, Act::Take { count: SCATTERED, prefixes: false }),
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#1836",
            "free addresses, but no free /28",
            setting,
            Probe::Waits { secs: 120 },
        )
    }
}

pub fn missing_prefixes_are_not_asked_for_every_five_seconds() -> Exhibit {
    let setting = with_prefixes().subnets([("10.0.0.0/25", false)]).at(30_000, Act::Pods { count: 4, life_ms: None });
    Exhibit {
        elsewhere: "EC2 says InvalidParameterValue (\"There aren't sufficient free Ipv4 addresses or prefixes\") where \
                    the code of a shortage was expected. It is classified as nothing, and asked again every five seconds \
                    by every node of the subnet.",
        here: "Errors are classified by code and text: this one is a shortage of prefixes, which rests for a minute, \
               then for longer, and single addresses are taken meanwhile.",
        event: |scenario| scenario.at(15_000, Act::Take { count: 95, prefixes: false }),
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#3105",
            "an unclassified shortage is retried hot",
            setting,
            Probe::Refused { action: "AssignPrivateIpAddresses", most: 60 },
        )
    }
}

pub fn prefixes_come_back_after_a_shortage() -> Exhibit {
    let setting = with_prefixes()
        .at(30_000, Act::Pods { count: 10, life_ms: None })
        .at(10 * MINUTE, Act::Pods { count: 30, life_ms: None })
        .at(180 * MINUTE, Act::Pods { count: 60, life_ms: None });
    Exhibit {
        elsewhere: "One shortage turns prefixes off for the whole node. It goes on with single addresses after the \
                    subnet has recovered, and runs full at a fraction of its pods.",
        here: "The fallback is one ENI's and ends by itself: prefixes are asked for again after ten minutes at most, \
               and single addresses that fall idle are exchanged for a prefix.",
        event: |scenario| {
            scenario
                .at(5 * MINUTE, Act::Take { count: SCATTERED, prefixes: false })
                .at(60 * MINUTE, Act::Give { count: 20 * SCATTERED })
        },
        minutes: 240,
        naive: NaiveKind::WithFallback,
        ..Exhibit::new("cilium#46644", "one shortage, and no prefix ever again", setting, Probe::Waits { secs: 600 })
    }
}

pub fn a_throttled_start_is_no_storm() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 8)
        .at(30_000, Act::Pods { count: 6, life_ms: None })
        .at(5 * MINUTE + 30_000, Act::Pods { count: 12, life_ms: None });
    Exhibit {
        elsewhere: "At a roll-out every node describes its ENIs at once. Throttled, each asks again at once, which \
                    keeps the account's bucket empty; until it is answered the node gives no pod an address.",
        here: "The ledger is served first and EC2 verifies behind it. Each action has a bucket that every refusal \
               halves, down to one call in sixteen seconds.",
        event: |scenario| {
            let error =
                Fault::Error { code: "RequestLimitExceeded".to_owned(), message: "Request limit exceeded.".to_owned() };
            let action = "DescribeNetworkInterfaces".to_owned();
            let dry = FaultRule { action, access_key: None, when: When::Always, fault: error };
            scenario
                .at(5 * MINUTE - 1_000, Act::Faults(vec![dry]))
                .at(5 * MINUTE, Act::Kill { down_ms: 3_000 })
                .at(15 * MINUTE, Act::Faults(Vec::new()))
        },
        minutes: 30,
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#617",
            "a throttled roll-out keeps itself throttled",
            setting,
            Probe::Waits { secs: 60 },
        )
    }
}
