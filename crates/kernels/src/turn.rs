//! Blocks of tokens turned so that tokens lie side by side: what one weight does to a token, one
//! instruction does to many.

use crate::buffer::Buffer;
use crate::parallel::each;
use crate::simd;

/// Tokens of a block: a turned column fills four cache lines.
pub(crate) const BLOCK: usize = 64;

/// Columns turned at once: one cache line of a token's row, so that no line is touched twice.
pub(crate) const STRIP: usize = 16;

/// Side of the squares that are turned in registers.
const SIDE: usize = 8;

/// Turns `[tokens, width]` into blocks of `[width, BLOCK]`, the last one filled up with zeros.
pub(crate) fn turned(x: &[f32], width: usize) -> Buffer {
    let tokens = x.len() / width.max(1);
    let mut out = Buffer::dirty(tokens.div_ceil(BLOCK) * BLOCK * width);
    if !out.is_empty() {
        each(out.chunks_mut(width * BLOCK).zip(x.chunks(width * BLOCK)), |(out, x)| {
            turn_all(x, width, out);
        });
    }
    out
}

#[inline(always)]
fn turn_body<const LANES: usize, const FMA: bool>(x: &[f32], width: usize, out: &mut [f32]) {
    for (strip, out) in out.chunks_mut(STRIP * BLOCK).enumerate() {
        turn::<FMA>(x, width, strip * STRIP, out);
    }
}

#[inline(always)]
fn add_body<const LANES: usize, const FMA: bool>(sums: &[f32], width: usize, out: &mut [f32]) {
    for (strip, sums) in sums.chunks(STRIP * BLOCK).enumerate() {
        add_turned::<FMA>(sums, width, strip * STRIP, out);
    }
}

simd::versions! {
    fn turn_all(x: &[f32], width: usize, out: &mut [f32]) = turn_body;
    /// Adds a turned block `[width, BLOCK]` to `[tokens, width]`.
    pub(crate) fn add_all(sums: &[f32], width: usize, out: &mut [f32]) = add_body;
}

/// Writes columns from `first` on of `[tokens, width]` as `[columns, BLOCK]`, zero beyond the last
/// token.
#[inline(always)]
pub(crate) fn turn<const FMA: bool>(x: &[f32], width: usize, first: usize, out: &mut [f32]) {
    let columns = out.len() / BLOCK;
    let tokens = (x.len() / width).min(BLOCK);
    if tokens < BLOCK {
        out.fill(0.0);
    }
    let [whole_tokens, whole_columns] = squares::<FMA>(tokens, columns);
    for token in (0..whole_tokens).step_by(SIDE) {
        for column in (0..whole_columns).step_by(SIDE) {
            let rows = |i: usize| &x[(token + i) * width + first + column..][..SIDE];
            square(rows, |i, turned| {
                out[(column + i) * BLOCK + token..][..SIDE].copy_from_slice(turned);
            });
        }
    }
    for token in 0..tokens {
        let row = &x[token * width + first..][..columns];
        let done = if token < whole_tokens { whole_columns } else { 0 };
        for (column, value) in row.iter().enumerate().skip(done) {
            out[column * BLOCK + token] = *value;
        }
    }
}

/// Adds `[columns, BLOCK]` to columns from `first` on of `[tokens, width]`.
#[inline(always)]
pub(crate) fn add_turned<const FMA: bool>(
    sums: &[f32],
    width: usize,
    first: usize,
    out: &mut [f32],
) {
    let columns = sums.len() / BLOCK;
    let tokens = (out.len() / width).min(BLOCK);
    let [whole_tokens, whole_columns] = squares::<FMA>(tokens, columns);
    for token in (0..whole_tokens).step_by(SIDE) {
        for column in (0..whole_columns).step_by(SIDE) {
            let rows = |i: usize| &sums[(column + i) * BLOCK + token..][..SIDE];
            square(rows, |i, turned| {
                let out = &mut out[(token + i) * width + first + column..][..SIDE];
                out.iter_mut().zip(turned).for_each(|(out, x)| *out += x);
            });
        }
    }
    for token in 0..tokens {
        let row = &mut out[token * width + first..][..columns];
        let done = if token < whole_tokens { whole_columns } else { 0 };
        for (column, out) in row.iter_mut().enumerate().skip(done) {
            *out += sums[column * BLOCK + token];
        }
    }
}

/// How many tokens and columns are turned in squares, where there are instructions for it.
fn squares<const FMA: bool>(tokens: usize, columns: usize) -> [usize; 2] {
    if cfg!(target_arch = "x86_64") && FMA {
        [tokens, columns].map(|count| count / SIDE * SIDE)
    } else {
        [0, 0]
    }
}

/// Turns a square of rows and hands out its columns; only where [`squares`] found any.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn square<'a>(rows: impl Fn(usize) -> &'a [f32], mut write: impl FnMut(usize, &[f32; SIDE])) {
    use std::arch::x86_64::{_mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps};
    // SAFETY: the versions with fused multiply-add are those with AVX2, and each row is eight long.
    unsafe {
        let mut square = [_mm256_setzero_ps(); SIDE];
        for (i, vector) in square.iter_mut().enumerate() {
            let row = rows(i);
            assert!(row.len() >= SIDE, "a row of a square is eight long");
            *vector = _mm256_loadu_ps(row.as_ptr());
        }
        for (i, vector) in simd::transpose_8(&square).into_iter().enumerate() {
            let mut column = [0.0; SIDE];
            _mm256_storeu_ps(column.as_mut_ptr(), vector);
            write(i, &column);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn square<'a>(_rows: impl Fn(usize) -> &'a [f32], _write: impl FnMut(usize, &[f32; SIDE])) {
    unreachable!("there are no squares here");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_there_and_adding_back_is_adding() {
        for (tokens, width) in [(1, 1), (7, 9), (8, 8), (64, 16), (65, 17), (130, 40), (200, 3)] {
            let x: Vec<f32> = (0..tokens * width).map(|i| i as f32).collect();
            let blocks = turned(&x, width);
            assert_eq!(blocks.len(), tokens.div_ceil(BLOCK) * BLOCK * width);
            for (place, value) in blocks.iter().enumerate() {
                let (block, rest) = (place / (BLOCK * width), place % (BLOCK * width));
                let (column, token) = (rest / BLOCK, block * BLOCK + rest % BLOCK);
                let want = if token < tokens { x[token * width + column] } else { 0.0 };
                assert_eq!(*value, want, "{tokens} x {width}, token {token}, column {column}");
            }
            let mut sum = vec![0.5; tokens * width];
            let parts = blocks.chunks(BLOCK * width).zip(sum.chunks_mut(BLOCK * width));
            parts.for_each(|(block, sum)| add_all(block, width, sum));
            let want: Vec<f32> = x.iter().map(|x| x + 0.5).collect();
            assert_eq!(sum, want, "{tokens} x {width}");
        }
    }
}
