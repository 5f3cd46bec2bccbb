//! The random numbers of NumPy's default generator, so that what PEFT makes from them can be made
//! again.
//!
//! PCG XSL RR 128/64 (O'Neill 2014), seeded through NumPy's `SeedSequence`.

/// `numpy.random.default_rng(seed)`.
#[derive(Debug, Clone)]
pub struct NumpyGenerator {
    state: u128,
    increment: u128,
    /// The upper half of the last 64 bits, where only the lower one was used.
    half: Option<u32>,
}

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

impl NumpyGenerator {
    /// Seeds the generator.
    pub fn new(seed: u64) -> Self {
        let words = seed_words(seed);
        let pair = |at: usize| (u128::from(words[at]) << 64) | u128::from(words[at + 1]);
        let increment = (pair(2) << 1) | 1;
        let state = increment.wrapping_add(pair(0));
        let state = state.wrapping_mul(MULTIPLIER).wrapping_add(increment);
        Self { state, increment, half: None }
    }

    fn bits64(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    fn bits32(&mut self) -> u32 {
        if let Some(half) = self.half.take() {
            return half;
        }
        let bits = self.bits64();
        self.half = Some((bits >> 32) as u32);
        bits as u32
    }

    /// Draws from `0..=top` as NumPy's `random_interval`: bits below a mask until they fit.
    fn interval(&mut self, top: u64) -> u64 {
        if top == 0 {
            return 0;
        }
        let mask = u64::MAX >> top.leading_zeros();
        loop {
            let bits =
                if u32::try_from(top).is_ok() { u64::from(self.bits32()) } else { self.bits64() };
            if bits & mask <= top {
                return bits & mask;
            }
        }
    }

    /// Draws from `0..=top` as NumPy's `random_bounded_uint64` without a mask (Lemire).
    fn bounded(&mut self, top: u64) -> u64 {
        if top == 0 {
            return 0;
        }
        if top <= 0xffff_ffff {
            if top == 0xffff_ffff {
                return u64::from(self.bits32());
            }
            let count = top + 1;
            let mut product = u64::from(self.bits32()) * count;
            if (product & 0xffff_ffff) < count {
                let least = (0xffff_ffff - top) % count;
                while (product & 0xffff_ffff) < least {
                    product = u64::from(self.bits32()) * count;
                }
            }
            return product >> 32;
        }
        let count = u128::from(top) + 1;
        let mut product = u128::from(self.bits64()) * count;
        if u128::from(product as u64) < count {
            let least = (u128::from(u64::MAX - top)) % count;
            while u128::from(product as u64) < least {
                product = u128::from(self.bits64()) * count;
            }
        }
        (product >> 64) as u64
    }

    /// Puts `items` into a random order, as `rng.shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let other = self.interval(i as u64) as usize;
            items.swap(i, other);
        }
    }

    /// Chooses `count` different numbers below `n`, as `rng.choice(n, count, replace=False)`.
    pub fn choice(&mut self, n: usize, count: usize) -> Vec<u32> {
        // NumPy shuffles the end of a long range where much of it is asked for, else samples as
        // Floyd does.
        if n <= 10_000 || count <= n / 50 {
            return self.floyd(n, count);
        }
        let mut range: Vec<u32> = (0..n as u32).collect();
        for i in (n.saturating_sub(count).max(1)..n).rev() {
            let other = self.bounded(i as u64) as usize;
            range.swap(i, other);
        }
        range.split_off(n - count)
    }

    fn floyd(&mut self, n: usize, count: usize) -> Vec<u32> {
        let mut seen = std::collections::BTreeSet::new();
        let mut chosen = Vec::with_capacity(count);
        for top in n - count..n {
            let drawn = self.bounded(top as u64) as u32;
            let taken = if seen.insert(drawn) { drawn } else { top as u32 };
            seen.insert(taken);
            chosen.push(taken);
        }
        for i in (1..count).rev() {
            let other = self.bounded(i as u64) as usize;
            chosen.swap(i, other);
        }
        chosen
    }
}

/// Returns `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_words(seed: u64) -> [u64; 4] {
    const XSHIFT: u32 = 16;
    let mut constant = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ (value >> XSHIFT)
    };
    let mix = |x: u32, y: u32| {
        let mixed = 0xca01_f9dd_u32.wrapping_mul(x).wrapping_sub(0x4973_f715_u32.wrapping_mul(y));
        mixed ^ (mixed >> XSHIFT)
    };
    // A seed of 32 bits is one word of entropy, a longer one two.
    let entropy = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut pool = entropy.map(&mut hash);
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                pool[target] = mix(pool[target], hash(pool[source]));
            }
        }
    }
    let mut constant = 0x8b51_f9dd_u32;
    let mut next = |place: usize| {
        let value = pool[place % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        u64::from(value ^ (value >> XSHIFT))
    };
    std::array::from_fn(|word| {
        let low = next(2 * word);
        low | (next(2 * word + 1) << 32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // What `numpy.random.default_rng(seed)` is followed by, as NumPy's documentation prints it.
    #[test]
    fn sixty_four_bits_are_numpys() {
        let unit = |bits: u64| (bits >> 11) as f64 / (1_u64 << 53) as f64;
        let mut generator = NumpyGenerator::new(42);
        let found: Vec<f64> = (0..3).map(|_| unit(generator.bits64())).collect();
        for (f, e) in found.iter().zip([0.773_956_05, 0.438_878_44, 0.858_597_92]) {
            assert!((f - e).abs() < 1e-8, "{found:?}");
        }
    }

    #[test]
    fn a_choice_has_no_number_twice() {
        for (n, count) in [(20, 20), (20, 3), (20_000, 10), (20_000, 900)] {
            let mut chosen = NumpyGenerator::new(1).choice(n, count);
            assert_eq!(chosen.len(), count);
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), count);
            assert!(chosen.iter().all(|number| (*number as usize) < n));
        }
    }
}
