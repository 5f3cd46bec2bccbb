//! Weighted mean on a sphere, by one step in the tangent space.

use super::gram::{self, Gram};
use super::{Base, Group, Method, Parameter, WEIGHT, check_sum};
use crate::Result;

/// Unit vectors, their weighted mean direction, one step along the mean tangent there, times the
/// weighted mean of the lengths. With a base, of the changes.
pub(super) const MULTISLERP: Method = Method {
    name: "multislerp",
    title: "Multi-SLERP",
    source: "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    about: "weighted mean direction of several models on a sphere",
    base: Base::Optional,
    min_inputs: 1,
    max_inputs: usize::MAX,
    parameters: &[
        WEIGHT,
        Parameter::flag("normalize_weights", true, "divides the weights by their sum"),
        Parameter::shared("eps", "smallest length").or(1e-8).within(0.0, 1.0),
    ],
    check: |shared, own| if shared.flag("normalize_weights") { check_sum(own) } else { None },
    run,
};

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let n = group.inputs.len();
    if n == 1 {
        return gram::write(group, &[1.0], push);
    }
    let mut weights: Vec<f64> = group.own.iter().map(|own| own.number("weight")).collect();
    if group.shared.flag("normalize_weights") {
        let sum: f64 = weights.iter().sum();
        for weight in &mut weights {
            *weight /= sum;
        }
    }
    let eps = group.shared.number("eps");
    let gram = Gram::of(group)?;
    // All vectors below are combinations of the inputs, so they are handled by coefficients.
    let unit: Vec<f64> = (0..n).map(|i| 1.0 / (gram.norm(i) + eps)).collect();
    let mean: Vec<f64> = weights.iter().zip(&unit).map(|(weight, unit)| weight * unit).collect();
    let length = gram.length(&mean);
    if length < eps {
        // Two opposite models, or tensors that are zero in all of them.
        if n == 2 || (0..n).all(|i| gram.norm(i) <= eps) {
            return gram::write(group, &weights, push);
        }
        let help = "change the weights, or leave one of these models out";
        return Err(group.no_answer("the weighted directions cancel out", help));
    }
    let mean: Vec<f64> = mean.iter().map(|coefficient| coefficient / length).collect();
    let mut tangent = vec![0.0; n];
    for i in 0..n {
        let mut one = vec![0.0; n];
        one[i] = unit[i];
        let along = gram.inner(&one, &mean);
        for j in 0..n {
            tangent[j] += weights[i] * (one[j] - along * mean[j]);
        }
    }
    let step = gram.length(&tangent) + eps;
    let radius: f64 = (0..n).map(|i| weights[i] * gram.norm(i)).sum();
    let coefficients: Vec<f64> =
        (0..n).map(|i| radius * (mean[i] * step.cos() + tangent[i] * step.sin() / step)).collect();
    gram::write(group, &coefficients, push)
}
