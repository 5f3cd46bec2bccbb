//! Thirty-two products at a time.

#[allow(clippy::wildcard_imports, reason = "intrinsics are many and unmistakable")]
use std::arch::x86_64::*;

use retune_files::ggml::BlockType;

use super::rounded::RoundedGroup;
use super::{FEW, Tile};

/// Sums of a row of blocks on their way, for each left row.
#[derive(Clone, Copy)]
struct Sums<const H: usize> {
    /// Products of scale and integers; their total is the lanes' sum.
    products: [__m256; H],
    /// In the second lane products of minimum and sum; the first is not looked at.
    minima: [__m128; H],
}

/// Computes the dot products of rows of blocks (first index) with the first `count` rounded rows.
///
/// Each pair of rows has sums of its own, in the same order however many there are; four chains of
/// additions hide that each waits for itself.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots(
    kind: BlockType,
    weights: &[&[u8]; FEW],
    left: &[&[RoundedGroup]; FEW],
    count: usize,
) -> Tile {
    let mut found = [[0.0; FEW]; FEW];
    match count {
        1 => {
            for (found, sum) in found.iter_mut().zip(dots_of(kind, *weights, [left[0]])) {
                found[..1].copy_from_slice(&sum);
            }
        }
        2 => {
            let found = found.as_chunks_mut::<2>().0.iter_mut();
            for (found, weights) in found.zip(weights.as_chunks::<2>().0) {
                let sums = dots_of(kind, *weights, [left[0], left[1]]);
                for (found, sums) in found.iter_mut().zip(sums) {
                    found[..2].copy_from_slice(&sums);
                }
            }
        }
        // A third row comes with a fourth that is thrown away.
        _ => {
            for (found, weights) in found.iter_mut().zip(weights) {
                [*found] = dots_of(kind, [*weights], *left);
            }
        }
    }
    found
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dots_of<const H: usize, const W: usize>(
    kind: BlockType,
    weights: [&[u8]; W],
    left: [&[RoundedGroup]; H],
) -> [[f32; H]; W] {
    use BlockType::{Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K};
    let mut sums = [Sums { products: [_mm256_setzero_ps(); H], minima: [_mm_setzero_ps(); H] }; W];
    match kind {
        Q4_0 => q4_0(&weights, &left, &mut sums),
        Q4_1 => q4_1(&weights, &left, &mut sums),
        Q5_0 => q5_0(&weights, &left, &mut sums),
        Q5_1 => q5_1(&weights, &left, &mut sums),
        Q4_K => q4_k(&weights, &left, &mut sums),
        Q5_K => q5_k(&weights, &left, &mut sums),
        Q6_K => q6_k(&weights, &left, &mut sums),
        _ => q8_0(&weights, &left, &mut sums),
    }
    let mut found = [[0.0; H]; W];
    for (found, sums) in found.iter_mut().zip(sums) {
        for ((found, products), minima) in found.iter_mut().zip(sums.products).zip(sums.minima) {
            let [low, high] =
                [_mm256_castps256_ps128(products), _mm256_extractf128_ps::<1>(products)];
            let four = _mm_add_ps(low, high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            let one = _mm_add_ss(two, _mm_movehdup_ps(two));
            *found = _mm_cvtss_f32(_mm_add_ss(one, _mm_movehdup_ps(minima)));
        }
    }
    found
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sixteen(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: sixteen bytes are borrowed.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn thirty_two(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: thirty-two bytes are borrowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn integers(bytes: &[i8; 32]) -> __m256i {
    // SAFETY: thirty-two bytes are borrowed.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// A pair in the two lowest lanes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn pair([low, high]: [f32; 2]) -> __m128 {
    let bits = u64::from(high.to_bits()) << 32 | u64::from(low.to_bits());
    _mm_castsi128_ps(_mm_cvtsi64_si128(bits as i64))
}

/// Two halves, as numbers in the two lowest lanes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn halves(bytes: [u8; 4]) -> __m128 {
    _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes(bytes)))
}

/// One half, in the two lowest lanes, times `factors`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn half_times(bytes: [u8; 2], factors: [f32; 2]) -> __m128 {
    let half = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes))));
    _mm_mul_ps(_mm_moveldup_ps(half), _mm_setr_ps(factors[0], factors[1], 0.0, 0.0))
}

