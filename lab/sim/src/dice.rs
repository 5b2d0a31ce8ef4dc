//! Chance, all of it from the seed.

use lab_ec2::Rng;

/// A generator with the questions a world asks of it.
#[derive(Debug, Clone)]
pub struct Dice(Rng);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    /// A generator of its own, so that one part of the world does not shift the chance of another.
    pub fn split(&mut self) -> Self {
        Self(Rng::new(self.0.next()))
    }

    pub fn number(&mut self) -> u64 {
        self.0.next()
    }

    pub fn below(&mut self, bound: u32) -> u32 {
        self.0.below(bound)
    }

    /// Both ends included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.0.next() % (most - least + 1)
    }

    pub fn percent(&mut self, share: u32) -> bool {
        self.0.below(100) < share
    }

    pub fn one_in(&mut self, times: u32) -> bool {
        self.0.below(times) == 0
    }

    /// One of them; the slice is not empty.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let at = self.0.below(u32::try_from(of.len()).unwrap_or(u32::MAX));
        let at = usize::try_from(at).unwrap_or(0);
        of.get(at).expect("invariant: a choice is among one or more")
    }

    /// Any of them; `None` if there is none.
    pub fn any<T>(&mut self, of: impl ExactSizeIterator<Item = T>) -> Option<T> {
        let len = u32::try_from(of.len()).unwrap_or(u32::MAX);
        let at = usize::try_from(self.0.below(len)).unwrap_or(0);
        of.into_iter().nth(at)
    }
}
