//! Shipping a low-rank change of a quantised base: merging is exact, quantising again is not.

use std::fmt::Write;

use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::Role;
use retune_methods::nf4;

use crate::lab::{Lab, Values, method};
use crate::mlp::Mlp;
use crate::regression::documents;
use crate::{Claim, Clock, Error, Proof, Prove, Result, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 19,
    name: "shipping order",
    source: "Syromiatnikov, Ruvinskaya and Komleva, Empowering Smaller Models: Tuning LLaMA and Gemma \
             with Chain-of-Thought for Ukrainian Exam Tasks, 2025, arXiv 2503.13988",
    claims: "An adapter of a quantised base that is merged into the unquantised one and quantised again \
             is another model than the one that was trained.",
    run: "One layer of 128 by 128, weights from N(0, 0.02²); the task adds a change of rank 4, normal \
          factors, of norm 0.38, so that the untuned layer is as far off as in the trial this follows. \
          NF4 in blocks of 64, scales as they are; LoRA of rank 8 at the least squares fit of the \
          quantised layer to the task on 2,000 inputs from N(0, 1), in closed form (reduced-rank \
          regression); squared error on 2,000 others, five seeds. The adapter runs, and is merged, as in \
          a run.",
    quick: true,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const WIDTH: usize = 128;
const RANK: usize = 8;
const NUM_ROWS: usize = 2000;
/// Frobenius norm of what the task adds.
const CHANGE: f64 = 0.38;
const WEIGHT: &str = "head.weight";

/// What is measured, in this order.
const ARMS: [&str; 7] = [
    "the quantised base alone",
    "the base alone",
    "(a) quantised base, adapter beside it",
    "(b) merged into the base",
    "(c) merged into the base, then quantised",
    "(d) merged into the quantised base",
    "(e) merged into the quantised base, then quantised",
];

/// What one seed gave.
struct Found {
    /// Mean squared errors by arm.
    errors: [f64; 7],
    /// How far the outputs of (d) are from those of (a), over the size of the latter.
    apart: f64,
}

fn prove(_clock: Clock) -> Result<Proof> {
    let seeds = (0..NUM_SEEDS).map(|n| one(Seed(1900 + n))).collect::<Result<Vec<Found>>>()?;
    let of = |arm: usize| seeds.iter().map(|found| found.errors[arm]).collect::<Vec<f64>>();
    let shown = |values: &[f64]| {
        values.iter().map(|value| format!("{:.2}", 1e4 * value)).collect::<Vec<_>>().join(", ")
    };
    let mut proof = Proof::default();
    proof
        .figures
        .push_str("| | squared error × 10⁴, mean | each seed | the trial |\n|---|---|---|---|\n");
    let trial = [15.5, 11.3, 3.56, 0.75, 5.14, 3.56, 7.59];
    for ((arm, name), trial) in ARMS.iter().enumerate().zip(trial) {
        let values = of(arm);
        let mean = 1e4 * mean(&values);
        let _ = writeln!(proof.figures, "| {name} | {mean:.2} | {} | {trial} |", shown(&values));
    }
    let worst = seeds.iter().map(|found| found.apart).fold(0.0, f64::max);
    proof.assert(
        "outputs of (d) are those of (a) within 1e-6 of their size, on every seed",
        format!("{worst:.1e} at most"),
        worst <= 1e-6,
    );
    let [a, b, c, e] = [2, 3, 4, 6].map(|arm| mean(&of(arm)));
    proof.assert(
        "the error of (a) is below that of (c), and that of (c) below that of (e), on the mean",
        shown(&[a, c, e]),
        a < c && c < e,
    );
    let ratios: Vec<f64> = of(3).iter().zip(of(2)).map(|(b, a)| b / a).collect();
    let differs = ratios.iter().all(|ratio| (ratio - 1.0).abs() > 1e-2);
    proof.assert(
        "the error of (b) is another than that of (a), by more than a hundredth, on every seed",
        format!("{} of it", crate::each(&ratios)),
        differs,
    );
    proof.notes.push(format!(
        "(b) is {} here, because the fit undoes part of the rounding and the task itself has a low \
         rank; it need not be. How far each way moves the answers of a language model, `retune ship` \
         measures.",
        if b < a { "better than what was trained" } else { "worse than what was trained" }
    ));
    Ok(proof)
}

fn one(seed: Seed) -> Result<Found> {
    let draw = |purpose: &str, count: usize, deviation: f64| {
        let mut values = vec![0.0; count];
        seed.stream(purpose, &[]).fill_normal(&mut values, deviation);
        values
    };
    let base = draw("weight", WIDTH * WIDTH, 0.02);
    let target = {
        let change = product(&draw("out", WIDTH * 4, 1.0), &draw("in", 4 * WIDTH, 1.0), 4);
        let norm = change.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let add = |(w, x): (&f32, &f32)| w + (f64::from(*x) * CHANGE / norm) as f32;
        base.iter().zip(&change).map(add).collect::<Vec<f32>>()
    };
    let rounded = |values: &[f32]| {
        let mut values = values.to_vec();
        nf4::round(&mut values);
        values
    };
    let quantised = rounded(&base);
    let train = draw("train", NUM_ROWS * WIDTH, 1.0);
    let (a, b) = fit(&quantised, &target, &train);

    let test = draw("test", NUM_ROWS * WIDTH, 1.0);
    let model = Mlp::new(test.into(), &[WIDTH, WIDTH]).with_head_as(Role::Down);
    let lab = Lab::new(model, documents(NUM_ROWS), seed);
    let rows: Vec<usize> = (0..NUM_ROWS).collect();
    let with = |weight: &[f32]| lab.with(Values::from([(WEIGHT.to_owned(), weight.to_vec())]));
    let alone = |weight: &[f32]| with(weight).scores(&rows);
    let wanted = alone(&target)?;
    let (attached, dequantised) = adapted(&with(&quantised), &a, &b, &rows)?;
    let (_, merged) = adapted(&with(&base), &a, &b, &rows)?;
    let outputs = [
        alone(&quantised)?,
        alone(&base)?,
        attached,
        alone(&merged)?,
        alone(&rounded(&merged))?,
        alone(&dequantised)?,
        alone(&rounded(&dequantised))?,
    ];
    let size: f64 = outputs[2].iter().map(|x| f64::from(*x).powi(2)).sum();
    let apart = (squares(&outputs[5], &outputs[2]) / size).sqrt();
    let errors = outputs.each_ref().map(|found| squares(found, &wanted) / wanted.len() as f64);
    Ok(Found { errors, apart })
}

/// Computes the outputs of a layer with an adapter beside it, and the weight with it merged in.
fn adapted(lab: &Lab, a: &[f32], b: &[f32], rows: &[usize]) -> Result<(Vec<f32>, Vec<f32>)> {
    let options = format!("rank = {RANK}\nalpha = {RANK}\ntargets = ['head']");
    let weights = lab.weights()?;
    let mut parameters = Parameters::new(weights.device());
    let changes: Changes = method("lora", &options)?.attach(&weights, &mut parameters, Seed(0))?;
    for (end, values) in [("lora_A.weight", a), ("lora_B.weight", b)] {
        let name = format!("head.{end}");
        let id = parameters.iter().find(|(_, known)| known.name.ends_with(&name)).map(|(id, _)| id);
        let id = id.ok_or_else(|| Error::NoMethod(format!("lora with `{name}`")))?;
        parameters.set(id, values.to_vec())?;
    }
    let model = lab.model.as_ref();
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
    let merged = lab.merged(&tuned)?.remove(WEIGHT).unwrap_or_default();
    Ok((lab.logits(&tuned, rows)?, merged))
}

/// Finds the factors `a [8, in]` and `b [out, 8]` for which `base + b·a` is nearest to the target on
/// the inputs: of what is missing, the directions of the outputs in which it has most of its variance.
fn fit(base: &[f32], target: &[f32], inputs: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let missing: Vec<f32> = target.iter().zip(base).map(|(t, b)| t - b).collect();
    let mut covariance = vec![0.0_f64; WIDTH * WIDTH];
    for x in inputs.chunks_exact(WIDTH) {
        let y: Vec<f64> = missing.chunks_exact(WIDTH).map(|row| dot(row, x)).collect();
        for (row, left) in covariance.chunks_exact_mut(WIDTH).zip(&y) {
            retune_eigen::add_scaled(row, *left, &y);
        }
    }
    let directions = retune_eigen::symmetric(covariance, WIDTH, true).vectors;
    let kept = &directions[..RANK * WIDTH];
    let mut a = vec![0.0_f64; RANK * WIDTH];
    let mut b = vec![0.0_f32; WIDTH * RANK];
    for (r, direction) in kept.chunks_exact(WIDTH).enumerate() {
        for (output, part) in direction.iter().enumerate() {
            b[output * RANK + r] = *part as f32;
            let row = &missing[output * WIDTH..(output + 1) * WIDTH];
            for (a, m) in a[r * WIDTH..(r + 1) * WIDTH].iter_mut().zip(row) {
                *a += part * f64::from(*m);
            }
        }
    }
    (a.iter().map(|value| *value as f32).collect(), b)
}

/// Multiplies `[WIDTH, inner]` by `[inner, WIDTH]`.
fn product(left: &[f32], right: &[f32], inner: usize) -> Vec<f32> {
    let mut out = vec![0.0; WIDTH * WIDTH];
    for (row, factors) in out.chunks_exact_mut(WIDTH).zip(left.chunks_exact(inner)) {
        for (factor, values) in factors.iter().zip(right.chunks_exact(WIDTH)) {
            row.iter_mut().zip(values).for_each(|(y, x)| *y += factor * x);
        }
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Sums the squares of differences.
fn squares(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_low_rank_is_found_whole() {
        let mut base = vec![0.0; WIDTH * WIDTH];
        Seed(1).stream("base", &[]).fill_normal(&mut base, 0.1);
        let (mut left, mut right) = (vec![0.0; WIDTH * RANK], vec![0.0; RANK * WIDTH]);
        Seed(1).stream("left", &[]).fill_normal(&mut left, 1.0);
        Seed(1).stream("right", &[]).fill_normal(&mut right, 1.0);
        let change = product(&left, &right, RANK);
        let target: Vec<f32> = base.iter().zip(&change).map(|(w, x)| w + x).collect();
        let mut inputs = vec![0.0; 300 * WIDTH];
        Seed(1).stream("inputs", &[]).fill_normal(&mut inputs, 1.0);
        let (a, b) = fit(&base, &target, &inputs);
        let found = product(&b, &a, RANK);
        for (found, wanted) in found.iter().zip(&change) {
            assert!((found - wanted).abs() < 1e-4, "{found} {wanted}");
        }
    }
}
