//! HFT: half of the matrices frozen, less of the old task forgotten.

use std::fmt::Write;

use retune_core::random::Seed;
use retune_methods::hft::{Hft, HftOptions};
use retune_run::half_reset::frozen;

use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, Values, method};
use crate::mlp::Inputs;
use crate::pictures::{DIGITS, Pictures, SIDE};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 4,
    name: "HFT",
    source: "Hui, Zhang, Wang, Xu, Sun and Wu, HFT: Half Fine-Tuning for Large Language Models, \
             2024, arXiv 2404.18466",
    claims: "With a random half of each layer's matrices frozen, a new task is learned nearly as well \
             and clearly more of an old one is kept; halves drawn by category keep at least as much \
             as frozen layers; steps cost less.",
    run: "Transformer of 4 blocks and width 48 on scanned digits, a token per row, pretrained on 1200 \
          of them (15 passes, AdamW 2e-3 falling to 0, batches of 32); then 5 passes of AdamW 1e-3 \
          over the same 1200, mirrored or turned by 90 degrees. New and old accuracy on the 597 \
          left; five seeds. Half-reset puts back the base's values in the half that HFT would have \
          frozen.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const NUM_TRAIN: usize = 1200;
const BATCH: usize = 32;
const RATE: f64 = 1e-3;
const PASSES: usize = 5;

/// Passes that are tried until HFT is as good on the new task as full tuning.
const LONGER: [usize; 3] = [8, 12, 20];

/// Shares of full tuning's change that are kept when base and tuned weights are mixed.
const SHARES: [f64; 2] = [0.9, 0.8];

/// Lower rates of full tuning.
const LOWER: [f64; 2] = [7e-4, 5e-4];

/// New and old accuracy, seed by seed.
#[derive(Debug, Clone, Default)]
struct Arm {
    new: Vec<f64>,
    old: Vec<f64>,
}

impl Arm {
    fn append(&mut self, other: Self) {
        self.new.extend(other.new);
        self.old.extend(other.old);
    }

    fn line(&self, name: &str) -> String {
        let (new, old) = (mean(&self.new), mean(&self.old));
        format!("| {name} | {new:.3} | {old:.3} | {} |\n", each(&self.old))
    }
}

/// What one task gave.
#[derive(Debug, Default)]
struct Found {
    base: Arm,
    full: Arm,
    hft: Arm,
    layers: Arm,
    reset: Arm,
    longer: Arm,
    /// Passes after which HFT was as good as full tuning, each seed.
    passes: Vec<usize>,
    mixed: [Arm; SHARES.len()],
    lower: [Arm; LOWER.len()],
    /// Seconds of full tuning and of HFT.
    seconds: [f64; 2],
    /// Weights that HFT should have left alone and did not.
    moved: Vec<String>,
}

impl Found {
    /// Puts another seed's figures behind these.
    fn append(&mut self, other: Self) {
        self.base.append(other.base);
        self.full.append(other.full);
        self.hft.append(other.hft);
        self.layers.append(other.layers);
        self.reset.append(other.reset);
        self.longer.append(other.longer);
        self.passes.extend(other.passes);
        self.mixed.iter_mut().zip(other.mixed).for_each(|(arm, other)| arm.append(other));
        self.lower.iter_mut().zip(other.lower).for_each(|(arm, other)| arm.append(other));
        self.seconds.iter_mut().zip(other.seconds).for_each(|(sum, other)| *sum += other);
        self.moved.extend(other.moved);
    }
}

fn prove(clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    for (task, turn) in [
        ("mirrored", Pictures::mirrored as fn(&Pictures) -> Pictures),
        ("turned", Pictures::rotated),
    ] {
        let mut found = Found::default();
        let seeds = side_by_side(NUM_SEEDS, |number| one_seed(Seed(400 + number), turn, clock))?;
        for seed in seeds {
            found.append(seed);
        }
        report(task, &found, &mut proof);
    }
    proof.notes.push(
        "What moves less forgets less: the rows below half-reset ask what is kept at equal new \
         accuracy. HFT that is trained until it knows the new task as well as full tuning, full \
         tuning mixed with its base, and full tuning at lower rates stand beside it; nothing is \
         asserted of them."
            .to_owned(),
    );
    Ok(proof)
}

