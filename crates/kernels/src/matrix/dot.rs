//! Products as dot products of rows, where packing would cost more than multiplying: few rows on
//! the left (decoding), or few on the right (the first factor of a low-rank change).
//!
//! Both factors are read where they lie, a frozen matrix in its own form.

#![expect(
    clippy::inline_always,
    reason = "must end up inside a function that has the instructions"
)]

use std::ops::Range;

use rayon::prelude::*;

use super::blocked;
use super::operand::{Operand, Start, Term};
use super::shared::Output;
use super::vector::{Vector, vectorized};
use super::{PackedMatrix, quantized};
use crate::work;

/// Left rows up to which a product is taken here.
pub(super) const FEW: usize = 4;
/// Right rows up to which a product of dense factors is taken here.
pub(super) const NARROW: usize = 16;
/// Products below which a second thread costs more than it brings.
const ALONE: usize = 1 << 18;

/// Dot products of left rows (first index) with right rows.
pub(super) type Sums = [[f32; FEW]; FEW];

/// Tells whether a product is computed here.
pub(crate) fn suits(terms: &[Term], rows: usize, columns: usize) -> bool {
    let left = |term: &Term| matches!(term.left, Operand::Rows { .. });
    let dense = |term: &Term| matches!(term.right, Operand::Rows { .. });
    let frozen = |term: &Term| matches!(term.right, Operand::Frozen(_));
    (rows <= FEW && terms.iter().all(|term| left(term) && (dense(term) || frozen(term))))
        || (columns <= NARROW && terms.iter().all(|term| left(term) && dense(term)))
}

/// Computes `out = start + Σ left · rightᵀ` as dot products of rows.
///
/// # Shapes
/// - `out`: `[rows, columns]`
pub(crate) fn multiply(rows: usize, columns: usize, terms: &[Term], start: Start, out: &mut [f32]) {
    blocked::check(rows, columns, terms, start, out);
    for term in terms {
        work::note(rows, columns, term.length);
    }
    let job = Job { columns, terms, start, out: Output::new(out) };
    let work = rows * columns * terms.iter().map(|term| term.length).sum::<usize>();
    let threads = if work < ALONE { 1 } else { rayon::current_num_threads() };
    // Divided along the longer side.
    let (length, granule) = if rows <= FEW { (columns, 32) } else { (rows, 16) };
    let each = length.div_ceil(if threads == 1 { 1 } else { 4 * threads });
    let each = each.next_multiple_of(granule);
    let task = |index: usize| {
        let part = index * each..length.min((index + 1) * each);
        if rows <= FEW { run(&job, 0..rows, part) } else { run(&job, part, 0..columns) }
    };
    let tasks = length.div_ceil(each);
    if tasks == 1 {
        task(0);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

struct Job<'a> {
    columns: usize,
    terms: &'a [Term<'a>],
    start: Start<'a>,
    out: Output<'a>,
}

