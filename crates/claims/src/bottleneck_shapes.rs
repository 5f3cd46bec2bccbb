//! Shapes of adapters: convolutions for what is near, attention for what is far.

use std::fmt::Write;
use std::sync::Arc;

use retune_core::Result as CoreResult;
use retune_core::batch::{Batch, Document};
use retune_core::event::Silent;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::to_vec;
use retune_core::pass::Pass;
use retune_core::random::Seed;
use retune_core::site::Sublayer;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use retune_train::training::BatchSource;
use serde_json::Value;
use tensor::Tensor;

use crate::contest::each_seed;
use crate::lab::{Lab, Pace, Watch, method};
use crate::{Claim, Clock, Proof, Result, each, mean};

/// The claim.
pub(crate) const CLAIM: Claim = Claim {
    number: 20,
    name: "shapes of adapters",
    source: "Mehta, Chauhan and Choudhury, Exploring Adapter Design Tradeoffs for Low Resource Music \
             Generation, 2025, arXiv 2506.21298",
    claims: "At equal size a convolutional adapter wins on a local pattern, a transformer adapter on \
             a pattern far away, and each fails on the other's; a middle size is best.",
    run: "A frozen backbone of single tokens: random embeddings of 12 tokens, width 48, and random \
          positions (0.7); sequences of 33. One adapter and a linear head train, AdamW 3e-3, batches \
          of 32, 500 steps; measured on 256 sequences. Near: the sum of the last three tokens modulo \
          3. Far: the token 16 places back. Adapters of about 4700 values: 48 wide, convolutions 20 \
          wide (kernel 3, dilations 1 and 2, causal), a transformer layer 16 wide with 4 heads; three \
          seeds. Sizes: half of 300 sequences near, half far, 5 % of the targets wrong, 250 steps, \
          three seeds.",
    quick: false,
    prove,
};

const TOKENS: usize = 12;
const WIDTH: usize = 48;
const LENGTH: usize = 33;
const FAR: usize = 16;
const BATCH: usize = 32;

/// Name, options, and how many values the adapter has.
const SHAPES: [(&str, &str); 3] = [
    ("fully connected", "size = 48, activation = 'gelu'"),
    ("convolutional", "size = 20, shape = 'conv'"),
    ("transformer", "size = 16, shape = 'transformer', heads = 4"),
];

/// Widths of the sweep.
const SIZES: [usize; 5] = [4, 8, 16, 32, 48];

/// What a sequence asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Task {
    Near,
    Far,
    /// One or the other, as the first token's half of the vocabulary says.
    Mixed,
}

impl Task {
    fn target(self, tokens: &[u32], place: usize) -> Option<u32> {
        match self {
            Self::Near => (place >= 2).then(|| tokens[place - 2..=place].iter().sum::<u32>() % 3),
            Self::Far => place.checked_sub(FAR).map(|source| tokens[source]),
            Self::Mixed if tokens[0] < TOKENS as u32 / 2 => Self::Near.target(tokens, place),
            Self::Mixed => Self::Far.target(tokens, place),
        }
    }
}

fn prove(_clock: Clock) -> Result<Proof> {
    let mut proof = Proof::default();
    for (task, name, winner, chance) in
        [(Task::Near, "near", 1, 1.0 / 3.0), (Task::Far, "far", 2, 1.0 / TOKENS as f64)]
    {
        let found: Vec<Vec<(usize, f64)>> = each_seed(200..203, |seed| {
            let shapes = SHAPES.iter();
            shapes.map(|(_, options)| one(task, options, seed)).collect::<Result<_>>()
        })?;
        let _ = writeln!(
            proof.figures,
            "| {name} (chance {chance:.3}) | values that train | accuracy, each seed |\n|---|---|---|"
        );
        for (shape, (label, _)) in SHAPES.iter().enumerate() {
            let accuracies: Vec<f64> = found.iter().map(|shapes| shapes[shape].1).collect();
            let _ = writeln!(
                proof.figures,
                "| {label} | {} | {} |",
                found[0][shape].0,
                each(&accuracies)
            );
            if shape == winner {
                proof.assert(
                    format!("{name}: the {label} adapter has at least 0.95, on every seed"),
                    each(&accuracies),
                    accuracies.iter().all(|accuracy| *accuracy >= 0.95),
                );
            } else {
                proof.assert(
                    format!("{name}: the {label} adapter is within 0.05 of chance, on every seed"),
                    each(&accuracies),
                    accuracies.iter().all(|accuracy| (accuracy - chance).abs() <= 0.05),
                );
            }
        }
        proof.figures.push('\n');
    }
    sweep(&mut proof)?;
    proof.notes.push(
        "The time of a step with adapters early or late in a deep model is not part of this proof."
            .to_owned(),
    );
    Ok(proof)
}

