//! `f32` tiles on Intel's AMX, which multiplies bf16 only.
//!
//! An `f32` has 24 significant bits, a bf16 has 8: `x = x₀ + x₁ + x₂` exactly, each part a bf16
//! (as long as the last is not too small for one, below 2⁻¹¹⁰ or so). Of the nine products of parts
//! the six large ones are summed in `f32`; the three dropped are below 2⁻²⁴ of the whole, as the
//! rounding of an `f32` product is. Six bf16 products cost less here than one of `f32`. Infinities
//! and the last numbers before them (above 3.38e38) come out as NaN.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
use std::arch::x86_64::*;

use super::{LANES, Panels, Tile, TileOutput, amx, avx512};

pub(crate) struct AmxSplit;

/// Units of a part; odd in cache lines, so the rows of a left tile spread over the cache's sets.
const PART: usize = 304;
const DEPTH: usize = 3 * PART;

impl Tile for AmxSplit {
    const ROWS: usize = 32;
    const ROW_GRANULE: usize = 16;
    const PANELS: usize = 2;
    const PARTS: usize = 3;
    const DEPTH: usize = DEPTH;
    const BLOCK: usize = 288;
    // Three parts of 32 rows and of a pair of panels fit the first-level cache together.
    const STEP: usize = 48;
    const UNIT_GRANULE: usize = 16;
    // With a block of three parts a packed right factor takes three quarters of a core's cache.
    const CHUNK: usize = 416;
    const PAIRS: bool = true;

    unsafe fn session(work: impl FnOnce()) {
        // SAFETY: as the caller promises.
        unsafe { amx::session(work) }
    }

    unsafe fn tile(left: *const u32, right: Panels, units: usize, output: TileOutput) {
        // SAFETY: as the caller promises; rows come in sixteens and units too.
        unsafe {
            match (output.rows > 16, output.panels > 1) {
                (true, true) => tile_2x2(left, right, units, output),
                (two_rows, two_panels) => {
                    for row in 0..=usize::from(two_rows) {
                        for panel in 0..=usize::from(two_panels) {
                            let left = left.add(row * 16 * DEPTH);
                            let first = right.first.add(panel * 3 * right.part);
                            let right = Panels { first, ..right };
                            tile_1x1(left, right, units, output.sixteen(row, panel));
                        }
                    }
                }
            }
        }
    }

    unsafe fn transpose(rows: &[*const u32; LANES], units: usize, panel: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { avx512::transpose(rows, units, panel) }
    }

    unsafe fn join(values: &[f32], units: &mut [u32], part: usize) {
        // SAFETY: as the caller promises.
        unsafe { join(values, units, part) }
    }

    unsafe fn join_rows(first: &[f32], second: Option<&[f32]>, units: &mut [u32], part: usize) {
        // SAFETY: as the caller promises.
        unsafe { join_rows(first, second, units, part) }
    }
}

/// Splits numbers into three that are bf16: what counts of each lies in its upper half.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(values: __m512) -> [__m512i; 3] {
    // To nearest, ties away from zero: the next part takes up what this one is off by.
    let half = _mm512_set1_epi32(0x8000);
    let upper = _mm512_set1_epi32(-0x1_0000);
    let first = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(values), half), upper);
    let rest = _mm512_sub_ps(values, _mm512_castsi512_ps(first));
    let second = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
    let rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
    [first, second, _mm512_castps_si512(rest)]
}

