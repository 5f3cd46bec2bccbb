//! APET: how many entries train matters more than where they lie.

use std::fmt::Write;

use retune_core::random::Seed;

use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, Values, method};
use crate::mlp::Inputs;
use crate::pictures::{DIGITS, Pictures, SIDE};
use crate::{Claim, Clock, Proof, Prove, Result, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 9,
    name: "APET",
    source: "Su, Chan, Cheng, Qin, Lin and others, Exploring the Impact of Model Scaling on \
             Parameter-Efficient Tuning, 2023, arXiv 2306.02320",
    claims: "Where trained values lie matters less than how many there are, and larger models need a \
             smaller share of their weights.",
    run: "Transformers of 3 blocks and width 16, 32 and 64 on scanned digits, a token per row, \
          pretrained on 1100 of them; then turned digits, 12 passes of batches of 64, AdamW with a \
          linear decay, entries drawn at random from all matrices, from attention, from the \
          feed-forward networks, from the first or from the last block. For each size and number of \
          entries the rate among 3e-3, 1e-2, 3e-2 and 1e-1 that is best on 200 validation rows over \
          all matrices; accuracy on the 497 left, two seeds. Chance is what the untuned model \
          reaches.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 2;
const NUM_TRAIN: usize = 1100;
const WIDTHS: [usize; 3] = [16, 32, 64];
const BATCH: usize = 32;
const PASSES: usize = 12;
const RATES: [f64; 4] = [3e-3, 1e-2, 3e-2, 1e-1];
const FULL_RATES: [f64; 2] = [1e-3, 3e-3];

/// Each pool: name, options.
const POOLS: [(&str, &str); 5] = [
    ("all", "targets = ['all-linear']"),
    ("attention", "targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj']"),
    ("feed-forward", "targets = ['gate_proj', 'up_proj', 'down_proj']"),
    ("first block", "targets = ['all-linear']\nlayers = [0]"),
    ("last block", "targets = ['all-linear']\nlayers = [2]"),
];

/// Numbers of entries; the last one stands for 10 % of the weights.
const COUNTS: [usize; 6] = [25, 50, 100, 200, 800, 0];

/// Places of 200 and of 10 % in them.
const AT_200: usize = 3;
const AT_MOST: usize = COUNTS.len() - 1;

/// What one size gave.
#[derive(Debug, Default)]
struct Found {
    total: usize,
    untuned: Vec<f64>,
    full: Vec<f64>,
    /// Accuracies by number of entries, pool and seed.
    accuracies: Vec<Vec<Vec<f64>>>,
    rates: Vec<Vec<f64>>,
}

impl Found {
    fn new() -> Self {
        let accuracies = vec![vec![Vec::new(); POOLS.len()]; COUNTS.len()];
        Self { accuracies, rates: vec![Vec::new(); COUNTS.len()], ..Self::default() }
    }

    /// Puts another seed's figures behind these.
    fn append(&mut self, other: Self) {
        self.total = other.total;
        self.untuned.extend(other.untuned);
        self.full.extend(other.full);
        self.rates.iter_mut().zip(other.rates).for_each(|(list, new)| list.extend(new));
        let accuracies = self.accuracies.iter_mut().flatten();
        accuracies
            .zip(other.accuracies.into_iter().flatten())
            .for_each(|(list, new)| list.extend(new));
    }

    fn count(&self, place: usize) -> usize {
        if place == AT_MOST { self.total / 10 } else { COUNTS[place] }
    }

    fn mean(&self, place: usize, pool: usize) -> f64 {
        mean(&self.accuracies[place][pool])
    }

    /// Largest less smallest mean over the pools.
    fn spread(&self, place: usize) -> f64 {
        let means = (0..POOLS.len()).map(|pool| self.mean(place, pool));
        let most = means.clone().fold(f64::NEG_INFINITY, f64::max);
        most - means.fold(f64::INFINITY, f64::min)
    }

    /// Returns the number of entries, on a curve through the tried ones that is straight in its
    /// logarithm, where `value` passes `level`; nothing where it never does.
    fn passes(&self, level: f64, value: impl Fn(usize) -> f64) -> Option<f64> {
        let place = (0..COUNTS.len()).find(|place| value(*place) >= level)?;
        let log = |place: usize| (self.count(place) as f64).ln();
        if place == 0 {
            return Some(self.count(0) as f64);
        }
        let part = (level - value(place - 1)) / (value(place) - value(place - 1));
        Some((log(place - 1) + part * (log(place) - log(place - 1))).exp())
    }
}

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    let mut sizes = Vec::new();
    for width in WIDTHS {
        let mut found = Found::new();
        for seed in side_by_side(NUM_SEEDS, |number| one_seed(Seed(900 + number), width))? {
            found.append(seed);
        }
        report(width, &found, &mut proof);
        sizes.push(found);
    }
    judge(&sizes, &mut proof);
    Ok(proof)
}

