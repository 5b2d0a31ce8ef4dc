//! Which address does this pod get? The densest prefix first, so that prefixes and ENIs can drain; within it the address
//! that has been free the longest, so that a freed one rests as long as it can.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::families::{IPV6_PREFIX_LEN, IPV6_WINDOW};
use crate::ids::{DeviceIndex, EniId, Time};

/// What EC2 delegates to an ENI slot in IPv4.
pub const PREFIX_LEN: u8 = 28;

/// One slot that may be picked from: trusted, on an ENI whose tables stand in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub slot: IpNet,
    pub eni: EniId,
    pub device: DeviceIndex,
    /// Pods on the ENI.
    pub eni_pods: u32,
}

/// Whether an address may be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occupancy {
    Free,
    /// Freed at that time, still cooling.
    Cooling(Time),
    Used,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    pub address: IpAddr,
    pub eni: EniId,
    /// The address was still cooling: the cool-down yielded to the shortage.
    pub early: bool,
}

/// Picks among `candidates`. With `yield_cooldown`, the longest-cooling address is taken when nothing is free.
pub fn pick(
    candidates: &[Candidate],
    occupancy: impl Fn(&IpAddr) -> Occupancy,
    freed: &BTreeMap<IpAddr, Time>,
    yield_cooldown: bool,
) -> Option<Pick> {
    let mut best: Option<(SlotRank, &Candidate, IpAddr)> = None;
    let mut coolest: Option<(Time, IpAddr, &Candidate)> = None;
    for candidate in candidates {
        let mut used = 0u32;
        let mut free: Option<(Time, IpAddr)> = None;
        for address in addresses(&candidate.slot) {
            match occupancy(&address) {
                Occupancy::Used => used += 1,
                Occupancy::Free => {
                    let key = (freed.get(&address).copied().unwrap_or_default(), address);
                    free = Some(free.map_or(key, |f| f.min(key)));
                    // Nothing comes before what nobody has ever had; how dense a /80 is decides nothing.
                    if key.0 == Time::default() && address.is_ipv6() {
                        break;
                    }
                }
                Occupancy::Cooling(at) => {
                    if coolest.is_none_or(|(t, a, _)| (at, address) < (t, a)) {
                        coolest = Some((at, address, candidate));
                    }
                }
            }
        }
        let Some((freed_at, address)) = free else { continue };
        let rank = SlotRank {
            used: Reverse(used),
            eni_pods: Reverse(candidate.eni_pods),
            device: candidate.device,
            freed_at,
            address,
        };
        if best.as_ref().is_none_or(|(r, _, _)| rank < *r) {
            best = Some((rank, candidate, address));
        }
    }
    if let Some((_, candidate, address)) = best {
        return Some(Pick { address, eni: candidate.eni.clone(), early: false });
    }
    let (_, address, candidate) = coolest.filter(|_| yield_cooldown)?;
    Some(Pick { address, eni: candidate.eni.clone(), early: true })
}

/// Densest slot, then busiest ENI, then lowest device, then longest free, then lowest address.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct SlotRank {
    used: Reverse<u32>,
    eni_pods: Reverse<u32>,
    device: DeviceIndex,
    freed_at: Time,
    address: IpAddr,
}

/// Every address of a slot that pods may get. A /28 has sixteen: EC2 routes its first and last like the others. Of a /80 it is
/// a window at its beginning, for nobody could walk it all.
pub fn addresses(slot: &IpNet) -> impl Iterator<Item = IpAddr> + use<> {
    let (mut v4, mut v6) = (None, None);
    match slot {
        IpNet::V4(net) => v4 = Some(u32::from(net.network())..=u32::from(net.broadcast())),
        IpNet::V6(net) if net.prefix_len() == 128 => v6 = Some((u128::from(net.network()), 0..=0)),
        IpNet::V6(net) => v6 = Some((u128::from(net.network()), 1..=IPV6_WINDOW)),
    }
    let v4 = v4.into_iter().flatten().map(|bits| IpAddr::V4(Ipv4Addr::from(bits)));
    let in_net = |(base, numbers): (u128, std::ops::RangeInclusive<u32>)| {
        numbers.map(move |number| IpAddr::V6(Ipv6Addr::from(base | u128::from(number))))
    };
    v4.chain(v6.into_iter().flat_map(in_net))
}

