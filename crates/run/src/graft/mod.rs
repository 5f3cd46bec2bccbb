//! Grafting: the smallest set of weights that carries what tuning taught.
//!
//! A graft copies a few of the tuned model's values into the base: `base + γ · (tuned - base)` with
//! γ of 0 and 1. Which ones is found by optimising the mask; no weight is trained again.
//!
//! Source: Panigrahi, Saunshi, Zhao and Arora, Task-Specific Skill Localization in Fine-tuned
//! Language Models, 2023, arXiv 2302.06600.
//!
//! [`pair`] is a tuned model beside its base, [`search`](mod@search) the optimisation of the mask,
//! [`sparse`] what is kept of it, [`job`] all of it for a recipe.

pub mod job;
pub mod pair;
pub mod search;
pub mod sparse;
mod state;

pub use state::Keep;

use std::collections::BTreeMap;

/// Entries of weights by name, ascending: where γ is 1.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region(pub BTreeMap<String, Vec<u32>>);

impl Region {
    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Returns whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the entries of one weight.
    pub fn of(&self, weight: &str) -> &[u32] {
        self.0.get(weight).map_or(&[], Vec::as_slice)
    }

    /// Counts the entries both hold.
    pub fn shared(&self, other: &Self) -> usize {
        let both = |(name, mine): (&String, &Vec<u32>)| {
            let theirs = other.of(name);
            mine.iter().filter(|entry| theirs.binary_search(entry).is_ok()).count()
        };
        self.0.iter().map(both).sum()
    }

    /// Computes which share of `other`'s entries this one holds too; 0 where it has none.
    pub fn overlap(&self, other: &Self) -> f64 {
        if other.is_empty() { 0.0 } else { self.shared(other) as f64 / other.len() as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_the_share_of_the_other_region() {
        let region = |a: &[u32], b: &[u32]| {
            Region(BTreeMap::from([("a".to_owned(), a.to_vec()), ("b".to_owned(), b.to_vec())]))
        };
        let (one, other) = (region(&[1, 2, 9], &[]), region(&[2, 3], &[4, 5]));
        assert_eq!((one.len(), one.shared(&other)), (3, 1));
        assert!((one.overlap(&other) - 0.25).abs() < 1e-12);
        assert!((other.overlap(&one) - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(one.overlap(&Region::default()), 0.0);
    }
}
