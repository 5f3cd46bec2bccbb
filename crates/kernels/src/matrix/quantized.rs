//! Dot products with rows of a frozen matrix that is not `f32`, read in its own form.
//!
//! A block's scale is applied to the sum over the block, so a number costs a conversion and a
//! multiply-add.

#![expect(
    clippy::inline_always,
    reason = "must end up inside a function that has the instructions"
)]

use retune_files::ggml::BlockType;

use super::PackedMatrix;
use super::dot::{FEW, Rows, Sums};
use super::packed::Storage;
use super::vector::{Vector, vectorized};

/// Bytes a row of blocks is asked for ahead of its use.
const AHEAD: usize = 2048;

/// Adds the dot products of a frozen row with up to four left rows to the first column of `sums`,
/// or answers `false` for forms that are better decoded first.
///
/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
pub(super) unsafe fn add_row<V: Vector>(
    left: &Rows,
    matrix: &PackedMatrix,
    row: usize,
    height: usize,
    sums: &mut Sums,
) -> bool {
    let length = matrix.columns();
    // SAFETY: as the caller promises.
    unsafe {
        match &matrix.storage {
            Storage::F32(_) | Storage::SharedF32(_) => false,
            Storage::Bf16(values) => {
                let row = bytemuck::cast_slice(&values[row * length..][..length]);
                match height {
                    1 => bf16::<V, 1>(left, row, sums),
                    2 => bf16::<V, 2>(left, row, sums),
                    3 => bf16::<V, 3>(left, row, sums),
                    _ => bf16::<V, FEW>(left, row, sums),
                }
                true
            }
            Storage::Blocks(kind, bytes) => {
                let size = length / kind.block_len() * kind.block_bytes();
                let row = &(**bytes).as_ref()[row * size..][..size];
                // Rows follow one another; the first touch of a line would wait for memory.
                for line in (0..size).step_by(64) {
                    V::prefetch(row.as_ptr().wrapping_add(AHEAD + line));
                }
                match height {
                    1 => blocks::<V, 1>(*kind, left, row, length, sums),
                    2 => blocks::<V, 2>(*kind, left, row, length, sums),
                    3 => blocks::<V, 3>(*kind, left, row, length, sums),
                    _ => blocks::<V, FEW>(*kind, left, row, length, sums),
                }
            }
        }
    }
}

/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn bf16<V: Vector, const H: usize>(left: &Rows, row: &[u16], sums: &mut Sums) {
    let length = row.len();
    let left = left_rows::<H>(left, length);
    let whole = length / 16 * 16;
    // SAFETY: as the caller promises; all rows are `length` long.
    unsafe {
        let mut vectors = [V::splat(0.0); H];
        for at in (0..whole).step_by(16) {
            let b = V::from_bf16(row.as_ptr().add(at));
            for (vector, left) in vectors.iter_mut().zip(left) {
                *vector = V::load(left.as_ptr().add(at)).multiply_add(b, *vector);
            }
        }
        for ((vector, left), sums) in vectors.iter().zip(left).zip(sums.iter_mut()) {
            let rest = left[whole..].iter().zip(&row[whole..]);
            let rest: f32 = rest.map(|(x, half)| x * f32::from_bits(u32::from(*half) << 16)).sum();
            sums[0] += vector.sum() + rest;
        }
    }
}

/// # Safety
/// The processor has the vector's instructions.
#[inline(always)]
unsafe fn blocks<V: Vector, const H: usize>(
    kind: BlockType,
    left: &Rows,
    row: &[u8],
    length: usize,
    sums: &mut Sums,
) -> bool {
    let left = left_rows::<H>(left, length);
    // SAFETY: as the caller promises; the row holds `length` numbers as whole blocks.
    unsafe {
        let vectors = match kind {
            BlockType::Q8_0 => q8_0::<V, H>(left, row),
            BlockType::Q4_0 => q4_0::<V, H>(left, row),
            BlockType::Q4_1 => q4_1::<V, H>(left, row),
            BlockType::Q4_K => q4_k::<V, H>(left, row),
            _ => return false,
        };
        for (vector, sums) in vectors.iter().zip(sums.iter_mut()) {
            sums[0] += vector.sum();
        }
    }
    true
}

#[inline(always)]
fn left_rows<'a, const H: usize>(left: &Rows<'a>, length: usize) -> [&'a [f32]; H] {
    let mut rows = [&[][..]; H];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = left.row(r, length);
    }
    rows
}

