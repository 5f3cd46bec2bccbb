//! Sum of squares, for clipping by the global norm.

/// Adds up squares in `f64`.
///
/// # Determinism
/// The order of addition depends on the length alone.
pub fn squared_norm(x: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*x) * f64::from(*x);
    }
    sums.iter().sum()
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
