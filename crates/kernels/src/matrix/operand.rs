//! The factors of a product, wherever and in whatever form they lie.

use super::PackedMatrix;

/// A factor indexed `(i, k)`: `i` is an index of the output, `k` is summed over.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// `(i, k)` lies at `i * stride + k`.
    Rows { values: &'a [f32], stride: usize },
    /// `(i, k)` lies at `k * stride + i`.
    Columns { values: &'a [f32], stride: usize },
    /// `(i, k)` is row `i`, column `k` of a frozen matrix.
    Frozen(&'a PackedMatrix),
    /// `(i, k)` is row `k`, column `i` of a frozen matrix.
    FrozenTransposed(&'a PackedMatrix),
}

impl<'a> Operand<'a> {
    /// A row-major `[outputs, length]` factor.
    pub(crate) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self::Rows { values, stride }
    }

    /// A row-major `[length, outputs]` factor.
    pub(crate) fn columns(values: &'a [f32], stride: usize) -> Self {
        Self::Columns { values, stride }
    }

    /// Panics unless all `(i, k)` below the bounds exist.
    pub(crate) fn check(&self, outputs: usize, length: usize) {
        let holds = match *self {
            Self::Rows { values, stride } => fits(values.len(), outputs, stride, length),
            Self::Columns { values, stride } => fits(values.len(), length, stride, outputs),
            Self::Frozen(matrix) => matrix.rows() >= outputs && matrix.columns() >= length,
            Self::FrozenTransposed(matrix) => {
                matrix.columns() >= outputs && matrix.rows() >= length
            }
        };
        assert!(holds, "a factor of a product is smaller than {outputs} x {length}");
    }

    /// Spacing of the `k` at which a block of the reduction may start.
    pub(crate) fn length_granule(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.block_length(),
            _ => 1,
        }
    }

    /// Cost of packing a number, counted in plain ones.
    pub(crate) fn packing_cost(&self) -> usize {
        match self {
            // Measured on the keys' and values' matrices of a small model: with each block decoded
            // twice instead of four times, products take four fifths of the time.
            Self::Frozen(matrix) if matrix.block_length() > 1 => 4,
            _ => 1,
        }
    }

    /// Spacing of the `i` at which a block of the outputs may start.
    pub(crate) fn output_granule(&self) -> usize {
        match self {
            Self::FrozenTransposed(matrix) => matrix.block_length(),
            _ => 1,
        }
    }
}

fn fits(len: usize, rows: usize, stride: usize, columns: usize) -> bool {
    columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= len)
}

/// One term of a sum of products: `left · rightᵀ`, summed over `length` values of `k`.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub(crate) left: Operand<'a>,
    pub(crate) right: Operand<'a>,
    pub(crate) length: usize,
}

/// What the output starts from.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    Zero,
    /// One number per column of the output.
    Bias(&'a [f32]),
    /// What is there already.
    Output,
}