/// The two vectors of a left row that belong to a block of 32.
///
/// # Safety
/// The row holds 32 numbers from `at` on; the processor has the vector's instructions.
#[inline(always)]
unsafe fn pair<V: Vector>(row: &[f32], at: usize) -> [V; 2] {
    debug_assert!(at + 32 <= row.len());
    // SAFETY: as the caller promises.
    unsafe { [V::load(row.as_ptr().add(at)), V::load(row.as_ptr().add(at + 16))] }
}

/// Writes the numbers of whole blocks, or answers `false` for block types that have no fast way.
///
/// The numbers are those of [`BlockType::dequantize`] bit by bit: nothing is fused.
pub(super) fn decode(kind: BlockType, bytes: &[u8], out: &mut [f32]) -> bool {
    if !matches!(kind, BlockType::Q8_0 | BlockType::Q4_0 | BlockType::Q4_1) {
        return false;
    }
    assert_eq!(bytes.len() / kind.block_bytes() * kind.block_len(), out.len(), "whole blocks");
    decode_blocks(kind, bytes, out);
    true
}

vectorized!(decode_blocks => write_blocks(kind: BlockType, bytes: &[u8], out: &mut [f32]));

/// # Safety
/// `out` is as long as the blocks say; the processor has the vector's instructions.
#[inline(always)]
unsafe fn write_blocks<V: Vector>(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    let out = out.as_chunks_mut::<32>().0;
    // SAFETY: blocks and pieces of `out` go in pairs; the caller promises the instructions.
    unsafe {
        let write = |to: &mut [f32; 32], [low, high]: [V; 2]| {
            low.store(to.as_mut_ptr());
            high.store(to[16..].as_mut_ptr());
        };
        match kind {
            BlockType::Q8_0 => {
                let blocks = bytes.as_chunks::<34>().0;
                for (blocks, out) in blocks.chunks(16).zip(out.chunks_mut(16)) {
                    let [d] = scales::<V, 34, 1>(blocks);
                    for ((block, out), d) in blocks.iter().zip(out).zip(d) {
                        let q = [V::from_i8(block[2..].as_ptr()), V::from_i8(block[18..].as_ptr())];
                        write(out, q.map(|q| q.multiply(V::splat(d))));
                    }
                }
            }
            BlockType::Q4_0 => {
                let blocks = bytes.as_chunks::<18>().0;
                for (blocks, out) in blocks.chunks(16).zip(out.chunks_mut(16)) {
                    let [d] = scales::<V, 18, 1>(blocks);
                    for ((block, out), d) in blocks.iter().zip(out).zip(d) {
                        let q = V::from_nibbles(block[2..].as_ptr());
                        write(out, q.map(|q| q.add(V::splat(-8.0)).multiply(V::splat(d))));
                    }
                }
            }
            _ => {
                let blocks = bytes.as_chunks::<20>().0;
                for (blocks, out) in blocks.chunks(16).zip(out.chunks_mut(16)) {
                    let [d, m] = scales::<V, 20, 2>(blocks);
                    for (index, (block, out)) in blocks.iter().zip(out).enumerate() {
                        let (d, m) = (V::splat(d[index]), V::splat(m[index]));
                        write(
                            out,
                            V::from_nibbles(block[4..].as_ptr()).map(|q| q.multiply(d).add(m)),
                        );
                    }
                }
            }
        }
    }
}

/// Reads the `S` halves that some blocks begin with, all blocks' first, then all blocks' second.
///
/// Converted together: one by one, this would cost more than the blocks' numbers.
///
/// # Safety
/// At most `16 / S` blocks; the processor has the vector's instructions.
#[inline(always)]
unsafe fn scales<V: Vector, const B: usize, const S: usize>(blocks: &[[u8; B]]) -> [[f32; 16]; S] {
    debug_assert!(B >= 4 * S && blocks.len() <= 16);
    let mut scales = [[0.0; 16]; S];
    for (s, scales) in scales.iter_mut().enumerate() {
        // SAFETY: every block holds four bytes from its half on; the caller promises the rest.
        unsafe {
            let from = blocks.as_ptr().cast::<u8>().add(2 * s);
            V::halves(from, B, blocks.len()).store(scales.as_mut_ptr());
        }
    }
    scales
}

