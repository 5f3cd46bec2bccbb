//! Where proofs are made: a small model with its weights and data, training, accuracy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::event::{Observer, Silent};
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec, WeightSpec};
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_methods::registry;
use retune_train::optimizer::{AdamW, Optimizer};
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Validation, Walk};
use tensor::Device;

use crate::pictures::Pictures;
use crate::{Clock, Error, Result};

/// Weights by name, in their logical shape.
pub(crate) type Values = BTreeMap<String, Vec<f32>>;

/// Weights held in memory, in place of those of a model that lies elsewhere.
#[derive(Debug)]
pub(crate) struct Held {
    spec: Arc<ModelSpec>,
    values: Values,
    under: Option<Arc<dyn WeightSource>>,
}

impl Held {
    /// Joins weights with the model they are for.
    pub(crate) fn new(spec: &Arc<ModelSpec>, values: Values) -> Self {
        Self { spec: Arc::clone(spec), values, under: None }
    }

    /// Draws weights: matrices from `N(0, 2 / inputs)` (He et al., 2015), gains 1, biases 0.
    pub(crate) fn draw(spec: &ModelSpec, seed: Seed) -> Values {
        let draw = |weight: &WeightSpec| {
            let [_, inputs] = weight.matrix();
            let mut values = vec![f32::from(u8::from(weight.kind == Kind::Norm)); weight.count()];
            if matches!(weight.kind, Kind::Linear { .. } | Kind::Embedding) {
                let deviation = (2.0 / inputs as f64).sqrt();
                seed.stream(&weight.name, &[]).fill_normal(&mut values, deviation);
            }
            (weight.name.clone(), values)
        };
        spec.weights.iter().map(draw).collect()
    }

    /// Draws weights as PyTorch's layers do by default: matrices and biases from `U(±1/√inputs)`,
    /// embeddings from `N(0, 1)`, gains 1. Proofs whose paper or retelling does not say how weights
    /// are drawn take these: how much a change of a given size does hangs on the size of the weights
    /// it is added to, and drawn after He et al. matrices are 2.4 times larger.
    pub(crate) fn draw_as_pytorch(spec: &ModelSpec, seed: Seed) -> Values {
        let draw = |weight: &WeightSpec| {
            let matrix = spec.weight(&format!("{}.weight", weight.module())).unwrap_or(weight);
            let [_, inputs] = matrix.matrix();
            let mut values = vec![f32::from(u8::from(weight.kind == Kind::Norm)); weight.count()];
            let mut random = seed.stream(&weight.name, &[]);
            match (weight.kind, matrix.kind) {
                (Kind::Embedding, _) => random.fill_normal(&mut values, 1.0),
                (_, Kind::Linear { .. }) => {
                    random.fill_uniform(&mut values, (inputs as f64).powf(-0.5));
                }
                _ => {}
            }
            (weight.name.clone(), values)
        };
        spec.weights.iter().map(draw).collect()
    }
}

impl WeightSource for Held {
    fn names(&self) -> Vec<String> {
        let under = self.under.iter().flat_map(|under| under.names());
        let all: BTreeSet<String> = self.values.keys().cloned().chain(under).collect();
        all.into_iter().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.spec.weight(name).map(|weight| weight.shape.clone())
    }

    fn read(&self, name: &str) -> retune_core::Result<Stored> {
        if let (None, Some(under)) = (self.values.get(name), &self.under) {
            return under.read(name);
        }
        let found = self.values.get(name).cloned().map(Stored::Values);
        found.ok_or_else(|| retune_core::Error::MissingWeight {
            name: name.to_owned(),
            needed_by: "a proof".to_owned(),
            nearest: "none".to_owned(),
        })
    }
}

/// Makes a method from its options, as TOML.
///
/// # Errors
/// If there is no such method or an option is wrong.
pub(crate) fn method(name: &str, options: &str) -> Result<Box<dyn Method>> {
    let plugin = registry::find(name).ok_or_else(|| Error::NoMethod(name.to_owned()))?;
    let document = retune_options::Document::parse("options", options).map_err(Error::Options)?;
    let (method, _) = document.read(|reader| (plugin.read)(reader)).map_err(Error::Options)?;
    Ok(method)
}

