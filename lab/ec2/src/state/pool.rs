//! The addresses of one subnet as a bitmap: which are taken, which are set aside by reservations, which may be picked.
//!
//! Picks are random, as EC2's are: that is what fragments a subnet until no aligned /28 is free.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::rng::Rng;

/// Addresses in a prefix that an ENI can hold.
pub(crate) const PREFIX_LEN: u8 = 28;
pub(crate) const PREFIX_SIZE: u32 = 16;
/// The first four addresses and the last one belong to AWS.
pub(crate) const RESERVED_AT_START: u32 = 4;

/// One subnet's addresses. An address is an offset from the start of the subnet in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddressPool {
    cidr: Ipv4Net,
    taken: Bits,
    /// Set aside by any reservation: never picked for a single address.
    reserved: Bits,
    /// Set aside for prefixes.
    for_prefixes: Bits,
}

/// Why an address cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Outside,
    Reserved,
    Taken,
}

/// What a CIDR reservation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservationKind {
    /// EC2 takes prefixes from it.
    Prefix,
    /// Nothing is picked from it; addresses must be named.
    Explicit,
}

impl AddressPool {
    /// `cidr` is /16 to /28, with no bits below its mask.
    pub(crate) fn new(cidr: Ipv4Net) -> Self {
        let size = 1u32 << (32 - u32::from(cidr.prefix_len()));
        let mut pool = Self { cidr, taken: Bits::new(size), reserved: Bits::new(size), for_prefixes: Bits::new(size) };
        for offset in (0..RESERVED_AT_START).chain([size - 1]) {
            pool.taken.set(offset, true);
        }
        pool
    }

    fn size(&self) -> u32 {
        self.taken.len
    }

    fn offset(&self, address: Ipv4Addr) -> Option<u32> {
        self.cidr.contains(&address).then(|| u32::from(address) - u32::from(self.cidr.network()))
    }

    fn at(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.cidr.network()) + offset)
    }

    fn is_aws(&self, offset: u32) -> bool {
        offset < RESERVED_AT_START || offset == self.size() - 1
    }

    /// What `AvailableIpAddressCount` shows: neither taken nor set aside.
    pub(crate) fn available(&self) -> u32 {
        self.taken.count_clear_in_both(&self.reserved)
    }

    /// Every address that is not taken, set aside or not.
    pub(crate) fn free(&self) -> u32 {
        self.size() - self.taken.count()
    }

    pub(crate) fn check(&self, address: Ipv4Addr) -> Result<(), Refused> {
        let offset = self.offset(address).ok_or(Refused::Outside)?;
        if self.is_aws(offset) {
            Err(Refused::Reserved)
        } else if self.taken.get(offset) {
            Err(Refused::Taken)
        } else {
            Ok(())
        }
    }

    /// Takes a named address; reservations do not stand in its way.
    pub(crate) fn take(&mut self, address: Ipv4Addr) -> Result<(), Refused> {
        self.check(address)?;
        let offset = self.offset(address).ok_or(Refused::Outside)?;
        self.taken.set(offset, true);
        Ok(())
    }

    /// Takes a named prefix, which the caller has checked to be an aligned /28.
    pub(crate) fn take_prefix(&mut self, prefix: Ipv4Net) -> Result<(), Refused> {
        let start = self.offset(prefix.network()).ok_or(Refused::Outside)?;
        let block = start..start + PREFIX_SIZE;
        if block.clone().any(|offset| self.is_aws(offset)) {
            return Err(Refused::Reserved);
        }
        if block.clone().any(|offset| self.taken.get(offset)) {
            return Err(Refused::Taken);
        }
        block.for_each(|offset| self.taken.set(offset, true));
        Ok(())
    }

    pub(crate) fn give(&mut self, address: Ipv4Addr) {
        if let Some(offset) = self.offset(address).filter(|offset| !self.is_aws(*offset)) {
            self.taken.set(offset, false);
        }
    }

    pub(crate) fn give_prefix(&mut self, prefix: Ipv4Net) {
        if let Some(start) = self.offset(prefix.network()) {
            (start..start + PREFIX_SIZE).for_each(|offset| self.taken.set(offset, false));
        }
    }

    /// A random free address outside every reservation.
    pub(crate) fn pick(&mut self, rng: &mut Rng) -> Option<Ipv4Addr> {
        let nth = rng.below(self.available());
        let offset = self.taken.nth_clear_in_both(&self.reserved, nth)?;
        self.taken.set(offset, true);
        Some(self.at(offset))
    }

    /// A random free /28: inside a prefix reservation if there is one left, else outside every reservation.
    pub(crate) fn pick_prefix(&mut self, rng: &mut Rng) -> Option<Ipv4Net> {
        let free: Vec<u32> =
            (0..self.size() / PREFIX_SIZE).map(|n| n * PREFIX_SIZE).filter(|b| self.taken.block(*b) == 0).collect();
        let reserved: Vec<u32> = free.iter().copied().filter(|b| self.for_prefixes.block(*b) == u16::MAX).collect();
        let open: Vec<u32> = free.into_iter().filter(|b| self.reserved.block(*b) == 0).collect();
        let from = if reserved.is_empty() { open } else { reserved };
        let choice = rng.below(u32::try_from(from.len()).ok()?);
        let start = *from.get(usize::try_from(choice).ok()?)?;
        let prefix = Ipv4Net::new(self.at(start), PREFIX_LEN).ok()?;
        self.take_prefix(prefix).ok()?;
        Some(prefix)
    }

    /// Sets aside what the reservations name, and nothing else.
    pub(crate) fn reserve(&mut self, reservations: impl Iterator<Item = (Ipv4Net, ReservationKind)>) {
        self.reserved = Bits::new(self.size());
        self.for_prefixes = Bits::new(self.size());
        for (range, kind) in reservations {
            let Some(start) = self.offset(range.network()) else { continue };
            for offset in start..start + (1u32 << (32 - u32::from(range.prefix_len()))) {
                self.reserved.set(offset, true);
                if kind == ReservationKind::Prefix {
                    self.for_prefixes.set(offset, true);
                }
            }
        }
    }
}

