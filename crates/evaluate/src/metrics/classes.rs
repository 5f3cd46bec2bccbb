//! Answers as classes.

use std::collections::BTreeSet;

use super::check_pairs;
use crate::Result;

/// Computes the fraction of predictions that are right.
///
/// # Errors
/// If there is not one reference for each prediction, or none at all.
pub fn accuracy<T: PartialEq>(predictions: &[T], references: &[T]) -> Result<f64> {
    check_pairs(predictions.len(), references.len())?;
    let right = predictions.iter().zip(references).filter(|(a, b)| a == b).count();
    Ok(right as f64 / references.len() as f64)
}

/// Computes the mean over classes of the harmonic mean of precision and recall.
///
/// The classes are those that were predicted or asked for; a class without a hit scores 0.
///
/// # Errors
/// As [`accuracy`].
///
/// ```
/// # use retune_evaluate::metrics::macro_f1;
/// // Class 0: 1 hit of 2 predicted, 1 asked for: 2/3. Class 1: 1 of 1 and of 2: 2/3.
/// let score = macro_f1(&[0, 0, 1], &[0, 1, 1])?;
/// assert!((score - 2.0 / 3.0).abs() < 1e-12);
/// # Ok::<(), retune_evaluate::Error>(())
/// ```
pub fn macro_f1<T: Ord>(predictions: &[T], references: &[T]) -> Result<f64> {
    check_pairs(predictions.len(), references.len())?;
    let classes: BTreeSet<&T> = predictions.iter().chain(references).collect();
    let score = |class: &&T| {
        let count = |list: &[T]| list.iter().filter(|item| item == class).count();
        let hits =
            predictions.iter().zip(references).filter(|(a, b)| a == class && b == class).count();
        2.0 * hits as f64 / (count(predictions) + count(references)) as f64
    };
    Ok(classes.iter().map(score).sum::<f64>() / classes.len() as f64)
}

/// Computes the Matthews correlation, for two classes or more; in `-1..=1`.
///
/// 0 where all predictions or all references are of one class, as is usual, since the quotient has
/// no value there.
///
/// # Source
/// Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient"
/// (2004), which is Matthews' for two classes. The metric of CoLA in GLUE,
/// <https://arxiv.org/abs/1804.07461>.
///
/// # Errors
/// As [`accuracy`].
pub fn matthews<T: Ord>(predictions: &[T], references: &[T]) -> Result<f64> {
    check_pairs(predictions.len(), references.len())?;
    let n = references.len() as f64;
    let hits = predictions.iter().zip(references).filter(|(a, b)| a == b).count() as f64;
    let classes: BTreeSet<&T> = predictions.iter().chain(references).collect();
    let (mut both, mut predicted, mut asked) = (0.0, 0.0, 0.0);
    for class in classes {
        let count = |list: &[T]| list.iter().filter(|item| *item == class).count() as f64;
        let (p, t) = (count(predictions), count(references));
        both += p * t;
        predicted += p * p;
        asked += t * t;
    }
    let scale = ((n * n - predicted) * (n * n - asked)).sqrt();
    Ok(if scale == 0.0 { 0.0 } else { (hits * n - both) / scale })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_counts_hits() {
        assert_eq!(accuracy(&["a", "b", "b", "a"], &["a", "b", "a", "a"]).unwrap(), 0.75);
    }

    #[test]
    fn a_class_that_was_never_predicted_counts_as_zero() {
        // Class 0: 2 hits, 3 predicted, 2 asked: 4/5. Class 1: 1, 1, 1: 1. Class 2: no hit: 0.
        let score = macro_f1(&[0, 0, 0, 1], &[0, 0, 2, 1]).unwrap();
        assert!((score - (0.8 + 1.0 + 0.0) / 3.0).abs() < 1e-15, "{score}");
    }

    #[test]
    fn matthews_of_two_classes_is_the_textbook_quotient() {
        // TP 3, TN 1, FP 1, FN 2: (3·1 - 1·2) / √((3+1)(3+2)(1+1)(1+2)) = 1 / √120.
        let predictions = [1, 1, 1, 0, 1, 0, 0];
        let references = [1, 1, 1, 0, 0, 1, 1];
        let found = matthews(&predictions, &references).unwrap();
        assert!((found - 1.0 / 120_f64.sqrt()).abs() < 1e-15, "{found}");
        assert_eq!(matthews(&[0, 1], &[0, 1]).unwrap(), 1.0);
        assert_eq!(matthews(&[1, 0], &[0, 1]).unwrap(), -1.0);
        assert_eq!(matthews(&[1, 1], &[0, 1]).unwrap(), 0.0);
    }

    #[test]
    fn matthews_of_three_classes() {
        // n 4, hits 3; predicted (2, 1, 1), asked (1, 2, 1): Σpt = 2 + 2 + 1 = 5, Σp² = Σt² = 6;
        // (3·4 - 5) / √((16 - 6)(16 - 6)) = 7 / 10.
        let found = matthews(&[0, 0, 1, 2], &[0, 1, 1, 2]).unwrap();
        assert!((found - 0.7).abs() < 1e-15, "{found}");
    }

    #[test]
    fn lists_of_other_lengths_are_refused() {
        let error = accuracy(&[1, 2], &[1]).unwrap_err().to_string();
        assert!(error.contains("2 predictions, 1 references"), "{error}");
        assert!(macro_f1::<u32>(&[], &[]).is_err() && matthews(&[1], &[]).is_err());
    }
}
