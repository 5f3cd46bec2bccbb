//! Arcee Fusion.

use super::select::largest;
use super::{Base, Group, Method, nothing_to_check};
use crate::Result;

/// Takes over the values whose importance `|Δ| · KL(softmax(row) ‖ softmax(base row))` reaches the
/// median plus 1.5 interquartile ranges of its tensor.
///
/// Quantiles are those of all values; the reference samples a million of larger tensors.
pub(super) const ARCEE_FUSION: Method = Method {
    name: "arcee_fusion",
    title: "Arcee Fusion",
    source: "https://github.com/arcee-ai/mergekit",
    about: "takes over only the changes that matter most",
    base: Base::Required,
    min_inputs: 1,
    max_inputs: 1,
    parameters: &[],
    check: nothing_to_check,
    run,
};

const EPSILON: f64 = 1e-8;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let (n, row) = (group.len(), group.row());
    if n == 0 {
        return Ok(());
    }
    let mut importance = Vec::new();
    // The value at place `i` of the ascending order ends the `n − i` largest.
    let wanted = [0.25, 0.5, 0.75].map(|share| (0, n - (share * (n - 1) as f64) as usize));
    let cuts = largest(&wanted, n, &mut |visit| {
        group.sweep(row, &mut |chunk| {
            weigh(&chunk.base, &chunk.inputs[0], row, &mut importance);
            visit(0, &importance);
            Ok(())
        })
    })?;
    let [low, median, high] = [0, 1, 2].map(|i| f32::from_bits(cuts[i].threshold));
    let threshold = median + 1.5 * (high - low);
    group.sweep(row, &mut |chunk| {
        weigh(&chunk.base, &chunk.inputs[0], row, &mut importance);
        for ((base, other), importance) in
            chunk.base.iter_mut().zip(&chunk.inputs[0]).zip(&importance)
        {
            if *importance >= threshold {
                *base += other - *base;
            }
        }
        push(&chunk.base)
    })
}

fn weigh(base: &[f32], other: &[f32], row: usize, out: &mut Vec<f32>) {
    out.clear();
    for (base, other) in base.chunks(row).zip(other.chunks(row)) {
        let (p, q) = (Softmax::of(other), Softmax::of(base));
        let terms = other.iter().zip(base).map(|(x, y)| {
            let (p, q) = (p.at(*x) + EPSILON, q.at(*y) + EPSILON);
            p * (p / q).ln()
        });
        // Never negative but by rounding.
        let divergence = terms.sum::<f64>().max(0.0);
        out.extend(
            base.iter().zip(other).map(|(x, y)| (f64::from((y - x).abs()) * divergence) as f32),
        );
    }
}

/// The largest value of a row and the sum that makes its exponentials probabilities.
struct Softmax {
    largest: f64,
    sum: f64,
}

impl Softmax {
    fn of(row: &[f32]) -> Self {
        let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum = row.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
        Self { largest, sum }
    }

    fn at(&self, x: f32) -> f64 {
        (f64::from(x) - self.largest).exp() / self.sum
    }
}
