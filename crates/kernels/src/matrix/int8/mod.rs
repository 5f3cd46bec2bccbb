//! Products of quantised blocks with inputs rounded to 8 bits, summed as integers.
//!
//! A row of the input is rounded by itself, in groups of 32 numbers with a scale each: the largest
//! becomes ±127. A group's dot product is then an exact integer, which costs a third of the
//! instructions of converting its weights to floats. Each number of the input is off by at most
//! 1/254 of the largest in its group, so this is for generation: training and likelihoods multiply
//! the numbers as they are.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod plain;
mod rounded;
#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;
use retune_files::ggml::BlockType;

use super::cpu::Kernel;
use super::operand::Start;
use super::shared::Output;
use crate::work;
use rounded::{Rounded, RoundedGroup};

/// Rows on either side that are multiplied at once.
const FEW: usize = 4;

/// Dot products of rows of the matrix (first index) with left rows.
type Tile = [[f32; FEW]; FEW];

/// Products below which a second thread costs more than it brings.
const ALONE: usize = 1 << 18;

/// Tells whether blocks of a type are multiplied here.
pub(super) fn suits(kind: BlockType) -> bool {
    use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
    matches!(kind, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | Q6_K)
}

/// Blocks of one type in row-major order.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) kind: BlockType,
    pub(super) bytes: &'a [u8],
    pub(super) columns: usize,
}

impl<'a> Blocks<'a> {
    fn row(&self, index: usize) -> &'a [u8] {
        let size = self.columns / self.kind.block_len() * self.kind.block_bytes();
        &self.bytes[index * size..][..size]
    }
}

/// Computes `out = start + x̂ · Wᵀ`, where `x̂` is `x` rounded.
///
/// A row's result does not depend on the rows beside it.
///
/// # Shapes
/// - `x`: `[n, columns]`
/// - `out`: `[n, rows]`
pub(super) fn multiply(
    blocks: Blocks,
    rows: usize,
    x: &[f32],
    n: usize,
    start: Start,
    out: &mut [f32],
) {
    work::note(n, rows, blocks.columns);
    multiply_with(Kernel::plain(), blocks, rows, x, n, start, out);
}

fn multiply_with(
    kernel: Kernel,
    blocks: Blocks,
    rows: usize,
    x: &[f32],
    n: usize,
    start: Start,
    out: &mut [f32],
) {
    assert_eq!(x.len(), n * blocks.columns, "the input of a product of {n} rows");
    assert_eq!(out.len(), n * rows, "the output of a product of {n} x {rows}");
    if out.is_empty() {
        return;
    }
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), rows, "one number of the bias per output");
    }
    let left = Rounded::new(x, blocks.columns);
    let job = Job { kernel, blocks, rows, left: &left, n, start, out: Output::new(out) };
    let threads = if n * rows * blocks.columns < ALONE { 1 } else { rayon::current_num_threads() };
    let each = rows.div_ceil(if threads == 1 { 1 } else { 4 * threads }).next_multiple_of(32);
    let tasks = rows.div_ceil(each);
    let task = |index: usize| job.part(index * each..rows.min((index + 1) * each));
    if tasks == 1 {
        task(0);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

struct Job<'a> {
    kernel: Kernel,
    blocks: Blocks<'a>,
    rows: usize,
    left: &'a Rounded,
    n: usize,
    start: Start<'a>,
    out: Output<'a>,
}

impl Job<'_> {
    /// Computes the outputs of some rows of the matrix, which no other task touches.
    fn part(&self, rows: Range<usize>) {
        for row in rows.clone().step_by(FEW) {
            let height = FEW.min(rows.end - row);
            let weights: [&[u8]; FEW] =
                std::array::from_fn(|i| self.blocks.row(row + i.min(height - 1)));
            for first in (0..self.n).step_by(FEW) {
                let count = FEW.min(self.n - first);
                let left: [&[RoundedGroup]; FEW] =
                    std::array::from_fn(|i| self.left.row(first + i.min(count - 1)));
                let tile = self.dots(&weights, &left, count);
                for (row, sums) in (row..row + height).zip(&tile) {
                    for (left, sum) in (first..first + count).zip(sums) {
                        // SAFETY: both indices lie in the output, and the column is this task's.
                        unsafe {
                            let out = self.out.at(left * self.rows + row);
                            *out = sum
                                + match self.start {
                                    Start::Zero => 0.0,
                                    Start::Bias(bias) => bias[row],
                                    Start::Output => *out,
                                };
                        }
                    }
                }
            }
        }
    }

    /// Computes the dot products of four rows of the matrix with the first `count` left rows.
    fn dots(&self, weights: &[&[u8]; FEW], left: &[&[RoundedGroup]; FEW], count: usize) -> Tile {
        let kind = self.blocks.kind;
        #[cfg(target_arch = "x86_64")]
        if self.kernel != Kernel::Portable {
            // SAFETY: a kernel is only chosen where the processor has its instructions, and every
            // one but the portable has AVX2, FMA and F16C among them.
            return unsafe { avx2::dots(kind, weights, left, count) };
        }
        let mut tile = [[0.0; FEW]; FEW];
        for (sums, weights) in tile.iter_mut().zip(weights) {
            for (sum, left) in sums.iter_mut().zip(left).take(count) {
                *sum = plain::dot(kind, weights, left);
            }
        }
        tile
    }
}
