//! A head that trains: losses and all gradients in one walk.
//!
//! Losses are mostly summed, each with the same weight. The gradients of head and bias are then
//! those of the plain sum times that weight, so the walk forward can make them, out of logits it
//! has anyway; made in backward they cost a third product with the head.

use burn_flex::FlexTensor;

use super::fast::{Head, ROWS, Seen, Weight};
use crate::buffer::Buffer;
use crate::matrix::blocked;
use crate::matrix::operand::{Operand, Start, Term};
use crate::parallel::{CHUNK, each};
use crate::simd;
use crate::tape::from_values;

/// Logits that are kept at a time: 128 MiB; few in tests, so that these need several blocks.
const KEPT: usize = if cfg!(test) { 1 << 17 } else { 1 << 25 };

/// What the walk found.
pub(super) struct Learned {
    pub(super) seen: Vec<Seen>,
    /// `[labels, width]`: gradient of each loss by its token; empty if nobody wants it.
    pub(super) dx: Vec<f32>,
    /// Gradients of the sum of all losses.
    pub(super) sums: SumGradients,
}

/// Gradients of the plain sum of all losses by weight and bias, where they are wanted.
#[derive(Clone, Debug)]
pub(super) struct SumGradients {
    weight: Option<FlexTensor>,
    bias: Option<FlexTensor>,
}

impl SumGradients {
    /// Turns them into those of the losses times their `factors`; nothing if these differ.
    pub(super) fn times(self, factors: &[f32]) -> Option<[Option<FlexTensor>; 2]> {
        let factor = factors.first().copied().unwrap_or(1.0);
        if factors.iter().any(|other| *other != factor) {
            return None;
        }
        let scaled = |mut tensor: FlexTensor| {
            if factor != 1.0 {
                each(tensor.storage_mut::<f32>().chunks_mut(CHUNK), |part| {
                    for x in part.iter_mut() {
                        *x *= factor;
                    }
                });
            }
            tensor
        };
        Some([self.weight.map(scaled), self.bias.map(scaled)])
    }
}

impl Head {
    /// Walks over all logits, a block of tokens at a time: first to sum up their exponentials, then,
    /// when the sums are known, for the gradients.
    pub(super) fn learn(
        &self,
        weight: Weight<'_>,
        bias: Option<&[f32]>,
        x: &[f32],
        [wants_x, wants_weight, wants_bias]: [bool; 3],
    ) -> Learned {
        let [rows, width] = weight.shape();
        let count = self.labels.len();
        let arithmetic = weight.arithmetic();
        let mut seen = vec![Seen::NOTHING; count];
        let mut dx = vec![0.0; if wants_x { count * width } else { 0 }];
        let mut dweight = Buffer::dirty(if wants_weight { rows * width } else { 0 });
        if count == 0 {
            dweight.fill(0.0);
        }
        let mut dbias = vec![0.0; if wants_bias { rows } else { 0 }];
        let blocks = (count * rows).div_ceil(KEPT).max(1);
        let block = count.div_ceil(blocks).max(1).next_multiple_of(ROWS);
        let mut logits = Buffer::dirty(block.min(count) * rows);
        let mut unpacked = Vec::new();
        for start in (0..count).step_by(block) {
            let tokens = start..count.min(start + block);
            let (labels, seen) = (&self.labels[tokens.clone()], &mut seen[tokens.clone()]);
            let x = &x[tokens.start * width..tokens.end * width];
            let mut largest = Vec::new();
            for words in Self::words(rows) {
                let tile = weight.tile(&words, &mut unpacked);
                let logits = &mut logits[words.start * tokens.len()..words.end * tokens.len()];
                Self::logits(arithmetic, x, tile, bias, &words, logits);
                let parts = logits.chunks_mut(ROWS * words.len()).zip(labels.chunks(ROWS));
                each(parts.zip(seen.chunks_mut(ROWS)), |((logits, labels), seen)| {
                    self.see_tile(&words, labels, logits, seen);
                });
                largest.push(seen.iter().map(|seen| seen.largest).collect::<Vec<_>>());
            }
            for (words, largest) in Self::words(rows).zip(largest) {
                let logits = &mut logits[words.start * tokens.len()..words.end * tokens.len()];
                let parts = logits.chunks_mut(ROWS * words.len()).zip(labels.chunks(ROWS));
                let parts = parts.zip(largest.chunks(ROWS).zip(seen.chunks(ROWS)));
                each(parts, |((logits, labels), (largest, seen))| {
                    change_rows(words.start, words.len(), labels, largest, seen, logits);
                });
                if wants_bias {
                    for row in logits.chunks_exact(words.len()) {
                        for (sum, x) in dbias[words.clone()].iter_mut().zip(row) {
                            *sum += x;
                        }
                    }
                }
                if wants_x {
                    let tile = weight.tile(&words, &mut unpacked);
                    let term = Term {
                        left: Operand::rows(logits, words.len()),
                        right: Operand::columns(tile, width),
                        length: words.len(),
                    };
                    let out = &mut dx[tokens.start * width..tokens.end * width];
                    blocked::multiply(arithmetic, labels.len(), width, &[term], Start::Output, out);
                }
                if wants_weight {
                    let term = Term {
                        left: Operand::columns(logits, words.len()),
                        right: Operand::columns(x, width),
                        length: labels.len(),
                    };
                    let start = if tokens.start == 0 { Start::Zero } else { Start::Output };
                    let out = &mut dweight[words.start * width..words.end * width];
                    blocked::multiply(arithmetic, words.len(), width, &[term], start, out);
                }
            }
        }
        let sums = SumGradients {
            weight: wants_weight.then(|| dweight.into_tensor([rows, width])),
            bias: wants_bias.then(|| from_values(dbias, [rows])),
        };
        Learned { seen, dx, sums }
    }
}

/// Turns exponentials above the largest logit seen then into the gradient of each loss by them.
#[inline(always)]
fn change_body<const LANES: usize, const FMA: bool>(
    first_word: usize,
    words: usize,
    labels: &[usize],
    largest: &[f32],
    seen: &[Seen],
    logits: &mut [f32],
) {
    let tokens = labels.iter().zip(largest.iter().zip(seen));
    for (row, (label, (largest, seen))) in logits.chunks_exact_mut(words).zip(tokens) {
        let share = simd::exp::<FMA>(largest - seen.largest) / seen.sum;
        for x in row.iter_mut() {
            *x *= share;
        }
        if (first_word..first_word + words).contains(label) {
            row[label - first_word] -= seen.label_slope;
        }
    }
}

simd::versions! {
    fn change_rows(
        first_word: usize,
        words: usize,
        labels: &[usize],
        largest: &[f32],
        seen: &[Seen],
        logits: &mut [f32],
    ) = change_body;
}
