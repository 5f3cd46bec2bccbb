//! GGML block types: how GGUF files store numbers, and the way from and to `f32`.
//!
//! A quantised row is a run of blocks; each block carries its own scale (and for some types a
//! minimum), so a block can be decoded alone. Layouts follow ggml's `block_*` structures; all
//! multi-byte fields are little endian.

use half::f16;

use crate::numbers;

/// What went wrong between bytes and numbers of a block type.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GgmlError {
    /// The file names a type this crate has no layout for.
    #[error(
        "GGML type {id}{} is not supported; expected one of {}; convert the model to one of these, \
         for example Q8_0",
        name.map(|n| format!(" ({n})")).unwrap_or_default(),
        supported()
    )]
    UnknownType {
        /// The number found in the file.
        id: u32,
        /// The name GGML gives this number, if it is known.
        name: Option<&'static str>,
    },
    /// A row does not divide into whole blocks.
    #[error("{kind} needs a multiple of {} values, got {len}; keep this tensor in F16 or F32", kind.block_len())]
    PartialBlock {
        /// The block type.
        kind: BlockType,
        /// Number of values asked for.
        len: usize,
    },
    /// Byte count and value count do not belong together.
    #[error("{kind}: {values} values need {expected} bytes, got {got}")]
    LengthMismatch {
        /// The block type.
        kind: BlockType,
        /// Number of values.
        values: usize,
        /// Bytes these values take.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The size does not fit this machine's address space.
    #[error("{kind}: {len} values take more bytes than this machine can address")]
    TooLarge {
        /// The block type.
        kind: BlockType,
        /// Number of values.
        len: usize,
    },
    /// This crate reads the type but does not write it.
    #[error("{kind} can be read but not written; write F32, F16, BF16, Q8_0, Q4_1 or Q4_0")]
    NotWritable {
        /// The block type.
        kind: BlockType,
    },
    /// A value the type cannot hold: NaN, an infinity, or out of the range of the block's scale.
    #[error(
        "value {value} at index {index} cannot be stored as {kind}; \
         look for a diverged or overflowed weight, or write F32"
    )]
    NotRepresentable {
        /// The block type.
        kind: BlockType,
        /// Index of the value in the slice.
        index: usize,
        /// The value itself.
        value: f32,
    },
}

/// A storage type of GGML tensors that this crate can decode.
#[expect(non_camel_case_types, reason = "the names GGML and every model card use")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// 32 values: `f16` scale, 16 bytes of nibbles; value = (q - 8)·d.
    Q4_0,
    /// 32 values: `f16` scale, `f16` minimum, 16 bytes of nibbles; value = q·d + m.
    Q4_1,
    /// 32 values: `f16` scale, 32 fifth bits, 16 bytes of nibbles; value = (q - 16)·d.
    Q5_0,
    /// 32 values: `f16` scale, `f16` minimum, 32 fifth bits, 16 bytes of nibbles; q·d + m.
    Q5_1,
    /// 32 values: `f16` scale, 32 signed bytes; value = q·d.
    Q8_0,
    /// 256 values in 8 groups with 6-bit scales and minima, 4-bit values.
    Q4_K,
    /// 256 values in 8 groups with 6-bit scales and minima, 5-bit values.
    Q5_K,
    /// 256 values in 16 groups with 8-bit scales, 6-bit values.
    Q6_K,
    /// Signed byte.
    I8,
    /// 16-bit integer.
    I16,
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// 64-bit float.
    F64,
    /// The upper half of an `f32`.
    BF16,
}

use BlockType::{BF16, F16, F32, F64, I8, I16, I32, I64};
use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

/// Values per block of the simple quantised types.
pub const BLOCK: usize = 32;
/// Values per super-block of the `_K` types.
pub const SUPER_BLOCK: usize = 256;

fn supported() -> String {
    BlockType::ALL.map(BlockType::name).join(", ")
}

impl BlockType {
    /// All types, in the order of their numbers in GGUF.
    pub const ALL: [Self; 16] =
        [F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, I8, I16, I32, I64, F64, BF16];

    /// Returns the number GGUF stores for this type.
    pub const fn id(self) -> u32 {
        match self {
            F32 => 0,
            F16 => 1,
            Q4_0 => 2,
            Q4_1 => 3,
            Q5_0 => 6,
            Q5_1 => 7,
            Q8_0 => 8,
            Q4_K => 12,
            Q5_K => 13,
            Q6_K => 14,
            I8 => 24,
            I16 => 25,
            I32 => 26,
            I64 => 27,
            F64 => 28,
            BF16 => 30,
        }
    }

