//! IAA: adapters that a path of trainable modules connects learn in fewer steps.

use std::fmt::Write;

use retune_core::event::{Event, Observer, Silent};
use retune_core::random::Seed;
use retune_train::backprop::Backprop;

use crate::encoder::Sizes;
use crate::families::gap;
use crate::lab::{Lab, Pace, Watch, adamw, method};
use crate::pictures::Pictures;
use crate::retrieval::{BiEncoder, Corpus, QUERIES, Questions, Ranks};
use crate::rotated::{SAME, model, rotated};
use crate::{Claim, Clock, Proof, Prove, Result, each, mean, side_by_side};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 8,
    name: "IAA",
    source: "Ma, Guo, Zhang, Fan and Cheng, Scattered or Connected? An Optimized \
             Parameter-efficient Tuning Approach for Information Retrieval, 2022, arXiv 2208.09847",
    claims: "At an equal count of trained weights, adapters inside the layers with light branches \
             aside of the layers reach a given quality in fewer steps than adapters alone, and end \
             no worse.",
    run: "Retrieval: an encoder of 4 layers and width 32 that finds a passage by a query of two of its \
          facts, pretrained on queries in the passages' own words (600 steps); tuned 400 steps on \
          1200 queries in other words, 32 a batch with 3 hard negatives each, in-batch soft-max; \
          MRR@10 over all 2000 passages on 300 held-out queries every 20 steps; five seeds. Pictures: \
          a transformer of 4 layers and width 32 that knows 1200 digits upright, tuned to them turned, 15 \
          passes of batches of 32 at 3e-3, measured on 447 others, three seeds. Depth: 12 random layers, \
          adapters in layers 0, 4 and 8, 20 steps.",
    quick: false,
    prove: Prove::Alone(prove),
};

const NUM_SEEDS: u64 = 5;
const STEPS: u64 = 400;
const EVERY: u64 = 20;

/// Passes over rotated pictures, and pictures a step.
const PASSES: usize = 15;
const BATCH: usize = 32;

const FULL: &str = "full";
const SERIAL: &str = "serial adapters, 8";
const CONNECTED: &str = "serial adapters, 4, and branches, 4";

/// Contestants in retrieval: name, method, options, rate.
const SEARCHERS: [(&str, &str, &str, f64); 4] = [
    (FULL, "full", "", 1e-3),
    (SERIAL, "iaa", "inside_size = 8\naside = 'none'", 5e-3),
    (CONNECTED, "iaa", "inside_size = 4\naside_size = 4", 5e-3),
    ("LoRA", "lora", "rank = 4\nalpha = 8\ntargets = ['q_proj', 'v_proj']", 5e-3),
];

/// Contestants on pictures: name and options.
const READERS: [(&str, &str); 4] = [
    (SERIAL, "inside_size = 8\naside = 'none'"),
    (CONNECTED, "inside_size = 4\naside_size = 4"),
    ("parallel adapters, 8", "inside = 'parallel'\ninside_size = 8\naside = 'none'"),
    (
        "parallel adapters, 4, and branches, 4",
        "inside = 'parallel'\ninside_size = 4\naside_size = 4",
    ),
];

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    retrieval(&mut proof)?;
    depth(&mut proof)?;
    pictures(&mut proof)?;
    Ok(proof)
}

/// One contestant on one seed.
#[derive(Debug, Clone)]
struct Search {
    num_trained: usize,
    curve: Vec<f64>,
}

impl Search {
    fn last(&self) -> f64 {
        self.curve.last().copied().unwrap_or(0.0)
    }

    /// Returns the steps after which the curve first reaches `goal`; all of them if it never does.
    fn steps_to(&self, goal: f64) -> f64 {
        let place = self.curve.iter().position(|mrr| *mrr >= goal);
        place.map_or(STEPS as f64, |place| (place as u64 + 1) as f64 * EVERY as f64)
    }
}

