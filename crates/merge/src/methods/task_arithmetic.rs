//! Task arithmetic and its family: changes are thinned out, weighed, agreed on and added.
//!
//! `base + λ · Σ wᵢ · mask(θᵢ − base)`, optionally only where the sign agrees with that of the sum,
//! optionally divided by the sum of the weights that took part.

use super::elementwise::{add_scaled, scale};
use super::sparsify::{self, Rule};
use super::{Base, Group, Method, Parameter, Resolved, WEIGHT, check_sum};
use crate::Result;

/// How a method of the family departs from plain task arithmetic.
#[derive(Debug, Clone, Copy)]
struct Frame {
    rule: Rule,
    /// Whether values whose sign is not that of the sum are left out.
    consensus: bool,
}

const NORMALIZE: &str = "divides by the sum of the weights that take part";
const INT8_MASK: Parameter = Parameter::flag("int8_mask", false, "read and without effect");
const LAMBDA: Parameter = Parameter::shared("lambda", "factor on the summed change").or(1.0);
const DENSITY: Parameter =
    Parameter::input("density", "share of a change that stays").or(1.0).within(0.0, 1.0);
const GAMMA: Parameter = Parameter::input("gamma", "share of the largest values that is dropped")
    .or(0.01)
    .within(0.0, 1.0);
const EPSILON: Parameter =
    Parameter::input("epsilon", "how far the chance to stay departs from density")
        .or(0.15)
        .within(0.0, 0.5);

const fn normalize(default: bool) -> Parameter {
    Parameter::flag("normalize", default, NORMALIZE)
}

const fn rescale(default: bool) -> Parameter {
    Parameter::flag("rescale", default, "makes up for dropped values by their sum of magnitudes")
}

const fn family(
    name: &'static str,
    title: &'static str,
    source: &'static str,
    about: &'static str,
    parameters: &'static [Parameter],
) -> Method {
    Method {
        name,
        title,
        source,
        about,
        base: Base::Required,
        min_inputs: 1,
        max_inputs: usize::MAX,
        parameters,
        check: |_, _| None,
        run: |group, push| run(Frame { rule: Rule::Nothing, consensus: false }, group, push),
    }
}

/// The sum of weighted changes.
pub(super) const TASK_ARITHMETIC: Method = Method {
    check: check_plain,
    ..family(
        "task_arithmetic",
        "Task Arithmetic",
        "https://arxiv.org/abs/2212.04089",
        "adds weighted changes to the base",
        &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(false), INT8_MASK],
    )
};

/// The largest values of each change, where signs agree.
pub(super) const TIES: Method = Method {
    run: |group, push| run(Frame { rule: Rule::Largest, consensus: true }, group, push),
    ..family(
        "ties",
        "TIES",
        "https://arxiv.org/abs/2306.01708",
        "adds the largest values of each change where their signs agree",
        &[WEIGHT, DENSITY, LAMBDA, normalize(true), rescale(false), INT8_MASK],
    )
};

const DARE_SOURCE: &str = "https://arxiv.org/abs/2311.03099";

/// Random values of each change.
pub(super) const DARE_LINEAR: Method = Method {
    check: check_plain,
    run: |group, push| run(Frame { rule: Rule::Random, consensus: false }, group, push),
    ..family(
        "dare_linear",
        "DARE",
        DARE_SOURCE,
        "adds random values of each change, rescaled",
        &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(true), INT8_MASK],
    )
};

/// Random values of each change, where signs agree.
pub(super) const DARE_TIES: Method = Method {
    run: |group, push| run(Frame { rule: Rule::Random, consensus: true }, group, push),
    ..family(
        "dare_ties",
        "DARE with TIES",
        DARE_SOURCE,
        "adds random values of each change, rescaled, where their signs agree",
        &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(true), INT8_MASK],
    )
};

const DELLA_SOURCE: &str = "https://arxiv.org/abs/2406.11617";

/// Values drawn by rank, where signs agree.
pub(super) const DELLA: Method = Method {
    check: |_, own| check_epsilon(own),
    run: |group, push| run(Frame { rule: Rule::Ranked, consensus: true }, group, push),
    ..family(
        "della",
        "DELLA",
        DELLA_SOURCE,
        "adds values drawn by their rank in the row where their signs agree",
        &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(true), rescale(true), INT8_MASK],
    )
};

