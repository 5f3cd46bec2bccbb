//! Model Stock.

use super::elementwise::combine;
use super::gram::{self, Gram};
use super::{Base, Group, Method, Parameter, nothing_to_check};
use crate::Result;

/// The point between base and mean of the models that is nearest to the centre of the tuned
/// weights, from the mean cosine `c` between the changes: `t = N·c / (1 + (N − 1)·c)`.
pub(super) const MODEL_STOCK: Method = Method {
    name: "model_stock",
    title: "Model Stock",
    source: "https://arxiv.org/abs/2403.19522",
    about: "between the base and the mean of all models, by the angles between their changes",
    base: Base::Required,
    min_inputs: 2,
    max_inputs: usize::MAX,
    parameters: &[Parameter::flag("filter_wise", false, "takes angles row by row")],
    check: nothing_to_check,
    run,
};

const SMALLEST_PRODUCT: f64 = 1e-6;

fn run(group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let n = group.inputs.len();
    if !group.shared.flag("filter_wise") {
        let share = share_of_mean(&Gram::of(group)?, n) / n as f64;
        return gram::write(group, &vec![share; n], push);
    }
    let row = group.row();
    let mut mean = Vec::new();
    group.sweep_changes(row, &mut |chunk| {
        combine(&mut mean, &vec![1.0 / n as f64; n], &chunk.inputs);
        for (i, (mean, base)) in mean.chunks(row).zip(chunk.base.chunks_mut(row)).enumerate() {
            let part = i * row..i * row + base.len();
            let vectors: Vec<&[f32]> = chunk.inputs.iter().map(|x| &x[part.clone()]).collect();
            let mut gram = Gram::empty(n);
            gram.add(&vectors);
            let share = share_of_mean(&gram, n) as f32;
            base.iter_mut().zip(mean).for_each(|(base, mean)| *base += share * mean);
        }
        push(&chunk.base)
    })
}

/// Returns `t`. Changes that cancel out have no finite answer, and the base is kept.
fn share_of_mean(gram: &Gram, n: usize) -> f64 {
    let mut cosines = 0.0;
    for i in 0..n {
        for j in i + 1..n {
            let product = (gram.norm(i) * gram.norm(j)).max(SMALLEST_PRODUCT);
            cosines += (gram.product(i, j) / product).clamp(-1.0, 1.0);
        }
    }
    let cosine = cosines / (n * (n - 1) / 2) as f64;
    let divisor = 1.0 + (n as f64 - 1.0) * cosine;
    if divisor.abs() < 1e-6 { 0.0 } else { n as f64 * cosine / divisor }
}
