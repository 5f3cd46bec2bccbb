//! How far a model's confidence can be believed.

use super::check_pairs;
use crate::{Error, Result};

/// Computes the expected calibration error: the mean gap between confidence and share of hits over
/// `bins` equally wide bins of confidence, each weighed by its answers.
///
/// A confidence on a border belongs to the bin below it, as in the paper.
///
/// # Source
/// Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (2017),
/// <https://arxiv.org/abs/1706.04599>.
///
/// # Errors
/// If there is not one verdict for each confidence, none at all, no bin, or a confidence is outside
/// `0..=1`.
///
/// ```
/// # use retune_evaluate::metrics::expected_calibration_error;
/// // One bin holds 0.9 (right) and 1.0 (wrong): |0.95 - 0.5|; another 0.5 (right): |0.5 - 1|.
/// let error = expected_calibration_error(&[0.9, 1.0, 0.5], &[true, false, true], 2)?;
/// assert!((error - (2.0 * 0.45 + 0.5) / 3.0).abs() < 1e-12);
/// # Ok::<(), retune_evaluate::Error>(())
/// ```
pub fn expected_calibration_error(confidences: &[f64], right: &[bool], bins: usize) -> Result<f64> {
    check_pairs(confidences.len(), right.len())?;
    let wrong = |found: String| Error::Input {
        what: "calibration cannot be measured".to_owned(),
        expected: "confidences from 0 to 1 and at least one bin".to_owned(),
        found,
        help: "give the probability of each answer".to_owned(),
    };
    if bins == 0 {
        return Err(wrong("no bin".to_owned()));
    }
    // Sum of confidences and hits per bin; their difference is the gap times the bin's answers.
    let mut gaps = vec![0.0; bins];
    for (confidence, right) in confidences.iter().zip(right) {
        if !(0.0..=1.0).contains(confidence) {
            return Err(wrong(confidence.to_string()));
        }
        let bin = ((confidence * bins as f64).ceil() as usize).clamp(1, bins) - 1;
        gaps[bin] += confidence - f64::from(u8::from(*right));
    }
    Ok(gaps.iter().map(|gap| gap.abs()).sum::<f64>() / right.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_belong_to_the_bin_below() {
        // With ten bins 0.5 lies in (0.4, 0.5] beside 0.45: gaps -0.5 and 0.45 cancel to 0.05.
        let found = expected_calibration_error(&[0.5, 0.45], &[true, false], 10).unwrap();
        assert!((found - 0.05 / 2.0).abs() < 1e-12, "{found}");
        // 0 lies in the first bin.
        assert_eq!(expected_calibration_error(&[0.0], &[false], 10).unwrap(), 0.0);
        assert_eq!(expected_calibration_error(&[1.0; 4], &[true; 4], 10).unwrap(), 0.0);
    }

    #[test]
    fn what_is_no_confidence_is_refused() {
        for (confidences, right, bins) in
            [(&[1.5][..], &[true][..], 10), (&[f64::NAN], &[true], 10), (&[0.5], &[true], 0)]
        {
            assert!(expected_calibration_error(confidences, right, bins).is_err());
        }
        assert!(expected_calibration_error(&[], &[], 10).is_err());
    }
}
