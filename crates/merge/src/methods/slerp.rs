//! Spherical interpolation between two models.

use super::angles::along_circle;
use super::gram::Gram;
use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

/// The great circle from the base (`t = 0`) to the other model (`t = 1`), tensor by tensor.
///
/// Sines of the angle weigh the vectors as they are, lengths included. Nearly parallel tensors are
/// interpolated on the straight line.
pub(super) const SLERP: Method = Method {
    name: "slerp",
    title: "SLERP",
    source: "https://en.wikipedia.org/wiki/Slerp",
    about: "great circle between the base and one other model",
    base: Base::Required,
    min_inputs: 1,
    max_inputs: 1,
    parameters: &[Parameter::shared("t", "0 gives the base, 1 the other model")],
    check: nothing_to_check,
    run,
};

/// Cosine above which the line is taken.
const NEARLY_PARALLEL: f64 = 0.9995;
/// Lengths below this are taken as they are.
const SMALLEST_NORM: f64 = 1e-8;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let t = group.shared.number("t");
    let mut gram = Gram::empty(2);
    group.sweep(1, &mut |chunk| {
        gram.add(&[&chunk.base, &chunk.inputs[0]]);
        Ok(())
    })?;
    let norm = |i| Some(gram.norm(i)).filter(|norm| *norm > SMALLEST_NORM).unwrap_or(1.0);
    let cosine = gram.product(0, 1) / (norm(0) * norm(1));
    let circle = along_circle(t, cosine, 0.0).filter(|_| cosine.abs() <= NEARLY_PARALLEL);
    let [a, b] = circle.unwrap_or([1.0 - t, t]).map(|coefficient| coefficient as f32);
    group.sweep(1, &mut |chunk| {
        let other = &chunk.inputs[0];
        chunk.base.iter_mut().zip(other).for_each(|(x, y)| *x = a * *x + b * y);
        push(&chunk.base)
    })
}