/// How long and fast a tuning goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Optimiser steps.
    pub(crate) num_steps: u64,
    /// Rows per step.
    pub(crate) batch: usize,
    /// The highest learning rate.
    pub(crate) rate: f64,
    /// How it goes on.
    pub(crate) shape: Shape,
}

impl Pace {
    /// Goes `num_steps` steps, at a rate that falls in a straight line to 0.
    pub(crate) const fn steps(num_steps: u64, batch: usize, rate: f64) -> Self {
        Self { num_steps, batch, rate, shape: Shape::Linear }
    }

    /// Goes over `count` rows `passes` times; a last part of a batch is left out.
    pub(crate) const fn passes(passes: usize, count: usize, batch: usize, rate: f64) -> Self {
        Self::steps((passes * count / batch) as u64, batch, rate)
    }

    /// Falls along half a cosine.
    pub(crate) const fn cosine(self) -> Self {
        Self { shape: Shape::Cosine, ..self }
    }

    /// Keeps the rate as it is.
    pub(crate) const fn constant(self) -> Self {
        Self { shape: Shape::Constant, ..self }
    }
}

/// Who watches a training.
pub(crate) struct Watch<'a> {
    /// Steps between two measurements; 0 is one at the end.
    pub(crate) every: u64,
    /// What is measured.
    pub(crate) validation: Option<&'a mut dyn Validation>,
    /// Who is told of every step.
    pub(crate) observer: &'a mut dyn Observer,
}

/// Makes AdamW without decay.
pub(crate) fn adamw() -> Box<dyn Optimizer> {
    Box::new(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 })
}

/// What a tuning left.
#[derive(Debug)]
pub(crate) struct Tuning {
    /// Every weight with its changes.
    pub(crate) merged: Values,
    /// Values that trained.
    pub(crate) num_trained: usize,
    /// Class logits of the probe with the method in force, before anything was merged.
    pub(crate) logits: Vec<f32>,
}

/// A model with its weights and data.
#[derive(Debug, Clone)]
pub(crate) struct Lab {
    pub(crate) model: Arc<dyn Model>,
    documents: Vec<Document>,
    /// What each token of each document should predict, where that is not the next one.
    targets: Option<Vec<Vec<Option<u32>>>>,
    values: Values,
    /// Where weights lie that `values` does not have.
    under: Option<Arc<dyn WeightSource>>,
    packing: Packing,
}

impl Lab {
    /// Makes a lab with drawn weights; rows are places in `documents`.
    pub(crate) fn new(model: impl Model + 'static, documents: Vec<Document>, seed: Seed) -> Self {
        Self::of(Arc::new(model), documents, seed)
    }

    /// Makes a lab of a model that is shared already, as the program's own are.
    pub(crate) fn of(model: Arc<dyn Model>, documents: Vec<Document>, seed: Seed) -> Self {
        let values = Held::draw(model.spec(), seed);
        let packing = Packing::default();
        Self { model, documents, targets: None, values, under: None, packing }
    }

    /// Makes a lab of a pretrained model, whose weights are read where they lie.
    pub(crate) fn on(
        model: Arc<dyn Model>,
        source: Arc<dyn WeightSource>,
        documents: Vec<Document>,
    ) -> Self {
        let (values, packing) = (Values::new(), Packing::default());
        Self { model, documents, targets: None, values, under: Some(source), packing }
    }

    /// Keeps frozen matrices in another form.
    pub(crate) fn with_packing(mut self, packing: Packing) -> Self {
        self.packing = packing;
        self
    }

    /// Says what each token of each document predicts: masked words at their own places.
    pub(crate) fn with_targets(mut self, targets: Vec<Vec<Option<u32>>>) -> Self {
        self.targets = Some(targets);
        self
    }

