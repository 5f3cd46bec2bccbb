//! What a model answers at each label, and how sure it is.

use crate::likelihood::log_sum;
use crate::metrics::{accuracy, expected_calibration_error};
use crate::sampling::likeliest;
use crate::{Error, Result};
use retune_core::batch::Batch;
use retune_core::model::{Output, Tuned};
use retune_core::pass::logit_rows;

/// Rows of logits that are held at once: those of a large vocabulary are a megabyte for five.
const ROWS: usize = 64;

/// Bins of confidence that calibration is measured in.
const BINS: usize = 10;

/// The answers of one model at all labels: learned tokens of a language model, documents with a
/// class of a classifier.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answers {
    /// The likeliest answer to each label; of equally likely ones the first.
    pub found: Vec<u32>,
    /// What it should be.
    pub labels: Vec<u32>,
    /// The probability of what was found.
    pub confidences: Vec<f64>,
}

impl Answers {
    /// Asks a model for the labels of `batches`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for models of document vectors; those of the model.
    pub fn of<'b>(tuned: &Tuned<'_>, batches: impl IntoIterator<Item = &'b Batch>) -> Result<Self> {
        let mut answers = Self::default();
        for batch in batches {
            if batch.num_labels(&tuned.model.spec().head) == 0 {
                continue;
            }
            tuned.evaluate(batch, None, |pass, output| match output {
                Output::States(states) => {
                    let rows: Vec<usize> =
                        (0..batch.targets.len()).filter(|t| batch.targets[*t].is_some()).collect();
                    for rows in rows.chunks(ROWS) {
                        let logits = logit_rows(pass.logits(&states, rows)?);
                        for (row, logits) in rows.iter().zip(logits) {
                            answers.push(&logits, batch.targets[*row])?;
                        }
                    }
                    Ok(())
                }
                Output::Classes(logits) => logit_rows(logits)
                    .iter()
                    .zip(&batch.classes)
                    .try_for_each(|(logits, class)| answers.push(logits, *class)),
                Output::Pairs(pairs) => {
                    let labels = batch.matches().into_iter().map(|text| text.map(|t| t as u32));
                    logit_rows(pairs.similarities())
                        .iter()
                        .zip(labels)
                        .try_for_each(|(logits, label)| answers.push(logits, label))
                }
                Output::Embeddings(_) => Err(Error::Unsupported {
                    what: "asking a model that puts out document vectors".to_owned(),
                    help: "use a language model or a classifier".to_owned(),
                }),
            })?;
        }
        Ok(answers)
    }

    fn push(&mut self, logits: &[f32], label: Option<u32>) -> Result<()> {
        let Some(label) = label else { return Ok(()) };
        let (found, highest) = likeliest(logits)?;
        let confidence = (f64::from(highest) - log_sum(logits, highest)).exp();
        self.found.push(found);
        self.labels.push(label);
        self.confidences.push(confidence.min(1.0));
        Ok(())
    }

    /// Returns how many labels were asked for.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Returns whether there was no label.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Computes the share of right answers.
    ///
    /// # Errors
    /// If there was no label.
    pub fn accuracy(&self) -> Result<f64> {
        accuracy(&self.found, &self.labels)
    }

    /// Computes the expected calibration error over ten bins of confidence.
    ///
    /// # Errors
    /// If there was no label.
    pub fn calibration_error(&self) -> Result<f64> {
        let right: Vec<bool> = self.found.iter().zip(&self.labels).map(|(a, b)| a == b).collect();
        expected_calibration_error(&self.confidences, &right, BINS)
    }

    /// Computes the share of labels two models answer alike.
    ///
    /// # Errors
    /// If they were not asked the same.
    pub fn agreement(&self, other: &Self) -> Result<f64> {
        accuracy(&self.found, &other.found)
    }
}
