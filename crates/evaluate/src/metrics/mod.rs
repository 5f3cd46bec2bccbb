//! Measures of answers, classes and scores, and how far a mean of them can be trusted.

mod calibration;
mod classes;
mod correlation;
mod spread;
mod text;

pub use calibration::expected_calibration_error;
pub use classes::{accuracy, macro_f1, matthews};
pub use correlation::{pearson, spearman};
pub use spread::{bootstrap_error, deviation, mean, standard_error};
pub use text::{exact_match, last_number, normalize, same_last_number, same_words, word_f1};

use crate::{Error, Result};

/// Checks that there is one reference per prediction, and at least one of each.
fn check_pairs(predictions: usize, references: usize) -> Result<()> {
    if predictions == references && predictions > 0 {
        return Ok(());
    }
    Err(Error::Input {
        what: "predictions cannot be compared with references".to_owned(),
        expected: "one reference for each prediction, and at least one".to_owned(),
        found: format!("{predictions} predictions, {references} references"),
        help: "score the rows that have an answer, and all of them".to_owned(),
    })
}
