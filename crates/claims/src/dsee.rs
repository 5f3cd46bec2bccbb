//! DSEE: heads pruned by the tuned update, and when a few free entries help LoRA.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use retune_core::parameters::Parameters;
use retune_core::random::{Random, Seed};
use retune_core::spec::{ModelSpec, Role};

use crate::encoder::{Encoder, Sizes};
use crate::lab::{Lab, Pace, Values, method};
use crate::regression::{self, Regression};
use crate::sentences::{VOCABULARY, document, keyed, pretrained};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 21,
    name: "DSEE",
    source: "Chen, Chen, Chen, Awadallah, Wang and Cheng, DSEE: Dually Sparsity-embedded Efficient \
             Tuning of Pre-trained Language Models, 2021, arXiv 2111.00160",
    claims: "A quarter of the heads pruned by the size of the tuned update, then tuned on, keeps \
             accuracy near the unpruned LoRA and beats random heads; free entries beside the low-rank \
             change help.",
    run: "Encoder of 4 blocks, width 128 and 8 heads that learned to fill gaps in sentences of a \
          made-up language (600 steps of 32); the task is which of two key words comes \
          first, 2000 rows, 400 steps of 32 at 3e-3 on queries and values with a new head, 2 of 8 heads \
          per layer pruned half-way, accuracy on 1000 rows, five seeds; chance is 0.5. Then planted \
          entries in random 256 x 256 matrices, and linear regression 64 x 64 whose truth is rank 2 \
          with 20 entries of 1.5 (2500 steps of 64 at 1e-2, noise 0.05, two seeds).",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const NUM_TRAIN: usize = 2000;
const NUM_TEST: usize = 1000;
const STEPS: u64 = 400;
const RATE: f64 = 3e-3;
const LENGTH: usize = 12;
const WIDTH: usize = 128;
const LAYERS: usize = 4;
const HEADS: usize = 8;
const PRUNED: usize = 2;

/// Each contestant: name, options.
const ARMS: [(&str, &str); 5] = [
    ("LoRA of rank 4", "rank = 4\nalpha = 4\nentries = 0"),
    ("rank 3 and 256 free entries", "rank = 3\nalpha = 3\nentries = 256"),
    ("pruned by the update", "rank = 4\nalpha = 4\nentries = 0\nprune = 'heads'\nscore = 'update'"),
    ("pruned by the weight", "rank = 4\nalpha = 4\nentries = 0\nprune = 'heads'\nscore = 'weight'"),
    ("pruned at random", "rank = 4\nalpha = 4\nentries = 0\nprune = 'heads'\nscore = 'random'"),
];

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    heads(&mut proof)?;
    planted(&mut proof)?;
    beside_lora(&mut proof)?;
    Ok(proof)
}

fn sizes() -> Sizes {
    Sizes { num_heads: HEADS, ..Sizes::of(WIDTH, LAYERS) }
}

