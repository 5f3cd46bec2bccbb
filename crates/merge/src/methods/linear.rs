//! Weighted sums.

use super::elementwise::{add_scaled, scale};
use super::group::all_finite;
use super::{Base, Group, Method, Parameter, WEIGHT, check_sum};
use crate::Result;

/// Values that are summed at a time.
const PART: usize = 2048;

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
    let mut is_finite = true;
    let divisor = if group.shared.flag("normalize") { sum as f32 } else { 1.0 };
    group.sweep_unchecked(1, &mut |chunk| {
        // A copy of one model stays its bits: 1 · x / 1 is x.
        let (first, rest) = chunk.inputs.split_at_mut(1);
        let total = &mut first[0];
        // A part at a time, so that it stays in the nearest cache until it is done.
        for (part, total) in total.chunks_mut(PART).enumerate() {
            scale(total, weights[0]);
            for (weight, input) in weights[1..].iter().zip(&*rest) {
                add_scaled(total, *weight, &input[part * PART..]);
            }
            if divisor != 1.0 {
                for x in total {
                    *x /= divisor;
                }
            }
        }
        is_finite &= all_finite(total);
        push(total)
    })?;
    // A value that is not finite makes the sum it is part of the same, whatever its weight.
    if is_finite { Ok(()) } else { group.sweep(1, &mut |_| Ok(())) }
}
