//! CRaSh on a language model: which stand-in serves best.

use std::fmt::Write;

use retune_core::random::Seed;
use retune_core::spec::WeightSpec;
use retune_evaluate::similarity::{Pooling, layer_outputs, linear_cka};
use retune_models::Emulator;
use retune_run::crash::blocks::{Blocks, Share};
use retune_run::export;
use retune_run::open::Located;

use crate::crash;
use crate::lab::{Lab, Pace, Values, method};
use crate::language::{Language, log_entries, perplexity};
use crate::{Claim, Proof, Prove, Result, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 30,
    name: "CRaSh on a language model",
    source: crash::CLAIM.source,
    claims: "Blocks trained on a training-free stand-in and put back make the whole model better than \
             it was and than the stand-in; clustering and sharing blocks is better than leaving out \
             evenly spread ones.",
    run: "SmolLM2-135M-Instruct from 4-bit blocks, unpacked; 150 made-up entries of a lighthouse's log \
          of about 70 tokens to tune on, in one pass, batches of 5, AdamW 3e-4, linear decay; 60 others \
          to measure; three seeds. Of 30 blocks 15 are kept and 4 train. Half the texts the proof was \
          meant for, for the time it takes; no full tune beside it.",
    quick: false,
    prove: Prove::On("smollm2-135m-instruct", prove),
};

const NUM_SEEDS: u64 = 3;
const TRAIN: usize = 150;
const TEST: usize = 60;
const KEPT: usize = 15;
const TRAINED: usize = 4;
const BATCH: usize = 5;
/// Texts whose states tell how alike blocks are.
const PROBED: usize = 50;
const ARMS: [&str; 7] = [
    "untuned",
    "CRaSh: the stand-in",
    "CRaSh: put back",
    "without sharing: the stand-in",
    "without sharing: put back",
    "evenly spread blocks, first and last two train: the stand-in",
    "evenly spread blocks, first and last two train: put back",
];

/// What one seed gave.
struct Found {
    /// Perplexities by arm.
    arms: Vec<f64>,
    clusters: Vec<usize>,
    num_tokens: usize,
}

fn prove(located: &Located) -> Result<Proof> {
    let seeds =
        (0..NUM_SEEDS).map(|seed| one_seed(located, Seed(seed))).collect::<Result<Vec<Found>>>()?;
    let of = |arm: usize| seeds.iter().map(|found| found.arms[arm]).collect::<Vec<f64>>();
    let shown = |values: &[f64]| {
        values.iter().map(|value| format!("{value:.2}")).collect::<Vec<_>>().join(", ")
    };
    let mut proof = Proof::default();
    let _ = writeln!(proof.figures, "| | perplexity, mean | each seed |\n|---|---|---|");
    for (arm, name) in ARMS.iter().enumerate() {
        let values = of(arm);
        let _ = writeln!(proof.figures, "| {name} | {:.2} | {} |", mean(&values), shown(&values));
    }
    let sizes: Vec<String> = seeds.iter().map(|found| format!("{:?}", found.clusters)).collect();
    let _ = writeln!(
        proof.figures,
        "\nSizes of the clusters, each seed: {}. Tokens tuned on, first seed: {}.",
        sizes.join("; "),
        seeds[0].num_tokens
    );
    let ratio = |one: usize, other: usize| -> Vec<f64> {
        of(one).iter().zip(of(other)).map(|(a, b)| a / b).collect()
    };
    let gains = ratio(2, 0);
    proof.assert(
        "put back, the whole model's perplexity is below the untuned one's, on every seed",
        format!("{} of it", crate::each(&gains)),
        gains.iter().all(|ratio| *ratio < 1.0),
    );
    let over = ratio(2, 1);
    proof.assert(
        "put back, it is at most 5 % above the tuned stand-in's, on the mean",
        format!("{:.3} of it ({})", mean(&over), crate::each(&over)),
        mean(&over) <= 1.05,
    );
    // The card asks for these orders to be stated, whatever they are.
    for (other, name) in [(6, "evenly spread blocks put back"), (4, "the same without sharing")] {
        let ratios = ratio(2, other);
        proof.notes.push(format!(
            "CRaSh, put back, has {:.3} of the perplexity of {name} ({}), on the mean{}.",
            mean(&ratios),
            crate::each(&ratios),
            if mean(&ratios) < 1.0 { ", as in the paper" } else { "; the paper has it below" }
        ));
    }
    Ok(proof)
}

fn one_seed(located: &Located, seed: Seed) -> Result<Found> {
    let language = Language::open(located, &log_entries(TRAIN + TEST, seed))?;
    let (train, test): (Vec<usize>, Vec<usize>) =
        ((0..TRAIN).collect(), (TRAIN..TRAIN + TEST).collect());
    let whole = language.lab(language.model()?);
    let depth = whole.model.spec().num_layers;
    let (untuned, similarity) = whole.plain(|tuned| {
        let batches = train[..PROBED].chunks(BATCH).map(|rows| whole.batch(rows));
        let batches = batches.collect::<retune_core::Result<Vec<_>>>()?;
        let outputs = layer_outputs(tuned, &batches, Pooling::WeightedMean)?;
        Ok((perplexity(&whole, tuned, &test)?, linear_cka(&outputs)?))
    })?;
    let (crash, clusters) = Blocks::choose(&similarity, KEPT, TRAINED, Share::All)?;
    let ends = [0, 1, depth - 2, depth - 1];
    let (between, count) = (depth - 4, KEPT - TRAINED);
    let spread: Vec<usize> =
        (0..count).map(|i| 2 + (i * (between - 1)).div_ceil(count - 1)).collect();
    let contestants = [
        crash,
        Blocks::choose(&similarity, KEPT, TRAINED, Share::None)?.0,
        Blocks::given(depth, &ends, &spread, Share::None)?,
    ];
    let mut arms = vec![untuned];
    for blocks in &contestants {
        let model = Emulator::new(language.model()?, blocks.order.clone(), blocks.own_places())?;
        let lab = language.lab(Box::new(model));
        let (blocks, stand_in) = tune(&lab, blocks, &train, &test, seed)?;
        let tuned = whole.with(blocks);
        arms.extend([stand_in, tuned.plain(|model| perplexity(&tuned, model, &test))?]);
    }
    let clusters = clusters.iter().map(ExactSizeIterator::len).collect();
    Ok(Found { arms, clusters, num_tokens: language.num_tokens(&train) })
}

/// Trains the blocks of a stand-in that train; returns their weights and the stand-in's perplexity.
fn tune(
    lab: &Lab,
    blocks: &Blocks,
    train: &[usize],
    test: &[usize],
    seed: Seed,
) -> Result<(Values, f64)> {
    let trained: Vec<String> = blocks.trainable.iter().map(ToString::to_string).collect();
    let targets = format!("targets = ['.*layers\\.({})\\..*']", trained.join("|"));
    let pace = Pace::passes(1, train.len(), BATCH, 3e-4);
    lab.train(method("full", &targets)?, train, pace, seed, |training| {
        let tuned = training.tuned();
        let is_trained =
            |weight: &&WeightSpec| weight.layer.is_some_and(|l| blocks.trainable.contains(&l));
        let weights = lab.model.spec().weights.iter().filter(is_trained);
        let merge =
            |weight: &WeightSpec| Ok((weight.name.clone(), export::merged(&tuned, weight)?));
        let values = weights.map(merge).collect::<Result<Values>>()?;
        Ok((values, perplexity(lab, &tuned, test)?))
    })
}
