//! Plain loops that the compiler vectorises for whatever the build target has (NEON on AArch64).

#![expect(
    clippy::inline_always,
    reason = "compiled once more inside each instruction set's functions"
)]

use half::bf16;

use super::{LANES, Panels, Tile, TileOutput, TileStart, no_pairs};

pub(crate) struct Portable;

const DEPTH: usize = 528;

impl Tile for Portable {
    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const DEPTH: usize = DEPTH;
    const BLOCK: usize = 384;
    const PAIRS: bool = false;

    no_pairs!();

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises.
        unsafe {
            match output.rows {
                1 => rows::<1>(left, right, units, output),
                2 => rows::<2>(left, right, units, output),
                3 => rows::<3>(left, right, units, output),
                _ => rows::<4>(left, right, units, output),
            }
        }
    }
}

#[inline(always)]
pub(crate) fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// # Safety
/// As [`Tile::tile`], with `R` rows and one panel.
#[inline(always)]
unsafe fn rows<const R: usize>(left: *const u32, right: Panels, units: usize, output: TileOutput) {
    let mut sums = [[0.0_f32; LANES]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (lane, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the output has R rows of sixteen columns, and so has the bias.
            *sum = unsafe {
                match output.start {
                    TileStart::Zero => 0.0,
                    TileStart::Bias(bias) => *bias.add(lane),
                    TileStart::Output => *output.values.add(r * output.stride + lane),
                }
            };
        }
    }
    for unit in 0..units {
        // SAFETY: the panel holds `units` times sixteen `f32`.
        let lanes = unsafe { &*right.first.add(unit * LANES).cast::<[f32; LANES]>() };
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the tile has R rows of `units` units.
            let factor = unsafe { *left.add(r * DEPTH + unit).cast::<f32>() };
            for (sum, lane) in sums.iter_mut().zip(lanes) {
                *sum = multiply_add(factor, *lane, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: the output has R rows of sixteen columns.
        unsafe {
            output.values.add(r * output.stride).cast::<[f32; LANES]>().write_unaligned(*sums);
        }
    }
}

/// # Safety
/// As [`Tile::transpose`].
#[inline(always)]
pub(super) unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
    for unit in 0..units {
        for (lane, row) in rows.iter().enumerate() {
            // SAFETY: rows hold `units` units and the panel sixteen times as many.
            unsafe { *panel.add(unit * LANES + lane) = row.add(unit).read_unaligned() }
        }
    }
}

/// Rounds to the nearest bf16, ties to even; the result sits in the low half.
#[inline(always)]
pub(crate) fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN stays one: rounding could carry it to infinity or zero.
    if value.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

#[inline(always)]
pub(super) fn join(values: &[f32], units: &mut [u32]) {
    let (pairs, rest) = values.as_chunks::<2>();
    for ([low, high], unit) in pairs.iter().zip(units.iter_mut()) {
        *unit = round(*low) | round(*high) << 16;
    }
    if let [last] = rest {
        units[pairs.len()] = round(*last);
    }
}

#[inline(always)]
pub(super) fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32]) {
    match second {
        Some(second) => {
            for ((low, high), unit) in first.iter().zip(second).zip(units) {
                *unit = round(*low) | round(*high) << 16;
            }
        }
        None => {
            for (low, unit) in first.iter().zip(units) {
                *unit = round(*low);
            }
        }
    }
}

#[inline(always)]
pub(super) fn pair_rows(first: &[bf16], second: &[bf16], units: &mut [u32]) {
    for ((low, high), unit) in first.iter().zip(second).zip(units.iter_mut()) {
        *unit = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
    }
    if second.is_empty() {
        for (low, unit) in first.iter().zip(units) {
            *unit = u32::from(low.to_bits());
        }
    }
}
