//! `f32` tiles with AVX-512.

#[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
use std::arch::x86_64::*;

use super::{LANES, Panels, Tile, TileOutput, TileStart, no_pairs, portable};

pub(crate) struct Avx512;

/// Odd in cache lines, so the rows of a left tile spread over the sets of the first-level cache.
pub(super) const DEPTH: usize = 656;

impl Tile for Avx512 {
    // 28 of 32 registers hold sums, 2 a row of the panels, 1 the factor.
    const ROWS: usize = 14;
    const PANELS: usize = 2;
    const DEPTH: usize = DEPTH;
    const BLOCK: usize = 576;
    const PAIRS: bool = false;

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises.
        unsafe { by_rows!(rows, left, right, units, output) }
    }

    no_pairs!();

    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { transpose(rows, units, panel) }
    }
}

/// Calls `$rows::<R, P>` for the tile's rows (1 to 14) and panels (1 or 2).
macro_rules! by_rows {
    ($rows:ident, $left:expr, $right:expr, $units:expr, $output:expr) => {
        by_rows!(@ $rows, $left, $right, $units, $output, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    };
    (@ $rows:ident, $left:expr, $right:expr, $units:expr, $output:expr, $($r:literal)*) => {
        match ($output.rows, $output.panels) {
            $(
                ($r, 1) => $rows::<$r, 1>($left, $right, $units, $output),
                ($r, 2) => $rows::<$r, 2>($left, $right, $units, $output),
            )*
            (rows, panels) => unreachable!("a tile of {rows} rows and {panels} panels"),
        }
    };
}
pub(super) use by_rows;

/// # Safety
/// As [`Tile::tile`], with `R` rows and `P` panels.
#[target_feature(enable = "avx512f")]
unsafe fn rows<const R: usize, const P: usize>(
    left: *const u32,
    right: Panels,
    units: usize,
    output: TileOutput,
) {
    // SAFETY: the caller promises R rows of `units` units, P panels as long, and the output.
    unsafe {
        let mut sums = start::<R, P>(&output);
        let panel = right.part;
        let (mut left, mut right) = (left.cast::<f32>(), right.first.cast::<f32>());
        for _ in 0..units {
            let mut lanes = [_mm512_setzero_ps(); P];
            for (p, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_load_ps(right.add(p * panel));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = _mm512_set1_ps(*left.add(r * DEPTH));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_fmadd_ps(factor, lanes, *sum);
                }
            }
            left = left.add(1);
            right = right.add(LANES);
        }
        finish(&sums, &output);
    }
}

/// Loads what the sums of a tile start from.
///
/// # Safety
/// `output` describes R rows of P panels that can be read.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn start<const R: usize, const P: usize>(
    output: &TileOutput,
) -> [[__m512; P]; R] {
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (p, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as the caller promises.
            unsafe {
                match output.start {
                    TileStart::Zero => {}
                    TileStart::Bias(bias) => *sum = _mm512_loadu_ps(bias.add(p * LANES)),
                    TileStart::Output => {
                        *sum = _mm512_loadu_ps(output.values.add(r * output.stride + p * LANES));
                    }
                }
            }
        }
    }
    sums
}

/// Stores the sums of a tile.
///
/// # Safety
/// `output` describes R rows of P panels that can be written.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn finish<const R: usize, const P: usize>(
    sums: &[[__m512; P]; R],
    output: &TileOutput,
) {
    for (r, sums) in sums.iter().enumerate() {
        for (p, sum) in sums.iter().enumerate() {
            // SAFETY: as the caller promises.
            unsafe { _mm512_storeu_ps(output.values.add(r * output.stride + p * LANES), *sum) }
        }
    }
}

/// # Safety
/// As [`Tile::transpose`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
    let whole = units / LANES * LANES;
    for unit in (0..whole).step_by(LANES) {
        // SAFETY: sixteen more units lie in every row, and sixteen times sixteen in the panel.
        unsafe {
            let mut a = [_mm512_setzero_si512(); LANES];
            for (a, row) in a.iter_mut().zip(rows) {
                *a = _mm512_loadu_si512(row.add(unit).cast());
            }
            for (i, column) in transpose_16(&a).into_iter().enumerate() {
                _mm512_storeu_si512(panel.add((unit + i) * LANES).cast(), column);
            }
        }
    }
    let rest = rows.map(|row| row.wrapping_add(whole));
    // SAFETY: as the caller promises, beyond the whole blocks.
    unsafe { portable::transpose(&rest, units - whole, panel.add(whole * LANES)) }
}

/// Transposes a block of 16 by 16 in four rounds: within 64 bits, within 128, within halves, whole.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_16(a: &[__m512i; 16]) -> [__m512i; 16] {
    let mut b = *a;
    for i in (0..16).step_by(2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // Now c[4g + j] holds, per 128-bit part q, column 4q + j of rows 4g..4g + 4.
    let mut c = b;
    for g in (0..16).step_by(4) {
        c[g] = _mm512_unpacklo_epi64(b[g], b[g + 2]);
        c[g + 1] = _mm512_unpackhi_epi64(b[g], b[g + 2]);
        c[g + 2] = _mm512_unpacklo_epi64(b[g + 1], b[g + 3]);
        c[g + 3] = _mm512_unpackhi_epi64(b[g + 1], b[g + 3]);
    }
    let mut d = c;
    for j in 0..4 {
        let low_even = _mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]);
        let low_odd = _mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]);
        let high_even = _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j]);
        let high_odd = _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j]);
        d[j] = _mm512_shuffle_i32x4::<0x88>(low_even, high_even);
        d[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low_even, high_even);
        d[4 + j] = _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd);
        d[12 + j] = _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd);
    }
    d
}
