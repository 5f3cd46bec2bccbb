//! A frozen matrix in the form its caller chose.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use retune_files::ggml::{BlockType, GgmlError};

use super::operand::{Operand, Start, Term};
use super::{Arithmetic, blocked, dot, int8, quantized};

/// How the numbers of a [`PackedMatrix`] are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// Four bytes a number.
    F32,
    /// Two bytes a number, rounded to nearest even.
    Bf16,
    /// GGML blocks as they lie in a GGUF file.
    Blocks(BlockType),
}

/// Bytes someone else may own, such as a part of a mapped file.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Why a matrix could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PackedMatrixError {
    /// Count of numbers and shape do not belong together.
    #[error("a matrix of {rows} x {columns} holds {} numbers, got {got}", rows * columns)]
    WrongCount {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
        /// Numbers given.
        got: usize,
    },
    /// Count of bytes and shape do not belong together.
    #[error("{rows} x {columns} numbers in {kind} blocks take {expected} bytes, got {got}")]
    WrongBytes {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
        /// Block type asked for.
        kind: BlockType,
        /// Bytes the shape needs.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The shape does not fit this machine's address space.
    #[error("a matrix of {rows} x {columns} is larger than this machine can address")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
    },
    /// A row does not divide into whole blocks, or numbers cannot be stored in the block type.
    #[error(transparent)]
    Blocks(#[from] GgmlError),
}

#[derive(Clone)]
pub(super) enum Storage {
    F32(Arc<Vec<f32>>),
    /// `f32` as a file on this machine has them, checked to be whole and aligned.
    SharedF32(SharedBytes),
    Bf16(Arc<Vec<bf16>>),
    Blocks(BlockType, SharedBytes),
}

/// Keeps a frozen matrix `[rows, columns]` (outputs by inputs of a linear layer) once in memory.
///
/// The same copy serves `x · Wᵀ` ([`Self::multiply`]) and the input's gradient `dY · W`
/// ([`Self::multiply_transposed`]). Cloning shares the numbers.
///
/// # Examples
/// ```
/// use retune_kernels::matrix::{Form, PackedMatrix};
/// let weight = PackedMatrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], Form::F32)?;
/// let mut y = [0.0; 2];
/// weight.multiply(&[1.0, 0.0, -1.0], 1, &mut y, Some(&[0.5, 0.5]));
/// assert_eq!(y, [-1.5, -1.5]);
/// let mut dx = [0.0; 3];
/// weight.multiply_transposed(&[1.0, -1.0], 1, &mut dx);
/// assert_eq!(dx, [-3.0, -3.0, -3.0]);
/// # Ok::<(), retune_kernels::matrix::PackedMatrixError>(())
/// ```
#[derive(Clone)]
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    arithmetic: Arithmetic,
    pub(super) storage: Storage,
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("PackedMatrix")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .field("form", &self.form())
            .field("arithmetic", &self.arithmetic)
            .finish_non_exhaustive()
    }
}

impl PackedMatrix {
    /// Makes a matrix from numbers in row-major order, converting them to `form`.
    ///
    /// `F32` takes the vector as it is, without a copy.
    ///
    /// # Errors
    /// [`PackedMatrixError::WrongCount`] if the numbers do not fill the shape;
    /// [`PackedMatrixError::Blocks`] if rows are not whole blocks, or the block type cannot be
    /// written or cannot hold a number.
    pub fn from_f32(
        rows: usize,
        columns: usize,
        values: impl Into<Vec<f32>>,
        form: Form,
    ) -> Result<Self, PackedMatrixError> {
        let values = values.into();
        let count = count(rows, columns)?;
        if values.len() != count {
            return Err(PackedMatrixError::WrongCount { rows, columns, got: values.len() });
        }
        let storage = match form {
            Form::F32 => Storage::F32(Arc::new(values)),
            Form::Bf16 => Storage::Bf16(Arc::new(values.into_iter().map(bf16::from_f32).collect())),
            Form::Blocks(kind) => {
                kind.bytes_for(columns)?;
                let mut bytes = vec![0; kind.bytes_for(count)?];
                kind.quantize(&values, &mut bytes)?;
                Storage::Blocks(kind, Arc::new(bytes))
            }
        };
        Ok(Self { rows, columns, arithmetic: Arithmetic::F32, storage })
    }

    /// Makes a matrix of `f32` that someone else owns, in row-major order and without a copy.
    ///
    /// Gives the bytes back where they are not aligned as numbers of this machine are.
    ///
    /// # Errors
    /// [`PackedMatrixError::WrongCount`] if the numbers do not fill the shape.
    pub fn from_shared_f32(
        rows: usize,
        columns: usize,
        bytes: SharedBytes,
    ) -> Result<Result<Self, SharedBytes>, PackedMatrixError> {
        let Ok(values) = bytemuck::try_cast_slice::<u8, f32>((*bytes).as_ref()) else {
            return Ok(Err(bytes));
        };
        if values.len() != count(rows, columns)? {
            return Err(PackedMatrixError::WrongCount { rows, columns, got: values.len() });
        }
        let storage = Storage::SharedF32(bytes);
        Ok(Ok(Self { rows, columns, arithmetic: Arithmetic::F32, storage }))
    }