fn report(task: &str, found: &Found, proof: &mut Proof) {
    let _ = write!(
        proof.figures,
        "| {task} | new accuracy, mean | old accuracy, mean | old accuracy, each seed \
         |\n|---|---|---|---|\n{}{}{}{}{}",
        found.base.line("untuned"),
        found.full.line("full"),
        found.hft.line("HFT, by category"),
        found.layers.line("HFT, whole layers"),
        found.reset.line("half-reset of full"),
    );
    let passes: Vec<String> = found.passes.iter().map(ToString::to_string).collect();
    let name = format!("HFT for {} passes", passes.join(", "));
    proof.figures.push_str(&found.longer.line(&name));
    for (share, arm) in SHARES.iter().zip(&found.mixed) {
        proof.figures.push_str(&arm.line(&format!("full, {share} of its change")));
    }
    for (rate, arm) in LOWER.iter().zip(&found.lower) {
        proof.figures.push_str(&arm.line(&format!("full at {rate:e}")));
    }
    let [full, hft] = found.seconds;
    let _ =
        writeln!(proof.figures, "\nHFT's steps took {:.2} of full tuning's time.\n", hft / full);

    let [.., slow] = &found.lower;
    proof.notes.push(format!(
        "{task}: full tuning at {:e} keeps {:.3} of the old accuracy at a new one of {:.3}, HFT {:.3} at \
         {:.3}.",
        LOWER[LOWER.len() - 1],
        mean(&slow.old),
        mean(&slow.new),
        mean(&found.hft.old),
        mean(&found.hft.new),
    ));

    let kept = mean(&found.hft.old) - mean(&found.full.old);
    proof.assert(
        format!("{task}: HFT keeps at least 0.04 more of the old accuracy, on the mean"),
        format!("{kept:+.3}"),
        kept >= 0.04,
    );
    let each_kept: Vec<f64> =
        found.hft.old.iter().zip(&found.full.old).map(|(hft, full)| hft - full).collect();
    proof.assert(
        format!("{task}: on no seed less by more than the noise of 597 rows (0.02)"),
        each(&each_kept),
        each_kept.iter().all(|kept| *kept >= -0.02),
    );
    let beyond = mean(&found.hft.old) - mean(&found.layers.old);
    proof.assert(
        format!("{task}: halves by category keep at least what whole layers keep, on the mean"),
        format!("{beyond:+.3}"),
        beyond >= 0.0,
    );
    let learned = mean(&found.hft.new) - mean(&found.full.new);
    proof.assert(
        format!("{task}: HFT's new accuracy is at most 0.05 below full tuning's, on the mean"),
        format!("{learned:+.3}"),
        learned >= -0.05,
    );
    proof.assert(
        format!("{task}: what is frozen is the base's, bit for bit"),
        if found.moved.is_empty() { "all of it".to_owned() } else { found.moved.join(", ") },
        found.moved.is_empty(),
    );
    proof.assert(
        format!("{task}: HFT's steps take less time than full tuning's"),
        format!("{:.2} of it", hft / full),
        hft < full,
    );
}

fn one_seed(seed: Seed, turn: fn(&Pictures) -> Pictures, clock: Clock) -> Result<Found> {
    let mut found = Found::default();
    let old = Pictures::digits(seed);
    let count = old.len();
    let pictures = old.clone().and(turn(&old));
    let rows = |from: usize, to: usize| (from..to).collect::<Vec<usize>>();
    let (upstream, downstream) = (rows(0, NUM_TRAIN), rows(count, count + NUM_TRAIN));
    let (old_test, new_test) = (rows(NUM_TRAIN, count), rows(count + NUM_TRAIN, 2 * count));
    let mut lab = Lab::of_pictures(
        Encoder::of_rows(Inputs::new(pictures.table(), SIDE), SIDE, Sizes::of(48, 4), DIGITS),
        &pictures,
        seed,
    );
    lab.pretrain(&upstream, Pace::passes(15, NUM_TRAIN, BATCH, 2.0 * RATE), seed)?;
    let base = lab.values().clone();
    let measure = |lab: &mut Lab, values: &Values, arm: &mut Arm| -> Result<()> {
        lab.set(values.clone());
        arm.new.push(lab.accuracy(&new_test)?);
        arm.old.push(lab.accuracy(&old_test)?);
        lab.set(base.clone());
        Ok(())
    };
    let tune = |lab: &Lab, name: &str, options: &str, passes: usize, rate: f64| -> Result<Values> {
        let pace = Pace::passes(passes, NUM_TRAIN, BATCH, rate).constant();
        Ok(lab.tune(method(name, options)?, &downstream, pace, seed, &[])?.merged)
    };
    let half = format!("seed = {}", seed.0);
    measure(&mut lab, &base, &mut found.base)?;

    let started = clock();
    let full = tune(&lab, "full", "", PASSES, RATE)?;
    let between = clock();
    let hft = tune(&lab, "hft", &half, PASSES, RATE)?;
    let taken = [between - started, clock() - between];
    found.seconds.iter_mut().zip(taken).for_each(|(sum, taken)| *sum += taken);
    measure(&mut lab, &full, &mut found.full)?;
    measure(&mut lab, &hft, &mut found.hft)?;
    let layers = tune(&lab, "hft", &format!("{half}\nlevel = 'layer'"), PASSES, RATE)?;
    measure(&mut lab, &layers, &mut found.layers)?;

    let options = HftOptions { seed: seed.0, ..HftOptions::default() };
    let mut reset = full.clone();
    for weight in frozen(&Hft { options }, lab.model.spec())? {
        let name = &weight.name;
        if hft[name] != base[name] {
            found.moved.push(name.clone());
        }
        reset.insert(name.clone(), base[name].clone());
    }
    measure(&mut lab, &reset, &mut found.reset)?;

    let wanted = found.full.new.last().copied().unwrap_or_default();
    for passes in LONGER {
        let values = tune(&lab, "hft", &half, passes, RATE)?;
        let mut arm = Arm::default();
        measure(&mut lab, &values, &mut arm)?;
        if arm.new[0] >= wanted || Some(&passes) == LONGER.last() {
            found.longer.new.extend(arm.new);
            found.longer.old.extend(arm.old);
            found.passes.push(passes);
            break;
        }
    }
    for (share, arm) in SHARES.iter().zip(&mut found.mixed) {
        let mix = |(name, base): (&String, &Vec<f32>)| {
            let values = base.iter().zip(&full[name]);
            (
                name.clone(),
                values.map(|(base, full)| base + *share as f32 * (full - base)).collect(),
            )
        };
        let mixed: Values = base.iter().map(mix).collect();
        measure(&mut lab, &mixed, arm)?;
    }
    for (rate, arm) in LOWER.iter().zip(&mut found.lower) {
        let values = tune(&lab, "full", "", PASSES, *rate)?;
        measure(&mut lab, &values, arm)?;
    }
    Ok(found)
}
