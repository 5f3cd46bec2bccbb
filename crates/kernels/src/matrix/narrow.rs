//! Products with few output columns, as the first factor of a low-rank change has: every output
//! row is a vector in registers, and the left factor is read once, where it lies.

use rayon::prelude::*;

use crate::simd;
use crate::tile::{self, Left};
use crate::work;

/// Most columns that are taken here.
pub(super) const NARROW: usize = 16;
/// Rows one task takes.
const ROWS: usize = 48;
/// Numbers of the reduction that are taken at a time, so that a task's rows and the right factor
/// stay near.
const DEPTH: usize = 1024;

/// Tells whether this is the fastest way here: with the 32 registers of AVX-512, dot products are.
pub(super) fn suits(rows: usize, columns: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if simd::level() == simd::Level::Avx512 {
        return false;
    }
    columns <= NARROW && rows >= ROWS
}

/// Computes `out = left · right`.
///
/// # Shapes
/// - `left`: `[rows, length]`, `stride` numbers from row to row
/// - `right`: number `(k, column)` lies at `k · steps[0] + column · steps[1]`
/// - `out`: `[rows, columns]`, `columns` at most [`NARROW`]
pub(super) fn multiply(
    [rows, length, columns]: [usize; 3],
    (left, stride): (&[f32], usize),
    (right, steps): (&[f32], [usize; 2]),
    out: &mut [f32],
) {
    assert!(columns <= NARROW && out.len() == rows * columns);
    work::note(rows, columns, length);
    if out.is_empty() {
        return;
    }
    if length == 0 {
        return out.fill(0.0);
    }
    let lanes = if columns <= 8 { 8 } else { 16 };
    let mut padded = vec![0.0; length * lanes];
    for (k, padded) in padded.chunks_exact_mut(lanes).enumerate() {
        for (column, x) in padded.iter_mut().enumerate().take(columns) {
            *x = right[k * steps[0] + column * steps[1]];
        }
    }
    out.par_chunks_mut(ROWS * columns).enumerate().for_each(|(index, out)| {
        let left = &left[index * ROWS * stride..];
        let mut sums = [0.0; ROWS * NARROW];
        multiply_rows(lanes, out.len() / columns, left, stride, &padded, &mut sums);
        for (out, sums) in out.chunks_exact_mut(columns).zip(sums.chunks_exact(lanes)) {
            out.copy_from_slice(&sums[..columns]);
        }
    });
}

/// Adds to `sums`, `[rows, lanes]`.
#[inline(always)]
fn rows_body<const LANES: usize, const FMA: bool>(
    lanes: usize,
    rows: usize,
    left: &[f32],
    stride: usize,
    right: &[f32],
    sums: &mut [f32],
) {
    let length = right.len() / lanes;
    for start in (0..length).step_by(DEPTH) {
        let steps = DEPTH.min(length - start);
        let left = Left { values: &left[start..], row_stride: stride, step_stride: 1 };
        let right = &right[start * lanes..];
        if lanes == 8 {
            tile::multiply::<8, FMA, true>(rows, steps, left, right, 8, sums, 8);
        } else {
            tile::multiply::<16, FMA, true>(rows, steps, left, right, 16, sums, 16);
        }
    }
}

simd::versions! {
    fn multiply_rows(
        lanes: usize,
        rows: usize,
        left: &[f32],
        stride: usize,
        right: &[f32],
        sums: &mut [f32],
    ) = rows_body;
}
