//! One method with one table of options on one model, and what checks do with it.

use std::fmt;
use std::path::Path;

use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::method::Method;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{ParameterId, Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::Weights;
use retune_methods::registry::Plugin;
use retune_options::{Document, Style};
use retune_train::optimizer::AdamW;
use retune_train::schedule::{Schedule, Shape};
use retune_train::training::{BatchSource, Training, Walk};
use tempfile::TempDir;

use crate::subject::Subject;

/// Why a check failed, with the numbers.
///
/// It is no [`std::error::Error`] itself, so that `?` turns every such error into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed(pub String);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// The seed methods are attached with.
pub const SEED: Seed = Seed(7);

/// Steps of a short run.
pub const NUM_STEPS: u64 = 6;

/// One method with one table of options on one model.
#[derive(Debug)]
pub struct Case<'a> {
    /// The method's line in the registry.
    pub plugin: &'a Plugin,
    /// The options, as TOML.
    pub example: &'static str,
    /// The model.
    pub subject: &'a Subject,
    /// The method with these options.
    pub method: Box<dyn Method>,
}

/// An attached method.
#[derive(Debug)]
pub struct Attached {
    /// The frozen base.
    pub weights: Weights,
    /// What is in force.
    pub changes: Changes,
    /// What trains.
    pub parameters: Parameters,
}

impl Attached {
    /// Puts the parts together.
    pub fn tuned<'b>(&'b self, model: &'b dyn Model) -> Tuned<'b> {
        Tuned {
            model,
            weights: &self.weights,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }

    /// Moves everything that trains a little, so that no factor is zero any more.
    pub fn stir(&mut self) {
        let ids: Vec<ParameterId> =
            self.parameters.iter().filter(|(_, p)| p.trains).map(|(id, _)| id).collect();
        for id in ids {
            let mut random = Seed(3).stream("stir", &[id.index() as u64]);
            let noise = |value: &mut f32| *value += (0.05 * random.normal()) as f32;
            self.parameters.update(id, |values| values.iter_mut().for_each(noise));
        }
    }
}

/// Makes a folder that goes away, in memory where the system has such a place: checkpoints are
/// synced to the disk, which takes most of the time of a tiny run.
///
/// # Errors
/// If there is no place for temporary files.
pub fn folder() -> std::io::Result<TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

/// Reads a method's table of options.
///
/// # Errors
/// The report of every mistake in it.
pub fn read(plugin: &Plugin, options: &str) -> Result<Box<dyn Method>, Failed> {
    let plain = |report: retune_options::Report| Failed(report.render(Style::Plain));
    let document = Document::parse("options", options).map_err(plain)?;
    let (method, _) = document.read(|reader| (plugin.read)(reader)).map_err(plain)?;
    Ok(method)
}

impl<'a> Case<'a> {
    /// Reads the options.
    ///
    /// # Errors
    /// If they have a mistake.
    pub fn new(
        plugin: &'a Plugin,
        example: &'static str,
        subject: &'a Subject,
    ) -> Result<Self, Failed> {
        Ok(Self { plugin, example, subject, method: read(plugin, example)? })
    }

    /// Returns whether the method says that it refuses this model.
    pub fn is_refused(&self) -> bool {
        self.method.promises().refuses(self.subject.spec())
    }

    /// Returns whether the method's modules look across tokens, which only some options of it do, on a
    /// model of encoder and decoder: the first pass refuses them there.
    ///
    /// # Errors
    /// Those of the method; that the pass takes them after all.
    pub fn is_refused_by_pass(&self) -> Result<bool, Failed> {
        if self.subject.spec().decoder_start().is_none() {
            return Ok(false);
        }
        let attached = self.attach()?;
        if !attached.changes.reads_states_across() {
            return Ok(false);
        }
        match self.outputs(&attached, &self.subject.batch("refused")?) {
            Ok(_) => Err(Failed("the pass takes a module that looks across tokens".to_owned())),
            Err(Failed(why)) if why.contains("across tokens") => Ok(true),
            Err(other) => Err(other),
        }
    }

    /// Attaches the method to a fresh base.
    ///
    /// # Errors
    /// Those of the method.
    pub fn attach(&self) -> Result<Attached, Failed> {
        self.attach_with(SEED)
    }

    /// Attaches the method with a seed of the caller's choice.
    ///
    /// # Errors
    /// Those of the method.
    pub fn attach_with(&self, seed: Seed) -> Result<Attached, Failed> {
        let weights = self.subject.weights()?;
        let mut parameters = Parameters::new(weights.device());
        let changes = self.method.attach(&weights, &mut parameters, seed)?;
        Ok(Attached { weights, changes, parameters })
    }

    /// Computes the outputs of the attached method.
    ///
    /// # Errors
    /// Those of the model.
    pub fn outputs(&self, attached: &Attached, batch: &Batch) -> Result<Vec<f32>, Failed> {
        outputs(&attached.tuned(&*self.subject.model), batch)
    }