fn heads(proof: &mut Proof) -> Result<()> {
    let draw = |random: &mut Random| keyed(LENGTH, random).0;
    let pace = Pace::steps(600, 32, 2e-3);
    let base = pretrained(sizes(), LENGTH, 4000, pace, Seed(2100), draw)?;
    let mut accuracies: Vec<Vec<f64>> = vec![Vec::new(); ARMS.len()];
    let mut trained = vec![0; ARMS.len()];
    let mut saved = Vec::new();
    let mut same = true;
    let seeds = side_by_side(NUM_SEEDS, |number| {
        let seed = Seed(2110 + number);
        let mut of_seed = Vec::new();
        let mut lab = classifier(&base, seed);
        let start = lab.values().clone();
        let (train, test): (Vec<usize>, Vec<usize>) =
            ((0..NUM_TRAIN).collect(), (NUM_TRAIN..NUM_TRAIN + NUM_TEST).collect());
        let pace = Pace::steps(STEPS, 32, RATE);
        for (_, options) in ARMS {
            let tuned = lab.tune(
                method("dsee", &format!("{options}\nprune_heads = {PRUNED}"))?,
                &train,
                pace,
                seed,
                &[],
            )?;
            let spared =
                options.contains("prune").then(|| products_saved(lab.model.spec(), &tuned.merged));
            lab.set(tuned.merged);
            of_seed.push((tuned.num_trained, spared, lab.accuracy(&test)?));
            lab.set(start.clone());
        }
        Ok((of_seed, number > 0 || pruning_nothing_is_none(&lab, &train, seed)?))
    })?;
    for (of_seed, same_here) in seeds {
        same &= same_here;
        for (place, (count, spared, accuracy)) in of_seed.into_iter().enumerate() {
            trained[place] = count;
            saved.extend(spared);
            accuracies[place].push(accuracy);
        }
    }
    proof
        .figures
        .push_str("| | values that train | accuracy, mean | each seed |\n|---|---|---|---|\n");
    for ((name, _), (values, trained)) in ARMS.iter().zip(accuracies.iter().zip(&trained)) {
        let _ = writeln!(
            proof.figures,
            "| {name} | {trained} | {:.3} | {} |",
            mean(values),
            each(values)
        );
    }
    let [lora, _, update, _, random] = &accuracies[..] else { unreachable!("five arms") };
    if mean(lora) < 0.6 {
        proof.notes.push(
            "Even the unpruned LoRA is near chance: what is asserted of heads says nothing here."
                .to_owned(),
        );
    }
    if mean(lora) > 0.99 {
        proof.notes.push(format!(
            "The task is learned to its end with and without pruning ({:.4} unpruned, {:.4} pruned by the \
             update, {:.4} at random): differences are single rows of 1000, and no order of arms follows.",
            mean(lora),
            mean(update),
            mean(random)
        ));
    }
    let gap = mean(update) - mean(lora);
    proof.assert(
        "heads pruned by the update stay within 2 points of the unpruned LoRA, on the mean",
        format!("{gap:+.3}"),
        gap >= -0.02,
    );
    let gains: Vec<f64> = update.iter().zip(random).map(|(a, b)| a - b).collect();
    proof.assert(
        "they do at least as well as heads pruned at random, on the mean over paired seeds",
        format!("{:+.3} ({})", mean(&gains), each(&gains)),
        mean(&gains) >= 0.0,
    );
    // Attention has 4 d² weights, the gated network 6 d² at twice the width.
    let formula = PRUNED as f64 / HEADS as f64 * 4.0 / 10.0;
    proof.assert(
        "products saved, counted over heads whose outputs nothing reads, are the formula's",
        format!("{:.4} and {formula:.4}", mean(&saved)),
        saved.iter().all(|share| (share - formula).abs() < 1e-12),
    );
    proof.assert(
        "pruning none of the weights leaves what no pruning leaves, bit for bit",
        if same { "the same weights" } else { "other weights" },
        same,
    );
    Ok(())
}

/// Makes the model of the task with the base's weights and a new head.
fn classifier(base: &Values, seed: Seed) -> Lab {
    let documents = (0..NUM_TRAIN + NUM_TEST).map(|row| {
        let mut random = seed.stream("task", &[row as u64]);
        let (words, class) = keyed(LENGTH, &mut random);
        document(words, class, row)
    });
    let model = Encoder::new(VOCABULARY, LENGTH, sizes(), Some(2));
    let mut lab = Lab::new(model, documents.collect(), seed);
    lab.set(base.clone());
    lab
}

/// Returns the share of the blocks' products that the pruned heads' projections make up.
fn products_saved(spec: &ModelSpec, values: &Values) -> f64 {
    let linears = spec.linears().filter(|weight| weight.layer.is_some());
    let all: usize = linears.map(retune_core::spec::WeightSpec::count).sum();
    let mut gone = 0;
    for weight in spec.weights.iter().filter(|weight| weight.role == Role::AttentionOutput) {
        let [rows, columns] = weight.matrix();
        let values = &values[&weight.name];
        for head in 0..spec.num_heads {
            let mut of_head = (0..rows * columns)
                .filter(|index| index % columns / spec.head_width == head)
                .map(|index| values[index]);
            if of_head.all(|value| value == 0.0) {
                gone += 4 * rows * spec.head_width;
            }
        }
    }
    gone as f64 / all as f64
}

