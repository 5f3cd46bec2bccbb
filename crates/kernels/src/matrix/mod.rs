//! Matrix products on the CPU, and frozen matrices kept in the form the caller chooses.
//!
//! Everything is row-major. A product is computed in tiles: both factors are copied, a block at a
//! time, into the order the innermost loop reads them in (converting and dequantising on the way),
//! so one copy of a frozen matrix serves the forward product and the input's gradient alike.
//!
//! Every element of a result is one sum in an order that depends on the shapes alone: work is
//! divided over outputs, never over the reduction, so bits do not depend on the number of threads.
//! They do depend on the processor's instruction set.

#![expect(clippy::single_match_else, reason = "two forms of one thing read best side by side")]

pub(crate) mod blocked;
mod cpu;
mod dot;
mod int8;
mod narrow;
pub(crate) mod operand;
mod outer;
mod pack;
mod packed;
mod peak;
mod product;
mod quantized;
mod scratch;
mod shared;
#[cfg(test)]
mod tests;
mod tile;
mod vector;

pub use packed::{Form, PackedMatrix, PackedMatrixError, SharedBytes};
pub use peak::multiply_in_registers;
pub use product::{product, product_nt, product_tn};

/// How the products of a matrix multiplication are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// Products and sums in `f32`.
    #[default]
    F32,
    /// Factors rounded to bf16, products summed in `f32`, where the processor has an instruction
    /// for it that is faster than `f32`; as [`Arithmetic::F32`] elsewhere, and in products that
    /// reading the matrix takes longer than multiplying (of a few rows or columns).
    Bf16,
    /// The input of a matrix in quantised blocks rounded to 8 bits in groups of 32, products
    /// summed as integers, as llama.cpp generates; as [`Arithmetic::F32`] elsewhere, and in the
    /// gradient of the input. A result does not depend on the rows beside its own.
    Int8,
}

impl Arithmetic {
    /// Tells whether this machine computes so, rather than falling back on [`Arithmetic::F32`].
    pub fn is_native(self) -> bool {
        match self {
            Self::F32 | Self::Int8 => true,
            Self::Bf16 => cpu::Kernel::choose(self).rounds_to_bf16(),
        }
    }
}