    /// Makes a matrix of bf16 numbers in row-major order, without a copy.
    ///
    /// # Errors
    /// [`PackedMatrixError::WrongCount`] if the numbers do not fill the shape.
    pub fn from_bf16(
        rows: usize,
        columns: usize,
        values: Vec<bf16>,
    ) -> Result<Self, PackedMatrixError> {
        if values.len() != count(rows, columns)? {
            return Err(PackedMatrixError::WrongCount { rows, columns, got: values.len() });
        }
        let storage = Storage::Bf16(Arc::new(values));
        Ok(Self { rows, columns, arithmetic: Arithmetic::F32, storage })
    }

    /// Makes a matrix from GGML blocks in row-major order, without a copy.
    ///
    /// # Errors
    /// [`PackedMatrixError::Blocks`] if a row is not a whole number of blocks,
    /// [`PackedMatrixError::WrongBytes`] if the bytes do not fill the shape.
    pub fn from_blocks(
        rows: usize,
        columns: usize,
        kind: BlockType,
        bytes: SharedBytes,
    ) -> Result<Self, PackedMatrixError> {
        let row_bytes = kind.bytes_for(columns)?;
        let expected =
            row_bytes.checked_mul(rows).ok_or(PackedMatrixError::TooLarge { rows, columns })?;
        let got = (*bytes).as_ref().len();
        if got != expected {
            return Err(PackedMatrixError::WrongBytes { rows, columns, kind, expected, got });
        }
        let storage = Storage::Blocks(kind, bytes);
        Ok(Self { rows, columns, arithmetic: Arithmetic::F32, storage })
    }

    /// Chooses how this matrix is multiplied; [`Arithmetic::F32`] unless told otherwise.
    #[must_use]
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// Returns the number of rows: outputs of the linear layer, words of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns: inputs of the linear layer, width of an embedding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns how the numbers are kept.
    pub fn form(&self) -> Form {
        match self.storage {
            Storage::F32(_) | Storage::SharedF32(_) => Form::F32,
            Storage::Bf16(_) => Form::Bf16,
            Storage::Blocks(kind, _) => Form::Blocks(kind),
        }
    }

