//! How far the outputs of two models lie apart.

use retune_core::batch::Batch;
use retune_core::model::{Output, Tuned};
use retune_core::parameters::to_vec;

use super::Way;
use crate::error::{Error, Result};

/// How far the outputs of one way lie from those of the attached adapter.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Shift {
    /// The way.
    pub way: Way,
    /// Mean over positions of the Kullback-Leibler divergence from the attached adapter, in nats.
    pub divergence: f64,
    /// The largest of them.
    pub largest: f64,
    /// Share of positions whose likeliest answer is the same.
    pub agreement: f64,
    /// Mean loss of the labels.
    pub loss: f64,
    /// Bytes the weights take on disk.
    pub bytes: u64,
}

/// Log-probabilities `[positions, classes]` and their labels.
pub(super) struct Answers {
    width: usize,
    log_probabilities: Vec<f32>,
    labels: Vec<u32>,
}

/// Reads the answers at labelled positions.
pub(super) fn answers(
    tuned: &Tuned<'_>,
    batches: &[Batch],
    num_positions: usize,
) -> Result<Answers> {
    let mut out = Answers { width: 0, log_probabilities: Vec::new(), labels: Vec::new() };
    for batch in batches {
        let left = num_positions.saturating_sub(out.labels.len());
        if left == 0 {
            break;
        }
        let (logits, labels) = tuned.evaluate(batch, None, |pass, output| match output {
            Output::States(states) => {
                let rows: Vec<usize> = (0..batch.targets.len())
                    .filter(|i| batch.targets[*i].is_some())
                    .take(left)
                    .collect();
                let labels: Vec<u32> = rows.iter().filter_map(|row| batch.targets[*row]).collect();
                if rows.is_empty() {
                    return Ok((Vec::new(), labels));
                }
                Ok((to_vec(pass.logits(&states, &rows)?.inner()), labels))
            }
            Output::Classes(logits) => {
                let labels: Vec<u32> = batch.classes.iter().flatten().copied().take(left).collect();
                let [rows, width] = logits.dims();
                let mut logits = to_vec(logits.inner());
                // Without a class for each document there is no telling which row is whose.
                logits.truncate(if labels.len() == rows.min(left) {
                    labels.len() * width
                } else {
                    0
                });
                Ok((logits, labels))
            }
            Output::Embeddings(_) | Output::Pairs(_) => Err(retune_core::Error::Unsupported {
                what: "measuring the shift of vectors".to_owned(),
                help: "ship a language model or a classifier".to_owned(),
            }),
        })?;
        if labels.is_empty() || logits.is_empty() {
            continue;
        }
        out.width = logits.len() / labels.len();
        out.log_probabilities.extend(logits.chunks_exact(out.width).flat_map(log_softmax));
        out.labels.extend(labels);
    }
    if out.labels.is_empty() {
        return Err(Error::Plan {
            what: "there is nothing to measure".to_owned(),
            expected: "held-out rows with at least one learned token or class".to_owned(),
            found: "none".to_owned(),
            help: "set `data.validation` or `data.validation_fraction` in the recipe".to_owned(),
        });
    }
    Ok(out)
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - highest).exp()).sum();
    let log_sum = f64::from(highest) + sum.ln();
    logits.iter().map(|x| (f64::from(*x) - log_sum) as f32).collect()
}

pub(super) fn shift(way: Way, reference: &Answers, found: &Answers, bytes: u64) -> Shift {
    let width = found.width.max(1);
    let (mut sum, mut largest, mut agreeing, mut loss) = (0.0, 0.0f64, 0u64, 0.0);
    let rows = reference.log_probabilities.chunks_exact(width);
    for ((p, q), label) in rows.zip(found.log_probabilities.chunks_exact(width)).zip(&found.labels)
    {
        let divergence: f64 = p
            .iter()
            .zip(q)
            .map(|(p, q)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q)))
            .sum();
        sum += divergence;
        largest = largest.max(divergence);
        agreeing += u64::from(likeliest(p) == likeliest(q));
        loss -= f64::from(q.get(*label as usize).copied().unwrap_or(f32::NAN));
    }
    let count = found.labels.len() as f64;
    Shift {
        way,
        divergence: sum / count,
        largest,
        agreement: agreeing as f64 / count,
        loss: loss / count,
        bytes,
    }
}

/// Returns the place of the largest value, of equal ones the first.
fn likeliest(values: &[f32]) -> usize {
    let better = |best: usize, (place, value): (usize, &f32)| {
        if *value > values[best] { place } else { best }
    };
    values.iter().enumerate().fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_worked_out_by_hand() {
        let row = |p: [f32; 2]| p.map(f32::ln);
        let answers = |rows: [[f32; 2]; 2]| Answers {
            width: 2,
            log_probabilities: rows.iter().flat_map(|p| row(*p)).collect(),
            labels: vec![0, 1],
        };
        let a = answers([[0.5, 0.5], [0.25, 0.75]]);
        let b = answers([[0.25, 0.75], [0.25, 0.75]]);
        let same = shift(Way::Attached, &a, &a, 1);
        assert_eq!((same.divergence, same.agreement), (0.0, 1.0));
        assert!((same.loss - f64::midpoint(2f64.ln(), (4.0 / 3.0f64).ln())).abs() < 1e-6);
        // ½ ln(½ / ¼) + ½ ln(½ / ¾) = ½ ln(4/3) at the first position, nothing at the second.
        let moved = shift(Way::Merged, &a, &b, 1);
        let expected = 0.5 * (4.0 / 3.0f64).ln();
        assert!((moved.largest - expected).abs() < 1e-6);
        assert!((moved.divergence - expected / 2.0).abs() < 1e-6);
        assert_eq!(moved.agreement, 0.5);
    }
}