/// Returns whether a run that prunes none of the weights ends as one without pruning.
fn pruning_nothing_is_none(lab: &Lab, train: &[usize], seed: Seed) -> Result<bool> {
    let pace = Pace::steps(6, 32, RATE).constant();
    let bare = method("dsee", "rank = 4\nalpha = 4\nentries = 0")?;
    let none =
        method("dsee", "rank = 4\nalpha = 4\nentries = 0\nprune = 'weights'\nprune_share = 0.0")?;
    let (bare, none) =
        (lab.tune(bare, train, pace, seed, &[])?, lab.tune(none, train, pace, seed, &[])?);
    Ok(bare.merged == none.merged)
}

/// Entries planted beside a direction are found.
fn planted(proof: &mut Proof) -> Result<()> {
    const SEEDS: u64 = 10;
    let mut found = Vec::new();
    let mut shown = Vec::new();
    // How large the direction is the proof this follows does not say: smaller than the noise, as large,
    // and six times as large.
    for deviation in [0.1, 0.2, 0.5] {
        let seeds = (0..SEEDS).map(|number| planted_hits(deviation, Seed(2150 + number)));
        let hits = seeds.collect::<Result<Vec<usize>>>()?;
        let of_size: Vec<String> = hits.iter().map(usize::to_string).collect();
        shown.push(format!("N(0, {deviation}²) {}", of_size.join(", ")));
        found.extend(hits);
    }
    proof.assert(
        "of 16 planted entries of 0.5 beside a direction and noise of 0.04, one round finds 15 or more, in \
         every matrix",
        format!("factors from {}", shown.join("; from ")),
        found.iter().all(|hits| *hits >= 15),
    );
    Ok(())
}

/// Counts the planted entries that are chosen beside a direction with factors of this deviation.
fn planted_hits(deviation: f64, seed: Seed) -> Result<usize> {
    const SIDE: usize = 256;
    const SPIKES: usize = 16;
    let mut random = seed.stream("planted", &[]);
    let (mut u, mut v, mut values) = (vec![0.0; SIDE], vec![0.0; SIDE], vec![0.0; SIDE * SIDE]);
    random.fill_normal(&mut u, deviation);
    random.fill_normal(&mut v, deviation);
    random.fill_normal(&mut values, 0.04);
    let spikes = random.choose(SIDE * SIDE, SPIKES);
    for (index, value) in values.iter_mut().enumerate() {
        *value += u[index / SIDE] * v[index % SIDE];
    }
    for place in &spikes {
        values[*place] += 0.5;
    }
    let zeros: Arc<[f32]> = vec![0.0; SIDE].into();
    let model = Regression::new(Arc::clone(&zeros), zeros, &[SIDE, SIDE]);
    let mut lab = Lab::new(model, Vec::new(), seed);
    lab.set(Values::from([("head.weight".to_owned(), values)]));
    let weights = lab.weights()?;
    let mut parameters = Parameters::new(weights.device());
    let options = format!("rank = 1\nentries = {SPIKES}\ntargets = ['head']");
    method("dsee", &options)?.attach(&weights, &mut parameters, seed)?;
    let entries: BTreeSet<usize> = parameters
        .iter()
        .filter(|(id, _)| parameters.support(*id).is_some())
        .flat_map(|(id, _)| parameters.indices(id).to_vec())
        .map(|index| index as usize)
        .collect();
    Ok(spikes.iter().filter(|place| entries.contains(place)).count())
}

const SIDE: usize = 64;
const SPIKES: usize = 20;

/// Each contestant of the regression: name, options.
const SHAPES: [(&str, &str); 4] = [
    ("LoRA of rank 2", "rank = 2\nalpha = 2\nentries = 0"),
    ("LoRA of rank 3", "rank = 3\nalpha = 3\nentries = 0"),
    (
        "rank 2 and entries at the true places",
        "rank = 2\nalpha = 2\nentries = 20\nplaces = 'magnitude'",
    ),
    ("rank 2 and entries at random", "rank = 2\nalpha = 2\nentries = 20\nplaces = 'random'"),
];