    /// Returns how this matrix is multiplied.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Returns the memory the numbers take, in bytes.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(values) => size_of_val(values.as_slice()),
            Storage::Bf16(values) => size_of_val(values.as_slice()),
            Storage::SharedF32(bytes) | Storage::Blocks(_, bytes) => (**bytes).as_ref().len(),
        }
    }

    /// Writes row `row` into `out`, as an embedding look-up does.
    ///
    /// # Shapes
    /// - `out`: `[columns]`
    /// # Panics
    /// If there is no such row or `out` is not one row long.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.columns, "one row into a buffer of another length");
        self.decode(row, 0..self.columns, out);
    }

    /// Returns all numbers in row-major order.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        if self.columns > 0 {
            for (row, out) in values.chunks_exact_mut(self.columns).enumerate() {
                self.decode(row, 0..self.columns, out);
            }
        }
        values
    }

    /// Computes `out = x · Wᵀ (+ bias)`.
    ///
    /// # Shapes
    /// - `x`: `[n, columns]`
    /// - `out`: `[n, rows]`, overwritten
    /// - `bias`: `[rows]`
    /// # Panics
    /// If a slice does not have its shape.
    pub fn multiply(&self, x: &[f32], n: usize, out: &mut [f32], bias: Option<&[f32]>) {
        assert_eq!(x.len(), n * self.columns, "x is not [n, columns]");
        let term = Term {
            left: Operand::rows(x, self.columns),
            right: Operand::Frozen(self),
            length: self.columns,
        };
        self.sum(&[term], n, self.rows, bias, out);
    }

    /// Computes `out = x · Wᵀ + u · Bᵀ (+ bias)`: a frozen product with a low-rank change.
    ///
    /// # Shapes
    /// - `x`: `[n, columns]`
    /// - `u`: `[n, r]`, the input seen through the change's first factor, scaled
    /// - `b`: `[rows, r]`
    /// - `out`: `[n, rows]`, overwritten
    /// - `bias`: `[rows]`
    /// # Panics
    /// If a slice does not have its shape.
    pub fn multiply_low_rank(
        &self,
        x: &[f32],
        (u, b, r): (&[f32], &[f32], usize),
        n: usize,
        out: &mut [f32],
        bias: Option<&[f32]>,
    ) {
        assert_eq!(x.len(), n * self.columns, "x is not [n, columns]");
        let base = Term {
            left: Operand::rows(x, self.columns),
            right: Operand::Frozen(self),
            length: self.columns,
        };
        let change = Term { left: Operand::rows(u, r), right: Operand::rows(b, r), length: r };
        self.sum(&[base, change], n, self.rows, bias, out);
    }

    /// Computes `out = dY · W`, the gradient of the input of [`Self::multiply`].
    ///
    /// # Shapes
    /// - `dy`: `[n, rows]`
    /// - `out`: `[n, columns]`, overwritten
    /// # Panics
    /// If a slice does not have its shape.
    pub fn multiply_transposed(&self, dy: &[f32], n: usize, out: &mut [f32]) {
        assert_eq!(dy.len(), n * self.rows, "dy is not [n, rows]");
        let term = Term {
            left: Operand::rows(dy, self.rows),
            right: Operand::FrozenTransposed(self),
            length: self.rows,
        };
        self.sum(&[term], n, self.columns, None, out);
    }

    /// Computes `out = dY · W + dU · A`, the gradient of the input under a low-rank change.
    ///
    /// # Shapes
    /// - `dy`: `[n, rows]`
    /// - `du`: `[n, r]`
    /// - `a`: `[r, columns]`
    /// - `out`: `[n, columns]`, overwritten
    /// # Panics
    /// If a slice does not have its shape.
    pub fn multiply_transposed_low_rank(
        &self,
        dy: &[f32],
        (du, a, r): (&[f32], &[f32], usize),
        n: usize,
        out: &mut [f32],
    ) {
        assert_eq!(dy.len(), n * self.rows, "dy is not [n, rows]");
        let base = Term {
            left: Operand::rows(dy, self.rows),
            right: Operand::FrozenTransposed(self),
            length: self.rows,
        };
        let right = Operand::columns(a, self.columns);
        let change = Term { left: Operand::rows(du, r), right, length: r };
        self.sum(&[base, change], n, self.columns, None, out);
    }

    fn sum(&self, terms: &[Term], n: usize, width: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        let start = bias.map_or(Start::Zero, Start::Bias);
        if let Some((x, blocks)) = self.rounded_input(terms) {
            int8::multiply(blocks, width, x, n, start, out);
            if !terms[1..].is_empty() {
                self.product(&terms[1..], n, width, Start::Output, out);
            }
        } else {
            self.product(terms, n, width, start, out);
        }
    }

    fn product(&self, terms: &[Term], n: usize, width: usize, start: Start, out: &mut [f32]) {
        if dot::suits(terms, n, width) {
            dot::multiply(n, width, terms, start, out);
        } else {
            blocked::multiply(self.arithmetic, n, width, terms, start, out);
        }
    }

    /// The input and the blocks of a product whose first term is computed in integers.
    fn rounded_input<'a>(&'a self, terms: &[Term<'a>]) -> Option<(&'a [f32], int8::Blocks<'a>)> {
        let (Arithmetic::Int8, Storage::Blocks(kind, bytes)) = (self.arithmetic, &self.storage)
        else {
            return None;
        };
        let Term { left: Operand::Rows { values, .. }, right: Operand::Frozen(_), .. } = terms[0]
        else {
            return None;
        };
        let bytes = (**bytes).as_ref();
        let blocks = int8::Blocks { kind: *kind, bytes, columns: self.columns };
        int8::suits(*kind).then_some((values, blocks))
    }

    /// Numbers per block along a row: where a part of a row may start and end.
    pub(crate) fn block_length(&self) -> usize {
        match self.storage {
            Storage::F32(_) | Storage::SharedF32(_) | Storage::Bf16(_) => 1,
            Storage::Blocks(kind, _) => kind.block_len(),
        }
    }

    /// The numbers themselves, where they are `f32`.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        match &self.storage {
            Storage::F32(values) => Some(values),
            Storage::SharedF32(bytes) => Some(bytemuck::cast_slice((**bytes).as_ref())),
            _ => None,
        }
    }

    /// The numbers themselves, where they are bf16.
    pub(crate) fn as_bf16(&self) -> Option<&[bf16]> {
        match &self.storage {
            Storage::Bf16(values) => Some(values),
            _ => None,
        }
    }

    /// Writes a part of a row that starts and ends at a block's border.
    pub(crate) fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let numbers = row * self.columns + columns.start..row * self.columns + columns.end;
        match &self.storage {
            Storage::F32(values) => out.copy_from_slice(&values[numbers]),
            Storage::SharedF32(bytes) => {
                let values: &[f32] = bytemuck::cast_slice((**bytes).as_ref());
                out.copy_from_slice(&values[numbers]);
            }
            Storage::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(&values[numbers]) {
                    *out = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
            Storage::Blocks(kind, bytes) => {
                let (length, size) = (kind.block_len(), kind.block_bytes());
                let part = numbers.start / length * size..numbers.end / length * size;
                let blocks = &(**bytes).as_ref()[part];
                if !quantized::decode(*kind, blocks, out) {
                    let decoded = kind.dequantize(blocks, out);
                    debug_assert_eq!(decoded, Ok(()), "parts of a row are whole blocks");
                }
            }
        }
    }
}

fn count(rows: usize, columns: usize) -> Result<usize, PackedMatrixError> {
    rows.checked_mul(columns).ok_or(PackedMatrixError::TooLarge { rows, columns })
}
