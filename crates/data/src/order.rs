//! The order of rows: shuffled anew every epoch, computable at any place, and a fair split.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A pseudorandom bijection of `0..len`, computed entry by entry.
///
/// Nothing is stored, so a resumed run is at its place at once. A Feistel network over the next
/// even power of two, walked until the value is in range (Black and Rogaway, "Ciphers with
/// Arbitrary Finite Domains", 2002).
///
/// ```
/// # use retune_data::order::Permutation;
/// let mut order: Vec<_> = Permutation::new(5, 42, 0).iter().collect();
/// order.sort();
/// assert_eq!(order, [0, 1, 2, 3, 4]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    key: u64,
}

const ROUNDS: u64 = 8;

impl Permutation {
    /// Makes the bijection of a seed and an epoch.
    pub fn new(len: usize, seed: u64, epoch: u64) -> Self {
        let bits = usize::BITS - len.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        // The key of an epoch is not the next seed's key of the epoch before.
        let key = mix(mix(seed).wrapping_add(epoch));
        Self { len: len as u64, half_bits, key }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// When `index` is not below the length.
    pub fn get(&self, index: usize) -> usize {
        assert!((index as u64) < self.len, "index {index} of a permutation of {}", self.len);
        let mut value = index as u64;
        loop {
            value = self.network(value);
            if value < self.len {
                return value as usize;
            }
        }
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + use<> {
        let this = *self;
        (0..this.len as usize).map(move |index| this.get(index))
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let scrambled = mix(self.key ^ mix(round << 56 | right));
            (left, right) = (right, left ^ (scrambled & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64: every input bit changes every output bit with even odds.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The order of rows over epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The number of rows.
    pub rows: usize,
    /// What the shuffling starts from.
    pub seed: u64,
    /// Whether rows are shuffled anew each epoch; otherwise they come as they stand.
    pub shuffle: bool,
}

impl Order {
    /// The rows of one epoch, in order.
    pub fn epoch(&self, epoch: u64) -> impl Iterator<Item = usize> + use<> {
        let order = *self;
        let shuffled = Permutation::new(order.rows, order.seed, epoch);
        (0..order.rows).map(move |at| if order.shuffle { shuffled.get(at) } else { at })
    }

    /// The row at one place.
    ///
    /// # Panics
    /// When `position` is not below the number of rows.
    pub fn row(&self, epoch: u64, position: usize) -> usize {
        if self.shuffle {
            Permutation::new(self.rows, self.seed, epoch).get(position)
        } else {
            assert!(position < self.rows, "position {position} of {} rows", self.rows);
            position
        }
    }
}

/// A place in the data, as a checkpoint keeps it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cursor {
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// The next batch within the epoch, counted from 0.
    pub position: u64,
}

impl Cursor {
    /// Goes one batch on; into the next epoch after the last of `batches`.
    pub fn advance(&mut self, batches: usize) {
        self.position += 1;
        if self.position >= batches as u64 {
            *self = Self { epoch: self.epoch + 1, position: 0 };
        }
    }
}

/// How much of a data set is held back for validation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// A fraction of the rows, above 0 and below 1.
    Fraction(f64),
    /// A number of rows.
    Rows(usize),
}

/// Which rows are trained on and which are held back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// Rows to train on, ascending.
    pub train: Vec<u32>,
    /// Rows held back, ascending.
    pub validation: Vec<u32>,
}

/// Holds rows back by a seeded hash of their content, so that it does not matter where in the file
/// a row stands, and equal rows are all on one side.
///
/// `contents` holds a hash of each row's content. The count is met exactly unless equal rows at the
/// border make it larger.
///
/// # Errors
/// [`Error::Setting`] when the part is not one, or either side would be empty.
pub fn split(contents: &[u64], held: Held, seed: u64) -> Result<Split> {
    let refuse = |problem: String, hint: &str| Error::Setting {
        setting: "validation",
        problem,
        hint: hint.to_owned(),
    };
    let rows = contents.len();
    let wanted = match held {
        Held::Rows(wanted) => wanted,
        Held::Fraction(part) if part > 0.0 && part < 1.0 => {
            ((rows as f64 * part).round() as usize).max(1)
        }
        Held::Fraction(part) => {
            return Err(refuse(
                format!("{part} is not a part of the rows"),
                "set a fraction above 0 and below 1, or a number of rows",
            ));
        }
    };
    let mut groups: BTreeMap<(u64, u64), Vec<u32>> = BTreeMap::new();
    for (row, &content) in contents.iter().enumerate() {
        groups.entry((mix(content ^ mix(seed)), content)).or_default().push(row as u32);
    }
    let mut split = Split::default();
    for group in groups.into_values() {
        if split.validation.len() < wanted {
            split.validation.extend(group);
        } else {
            split.train.extend(group);
        }
    }
    if split.train.is_empty() || split.validation.is_empty() {
        return Err(refuse(
            format!(
                "holding back {wanted} of {rows} rows (equal rows stay together) leaves {} to train \
                 on and {} to validate",
                split.train.len(),
                split.validation.len()
            ),
            "hold back fewer rows, or name a validation file",
        ));
    }
    split.train.sort_unstable();
    split.validation.sort_unstable();
    Ok(split)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_permutation_hits_everything_once(len in 0usize..700, seed: u64, epoch in 0u64..5) {
            let mut seen: Vec<usize> = Permutation::new(len, seed, epoch).iter().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn equal_rows_stay_on_one_side(
            contents in proptest::collection::vec(0u64..30, 2..100),
            wanted in 1usize..20,
            seed: u64,
        ) {
            if let Ok(split) = split(&contents, Held::Rows(wanted), seed) {
                prop_assert!(split.validation.len() >= wanted);
                for &v in &split.validation {
                    for &t in &split.train {
                        prop_assert_ne!(contents[v as usize], contents[t as usize]);
                    }
                }
                let mut all = [split.train, split.validation].concat();
                all.sort_unstable();
                prop_assert_eq!(all, (0..contents.len() as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn every_place_is_equally_likely() {
        // 6 entries, 6000 seeds: each (index, value) pair is expected 1000 times; the standard
        // deviation is sqrt(6000 * 1/6 * 5/6) = 28.9, and 150 is over five of them.
        let mut counts = [[0i32; 6]; 6];
        for seed in 0..6000 {
            for (index, value) in Permutation::new(6, seed, 0).iter().enumerate() {
                counts[index][value] += 1;
            }
        }
        for row in counts {
            for count in row {
                assert!((count - 1000).abs() < 150, "{counts:?}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let order =
            |seed, epoch| Order { rows: 50, seed, shuffle: true }.epoch(epoch).collect::<Vec<_>>();
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 1), order(2, 0));
        let plain = Order { rows: 4, seed: 1, shuffle: false };
        assert_eq!(plain.epoch(3).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    // users-want 2.2.12
    #[test]
    fn resuming_needs_no_fast_forward() {
        let order = Order { rows: 1000, seed: 9, shuffle: true };
        let whole: Vec<usize> = order.epoch(2).collect();
        for position in [0, 1, 517, 999] {
            assert_eq!(order.row(2, position), whole[position]);
        }
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        // From a second implementation, in Python. A resumed run must see the order of the run that
        // was stopped, so these numbers may never change.
        let order: Vec<usize> = Permutation::new(10, 42, 0).iter().collect();
        assert_eq!(order, [0, 6, 9, 1, 8, 3, 4, 2, 5, 7]);
    }

    #[test]
    fn the_cursor_walks_batches_and_epochs() {
        let mut cursor = Cursor::default();
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.push((cursor.epoch, cursor.position));
            cursor.advance(2);
        }
        assert_eq!(seen, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]);
    }

    #[test]
    fn the_split_takes_what_is_asked_whatever_the_order() {
        let contents: Vec<u64> = (0..100).map(|i| i * 7919).collect();
        let split_of = |contents: &[u64]| split(contents, Held::Fraction(0.1), 3).unwrap();
        let forward = split_of(&contents);
        assert_eq!((forward.validation.len(), forward.train.len()), (10, 90));
        let backward = split_of(&contents.iter().rev().copied().collect::<Vec<_>>());
        let mut mirrored: Vec<u32> = backward.validation.iter().map(|row| 99 - row).collect();
        mirrored.sort_unstable();
        assert_eq!(forward.validation, mirrored);
        assert_ne!(split(&contents, Held::Fraction(0.1), 4).unwrap(), forward);
    }

    #[test]
    fn splits_that_leave_a_side_empty_are_refused() {
        for (contents, held) in [
            (vec![1, 2], Held::Rows(2)),
            (vec![1, 2], Held::Rows(0)),
            (vec![5, 5, 5], Held::Rows(1)),
            (vec![1, 2], Held::Fraction(1.0)),
            (vec![1, 2], Held::Fraction(f64::NAN)),
            (vec![1], Held::Fraction(0.5)),
        ] {
            assert!(split(&contents, held, 0).is_err(), "{contents:?} {held:?}");
        }
    }
}
