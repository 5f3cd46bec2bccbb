//! Seeded randomness: every draw comes from a stream named by its purpose.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// The seed of a run, from which every stream is derived.
///
/// A stream depends on the seed, its purpose and its numbers (step, layer, …) and on nothing else:
/// not on which other streams were drawn before, nor on the number of threads. So resuming at
/// step 500 needs no replay of the 499 steps before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed(pub u64);

impl Seed {
    /// Opens the stream for `purpose` and the given numbers.
    ///
    /// ```
    /// use retune_core::random::Seed;
    /// let a = Seed(42).stream("dropout", &[7]).uniform();
    /// assert_eq!(a, Seed(42).stream("dropout", &[7]).uniform());
    /// assert_ne!(a, Seed(42).stream("dropout", &[8]).uniform());
    /// ```
    pub fn stream(self, purpose: &str, numbers: &[u64]) -> Random {
        // FNV-1a over the purpose and the numbers; ChaCha spreads what little it leaves alike.
        let mut hash = [0xcbf2_9ce4_8422_2325_u64, 0x8422_2325_cbf2_9ce4];
        let mut take = |byte: u8| {
            hash[0] = (hash[0] ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            hash[1] =
                (hash[1].rotate_left(29) ^ u64::from(byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        };
        purpose.bytes().for_each(&mut take);
        take(0xff);
        numbers.iter().flat_map(|n| n.to_le_bytes()).for_each(&mut take);
        let mut seed = [0_u8; 32];
        seed[..8].copy_from_slice(&self.0.to_le_bytes());
        seed[8..16].copy_from_slice(&hash[0].to_le_bytes());
        seed[16..24].copy_from_slice(&hash[1].to_le_bytes());
        seed[24..].copy_from_slice(&(numbers.len() as u64).to_le_bytes());
        Random(ChaCha8Rng::from_seed(seed))
    }
}

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random(ChaCha8Rng);

impl Random {
    /// Draws 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Draws from `[0, 1)` with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// Draws an index below `bound` without bias.
    ///
    /// # Panics
    /// If `bound` is zero, which is a mistake of the caller.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "cannot draw below zero");
        let bound = bound as u64;
        // Rejecting the ragged end of the range keeps every index equally likely.
        let zone = u64::MAX - (u64::MAX - bound + 1) % bound;
        loop {
            let bits = self.0.next_u64();
            if bits <= zone {
                return (bits % bound) as usize;
            }
        }
    }

    /// Draws from the standard normal distribution by Box and Muller's transform.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Fills `out` with draws from `U(-bound, bound)`.
    pub fn fill_uniform(&mut self, out: &mut [f32], bound: f64) {
        for x in out {
            *x = ((self.uniform() * 2.0 - 1.0) * bound) as f32;
        }
    }

    /// Fills `out` with draws from `N(0, deviation²)`.
    pub fn fill_normal(&mut self, out: &mut [f32], deviation: f64) {
        for x in out {
            *x = (self.normal() * deviation) as f32;
        }
    }

    /// Draws `count` different indices below `bound`, in random order (Floyd's sample, shuffled).
    ///
    /// # Panics
    /// If `count` is above `bound`, which is a mistake of the caller.
    pub fn choose(&mut self, bound: usize, count: usize) -> Vec<usize> {
        assert!(count <= bound, "cannot choose {count} of {bound}");
        let mut chosen = std::collections::BTreeSet::new();
        for top in bound - count..bound {
            let index = self.below(top + 1);
            if !chosen.insert(index) {
                chosen.insert(top);
            }
        }
        let mut order: Vec<usize> = chosen.into_iter().collect();
        self.shuffle(&mut order);
        order
    }

    /// Puts `items` into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_do_not_depend_on_each_other() {
        let first = Seed(1).stream("a", &[]).bits();
        let mut other = Seed(1).stream("b", &[]);
        other.bits();
        assert_eq!(first, Seed(1).stream("a", &[]).bits());
        assert_ne!(first, Seed(1).stream("b", &[]).bits());
        assert_ne!(first, Seed(2).stream("a", &[]).bits());
        // `("ab", [])` and `("a", …)` must not run together.
        assert_ne!(Seed(1).stream("ab", &[]).bits(), Seed(1).stream("a", &[98]).bits());
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut random = Seed(3).stream("moments", &[]);
        let n = 100_000;
        let uniform: f64 = (0..n).map(|_| random.uniform()).sum::<f64>() / f64::from(n);
        assert!((uniform - 0.5).abs() < 0.005, "{uniform}");
        let normal: Vec<f64> = (0..n).map(|_| random.normal()).collect();
        let mean = normal.iter().sum::<f64>() / f64::from(n);
        let variance = normal.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        let mut counts = [0_u32; 7];
        (0..70_000).for_each(|_| counts[random.below(7)] += 1);
        assert!(counts.iter().all(|c| (9_500..10_500).contains(c)), "{counts:?}");
    }

    #[test]
    fn a_choice_has_no_index_twice_and_every_index_is_equally_likely() {
        let mut counts = [0_u32; 5];
        let mut random = Seed(4).stream("choice", &[]);
        for _ in 0..10_000 {
            let chosen = random.choose(5, 2);
            assert_ne!(chosen[0], chosen[1]);
            for index in chosen {
                counts[index] += 1;
            }
        }
        assert!(counts.iter().all(|count| (3_800..4_200).contains(count)), "{counts:?}");
        assert!(random.choose(3, 0).is_empty());
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Seed(9).stream("order", &[]).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
