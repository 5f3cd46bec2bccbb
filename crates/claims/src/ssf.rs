//! SSF: scales and shifts alone come near full tuning.

use std::fmt::Write;

use retune_core::random::Seed;
use retune_train::schedule::Shape;

use crate::lab::{Lab, Pace, method};
use crate::mlp::Mlp;
use crate::pictures::{DIGITS, PIXELS, Pictures};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 31,
    name: "SSF",
    source: "Lian, Zhou, Feng and Wang, Scaling & Shifting Your Features: A New Baseline for \
             Efficient Model Tuning, 2022, arXiv 2210.08823",
    claims: "A scale and a shift of each channel behind every operation, with a new head, come \
             near full tuning, well above a linear probe, and fold into the weights afterwards.",
    run: "Perceptron 64-64-64-64-64-10 pretrained on 900 scanned digits (20 passes); then tuned for 20 \
          passes over 200 others seen through a gain exp(N(0, 0.7²)) and an offset N(0, 0.6²) of each \
          pixel, batches of 16, cosine decay. SSF on the input and behind each hidden linear layer; \
          the head trains too in every method. For each method the best of three rates on 200 \
          validation rows, measured on the 497 left; five seeds.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;

/// Each contestant: name, method, options, rates.
const ARMS: [(&str, &str, &str, [f64; 3]); 4] = [
    ("linear probe", "full", "targets = ['head']", [1e-3, 5e-3, 2e-2]),
    ("BitFit and head", "bitfit", "", [1e-3, 5e-3, 2e-2]),
    ("SSF", "ssf", "modules_to_save = ['head']", [1e-3, 5e-3, 2e-2]),
    ("full", "full", "", [3e-4, 1e-3, 3e-3]),
];

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    let mut zero_shot = Vec::new();
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); ARMS.len()];
    let mut trained = vec![0; ARMS.len()];
    let mut worst_merge = 0.0_f64;
    for number in 0..NUM_SEEDS {
        let seed = Seed(300 + number);
        let clean = Pictures::digits(seed);
        let count = clean.len();
        let seen = clean.through_camera(0.7, 0.6, seed);
        let pictures = clean.and(seen);
        let rows = |from: usize, to: usize| (from..to).collect::<Vec<usize>>();
        let (upstream, train) = (rows(0, 900), rows(count + 900, count + 1100));
        let (validation, test) = (rows(count + 1100, count + 1300), rows(count + 1300, 2 * count));
        let model = Mlp::new(pictures.table(), &[PIXELS, 64, 64, 64, 64, DIGITS]);
        let mut lab = Lab::of_pictures(model.with_scaled_input(), &pictures, seed);
        lab.pretrain(&upstream, Pace::passes(20, 900, 32, 1e-3), seed)?;
        let base = lab.values().clone();
        zero_shot.push(lab.accuracy(&test)?);
        for (place, (name, kind, options, rates)) in ARMS.iter().enumerate() {
            let mut best = (f64::NEG_INFINITY, 0.0);
            for rate in rates {
                lab.set(base.clone());
                let pace = Pace { shape: Shape::Cosine, ..Pace::passes(20, 200, 16, *rate) };
                let tuned = lab.tune(method(kind, options)?, &train, pace, seed, &validation)?;
                lab.set(tuned.merged);
                if *name == "SSF" {
                    let merged = lab.scores(&validation)?;
                    let gaps = merged.iter().zip(&tuned.logits).map(|(a, b)| (a - b).abs());
                    worst_merge = gaps.fold(worst_merge, |worst, gap| worst.max(f64::from(gap)));
                }
                trained[place] = tuned.num_trained;
                let steered = lab.accuracy(&validation)?;
                if steered > best.0 {
                    best = (steered, lab.accuracy(&test)?);
                }
            }
            found[place].push(best.1);
        }
    }
    let _ = writeln!(
        proof.figures,
        "| | values that train | accuracy, mean | each seed |\n|---|---|---|---|\n| untuned | 0 | \
         {:.3} | {} |",
        mean(&zero_shot),
        each(&zero_shot)
    );
    for ((name, ..), (values, trained)) in ARMS.iter().zip(found.iter().zip(&trained)) {
        let _ = writeln!(
            proof.figures,
            "| {name} | {trained} | {:.3} | {} |",
            mean(values),
            each(values)
        );
    }
    let [probe, _, ssf, full] = &found[..] else { unreachable!("four arms") };
    let gain = mean(ssf) - mean(probe);
    proof.assert(
        "SSF is above the linear probe by at least 0.03, on the mean",
        format!("{gain:+.3}"),
        gain >= 0.03,
    );
    let gains: Vec<f64> = ssf.iter().zip(probe).map(|(a, b)| a - b).collect();
    proof.assert(
        "SSF is above the linear probe on every seed",
        each(&gains),
        gains.iter().all(|gain| *gain > 0.0),
    );
    let gap = mean(ssf) - mean(full);
    proof.assert(
        "SSF is within 0.015 of full tuning, on the mean",
        format!("{gap:+.3}"),
        gap.abs() <= 0.015,
    );
    proof.assert(
        "logits after merging differ by less than 1e-4",
        format!("at most {worst_merge:.1e}"),
        worst_merge < 1e-4,
    );
    Ok(proof)
}
