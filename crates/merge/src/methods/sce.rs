//! SCE: select, calculate, erase.

use super::select::{Cut, key, largest};
use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

/// Selects the values that vary most across models, weighs each change by its mean square, and
/// erases what has not the sign of the sum.
///
/// As in the reference, weights are equal where the mean squares sum to less than 1e-6, and the
/// divisor is at least 1e-6.
pub(super) const SCE: Method = Method {
    name: "sce",
    title: "SCE",
    source: "https://arxiv.org/abs/2408.07990",
    about: "adds the changes that vary most across models, weighed by their energy",
    base: Base::Required,
    min_inputs: 1,
    max_inputs: usize::MAX,
    parameters: &[
        Parameter::shared("select_topk", "share of the varying values that stays")
            .or(1.0)
            .within(0.0, 1.0),
        Parameter::flag("int8_mask", false, "read and without effect"),
    ],
    check: nothing_to_check,
    run,
};

const SMALLEST: f64 = 1e-6;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let n = group.inputs.len();
    let cut = selected(group)?;
    let mut squares = vec![0.0_f64; n];
    let mut seen = 0;
    let mut variances = Vec::new();
    group.sweep_changes(1, &mut |chunk| {
        mask(cut, &mut seen, &mut variances, &mut chunk.inputs);
        for (square, changes) in squares.iter_mut().zip(&chunk.inputs) {
            *square += super::elementwise::dot(changes, changes);
        }
        Ok(())
    })?;
    let means = squares.iter().map(|square| square / group.len().max(1) as f64);
    let sum: f64 = means.clone().sum();
    let weights: Vec<f32> = means
        .map(|mean| if sum < SMALLEST { 1.0 / n as f64 } else { mean / sum })
        .map(|weight| weight as f32)
        .collect();
    seen = 0;
    group.sweep_changes(1, &mut |chunk| {
        mask(cut, &mut seen, &mut variances, &mut chunk.inputs);
        for (i, base) in chunk.base.iter_mut().enumerate() {
            let total: f32 = chunk.inputs.iter().map(|changes| changes[i]).sum();
            let (mut sum, mut divisor) = (0.0, 0.0);
            for (changes, weight) in chunk.inputs.iter().zip(&weights) {
                let x = changes[i];
                if x != 0.0 && (x > 0.0) == (total >= 0.0) {
                    sum += weight * x;
                    divisor += weight;
                }
            }
            *base += sum / divisor.max(SMALLEST as f32);
        }
        push(&chunk.base)
    })
}

/// Finds the variances that stay; `None` where all do.
fn selected(group: &Group<'_>) -> Result<Option<Cut>> {
    let share = group.shared.number("select_topk");
    if share >= 1.0 {
        return Ok(None);
    }
    let mut variances = Vec::new();
    let mut num_varying = 0;
    group.sweep_changes(1, &mut |chunk| {
        variance(&chunk.inputs, &mut variances);
        num_varying += variances.iter().filter(|x| **x != 0.0).count();
        Ok(())
    })?;
    let k = (share * num_varying as f64) as usize;
    let cuts = largest(&[(0, k)], group.len(), &mut |visit| {
        group.sweep_changes(1, &mut |chunk| {
            variance(&chunk.inputs, &mut variances);
            visit(0, &variances);
            Ok(())
        })
    })?;
    Ok(cuts.first().copied())
}

fn mask(cut: Option<Cut>, seen: &mut usize, variances: &mut Vec<f32>, inputs: &mut [Vec<f32>]) {
    let Some(cut) = cut else { return };
    variance(inputs, variances);
    for (i, variance) in variances.iter().enumerate() {
        let key = key(*variance);
        *seen += usize::from(key == cut.threshold);
        if key < cut.threshold || (key == cut.threshold && *seen > cut.ties) {
            for changes in &mut *inputs {
                changes[i] = 0.0;
            }
        }
    }
}

/// Computes the variance across models of each value.
fn variance(inputs: &[Vec<f32>], out: &mut Vec<f32>) {
    let n = inputs.len() as f64;
    out.clear();
    out.resize(inputs.first().map_or(0, Vec::len), 0.0);
    for (i, out) in out.iter_mut().enumerate() {
        let values = inputs.iter().map(|changes| f64::from(changes[i]));
        let mean = values.clone().sum::<f64>() / n;
        *out = (values.map(|x| (x - mean).powi(2)).sum::<f64>() / n) as f32;
    }
}