    /// Finds the type a GGUF number stands for.
    ///
    /// # Errors
    /// [`GgmlError::UnknownType`], with GGML's name where the number is known but not supported.
    pub fn from_id(id: u32) -> Result<Self, GgmlError> {
        let found = Self::ALL.into_iter().find(|kind| kind.id() == id);
        found.ok_or(GgmlError::UnknownType { id, name: unsupported_name(id) })
    }

    /// Returns the name GGML uses, such as `Q4_1`.
    pub const fn name(self) -> &'static str {
        match self {
            F32 => "F32",
            F16 => "F16",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q4_K => "Q4_K",
            Q5_K => "Q5_K",
            Q6_K => "Q6_K",
            I8 => "I8",
            I16 => "I16",
            I32 => "I32",
            I64 => "I64",
            F64 => "F64",
            BF16 => "BF16",
        }
    }

    /// Returns how many values one block holds.
    pub const fn block_len(self) -> usize {
        match self {
            F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => BLOCK,
            Q4_K | Q5_K | Q6_K => SUPER_BLOCK,
        }
    }

    /// Returns how many bytes one block takes.
    pub const fn block_bytes(self) -> usize {
        match self {
            I8 => 1,
            F16 | BF16 | I16 => 2,
            F32 | I32 => 4,
            F64 | I64 => 8,
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Returns how many bytes `len` values take.
    ///
    /// # Errors
    /// [`GgmlError::PartialBlock`] unless `len` is a whole number of blocks,
    /// [`GgmlError::TooLarge`] if the count overflows.
    pub fn bytes_for(self, len: usize) -> Result<usize, GgmlError> {
        if !len.is_multiple_of(self.block_len()) {
            return Err(GgmlError::PartialBlock { kind: self, len });
        }
        (len / self.block_len())
            .checked_mul(self.block_bytes())
            .ok_or(GgmlError::TooLarge { kind: self, len })
    }

    fn check(self, values: usize, got: usize) -> Result<(), GgmlError> {
        let expected = self.bytes_for(values)?;
        if expected == got {
            Ok(())
        } else {
            Err(GgmlError::LengthMismatch { kind: self, values, expected, got })
        }
    }

    /// Decodes whole blocks into `out`.
    ///
    /// Every number is `scale · integer (+ minimum)` in `f32`, evaluated as ggml's reference does,
    /// so the results are ggml's bit for bit; integers wider than 24 bits and `F64` round to
    /// nearest.
    ///
    /// # Shapes
    /// - `bytes`: `[n / block_len · block_bytes]`
    /// - `out`: `[n]`
    /// # Errors
    /// [`GgmlError::LengthMismatch`] or [`GgmlError::PartialBlock`] if the two do not fit.
    /// # Examples
    /// ```
    /// # use retune_files::ggml::BlockType;
    /// // One Q8_0 block: scale 0.5 (0x3800 as f16), then the integers 0..32.
    /// let mut block = vec![0x00, 0x38];
    /// block.extend(0..32u8);
    /// let mut out = [0.0; 32];
    /// BlockType::Q8_0.dequantize(&block, &mut out)?;
    /// assert_eq!(out[3], 1.5);
    /// # Ok::<(), retune_files::ggml::GgmlError>(())
    /// ```
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) -> Result<(), GgmlError> {
        self.check(out.len(), bytes.len())?;
        match self {
            F32 => numbers::f32_from_le(bytes, out),
            F16 => numbers::f16_to_f32(bytes, out),
            BF16 => numbers::bf16_to_f32(bytes, out),
            F64 => each(bytes, out, |b, [y]: &mut [f32; 1]| *y = f64::from_le_bytes(*b) as f32),
            I8 => each(bytes, out, |b, [y]: &mut [f32; 1]| *y = f32::from(i8::from_le_bytes(*b))),
            I16 => each(bytes, out, |b, [y]: &mut [f32; 1]| *y = f32::from(i16::from_le_bytes(*b))),
            I32 => each(bytes, out, |b, [y]: &mut [f32; 1]| *y = i32::from_le_bytes(*b) as f32),
            I64 => each(bytes, out, |b, [y]: &mut [f32; 1]| *y = i64::from_le_bytes(*b) as f32),
            Q4_0 => each(bytes, out, read_q4_0),
            Q4_1 => each(bytes, out, read_q4_1),
            Q5_0 => each(bytes, out, read_q5_0),
            Q5_1 => each(bytes, out, read_q5_1),
            Q8_0 => each(bytes, out, read_q8_0),
            Q4_K => each(bytes, out, read_q4_k),
            Q5_K => each(bytes, out, read_q5_k),
            Q6_K => each(bytes, out, read_q6_k),
        }
        Ok(())
    }

    /// Encodes values into whole blocks, rounding as ggml's reference quantisers do.
    ///
    /// # Shapes
    /// - `values`: `[n]`
    /// - `out`: `[n / block_len · block_bytes]`
    /// # Errors
    /// Lengths as in [`Self::dequantize`]; [`GgmlError::NotRepresentable`] for NaN, infinities and
    /// values beyond the range of an `f16` scale (`F32` alone keeps any value as it is);
    /// [`GgmlError::NotWritable`] for types other than `F32`, `F16`, `BF16`, `Q8_0`, `Q4_0`, `Q4_1`.
    pub fn quantize(self, values: &[f32], out: &mut [u8]) -> Result<(), GgmlError> {
        self.check(values.len(), out.len())?;
        let bad =
            |index: usize| GgmlError::NotRepresentable { kind: self, index, value: values[index] };
        let in_block = |block: usize, offset: usize| bad(block * BLOCK + offset);
        match self {
            F32 => numbers::f32_to_le(values, out),
            F16 => numbers::f32_to_f16(values, out).map_err(bad)?,
            BF16 => numbers::f32_to_bf16(values, out).map_err(bad)?,
            Q8_0 => write_each(values, out, write_q8_0).map_err(|(b, o)| in_block(b, o))?,
            Q4_0 => write_each(values, out, write_q4_0).map_err(|(b, o)| in_block(b, o))?,
            Q4_1 => write_each(values, out, write_q4_1).map_err(|(b, o)| in_block(b, o))?,
            kind => return Err(GgmlError::NotWritable { kind }),
        }
        Ok(())
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn unsupported_name(id: u32) -> Option<&'static str> {
    Some(match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

fn each<const B: usize, const L: usize>(
    bytes: &[u8],
    out: &mut [f32],
    read: impl Fn(&[u8; B], &mut [f32; L]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        read(block, out);
    }
}

/// Reports a bad value as (block, index inside the block).
fn write_each<const B: usize>(
    values: &[f32],
    out: &mut [u8],
    write: impl Fn(&[f32; BLOCK], &mut [u8; B]) -> Result<(), usize>,
) -> Result<(), (usize, usize)> {
    let blocks = values.as_chunks().0.iter().zip(out.as_chunks_mut().0);
    for (index, (values, block)) in blocks.enumerate() {
        write(values, block).map_err(|offset| (index, offset))?;
    }
    Ok(())
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn read_q4_0(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    for (j, q) in block[2..].iter().enumerate() {
        out[j] = f32::from((q & 15) as i8 - 8) * d;
        out[j + 16] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

fn read_q4_1(block: &[u8; 20], out: &mut [f32; BLOCK]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, q) in block[4..].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn read_q5_0(block: &[u8; 22], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (j, q) in block[6..].iter().enumerate() {
        let low_fifth = ((high >> j) & 1) as u8;
        let high_fifth = ((high >> (j + 16)) & 1) as u8;
        out[j] = f32::from((q & 15 | low_fifth << 4) as i8 - 16) * d;
        out[j + 16] = f32::from((q >> 4 | high_fifth << 4) as i8 - 16) * d;
    }
}

fn read_q5_1(block: &[u8; 24], out: &mut [f32; BLOCK]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (j, q) in block[8..].iter().enumerate() {
        let low_fifth = ((high >> j) & 1) as u8;
        let high_fifth = ((high >> (j + 16)) & 1) as u8;
        out[j] = f32::from(q & 15 | low_fifth << 4) * d + m;
        out[j + 16] = f32::from(q >> 4 | high_fifth << 4) * d + m;
    }
}

fn read_q8_0(block: &[u8; 34], out: &mut [f32; BLOCK]) {
    let d = half_at(block, 0);
    for (y, q) in out.iter_mut().zip(&block[2..]) {
        *y = f32::from(*q as i8) * d;
    }
}

/// Unpacks the 6-bit scale and minimum of group `j` of 8 from 12 bytes.
///
/// Groups 0..4 keep theirs in the low six bits of bytes `j` and `j + 4`; groups 4..8 have the low
/// nibbles in byte `j + 4` and the top two bits above the first groups' six.
const fn scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4;
        let min = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
        (scale, min)
    }
}

fn read_q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let scales = &block[4..16];
    // 32 bytes hold two groups: the first in the low nibbles, the second in the high ones.
    let pairs = block[16..].as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0);
    for (pair, (quants, out)) in pairs.enumerate() {
        let (low, high) = out.split_at_mut(32);
        for (shift, out) in [(0, low), (4, high)] {
            let (scale, min) = scale_and_min(scales, 2 * pair + usize::from(shift == 4));
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for (y, q) in out.iter_mut().zip(quants) {
                *y = scale * f32::from(q >> shift & 15) - min;
            }
        }
    }
}

fn read_q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, fifths) = (&block[4..16], &block[16..48]);
    let pairs = block[48..].as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0);
    for (pair, (quants, out)) in pairs.enumerate() {
        let (low, high) = out.split_at_mut(32);
        for (shift, out) in [(0, low), (4, high)] {
            let group = 2 * pair + usize::from(shift == 4);
            let (scale, min) = scale_and_min(scales, group);
            let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
            for ((y, q), fifth) in out.iter_mut().zip(quants).zip(fifths) {
                let q = q >> shift & 15 | (fifth >> group & 1) << 4;
                *y = scale * f32::from(q) - min;
            }
        }
    }
}