    /// Makes a lab whose rows are pictures, read in as many tokens as the model has inputs for.
    pub(crate) fn of_pictures(
        model: impl Model + 'static,
        pictures: &Pictures,
        seed: Seed,
    ) -> Self {
        let length = model.spec().vocabulary / pictures.len();
        let document = |(row, digit): (usize, &u32)| Document {
            tokens: (0..length).map(|token| (row * length + token) as u32).collect(),
            learn: vec![false; length],
            class: Some(*digit),
            row,
            ..Document::default()
        };
        let documents = pictures.digits.iter().enumerate().map(document).collect();
        Self::new(model, documents, seed)
    }

    /// Returns the weights, those of a pretrained model left out.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Replaces weights.
    pub(crate) fn set(&mut self, values: Values) {
        self.values.extend(values);
    }

    /// Returns a lab with other weights.
    pub(crate) fn with(&self, values: Values) -> Self {
        let mut lab = self.clone();
        lab.set(values);
        lab
    }

    /// Gives `rows` in a new order each pass.
    pub(crate) fn source<'a>(
        &'a self,
        rows: &'a [usize],
        pace: Pace,
        seed: Seed,
    ) -> impl BatchSource + 'a {
        Shuffled::new(self, rows, pace.batch, seed)
    }

    /// Opens the weights as they stand.
    ///
    /// # Errors
    /// If they do not fit the model.
    pub(crate) fn weights(&self) -> Result<Weights> {
        let spec = self.model.spec();
        let mut source = Held::new(spec, self.values.clone());
        source.under.clone_from(&self.under);
        let source = Arc::new(source);
        Ok(Weights::new(source, Arc::clone(spec), self.packing, &Device::flex())?)
    }

    /// Tunes with a method on `rows`, and looks at the rows of `probe` with it in force.
    ///
    /// # Errors
    /// Those of the method and of training.
    pub(crate) fn tune(
        &self,
        method: Box<dyn Method>,
        rows: &[usize],
        pace: Pace,
        seed: Seed,
        probe: &[usize],
    ) -> Result<Tuning> {
        self.train(method, rows, pace, seed, |training| {
            let tuned = training.tuned();
            Ok(Tuning {
                merged: self.merged(&tuned)?,
                num_trained: training.parameters.num_trainable(),
                logits: self.logits(&tuned, probe)?,
            })
        })
    }

    /// Trains all weights.
    ///
    /// # Errors
    /// Those of training.
    pub(crate) fn pretrain(&mut self, rows: &[usize], pace: Pace, seed: Seed) -> Result<()> {
        self.values = self.tune(method("full", "")?, rows, pace, seed, &[])?.merged;
        Ok(())
    }

    /// Tunes with a method on `rows`, and lets `look` see what became of it.
    ///
    /// # Errors
    /// Those of the method, of training and of `look`.
    pub(crate) fn train<T>(
        &self,
        method: Box<dyn Method>,
        rows: &[usize],
        pace: Pace,
        seed: Seed,
        look: impl FnOnce(&Training<'_>) -> Result<T>,
    ) -> Result<T> {
        self.train_with(method, adamw(), rows, pace, seed, look)
    }

    /// Trains as [`Lab::train`], with another optimiser than AdamW.
    ///
    /// # Errors
    /// As [`Lab::train`].
    pub(crate) fn train_with<T>(
        &self,
        method: Box<dyn Method>,
        optimizer: Box<dyn Optimizer>,
        rows: &[usize],
        pace: Pace,
        seed: Seed,
        look: impl FnOnce(&Training<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut batches = Shuffled::new(self, rows, pace.batch, seed);
        let watch = Watch { every: 0, validation: None, observer: &mut Silent };
        self.walk(method, optimizer, &mut batches, pace, seed, watch, look)
    }

    /// Trains as [`Lab::train`] on batches of any kind, while someone watches.
    ///
    /// # Errors
    /// As [`Lab::train`].
    #[expect(clippy::too_many_arguments, reason = "what a training needs, and who watches it")]
    pub(crate) fn walk<T>(
        &self,
        method: Box<dyn Method>,
        optimizer: Box<dyn Optimizer>,
        batches: &mut dyn BatchSource,
        pace: Pace,
        seed: Seed,
        watch: Watch<'_>,
        look: impl FnOnce(&Training<'_>) -> Result<T>,
    ) -> Result<T> {
        let weights = self.weights()?;
        let folder = tempfile::tempdir()?;
        let walk = Walk { evaluate_every: watch.every, ..walk(pace, seed, folder.path()) };
        let model = self.model.as_ref();
        let mut training = Training::new(model, &weights, method, optimizer, walk)?;
        training.walk(batches, watch.validation, watch.observer)?;
        look(&training)
    }

    /// Measures the seconds that a step of a method takes: the least of five rounds of 20 steps.
    ///
    /// # Errors
    /// Those of the method and of training.
    pub(crate) fn seconds_a_step(
        &self,
        [name, options]: [&str; 2],
        rows: &[usize],
        batch: usize,
        clock: Clock,
    ) -> Result<f64> {
        let take = |num_steps: u64| -> Result<f64> {
            let method = method(name, options)?;
            let started = clock();
            self.train(method, rows, Pace::steps(num_steps, batch, 1e-3), Seed(0), |_| Ok(()))?;
            Ok(clock() - started)
        };
        // What is done once, before and after the steps, is in both; what else the machine does only
        // adds to a round.
        let mut least = [f64::INFINITY; 2];
        for _ in 0..5 {
            for (num_steps, least) in [2, 22].into_iter().zip(&mut least) {
                *least = least.min(take(num_steps)?);
            }
        }
        Ok((least[1] - least[0]) / 20.0)
    }

    /// Looks at the model as it stands.
    ///
    /// # Errors
    /// If the weights do not fit; those of `look`.
    pub(crate) fn plain<T>(&self, look: impl FnOnce(&Tuned<'_>) -> Result<T>) -> Result<T> {
        let weights = self.weights()?;
        let (changes, parameters) = (Changes::default(), Parameters::new(weights.device()));
        let model = self.model.as_ref();
        look(&Tuned { model, weights: &weights, changes: &changes, parameters: &parameters })
    }

    /// Works the changes into the weights.
    ///
    /// # Errors
    /// If a change cannot be merged.
    pub(crate) fn merged(&self, tuned: &Tuned<'_>) -> Result<Values> {
        let weights = self.model.spec().weights.iter();
        let merge = |weight: &WeightSpec| {
            Ok((weight.name.clone(), retune_run::export::merged(tuned, weight)?))
        };
        weights.map(merge).collect()
    }

    /// Lays rows into one batch.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn batch(&self, rows: &[usize]) -> retune_core::Result<Batch> {
        let documents: Vec<Document> =
            rows.iter().map(|row| self.documents[*row].clone()).collect();
        let mut batch = Batch::new(&documents)?;
        if let Some(targets) = &self.targets {
            batch.targets = rows.iter().flat_map(|row| targets[*row].iter().copied()).collect();
        }
        Ok(batch)
    }

    /// Computes the class logits of `rows` with a method in force.
    ///
    /// # Errors
    /// If the batch does not fit.
    pub(crate) fn logits(&self, tuned: &Tuned<'_>, rows: &[usize]) -> Result<Vec<f32>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let batch = self.batch(rows)?;
        Ok(tuned.evaluate(&batch, None, |_, output| Ok(to_vec(output.rows().inner())))?)
    }

    /// Computes the loss of each token of `rows` that is asked for, with a method in force.
    ///
    /// # Errors
    /// If the batch does not fit.
    pub(crate) fn token_losses(&self, tuned: &Tuned<'_>, rows: &[usize]) -> Result<Vec<f64>> {
        let batch = self.batch(rows)?;
        let found = tuned.evaluate(&batch, None, |pass, output| match output {
            Output::States(states) => Ok(to_vec(pass.token_losses(states)?.inner())),
            other => Ok(to_vec(other.rows().inner())),
        })?;
        let asked = found.iter().zip(&batch.targets).filter(|(_, target)| target.is_some());
        Ok(asked.map(|(loss, _)| f64::from(*loss)).collect())
    }

    /// Computes the class logits of `rows`, one after another.
    ///
    /// # Errors
    /// If the weights do not fit.
    pub(crate) fn scores(&self, rows: &[usize]) -> Result<Vec<f32>> {
        self.plain(|tuned| self.logits(tuned, rows))
    }

    /// Returns the share of `rows` whose class is found.
    ///
    /// # Errors
    /// If the weights do not fit.
    pub(crate) fn accuracy(&self, rows: &[usize]) -> Result<f64> {
        Ok(self.share_right(&self.scores(rows)?, rows))
    }

    /// Returns the share of `rows` whose class is found with a method in force, for what does not
    /// merge.
    ///
    /// # Errors
    /// If the batch does not fit.
    pub(crate) fn accuracy_of(&self, tuned: &Tuned<'_>, rows: &[usize]) -> Result<f64> {
        Ok(self.share_right(&self.logits(tuned, rows)?, rows))
    }

    /// Returns the mean cross-entropy of `rows`.
    ///
    /// # Errors
    /// If the weights do not fit.
    pub(crate) fn loss(&self, rows: &[usize]) -> Result<f64> {
        let logits = self.scores(rows)?;
        let classes = logits.len() / rows.len().max(1);
        let loss = |(scores, row): (&[f32], &usize)| {
            let class = self.documents[*row].class.unwrap_or_default() as usize;
            let sum: f64 = scores.iter().map(|s| f64::from(s - scores[class]).exp()).sum();
            sum.ln()
        };
        let losses = logits.chunks_exact(classes.max(1)).zip(rows).map(loss);
        Ok(losses.sum::<f64>() / rows.len() as f64)
    }

    fn share_right(&self, logits: &[f32], rows: &[usize]) -> f64 {
        let classes = logits.len() / rows.len().max(1);
        let right = |(scores, row): &(&[f32], &usize)| {
            self.documents[**row].class == Some(best(scores) as u32)
        };
        let right = logits.chunks_exact(classes.max(1)).zip(rows).filter(right).count();
        right as f64 / rows.len() as f64
    }
}

/// Returns the place of the largest score, the first of equals.
pub(crate) fn best(scores: &[f32]) -> usize {
    let better =
        |best: usize, place: usize| if scores[place] > scores[best] { place } else { best };
    (0..scores.len()).fold(0, better)
}

/// Makes a walk that saves at its end only.
pub(crate) fn walk(pace: Pace, seed: Seed, checkpoints: &std::path::Path) -> Walk {
    Walk {
        num_steps: pace.num_steps,
        schedule: Schedule {
            shape: pace.shape,
            peak: pace.rate,
            floor_frac: 0.0,
            warmup_steps: 0,
            decay_frac: 0.0,
            num_steps: pace.num_steps,
        },
        clip: 0.0,
        evaluate_every: 0,
        save_every: 0,
        keep_last: 1,
        patience: 0,
        seed,
        recompute: false,
        plan: "proof".to_owned(),
        checkpoints: checkpoints.to_path_buf(),
    }
}

/// Rows in a new order each pass.
struct Shuffled<'a> {
    lab: &'a Lab,
    rows: &'a [usize],
    batch: usize,
    seed: Seed,
    /// A pass and its order.
    order: (usize, Vec<usize>),
}

impl<'a> Shuffled<'a> {
    fn new(lab: &'a Lab, rows: &'a [usize], batch: usize, seed: Seed) -> Self {
        let mut made = Self { lab, rows, batch, seed, order: (0, Vec::new()) };
        made.turn(0);
        made
    }

    fn turn(&mut self, pass: usize) {
        let mut order = self.rows.to_vec();
        self.seed.stream("order", &[pass as u64]).shuffle(&mut order);
        self.order = (pass, order);
    }
}

impl BatchSource for Shuffled<'_> {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let count = self.rows.len();
        let first = step as usize * self.batch;
        let mut rows = Vec::with_capacity(self.batch);
        for place in first..first + self.batch {
            if self.order.0 != place / count {
                self.turn(place / count);
            }
            rows.push(self.order.1[place % count]);
        }
        Ok(vec![self.lab.batch(&rows)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        (steps as usize * self.batch) as f64 / self.rows.len() as f64
    }
}
