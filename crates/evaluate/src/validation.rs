//! Measures batches: loss, classes, vectors.

use crate::likelihood::log_sum;
use crate::metrics::accuracy;
use crate::sampling::likeliest;
use crate::{Error, Result};
use retune_core::batch::Batch;
use retune_core::model::{Output, Pairs, Tuned};
use retune_core::parameters::to_vec;
use retune_core::pass::logit_rows;

/// The mean loss over labels: learned tokens of a language model, documents of a classifier.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    /// Mean cross-entropy per label, in nats: every label weighs the same, whatever its batch.
    pub loss: f64,
    /// How many labels there are.
    pub num_labels: usize,
    /// Fraction of documents whose class was found, for a classifier.
    pub accuracy: Option<f64>,
}

impl Validation {
    /// Returns `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// A classifier's answer for one document.
#[derive(Debug, Clone, PartialEq)]
pub struct Classified {
    /// The document's row in the data.
    pub row: usize,
    /// The likeliest class; of equally likely ones the first.
    pub class: u32,
    /// Log-probability of each class, in nats.
    pub log_probabilities: Vec<f64>,
    /// The class it should have, where that is known.
    pub label: Option<u32>,
}

/// Measures the mean loss over all labels of `batches`.
///
/// A loss that is NaN or infinite comes out as it is.
///
/// # Errors
/// [`Error::Input`] if no batch has a label; those of the model.
pub fn validate<'b>(
    tuned: &Tuned<'_>,
    batches: impl IntoIterator<Item = &'b Batch>,
) -> Result<Validation> {
    let head = &tuned.model.spec().head;
    let (mut sum, mut num_labels) = (0.0, 0);
    let mut classified = Vec::new();
    for batch in batches {
        let labels = batch.num_labels(head);
        if labels == 0 {
            continue;
        }
        num_labels += labels;
        sum += tuned.evaluate(batch, None, |pass, output| match output {
            Output::States(states) => {
                let losses = to_vec(pass.token_losses(states)?.inner());
                Ok(losses.iter().map(|loss| f64::from(*loss)).sum())
            }
            Output::Classes(logits) => {
                let answers = read_classes(batch, logit_rows(logits))?;
                let loss = answers.iter().filter_map(loss_of).sum::<Result<f64>>()?;
                classified.extend(answers);
                Ok(loss)
            }
            Output::Pairs(pairs) => {
                classified.extend(read_pairs(batch, &pairs)?);
                let losses = to_vec(pairs.losses(batch).inner());
                Ok(losses.iter().map(|loss| f64::from(*loss)).sum())
            }
            Output::Embeddings(_) => Err(unsupported("a loss", "document vectors")),
        })?;
    }
    if num_labels == 0 {
        return Err(Error::Input {
            what: "there is nothing to validate".to_owned(),
            expected: "at least one learned token, or one document with a class".to_owned(),
            found: "no label in any batch".to_owned(),
            help: "look at the mask with `retune doctor`".to_owned(),
        });
    }
    let (found, labels): (Vec<u32>, Vec<u32>) =
        classified.iter().filter_map(|answer| Some((answer.class, answer.label?))).unzip();
    let accuracy = if labels.is_empty() { None } else { Some(accuracy(&found, &labels)?) };
    Ok(Validation { loss: sum / num_labels as f64, num_labels, accuracy })
}

/// Classifies every document of `batches`, in order.
///
/// # Errors
/// [`Error::Unsupported`] if the model is no classifier; [`Error::Input`] if its logits are not
/// finite; those of the model.
pub fn classify<'b>(
    tuned: &Tuned<'_>,
    batches: impl IntoIterator<Item = &'b Batch>,
) -> Result<Vec<Classified>> {
    let mut list = Vec::new();
    for batch in batches {
        list.extend(tuned.evaluate(batch, None, |_, output| match output {
            Output::Classes(logits) => read_classes(batch, logit_rows(logits)),
            Output::Pairs(pairs) => read_pairs(batch, &pairs),
            Output::States(_) => Err(unsupported("classes", "next-token states")),
            Output::Embeddings(_) => Err(unsupported("classes", "document vectors")),
        })?);
    }
    Ok(list)
}

/// Computes the vector of every document of `batches`, in order, with its row in the data.
///
/// # Errors
/// [`Error::Unsupported`] if the model makes no vectors; those of the model.
pub fn embed<'b>(
    tuned: &Tuned<'_>,
    batches: impl IntoIterator<Item = &'b Batch>,
) -> Result<Vec<(usize, Vec<f32>)>> {
    let mut list = Vec::new();
    for batch in batches {
        let vectors = tuned.evaluate(batch, None, |_, output| match output {
            Output::Embeddings(vectors) => Ok(logit_rows(vectors)),
            Output::States(_) => Err(unsupported("vectors", "next-token states")),
            Output::Classes(_) => Err(unsupported("vectors", "classes")),
            Output::Pairs(_) => Err(unsupported("one vector", "pairs of them")),
        })?;
        list.extend(batch.rows.iter().copied().zip(vectors));
    }
    Ok(list)
}

fn read_classes(batch: &Batch, rows: Vec<Vec<f32>>) -> Result<Vec<Classified>> {
    read_answers(rows, &batch.classes, &batch.rows)
}

/// Reads which of the batch's texts each of its images is most like.
fn read_pairs(batch: &Batch, pairs: &Pairs) -> Result<Vec<Classified>> {
    let labels: Vec<Option<u32>> =
        batch.matches().into_iter().map(|text| text.map(|text| text as u32)).collect();
    let is_image = |(span, _): &(std::ops::Range<usize>, &usize)| batch.sides(span.clone())[0] > 0;
    let rows: Vec<usize> =
        batch.spans.iter().zip(&batch.rows).filter(is_image).map(|(_, row)| *row).collect();
    read_answers(logit_rows(pairs.similarities()), &labels, &rows)
}

fn read_answers(
    logits: Vec<Vec<f32>>,
    labels: &[Option<u32>],
    rows: &[usize],
) -> Result<Vec<Classified>> {
    let answers = logits.into_iter().zip(labels).zip(rows);
    answers
        .map(|((logits, label), row)| {
            let (class, highest) = likeliest(&logits)?;
            let normaliser = log_sum(&logits, highest);
            let log_probabilities =
                logits.iter().map(|logit| f64::from(*logit) - normaliser).collect();
            Ok(Classified { row: *row, class, log_probabilities, label: *label })
        })
        .collect()
}

/// Returns the cross-entropy of a document with its class, if it has one.
fn loss_of(answer: &Classified) -> Option<Result<f64>> {
    let label = answer.label?;
    let known = answer.log_probabilities.get(label as usize);
    Some(known.map(|value| -value).ok_or_else(|| Error::Input {
        what: format!("row {} has a class the model does not know", answer.row),
        expected: format!("classes below {}", answer.log_probabilities.len()),
        found: label.to_string(),
        help: "give the model as many labels as the data has".to_owned(),
    }))
}

fn unsupported(what: &str, instead: &str) -> Error {
    Error::Unsupported {
        what: format!("measuring {what} of a model that puts out {instead}"),
        help: "choose the measure that fits the model's head".to_owned(),
    }
}