/// The low halves of sixteen bytes, then their high halves.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: &[u8; 16]) -> __m256i {
    let both = _mm256_broadcastsi128_si256(sixteen(bytes));
    let shifted = _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4));
    _mm256_and_si256(shifted, _mm256_set1_epi8(15))
}

/// Sixteen where a bit is set, in the order of the bits; zero elsewhere.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fifths(bits: [u8; 4]) -> __m256i {
    let bits = _mm256_set1_epi32(i32::from_le_bytes(bits));
    // Each byte of the four, eight times over.
    let places =
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let one_each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let chosen = _mm256_and_si256(_mm256_shuffle_epi8(bits, places), one_each);
    _mm256_and_si256(_mm256_cmpeq_epi8(chosen, one_each), _mm256_set1_epi8(16))
}

/// Adds a group of integers of 0 to 63, with scale and minimum in the two lowest lanes.
///
/// Pairs of products stay below 2 · 63 · 127, within 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_unsigned<const H: usize>(
    sums: &mut Sums<H>,
    left: &[&[RoundedGroup]; H],
    group: usize,
    weights: __m256i,
    scale_and_minimum: __m128,
) {
    for (h, left) in left.iter().enumerate() {
        let x = &left[group];
        let pairs = _mm256_maddubs_epi16(weights, integers(&x.integers));
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let both = _mm_mul_ps(scale_and_minimum, pair([x.scale, x.sum]));
        let scale = _mm256_broadcastss_ps(both);
        sums.products[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), scale, sums.products[h]);
        sums.minima[h] = _mm_add_ps(sums.minima[h], both);
    }
}

