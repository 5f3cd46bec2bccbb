//! A new head on a checkpoint that has none for the task.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::config::Config;
use retune_core::Result;
use retune_core::kernels::matrix::SharedBytes;
use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec, Role};
use retune_core::weights::{Stored, WeightSource};

/// A checkpoint with freshly drawn weights where it has none.
///
/// Matrices are drawn from `N(0, initializer_range²)` in a stream named after the weight, biases
/// are zero, as the Hugging Face classes begin.
#[derive(Debug)]
pub struct FreshHead {
    checkpoint: Arc<dyn WeightSource>,
    /// Shape and standard deviation by name.
    fresh: BTreeMap<String, (Vec<usize>, f64)>,
    seed: Seed,
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
        let deviation = config.positive("initializer_range")?.unwrap_or(0.02);
        let fresh = spec
            .weights
            .iter()
            .filter(|weight| match (weight.role, checkpoint.shape(&weight.name)) {
                (Role::Head, Some(shape)) => !keep || shape != weight.shape,
                (Role::Head | Role::Pooler, None) => true,
                _ => false,
            })
            .map(|weight| {
                let deviation = if weight.kind == Kind::Bias { 0.0 } else { deviation };
                (weight.name.clone(), (weight.shape.clone(), deviation))
            })
            .collect();
        Ok(Self { checkpoint, fresh, seed })
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
            Some((shape, _)) => Some(shape.clone()),
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
        let Some((shape, deviation)) = self.fresh.get(name) else {
            return self.checkpoint.read(name);
        };
        let mut values = vec![0.0; shape.iter().product()];
        if *deviation > 0.0 {
            let mut random = self.seed.stream(&format!("new weight {name}"), &[]);
            random.fill_normal(&mut values, *deviation);
        }
        Ok(Stored::Values(values))
    }
}
