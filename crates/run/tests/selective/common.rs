//! A small trained model, a walk over it, and what tests look at afterwards.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::batch::{Batch, Document};
use retune_core::event::Event;
use retune_core::method::Method;
use retune_core::model::{Model, Tuned};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::weights::Weights;
use retune_methods::registry;
use retune_options::Document as Toml;
use retune_testkit::golden;
use retune_testkit::open::weights;
use retune_train::backprop::Backprop;
use retune_train::optimizer::{AdamW, Optimizer, Sgd};
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Walk};
use tensor::Device;

/// Opens the base of the golden training runs: Llama, 2 layers.
pub(crate) fn open() -> (Box<dyn Model>, Weights) {
    let base = golden::folder("training/llama/base");
    let checkpoint = retune_models::open(&base).unwrap();
    let weights = weights(Arc::clone(&checkpoint.source), checkpoint.model.spec());
    (checkpoint.model, weights)
}

/// Reads a method as a recipe would.
pub(crate) fn method(name: &str, options: &str) -> Box<dyn Method> {
    let plugin = registry::find(name).unwrap();
    Toml::parse("test.toml", options).unwrap().read(plugin.read).unwrap().0
}

/// Returns a row of random tokens.
pub(crate) fn document(seed: u64, length: usize) -> Document {
    let mut random = Seed(seed).stream("document", &[]);
    let tokens: Vec<u32> = (0..length).map(|_| random.below(128) as u32).collect();
    let learn = (0..length).map(|t| t > 1).collect();
    Document { tokens, learn, row: seed as usize, ..Document::default() }
}

/// Gives two rows a step, in one or two passes, and fails at a step to play the kill.
#[derive(Default)]
pub(crate) struct Source {
    pub(crate) fails_at: Option<u64>,
    pub(crate) split: bool,
}

impl BatchSource for Source {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        if self.fails_at == Some(step) {
            return Err(retune_train::Error::Data("killed".into()));
        }
        let documents = [document(step * 2, 9), document(step * 2 + 1, 14)];
        if self.split {
            return documents.into_iter().map(|d| Ok(Batch::new(&[d])?)).collect();
        }
        Ok(vec![Batch::new(&documents)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / 4.0
    }
}

/// A walk of `num_steps` steps at a constant rate, saved every 2 steps.
pub(crate) fn walk(checkpoints: &Path, num_steps: u64, rate: f64) -> Walk {
    Walk {
        num_steps,
        schedule: Schedule {
            shape: Shape::Constant,
            peak: rate,
            floor_frac: 0.0,
            warmup_steps: 0,
            decay_frac: 0.0,
            num_steps,
        },
        clip: 1.0,
        evaluate_every: 0,
        save_every: 2,
        keep_last: 100,
        patience: 0,
        seed: Seed(7),
        recompute: false,
        plan: "plan".to_owned(),
        checkpoints: checkpoints.to_path_buf(),
    }
}

pub(crate) fn adamw() -> Box<dyn Optimizer> {
    Box::new(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 })
}

pub(crate) fn sgd() -> Box<dyn Optimizer> {
    Box::new(Sgd { momentum: 0.0, weight_decay: 0.0 })
}

/// Walks a whole run and hands over the training.
pub(crate) fn trained<'a>(
    (model, weights): (&'a dyn Model, &'a Weights),
    method: Box<dyn Method>,
    optimizer: Box<dyn Optimizer>,
    walk: Walk,
) -> Training<'a> {
    let mut training = Training::new(model, weights, method, optimizer, walk).unwrap();
    training.walk(&mut Source::default(), None, &mut Vec::<Event>::new()).unwrap();
    training
}

/// Returns every parameter with its bits.
pub(crate) fn bits(parameters: &Parameters) -> Vec<(String, Vec<u32>)> {
    let of = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    parameters.iter().map(|(id, p)| (p.name.clone(), of(parameters.values(id)))).collect()
}

/// Returns a folder that lives as long as its guard.
pub(crate) fn folder() -> (tempfile::TempDir, PathBuf) {
    let guard = tempfile::tempdir().unwrap();
    let path = guard.path().to_path_buf();
    (guard, path)
}

/// Returns the entries of every sparse parameter.
pub(crate) fn entries(parameters: &Parameters) -> Vec<(String, Vec<u32>)> {
    let sparse = parameters.iter().filter(|(id, _)| parameters.support(*id).is_some());
    sparse.map(|(id, p)| (p.name.clone(), parameters.indices(id).to_vec())).collect()
}

/// Returns the dense gradients of all linear weights at the untouched base for the rows of `step`.
pub(crate) fn dense_gradients(
    (model, weights): (&dyn Model, &Weights),
    step: u64,
) -> Vec<(String, Vec<f32>)> {
    let full = method("full", "");
    let mut parameters = Parameters::new(&Device::flex());
    let changes = full.attach(weights, &mut parameters, Seed(7)).unwrap();
    let tuned = Tuned { model, weights, changes: &changes, parameters: &parameters };
    let batches = Source::default().micro_batches(step).unwrap();
    let learner = Backprop { seed: Seed(7), recompute: false };
    let result = learner.step(&tuned, &batches, step).unwrap();
    let names = parameters.iter().map(|(_, p)| p.name.clone());
    names.zip(result.gradients).map(|(name, g)| (name, g.unwrap())).collect()
}
