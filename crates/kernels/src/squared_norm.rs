//! Sum of squares, for clipping by the global norm.

use rayon::prelude::*;

use crate::parallel::CHUNK;
use crate::simd;

/// Adds up squares in `f64`.
///
/// # Determinism
/// The order of addition depends on the length alone.
pub fn squared_norm(x: &[f32]) -> f64 {
    if x.len() <= CHUNK {
        return sum_squares(x);
    }
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(sum_squares).collect();
    parts.iter().sum()
}

#[inline(always)]
fn sum_body<const LANES: usize, const FMA: bool>(x: &[f32]) -> f64 {
    // The same number of lanes at every level: all give the same bits.
    const WIDE: usize = 16;
    let (chunks, rest) = x.as_chunks::<WIDE>();
    let mut sums = [0.0; WIDE];
    for chunk in chunks {
        for lane in 0..WIDE {
            let x = f64::from(chunk[lane]);
            sums[lane] += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*x) * f64::from(*x);
    }
    sums.iter().sum()
}

simd::versions! {
    fn sum_squares(x: &[f32]) -> f64 = sum_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_add_up() {
        for count in [0usize, 1, 7, 8, 1000, 70_001] {
            let x: Vec<f32> = (0..count).map(|i| (i % 10) as f32).collect();
            let want: f64 = (0..count).map(|i| ((i % 10) * (i % 10)) as f64).sum();
            assert_eq!(squared_norm(&x), want);
        }
    }

    #[test]
    fn large_numbers_do_not_overflow() {
        assert_eq!(squared_norm(&[1e30, 1e30]), 2.0 * f64::from(1e30f32) * f64::from(1e30f32));
    }
}
