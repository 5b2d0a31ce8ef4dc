//! The one source of randomness: splitmix64 from a seed, so that one seed reproduces everything.

/// Not for secrets: the lab's credentials are meant to be guessable by whoever knows the seed.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[expect(clippy::should_implement_trait, reason = "a generator never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        let wide = u128::from(self.next()) * u128::from(bound);
        u32::try_from(wide >> 64).expect("invariant: a product below bound * 2^64 is below bound after the shift")
    }

    /// True once in `of_million` out of a million draws.
    pub fn chance(&mut self, of_million: u32) -> bool {
        self.below(1_000_000) < of_million
    }

    /// 17 hexadecimal digits, as EC2's long ids have them.
    pub(crate) fn hex17(&mut self) -> String {
        format!("0{:016x}", self.next())
    }

    /// In the shape of a UUID, as request ids are.
    pub(crate) fn uuid(&mut self) -> String {
        let (a, b) = (self.next(), self.next());
        format!(
            "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
            a >> 32,
            (a >> 16) & 0xffff,
            a & 0xfff,
            0x8000 | ((b >> 48) & 0x3fff),
            b & 0xffff_ffff_ffff
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_sequence_and_bounds_hold() {
        let (mut a, mut b) = (Rng::new(7), Rng::new(7));
        for bound in [1, 2, 3, 16, 65_536, u32::MAX] {
            let value = a.below(bound);
            assert_eq!(value, b.below(bound));
            assert!(value < bound);
        }
        assert_eq!(a.below(0), 0);
        assert_eq!(a.hex17().len(), 17);
        assert_eq!(a.uuid().len(), 36);
    }
}