/// Tunes widths on a mixed task with few sequences, and prints the smallest that is as good as any.
fn sweep(proof: &mut Proof) -> Result<()> {
    let losses: Vec<Vec<f64>> = each_seed(210..213, |seed| {
        let size = |size: &usize| {
            let options = format!("size = {size}, shape = 'transformer', heads = 4");
            let mut texts = Texts { task: Task::Mixed, limit: Some(300), noise: 0.05, seed };
            let pace = Pace::steps(250, BATCH, 3e-3);
            train(&options, &mut texts, pace, seed, |tuned| loss(tuned, Task::Mixed, seed))
        };
        SIZES.iter().map(size).collect::<Result<_>>()
    })?;
    let means: Vec<f64> = (0..SIZES.len())
        .map(|size| mean(&losses.iter().map(|seed| seed[size]).collect::<Vec<_>>()))
        .collect();
    let best = means.iter().copied().fold(f64::INFINITY, f64::min);
    let _ = writeln!(
        proof.figures,
        "| width of a transformer adapter | validation loss, mean |\n|---|---|"
    );
    for (size, loss) in SIZES.iter().zip(&means) {
        let _ = writeln!(proof.figures, "| {size} | {loss:.3} |");
    }
    let middle = SIZES.iter().zip(&means).find(|(_, loss)| **loss <= 1.02 * best);
    if let Some((size, _)) = middle {
        let _ = writeln!(proof.figures, "\nThe smallest width within 2 % of the best is {size}.");
    }
    Ok(())
}

/// Tunes one adapter; returns what trained of it, and the share of targets it finds.
fn one(task: Task, options: &str, seed: Seed) -> Result<(usize, f64)> {
    let mut texts = Texts { task, limit: None, noise: 0.0, seed };
    let pace = Pace::steps(500, BATCH, 3e-3);
    let head = TOKENS * WIDTH + TOKENS;
    let mut count = 0;
    let accuracy = train(options, &mut texts, pace, seed, |tuned| {
        count = tuned.parameters.num_trainable() - head;
        accuracy(tuned, task, seed)
    })?;
    Ok((count, accuracy))
}

