//! A checkpoint computed from another one: with changes merged in.

use std::path::PathBuf;

use retune_core::change::{Changes, Mode, Scope};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::spec::{Kind, WeightSpec};
use retune_core::weights::{Stored, WeightSource, Weights, transpose};
use retune_core::{Error, Result};

/// Returns values of a weight's logical shape in the orientation of its file.
pub(crate) fn stored(weight: &WeightSpec, values: Vec<f32>) -> Stored {
    let [rows, columns] = weight.matrix();
    let transposed = weight.kind == (Kind::Linear { transposed: true });
    Stored::Values(if transposed { transpose(&values, rows, columns) } else { values })
}

/// A checkpoint with changes merged in, weight by weight.
#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) weights: Weights,
    pub(crate) changes: Changes,
    pub(crate) parameters: Parameters,
    /// Where the changes come from, for errors.
    pub(crate) path: PathBuf,
}

impl WeightSource for Merged {
    fn names(&self) -> Vec<String> {
        self.weights.source().names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.source().shape(name)
    }

    fn stored_bytes(&self, name: &str) -> Option<u64> {
        let changed = !self.changes.of_weight(name).is_empty();
        if changed { None } else { self.weights.source().stored_bytes(name) }
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let changed = !self.changes.of_weight(name).is_empty();
        let Some(weight) = self.weights.spec().weight(name).filter(|_| changed) else {
            return self.weights.source().read(name);
        };
        let scope = Scope::new(&self.parameters, Mode::Evaluate);
        let merged = self.changes.materialize(name, &self.weights, &scope)?;
        let values = to_vec(merged.inner());
        if values.len() != weight.count() {
            return Err(Error::Content {
                path: self.path.clone(),
                what: format!("`{name}` has another size after merging"),
                expected: weight.count().to_string(),
                found: values.len().to_string(),
                help: "keep the adapter beside the base".to_owned(),
            });
        }
        Ok(stored(weight, values))
    }
}