vectorized!(run => part(job: &Job<'_>, rows: Range<usize>, columns: Range<usize>));

/// Computes a part of the output that no other thread touches.
///
/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn part<V: Vector>(job: &Job, rows: Range<usize>, columns: Range<usize>) {
    let mut decoded = Vec::new();
    for row in rows.clone().step_by(FEW) {
        let height = FEW.min(rows.end - row);
        let mut column = columns.start;
        while column < columns.end {
            let mut width = FEW.min(columns.end - column);
            let mut sums = [[0.0; FEW]; FEW];
            for term in job.terms {
                let Operand::Rows { values, stride } = term.left else {
                    unreachable!("asked for by `suits`")
                };
                let left = Rows { values, stride, first: row };
                // SAFETY: as the caller promises.
                unsafe {
                    match term.right {
                        Operand::Rows { values, stride } => {
                            let right = Rows { values, stride, first: column };
                            add_dots::<V>(&left, &right, (height, width), term.length, &mut sums);
                        }
                        Operand::Frozen(matrix) => {
                            width = width.min(frozen_width(matrix));
                            let size = (height, width);
                            let decoded = &mut decoded;
                            add_frozen::<V>(&left, matrix, column, size, decoded, &mut sums);
                        }
                        _ => unreachable!("asked for by `suits`"),
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate().take(height) {
                for (c, sum) in sums.iter().enumerate().take(width) {
                    // SAFETY: row and column lie in the output, in this task's part.
                    unsafe {
                        let out = job.out.at((row + r) * job.columns + column + c);
                        *out = sum
                            + match job.start {
                                Start::Zero => 0.0,
                                Start::Bias(bias) => bias[column + c],
                                Start::Output => *out,
                            };
                    }
                }
            }
            column += width;
        }
    }
}

/// Rows of a dense factor, from a first one on.
pub(super) struct Rows<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    pub(super) fn row(&self, index: usize, length: usize) -> &'a [f32] {
        &self.values[(self.first + index) * self.stride..][..length]
    }
}

/// Adds the dot products of up to four by four rows.
///
/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn add_dots<V: Vector>(
    left: &Rows,
    right: &Rows,
    (height, width): (usize, usize),
    length: usize,
    sums: &mut Sums,
) {
    // SAFETY: as the caller promises.
    unsafe {
        match (height, width) {
            (4, 4) => dots::<V, 4, 4>(left, right, length, sums),
            (2.., 4) => {
                for start in (0..height).step_by(2) {
                    let left = Rows { first: left.first + start, ..*left };
                    let sums = &mut sums[start..];
                    if start + 1 < height {
                        dots::<V, 2, 4>(&left, right, length, sums);
                    } else {
                        dots::<V, 1, 4>(&left, right, length, sums);
                    }
                }
            }
            (1, 4) => dots::<V, 1, 4>(left, right, length, sums),
            _ => {
                for (r, sums) in sums.iter_mut().enumerate().take(height) {
                    let left = Rows { first: left.first + r, ..*left };
                    for (c, sum) in sums.iter_mut().enumerate().take(width) {
                        let right = Rows { first: right.first + c, ..*right };
                        let mut one = [[0.0; FEW]];
                        dots::<V, 1, 1>(&left, &right, length, &mut one);
                        *sum += one[0][0];
                    }
                }
            }
        }
    }
}

/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn dots<V: Vector, const H: usize, const W: usize>(
    left: &Rows,
    right: &Rows,
    length: usize,
    sums: &mut [[f32; FEW]],
) {
    let mut left_rows = [&[][..]; H];
    for (r, row) in left_rows.iter_mut().enumerate() {
        *row = left.row(r, length);
    }
    let mut right_rows = [&[][..]; W];
    for (c, row) in right_rows.iter_mut().enumerate() {
        *row = right.row(c, length);
    }
    let whole = length / 16 * 16;
    // SAFETY: as the caller promises; all rows are `length` long.
    unsafe {
        let mut vectors = [[V::splat(0.0); W]; H];
        for k in (0..whole).step_by(16) {
            let mut b = [V::splat(0.0); W];
            for (b, row) in b.iter_mut().zip(&right_rows) {
                *b = V::load(row.as_ptr().add(k));
            }
            for (vectors, row) in vectors.iter_mut().zip(&left_rows) {
                let a = V::load(row.as_ptr().add(k));
                for (vector, b) in vectors.iter_mut().zip(b) {
                    *vector = a.multiply_add(b, *vector);
                }
            }
        }
        for (r, vectors) in vectors.iter().enumerate() {
            for (c, vector) in vectors.iter().enumerate() {
                let rest = left_rows[r][whole..].iter().zip(&right_rows[c][whole..]);
                let rest: f32 = rest.map(|(a, b)| a * b).sum();
                sums[r][c] += vector.sum() + rest;
            }
        }
    }
}

/// Rows of a frozen matrix that are taken together.
#[inline(always)]
fn frozen_width(matrix: &PackedMatrix) -> usize {
    if matrix.as_f32().is_some() { FEW } else { 1 }
}

/// Adds the dot products of up to four left rows with rows of a frozen matrix.
///
/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn add_frozen<V: Vector>(
    left: &Rows,
    matrix: &PackedMatrix,
    row: usize,
    (height, width): (usize, usize),
    decoded: &mut Vec<f32>,
    sums: &mut Sums,
) {
    let length = matrix.columns();
    // SAFETY: as the caller promises.
    unsafe {
        if let Some(values) = matrix.as_f32() {
            let right = Rows { values, stride: length, first: row };
            add_dots::<V>(left, &right, (height, width), length, sums);
        } else if !quantized::add_row::<V>(left, matrix, row, height, sums) {
            decoded.resize(length, 0.0);
            matrix.decode(row, 0..length, decoded);
            let right = Rows { values: decoded, stride: length, first: 0 };
            add_dots::<V>(left, &right, (height, 1), length, sums);
        }
    }
}
