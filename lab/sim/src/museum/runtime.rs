//! What the runtime says, does not say, or says late.

use super::probe::Probe;
use super::{Exhibit, MINUTE};
use crate::invariants::Rule;
use crate::runtime::Habits;
use crate::scenario::{Act, Scenario};

pub fn a_del_needs_no_daemon() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 12, life_ms: None })
        .at(5 * MINUTE, Act::EndPods { count: 12 });
    Exhibit {
        elsewhere: "DEL asks the daemon what to take down. While the daemon is away pods stay Terminating, or their rules \
                    stay in the kernel.",
        here: "The plugin takes a pod down by what it was given and by what the kernel shows, and leaves the release on \
               disk; the daemon takes it from there when it is back.",
        event: |scenario| scenario.at(5 * MINUTE - 1_000, Act::Kill { down_ms: 10 * MINUTE }),
        minutes: 30,
        ..Exhibit::new("amazon-vpc-cni-k8s#2048", "DEL needs the daemon", setting, Probe::Terminates { secs: 60 })
    }
}

pub fn a_late_del_frees_no_other_sandbox() -> Exhibit {
    let setting = (1..20).fold(Scenario::new(0).var("WARM_IP_TARGET", 4).var("MINIMUM_IP_TARGET", 12), |s, minute| {
        s.at(minute * MINUTE, Act::Pods { count: 1, life_ms: None })
    });
    Exhibit {
        elsewhere: "Allocations are found by the pod's name. A DEL that comes late, for a sandbox that failed before, frees \
                    the address of the pod's present sandbox, and the next pod gets it as well.",
        here: "The ledger is keyed by sandbox. A DEL of one that holds nothing is answered and changes nothing.",
        event: |scenario| {
            let habits = Habits { answer_lost: 50, del_again: 100, ..scenario.habits };
            Scenario { habits, ..scenario }
        },
        minutes: 30,
        ..Exhibit::new(
            "amazon-vpc-cni-k8s#711",
            "a late DEL frees another sandbox",
            setting,
            Probe::Breaks(Rule::Unique, "addresses given to a second pod"),
        )
    }
}

pub fn gc_is_answered() -> Exhibit {
    let setting = Scenario::new(0)
        .var("WARM_IP_TARGET", 2)
        .at(30_000, Act::Pods { count: 15, life_ms: None })
        .at(2 * MINUTE, Act::EndPods { count: 15 })
        .at(3 * MINUTE, Act::Gc);
    Exhibit {
        elsewhere: "The plugin knows neither CHECK nor GC nor STATUS: the runtime cannot ask whether a pod is wired, say \
                    which sandboxes it still knows, or find out before scheduling that there is no address.",
        here: "All three are answered. The simulator shows GC: what the runtime no longer lists is taken down and \
               released a minute after its DEL was lost, long before the daemon would have missed it by itself. CHECK \
               and STATUS are the plugin's, and its conformance suite holds them (sec2_check_3_names_what_is_missing, \
               sec2_status_2_tells_exhaustion).",
        event: |scenario| Scenario { habits: Habits { del_lost: 100, ..scenario.habits }, ..scenario },
        minutes: 4,
        ..Exhibit::new("amazon-vpc-cni-k8s#479", "no CHECK, GC or STATUS", setting, Probe::Kept)
    }
}
