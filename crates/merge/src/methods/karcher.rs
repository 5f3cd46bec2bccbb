//! Riemannian mean on a sphere.

use super::gram::{self, Gram};
use super::{Base, Group, Kind, Method, Parameter, Scope, nothing_to_check};
use crate::Result;

/// The direction with the smallest sum of squared angles to all models, times their mean length.
pub(super) const KARCHER: Method = Method {
    name: "karcher",
    title: "Karcher mean",
    source: "https://arxiv.org/abs/2603.04972",
    about: "mean direction of several models on a sphere, found by iteration",
    base: Base::Ordinary,
    min_inputs: 1,
    max_inputs: usize::MAX,
    parameters: &[
        Parameter::new("max_iter", Scope::Shared, Kind::Count, "most iterations")
            .or(10.0)
            .within(1.0, 1000.0),
        Parameter::shared("tol", "step below which the mean is found").or(1e-5).within(0.0, 1.0),
    ],
    check: nothing_to_check,
    run,
};

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let n = group.inputs.len();
    if n == 1 {
        return gram::write(group, &[1.0], push);
    }
    let tolerance = group.shared.number("tol");
    let gram = Gram::of(group)?;
    let valid: Vec<usize> = (0..n).filter(|i| gram.norm(*i) > tolerance).collect();
    let share = 1.0 / valid.len().max(1) as f64;
    // Unit vectors as coefficients of the inputs; zero tensors have no direction.
    let units: Vec<Vec<f64>> = valid
        .iter()
        .map(|i| {
            let mut unit = vec![0.0; n];
            unit[*i] = 1.0 / gram.norm(*i);
            unit
        })
        .collect();
    let Some(first) = units.first() else {
        return gram::write(group, &vec![0.0; n], push);
    };
    let parts: Vec<(f64, &[f64])> = units.iter().map(|unit| (share, unit.as_slice())).collect();
    let mut mean = mix(&parts);
    let length = gram.length(&mean);
    mean = if length < tolerance { first.clone() } else { mix(&[(1.0 / length, &mean)]) };
    for _ in 0..group.shared.number("max_iter") as usize {
        let mut tangent = vec![0.0; n];
        for unit in &units {
            let cosine = gram.inner(&mean, unit).clamp(-1.0, 1.0);
            let angle = cosine.acos();
            if angle >= tolerance {
                let factor = share * angle / angle.sin();
                for i in 0..n {
                    tangent[i] += factor * (unit[i] - cosine * mean[i]);
                }
            }
        }
        let step = gram.length(&tangent);
        if step < tolerance {
            break;
        }
        mean = mix(&[(step.cos(), &mean), (step.sin() / step, &tangent)]);
        let length = gram.length(&mean);
        if length > tolerance {
            mean = mix(&[(1.0 / length, &mean)]);
        }
    }
    let radius = (0..n).map(|i| gram.norm(i)).sum::<f64>() / n as f64;
    let coefficients: Vec<f64> = mean.iter().map(|coefficient| radius * coefficient).collect();
    gram::write(group, &coefficients, push)
}

/// Adds up combinations.
fn mix(parts: &[(f64, &[f64])]) -> Vec<f64> {
    let mut sum = vec![0.0; parts.first().map_or(0, |(_, part)| part.len())];
    for (factor, part) in parts {
        sum.iter_mut().zip(*part).for_each(|(sum, x)| *sum += factor * x);
    }
    sum
}