    /// Computes the outputs of the base alone, over `weights`.
    ///
    /// # Errors
    /// Those of the model.
    pub fn base_outputs(&self, weights: &Weights, batch: &Batch) -> Result<Vec<f32>, Failed> {
        let (changes, parameters) = (Changes::default(), Parameters::new(weights.device()));
        let model = &*self.subject.model;
        let tuned = Tuned { model, weights, changes: &changes, parameters: &parameters };
        outputs(&tuned, batch)
    }

    /// Makes a short run with AdamW that saves every so many steps; 0 means at its end.
    ///
    /// # Errors
    /// Those of attaching the method.
    pub fn training<'b>(
        &'b self,
        weights: &'b Weights,
        checkpoints: &Path,
        save_every: u64,
    ) -> Result<Training<'b>, Failed> {
        let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let walk = Walk {
            num_steps: NUM_STEPS,
            schedule: Schedule {
                shape: Shape::Constant,
                peak: 1e-2,
                floor_frac: 0.0,
                warmup_steps: 0,
                decay_frac: 0.0,
                num_steps: NUM_STEPS,
            },
            clip: 1.0,
            evaluate_every: 0,
            save_every,
            keep_last: NUM_STEPS as usize,
            patience: 0,
            seed: SEED,
            recompute: false,
            plan: "plan".to_owned(),
            checkpoints: checkpoints.to_path_buf(),
        };
        let (model, method) = (&*self.subject.model, self.method.boxed_clone());
        Ok(Training::new(model, weights, method, Box::new(optimizer), walk)?)
    }
}

/// Computes all logits, class logits, document vectors or pairs of vectors, row by row.
///
/// # Errors
/// Those of the model.
pub fn outputs(tuned: &Tuned<'_>, batch: &Batch) -> Result<Vec<f32>, Failed> {
    Ok(tuned.evaluate(batch, None, |pass, output| {
        Ok(match output {
            Output::States(states) => {
                let rows: Vec<usize> = (0..batch.num_tokens()).collect();
                to_vec(pass.logits(&states, &rows)?.inner())
            }
            Output::Classes(rows) | Output::Embeddings(rows) => to_vec(rows.inner()),
            Output::Pairs(pairs) => to_vec(pairs.documents().inner()),
        })
    })?)
}

/// Gives two documents a step, and fails at a step to play the kill.
#[derive(Debug)]
pub struct Source<'a> {
    /// The model the documents are for.
    pub subject: &'a Subject,
    /// The step, counted from 0, whose batch cannot be read.
    pub fails_at: Option<u64>,
}

impl BatchSource for Source<'_> {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        if self.fails_at == Some(step) {
            return Err(retune_train::Error::Data("killed".into()));
        }
        let documents = self.subject.documents(&format!("step {step}"), &[6, 9]);
        Ok(vec![Batch::new(&documents)?])
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64
    }
}

/// Fails where two lists of numbers differ by more than `tolerance` of the largest.
///
/// # Errors
/// The first place that differs, with both numbers.
pub fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(Failed(format!(
            "{what}: {} numbers, expected {}",
            found.len(),
            expected.len()
        )));
    }
    let largest = expected.iter().fold(0.0_f32, |top, v| top.max(v.abs())).max(1e-3);
    let apart = |(a, b): &(&f32, &f32)| (*a - *b).abs() > tolerance * largest || !a.is_finite();
    match found.iter().zip(expected).enumerate().find(|(_, pair)| apart(pair)) {
        None => Ok(()),
        Some((place, (a, b))) => Err(Failed(format!(
            "{what}: number {place} of {} is {a}, expected {b} (within {tolerance:e} of the \
             largest, {largest})",
            found.len()
        ))),
    }
}

/// Fails where two lists differ in a single bit.
///
/// # Errors
/// The first place that differs, with both numbers.
pub fn same_bits(what: &str, found: &[f32], expected: &[f32]) -> Result<(), Failed> {
    let apart = |(a, b): &(&f32, &f32)| a.to_bits() != b.to_bits();
    match found.iter().zip(expected).enumerate().find(|(_, pair)| apart(pair)) {
        None if found.len() == expected.len() => Ok(()),
        None => {
            Err(Failed(format!("{what}: {} numbers, expected {}", found.len(), expected.len())))
        }
        Some((place, (a, b))) => Err(Failed(format!(
            "{what}: number {place} of {} is {a:?}, expected the very bits of {b:?}",
            found.len()
        ))),
    }
}

/// Returns every value of every parameter and buffer, in order.
pub fn all_values(parameters: &Parameters) -> Vec<f32> {
    parameters.iter().flat_map(|(id, _)| parameters.values(id)).collect()
}
