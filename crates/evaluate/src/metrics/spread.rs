//! How far a mean can be trusted.

use retune_core::random::Seed;

/// Computes the mean; nothing of an empty list.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Computes the standard deviation of the population a sample is from (divisor `n - 1`).
///
/// Nothing of fewer than two values, which say nothing about spread.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((squares / (values.len() as f64 - 1.0)).sqrt())
}

/// Computes the standard error of the mean, `deviation / √n`; nothing of fewer than two values.
///
/// ```
/// use retune_evaluate::metrics::standard_error;
/// // Hits 1 1 0 0: deviation √(4 · 0.25 / 3), over √4.
/// let error = standard_error(&[1.0, 1.0, 0.0, 0.0]).unwrap();
/// assert!((error - (1.0_f64 / 12.0).sqrt()).abs() < 1e-12);
/// ```
pub fn standard_error(values: &[f64]) -> Option<f64> {
    Some(deviation(values)? / (values.len() as f64).sqrt())
}

/// Estimates the standard error of any statistic: its deviation over `rounds` samples drawn from
/// `items` with replacement, each as large as `items`.
///
/// Round `i` draws from its own stream of `seed`. Nothing of fewer than two items or rounds, or
/// where the statistic is not finite in some round.
///
/// # Source
/// Efron, "Bootstrap methods: another look at the jackknife" (1979).
/// # Cost
/// `rounds` calls of `statistic`.
pub fn bootstrap_error<T: Clone>(
    items: &[T],
    statistic: impl Fn(&[T]) -> f64,
    rounds: usize,
    seed: Seed,
) -> Option<f64> {
    if items.len() < 2 {
        return None;
    }
    let values: Vec<f64> = (0..rounds)
        .map(|round| {
            let mut random = seed.stream("bootstrap", &[round as u64]);
            let sample: Vec<T> =
                items.iter().map(|_| items[random.below(items.len())].clone()).collect();
            statistic(&sample)
        })
        .collect();
    deviation(&values).filter(|error| error.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_divides_by_one_less() {
        // Mean 5; squares 9 1 1 1 0 0 4 16 = 32, over 7.
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        assert_eq!(mean(&values), Some(5.0));
        assert!((deviation(&values).unwrap() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-15);
        let expected = (32.0_f64 / 56.0).sqrt();
        assert!((standard_error(&values).unwrap() - expected).abs() < 1e-15);
        assert_eq!((mean(&[]), deviation(&[1.0]), standard_error(&[])), (None, None, None));
    }

    #[test]
    fn the_bootstrap_of_a_mean_nears_its_standard_error() {
        let hits: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i % 4 == 0))).collect();
        let statistic = |sample: &[f64]| sample.iter().sum::<f64>() / sample.len() as f64;
        let found = bootstrap_error(&hits, statistic, 4000, Seed(7)).unwrap();
        // √(p (1 - p) / n) = √(0.1875 / 100); 4000 rounds leave about 1 / √8000 of it, 3 of these.
        let expected = 0.001_875_f64.sqrt();
        assert!((found / expected - 1.0).abs() < 3.0 / 8000_f64.sqrt(), "{found} {expected}");
        assert_eq!(Some(found), bootstrap_error(&hits, statistic, 4000, Seed(7)));
        assert_ne!(Some(found), bootstrap_error(&hits, statistic, 4000, Seed(8)));
    }

    #[test]
    fn too_little_to_draw_from_gives_nothing() {
        assert_eq!(bootstrap_error(&[1.0], |_| 1.0, 10, Seed(0)), None);
        assert_eq!(bootstrap_error(&[1.0, 2.0], |_| 1.0, 1, Seed(0)), None);
        assert_eq!(bootstrap_error(&[1.0, 2.0], |_| f64::NAN, 5, Seed(0)), None);
    }
}