fn report(width: usize, found: &Found, proof: &mut Proof) {
    let pools: Vec<&str> = POOLS.iter().map(|(name, _)| *name).collect();
    let _ = writeln!(
        proof.figures,
        "Width {width}, {} weights: untuned {:.3}, full tuning {:.3}.\n\n| entries | rate | {} | \
         spread |\n|---|---|{}---|",
        found.total,
        mean(&found.untuned),
        mean(&found.full),
        pools.join(" | "),
        "---|".repeat(POOLS.len())
    );
    for place in 0..COUNTS.len() {
        let means: Vec<String> =
            (0..POOLS.len()).map(|pool| format!("{:.3}", found.mean(place, pool))).collect();
        let rates: Vec<String> =
            found.rates[place].iter().map(|rate| format!("{rate:e}")).collect();
        let _ = writeln!(
            proof.figures,
            "| {} | {} | {} | {:.3} |",
            found.count(place),
            rates.join(", "),
            means.join(" | "),
            found.spread(place)
        );
    }
    proof.figures.push('\n');
}

fn judge(sizes: &[Found], proof: &mut Proof) {
    for (width, found) in WIDTHS.iter().zip(sizes) {
        let (most, few) = (found.spread(AT_MOST), found.spread(AT_200));
        proof.assert(
            format!(
                "width {width}: with 10 % of the weights the pools' means spread by at most 0.05"
            ),
            format!("{most:.3}"),
            most <= 0.05,
        );
        proof.assert(
            format!("width {width}: that is less than with 200 entries"),
            format!("{most:.3} and {few:.3}"),
            most < few,
        );
    }
    let shares: Vec<Option<f64>> = sizes
        .iter()
        .map(|found| {
            let needed = found.passes(0.95 * mean(&found.full), |place| found.mean(place, 0));
            needed.map(|needed| needed / found.total as f64)
        })
        .collect();
    let shown: Vec<String> = shares
        .iter()
        .map(|share| share.map_or("more".to_owned(), |share| format!("{:.2} %", 100.0 * share)))
        .collect();
    let falls = shares.windows(2).all(|pair| matches!(pair, [Some(a), Some(b)] if b < a));
    proof.assert(
        "the share of the weights that is needed for 95 % of full tuning falls with size",
        shown.join(", "),
        falls,
    );
    for (width, found) in WIDTHS.iter().zip(sizes) {
        let level = mean(&found.untuned).max(0.1) + 0.1;
        let needed: Vec<Option<f64>> = (0..POOLS.len())
            .map(|pool| found.passes(level, |place| found.mean(place, pool)))
            .collect();
        let all: Option<Vec<f64>> = needed.iter().copied().collect();
        let ratio = all.as_ref().map(|all| {
            let most = all.iter().fold(0.0_f64, |most, n| most.max(*n));
            most / all.iter().fold(f64::INFINITY, |least, n| least.min(*n))
        });
        let shown: Vec<String> =
            needed.iter().map(|n| n.map_or("more".to_owned(), |n| format!("{n:.0}"))).collect();
        proof.assert(
            format!(
                "width {width}: the number that first exceeds chance by 0.1 differs by less than 4 \
                 times between pools"
            ),
            shown.join(", "),
            ratio.is_some_and(|ratio| ratio < 4.0),
        );
    }
}

fn one_seed(seed: Seed, width: usize) -> Result<Found> {
    let mut found = Found::new();
    let old = Pictures::digits(seed);
    let count = old.len();
    let pictures = old.clone().and(old.rotated());
    let rows = |from: usize, to: usize| (from..to).collect::<Vec<usize>>();
    let train = rows(count, count + NUM_TRAIN);
    let validation = rows(count + NUM_TRAIN, count + NUM_TRAIN + 200);
    let test = rows(count + NUM_TRAIN + 200, 2 * count);
    // Its head is known: drawn entries are all that trains.
    let model =
        Encoder::of_rows(Inputs::new(pictures.table(), SIDE), SIDE, Sizes::of(width, 3), DIGITS)
            .with_known_head();
    let mut lab = Lab::of_pictures(model, &pictures, seed);
    lab.pretrain(&rows(0, NUM_TRAIN), Pace::passes(20, NUM_TRAIN, BATCH, 3e-3), seed)?;
    let base = lab.values().clone();
    found.total = lab.model.spec().count();
    found.untuned.push(lab.accuracy(&test)?);
    let mut tune = |name: &str, options: &str, rate: f64| -> Result<(f64, f64)> {
        let pace = Pace::passes(PASSES, NUM_TRAIN, 2 * BATCH, rate);
        let tuned: Values = lab.tune(method(name, options)?, &train, pace, seed, &[])?.merged;
        lab.set(tuned);
        let both = (lab.accuracy(&validation)?, lab.accuracy(&test)?);
        lab.set(base.clone());
        Ok(both)
    };
    let mut best = |name: &str, options: &str, rates: &[f64]| -> Result<(f64, f64)> {
        let mut best = (f64::NEG_INFINITY, (0.0, 0.0));
        for rate in rates {
            let (steered, tested) = tune(name, options, *rate)?;
            if steered > best.0 {
                best = (steered, (tested, *rate));
            }
        }
        Ok(best.1)
    };
    found.full.push(best("full", "", &FULL_RATES)?.0);
    for place in 0..COUNTS.len() {
        let entries = found.count(place);
        let options = |pool: &str| {
            format!("granularity = 'element'\nbudget = {entries}\nseed = {}\n{pool}", seed.0)
        };
        let (tested, rate) = best("apet", &options(POOLS[0].1), &RATES)?;
        found.rates[place].push(rate);
        found.accuracies[place][0].push(tested);
        for (pool, (_, targets)) in POOLS.iter().enumerate().skip(1) {
            let (tested, _) = best("apet", &options(targets), &[rate])?;
            found.accuracies[place][pool].push(tested);
        }
    }
    Ok(found)
}
