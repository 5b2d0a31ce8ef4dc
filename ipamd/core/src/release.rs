//! What may be given back? Pure: from what is idle and what is beyond the target, one thing at a time. The fences that come
//! before EC2 is called (the kernel looked at once more, the ledger written) are `pool/release.rs`.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::ids::{DeviceIndex, EniId};
use crate::pick;
use crate::target::{Mode, Target};

/// How long a slot must have served nobody.
pub const SLOT_IDLE_MS: u64 = 60_000;
/// How long an ENI must have served nobody.
pub const ENI_IDLE_MS: u64 = 300_000;
/// Slots given back in one call.
pub const MAX_SLOTS: usize = 16;

/// One slot as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotUse {
    pub slot: IpNet,
    /// For how long nothing in it has been used, cooling, or routed by the kernel; `None` if something is.
    pub idle_ms: Option<u64>,
}

/// One ENI as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EniUse {
    pub eni: EniId,
    pub device: DeviceIndex,
    pub pods: u32,
    /// We made it, so we may delete it.
    pub ours_to_delete: bool,
    /// How long it has been here.
    pub age_ms: u64,
    pub slots: Vec<SlotUse>,
}

impl EniUse {
    fn addresses(&self) -> u32 {
        self.slots.iter().map(|slot| pick::size(&slot.slot)).sum()
    }

