//! Weighted sums.

use super::elementwise::{add_scaled, scale};
use super::{Base, Group, Method, Parameter, WEIGHT, check_sum};
use crate::Result;

/// Model soups: `Σ wᵢθᵢ`, divided by `Σ wᵢ` unless told otherwise.
pub(super) const LINEAR: Method = Method {
    name: "linear",
    title: "Linear",
    source: "https://arxiv.org/abs/2203.05482",
    about: "weighted mean of the weights",
    base: Base::Ordinary,
    min_inputs: 1,
    max_inputs: usize::MAX,
    parameters: &[WEIGHT, Parameter::flag("normalize", true, "divides by the sum of the weights")],
    check: |shared, own| if shared.flag("normalize") { check_sum(own) } else { None },
    run,
};

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let weights: Vec<f32> = group.own.iter().map(|own| own.number("weight") as f32).collect();
    let sum: f64 = group.own.iter().map(|own| own.number("weight")).sum();
    let divisor = if group.shared.flag("normalize") { sum as f32 } else { 1.0 };
    group.sweep(1, &mut |chunk| {
        // A copy of one model stays its bits: 1 · x / 1 is x.
        let (first, rest) = chunk.inputs.split_at_mut(1);
        let total = &mut first[0];
        scale(total, weights[0]);
        for (weight, input) in weights[1..].iter().zip(rest) {
            add_scaled(total, *weight, input);
        }
        if divisor != 1.0 {
            for x in &mut *total {
                *x /= divisor;
            }
        }
        push(total)
    })
}