/// Values drawn by rank.
pub(super) const DELLA_LINEAR: Method = Method {
    check: |shared, own| check_epsilon(own).or_else(|| check_plain(shared, own)),
    run: |group, push| run(Frame { rule: Rule::Ranked, consensus: false }, group, push),
    ..family(
        "della_linear",
        "DELLA without consensus",
        DELLA_SOURCE,
        "adds values drawn by their rank in the row",
        &[WEIGHT, DENSITY, EPSILON, LAMBDA, normalize(false), rescale(true), INT8_MASK],
    )
};

const BREADCRUMBS_SOURCE: &str = "https://arxiv.org/abs/2312.06795";

/// The middle band of each change.
///
/// As in the paper a tensor too small for one outlier (`gamma · n < 1`) loses none. mergekit 0.1.4
/// drops its whole change there, and so does `compat: mergekit`.
pub(super) const BREADCRUMBS: Method = Method {
    check: check_plain,
    run: |group, push| run(Frame { rule: Rule::Band, consensus: false }, group, push),
    ..family(
        "breadcrumbs",
        "Model Breadcrumbs",
        BREADCRUMBS_SOURCE,
        "adds the middle band of each change: no outliers, no noise",
        &[WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(false), rescale(false), INT8_MASK],
    )
};

/// The middle band of each change, where signs agree.
pub(super) const BREADCRUMBS_TIES: Method = Method {
    run: |group, push| run(Frame { rule: Rule::Band, consensus: true }, group, push),
    ..family(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        BREADCRUMBS_SOURCE,
        "adds the middle band of each change where their signs agree",
        &[WEIGHT, DENSITY, GAMMA, LAMBDA, normalize(false), rescale(false), INT8_MASK],
    )
};

fn check_plain(shared: &Resolved, own: &[Resolved]) -> Option<String> {
    if shared.flag("normalize") { check_sum(own) } else { None }
}

/// Refuses a chance to stay that would leave `0..=1`.
fn check_epsilon(own: &[Resolved]) -> Option<String> {
    own.iter().find_map(|own| {
        let (density, epsilon) = (own.number("density"), own.number("epsilon"));
        let inside = density - epsilon > 0.0 && density + epsilon < 1.0;
        (density > 0.0 && density < 1.0 && !inside).then(|| {
            format!("density {density} ± epsilon {epsilon} must lie between 0 and 1, both excluded")
        })
    })
}

fn run(frame: Frame, group: &Group<'_>, push: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let shared = group.shared;
    let weights: Vec<f32> = group.own.iter().map(|own| own.number("weight") as f32).collect();
    let sum_of_weights: f32 = weights.iter().sum();
    let (normalize, lambda) = (shared.flag("normalize"), shared.number("lambda") as f32);
    let mut sparse = sparsify::prepare(frame.rule, shared.flag("rescale"), group)?;
    let row = group.row();
    let mut total = Vec::new();
    group.sweep_changes(sparsify::unit(frame.rule, group), &mut |chunk| {
        let inputs = &mut chunk.inputs;
        for ((changes, sparse), weight) in inputs.iter_mut().zip(&mut sparse).zip(&weights) {
            sparse.apply(chunk.start, row, changes);
            scale(changes, *weight);
        }
        total.clear();
        total.resize(chunk.base.len(), 0.0);
        for changes in &*inputs {
            add_scaled(&mut total, 1.0, changes);
        }
        if frame.consensus {
            agree(&mut total, inputs, &weights, normalize);
        } else if normalize {
            for x in &mut total {
                *x /= sum_of_weights;
            }
        }
        for (base, change) in chunk.base.iter_mut().zip(&total) {
            *base += lambda * change;
        }
        push(&chunk.base)
    })
}

/// Replaces each sum by the sum of those values that have its sign; zero counts as positive.
fn agree(total: &mut [f32], inputs: &[Vec<f32>], weights: &[f32], normalize: bool) {
    for (i, total) in total.iter_mut().enumerate() {
        let positive = *total >= 0.0;
        let (mut sum, mut divisor) = (0.0, 0.0);
        for (changes, weight) in inputs.iter().zip(weights) {
            let x = changes[i];
            if x != 0.0 && (x > 0.0) == positive {
                sum += x;
                divisor += weight;
            }
        }
        *total = if normalize && divisor != 0.0 { sum / divisor } else { sum };
    }
}