fn retrieval(proof: &mut Proof) -> Result<()> {
    let found = side_by_side(NUM_SEEDS, |number| search(Seed(800 + number)))?;
    let untuned: Vec<f64> = found.iter().map(|(untuned, _)| *untuned).collect();
    let _ = writeln!(
        proof.figures,
        "| retrieval | values that train | MRR@10, mean | each seed | steps to 90 % of full tuning's, \
         each seed |\n|---|---|---|---|---|\n| untuned | 0 | {:.3} | {} | |",
        mean(&untuned),
        each(&untuned)
    );
    let (mut steps, mut ends) = (Vec::new(), Vec::new());
    for (arm, (name, ..)) in SEARCHERS.iter().enumerate() {
        let last: Vec<f64> = found.iter().map(|(_, arms)| arms[arm].last()).collect();
        let goals = found.iter().map(|(_, arms)| (&arms[arm], 0.9 * arms[0].last()));
        let to_goal: Vec<f64> = goals.map(|(search, goal)| search.steps_to(goal)).collect();
        let shown: Vec<String> = to_goal.iter().map(|steps| format!("{steps:.0}")).collect();
        let _ = writeln!(
            proof.figures,
            "| {name} | {} | {:.3} | {} | {} |",
            found[0].1[arm].num_trained,
            mean(&last),
            each(&last),
            shown.join(", ")
        );
        steps.push(to_goal);
        ends.push(last);
    }
    let (serial, connected) = (median(&steps[1]), median(&steps[2]));
    proof.assert(
        "retrieval: the connected form takes at most 0.8 of the steps that adapters alone take to 90 \
         % of full tuning's MRR, in the median",
        format!("{connected:.0} of {serial:.0}"),
        connected <= 0.8 * serial,
    );
    if mean(&ends[0]) < 0.1 {
        proof.notes.push(format!(
            "Retrieval: full tuning itself ends at an MRR of {:.3}, which is no more than chance: nobody \
             learns the task, and what is asserted of it says nothing. What is wrong with the set-up has \
             not been found.",
            mean(&ends[0])
        ));
    }
    let gap = mean(&ends[2]) - mean(&ends[1]);
    proof.assert(
        "retrieval: its MRR ends at most 0.005 below that of adapters alone, on the mean",
        format!("{gap:+.3}"),
        gap >= -0.005,
    );
    let (one, other) = (deviation(&ends[2]), deviation(&ends[1]));
    proof.assert(
        "retrieval: its MRR differs no more from seed to seed",
        format!("deviation {one:.3} against {other:.3}"),
        one <= other,
    );
    Ok(())
}

fn search(seed: Seed) -> Result<(f64, Vec<Search>)> {
    let corpus = Corpus::make(2000, seed);
    let count = corpus.num_queries().min(1500);
    let numbers: Vec<usize> = (0..count).collect();
    let (held_out, learned) = numbers.split_at(300);
    let mut lab = Lab::new(BiEncoder::new(Sizes::of(32, 4).with_biases()), Vec::new(), seed);
    let mut own = Questions {
        corpus: &corpus,
        queries: learned,
        paraphrased: false,
        seed: Seed(seed.0 + 50),
    };
    let pace = Pace::steps(600, QUERIES, 3e-3);
    let watch = Watch { every: 0, validation: None, observer: &mut Silent };
    let base = lab.walk(method("full", "")?, adamw(), &mut own, pace, seed, watch, |training| {
        lab.merged(&training.tuned())
    })?;
    lab.set(base);
    let ranks =
        || Ranks { corpus: &corpus, queries: held_out, paraphrased: true, seed, curve: Vec::new() };
    let untuned = lab.plain(|tuned| Ok(ranks().mrr(tuned)?))?;
    let mut arms = Vec::new();
    for (_, name, options, rate) in SEARCHERS {
        let mut questions =
            Questions { corpus: &corpus, queries: learned, paraphrased: true, seed };
        let mut ranks = ranks();
        let watch = Watch { every: EVERY, validation: Some(&mut ranks), observer: &mut Silent };
        let pace = Pace::steps(STEPS, QUERIES, rate);
        let method = method(name, options)?;
        let num_trained =
            lab.walk(method, adamw(), &mut questions, pace, seed, watch, |training| {
                Ok(training.parameters.num_trainable())
            })?;
        arms.push(Search { num_trained, curve: ranks.curve });
    }
    Ok((untuned, arms))
}