fn train<T>(
    options: &str,
    texts: &mut Texts,
    pace: Pace,
    seed: Seed,
    look: impl FnOnce(&Tuned<'_>) -> Result<T>,
) -> Result<T> {
    let mut lab = Lab::new(Backbone::new(), Vec::new(), seed);
    let mut draw = |name: &str, count: usize, deviation: f64| {
        let mut values = vec![0.0; count];
        seed.stream(name, &[]).fill_normal(&mut values, deviation);
        lab.set([(name.to_owned(), values)].into());
    };
    draw("words.weight", TOKENS * WIDTH, 1.0);
    draw("positions.weight", LENGTH * WIDTH, 0.7);
    let options =
        format!("parallel = {{ size = 0 }}\nserial = {{ {options} }}\nmodules_to_save = ['head']");
    let method = method("autopeft", &options)?;
    lab.walk(method, texts, pace, seed, Watch::nothing(&mut Silent), |training| {
        look(&training.tuned())
    })
}

/// Batches of sequences.
#[derive(Debug)]
struct Texts {
    task: Task,
    /// How many sequences there are; new ones without end where it does not say.
    limit: Option<usize>,
    /// Share of targets that are any token.
    noise: f64,
    seed: Seed,
}

impl Texts {
    fn batch(&self, rows: &[u64]) -> CoreResult<Batch> {
        let mut targets = Vec::new();
        let document = |row: &u64| {
            let mut random = self.seed.stream("sequence", &[*row]);
            let tokens: Vec<u32> = (0..LENGTH).map(|_| random.below(TOKENS) as u32).collect();
            targets.extend((0..LENGTH).map(|place| {
                let target = self.task.target(&tokens, place)?;
                let wrong = random.uniform() < self.noise;
                Some(if wrong { random.below(TOKENS) as u32 } else { target })
            }));
            Document {
                learn: vec![false; LENGTH],
                tokens,
                row: *row as usize,
                ..Document::default()
            }
        };
        let documents: Vec<Document> = rows.iter().map(document).collect();
        Ok(Batch { targets, ..Batch::new(&documents)? })
    }
}

impl BatchSource for Texts {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let first = step * BATCH as u64;
        let rows = first..first + BATCH as u64;
        let rows: Vec<u64> = match self.limit {
            // Behind the rows that are measured.
            None => rows.map(|row| row + 1_000_000).collect(),
            Some(limit) => rows.map(|row| row % limit as u64 + 1_000_000).collect(),
        };
        Ok(vec![self.batch(&rows)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        self.limit.map_or(0.0, |limit| (steps as usize * BATCH) as f64 / limit as f64)
    }
}

/// Returns each measured target with the logits at its place.
fn measured(tuned: &Tuned<'_>, task: Task, seed: Seed) -> Result<Vec<(u32, Vec<f32>)>> {
    let texts = Texts { task, limit: None, noise: 0.0, seed };
    let batch = texts.batch(&(0..256).collect::<Vec<u64>>())?;
    let rows: Vec<usize> =
        (0..batch.num_tokens()).filter(|t| batch.targets[*t].is_some()).collect();
    let logits = tuned.evaluate(&batch, None, |pass, output| match output {
        Output::States(states) => Ok(to_vec(pass.logits(&states, &rows)?.inner())),
        Output::Classes(rows) | Output::Embeddings(rows) => Ok(to_vec(rows.inner())),
    })?;
    let targets = rows.iter().filter_map(|row| batch.targets[*row]);
    Ok(targets.zip(logits.chunks_exact(TOKENS).map(<[f32]>::to_vec)).collect())
}

fn accuracy(tuned: &Tuned<'_>, task: Task, seed: Seed) -> Result<f64> {
    let found = measured(tuned, task, seed)?;
    let right = |(target, logits): &&(u32, Vec<f32>)| {
        let own = logits[*target as usize];
        logits.iter().enumerate().all(|(place, logit)| place == *target as usize || *logit < own)
    };
    Ok(found.iter().filter(right).count() as f64 / found.len() as f64)
}

fn loss(tuned: &Tuned<'_>, task: Task, seed: Seed) -> Result<f64> {
    let loss = |(target, logits): &(u32, Vec<f32>)| {
        let highest = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
        sum.ln() - f64::from(logits[*target as usize] - highest)
    };
    Ok(mean(&measured(tuned, task, seed)?.iter().map(loss).collect::<Vec<_>>()))
}

/// A model that sees each token by itself: what it knows of others an adapter has to bring.
#[derive(Debug)]
struct Backbone {
    spec: Arc<ModelSpec>,
}

impl Backbone {
    fn new() -> Self {
        let weight = |name: &str, shape: &[usize], kind, role| WeightSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind,
            role,
            layer: None,
        };
        let linear = Kind::Linear { transposed: false };
        let weights = vec![
            weight("words.weight", &[TOKENS, WIDTH], Kind::Embedding, Role::Embedding),
            weight("positions.weight", &[LENGTH, WIDTH], Kind::Embedding, Role::Position),
            weight("head.weight", &[TOKENS, WIDTH], linear, Role::Head),
            weight("head.bias", &[TOKENS], Kind::Bias, Role::Head),
        ];
        let spec = ModelSpec {
            architecture: "backbone".to_owned(),
            class: "Backbone".to_owned(),
            num_layers: 1,
            width: WIDTH,
            inner_width: WIDTH,
            num_heads: 1,
            num_key_heads: 1,
            head_width: WIDTH,
            vocabulary: TOKENS,
            max_positions: LENGTH,
            causal: true,
            weights,
            head: Head::Language {
                weight: "head.weight".to_owned(),
                bias: Some("head.bias".to_owned()),
                soft_cap: None,
            },
            config: Value::Null,
        };
        Self { spec: Arc::new(spec) }
    }
}

impl Model for Backbone {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> CoreResult<Tensor<2>> {
        let positions: Vec<u32> = pass.positions().iter().map(|place| *place as u32).collect();
        Ok(pass.embed_words("words", None)? + pass.embed("positions", &positions)?)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> CoreResult<Tensor<2>> {
        pass.sublayer(index, Sublayer::FeedForward, x, |_, x| Ok(x))
    }

    fn finish(&self, _pass: &mut Pass<'_>, x: Tensor<2>) -> CoreResult<Output> {
        Ok(Output::States(x))
    }
}
