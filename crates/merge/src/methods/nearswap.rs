//! NearSwap.

use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

/// Moves each value towards the other model by at most `t`: `w = min(t / |a − b|, 1)`.
pub(super) const NEARSWAP: Method = Method {
    name: "nearswap",
    title: "NearSwap",
    source: "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    about: "takes the other model's values where they are near the base's",
    base: Base::Required,
    min_inputs: 1,
    max_inputs: 1,
    parameters: &[
        Parameter::shared("t", "distance up to which values are swapped").within(0.0, f64::MAX)
    ],
    check: nothing_to_check,
    run,
};

/// Distances below this count as this much.
const SMALLEST: f32 = 1e-6;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let t = group.shared.number("t") as f32;
    group.sweep(1, &mut |chunk| {
        for (a, b) in chunk.base.iter_mut().zip(&chunk.inputs[0]) {
            let weight = (t / (*a - b).abs().max(SMALLEST)).clamp(0.0, 1.0);
            *a = weight * b + (1.0 - weight) * *a;
        }
        push(&chunk.base)
    })
}