/// Adds a group of signed integers, with a scale for each four of them.
///
/// Pairs of products are at most 2 · 128 · 127, within 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_signed<const H: usize>(
    sums: &mut Sums<H>,
    left: &[&[RoundedGroup]; H],
    group: usize,
    weights: __m256i,
    scales: __m256,
) {
    let magnitudes = _mm256_abs_epi8(weights);
    for (h, left) in left.iter().enumerate() {
        let x = &left[group];
        let turned = _mm256_sign_epi8(integers(&x.integers), weights);
        let pairs = _mm256_maddubs_epi16(magnitudes, turned);
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let scale = _mm256_mul_ps(scales, _mm256_set1_ps(x.scale));
        sums.products[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), scale, sums.products[h]);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_0<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<18>().0);
    for group in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[group];
            let ([d0, d1, ..], quants) = (block, tail::<18, 16>(block));
            add_unsigned(sums, left, group, nibbles(quants), half_times([*d0, *d1], [1.0, -8.0]));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_1<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<20>().0);
    for group in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[group];
            let ([d0, d1, m0, m1, ..], quants) = (block, tail::<20, 16>(block));
            add_unsigned(sums, left, group, nibbles(quants), halves([*d0, *d1, *m0, *m1]));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_0<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<22>().0);
    for group in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[group];
            let ([d0, d1, b0, b1, b2, b3, ..], quants) = (block, tail::<22, 16>(block));
            let numbers = _mm256_or_si256(nibbles(quants), fifths([*b0, *b1, *b2, *b3]));
            add_unsigned(sums, left, group, numbers, half_times([*d0, *d1], [1.0, -16.0]));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_1<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<24>().0);
    for group in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[group];
            let ([d0, d1, m0, m1, b0, b1, b2, b3, ..], quants) = (block, tail::<24, 16>(block));
            let numbers = _mm256_or_si256(nibbles(quants), fifths([*b0, *b1, *b2, *b3]));
            add_unsigned(sums, left, group, numbers, halves([*d0, *d1, *m0, *m1]));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<34>().0);
    for group in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[group];
            let ([d0, d1, ..], quants) = (block, tail::<34, 32>(block));
            let scale = _mm256_broadcastss_ps(half_times([*d0, *d1], [1.0, 0.0]));
            add_signed(sums, left, group, thirty_two(quants), scale);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<144>().0);
    for index in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[index];
            let scales = scales_and_minima(block[..16].as_chunks().0);
            for (two, bytes) in block[16..].as_chunks::<32>().0.iter().enumerate() {
                let bytes = thirty_two(bytes);
                let low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(15));
                for (part, numbers) in [low, high].into_iter().enumerate() {
                    let group = 2 * two + part;
                    add_unsigned(sums, left, 8 * index + group, numbers, pair(scales[group]));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_k<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<176>().0);
    for index in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[index];
            let scales = scales_and_minima(block[..16].as_chunks().0);
            let pieces = block[16..].as_chunks::<32>().0;
            let mut fifth_bits = thirty_two(&pieces[0]);
            for (two, bytes) in pieces[1..].iter().enumerate() {
                let bytes = thirty_two(bytes);
                let low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(15));
                for (part, four) in [low, high].into_iter().enumerate() {
                    let group = 2 * two + part;
                    // The group's bit is the lowest of each byte.
                    let fifth = _mm256_and_si256(fifth_bits, _mm256_set1_epi8(1));
                    let numbers = _mm256_or_si256(four, _mm256_slli_epi16::<4>(fifth));
                    fifth_bits = _mm256_srli_epi16::<1>(fifth_bits);
                    add_unsigned(sums, left, 8 * index + group, numbers, pair(scales[group]));
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<const H: usize, const W: usize>(
    weights: &[&[u8]; W],
    left: &[&[RoundedGroup]; H],
    sums: &mut [Sums<H>; W],
) {
    let rows = weights.map(|row| row.as_chunks::<210>().0);
    for index in 0..rows[0].len() {
        for (blocks, sums) in rows.iter().zip(&mut *sums) {
            let block = &blocks[index];
            let d = _mm256_broadcastss_ps(half_times([block[208], block[209]], [1.0, 0.0]));
            let pieces = block.as_chunks::<32>().0;
            for part in 0..2 {
                let mut two_bits = thirty_two(&pieces[4 + part]);
                for row in 0..4 {
                    let bytes = thirty_two(&pieces[2 * part + row % 2]);
                    let four = if row < 2 { bytes } else { _mm256_srli_epi16::<4>(bytes) };
                    let four = _mm256_and_si256(four, _mm256_set1_epi8(15));
                    let two = _mm256_and_si256(two_bits, _mm256_set1_epi8(3));
                    let numbers = _mm256_or_si256(four, _mm256_slli_epi16::<4>(two));
                    let numbers = _mm256_sub_epi8(numbers, _mm256_set1_epi8(32));
                    two_bits = _mm256_srli_epi16::<2>(two_bits);
                    let at = 192 + 8 * part + 2 * row;
                    let [low, high] = [at, at + 1].map(|at| f32::from(block[at] as i8));
                    let scales = _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
                    let scales = _mm256_mul_ps(scales, d);
                    add_signed(sums, left, 8 * index + 4 * part + row, numbers, scales);
                }
            }
        }
    }
}

/// The last bytes of a block.
#[inline]
fn tail<const B: usize, const N: usize>(block: &[u8; B]) -> &[u8; N] {
    match block.last_chunk() {
        Some(tail) => tail,
        None => unreachable!("a block of {B} bytes has {N}"),
    }
}

/// Reads what a block of eight groups begins with: scale and negative minimum of each.
///
/// The six-bit numbers of the first four groups are the low bits of the first four bytes (scales)
/// and of the next four (minima); those of the others have four bits in the last four bytes and
/// two above the first groups'.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scales_and_minima(header: &[[u8; 4]]) -> [[f32; 2]; 8] {
    const SIX: u32 = 0x3f3f_3f3f;
    const FOUR: u32 = 0x0f0f_0f0f;
    const TWO: u32 = 0x0303_0303;
    let [low, middle, high] = [1, 2, 3].map(|at: usize| u32::from_le_bytes(header[at]));
    let scales = [low & SIX, high & FOUR | (low >> 6 & TWO) << 4];
    let minima = [middle & SIX, high >> 4 & FOUR | (middle >> 6 & TWO) << 4];
    let d = _mm_mul_ps(halves(header[0]), _mm_setr_ps(1.0, -1.0, 0.0, 0.0));
    let d = _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castps_pd(d)));
    let mut found = [[0.0; 2]; 8];
    for (four, found) in found.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let [scales, minima] = [scales, minima].map(|all| _mm_cvtsi32_si128(all[four] as i32));
        let numbers = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(scales, minima));
        let values = _mm256_mul_ps(_mm256_cvtepi32_ps(numbers), d);
        // SAFETY: four pairs are eight numbers.
        unsafe { _mm256_storeu_ps(found.as_mut_ptr().cast(), values) };
    }
    found
}