fn depth(proof: &mut Proof) -> Result<()> {
    let seed = Seed(1);
    let pictures = Pictures::digits(seed);
    let lab = Lab::of_pictures(model(&pictures, 12), &pictures, seed);
    let rows: Vec<usize> = (0..256).collect();
    let base = lab.scores(&rows)?;
    let mut norms = Vec::new();
    let mut start = 0.0_f64;
    for aside in ["none", "layer"] {
        let options = format!("inside_layers = [0, 4, 8]\naside = '{aside}'");
        lab.train(method("iaa", &options)?, &rows, Pace::steps(0, 32, 1e-3), seed, |training| {
            let logits = lab.logits(&training.tuned(), &rows)?;
            start = start.max(gap(&logits, &base));
            Ok(())
        })?;
        let pace = Pace::steps(20, 32, 1e-3).constant();
        norms.push(lab.train(method("iaa", &options)?, &rows, pace, seed, |training| {
            let batch = lab.batch(&rows)?;
            let learner = Backprop { seed, recompute: false };
            let step = learner.step(&training.tuned(), &[batch], 0)?;
            let lowest = training
                .parameters
                .iter()
                .filter(|(_, p)| p.name.contains("layers.0.") && p.name.contains(".inside."));
            let gradients = lowest.filter_map(|(id, _)| step.gradients[id.index()].as_ref());
            let squares = gradients.flatten().map(|g| f64::from(*g).powi(2));
            Ok((squares.sum::<f64>().sqrt(), step.loss))
        })?);
    }
    let [(without, loss_without), (with, loss_with)] = norms[..] else { unreachable!("two arms") };
    proof.assert(
        "depth: the gradient of the lowest adapter is at least as large with branches aside",
        format!("{with:.4} with, {without:.4} without"),
        with >= without,
    );
    if with < without {
        proof.notes.push(format!(
            "Depth: before the first step both gradients are the same, as branches begin at zero; after 20 \
             steps the loss is {loss_with:.3} with branches aside and {loss_without:.3} without, which is \
             some of the reason and not all: over the loss the gradients are {:.3} and {:.3}.",
            with / loss_with,
            without / loss_without
        ));
    }
    proof.assert(
        "depth: outputs before the first step are the base's within 1e-5",
        format!("at most {start:.1e}"),
        start <= 1e-5,
    );
    Ok(())
}

/// The loss of each step.
#[derive(Debug, Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_event(&mut self, event: &Event) {
        if let Event::StepDone { loss, .. } = event {
            self.0.push(*loss);
        }
    }
}

/// One contestant on pictures, one seed: accuracy, loss after a third of the steps, last loss.
type Read = [f64; 3];

fn pictures(proof: &mut Proof) -> Result<()> {
    let found: Vec<Vec<(usize, Read)>> = side_by_side(3, |number| {
        let seed = Seed(810 + number);
        let (lab, rows) = rotated(4, &SAME, seed)?;
        let read = |(_, options): &(&str, &str)| {
            let mut losses = Losses::default();
            let pace = Pace::passes(PASSES, rows.train.len(), BATCH, 3e-3);
            let watch = Watch { every: 0, validation: None, observer: &mut losses };
            let mut batches = lab.source(&rows.train, pace, seed);
            let method = method("iaa", options)?;
            let (count, accuracy) =
                lab.walk(method, adamw(), &mut batches, pace, seed, watch, |training| {
                    let accuracy = lab.accuracy_of(&training.tuned(), &rows.test)?;
                    Ok((training.parameters.num_trainable(), accuracy))
                })?;
            // A pass around a third of the way, and the last.
            let pass = rows.train.len() / BATCH;
            let third = losses.0.len() / 3;
            let around = &losses.0[third - pass / 2..][..pass];
            let last = &losses.0[losses.0.len() - pass..];
            Ok((count, [accuracy, mean(around), mean(last)]))
        };
        READERS.iter().map(read).collect()
    })?;
    let _ = writeln!(
        proof.figures,
        "\n| pictures, {PASSES} passes | values that train | accuracy | loss at a third | last loss \
         |\n|---|---|---|---|---|"
    );
    let of = |arm: usize, measure: usize| -> Vec<f64> {
        found.iter().map(|arms| arms[arm].1[measure]).collect()
    };
    for (arm, (name, _)) in READERS.iter().enumerate() {
        let _ = writeln!(
            proof.figures,
            "| {name} | {} | {:.3} | {:.3} | {:.3} |",
            found[0][arm].0,
            mean(&of(arm, 0)),
            mean(&of(arm, 1)),
            mean(&of(arm, 2))
        );
    }
    for (measure, name, sign) in
        [(0, "accuracy", 1.0), (1, "loss at a third", -1.0), (2, "last loss", -1.0)]
    {
        let gains: Vec<f64> = of(1, measure)
            .iter()
            .zip(of(0, measure))
            .map(|(with, without)| with - without)
            .collect();
        proof.assert(
            format!("pictures: the connected form has the better {name} than serial adapters, on every seed"),
            each(&gains),
            gains.iter().all(|gain| sign * gain > 0.0),
        );
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn deviation(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares = values.iter().map(|value| (value - middle).powi(2)).sum::<f64>();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}