/// A fixed row of bits, in words of sixteen: one word is one /28.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bits {
    words: Vec<u16>,
    len: u32,
}

fn place(offset: u32) -> (usize, u16) {
    let word = usize::try_from(offset / PREFIX_SIZE).expect("invariant: a subnet has at most 2^16 addresses");
    (word, 1u16 << (offset % PREFIX_SIZE))
}

impl Bits {
    fn new(len: u32) -> Self {
        let (words, _) = place(len);
        Self { words: vec![0; words], len }
    }

    fn get(&self, offset: u32) -> bool {
        let (word, bit) = place(offset);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    fn set(&mut self, offset: u32, value: bool) {
        let (word, bit) = place(offset);
        if let Some(w) = self.words.get_mut(word) {
            if value {
                *w |= bit;
            } else {
                *w &= !bit;
            }
        }
    }

    /// The sixteen bits from `offset`, which is a multiple of sixteen.
    fn block(&self, offset: u32) -> u16 {
        let (word, _) = place(offset);
        self.words.get(word).copied().unwrap_or(u16::MAX)
    }

    fn count(&self) -> u32 {
        self.words.iter().map(|w| w.count_ones()).sum()
    }

    fn count_clear_in_both(&self, other: &Self) -> u32 {
        self.words.iter().zip(&other.words).map(|(a, b)| (a | b).count_zeros()).sum()
    }

    fn nth_clear_in_both(&self, other: &Self, mut nth: u32) -> Option<u32> {
        let mut start = 0;
        for (a, b) in self.words.iter().zip(&other.words) {
            let used = a | b;
            let clear = used.count_zeros();
            if nth < clear {
                return (start..start + PREFIX_SIZE)
                    .filter(|offset| used & place(*offset).1 == 0)
                    .nth(usize::try_from(nth).ok()?);
            }
            nth -= clear;
            start += PREFIX_SIZE;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use crate::rng::Rng;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn fresh_subnets_have_the_published_counts() {
        for (cidr, available) in
            [("10.0.0.0/16", 65_531), ("10.0.0.0/24", 251), ("10.0.1.64/26", 59), ("10.0.0.16/28", 11)]
        {
            assert_eq!(AddressPool::new(net(cidr)).available(), available, "{cidr}");
        }
    }

    #[test]
    fn a_full_subnet_gives_each_address_once_and_never_a_reserved_one() {
        let (mut pool, mut rng) = (AddressPool::new(net("10.0.0.0/26")), Rng::new(1));
        let picked: Vec<_> = std::iter::from_fn(|| pool.pick(&mut rng)).collect();
        assert_eq!(picked.len(), 59);
        assert_eq!(picked.iter().collect::<BTreeSet<_>>().len(), 59);
        assert!(!picked.is_sorted(), "EC2 does not pick in sequence");
        let aws = ["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.63"];
        assert!(aws.iter().all(|a| !picked.contains(&a.parse().unwrap())));
        assert_eq!(pool.available(), 0);
    }

    #[test]
    fn the_first_and_last_prefix_of_a_subnet_are_not_to_be_had() {
        let (mut pool, mut rng) = (AddressPool::new(net("10.0.0.0/26")), Rng::new(1));
        let picked: BTreeSet<_> = std::iter::from_fn(|| pool.pick_prefix(&mut rng)).collect();
        assert_eq!(picked, BTreeSet::from([net("10.0.0.16/28"), net("10.0.0.32/28")]));
        assert_eq!(pool.available(), 59 - 32);
        assert_eq!(AddressPool::new(net("10.0.0.0/28")).pick_prefix(&mut rng), None);
        assert_eq!(pool.take_prefix(net("10.0.0.0/28")), Err(Refused::Reserved));
        assert_eq!(pool.take_prefix(net("10.0.0.16/28")), Err(Refused::Taken));
        assert_eq!(pool.take_prefix(net("10.0.1.16/28")), Err(Refused::Outside));
    }

    #[test]
    fn reservations_keep_single_addresses_out_and_prefixes_in() {
        let (mut pool, mut rng) = (AddressPool::new(net("10.0.0.0/24")), Rng::new(3));
        pool.reserve(
            [(net("10.0.0.128/26"), ReservationKind::Prefix), (net("10.0.0.64/27"), ReservationKind::Explicit)]
                .into_iter(),
        );
        assert_eq!(pool.available(), 251 - 64 - 32);
        for _ in 0..4 {
            assert!(net("10.0.0.128/26").contains(&pool.pick_prefix(&mut rng).unwrap()));
        }
        assert!(!net("10.0.0.128/26").contains(&pool.pick_prefix(&mut rng).unwrap()));
        let singles: Vec<_> = std::iter::from_fn(|| pool.pick(&mut rng)).collect();
        assert!(singles.iter().all(|a| !net("10.0.0.64/27").contains(a)));
        assert_eq!(pool.available(), 0);
        assert_eq!(pool.free(), 32);
        assert_eq!(pool.take("10.0.0.64".parse().unwrap()), Ok(()));
        pool.reserve(std::iter::empty());
        assert_eq!(pool.available(), 31);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Pick,
        PickPrefix,
        Take(u32),
        TakePrefix(u32),
        Give(usize),
        GivePrefix(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Pick),
            2 => Just(Step::PickPrefix),
            1 => (0u32..140).prop_map(Step::Take),
            1 => (0u32..10).prop_map(Step::TakePrefix),
            2 => (0usize..64).prop_map(Step::Give),
            1 => (0usize..8).prop_map(Step::GivePrefix),
        ]
    }

    proptest! {
        /// The reference is a plain set of taken addresses.
        #[test]
        fn the_bitmap_agrees_with_a_plain_set(seed in any::<u64>(), steps in prop::collection::vec(step(), 1..200)) {
            let cidr = net("10.0.0.0/25");
            let base = u32::from(cidr.network());
            let aws = |a: Ipv4Addr| u32::from(a) < base + 4 || u32::from(a) == base + 127;
            let (mut pool, mut rng) = (AddressPool::new(cidr), Rng::new(seed));
            let mut singles: Vec<Ipv4Addr> = Vec::new();
            let mut prefixes: Vec<Ipv4Net> = Vec::new();
            let holds = |singles: &[Ipv4Addr], prefixes: &[Ipv4Net], a: Ipv4Addr| {
                singles.contains(&a) || prefixes.iter().any(|p| p.contains(&a))
            };
            let block_free = |singles: &[Ipv4Addr], prefixes: &[Ipv4Net], p: Ipv4Net| {
                (0..16).map(|n| Ipv4Addr::from(u32::from(p.network()) + n))
                    .all(|a| cidr.contains(&a) && !aws(a) && !holds(singles, prefixes, a))
            };
            let blocks = |n: u32| Ipv4Net::new(Ipv4Addr::from(base + n * 16), 28).unwrap();
            for step in steps {
                match step {
                    Step::Pick => match pool.pick(&mut rng) {
                        Some(a) => {
                            prop_assert!(cidr.contains(&a) && !aws(a) && !holds(&singles, &prefixes, a));
                            singles.push(a);
                        }
                        None => prop_assert_eq!(singles.len() + prefixes.len() * 16, 123),
                    },
                    Step::PickPrefix => match pool.pick_prefix(&mut rng) {
                        Some(p) => {
                            prop_assert!(block_free(&singles, &prefixes, p));
                            prefixes.push(p);
                        }
                        None => prop_assert!((0..8).all(|n| !block_free(&singles, &prefixes, blocks(n)))),
                    },
                    Step::Take(n) => {
                        let a = Ipv4Addr::from(base + n);
                        let want = cidr.contains(&a) && !aws(a) && !holds(&singles, &prefixes, a);
                        prop_assert_eq!(pool.take(a).is_ok(), want);
                        if want { singles.push(a); }
                    }
                    Step::TakePrefix(n) => {
                        let want = block_free(&singles, &prefixes, blocks(n));
                        prop_assert_eq!(pool.take_prefix(blocks(n)).is_ok(), want);
                        if want { prefixes.push(blocks(n)); }
                    }
                    Step::Give(n) if n < singles.len() => pool.give(singles.swap_remove(n)),
                    Step::GivePrefix(n) if n < prefixes.len() => pool.give_prefix(prefixes.swap_remove(n)),
                    Step::Give(_) | Step::GivePrefix(_) => {}
                }
                let taken = u32::try_from(singles.len() + prefixes.len() * 16).unwrap();
                prop_assert_eq!(pool.available(), 123 - taken);
                prop_assert_eq!(pool.free(), 123 - taken);
            }
        }
    }
}
