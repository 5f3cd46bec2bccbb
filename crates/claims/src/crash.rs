//! CRaSh: blocks trained on a stand-in, put back into the whole model.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_evaluate::similarity::{Pooling, layer_outputs, linear_cka};
use retune_models::Emulator;
use retune_run::crash::blocks::{Blocks, Share};
use retune_run::crash::interpolate::line;
use tensor::Device;

use crate::lab::{Held, Lab, Pace, Values, method};
use crate::pictures::{DIGITS, PIXELS, Pictures};
use crate::residual::Residual;
use crate::{Claim, Clock, Proof, Prove, Result, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 30,
    name: "CRaSh",
    source: "Zhang, Zhou, Zhang, Su and others, CRaSh: Clustering, Removing, and Sharing Enhance \
             Fine-tuning without Full Large Language Model, 2023, arXiv 2310.15477",
    claims: "Blocks trained on a training-free stand-in and put back make the whole model better than \
             it was and better than the tuned stand-in, and no barrier of loss lies between it and a \
             full tune.",
    run: "Perceptron of 24 normalised residual blocks of width 96, drawn as PyTorch draws it, \
          pretrained on 900 scanned digits (20 passes, batches of 32, AdamW 1e-3); then 250 others seen through a gain exp(N(0, 0.5²)) \
          and an offset N(0, 0.45²) of each pixel, tuned 40 passes in batches of 16 at 5e-4. Of 24 \
          blocks 12 are kept and 4 train, by the program's own clustering, sharing, and walk between \
          two models; measured on the 647 pictures left, three seeds. The finer ordering on a \
          language model is no part of this proof.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 3;
const DEPTH: usize = 24;
const KEPT: usize = 12;
const TRAINED: usize = 4;
const POINTS: usize = 25;
const ARMS: [&str; 8] = [
    "untuned",
    "tuned whole",
    "CRaSh: the stand-in",
    "CRaSh: put back",
    "without sharing: put back",
    "offsite tuning, first and last two train: put back",
    "evenly spread blocks: put back",
    "CRaSh, no frozen copies of trained blocks: put back",
];

/// What one seed gave.
struct Found {
    arms: Vec<f64>,
    barrier: f64,
    clusters: Vec<usize>,
}

fn prove(_clock: Clock) -> Result<Proof> {
    let seeds = (0..NUM_SEEDS).map(|seed| one_seed(Seed(seed))).collect::<Result<Vec<Found>>>()?;
    let mut proof = Proof::default();
    let _ = writeln!(proof.figures, "| | accuracy, mean | each seed |\n|---|---|---|");
    let of = |arm: usize| seeds.iter().map(|found| found.arms[arm]).collect::<Vec<f64>>();
    let shown = |values: &[f64]| {
        values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(", ")
    };
    for (arm, name) in ARMS.iter().enumerate() {
        let values = of(arm);
        let _ = writeln!(proof.figures, "| {name} | {:.3} | {} |", mean(&values), shown(&values));
    }
    let sizes: Vec<String> = seeds.iter().map(|found| format!("{:?}", found.clusters)).collect();
    let _ = writeln!(proof.figures, "\nSizes of the clusters, each seed: {}.", sizes.join("; "));
    let difference = |one: usize, other: usize| -> Vec<f64> {
        of(one).iter().zip(of(other)).map(|(a, b)| a - b).collect()
    };
    let gains = difference(3, 0);
    proof.assert(
        "put back, the whole model is above the untuned one, on every seed",
        shown(&gains),
        gains.iter().all(|gain| *gain > 0.0),
    );
    let over = difference(3, 2);
    proof.assert(
        "put back, the whole model is at most 0.02 below the tuned stand-in, on the mean",
        format!("{:+.3} ({})", mean(&over), shown(&over)),
        mean(&over) >= -0.02,
    );
    let barriers: Vec<f64> = seeds.iter().map(|found| found.barrier).collect();
    proof.assert(
        "no loss on the line to the full tune is above both ends by more than 10 %, on every seed",
        shown(&barriers),
        barriers.iter().all(|barrier| *barrier <= 0.1),
    );
    let spread = difference(3, 6);
    proof.notes.push(format!(
        "Against evenly spread blocks CRaSh gains {:+.3} on the mean, against plain offsite tuning \
         {:+.3}, against itself without sharing {:+.3}: at this scale neither of the last two is \
         claimed.",
        mean(&spread),
        mean(&difference(3, 5)),
        mean(&difference(3, 4))
    ));
    Ok(proof)
}

fn one_seed(seed: Seed) -> Result<Found> {
    let clean = Pictures::digits(seed);
    let count = clean.len();
    let seen = clean.through_camera(0.5, 0.45, seed);
    let pictures = clean.and(seen);
    let rows = |from: usize, to: usize| (from..to).collect::<Vec<usize>>();
    let (upstream, train) = (rows(0, 900), rows(count + 900, count + 1150));
    let test = rows(count + 1150, 2 * count);
    let whole = || Residual::new(pictures.table(), [PIXELS, 96, DIGITS], DEPTH);
    let mut lab = Lab::of_pictures(whole(), &pictures, seed);
    lab.set(Held::draw_as_pytorch(lab.model.spec(), seed));
    lab.pretrain(&upstream, Pace::passes(20, 900, 32, 1e-3), seed)?;
    let base = lab.values().clone();
    let pace = Pace::passes(40, 250, 16, 5e-4);
    let mut accuracy = |values: &Values| -> Result<f64> {
        lab.set(values.clone());
        lab.accuracy(&test)
    };
    let untuned = accuracy(&base)?;
    lab.set(base.clone());
    let tuned = lab.tune(method("full", "")?, &train, pace, seed, &[])?.merged;

    lab.set(base.clone());
    let weights = lab.weights()?;
    let nothing = (Changes::default(), Parameters::new(weights.device()));
    let model = lab.model.as_ref();
    let looked_at = Tuned { model, weights: &weights, changes: &nothing.0, parameters: &nothing.1 };
    let outputs = layer_outputs(&looked_at, &[lab.batch(&train)?], Pooling::WeightedMean)?;
    let similarity = linear_cka(&outputs)?;
    let choose = |share| Blocks::choose(&similarity, KEPT, TRAINED, share);
    let (crash, clusters) = choose(Share::All)?;

    // Blocks are trained on the stand-in; whatever the method left in the others is the base's.
    let train_on = |blocks: &Blocks| -> Result<(Values, f64)> {
        let stand_in = Emulator::new(Box::new(whole()), blocks.order.clone(), blocks.own_places())?;
        let mut lab = Lab::of_pictures(stand_in, &pictures, seed);
        lab.set(base.clone());
        let trained: Vec<String> = blocks.trainable.iter().map(ToString::to_string).collect();
        let targets = format!("targets = ['layers\\.({})\\..*']", trained.join("|"));
        let tuning = lab.train(method("full", &targets)?, &train, pace, seed, |training| {
            let tuned = training.tuned();
            Ok((lab.merged(&tuned)?, lab.accuracy_of(&tuned, &test)?))
        })?;
        Ok(tuning)
    };
    let offsite: Vec<usize> = vec![0, 1, DEPTH - 2, DEPTH - 1];
    let middle: Vec<usize> =
        (0..KEPT - TRAINED).map(|i| 2 + (i * (DEPTH - 5)).div_ceil(KEPT - TRAINED - 1)).collect();
    let even: Vec<usize> = (0..KEPT).map(|i| (i * (DEPTH - 1)).div_ceil(KEPT - 1)).collect();
    let spread: Vec<usize> =
        (0..TRAINED).map(|i| even[(i * (KEPT - 1)).div_ceil(TRAINED - 1)]).collect();
    let frozen: Vec<usize> = even.into_iter().filter(|block| !spread.contains(block)).collect();
    let (put_back, stand_in) = train_on(&crash)?;
    let others = [
        choose(Share::None)?.0,
        Blocks::given(DEPTH, &offsite, &middle, Share::None)?,
        Blocks::given(DEPTH, &spread, &frozen, Share::All)?,
        choose(Share::Frozen)?.0,
    ];
    let mut accuracy = |values: &Values| -> Result<f64> {
        lab.set(values.clone());
        lab.accuracy(&test)
    };
    let mut arms = vec![untuned, accuracy(&tuned)?, stand_in, accuracy(&put_back)?];
    for blocks in &others {
        arms.push(accuracy(&train_on(blocks)?.0)?);
    }

    let spec = Arc::clone(lab.model.spec());
    let open = |values| {
        let source = Arc::new(Held::new(&spec, values));
        Weights::new(source, Arc::clone(&spec), Packing::default(), &Device::flex())
    };
    let ends = [open(put_back)?, open(tuned)?];
    let batches = [lab.batch(&test)?];
    let path = Path::new("a proof");
    let walked = line(lab.model.as_ref(), [&ends[0], &ends[1]], &batches, POINTS, path)?;
    let clusters = clusters.iter().map(ExactSizeIterator::len).collect();
    Ok(Found { arms, barrier: walked.barrier(), clusters })
}
