//! Checkpoints computed from another one: rounded to blocks, or with changes merged in.

use std::path::PathBuf;
use std::sync::Arc;

use retune_core::change::{Changes, Mode, Scope};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::spec::{Kind, ModelSpec, WeightSpec};
use retune_core::weights::{Stored, WeightSource, Weights, transpose};
use retune_core::{Error, Result};
use retune_files::ggml::BlockType;

/// The type a GGUF file of `kind` keeps a weight in.
pub(super) fn block_type(weight: &WeightSpec, kind: BlockType) -> BlockType {
    let [_, columns] = weight.matrix();
    match weight.kind {
        Kind::Norm | Kind::Bias | Kind::Constant => BlockType::F32,
        _ if columns.is_multiple_of(kind.block_len()) => kind,
        _ => BlockType::F16,
    }
}

/// Returns values of a weight's logical shape in the orientation of its file.
fn stored(weight: &WeightSpec, values: Vec<f32>) -> Stored {
    let [rows, columns] = weight.matrix();
    let transposed = weight.kind == (Kind::Linear { transposed: true });
    Stored::Values(if transposed { transpose(&values, rows, columns) } else { values })
}

fn missing(name: &str) -> Error {
    Error::MissingWeight {
        name: name.to_owned(),
        needed_by: "the model that is shipped".to_owned(),
        nearest: "none".to_owned(),
    }
}

/// A checkpoint after it was rounded to blocks.
#[derive(Debug)]
pub(super) struct Quantised {
    pub(super) inner: Arc<dyn WeightSource>,
    pub(super) spec: Arc<ModelSpec>,
    pub(super) kind: BlockType,
}

impl WeightSource for Quantised {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.inner.shape(name)
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(weight) = self.spec.weight(name) else { return self.inner.read(name) };
        let kind = block_type(weight, self.kind);
        let values = match self.inner.read(name)? {
            // What is in blocks already was rounded before.
            blocks @ Stored::Blocks(..) => return Ok(blocks),
            Stored::Values(values) => values,
        };
        let [rows, columns] = weight.matrix();
        let transposed = weight.kind == (Kind::Linear { transposed: true });
        let mut values = if transposed { transpose(&values, columns, rows) } else { values };
        let mut bytes = vec![0; kind.bytes_for(values.len())?];
        kind.quantize(&values, &mut bytes)?;
        kind.dequantize(&bytes, &mut values)?;
        Ok(stored(weight, values))
    }
}

/// A checkpoint with changes merged in, weight by weight.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) weights: Weights,
    pub(super) changes: Changes,
    pub(super) parameters: Parameters,
    pub(super) path: PathBuf,
}

impl WeightSource for Merged {
    fn names(&self) -> Vec<String> {
        self.weights.source().names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.source().shape(name)
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let weight = self.weights.spec().weight(name).ok_or_else(|| missing(name))?;
        if self.changes.of_weight(name).is_empty() {
            return Ok(stored(weight, self.weights.values(name)?));
        }
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
