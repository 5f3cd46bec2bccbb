//! Where proofs on pictures are made: a perceptron with its weights, training, accuracy.

use std::collections::BTreeMap;
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::change::Changes;
use retune_core::event::Silent;
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec};
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_methods::registry;
use retune_train::optimizer::AdamW;
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Walk};
use tensor::Device;

use crate::glyphs::Pictures;
use crate::mlp::{INPUTS, Mlp};
use crate::{Error, Result};

/// Weights by name, in their logical shape.
pub(crate) type Values = BTreeMap<String, Vec<f32>>;

/// Weights held in memory.
#[derive(Debug)]
pub(crate) struct Held {
    spec: Arc<ModelSpec>,
    values: Values,
}

impl Held {
    /// Joins weights with the model they are for.
    pub(crate) fn new(spec: &Arc<ModelSpec>, values: Values) -> Self {
        Self { spec: Arc::clone(spec), values }
    }

    /// Draws weights: matrices from `N(0, 2 / inputs)` (He et al., 2015), gains 1, biases 0.
    pub(crate) fn draw(spec: &ModelSpec, seed: Seed) -> Values {
        let draw = |weight: &retune_core::spec::WeightSpec| {
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
}

impl WeightSource for Held {
    fn names(&self) -> Vec<String> {
        self.values.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.spec.weight(name).map(|weight| weight.shape.clone())
    }

    fn read(&self, name: &str) -> retune_core::Result<Stored> {
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
    /// The highest learning rate; it falls in a straight line to 0.
    pub(crate) rate: f64,
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

/// A perceptron with its weights and pictures.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) model: Mlp,
    pictures: Pictures,
    values: Values,
}

impl Lab {
    /// Makes a perceptron with drawn weights.
    pub(crate) fn new(pictures: Pictures, widths: &[usize], seed: Seed) -> Self {
        let model = Mlp::new(pictures.len(), widths);
        let mut values = Held::draw(model.spec(), seed);
        values.insert(format!("{INPUTS}.weight"), pictures.pixels.clone());
        Self { model, pictures, values }
    }

    /// Replaces weights.
    pub(crate) fn set(&mut self, values: Values) {
        self.values.extend(values);
    }

    fn weights(&self) -> Result<Weights> {
        let spec = self.model.spec();
        let source = Arc::new(Held::new(spec, self.values.clone()));
        Ok(Weights::new(source, Arc::clone(spec), Packing::default(), &Device::flex())?)
    }

    fn document(&self, row: usize) -> Document {
        Document {
            tokens: vec![row as u32],
            learn: vec![false],
            class: Some(self.pictures.digits[row]),
            row,
            ..Document::default()
        }
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
        let weights = self.weights()?;
        let mut batches = Shuffled { lab: self, rows, batch: pace.batch, seed };
        let folder = tempfile::tempdir()?;
        let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let walk = walk(pace, seed, folder.path());
        let mut training = Training::new(&self.model, &weights, method, Box::new(optimizer), walk)?;
        training.walk(&mut batches, None, &mut Silent)?;
        let tuned = training.tuned();
        let spec = self.model.spec();
        let learned = spec.weights.iter().filter(|weight| weight.module() != INPUTS);
        let merged = learned
            .map(|weight| Ok((weight.name.clone(), retune_run::export::merged(&tuned, weight)?)))
            .collect::<Result<Values>>()?;
        Ok(Tuning {
            merged,
            num_trained: training.parameters.num_trainable(),
            logits: self.logits(&tuned, probe)?,
        })
    }

    fn logits(&self, tuned: &Tuned<'_>, rows: &[usize]) -> Result<Vec<f32>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let documents: Vec<Document> = rows.iter().map(|row| self.document(*row)).collect();
        Ok(tuned.evaluate(&Batch::new(&documents)?, None, |_, output| {
            Ok(match output {
                Output::Classes(rows) | Output::States(rows) | Output::Embeddings(rows) => {
                    to_vec(rows.inner())
                }
                Output::Pairs(pairs) => to_vec(pairs.similarities().inner()),
            })
        })?)
    }

    /// Computes the class logits of `rows`, one after another.
    ///
    /// # Errors
    /// If the weights do not fit.
    pub(crate) fn scores(&self, rows: &[usize]) -> Result<Vec<f32>> {
        let weights = self.weights()?;
        let (changes, parameters) = (Changes::default(), Parameters::new(weights.device()));
        let model = &self.model;
        self.logits(
            &Tuned { model, weights: &weights, changes: &changes, parameters: &parameters },
            rows,
        )
    }

    /// Returns the share of `rows` whose digit is found.
    ///
    /// # Errors
    /// If the weights do not fit.
    pub(crate) fn accuracy(&self, rows: &[usize]) -> Result<f64> {
        let logits = self.scores(rows)?;
        let classes = logits.len() / rows.len().max(1);
        let right = logits
            .chunks_exact(classes)
            .zip(rows)
            .filter(|(scores, row)| best(scores) == self.pictures.digits[**row] as usize)
            .count();
        Ok(right as f64 / rows.len() as f64)
    }
}

/// Returns the place of the largest score, the first of equals.
fn best(scores: &[f32]) -> usize {
    let better =
        |best: usize, place: usize| if scores[place] > scores[best] { place } else { best };
    (0..scores.len()).fold(0, better)
}

/// Makes a walk with a linear decay that saves at its end only.
pub(crate) fn walk(pace: Pace, seed: Seed, checkpoints: &std::path::Path) -> Walk {
    Walk {
        num_steps: pace.num_steps,
        schedule: Schedule {
            shape: Shape::Linear,
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
}

impl BatchSource for Shuffled<'_> {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let count = self.rows.len();
        let first = step as usize * self.batch;
        let documents: Vec<Document> = (first..first + self.batch)
            .map(|place| {
                let mut order: Vec<usize> = (0..count).collect();
                self.seed.stream("order", &[(place / count) as u64]).shuffle(&mut order);
                self.lab.document(self.rows[order[place % count]])
            })
            .collect();
        Ok(vec![Batch::new(&documents)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        (steps as usize * self.batch) as f64 / self.rows.len() as f64
    }
}
