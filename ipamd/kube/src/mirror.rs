//! What is kept of a collection: by uid, no more than counts, and no more than a bound. Pure.

use std::collections::BTreeMap;

use crate::watch::Change;

/// What is kept of one collection.
#[derive(Debug)]
pub struct Mirror<T> {
    kept: BTreeMap<String, T>,
    /// What the list under way has shown so far.
    listing: Option<BTreeMap<String, T>>,
    synced: bool,
    most: usize,
}

impl<T> Mirror<T> {
    pub fn new(most: usize) -> Self {
        Self { kept: BTreeMap::new(), listing: None, synced: false, most }
    }

    /// `keep` takes of an object what is kept of it, with its uid, or nothing if it does not count.
    pub fn apply<O>(&mut self, change: Change<O>, uid: impl Fn(&O) -> &str, keep: impl FnOnce(O) -> Option<T>) {
        match change {
            Change::Listing => self.listing = Some(BTreeMap::new()),
            Change::Seen(object) => {
                let uid = uid(&object).to_owned();
                let kept = self.listing.as_mut().unwrap_or(&mut self.kept);
                match keep(object) {
                    Some(part) if kept.len() < self.most || kept.contains_key(&uid) => {
                        kept.insert(uid, part);
                    }
                    _ => {
                        kept.remove(&uid);
                    }
                }
            }
            Change::Gone(uid) => {
                self.kept.remove(&uid);
            }
            Change::Listed => {
                self.kept = self.listing.take().unwrap_or_default();
                self.synced = true;
            }
        }
    }

    /// It has been seen whole at least once; before that it says nothing.
    pub fn synced(&self) -> Option<&BTreeMap<String, T>> {
        self.synced.then_some(&self.kept)
    }

    /// Of a collection of one.
    pub fn only(&self) -> Option<&T> {
        self.kept.values().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(mirror: &mut Mirror<u32>, change: Change<(&'static str, u32)>) {
        mirror.apply(change, |object| object.0, |object| (object.1 > 0).then_some(object.1));
    }

    fn values(mirror: &Mirror<u32>) -> Option<Vec<u32>> {
        mirror.synced().map(|kept| kept.values().copied().collect())
    }

    #[test]
    fn a_list_replaces_what_was_known_and_a_cut_one_does_not() {
        let mut mirror = Mirror::new(10);
        assert_eq!(values(&mirror), None, "before the first list nothing is known");
        for change in [Change::Listing, Change::Seen(("a", 1)), Change::Seen(("b", 2)), Change::Listed] {
            apply(&mut mirror, change);
        }
        assert_eq!(values(&mirror), Some(vec![1, 2]));
        apply(&mut mirror, Change::Listing);
        apply(&mut mirror, Change::Seen(("c", 3)));
        assert_eq!(values(&mirror), Some(vec![1, 2]), "a list under way changes nothing");
        for change in [Change::Listing, Change::Seen(("b", 4)), Change::Listed] {
            apply(&mut mirror, change);
        }
        assert_eq!(values(&mirror), Some(vec![4]));
        apply(&mut mirror, Change::Gone("b".to_owned()));
        assert_eq!(values(&mirror), Some(vec![]));
    }

    #[test]
    fn what_no_longer_counts_is_let_go_and_no_more_is_kept_than_the_bound() {
        let mut mirror = Mirror::new(2);
        apply(&mut mirror, Change::Listing);
        apply(&mut mirror, Change::Listed);
        for change in [("a", 1), ("b", 2), ("c", 3), ("a", 5)] {
            apply(&mut mirror, Change::Seen(change));
        }
        assert_eq!(values(&mirror), Some(vec![5, 2]));
        apply(&mut mirror, Change::Seen(("a", 0)));
        assert_eq!(values(&mirror), Some(vec![2]));
    }
}