/// Free entries help where they lie right.
fn beside_lora(proof: &mut Proof) -> Result<()> {
    let seeds = side_by_side(2, |number| {
        let seed = Seed(2180 + number);
        let mut random = seed.stream("truth", &[]);
        let (mut u, mut v, mut base) =
            (vec![0.0; SIDE * 2], vec![0.0; SIDE * 2], vec![0.0; SIDE * SIDE]);
        random.fill_normal(&mut u, 0.3);
        random.fill_normal(&mut v, 0.3);
        random.fill_normal(&mut base, 0.1);
        let mut truth: Vec<f32> = (0..SIDE * SIDE)
            .map(|index| {
                let (row, column) = (index / SIDE, index % SIDE);
                (0..2).map(|k| u[row * 2 + k] * v[column * 2 + k]).sum()
            })
            .collect();
        for place in random.choose(SIDE * SIDE, SPIKES) {
            truth[place] += 1.5;
            // The base is largest there, so that `magnitude` names the true places.
            base[place] = 10.0;
        }
        truth.iter_mut().zip(&base).for_each(|(truth, base)| *truth += base);

        let count = 5000;
        let mut inputs = vec![0.0; count * SIDE];
        random.fill_normal(&mut inputs, 1.0);
        let mut targets: Vec<f32> = inputs
            .chunks_exact(SIDE)
            .flat_map(|x| {
                truth.chunks_exact(SIDE).map(move |row| row.iter().zip(x).map(|(w, x)| w * x).sum())
            })
            .collect();
        let train = 4000 * SIDE;
        for target in &mut targets[..train] {
            *target += (0.05 * random.normal()) as f32;
        }
        let model = Regression::new(inputs.into(), targets.into(), &[SIDE, SIDE]);
        let mut lab = Lab::new(model, regression::documents(count), seed);
        let base = Values::from([("head.weight".to_owned(), base)]);
        lab.set(base.clone());
        let rows: Vec<usize> = (0..count).collect();
        let (train, test) = rows.split_at(4000);
        let untuned = lab.loss(test)?;
        let mut errors = Vec::new();
        for (_, options) in SHAPES {
            let method = method("dsee", &format!("{options}\ntargets = ['head']"))?;
            let tuned = lab.tune(method, train, Pace::steps(2500, 64, 1e-2), seed, &[])?;
            lab.set(tuned.merged);
            errors.push(lab.loss(test)?);
            lab.set(base.clone());
        }
        Ok((untuned, errors))
    })?;
    let mut untuned = Vec::new();
    let mut errors: Vec<Vec<f64>> = vec![Vec::new(); SHAPES.len()];
    for (of_base, of_seed) in seeds {
        untuned.push(of_base);
        errors.iter_mut().zip(of_seed).for_each(|(list, error)| list.push(error));
    }
    let _ = write!(
        proof.figures,
        "\n| regression | error, each seed |\n|---|---|\n| no change | {} |\n",
        each(&untuned)
    );
    for ((name, _), errors) in SHAPES.iter().zip(&errors) {
        let shown: Vec<String> = errors.iter().map(|error| format!("{error:.5}")).collect();
        let _ = writeln!(proof.figures, "| {name} | {} |", shown.join(", "));
    }
    let [two, three, right, anywhere] = &errors[..] else { unreachable!("four shapes") };
    proof.assert(
        "entries at the true places take the error below 1e-4, on every seed",
        right.iter().map(|error| format!("{error:.1e}")).collect::<Vec<_>>().join(", "),
        right.iter().all(|error| *error < 1e-4),
    );
    proof.notes.push(format!(
        "Free entries pay where they lie right: at random places the error is {:.2} of plain LoRA's, \
         and a third rank with 128 values more gives {:.2} of it. Places read off the pretrained \
         weight are a guess.",
        mean(anywhere) / mean(two),
        mean(three) / mean(two),
    ));
    Ok(())
}
