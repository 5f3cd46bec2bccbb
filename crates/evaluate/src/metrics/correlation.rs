//! Scores against scores.

use super::check_pairs;
use crate::Result;

/// Computes Pearson's correlation; nothing where one side is constant or a value is not finite,
/// since there is none then.
///
/// # Errors
/// If the lists differ in length or are empty.
pub fn pearson(x: &[f64], y: &[f64]) -> Result<Option<f64>> {
    check_pairs(x.len(), y.len())?;
    let n = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xy += dx * dy;
        xx += dx * dx;
        yy += dy * dy;
    }
    // Two roots rather than one of the product, which would overflow first.
    let correlation = xy / (xx.sqrt() * yy.sqrt());
    Ok(correlation.is_finite().then(|| correlation.clamp(-1.0, 1.0)))
}

/// Computes Spearman's rank correlation: [`pearson`] of the ranks, ties sharing their mean rank.
///
/// # Errors
/// As [`pearson`].
pub fn spearman(x: &[f64], y: &[f64]) -> Result<Option<f64>> {
    check_pairs(x.len(), y.len())?;
    if x.iter().chain(y).any(|value| value.is_nan()) {
        return Ok(None);
    }
    pearson(&ranks(x), &ranks(y))
}

/// Ranks from 1; equal values share the mean of the ranks they take up together.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for group in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let last = first + group.len();
        let shared = f64::midpoint(first as f64 + 1.0, last as f64);
        for place in group {
            ranks[*place] = shared;
        }
        first = last;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pearson_by_hand() {
        // Deviations of x: -2 -1 0 1 2, of y: -2 0 1 -1 2: Σxy = 4 + 0 + 0 - 1 + 4 = 7, Σx² = Σy² = 10.
        let found = pearson(&[1.0, 2.0, 3.0, 4.0, 5.0], &[1.0, 3.0, 4.0, 2.0, 5.0]).unwrap();
        assert!((found.unwrap() - 0.7).abs() < 1e-15, "{found:?}");
    }

    #[test]
    fn what_has_no_correlation_says_so() {
        assert_eq!(pearson(&[1.0, 1.0], &[1.0, 2.0]).unwrap(), None);
        assert_eq!(pearson(&[1.0, f64::NAN], &[1.0, 2.0]).unwrap(), None);
        assert_eq!(spearman(&[1.0, f64::NAN], &[1.0, 2.0]).unwrap(), None);
        assert!(pearson(&[], &[]).is_err() && spearman(&[1.0], &[]).is_err());
    }

    #[test]
    fn spearman_sees_order_only() {
        let found = spearman(&[1.0, 10.0, 100.0], &[-3.0, -2.0, 50.0]).unwrap().unwrap();
        assert!((found - 1.0).abs() < 1e-15);
        // 1 - 6 Σd² / (n (n² - 1)) with d = (0, 1, -1, 0), so 1 - 12/60.
        let found = spearman(&[1.0, 2.0, 3.0, 4.0], &[1.0, 3.0, 2.0, 4.0]).unwrap().unwrap();
        assert!((found - 0.8).abs() < 1e-15);
    }

    #[test]
    fn ties_share_their_rank() {
        assert_eq!(ranks(&[7.0, 5.0, 7.0, 9.0, 7.0]), [3.0, 1.0, 3.0, 5.0, 3.0]);
        // Zero and minus zero are one value.
        assert_eq!(ranks(&[0.0, -0.0]), [1.5, 1.5]);
        // Ranks 1.5 1.5 3 4 and 1 2 3 4: Σxy = 4.5, Σx² = 4.5, Σy² = 5, so √0.9.
        let found = spearman(&[2.0, 2.0, 3.0, 4.0], &[1.0, 2.0, 3.0, 4.0]).unwrap().unwrap();
        assert!((found - 0.9_f64.sqrt()).abs() < 1e-15, "{found}");
    }
}