    fn idle_for(&self, ms: u64) -> bool {
        self.age_ms >= ms && self.slots.iter().all(|slot| slot.idle_ms.is_some_and(|idle| idle >= ms))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// Slots of one kind: EC2 takes addresses and prefixes in calls of their own.
    Slots {
        eni: EniId,
        slots: BTreeSet<IpNet>,
    },
    Eni(EniId),
}

/// The next thing to give back: a whole ENI before slots, the emptiest and last ENI first so that the others fill up,
/// single addresses before prefixes where prefixes are the mode.
pub fn release(target: &Target, mode: Mode, enis: &[EniUse]) -> Option<Release> {
    let whole = enis.iter().filter(|eni| {
        eni.ours_to_delete && eni.pods == 0 && eni.addresses() <= target.spare && eni.idle_for(ENI_IDLE_MS)
    });
    if let Some(eni) = whole.max_by_key(|eni| eni.device) {
        return Some(Release::Eni(eni.eni.clone()));
    }
    let mut by_emptiness: Vec<&EniUse> = enis.iter().collect();
    by_emptiness.sort_by_key(|eni| (eni.pods, std::cmp::Reverse(eni.device)));
    // What the mode does not take more of goes first, and down to the target: the margin is kept in the other kind.
    let (foreign, native) = ((mode == Mode::Prefixes, target.spare), (mode == Mode::Addresses, target.surplus));
    for (single, surplus) in [foreign, native] {
        for eni in &by_emptiness {
            let slots = idle_slots(eni, single, surplus);
            if !slots.is_empty() {
                return Some(Release::Slots { eni: eni.eni.clone(), slots });
            }
        }
    }
    None
}

/// A node that fell back to single addresses may be full of them: one that serves nobody makes room for sixteen.
pub fn room_for_a_prefix(enis: &[EniUse]) -> Option<Release> {
    let mut by_emptiness: Vec<&EniUse> = enis.iter().collect();
    by_emptiness.sort_by_key(|eni| (eni.pods, std::cmp::Reverse(eni.device)));
    let single = |eni: &&EniUse| {
        let slots = idle_slots(eni, true, 1);
        (!slots.is_empty()).then(|| Release::Slots { eni: eni.eni.clone(), slots })
    };
    by_emptiness.iter().find_map(single)
}

/// The longest idle slots of one kind that fit into the surplus.
fn idle_slots(eni: &EniUse, single: bool, surplus: u32) -> BTreeSet<IpNet> {
    let of_kind = eni.slots.iter().filter(|slot| (pick::size(&slot.slot) == 1) == single);
    let mut idle: Vec<(u64, IpNet)> =
        of_kind.filter_map(|slot| slot.idle_ms.filter(|ms| *ms >= SLOT_IDLE_MS).map(|ms| (ms, slot.slot))).collect();
    idle.sort_by_key(|(ms, slot)| (std::cmp::Reverse(*ms), *slot));
    let mut left = surplus;
    let mut slots = BTreeSet::new();
    for (_, slot) in idle.into_iter().take(MAX_SLOTS) {
        let size = pick::size(&slot);
        if size <= left {
            left -= size;
            slots.insert(slot);
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::{Wanted, Why};

    fn target(surplus: u32, spare: u32) -> Target {
        Target { wanted: Wanted::Enough, needed: 0, surplus, spare, why: Why::Demand { demand: 0, goal: 0, usable: 0 } }
    }

    fn eni(id: &str, device: u32, pods: u32, slots: &[(&str, Option<u64>)]) -> EniUse {
        let slots = slots.iter().map(|(slot, idle_ms)| SlotUse { slot: slot.parse().unwrap(), idle_ms: *idle_ms });
        EniUse {
            eni: EniId::new(id).unwrap(),
            device: DeviceIndex(device),
            pods,
            ours_to_delete: device > 0,
            age_ms: 10 * ENI_IDLE_MS,
            slots: slots.collect(),
        }
    }

    fn slots(release: Option<Release>) -> Vec<String> {
        match release {
            Some(Release::Slots { slots, .. }) => slots.iter().map(ToString::to_string).collect(),
            other => vec![format!("{other:?}")],
        }
    }

    const LONG: Option<u64> = Some(ENI_IDLE_MS);

    #[test]
    fn nothing_beyond_the_target_nothing_given_back() {
        let enis = [eni("eni-a", 0, 0, &[("10.0.0.5/32", LONG)])];
        assert_eq!(release(&target(0, 0), Mode::Addresses, &enis), None);
    }

    #[test]
    fn never_what_is_used_cooling_routed_or_was_so_a_moment_ago() {
        let enis = [eni("eni-a", 0, 2, &[("10.0.0.5/32", None), ("10.0.0.6/32", Some(SLOT_IDLE_MS - 1))])];
        assert_eq!(release(&target(9, 9), Mode::Addresses, &enis), None);
    }

    #[test]
    fn the_longest_idle_of_the_emptiest_eni_first() {
        let enis = [
            eni("eni-a", 0, 5, &[("10.0.0.5/32", LONG), ("10.0.0.6/32", LONG)]),
            eni("eni-b", 1, 1, &[("10.0.0.7/32", Some(70_000)), ("10.0.0.8/32", Some(90_000)), ("10.0.0.9/32", None)]),
        ];
        assert_eq!(slots(release(&target(1, 1), Mode::Addresses, &enis)), ["10.0.0.8/32"]);
        assert_eq!(slots(release(&target(5, 5), Mode::Addresses, &enis)), ["10.0.0.7/32", "10.0.0.8/32"]);
    }

    #[test]
    fn a_prefix_goes_whole_or_not_at_all_and_singles_go_before_it() {
        let enis = [eni("eni-a", 0, 0, &[("10.0.1.0/28", LONG), ("10.0.0.6/32", LONG)])];
        assert_eq!(slots(release(&target(0, 3), Mode::Prefixes, &enis)), ["10.0.0.6/32"]);
        let enis = [eni("eni-a", 0, 0, &[("10.0.1.0/28", LONG)])];
        assert_eq!(release(&target(15, 0), Mode::Prefixes, &enis), None);
        assert_eq!(slots(release(&target(16, 0), Mode::Prefixes, &enis)), ["10.0.1.0/28"]);
    }

    #[test]
    fn an_eni_goes_when_the_target_is_met_without_it_and_only_if_we_made_it() {
        let mut enis = [eni("eni-a", 0, 0, &[]), eni("eni-b", 1, 0, &[("10.0.0.7/32", LONG), ("10.0.0.8/32", LONG)])];
        let id = enis[1].eni.clone();
        assert_eq!(release(&target(0, 2), Mode::Addresses, &enis), Some(Release::Eni(id)));
        assert_eq!(release(&target(0, 1), Mode::Addresses, &enis), None);
        enis[1].ours_to_delete = false;
        assert_eq!(release(&target(0, 2), Mode::Addresses, &enis), None);
    }
}