/// Masks the first `count` of sixteen.
fn first(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// Does [`Tile::join`] thirty-two numbers at a time.
#[target_feature(enable = "avx512f,avx512bw")]
fn join(values: &[f32], units: &mut [u32], part: usize) {
    let count = values.len().div_ceil(2);
    assert!(count == 0 || 2 * part + count <= units.len());
    // The upper halves of thirty-two places, in two registers.
    let mut odd = [0_u16; 32];
    for (index, place) in odd.iter_mut().enumerate() {
        *place = 2 * index as u16 + 1;
    }
    // SAFETY: `odd` is 64 bytes; reads and writes are masked to the numbers and units there are.
    unsafe {
        let odd = _mm512_loadu_si512(odd.as_ptr().cast());
        for start in (0..count).step_by(16) {
            let (at, have) = (2 * start, values.len() - 2 * start);
            let from = values.as_ptr().add(at);
            let low = _mm512_maskz_loadu_ps(first(have), from);
            let high = _mm512_maskz_loadu_ps(first(have.saturating_sub(16)), from.wrapping_add(16));
            let (low, high) = (split(low), split(high));
            for p in 0..3 {
                let pairs = _mm512_permutex2var_epi16(low[p], odd, high[p]);
                let to = units.as_mut_ptr().add(p * part + start);
                _mm512_mask_storeu_epi32(to.cast(), first(count - start), pairs);
            }
        }
    }
}

/// Does [`Tile::join_rows`] sixteen numbers at a time.
#[target_feature(enable = "avx512f,avx512bw")]
fn join_rows(low: &[f32], high: Option<&[f32]>, units: &mut [u32], part: usize) {
    let count = low.len();
    assert!(count == 0 || 2 * part + count <= units.len());
    assert!(high.is_none_or(|high| high.len() == count));
    for start in (0..count).step_by(16) {
        let mask = first(count - start);
        // SAFETY: reads and writes are masked to the numbers and units there are.
        unsafe {
            let row = |row: &[f32]| split(_mm512_maskz_loadu_ps(mask, row.as_ptr().add(start)));
            let low = row(low);
            let high = high.map_or([_mm512_setzero_si512(); 3], row);
            for p in 0..3 {
                let low = _mm512_srli_epi32::<16>(low[p]);
                // The upper half of every place comes from `high`.
                let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, low, high[p]);
                let to = units.as_mut_ptr().add(p * part + start);
                _mm512_mask_storeu_epi32(to.cast(), mask, pairs);
            }
        }
    }
}

