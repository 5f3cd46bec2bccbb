//! Model Breadcrumbs: noisy fine-tunes are better merged without their outliers.

use std::fmt::Write;

use retune_core::random::Seed;

use crate::lab::{Lab, Pace, Values, method};
use crate::merging::merge;
use crate::mlp::Mlp;
use crate::pictures::{DIGITS, PIXELS, Pictures};
use crate::{Claim, Clock, Proof, Prove, Result, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 37,
    name: "Model Breadcrumbs",
    source: "Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse \
             Masks, 2023, arXiv 2312.06795",
    claims: "Where fine-tunes are noisy, leaving out the largest changes of each tensor and the small \
             ones before adding them up gives a better model for all tasks than adding whole changes, \
             at the same search budget.",
    run: "Perceptron 64-256-256-10 pretrained on 800 scanned digits (300 steps of 128, AdamW 1e-3). \
          Eight tasks, each with 24 of the 64 pixels in another order; each tuned with the head \
          frozen on 300 pictures of which a fifth has a random label (250 steps of 64 at 2e-3 and \
          5e-3); merged by the program's own `breadcrumbs` and `task_arithmetic`. Alpha is chosen of \
          12 values on 200 validation pictures of each task, and the mean over tasks of accuracy over \
          the single task's is measured on the 497 left; three seeds of each rate.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_TASKS: usize = 8;
const MOVED_PIXELS: usize = 24;
const RATES: [f64; 2] = [2e-3, 5e-3];
const NUM_SEEDS: u64 = 3;
const ALPHAS: [f64; 12] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5];

/// What is merged: name, method, share kept, share of outliers.
const ARMS: [(&str, &str, f64, f64); 4] = [
    ("all changes", "task_arithmetic", 1.0, 0.0),
    ("breadcrumbs: half, without the largest twentieth", "breadcrumbs", 0.5, 0.05),
    ("the largest 15 %", "breadcrumbs", 0.15, 0.0),
    ("random 15 %", "dare_linear", 0.15, 0.0),
];

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    let _ = writeln!(
        proof.figures,
        "| merged | rate {:e} | rate {:e} |\n|---|---|---|",
        RATES[0], RATES[1]
    );
    // [rate][seed][arm]
    let mut found: Vec<Vec<Vec<f64>>> = Vec::new();
    for rate in RATES {
        found.push((0..NUM_SEEDS).map(|seed| one_seed(Seed(seed), rate)).collect::<Result<_>>()?);
    }
    let of = |rate: usize, arm: usize| -> Vec<f64> {
        found[rate].iter().map(|arms| arms[arm]).collect()
    };
    for (arm, (name, ..)) in ARMS.iter().enumerate() {
        let cell = |rate| of(rate, arm).iter().map(|v| format!("{v:.3}")).collect::<Vec<_>>();
        let (first, second) = (cell(0).join(", "), cell(1).join(", "));
        let _ = writeln!(proof.figures, "| {name} | {first} | {second} |");
    }
    let gains = |arm: usize| -> Vec<f64> {
        let seeds = found.iter().flatten();
        seeds.map(|arms| arms[arm] - arms[0]).collect()
    };
    let shown = |gains: &[f64]| {
        gains.iter().map(|gain| format!("{gain:+.3}")).collect::<Vec<_>>().join(", ")
    };
    let (breadcrumbs, largest) = (gains(1), gains(2));
    proof.assert(
        "without outliers the merged model is better than with all changes, on every seed and rate",
        shown(&breadcrumbs),
        breadcrumbs.iter().all(|gain| *gain > 0.0),
    );
    proof.assert(
        "the gain is from the outliers: the largest 15 % alone are worse than all changes, on the \
         mean",
        format!("{:+.3} ({})", mean(&largest), shown(&largest)),
        mean(&largest) < 0.0,
    );
    proof.notes.push(
        "That settings found on a few tasks carry over to many more, the paper's other claim, is no \
         part of this proof: small nets do not show it."
            .to_owned(),
    );
    Ok(proof)
}

/// Merges eight tasks; returns each arm's normalised accuracy.
fn one_seed(seed: Seed, rate: f64) -> Result<Vec<f64>> {
    let clean = Pictures::digits(seed);
    let count = clean.len();
    let noisy = |pictures: Pictures, task: usize| {
        let mut random = seed.stream("noisy labels", &[task as u64]);
        let label = |digit: u32| {
            let (is_random, drawn) = (random.uniform() < 0.2, random.below(DIGITS) as u32);
            if is_random { drawn } else { digit }
        };
        Pictures { digits: pictures.digits.into_iter().map(label).collect(), ..pictures }
    };
    // Clean pictures, then of each task all with true labels and all with noisy ones.
    let mut pictures = clean.clone();
    for task in 0..NUM_TASKS {
        let seen = clean.with_moved(MOVED_PIXELS, Seed(seed.0 * 100 + task as u64));
        pictures = pictures.and(seen.clone()).and(noisy(seen, task));
    }
    let rows = |block: usize, from: usize, to: usize| -> Vec<usize> {
        (block * count + from..block * count + to).collect()
    };
    let model = Mlp::new(pictures.table(), &[PIXELS, 256, 256, DIGITS]);
    let mut lab = Lab::of_pictures(model, &pictures, seed);
    lab.pretrain(&rows(0, 0, 800), Pace::steps(300, 128, 1e-3).constant(), seed)?;
    let base = lab.values().clone();
    let mut tuned: Vec<Values> = Vec::new();
    let mut single = Vec::new();
    for task in 0..NUM_TASKS {
        lab.set(base.clone());
        let full = method("full", "freeze = [\"head\"]")?;
        let train = rows(2 + 2 * task, 800, 1100);
        let pace = Pace::steps(250, 64, rate).constant();
        let values = lab.tune(full, &train, pace, Seed(seed.0 * 100 + task as u64), &[])?.merged;
        lab.set(values.clone());
        single.push(lab.accuracy(&rows(1 + 2 * task, 1300, count))?);
        tuned.push(values);
    }
    let mut normalised = |values: Values, from: usize, to: usize| -> Result<f64> {
        lab.set(values);
        let of = |task: usize| Ok(lab.accuracy(&rows(1 + 2 * task, from, to))? / single[task]);
        Ok(mean(&(0..NUM_TASKS).map(of).collect::<Result<Vec<f64>>>()?))
    };
    let tuned: Vec<&Values> = tuned.iter().collect();
    let mut arms = Vec::new();
    for (_, name, density, gamma) in ARMS {
        let merged = |alpha: f64| {
            let settings = [
                ("lambda", alpha),
                ("density", density),
                ("gamma", gamma),
                ("rescale", 0.0),
                ("normalize", 0.0),
            ];
            merge(name, &settings, &base, &tuned)
        };
        let mut best = (ALPHAS[0], f64::NEG_INFINITY);
        for alpha in ALPHAS {
            let score = normalised(merged(alpha)?, 1100, 1300)?;
            if score > best.1 {
                best = (alpha, score);
            }
        }
        arms.push(normalised(merged(best.0)?, 1300, count)?);
    }
    Ok(arms)
}
