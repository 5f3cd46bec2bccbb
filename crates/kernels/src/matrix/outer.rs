//! Products `aᵀ · b` with a narrow `a`: sums of outer products, as the gradients of a low-rank
//! change's factors are.
//!
//! Rows of `b` are read once, where they lie, a few at a time so that the sums stay near.

#![expect(
    clippy::inline_always,
    reason = "must end up inside a function that has the instructions"
)]

use rayon::prelude::*;

use super::vector::{Vector, vectorized};
use crate::work;

/// Widest `a` that is taken here.
pub(super) const NARROW: usize = 32;
/// Rows of both factors that are multiplied before the next columns are.
const ROWS: usize = 16;
/// Columns of `b` a task takes: few, so that the threads share narrow ones evenly.
const COLUMNS: usize = 96;

/// Computes `out = aᵀ · b`.
///
/// # Shapes
/// - `a`: `[k, m]`, `m` at most [`NARROW`]
/// - `b`: `[k, n]`
/// - `out`: `[m, n]`, or `[n, m]` if `turned`
pub(super) fn multiply([m, k, n]: [usize; 3], a: &[f32], b: &[f32], turned: bool, out: &mut [f32]) {
    assert!(m <= NARROW && a.len() == k * m && b.len() == k * n && out.len() == m * n);
    if m == 0 || n == 0 {
        return;
    }
    work::note(m, n, k);
    let part = |index: usize| {
        let columns = index * COLUMNS..n.min((index + 1) * COLUMNS);
        let mut sums = vec![0.0; m * COLUMNS];
        for row in (0..k).step_by(ROWS) {
            let rows = row..k.min(row + ROWS);
            let a = &a[rows.start * m..rows.end * m];
            accumulate(
                [m, n],
                a,
                &b[rows.start * n..rows.end * n],
                columns.start,
                columns.len(),
                &mut sums,
            );
        }
        (columns, sums)
    };
    let parts: Vec<_> = (0..n.div_ceil(COLUMNS)).into_par_iter().map(part).collect();
    for (columns, sums) in parts {
        for (i, sums) in sums.chunks_exact(COLUMNS).enumerate() {
            if turned {
                for (column, sum) in columns.clone().zip(sums) {
                    out[column * m + i] = *sum;
                }
            } else {
                out[i * n..][columns.clone()].copy_from_slice(&sums[..columns.len()]);
            }
        }
    }
}

vectorized!(accumulate => add_rows(
    widths: [usize; 2],
    a: &[f32],
    b: &[f32],
    column: usize,
    columns: usize,
    sums: &mut [f32],
));

/// Adds the outer products of a few rows to `sums`, `[m, COLUMNS]`.
///
/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn add_rows<V: Vector>(
    [m, n]: [usize; 2],
    a: &[f32],
    b: &[f32],
    column: usize,
    columns: usize,
    sums: &mut [f32],
) {
    assert!(columns <= COLUMNS && column + columns <= n && sums.len() >= m * COLUMNS);
    let rows = a.len() / m;
    assert!(b.len() >= rows * n);
    let mut i = 0;
    while i < m {
        let height = V::SUMS.0.min(m - i);
        let mut j = 0;
        while j < columns {
            let width = columns - j;
            let tile = Tile {
                m,
                n,
                rows,
                a: a[i..].as_ptr(),
                b: b[column + j..].as_ptr(),
                sums: sums[i * COLUMNS + j..].as_mut_ptr(),
            };
            // SAFETY: a tile of `height` by sixteen, or three times as many, columns lies inside
            // both factors and the sums; the caller promises the instructions.
            unsafe {
                if V::SUMS.1 == 3 && width >= 48 {
                    tile.of_height::<V, 3>(height);
                    j += 48;
                } else if width >= 16 {
                    tile.of_height::<V, 1>(height);
                    j += 16;
                } else {
                    tile.narrow(height, width);
                    j = columns;
                }
            }
        }
        i += height;
    }
}

struct Tile {
    m: usize,
    n: usize,
    rows: usize,
    a: *const f32,
    b: *const f32,
    sums: *mut f32,
}

impl Tile {
    /// # Safety
    /// As [`Self::add`].
    #[inline(always)]
    unsafe fn of_height<V: Vector, const W: usize>(&self, height: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            match height {
                1 => self.add::<V, 1, W>(),
                2 => self.add::<V, 2, W>(),
                3 => self.add::<V, 3, W>(),
                4 => self.add::<V, 4, W>(),
                5 => self.add::<V, 5, W>(),
                6 => self.add::<V, 6, W>(),
                7 => self.add::<V, 7, W>(),
                _ => self.add::<V, 8, W>(),
            }
        }
    }

    /// # Safety
    /// `H` columns of `a` and `W` vectors of columns of `b` and of `sums` lie in memory; the
    /// processor has the vector's instructions.
    #[inline(always)]
    unsafe fn add<V: Vector, const H: usize, const W: usize>(&self) {
        // SAFETY: as the caller promises.
        unsafe {
            let mut sums = [[V::splat(0.0); W]; H];
            for (h, sums) in sums.iter_mut().enumerate() {
                for (w, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(self.sums.add(h * COLUMNS + w * 16));
                }
            }
            for row in 0..self.rows {
                let mut b = [V::splat(0.0); W];
                for (w, b) in b.iter_mut().enumerate() {
                    *b = V::load(self.b.add(row * self.n + w * 16));
                }
                for (h, sums) in sums.iter_mut().enumerate() {
                    let a = V::splat(*self.a.add(row * self.m + h));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.multiply_add(b, *sum);
                    }
                }
            }
            for (h, sums) in sums.iter().enumerate() {
                for (w, sum) in sums.iter().enumerate() {
                    sum.store(self.sums.add(h * COLUMNS + w * 16));
                }
            }
        }
    }

    /// # Safety
    /// `height` columns of `a` and `width` columns of `b` and of `sums` lie in memory.
    #[inline(always)]
    unsafe fn narrow(&self, height: usize, width: usize) {
        for h in 0..height {
            for j in 0..width {
                // SAFETY: as the caller promises.
                unsafe {
                    let sum = self.sums.add(h * COLUMNS + j);
                    for row in 0..self.rows {
                        *sum += *self.a.add(row * self.m + h) * *self.b.add(row * self.n + j);
                    }
                }
            }
        }
    }
}
