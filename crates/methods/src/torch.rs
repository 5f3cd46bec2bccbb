//! The random numbers of PyTorch's generator on the processor, so that what PEFT makes from a seed
//! can be made again.
//!
//! Mersenne Twister (Matsumoto and Nishimura 1998), seeded as by its authors.

const SIZE: usize = 624;
const SHIFT: usize = 397;

/// PyTorch's generator on the processor.
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    state: Box<[u32; SIZE]>,
    next: usize,
}

impl TorchGenerator {
    /// Seeds the generator as `torch.Generator().manual_seed(seed)`; only 32 bits of the seed count.
    pub fn new(seed: u64) -> Self {
        let mut state = Box::new([0_u32; SIZE]);
        state[0] = seed as u32;
        for i in 1..SIZE {
            let before = state[i - 1];
            state[i] =
                1_812_433_253_u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: SIZE }
    }

    /// Draws 32 bits.
    pub fn bits(&mut self) -> u32 {
        if self.next == SIZE {
            for i in 0..SIZE {
                let joined =
                    (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % SIZE] ^ (joined >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Draws from `[0, 1)` with 53 bits, as NumPy's `RandomState(seed).random_sample()`, which is the
    /// same generator.
    pub fn double(&mut self) -> f64 {
        let (high, low) = (self.bits() >> 5, self.bits() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// Returns the first `count` of a random order of `0..n`, as `torch.randperm(n)[:count]`.
    pub fn permutation(&mut self, n: usize, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        // Later swaps touch later places only, so what is cut off need not be drawn.
        for i in 0..count.min(n.saturating_sub(1)) {
            let other = i + self.bits() as usize % (n - i);
            order.swap(i, other);
        }
        order.truncate(count);
        order
    }

    /// Draws from `U(low, high)`, as `tensor.uniform_(low, high)`.
    pub fn uniform(&mut self, count: usize, low: f64, high: f64) -> Vec<f32> {
        (0..count).map(|_| self.unit() * (high - low) as f32 + low as f32).collect()
    }

    /// Draws from `[0, 1)` with 24 bits.
    fn unit(&mut self) -> f32 {
        (self.bits() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// Draws uniformly within ±√(6 / fan), Kaiming's rule for rectifiers.
    pub fn kaiming(&mut self, count: usize, fan: usize) -> Vec<f32> {
        let bound = (6.0 / fan.max(1) as f64).sqrt();
        self.uniform(count, -bound, bound)
    }

    /// Draws from `N(0, deviation²)`, as `torch.normal(0, deviation, (count,))`.
    pub fn normal(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        if count < 16 {
            return self.few_normals(count, deviation);
        }
        let mut out: Vec<f32> = (0..count).map(|_| self.unit()).collect();
        let whole = count / 16 * 16;
        for block in out[..whole].chunks_exact_mut(16) {
            box_muller(block, deviation);
        }
        if whole < count {
            // A ragged end is redrawn together with what precedes it.
            for value in &mut out[count - 16..] {
                *value = self.unit();
            }
            box_muller(&mut out[count - 16..], deviation);
        }
        out
    }

    fn few_normals(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let mut out = Vec::with_capacity(count + 1);
        let mut unit = || {
            let bits = (u64::from(self.bits()) << 32) | u64::from(self.bits());
            (bits & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
        };
        while out.len() < count {
            let (first, second) = (unit(), unit());
            let radius = (-2.0 * (-second).ln_1p()).sqrt();
            let angle = std::f64::consts::TAU * first;
            out.push((radius * angle.cos() * deviation) as f32);
            out.push((radius * angle.sin() * deviation) as f32);
        }
        out.truncate(count);
        out
    }
}

/// Turns 16 uniform numbers into normal ones, in pairs eight apart.
fn box_muller(block: &mut [f32], deviation: f64) {
    for j in 0..8 {
        let radius = (-2.0 * (1.0 - block[j]).ln()).sqrt();
        let angle = std::f32::consts::TAU * block[j + 8];
        block[j] = radius * angle.cos() * deviation as f32;
        block[j + 8] = radius * angle.sin() * deviation as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 6e-5, "{found:?}, expected {expected:?}");
        }
    }

    // What `torch.manual_seed(s)` is followed by, as PyTorch prints it.
    #[test]
    fn uniform_numbers_are_pytorchs() {
        close(&TorchGenerator::new(0).uniform(3, 0.0, 1.0), &[0.4963, 0.7682, 0.0885]);
    }

    // As NumPy's documentation shows `RandomState(42)`.
    #[test]
    fn doubles_are_numpys() {
        let mut generator = TorchGenerator::new(42);
        for expected in [0.374_540_118_8, 0.950_714_306_4, 0.731_993_941_8] {
            assert!((generator.double() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn few_normal_numbers_are_pytorchs() {
        close(&TorchGenerator::new(0).normal(3, 1.0), &[1.5410, -0.2934, -2.1788]);
        close(&TorchGenerator::new(42).normal(3, 1.0), &[0.3367, 0.1288, 0.2345]);
    }

    #[test]
    fn a_cut_permutation_begins_as_the_whole_one() {
        let whole = TorchGenerator::new(777).permutation(100, 100);
        assert_eq!(TorchGenerator::new(777).permutation(100, 7), whole[..7]);
        let mut sorted = whole.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(TorchGenerator::new(1).permutation(0, 0), Vec::<u32>::new());
    }
}
