//! The weights of a GGUF file under the names of the model's class.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::untangle;
use retune_core::spec::ModelSpec;
use retune_core::weights::{Stored, WeightSource};
use retune_core::{Error, Result};
use retune_files::ggml::BlockType;
use retune_files::gguf::GgufFile;

/// Holds what the rope needs, not a weight: [`super::read_config`] takes it into the configuration.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The weights of a GGUF file.
#[derive(Debug)]
pub struct GgufSource {
    file: GgufFile,
    /// By the class's name.
    places: BTreeMap<String, Place>,
    unused: Vec<String>,
}

#[derive(Debug)]
struct Place {
    /// The name in the file.
    stored: String,
    /// The heads whose rows are interleaved.
    heads: Option<usize>,
    /// What the file's values have too much.
    offset: f32,
}

impl GgufSource {
    /// Finds the tensors of a model in a file. Reads no weights.
    ///
    /// # Errors
    /// If the file's architecture is unknown, or the rows of q or k do not divide into heads.
    pub fn open(file: GgufFile, spec: &ModelSpec) -> Result<Self> {
        let arch = super::config::arch(&file)?;
        let bare = spec.weights.first().is_some_and(|weight| weight.name.starts_with("embed"));
        let prefix = if bare { "" } else { "model." };
        let mut places = BTreeMap::new();
        let mut unused = Vec::new();
        for tensor in file.tensors() {
            let class = arch.class_name(tensor.name, prefix);
            let weight = class.as_deref().and_then(|name| spec.weight(name));
            let Some(weight) = weight else {
                if tensor.name != ROPE_FACTORS {
                    unused.push(class.unwrap_or_else(|| tensor.name.to_owned()));
                }
                continue;
            };
            let heads = arch.heads(weight, spec);
            let rows = tensor.shape.first().copied().unwrap_or(0);
            if heads.is_some_and(|heads| !rows.is_multiple_of(2 * heads)) {
                return Err(Error::Shape {
                    name: tensor.name.to_owned(),
                    expected: weight.shape.clone(),
                    found: tensor.shape.to_vec(),
                    help: "its rows do not divide into pairs per head: the file is damaged".into(),
                });
            }
            let place =
                Place { stored: tensor.name.to_owned(), heads, offset: arch.offset(weight) };
            places.insert(weight.name.clone(), place);
        }
        unused.sort_unstable();
        Ok(Self { file, places, unused })
    }

    /// Returns the tensors the model does not use, under the class's name where it has one.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }
}

impl WeightSource for GgufSource {
    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.file.get(&self.places.get(name)?.stored)?.shape.to_vec())
    }

    fn stored_bytes(&self, name: &str) -> Option<u64> {
        let place = self.places.get(name)?;
        let tensor = self.file.get(&place.stored)?;
        let blocks = tensor.kind.block_len() > 1 && tensor.shape.len() > 1 && place.offset == 0.0;
        blocks.then_some(tensor.bytes.len() as u64)
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(place) = self.places.get(name) else {
            return Ok(Stored::Values(self.read_values(name)?));
        };
        let tensor = self.file.tensor(&place.stored)?;
        if tensor.kind.block_len() == 1 || tensor.shape.len() < 2 || place.offset != 0.0 {
            return Ok(Stored::Values(self.read_values(name)?));
        }
        let rows = tensor.shape.first().copied().unwrap_or(0);
        // A row is a whole number of blocks, so rows move as they lie.
        let blocks: Arc<dyn AsRef<[u8]> + Send + Sync> = match place.heads {
            Some(heads) => Arc::new(untangle(tensor.bytes, rows, heads)),
            None => Arc::new(tensor.share()),
        };
        Ok(Stored::Blocks(tensor.kind, blocks))
    }

    fn read_values(&self, name: &str) -> Result<Vec<f32>> {
        let Some(place) = self.places.get(name) else {
            // The file's own error names what is near.
            return Ok(self.file.tensor(name)?.read_f32()?);
        };
        let tensor = self.file.tensor(&place.stored)?;
        let rows = tensor.shape.first().copied().unwrap_or(0);
        let mut values = tensor.read_f32()?;
        if let Some(heads) = place.heads {
            values = untangle(&values, rows, heads);
        }
        if place.offset != 0.0 {
            for value in &mut values {
                *value -= place.offset;
            }
        }
        Ok(values)
    }
}

/// Returns whether a type holds numbers of a model rather than indices.
pub(crate) fn is_float(kind: BlockType) -> bool {
    !matches!(kind, BlockType::I8 | BlockType::I16 | BlockType::I32 | BlockType::I64)
}