fn read_q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let d = half_at(block, 208);
    for (part, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low = &block[64 * part..64 * part + 64];
        let high = &block[128 + 32 * part..160 + 32 * part];
        let scales = &block[192 + 8 * part..200 + 8 * part];
        // Four rows of 32: rows 0 and 1 take low nibbles, rows 2 and 3 the high ones, and row r
        // the bit pair 2r of `high`.
        for (row, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = &low[row % 2 * 32..][..32];
            for (l, y) in out.iter_mut().enumerate() {
                let q = low[l] >> (row / 2 * 4) & 15 | (high[l] >> (2 * row) & 3) << 4;
                let scale = scales[2 * row + l / 16] as i8;
                *y = d * f32::from(scale) * f32::from(q as i8 - 32);
            }
        }
    }
}

/// Stores an `f16` scale, refusing what the half's range cannot hold.
fn store_half(out: &mut [u8], value: f32) -> bool {
    let half = f16::from_f32(value);
    out.copy_from_slice(&half.to_le_bytes());
    half.is_finite()
}

fn first_not_finite(values: &[f32]) -> Result<(), usize> {
    values.iter().position(|v| !v.is_finite()).map_or(Ok(()), Err)
}

/// Index of the value that is furthest from zero; ties keep the first.
fn furthest(values: &[f32; BLOCK]) -> usize {
    let mut at = 0;
    for (i, v) in values.iter().enumerate() {
        if v.abs() > values[at].abs() {
            at = i;
        }
    }
    at
}

const fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn write_q8_0(values: &[f32; BLOCK], out: &mut [u8; 34]) -> Result<(), usize> {
    first_not_finite(values)?;
    let at = furthest(values);
    let d = values[at].abs() / 127.0;
    if !store_half(&mut out[..2], d) {
        return Err(at);
    }
    let id = inverse(d);
    for (q, v) in out[2..].iter_mut().zip(values) {
        *q = (v * id).round() as i8 as u8;
    }
    Ok(())
}

fn write_q4_0(values: &[f32; BLOCK], out: &mut [u8; 18]) -> Result<(), usize> {
    first_not_finite(values)?;
    let at = furthest(values);
    let d = values[at] / -8.0;
    if !store_half(&mut out[..2], d) {
        return Err(at);
    }
    let id = inverse(d);
    let quant = |v: f32| ((v * id + 8.5) as u8).min(15);
    for (j, q) in out[2..].iter_mut().enumerate() {
        *q = quant(values[j]) | quant(values[j + 16]) << 4;
    }
    Ok(())
}

fn write_q4_1(values: &[f32; BLOCK], out: &mut [u8; 20]) -> Result<(), usize> {
    first_not_finite(values)?;
    let at = furthest(values);
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (max - min) / 15.0;
    if !store_half(&mut out[..2], d) || !store_half(&mut out[2..4], min) {
        return Err(at);
    }
    let id = inverse(d);
    let quant = |v: f32| (((v - min) * id + 0.5) as u8).min(15);
    for (j, q) in out[4..].iter_mut().enumerate() {
        *q = quant(values[j]) | quant(values[j + 16]) << 4;
    }
    Ok(())
}
