//! Reinforced Agent Merging.

use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

const EPSILON: Parameter =
    Parameter::shared("epsilon", "change above which a value counts as changed")
        .or(1e-5)
        .within(0.0, f64::MAX);
const SOURCE: &str = "https://arxiv.org/abs/2601.13572";

/// Values changed by one model are added as they are, those changed by several as their mean.
pub(super) const RAM: Method = Method {
    name: "ram",
    title: "Reinforced Agent Merging",
    source: SOURCE,
    about: "adds what one model changed, and the mean of what several changed",
    base: Base::Required,
    min_inputs: 1,
    max_inputs: usize::MAX,
    parameters: &[EPSILON],
    check: nothing_to_check,
    run: |group, push| {
        let epsilon = group.shared.number("epsilon") as f32;
        write(group, epsilon, &vec![1.0; group.inputs.len()], push)
    },
};

/// RAM that amplifies what only one model changed, by the share it shares with others:
/// `1 + r · min(shared / unique, alpha)`, counted per tensor.
pub(super) const RAMPLUS_TL: Method = Method {
    name: "ramplus_tl",
    title: "Reinforced Agent Merging Plus, per tensor",
    about: "as ram, and amplifies what one model changed by how much it shares with others",
    parameters: &[
        Parameter::shared("r", "strength of the amplification").or(0.1).within(0.0, f64::MAX),
        Parameter::shared("alpha", "largest share counted").or(0.2).within(0.0, f64::MAX),
        EPSILON,
    ],
    run: amplified,
    ..RAM
};

fn amplified(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let epsilon = group.shared.number("epsilon");
    let mut shared = vec![0_u64; group.inputs.len()];
    let mut unique = shared.clone();
    group.sweep_changes(1, &mut |chunk| {
        for i in 0..chunk.base.len() {
            let changed = |changes: &Vec<f32>| changes[i].abs() > epsilon as f32;
            let count = chunk.inputs.iter().filter(|changes| changed(changes)).count();
            for (model, changes) in chunk.inputs.iter().enumerate() {
                if changed(changes) {
                    let counter = if count == 1 { &mut unique } else { &mut shared };
                    counter[model] += 1;
                }
            }
        }
        Ok(())
    })?;
    let (r, alpha) = (group.shared.number("r"), group.shared.number("alpha"));
    let factors: Vec<f32> = shared
        .iter()
        .zip(&unique)
        .map(|(shared, unique)| {
            let share = *shared as f64 / (*unique as f64).max(epsilon.max(f64::MIN_POSITIVE));
            (1.0 + r * share.clamp(0.0, alpha)) as f32
        })
        .collect();
    write(group, epsilon as f32, &factors, push)
}

fn write(
    group: &Group<'_>,
    epsilon: f32,
    factors: &[f32],
    push: &mut dyn FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    group.sweep_changes(1, &mut |chunk| {
        for (i, base) in chunk.base.iter_mut().enumerate() {
            let (mut count, mut sum, mut alone) = (0_u32, 0.0, 0.0);
            for (changes, factor) in chunk.inputs.iter().zip(factors) {
                let x = changes[i];
                if x.abs() > epsilon {
                    count += 1;
                    sum += x;
                    alone = factor * x;
                }
            }
            *base += match count {
                0 => 0.0,
                1 => alone,
                _ => sum / count as f32,
            };
        }
        push(&chunk.base)
    })
}