/// One tile of sixteen by sixteen, small products first.
///
/// # Safety
/// As [`Tile::tile`], inside [`Tile::session`].
unsafe fn tile_1x1(left: *const u32, right: Panels, units: usize, output: TileOutput) {
    let (from, from_stride) = amx::start(&output);
    // SAFETY: the caller promises the rows, the panel and the output that are read and written
    // here, and that the tiles are configured; nothing else touches tile registers.
    unsafe {
        asm!(
            "tileloadd tmm0, [{from} + {from_stride}*1]",
            "test {n}, {n}",
            "jz 3f",
            "2:",
            "tileloadd tmm2, [{a} + {a_stride}*1]",
            "tileloadd tmm3, [{a} + {a_stride}*1 + {part}]",
            "tileloadd tmm4, [{a} + {a_stride}*1 + {part_2}]",
            "tileloadd tmm5, [{b0} + {b_stride}*1]",
            "tileloadd tmm6, [{b1} + {b_stride}*1]",
            "tileloadd tmm7, [{b2} + {b_stride}*1]",
            "tdpbf16ps tmm0, tmm2, tmm7",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tdpbf16ps tmm0, tmm3, tmm6",
            "tdpbf16ps tmm0, tmm2, tmm6",
            "tdpbf16ps tmm0, tmm3, tmm5",
            "tdpbf16ps tmm0, tmm2, tmm5",
            "add {a}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "add {b2}, 1024",
            "dec {n}",
            "jnz 2b",
            "3:",
            "tilestored [{to} + {to_stride}*1], tmm0",
            from = in(reg) from,
            from_stride = in(reg) from_stride,
            a = inout(reg) left => _,
            a_stride = in(reg) DEPTH * 4,
            b0 = inout(reg) right.first => _,
            b1 = inout(reg) right.first.wrapping_add(right.part) => _,
            b2 = inout(reg) right.first.wrapping_add(2 * right.part) => _,
            b_stride = in(reg) 64_usize,
            to = in(reg) output.values,
            to_stride = in(reg) output.stride * 4,
            n = inout(reg) units / 16 => _,
            part = const PART * 4,
            part_2 = const PART * 8,
            out("tmm0") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
            out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Two by two tiles of sixteen by sixteen; parts are loaded in an order that reloads few.
///
/// # Safety
/// As [`Tile::tile`], inside [`Tile::session`].
unsafe fn tile_2x2(left: *const u32, right: Panels, units: usize, output: TileOutput) {
    let (from, from_stride) = amx::start(&output);
    // SAFETY: the caller promises the rows, panels and output that are read and written here, and
    // that the tiles are configured; nothing else touches tile registers.
    unsafe {
        asm!(
            "tileloadd tmm0, [{from} + {from_stride}*1]",
            "tileloadd tmm1, [{from} + {from_stride}*1 + 64]",
            "mov {t}, {from_stride}",
            "shl {t}, 4",
            "add {from}, {t}",
            "tileloadd tmm2, [{from} + {from_stride}*1]",
            "tileloadd tmm3, [{from} + {from_stride}*1 + 64]",
            "test {n}, {n}",
            "jz 3f",
            "2:",
            // Left part 2, right part 0.
            "tileloadd tmm4, [{a} + {a_stride}*1 + {a_part_2}]",
            "tileloadd tmm6, [{b} + {b_stride}*1]",
            "lea {t}, [{b} + {panel}]",
            "tileloadd tmm7, [{t} + {b_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a} + {a_stride}*1 + {a_16_part_2}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Left part 1, right part 0.
            "tileloadd tmm4, [{a} + {a_stride}*1 + {a_part}]",
            "tileloadd tmm5, [{a} + {a_stride}*1 + {a_16_part}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Left part 1, right part 1.
            "lea {t}, [{b} + {part}]",
            "tileloadd tmm6, [{t} + {b_stride}*1]",
            "add {t}, {panel}",
            "tileloadd tmm7, [{t} + {b_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Left part 0, right part 1.
            "tileloadd tmm4, [{a} + {a_stride}*1]",
            "tileloadd tmm5, [{a} + {a_stride}*1 + {a_16}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Left part 0, right part 2.
            "lea {t}, [{b} + {part}*2]",
            "tileloadd tmm6, [{t} + {b_stride}*1]",
            "add {t}, {panel}",
            "tileloadd tmm7, [{t} + {b_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Left part 0, right part 0.
            "tileloadd tmm6, [{b} + {b_stride}*1]",
            "lea {t}, [{b} + {panel}]",
            "tileloadd tmm7, [{t} + {b_stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {b}, 1024",
            "dec {n}",
            "jnz 2b",
            "3:",
            "tilestored [{to} + {to_stride}*1], tmm0",
            "tilestored [{to} + {to_stride}*1 + 64], tmm1",
            "mov {t}, {to_stride}",
            "shl {t}, 4",
            "add {to}, {t}",
            "tilestored [{to} + {to_stride}*1], tmm2",
            "tilestored [{to} + {to_stride}*1 + 64], tmm3",
            from = inout(reg) from => _,
            from_stride = in(reg) from_stride,
            a = inout(reg) left => _,
            a_stride = in(reg) DEPTH * 4,
            b = inout(reg) right.first => _,
            b_stride = in(reg) 64_usize,
            part = in(reg) right.part * 4,
            panel = in(reg) right.part * 12,
            to = inout(reg) output.values => _,
            to_stride = in(reg) output.stride * 4,
            n = inout(reg) units / 16 => _,
            t = out(reg) _,
            a_part = const PART * 4,
            a_part_2 = const PART * 8,
            a_16 = const DEPTH * 4 * 16,
            a_16_part = const (DEPTH * 16 + PART) * 4,
            a_16_part_2 = const (DEPTH * 16 + 2 * PART) * 4,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
