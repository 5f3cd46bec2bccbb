//! Tiles of bf16 pairs with AVX-512's dot product instruction.

#[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
use std::arch::x86_64::*;
use std::mem::transmute;

use half::bf16;

use super::avx512::{DEPTH, by_rows, finish, start};
use super::{LANES, Panels, Tile, TileOutput, avx512, portable};

pub(crate) struct Avx512Bf16;

impl Tile for Avx512Bf16 {
    const ROWS: usize = 14;
    const PANELS: usize = 2;
    const DEPTH: usize = DEPTH;
    const BLOCK: usize = 576;
    const PAIRS: bool = true;

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises.
        unsafe { by_rows!(rows, left, right, units, output) }
    }

    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { avx512::transpose(rows, units, panel) }
    }

    unsafe fn join(values: &[f32], units: &mut [u32], _: usize) {
        // SAFETY: as the caller promises.
        unsafe { join(values, units) }
    }

    unsafe fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32], _: usize) {
        // SAFETY: as the caller promises.
        unsafe { join_rows(first, second, units) }
    }

    unsafe fn pair_rows(first: &[bf16], second: &[bf16], units: &mut [u32]) {
        // SAFETY: as the caller promises.
        unsafe { pair_rows(first, second, units) }
    }
}

/// Does [`Tile::pair_rows`] with the widest vectors.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pair_rows(first: &[bf16], second: &[bf16], units: &mut [u32]) {
    portable::pair_rows(first, second, units);
}

/// # Safety
/// As [`Tile::tile`], with `R` rows and `P` panels.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows<const R: usize, const P: usize>(
    left: *const u32,
    right: Panels,
    units: usize,
    output: TileOutput,
) {
    // SAFETY: the caller promises R rows of `units` units, P panels as long, and the output;
    // `__m512i` and `__m512bh` are both 64 plain bytes.
    unsafe {
        let mut sums = start::<R, P>(&output);
        let panel = right.part;
        let (mut left, mut right) = (left.cast::<i32>(), right.first);
        for _ in 0..units {
            let mut lanes = [_mm512_setzero_si512(); P];
            for (p, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_load_si512(right.add(p * panel).cast());
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = _mm512_set1_epi32(*left.add(r * DEPTH));
                let factor: __m512bh = transmute(factor);
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    let lanes: __m512bh = transmute(lanes);
                    *sum = _mm512_dpbf16_ps(*sum, factor, lanes);
                }
            }
            left = left.add(1);
            right = right.add(LANES);
        }
        finish(&sums, &output);
    }
}

/// Does [`Tile::join`] thirty-two numbers at a time.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn join(values: &[f32], units: &mut [u32]) {
    let (blocks, rest) = values.as_chunks::<32>();
    for (block, units) in blocks.iter().zip(units.as_chunks_mut::<16>().0) {
        // SAFETY: the block holds thirty-two numbers and the units take their sixteen pairs;
        // `__m512bh` is 64 plain bytes.
        unsafe {
            let low = _mm512_loadu_ps(block.as_ptr());
            let high = _mm512_loadu_ps(block.as_ptr().add(16));
            let pairs: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(units.as_mut_ptr().cast(), pairs);
        }
    }
    portable::join(rest, &mut units[blocks.len() * 16..]);
}

/// Does [`Tile::join_rows`] sixteen numbers at a time.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32]) {
    let (Some(second), (blocks, rest)) = (second, first.as_chunks::<16>()) else {
        return portable::join_rows(first, second, units);
    };
    let (others, other_rest) = second.as_chunks::<16>();
    for ((first, second), units) in blocks.iter().zip(others).zip(units.as_chunks_mut::<16>().0) {
        // SAFETY: all three hold sixteen 32-bit values; `__m256bh` is 32 plain bytes.
        unsafe {
            let low: __m256i = transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(first.as_ptr())));
            let high: __m256i = transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(second.as_ptr())));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
            let pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), high);
            _mm512_storeu_si512(units.as_mut_ptr().cast(), pairs);
        }
    }
    portable::join_rows(rest, Some(other_rest), &mut units[blocks.len() * 16..]);
}

/// Multiplies in registers, sixteen independent sums at a time.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in super::super) unsafe fn spin(rounds: usize, value: f32) -> f32 {
    // SAFETY: `__m512` and `__m512bh` are both 64 plain bytes.
    let factor: __m512bh = unsafe { transmute(_mm512_set1_ps(value)) };
    let mut sums = [_mm512_set1_ps(value); 16];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}

/// Operations of one round of [`spin`].
pub(in super::super) const SPIN: u64 = 16 * 2 * 32;
