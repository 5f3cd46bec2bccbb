//! The frozen base: read from a checkpoint on first use, kept in the form the plan chose.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::names::nearest_list;
use crate::spec::{Kind, ModelSpec, WeightSpec};
use retune_files::ggml::BlockType;
use retune_kernels::matrix::{Arithmetic, Form, PackedMatrix, SharedBytes};
use tensor::{Device, Tensor, TensorData};

/// One tensor as a checkpoint stores it.
#[derive(Clone)]
pub enum Stored {
    /// Plain values in row-major order.
    Values(Vec<f32>),
    /// Quantised blocks, row by row, as a GGUF file has them.
    Blocks(BlockType, SharedBytes),
}

impl Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Values(values) => write!(f, "Values({})", values.len()),
            Self::Blocks(kind, bytes) => {
                write!(f, "Blocks({kind:?}, {} bytes)", (**bytes).as_ref().len())
            }
        }
    }
}

/// A checkpoint: named tensors that can be read one at a time.
///
/// Names and shapes are the ones of the model's class in the Hugging Face library, whatever the
/// file calls them.
pub trait WeightSource: Debug + Send + Sync {
    /// Returns all names, sorted.
    fn names(&self) -> Vec<String>;

    /// Returns a tensor's shape as stored, or nothing if there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Returns the bytes a tensor takes where it is stored in blocks, for forecasts.
    fn stored_bytes(&self, _name: &str) -> Option<u64> {
        None
    }

    /// Shares a tensor that is stored as this machine's own `f32`, without reading it.
    fn shared_f32(&self, _name: &str) -> Option<SharedBytes> {
        None
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// If the file cannot be read or the tensor's type is not one of numbers.
    fn read(&self, name: &str) -> Result<Stored>;

    /// Reads a tensor's numbers in row-major order, whatever they are stored as.
    ///
    /// # Errors
    /// As [`WeightSource::read`].
    fn read_values(&self, name: &str) -> Result<Vec<f32>> {
        match self.read(name)? {
            Stored::Values(values) => Ok(values),
            Stored::Blocks(block, bytes) => {
                let bytes = (*bytes).as_ref();
                let mut values = vec![0.0; bytes.len() / block.block_bytes() * block.block_len()];
                block.dequantize(bytes, &mut values)?;
                Ok(values)
            }
        }
    }
}

/// In which form frozen matrices are kept in memory, and how they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// The form of matrices stored as plain values.
    pub form: Form,
    /// Whether quantised blocks are kept as they lie.
    pub keep_blocks: bool,
    /// The arithmetic of products.
    pub arithmetic: Arithmetic,
}

impl Default for Packing {
    fn default() -> Self {
        Self { form: Form::F32, keep_blocks: false, arithmetic: Arithmetic::F32 }
    }
}

/// The frozen weights of one model.
///
/// Nothing is read before it is asked for, and a matrix is packed once. A weight that a method
/// replaces whole (full tuning) is therefore never packed.
#[derive(Debug)]
pub struct Weights {
    source: Arc<dyn WeightSource>,
    spec: Arc<ModelSpec>,
    packing: Packing,
    device: Device,
    matrices: Mutex<BTreeMap<String, Arc<PackedMatrix>>>,
    vectors: Mutex<BTreeMap<String, Tensor<1>>>,
}

impl Weights {
    /// Joins a checkpoint with the model it is for, and checks that every tensor is there with the
    /// right shape.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] or [`Error::Shape`] for the first that is not.
    pub fn new(
        source: Arc<dyn WeightSource>,
        spec: Arc<ModelSpec>,
        packing: Packing,
        device: &Device,
    ) -> Result<Self> {
        let names = source.names();
        for weight in &spec.weights {
            let found = source.shape(&weight.name).ok_or_else(|| Error::MissingWeight {
                name: weight.name.clone(),
                needed_by: format!("{} ({:?})", spec.class, weight.role),
                nearest: nearest_list(&weight.name, names.iter().map(String::as_str)),
            })?;
            let mut expected = weight.shape.clone();
            if weight.kind == (Kind::Linear { transposed: true }) {
                expected.reverse();
            }
            if found != expected {
                return Err(Error::Shape {
                    name: weight.name.clone(),
                    expected,
                    found,
                    help: "config.json and the weights are of different models".to_owned(),
                });
            }
        }
        Ok(Self {
            source,
            spec,
            packing,
            device: device.clone(),
            matrices: Mutex::default(),
            vectors: Mutex::default(),
        })
    }

