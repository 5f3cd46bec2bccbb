//! The obvious form, on every processor.

use half::f16;
use retune_files::ggml::BlockType;

use super::rounded::{GROUP, RoundedGroup};

/// Thirty-two weights: each is `scale · integer + minimum`, with a scale for each sixteen.
pub(super) struct Group {
    pub(super) integers: [i8; GROUP],
    pub(super) scales: [f32; 2],
    pub(super) minimum: f32,
}

/// Computes the dot product of a row of blocks with a rounded row.
pub(super) fn dot(kind: BlockType, row: &[u8], left: &[RoundedGroup]) -> f32 {
    let each = kind.block_len() / GROUP;
    let mut total = 0.0;
    for (place, x) in left.iter().enumerate() {
        let block = &row[place / each * kind.block_bytes()..][..kind.block_bytes()];
        let group = group(kind, block, place % each);
        let half = |half: usize| -> i32 {
            let part = 16 * half..16 * half + 16;
            let pairs = group.integers[part.clone()].iter().zip(&x.integers[part]);
            pairs.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum()
        };
        let [low, high] = [half(0), half(1)].map(|sum| sum as f32);
        let products = group.scales[0] * low + group.scales[1] * high;
        total += products * x.scale + group.minimum * x.sum;
    }
    total
}

/// Reads a group of a block; layouts are those of [`BlockType`].
pub(super) fn group(kind: BlockType, block: &[u8], index: usize) -> Group {
    use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let alike = |scale: f32, minimum: f32, integers: [i8; GROUP]| Group {
        integers,
        scales: [scale; 2],
        minimum,
    };
    // Byte `j` holds the numbers `j` and `j + 16`.
    let nibbles = |at: usize, j: usize| block[at + j % 16] >> (4 * (j / 16)) & 15;
    let fifth = |at: usize, j: usize| (block[at + j / 8] >> (j % 8) & 1) << 4;
    match kind {
        Q8_0 => alike(half(0), 0.0, std::array::from_fn(|j| block[2 + j] as i8)),
        Q4_0 => alike(half(0), 0.0, std::array::from_fn(|j| nibbles(2, j) as i8 - 8)),
        Q4_1 => alike(half(0), half(2), std::array::from_fn(|j| nibbles(4, j) as i8)),
        Q5_0 => {
            let number = |j| (nibbles(6, j) | fifth(2, j)) as i8 - 16;
            alike(half(0), 0.0, std::array::from_fn(number))
        }
        Q5_1 => {
            let number = |j| (nibbles(8, j) | fifth(4, j)) as i8;
            alike(half(0), half(2), std::array::from_fn(number))
        }
        Q4_K | Q5_K => {
            let (scale, minimum) = scale_and_minimum(&block[4..16], index);
            let low = if kind == Q4_K { 16 } else { 48 };
            let number = |j: usize| {
                let four = block[low + 32 * (index / 2) + j] >> (4 * (index % 2)) & 15;
                let fifth = if kind == Q4_K { 0 } else { block[16 + j] >> index & 1 };
                (four | fifth << 4) as i8
            };
            let [scale, minimum] = [half(0) * f32::from(scale), -half(2) * f32::from(minimum)];
            alike(scale, minimum, std::array::from_fn(number))
        }
        Q6_K => {
            let (part, row) = (index / 4, index % 4);
            let number = |j: usize| {
                let four = block[64 * part + 32 * (row % 2) + j] >> (4 * (row / 2)) & 15;
                let two = block[128 + 32 * part + j] >> (2 * row) & 3;
                (four | two << 4) as i8 - 32
            };
            let scale = |half_group: usize| {
                half(208) * f32::from(block[192 + 8 * part + 2 * row + half_group] as i8)
            };
            Group {
                integers: std::array::from_fn(number),
                scales: [scale(0), scale(1)],
                minimum: 0.0,
            }
        }
        _ => unreachable!("{kind} is not asked for: see `suits`"),
    }
}

/// Reads the six-bit scale and minimum of one of eight groups out of twelve bytes.
fn scale_and_minimum(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let (both, above) = (packed[group + 4], [packed[group - 4], packed[group]]);
        (both & 15 | above[0] >> 6 << 4, both >> 4 | above[1] >> 6 << 4)
    }
}