/// The slot that holds the address: itself, or its /28 or /80.
pub fn slot_of(slots: &BTreeSet<IpNet>, address: &IpAddr) -> Option<IpNet> {
    let single = IpNet::from(*address);
    if slots.contains(&single) {
        return Some(single);
    }
    let prefix = match address {
        IpAddr::V4(v4) => IpNet::V4(Ipv4Net::new(*v4, PREFIX_LEN).ok()?.trunc()),
        IpAddr::V6(v6) => IpNet::V6(Ipv6Net::new(*v6, IPV6_PREFIX_LEN).ok()?.trunc()),
    };
    slots.contains(&prefix).then_some(prefix)
}

/// First and last address of a slot.
pub fn range(slot: &IpNet) -> std::ops::RangeInclusive<IpAddr> {
    slot.network()..=slot.broadcast()
}

/// How many addresses of a slot pods may get.
pub fn size(slot: &IpNet) -> u32 {
    match slot {
        IpNet::V4(net) => 1u32.checked_shl(u32::from(32 - net.prefix_len())).unwrap_or(u32::MAX),
        IpNet::V6(net) if net.prefix_len() == 128 => 1,
        IpNet::V6(_) => IPV6_WINDOW,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(slot: &str, eni: &str, device: u32, eni_pods: u32) -> Candidate {
        Candidate { slot: slot.parse().unwrap(), eni: EniId::new(eni).unwrap(), device: DeviceIndex(device), eni_pods }
    }

    fn used(list: &[&str]) -> impl Fn(&IpAddr) -> Occupancy {
        let list: Vec<IpAddr> = list.iter().map(|a| a.parse().unwrap()).collect();
        move |a| if list.contains(a) { Occupancy::Used } else { Occupancy::Free }
    }

    #[test]
    fn the_densest_prefix_is_filled_first() {
        let c = [candidate("10.0.0.16/28", "eni-a", 0, 1), candidate("10.0.0.32/28", "eni-b", 1, 2)];
        let occupied = used(&["10.0.0.20", "10.0.0.33", "10.0.0.34"]);
        let p = pick(&c, occupied, &BTreeMap::new(), false).unwrap();
        assert_eq!(p.address.to_string(), "10.0.0.32");
        assert_eq!(p.eni.as_str(), "eni-b");
    }

    #[test]
    fn every_address_of_a_prefix_is_given_once_and_then_none() {
        let c = [candidate("10.0.0.16/28", "eni-a", 0, 0)];
        let mut taken: Vec<IpAddr> = Vec::new();
        while let Some(p) =
            pick(&c, |a| if taken.contains(a) { Occupancy::Used } else { Occupancy::Free }, &BTreeMap::new(), true)
        {
            taken.push(p.address);
        }
        assert_eq!(taken.len(), 16);
    }

    #[test]
    fn never_used_before_oldest_freed_before_newest_freed() {
        let c = [candidate("10.0.0.16/32", "eni-a", 0, 0), candidate("10.0.0.17/32", "eni-a", 0, 0)];
        let freed: BTreeMap<IpAddr, Time> =
            [("10.0.0.16".parse().unwrap(), Time(500)), ("10.0.0.17".parse().unwrap(), Time(400))].into();
        assert_eq!(pick(&c, used(&[]), &freed, false).unwrap().address.to_string(), "10.0.0.17");
    }

    #[test]
    fn the_cool_down_yields_only_when_asked_and_oldest_first() {
        let c = [candidate("10.0.0.16/32", "eni-a", 0, 0), candidate("10.0.0.17/32", "eni-a", 0, 0)];
        let cooling = |a: &IpAddr| Occupancy::Cooling(if a.to_string().ends_with("17") { Time(5) } else { Time(9) });
        assert_eq!(pick(&c, cooling, &BTreeMap::new(), false), None);
        let p = pick(&c, cooling, &BTreeMap::new(), true).unwrap();
        assert_eq!((p.address.to_string().as_str(), p.early), ("10.0.0.17", true));
    }
}
