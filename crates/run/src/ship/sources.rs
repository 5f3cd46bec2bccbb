//! A checkpoint computed from another one: rounded to blocks.

use std::sync::Arc;

use retune_core::Result;
use retune_core::spec::{Kind, ModelSpec, WeightSpec};
use retune_core::weights::{Stored, WeightSource, transpose};
use retune_files::ggml::BlockType;

use crate::merged::stored;

/// The type a GGUF file of `kind` keeps a weight in.
pub(super) fn block_type(weight: &WeightSpec, kind: BlockType) -> BlockType {
    let [_, columns] = weight.matrix();
    match weight.kind {
        Kind::Norm | Kind::Bias | Kind::Constant => BlockType::F32,
        _ if columns.is_multiple_of(kind.block_len()) => kind,
        _ => BlockType::F16,
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
