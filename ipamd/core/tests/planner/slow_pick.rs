//! What `pick` should say, found the slow way: every address of every candidate, sorted.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flatwire_core::ids::Time;
use flatwire_core::pick::{Candidate, Occupancy};

/// The address to give, and whether it is still cooling: every address of every candidate, the best by plain comparison.
pub fn pick(
    candidates: &[Candidate],
    occupancy: &BTreeMap<IpAddr, Occupancy>,
    freed: &BTreeMap<IpAddr, Time>,
    yields: bool,
) -> Option<(IpAddr, bool)> {
    let is = |address: &IpAddr| occupancy.get(address).copied().unwrap_or(Occupancy::Free);
    let mut free = Vec::new();
    let mut cooling = Vec::new();
    for candidate in candidates {
        let all: Vec<IpAddr> = match candidate.slot {
            ipnet::IpNet::V4(net) => (0..1u32 << (32 - net.prefix_len()))
                .map(|n| IpAddr::V4((u32::from(net.network()) + n).into()))
                .collect(),
            ipnet::IpNet::V6(_) => Vec::new(),
        };
        let used = i64::try_from(all.iter().filter(|address| is(address) == Occupancy::Used).count()).unwrap();
        for address in all {
            let rested = freed.get(&address).copied().unwrap_or(Time(0));
            match is(&address) {
                Occupancy::Free => {
                    free.push((-used, -i64::from(candidate.eni_pods), candidate.device, rested, address));
                }
                Occupancy::Cooling(at) => cooling.push((at, address)),
                Occupancy::Used => {}
            }
        }
    }
    free.sort();
    cooling.sort();
    let rested = free.first().map(|(_, _, _, _, address)| (*address, false));
    rested.or(cooling.first().filter(|_| yields).map(|(_, address)| (*address, true)))
}
