//! Which families of addresses pods have, and how a pod's second address follows from its first.
//!
//! Only first addresses are picked, cooled and fenced. The second one is a function of the first, so that it is unique,
//! cools and is fenced with it, and no second pool has to agree with the first:
//!
//! | families | first | second |
//! |---|---|---|
//! | IPv4 | an address of an ENI slot | none |
//! | dual stack | an address of an ENI slot | the same ENI's /80, with the IPv4 address in its last 32 bits |
//! | IPv6 | one of the first 1022 of the primary ENI's /80 | for egress to IPv4 only: 169.254.172.0/22 by the same number |
//!
//! EC2 delegates a /80 to one ENI and to nobody else, and IPv4 addresses of one ENI differ, so no two interfaces anywhere have
//! one of these addresses: this is why they are used without duplicate address detection.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// What EC2 delegates to an ENI slot in IPv6.
pub const IPV6_PREFIX_LEN: u8 = 80;
/// Of a /80 that pods get first addresses from, the first so many are used: as many as there are for egress.
pub const IPV6_WINDOW: u32 = 1022;
/// Addresses of pods of IPv6 clusters towards IPv4, meaningful on their node only, as the add-on's.
pub const EGRESS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 172, 0), 22);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Families {
    V4,
    V6 {
        /// Pods reach IPv4 destinations, translated to the node's address.
        egress: bool,
    },
    Dual,
}

impl Families {
    pub fn has_v6(self) -> bool {
        self != Self::V4
    }

    pub fn is_v6_only(self) -> bool {
        matches!(self, Self::V6 { .. })
    }

    /// First addresses are picked from slots like this one.
    pub fn picks_from(self, slot: &IpNet) -> bool {
        matches!((self, slot), (Self::V6 { .. }, IpNet::V6(_)) | (Self::V4 | Self::Dual, IpNet::V4(_)))
    }

    /// The second address of a pod on the ENI that has this /80.
    pub fn second(self, prefix: Option<Ipv6Net>, first: IpAddr) -> Option<IpAddr> {
        match (self, first) {
            (Self::Dual, IpAddr::V4(v4)) => {
                let network = u128::from(prefix?.network());
                Some(IpAddr::V6(Ipv6Addr::from(network | u128::from(u32::from(v4)))))
            }
            (Self::V6 { egress: true }, IpAddr::V6(v6)) => {
                let number = u32::try_from(u128::from(v6) & 0xffff_ffff).ok().filter(|n| *n <= IPV6_WINDOW)?;
                (number > 0).then(|| IpAddr::V4(Ipv4Addr::from(u32::from(EGRESS.network()) + number)))
            }
            _ => None,
        }
    }

    /// The first address that this one would be the second of, on the ENI that has this /80.
    pub fn first(self, prefix: Ipv6Net, second: IpAddr) -> Option<IpAddr> {
        match (self, second) {
            (Self::Dual, IpAddr::V6(v6)) if prefix.contains(&v6) => {
                u32::try_from(u128::from(v6) & 0xffff_ffff).ok().map(|bits| IpAddr::V4(Ipv4Addr::from(bits)))
            }
            (Self::V6 { .. }, IpAddr::V4(v4)) if EGRESS.contains(&v4) => {
                let number = u128::from(u32::from(v4) - u32::from(EGRESS.network()));
                Some(IpAddr::V6(Ipv6Addr::from(u128::from(prefix.network()) | number)))
            }
            _ => None,
        }
    }
}

/// The /80 among an ENI's slots.
pub fn ipv6_prefix(slots: &BTreeSet<IpNet>) -> Option<Ipv6Net> {
    slots.iter().find_map(|slot| match slot {
        IpNet::V6(net) => Some(*net),
        IpNet::V4(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pick;

    #[test]
    fn a_second_address_is_the_firsts_and_leads_back_to_it() {
        let prefix: Ipv6Net = "2600:1f13:0:1:2::/80".parse().unwrap();
        let second = |families: Families, first: &str| families.second(Some(prefix), first.parse().unwrap());
        let v6 = second(Families::Dual, "10.0.18.4").unwrap();
        assert_eq!(v6, "2600:1f13:0:1:2:0:a00:1204".parse::<IpAddr>().unwrap());
        assert!(IpNet::V6(prefix).contains(&v6));
        assert_eq!(Families::Dual.first(prefix, v6), Some("10.0.18.4".parse().unwrap()));
        assert_eq!(Families::Dual.first("2600:1f13:0:1:3::/80".parse().unwrap(), v6), None);
        assert_eq!(Families::Dual.second(None, "10.0.18.4".parse().unwrap()), None);
        assert_eq!(second(Families::V4, "10.0.18.4"), None);

        let only = Families::V6 { egress: true };
        let mut egress: Vec<IpAddr> = Vec::new();
        for first in pick::addresses(&IpNet::V6(prefix)) {
            let second = only.second(Some(prefix), first).unwrap();
            assert_eq!(only.first(prefix, second), Some(first));
            egress.push(second);
        }
        assert_eq!(egress.len(), 1022);
        assert_eq!(egress.first().unwrap().to_string(), "169.254.172.1");
        assert_eq!(egress.last().unwrap().to_string(), "169.254.175.254");
        assert_eq!(only.second(Some(prefix), "2600:1f13:0:1:2:0:1:0".parse().unwrap()), None, "not one of ours");
        assert_eq!(Families::V6 { egress: false }.second(Some(prefix), "2600:1f13:0:1:2::5".parse().unwrap()), None);
    }
}
