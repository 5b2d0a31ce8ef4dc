//! What leads the daemon to each of its effects.

use ipamd::probe::Effect;

use crate::scene::Scene;

pub struct Recipe {
    /// At which arrivals at the point the daemon dies, each in a run of its own.
    pub arrivals: &'static [u32],
    /// Seconds that pass for the dying daemon in one.
    pub hurry: u32,
    /// Pods have addresses of both families.
    pub dual_stack: bool,
    /// While the daemon that is shipped runs.
    pub before: fn(&mut Scene),
    /// While none runs.
    pub away: fn(&mut Scene),
    /// While the one runs that is to die; a recipe for what it does at its start has nothing here.
    pub provoke: fn(&mut Scene),
    /// What must be true of this effect in the end, beside what must be true of all.
    pub after: fn(&mut Scene),
}

const NOTHING: fn(&mut Scene) = |_| {};
const PLAIN: Recipe = Recipe {
    arrivals: &[1],
    hurry: 1,
    dual_stack: false,
    before: NOTHING,
    away: NOTHING,
    provoke: NOTHING,
    after: NOTHING,
};

/// More pods than the primary ENI of the node can hold.
const MORE_THAN_ONE_ENI: usize = 10;

/// Every effect has a recipe: the compiler asks for it.
pub fn recipe(effect: Effect) -> Recipe {
    let a_burst = Recipe { provoke: |scene| scene.burst(6), ..PLAIN };
    let a_second_eni = Recipe { provoke: |scene| scene.burst(MORE_THAN_ONE_ENI), ..PLAIN };
    match effect {
        // Pods that ask together may share a flush; the steps of an ENI do not.
        Effect::Persist => Recipe { arrivals: &[1, 2, 4, 6], ..a_second_eni },
        Effect::Reply => Recipe { arrivals: &[1, 4], ..a_burst },
        Effect::Assign => a_burst,
        Effect::CreateEni | Effect::AttachEni | Effect::SetDeleteOnTermination => a_second_eni,
        // The first is at the start, before anybody is served; the second when the new ENI's addresses come.
        Effect::Program => Recipe { arrivals: &[1, 2, 4], ..a_second_eni },
        Effect::AssignNamed => Recipe {
            before: |scene| scene.choose_who_loses(),
            provoke: |scene| scene.lose_an_address_in_ec2(),
            after: |scene| scene.it_is_there_again(),
            // A second reading must agree.
            hurry: 30,
            ..PLAIN
        },
        Effect::AssignIpv6Prefix => Recipe {
            dual_stack: true,
            provoke: |scene| scene.lose_the_ipv6_prefix_in_ec2(),
            after: |scene| scene.the_ipv6_prefix_is_there_again(),
            hurry: 30,
            ..PLAIN
        },
        // A minute of idleness for addresses, five for an ENI.
        Effect::Unassign => Recipe { before: |scene| scene.come_and_go(MORE_THAN_ONE_ENI), hurry: 60, ..PLAIN },
        Effect::DetachEni | Effect::DeleteEni => {
            Recipe { before: |scene| scene.come_and_go(MORE_THAN_ONE_ENI), hurry: 120, ..PLAIN }
        }
        Effect::SetSecurityGroups => Recipe {
            before: |scene| scene.burst_and_wait(MORE_THAN_ONE_ENI),
            away: |scene| scene.add_a_group_to_the_primary(),
            after: |scene| scene.every_eni_has_the_groups(),
            hurry: 30,
            ..PLAIN
        },
        // Looked for within an hour and ten minutes of the start.
        Effect::TagEni => Recipe { away: |scene| scene.leak_an_eni(), hurry: 2_000, ..PLAIN },
        Effect::Checkpoint => Recipe { arrivals: &[1, 2], ..a_burst },
        Effect::Compact => Recipe { away: |scene| scene.lengthen_the_journal(), ..PLAIN },
        Effect::Settle => Recipe { away: |scene| scene.delete_a_pod(), ..PLAIN },
    }
}
