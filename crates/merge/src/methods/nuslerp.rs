//! Spherical interpolation with weights, optionally of changes, rows or columns.

use super::angles::along_circle;
use super::elementwise::dot;
use super::gram::{self, Gram};
use super::{Base, Group, Method, Parameter, WEIGHT, nothing_to_check};
use crate::Result;

/// SLERP at `t = w₂ / (w₁ + w₂)`, of whole tensors, rows or columns; with a base, of the changes.
pub(super) const NUSLERP: Method = Method {
    name: "nuslerp",
    title: "NuSLERP",
    source: "https://github.com/arcee-ai/mergekit",
    about: "great circle between two models, by weights; also of their changes, by row or column",
    base: Base::Optional,
    min_inputs: 2,
    max_inputs: 2,
    parameters: &[
        WEIGHT,
        Parameter::flag("nuslerp_flatten", true, "takes a tensor as one vector"),
        Parameter::flag(
            "nuslerp_row_wise",
            false,
            "without flattening: moves dimension 0 last, so that a matrix goes column by column",
        ),
    ],
    check: nothing_to_check,
    run,
};

const SMALLEST_NORM: f64 = 1e-7;
const SMALLEST_SINE: f64 = 1e-8;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let weights: Vec<f64> = group.own.iter().map(|own| own.number("weight")).collect();
    let sum = weights[0] + weights[1];
    let t = if sum.abs() < 1e-6 { 0.5 } else { weights[1] / sum };
    let coefficients = |xx: f64, xy: f64, yy: f64| {
        let norm = |square: f64| square.sqrt().max(SMALLEST_NORM);
        let circle = along_circle(t, xy / (norm(xx) * norm(yy)), SMALLEST_SINE);
        circle.unwrap_or([1.0 - t, t])
    };
    if group.shared.flag("nuslerp_flatten") || group.shape.len() < 2 {
        let gram = Gram::of(group)?;
        let [a, b] = coefficients(gram.product(0, 0), gram.product(0, 1), gram.product(1, 1));
        return gram::write(group, &[a, b], push);
    }
    if group.shared.flag("nuslerp_row_wise") {
        return by_column(group, &coefficients, push);
    }
    let row = group.row();
    group.sweep_changes(row, &mut |chunk| {
        let (first, second) = chunk.inputs.split_at_mut(1);
        for (x, y) in first[0].chunks_mut(row).zip(second[0].chunks(row)) {
            let [a, b] = coefficients(dot(x, x), dot(x, y), dot(y, y)).map(|c| c as f32);
            x.iter_mut().zip(y).for_each(|(x, y)| *x = a * *x + b * y);
        }
        first[0].iter_mut().zip(&chunk.base).for_each(|(x, base)| *x += base);
        push(&first[0])
    })
}

/// Every vector runs along dimension 0.
fn by_column(
    group: &Group<'_>,
    coefficients: &dyn Fn(f64, f64, f64) -> [f64; 2],
    push: &mut dyn FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let width = (group.len() / group.shape[0].max(1)).max(1);
    let mut sums = vec![[0.0_f64; 3]; width];
    group.sweep_changes(width, &mut |chunk| {
        for (x, y) in chunk.inputs[0].chunks(width).zip(chunk.inputs[1].chunks(width)) {
            for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
                let (x, y) = (f64::from(*x), f64::from(*y));
                *sum = [sum[0] + x * x, sum[1] + x * y, sum[2] + y * y];
            }
        }
        Ok(())
    })?;
    let of_column = |[xx, xy, yy]: [f64; 3]| coefficients(xx, xy, yy).map(|c| c as f32);
    let columns: Vec<[f32; 2]> = sums.into_iter().map(of_column).collect();
    group.sweep_changes(width, &mut |chunk| {
        let (first, second) = chunk.inputs.split_at_mut(1);
        for (x, y) in first[0].chunks_mut(width).zip(second[0].chunks(width)) {
            for ((x, y), [a, b]) in x.iter_mut().zip(y).zip(&columns) {
                *x = a * *x + b * y;
            }
        }
        first[0].iter_mut().zip(&chunk.base).for_each(|(x, base)| *x += base);
        push(&first[0])
    })
}