    /// Returns the model's description.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    /// Returns the checkpoint itself.
    pub fn source(&self) -> &Arc<dyn WeightSource> {
        &self.source
    }

    /// Returns how matrices are kept.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// Returns the device constants are put on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Finds a weight's description.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] if the model has none of this name.
    pub fn describe(&self, name: &str) -> Result<&WeightSpec> {
        self.spec.weight(name).ok_or_else(|| Error::MissingWeight {
            name: name.to_owned(),
            needed_by: self.spec.class.clone(),
            nearest: nearest_list(name, self.spec.weights.iter().map(|w| w.name.as_str())),
        })
    }

    /// Reads a weight's values in its logical shape (`[outputs, inputs]` for linear layers).
    ///
    /// # Errors
    /// If the model has no such weight or the file cannot be read.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let weight = self.describe(name)?;
        let [rows, columns] = weight.matrix();
        let values = self.source.read_values(name)?;
        if weight.kind == (Kind::Linear { transposed: true }) {
            return Ok(transpose(&values, columns, rows));
        }
        Ok(values)
    }

    /// Returns a weight as a frozen matrix, packed on first use.
    ///
    /// # Errors
    /// As [`Weights::values`].
    pub fn matrix(&self, name: &str) -> Result<Arc<PackedMatrix>> {
        let mut cache = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(matrix) = cache.get(name) {
            return Ok(Arc::clone(matrix));
        }
        let weight = self.describe(name)?;
        let [rows, columns] = weight.matrix();
        let arithmetic = self.packing.arithmetic;
        let blocks = match (self.packing.keep_blocks, weight.kind) {
            (false, _) | (_, Kind::Linear { transposed: true }) => None,
            _ => match self.source.read(name)? {
                Stored::Blocks(block, bytes) => {
                    Some(PackedMatrix::from_blocks(rows, columns, block, bytes)?)
                }
                Stored::Values(_) => None,
            },
        };
        let shared = match weight.kind {
            Kind::Linear { transposed: true } => None,
            _ if self.packing.form != Form::F32 => None,
            _ => self.source.shared_f32(name),
        };
        let shared = match shared {
            Some(bytes) => PackedMatrix::from_shared_f32(rows, columns, bytes)?.ok(),
            None => None,
        };
        let matrix = match blocks.or(shared) {
            Some(matrix) => matrix,
            None => PackedMatrix::from_f32(rows, columns, self.values(name)?, self.packing.form)?,
        };
        let matrix = Arc::new(matrix.with_arithmetic(arithmetic));
        cache.insert(name.to_owned(), Arc::clone(&matrix));
        Ok(matrix)
    }

    /// Returns a weight as a constant vector.
    ///
    /// # Errors
    /// As [`Weights::values`].
    pub fn vector(&self, name: &str) -> Result<Tensor<1>> {
        let mut cache = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vector) = cache.get(name) {
            return Ok(vector.clone());
        }
        let values = self.values(name)?;
        let count = values.len();
        let vector = Tensor::from_data(TensorData::new(values, [count]), &self.device);
        cache.insert(name.to_owned(), vector.clone());
        Ok(vector)
    }

    /// Reads a weight as a constant matrix `[first axis, all others]`, without keeping it.
    ///
    /// # Errors
    /// As [`Weights::values`].
    pub fn dense(&self, name: &str) -> Result<Tensor<2>> {
        let shape = self.describe(name)?.matrix();
        Ok(Tensor::from_data(TensorData::new(self.values(name)?, shape), &self.device))
    }

    /// Returns the bytes held by packed matrices so far.
    pub fn resident_bytes(&self) -> usize {
        let cache = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        cache.values().map(|matrix| matrix.bytes()).sum()
    }
}

/// Turns `[rows, columns]` into `[columns, rows]`.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (r, row) in values.chunks_exact(columns.max(1)).enumerate() {
        for (c, value) in row.iter().enumerate() {
            out[c * rows + r] = *value;
        }
    }
    out
}
