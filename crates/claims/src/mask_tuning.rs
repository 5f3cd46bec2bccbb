//! R-AMT: switching weights off, and changing none, adapts a model.

use std::fmt::Write;

use retune_core::random::Seed;

use crate::lab::{Lab, Pace, method};
use crate::mlp::Mlp;
use crate::pictures::{DIGITS, PIXELS, Pictures};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 32,
    name: "R-AMT",
    source: "Zheng, Wu, Bao, Yan and others, Regularized Mask Tuning: Uncovering Hidden Knowledge in \
             Pre-trained Vision-Language Models, 2023, arXiv 2307.15049",
    claims: "Switching single weights off, with every other value left as pretrained, lifts \
             few-shot accuracy far above the untuned model's; dropping gradients that disagree with \
             its predictions regularises.",
    run: "Perceptron 64-256-256-256-256-10 pretrained on 900 digits, 20 passes; then 16 pictures of \
          each class seen through a gain exp(N(0, 0.5²)) and an offset N(0, 0.45²) of each pixel; \
          masks on the three hidden matrices, first and last layer untouched; 30 passes in batches \
          of 32, Adam, cosine; two rates, without and with gradient dropout (0.3); measured on 737 \
          others, five seeds.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const SHOTS: usize = 16;

/// Rate and dropout of each arm.
const ARMS: [(f64, f64); 4] = [(2e-4, 0.0), (8e-4, 0.0), (2e-4, 0.3), (8e-4, 0.3)];

/// What one seed found.
struct Found {
    zero_shot: f64,
    /// Accuracy and share of the masked matrices that is off, for each arm.
    arms: Vec<(f64, f64)>,
    /// Weights that are neither the base's, bit for bit, nor 0.
    changed: usize,
}

fn prove(_clock: Clock) -> Result<Proof> {
    let found = side_by_side(NUM_SEEDS, |number| one_seed(Seed(320 + number)))?;
    let zero_shot: Vec<f64> = found.iter().map(|found| found.zero_shot).collect();
    let mut proof = Proof::default();
    let _ = writeln!(
        proof.figures,
        "| | rate | off | accuracy, mean | each seed |\n|---|---|---|---|---|\n| untuned | | | {:.3} | {} |",
        mean(&zero_shot),
        each(&zero_shot)
    );
    let mut gains = Vec::new();
    for (arm, (rate, drop)) in ARMS.iter().enumerate() {
        let accuracies: Vec<f64> = found.iter().map(|found| found.arms[arm].0).collect();
        let off: Vec<f64> = found.iter().map(|found| found.arms[arm].1).collect();
        let name = if *drop > 0.0 { "R-AMT, dropout 0.3" } else { "masks, no dropout" };
        let _ = writeln!(
            proof.figures,
            "| {name} | {rate:e} | {:.1} % | {:.3} | {} |",
            100.0 * mean(&off),
            mean(&accuracies),
            each(&accuracies)
        );
        let by_seed = accuracies.iter().zip(&zero_shot).map(|(tuned, untuned)| tuned - untuned);
        gains.push(by_seed.collect::<Vec<f64>>());
    }
    let means: Vec<f64> = gains.iter().map(|gains| mean(gains)).collect();
    let least = gains.iter().flatten().fold(f64::INFINITY, |least, gain| least.min(*gain));
    proof.assert(
        "every arm is above the untuned model by at least 0.2, on the mean",
        each(&means),
        means.iter().all(|gain| *gain >= 0.2),
    );
    proof.assert(
        "every arm is above the untuned model on every seed",
        format!("at least {least:+.3}"),
        least > 0.0,
    );
    let changed: usize = found.iter().map(|found| found.changed).sum();
    proof.assert(
        "every weight that is on is the base's, bit for bit",
        format!("{changed} others"),
        changed == 0,
    );
    proof.notes.push(
        "Whether gradient dropout keeps what the base knew is not asserted: at this scale the \
         difference is noise. Its rule is tested by itself, on average over many draws."
            .to_owned(),
    );
    Ok(proof)
}

fn one_seed(seed: Seed) -> Result<Found> {
    let clean = Pictures::digits(seed);
    let count = clean.len();
    let seen = clean.through_camera(0.5, 0.45, seed);
    let pictures = clean.and(seen);
    let model = Mlp::new(pictures.table(), &[PIXELS, 256, 256, 256, 256, DIGITS]);
    let mut lab = Lab::of_pictures(model, &pictures, seed);
    let upstream: Vec<usize> = (0..900).collect();
    lab.pretrain(&upstream, Pace::passes(20, 900, 32, 1e-3), seed)?;
    let (train, test) = shots(&pictures, count);
    let mut found = Found { zero_shot: lab.accuracy(&test)?, arms: Vec::new(), changed: 0 };
    for (rate, drop) in ARMS {
        let options = format!(
            "targets = ['layers.1', 'layers.2', 'layers.3']\ntrain_head = false\ndrop = {drop:?}"
        );
        let pace = Pace::passes(30, train.len(), 32, rate).cosine();
        let tuned = lab.tune(method("r-amt", &options)?, &train, pace, seed, &[])?.merged;
        let (mut off, mut masked) = (0, 0);
        for (name, values) in &tuned {
            let base = &lab.values()[name];
            masked +=
                if (1..4).any(|l| *name == format!("layers.{l}.weight")) { base.len() } else { 0 };
            for (value, base) in values.iter().zip(base) {
                if value.to_bits() == base.to_bits() {
                    continue;
                }
                off += usize::from(*value == 0.0);
                found.changed += usize::from(*value != 0.0);
            }
        }
        let accuracy = lab.with(tuned).accuracy(&test)?;
        found.arms.push((accuracy, off as f64 / masked as f64));
    }
    Ok(found)
}

/// Chooses the first pictures of each class behind the 900 of the base; the rest is measured.
fn shots(pictures: &Pictures, count: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut train, mut test) = (Vec::new(), Vec::new());
    let mut taken = [0; DIGITS];
    for row in count + 900..2 * count {
        let digit = pictures.digits[row] as usize;
        if taken[digit] < SHOTS {
            taken[digit] += 1;
            train.push(row);
        } else {
            test.push(row);
        }
    }
    (train, test)
}