/// # Safety
/// Every left row is as long as the row of blocks; the processor has the vector's instructions.
#[inline(always)]
unsafe fn q8_0<V: Vector, const H: usize>(left: [&[f32]; H], row: &[u8]) -> [V; H] {
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [V::splat(0.0); H];
        for (run, blocks) in row.as_chunks::<34>().0.chunks(16).enumerate() {
            let [d] = scales::<V, 34, 1>(blocks);
            for (index, (block, d)) in blocks.iter().zip(d).enumerate() {
                let q = [V::from_i8(block[2..].as_ptr()), V::from_i8(block[18..].as_ptr())];
                for (sum, left) in sums.iter_mut().zip(left) {
                    let [low, high] = pair::<V>(left, 32 * (16 * run + index));
                    let dot = high.multiply_add(q[1], low.multiply(q[0]));
                    *sum = dot.multiply_add(V::splat(d), *sum);
                }
            }
        }
        sums
    }
}

/// # Safety
/// As [`q8_0`].
#[inline(always)]
unsafe fn q4_0<V: Vector, const H: usize>(left: [&[f32]; H], row: &[u8]) -> [V; H] {
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [V::splat(0.0); H];
        for (run, blocks) in row.as_chunks::<18>().0.chunks(16).enumerate() {
            let [d] = scales::<V, 18, 1>(blocks);
            for (index, (block, d)) in blocks.iter().zip(d).enumerate() {
                let (d, shift) = (V::splat(d), V::splat(-8.0 * d));
                let values = V::decode_nibbles(block[2..].as_ptr(), d, shift);
                for (sum, left) in sums.iter_mut().zip(left) {
                    let [low, high] = pair::<V>(left, 32 * (16 * run + index));
                    *sum = high.multiply_add(values[1], low.multiply_add(values[0], *sum));
                }
            }
        }
        sums
    }
}

/// # Safety
/// As [`q8_0`].
#[inline(always)]
unsafe fn q4_1<V: Vector, const H: usize>(left: [&[f32]; H], row: &[u8]) -> [V; H] {
    // SAFETY: as the caller promises.
    unsafe {
        // Two chains of additions: one would wait for itself.
        let mut sums = [[V::splat(0.0); 2]; H];
        for (run, blocks) in row.as_chunks::<20>().0.chunks(16).enumerate() {
            let [d, m] = scales::<V, 20, 2>(blocks);
            for (index, block) in blocks.iter().enumerate() {
                let (d, m) = (V::splat(d[index]), V::splat(m[index]));
                // Decoded rather than summed apart: sums of q·d and of m would cancel.
                let values = V::decode_nibbles(block[4..].as_ptr(), d, m);
                for (sum, left) in sums.iter_mut().zip(left) {
                    let [low, high] = pair::<V>(left, 32 * (16 * run + index));
                    let low = low.multiply_add(values[0], sum[0]);
                    *sum = [low, high.multiply_add(values[1], sum[1])];
                }
            }
        }
        sums.map(|[low, high]| low.add(high))
    }
}

/// # Safety
/// As [`q8_0`].
#[inline(always)]
unsafe fn q4_k<V: Vector, const H: usize>(left: [&[f32]; H], row: &[u8]) -> [V; H] {
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [[V::splat(0.0); 2]; H];
        for (index, block) in row.as_chunks::<144>().0.iter().enumerate() {
            let [[d, ..], [least, ..]] = scales::<V, 144, 2>(std::slice::from_ref(block));
            // Thirty-two bytes hold a group of 32 in their low halves and the next in their high.
            for two in 0..4 {
                let bytes = block[16 + 32 * two..].as_ptr();
                let [first, second] = [V::from_nibbles(bytes), V::from_nibbles(bytes.add(16))];
                for (group, (first, second)) in first.into_iter().zip(second).enumerate() {
                    let [scale, minimum] = scale_and_minimum(&block[4..16], 2 * two + group);
                    let (d, m) = (V::splat(d * scale), V::splat(-least * minimum));
                    let values = [first.multiply_add(d, m), second.multiply_add(d, m)];
                    let at = 256 * index + 64 * two + 32 * group;
                    for (sum, left) in sums.iter_mut().zip(left) {
                        let [low, high] = pair::<V>(left, at);
                        let low = low.multiply_add(values[0], sum[0]);
                        *sum = [low, high.multiply_add(values[1], sum[1])];
                    }
                }
            }
        }
        sums.map(|[low, high]| low.add(high))
    }
}

/// Reads the six-bit scale and minimum of one of eight groups out of twelve bytes.
///
/// The first four groups keep theirs in the low six bits of bytes `group` and `group + 4`; the
/// others have their low halves in byte `group + 4` and their two high bits above the first four's.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], group: usize) -> [f32; 2] {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let (both, above) = (packed[group + 4], [packed[group - 4], packed[group]]);
        (both & 15 | above[0] >> 6 << 4, both >> 4 | above[1] >> 6 << 4)
    };
    [f32::from(scale), f32::from(minimum)]
}
