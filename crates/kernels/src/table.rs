//! The matrix over the vocabulary: the embedding table, the output head, or both at once.

use std::sync::Arc;

use tensor::{DType, Device, Tensor, TensorData};

use crate::matrix::PackedMatrix;

/// Holds a matrix `[vocabulary, width]`, frozen or trainable.
///
/// A clone is a reference count: a tied model hands the same table to [`embed`](crate::embed()) and
/// [`token_losses`](crate::token_losses), and its gradient is the sum of both.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model holds one or two of them")]
pub enum Table {
    /// A packed matrix that gets no gradient.
    Frozen(Arc<PackedMatrix>),
    /// `[vocabulary, width]`; gets a gradient if it is tracked.
    Trainable(Tensor<2>),
}

impl Table {
    /// Gives the number of words.
    pub fn rows(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.rows(),
            Self::Trainable(tensor) => tensor.dims()[0],
        }
    }

    /// Gives the width of a word's vector.
    pub fn columns(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.columns(),
            Self::Trainable(tensor) => tensor.dims()[1],
        }
    }

    /// Gives the whole matrix as a tensor, `[vocabulary, width]`; a frozen one is unpacked.
    pub fn dense(&self, device: &Device, dtype: DType) -> Tensor<2> {
        match self {
            Self::Frozen(matrix) => {
                let data = TensorData::new(matrix.to_f32(), [matrix.rows(), matrix.columns()]);
                Tensor::from_data(data, (device, dtype))
            }
            Self::Trainable(tensor) => tensor.clone(),
        }
    }
}
