//! `f32` tiles with AVX2 and FMA.

#[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
use std::arch::x86_64::*;

use super::{LANES, Panels, Run, Tile, TileOutput, TileStart, no_pairs, portable};
use crate::simd;

pub(crate) struct Avx2;

const DEPTH: usize = 528;

impl Tile for Avx2 {
    // 12 of 16 registers hold sums, 2 the panel, 1 the factor.
    const ROWS: usize = 6;
    const PANELS: usize = 1;
    const DEPTH: usize = DEPTH;
    // A panel and a left tile fit the first-level cache of 32 KiB together, and the packed right part
    // half of a second-level cache, of which another thread of the core may use the rest.
    const BLOCK: usize = 256;
    const PAIRS: bool = false;
    // A tile reads six rows sixteen times over: copying them first costs more than it brings.
    const DIRECT: bool = true;

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        let run = Run { first: left.cast(), row: DEPTH, unit: 1, units };
        // SAFETY: as the caller promises.
        unsafe { Self::tile_of_runs(&[run], right, output) }
    }

    unsafe fn tile_of_runs(left: &[Run], right: Panels, output: TileOutput) {
        // SAFETY: as the caller promises.
        unsafe {
            match output.rows {
                1 => rows::<1>(left, right, output),
                2 => rows::<2>(left, right, output),
                3 => rows::<3>(left, right, output),
                4 => rows::<4>(left, right, output),
                5 => rows::<5>(left, right, output),
                _ => rows::<6>(left, right, output),
            }
        }
    }

    no_pairs!();

    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { transpose(rows, units, panel) }
    }
}

/// # Safety
/// As [`Tile::tile_of_runs`], with `R` rows and one panel.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(runs: &[Run], right: Panels, output: TileOutput) {
    // SAFETY: the caller promises R rows in every run, a panel as long as all, and the output.
    unsafe {
        // What is added to at the end arrives meanwhile.
        for r in 0..R {
            let row = output.values.add(r * output.stride);
            _mm_prefetch::<_MM_HINT_T0>(row.cast());
            _mm_prefetch::<_MM_HINT_T0>(row.add(LANES - 1).cast());
        }
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let mut right = right.first.cast::<f32>();
        for run in runs {
            let first = run.first;
            right = if run.unit == 1 {
                add_run::<R>(
                    &mut sums,
                    [first, first.wrapping_add(3 * run.row)],
                    run.row,
                    1,
                    run.units,
                    right,
                )
            } else {
                add_run::<R>(
                    &mut sums,
                    [first, first.wrapping_add(3)],
                    1,
                    run.unit,
                    run.units,
                    right,
                )
            };
        }
        for (r, [low, high]) in sums.into_iter().enumerate() {
            let to = output.values.add(r * output.stride);
            let (low, high) = match output.start {
                TileStart::Zero => (low, high),
                TileStart::Bias(bias) => added(low, high, bias),
                TileStart::Output => added(low, high, to),
            };
            _mm256_storeu_ps(to, low);
            _mm256_storeu_ps(to.add(8), high);
        }
    }
}

/// Adds the products of a run's units, and returns where the panel goes on.
///
/// `first` are the run's rows 0 and 3: from these two, all six are reached by scaled indices.
///
/// # Safety
/// As [`rows`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_run<const R: usize>(
    sums: &mut [[__m256; 2]; R],
    mut first: [*const f32; 2],
    row: usize,
    unit: usize,
    units: usize,
    mut right: *const f32,
) -> *const f32 {
    for _ in 0..units {
        // SAFETY: as the caller promises.
        unsafe {
            let lanes = [_mm256_load_ps(right), _mm256_load_ps(right.add(8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = _mm256_broadcast_ss(&*first[r / 3].add(r % 3 * row));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm256_fmadd_ps(factor, lanes, *sum);
                }
            }
        }
        first = first.map(|first| first.wrapping_add(unit));
        right = right.wrapping_add(LANES);
    }
    right
}

/// # Safety
/// Sixteen numbers lie at `from`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn added(low: __m256, high: __m256, from: *const f32) -> (__m256, __m256) {
    // SAFETY: as the caller promises.
    unsafe {
        (
            _mm256_add_ps(low, _mm256_loadu_ps(from)),
            _mm256_add_ps(high, _mm256_loadu_ps(from.add(8))),
        )
    }
}

/// # Safety
/// As [`Tile::transpose`].
#[target_feature(enable = "avx2")]
unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
    let whole = units / 8 * 8;
    for unit in (0..whole).step_by(8) {
        for half in [0, 8] {
            // SAFETY: eight more units lie in every row, and in the panel sixteen for each.
            unsafe {
                let mut a = [_mm256_setzero_ps(); 8];
                for (a, row) in a.iter_mut().zip(&rows[half..]) {
                    *a = _mm256_loadu_ps(row.add(unit).cast());
                }
                for (i, column) in simd::transpose_8(&a).into_iter().enumerate() {
                    _mm256_storeu_ps(panel.add((unit + i) * LANES + half).cast(), column);
                }
            }
        }
    }
    let rest = rows.map(|row| row.wrapping_add(whole));
    // SAFETY: as the caller promises, beyond the whole blocks.
    unsafe { portable::transpose(&rest, units - whole, panel.add(whole * LANES)) }
}
