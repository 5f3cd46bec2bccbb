//! Weights drawn from a seed: those of a new model, or a new head on a checkpoint that has none for
//! the task.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::Config;
use retune_core::Result;
use retune_core::kernels::matrix::SharedBytes;
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::weights::{Stored, WeightSource};

/// How a model's weights begin: matrices are drawn from `N(0, initializer_range²)` in a stream named
/// after the weight, biases are 0 and gains 1, as the Hugging Face classes begin.
#[derive(Debug, Clone, Copy)]
pub struct Beginning {
    deviation: f64,
    /// The gain of a norm as it is stored.
    gain: f32,
    /// The factor on similarities, as a logarithm.
    logit_scale: f32,
    seed: Seed,
}

impl Beginning {
    /// Reads how the weights of a model begin.
    ///
    /// # Errors
    /// If `initializer_range` is impossible.
    pub fn read(config: &Config, spec: &ModelSpec, seed: Seed) -> Result<Self> {
        // CLIP's publication begins at a temperature of 0.07.
        let logit_scale = config.number("logit_scale_init_value")?.unwrap_or(2.6592);
        Ok(Self {
            deviation: config.positive("initializer_range")?.unwrap_or(0.02),
            gain: 1.0 - spec.norm_offset() as f32,
            logit_scale: logit_scale as f32,
            seed,
        })
    }

    /// Makes a weight's first values, in its logical shape.
    pub fn values(&self, weight: &WeightSpec) -> Vec<f32> {
        let mut values = vec![0.0; weight.count()];
        match (weight.kind, weight.role) {
            (Kind::Bias, _) => {}
            (Kind::Norm, _) => values.fill(self.gain),
            (_, Role::LogitScale) => values.fill(self.logit_scale),
            _ => {
                let mut random = self.seed.stream(&format!("new weight {}", weight.name), &[]);
                random.fill_normal(&mut values, self.deviation);
            }
        }
        values
    }
}

/// A checkpoint with freshly drawn weights where it has none.
#[derive(Debug)]
pub struct FreshHead {
    checkpoint: Arc<dyn WeightSource>,
    fresh: BTreeMap<String, WeightSpec>,
    beginning: Beginning,
}

impl FreshHead {
    /// Adds what a model's head or pooler needs and the checkpoint lacks.
    ///
    /// With `keep` false a head in the checkpoint is not used even where its shape fits: it is one
    /// for other classes.
    ///
    /// # Errors
    /// If `initializer_range` is impossible.
    pub fn new(
        checkpoint: Arc<dyn WeightSource>,
        spec: &ModelSpec,
        config: &Config,
        keep: bool,
        seed: Seed,
    ) -> Result<Self> {
        let beginning = Beginning::read(config, spec, seed)?;
        let fresh = spec
            .weights
            .iter()
            .filter(|weight| match (weight.role, checkpoint.shape(&weight.name)) {
                (Role::Head, Some(shape)) => !keep || shape != weight.shape,
                (Role::Head | Role::Pooler, None) => true,
                _ => false,
            })
            .map(|weight| (weight.name.clone(), weight.clone()))
            .collect();
        Ok(Self { checkpoint, fresh, beginning })
    }

    /// Returns the names of the new weights, sorted.
    pub fn fresh(&self) -> impl Iterator<Item = &str> {
        self.fresh.keys().map(String::as_str)
    }
}

impl WeightSource for FreshHead {
    fn names(&self) -> Vec<String> {
        let mut names = self.checkpoint.names();
        names.extend(self.fresh.keys().cloned());
        names.sort_unstable();
        names.dedup();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self.fresh.get(name) {
            Some(weight) => Some(weight.shape.clone()),
            None => self.checkpoint.shape(name),
        }
    }

    fn shared_f32(&self, name: &str) -> Option<SharedBytes> {
        if self.fresh.contains_key(name) { None } else { self.checkpoint.shared_f32(name) }
    }

    fn stored_bytes(&self, name: &str) -> Option<u64> {
        if self.fresh.contains_key(name) { None } else { self.checkpoint.stored_bytes(name) }
    }

    fn read_values(&self, name: &str) -> Result<Vec<f32>> {
        if !self.fresh.contains_key(name) {
            return self.checkpoint.read_values(name);
        }
        match self.read(name)? {
            Stored::Values(values) => Ok(values),
            Stored::Blocks(..) => unreachable!("new weights are numbers"),
        }
    }

    fn read(&self, name: &str) -> Result<Stored> {
        match self.fresh.get(name) {
            Some(weight) => Ok(Stored::Values(self.beginning.values(weight))),
            None => self.checkpoint.read(name),
        }
    }
}
