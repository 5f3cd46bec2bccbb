//! Attention in tiles on the CPU: what is a task, and what is kept for backward.

use std::sync::Arc;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::AttentionOptions;
use super::backward::{self, Gradients, Group, KEYS};
use super::block::Head;
use super::few::{self, FEW};
use super::forward::{self, ROWS};
use crate::buffer::Buffer;
use crate::disjoint::Columns;
use crate::parallel::each;
use crate::spans::Spans;
use crate::tape::{Operation, values};
use crate::work;

#[derive(Clone, Debug)]
pub(super) struct Attention {
    pub(super) options: AttentionOptions,
    pub(super) queries: Spans,
    pub(super) keys: Spans,
}

#[derive(Clone, Debug)]
pub(super) struct Saved {
    inputs: [FlexTensor; 3],
    output: FlexTensor,
    /// Log-sum-exp `[queries, heads]`.
    sums: Arc<[f32]>,
}

impl Attention {
    fn width(&self) -> usize {
        self.options.heads * self.options.head_width
    }

    fn key_width(&self) -> usize {
        self.options.key_heads * self.options.head_width
    }

    fn head<'a>(
        &'a self,
        k: &'a [f32],
        v: &'a [f32],
        document: usize,
        key_head: usize,
    ) -> Head<'a> {
        let (width, stride) = (self.options.head_width, self.key_width());
        let keys = self.keys.get(document);
        let cut = |x: &'a [f32]| {
            if keys.is_empty() { &x[..0] } else { &x[keys.start * stride + key_head * width..] }
        };
        Head {
            k: cut(k),
            v: cut(v),
            stride,
            width,
            options: &self.options,
            queries: self.queries.get(document).len(),
            keys: keys.len(),
        }
    }
}

impl Operation<3> for Attention {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 3], _: [bool; 3]) -> (FlexTensor, Saved) {
        let [q, k, v] = inputs.each_ref().map(values);
        let head = |document, key_head| self.head(k, v, document, key_head);
        let (output, sums) = attend(&self.options, &self.queries, q, head);
        let (tokens, width) = (self.queries.tokens(), self.width());
        let output = output.into_tensor([tokens, width]);
        let saved = Saved { inputs, output: output.clone(), sums: sums.into() };
        (output, saved)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let keys_of = |document| self.keys.get(document).len();
        // Scores again, and for each input one product of its gradient; keys' and queries' need
        // that of the shares.
        let products = 2 + wanted.iter().filter(|wanted| **wanted).count();
        work::note_attention(&self.options, &self.queries, keys_of, products);
        let [q, k, v] = saved.inputs.each_ref().map(values);
        let gradient = values(&gradient);
        let (width, key_width) = (self.width(), self.key_width());
        let (heads, key_heads) = (self.options.heads, self.options.key_heads);
        let (queries, keys) = (self.queries.tokens(), self.keys.tokens());
        let deltas = deltas(values(&saved.output), gradient, self.options.head_width);

        let chunks = |document: usize| self.keys.get(document).len().div_ceil(KEYS);
        let parts = (0..self.keys.documents()).map(chunks).max().unwrap_or(0).max(1);
        // Zeros where a query sees no key of a part, and where a document has no query.
        let new = |wanted: bool, length: usize| Buffer::zeros(if wanted { length } else { 0 });
        let mut dq: Vec<_> = (0..parts).map(|_| new(wanted[0], queries * width)).collect();
        let mut dk = new(wanted[1], keys * key_width);
        let mut dv = new(wanted[2], keys * key_width);
        {
            let dq: Vec<_> = dq.iter_mut().map(|part| Columns::new(part, width)).collect();
            let dk = Columns::new(&mut dk, key_width);
            let dv = Columns::new(&mut dv, key_width);
            let tasks: Vec<_> = (0..self.queries.documents())
                .filter(|document| !self.queries.get(*document).is_empty())
                .flat_map(|document| {
                    (0..chunks(document)).flat_map(move |chunk| {
                        (0..key_heads).map(move |key_head| (document, chunk, key_head))
                    })
                })
                .collect();
            each(tasks, |(document, chunk, key_head)| {
                let rows = self.queries.get(document);
                let members = heads / key_heads;
                let group = Group {
                    head: self.head(k, v, document, key_head),
                    q: &q[rows.start * width..rows.end * width],
                    gradient: &gradient[rows.start * width..rows.end * width],
                    stride: width,
                    sums: &saved.sums[rows.start * heads..rows.end * heads],
                    deltas: &deltas[rows.start * heads..rows.end * heads],
                    members: key_head * members..(key_head + 1) * members,
                    key_column: key_head * self.options.head_width,
                    first_query: rows.start,
                    first_key: self.keys.get(document).start,
                };
                let end = self.keys.get(document).len().min((chunk + 1) * KEYS);
                let to = Gradients {
                    q: wanted[0].then_some(&dq[chunk]),
                    k: wanted[1].then_some(&dk),
                    v: wanted[2].then_some(&dv),
                };
                // SAFETY: every document, chunk and key head is one task, and each chunk has a
                // part of the queries' gradient to itself.
                unsafe { backward::backward_group(&group, &(chunk * KEYS..end), &to) }
            });
        }
        let mut dq = dq.into_iter();
        let mut first = dq.next().unwrap_or_default();
        if wanted[0] {
            for (index, part) in dq.enumerate() {
                for document in 0..self.keys.documents() {
                    if chunks(document) > index + 1 {
                        let rows = self.queries.get(document);
                        let range = rows.start * width..rows.end * width;
                        first[range.clone()]
                            .par_chunks_mut(width)
                            .zip(part[range].par_chunks(width))
                            .for_each(|(sum, part)| {
                                for (sum, part) in sum.iter_mut().zip(part) {
                                    *sum += part;
                                }
                            });
                    }
                }
            }
        }
        [
            wanted[0].then(|| first.into_tensor([queries, width])),
            wanted[1].then(|| dk.into_tensor([keys, key_width])),
            wanted[2].then(|| dv.into_tensor([keys, key_width])),
        ]
    }
}

/// Computes output `[queries, heads · head_width]` and log-sum-exp `[queries, heads]`.
///
/// `head` gives the keys and values of a document's key head.
pub(super) fn attend<'a>(
    options: &AttentionOptions,
    queries: &Spans,
    q: &[f32],
    head: impl Fn(usize, usize) -> Head<'a> + Sync,
) -> (Buffer, Vec<f32>) {
    work::note_attention(options, queries, |document| head(document, 0).keys, 2);
    let heads = options.heads;
    let width = heads * options.head_width;
    let tokens = queries.tokens();
    let mut output = Buffer::dirty(tokens * width);
    let mut sums = vec![0.0; tokens * heads];
    let mut tasks = Vec::new();
    let (mut output_left, mut sums_left) = (&mut output[..], &mut sums[..]);
    for (document, rows) in queries.iter().enumerate() {
        for first in (0..rows.len()).step_by(ROWS) {
            let count = ROWS.min(rows.len() - first);
            let (out, after) = output_left.split_at_mut(count * width);
            let (sum, sums_after) = sums_left.split_at_mut(count * heads);
            (output_left, sums_left) = (after, sums_after);
            let q = &q[(rows.start + first) * width..][..count * width];
            tasks.push((document, first, count, q, out, sum));
        }
    }
    let group = heads / options.key_heads;
    each(tasks, |(document, first, count, q, out, sums)| {
        for index in 0..heads {
            let head = head(document, index / group);
            let column = index * head.width;
            if head.queries <= FEW {
                for row in 0..count {
                    let place = row * width + column;
                    let (q, out) = (&q[place..][..head.width], &mut out[place..][..head.width]);
                    sums[row * heads + index] = few::query(&head, first + row, q, out);
                }
                continue;
            }
            let (q, out) = (&q[column..], &mut out[column..]);
            let sums = &mut sums[index..];
            forward::forward_head(&head, first, count, q, out, width, sums, heads);
        }
    });
    (output, sums)
}

/// Computes `Σ output · gradient` for each query and head, `[queries, heads]`.
fn deltas(output: &[f32], gradient: &[f32], head_width: usize) -> Vec<f32> {
    let mut deltas = vec![0.0; output.len() / head_width];
    deltas
        .par_iter_mut()
        .zip(output.par_chunks_exact(head_width))
        .zip(gradient.par_chunks_exact(head_width))
        .with_min_len(512)
        .for_each(|((delta, output), gradient)| {
            const LANES: usize = 16;
            let (outputs, output_rest) = output.as_chunks::<LANES>();
            let (gradients, gradient_rest) = gradient.as_chunks::<LANES>();
            let mut sums = [0.0; LANES];
            for (output, gradient) in outputs.iter().zip(gradients) {
                for lane in 0..LANES {
                    sums[lane] += output[lane] * gradient[lane];
                }
            }
            let rest: f32 = output_rest.iter().zip(gradient_rest).map(|(o, g)| o * g).sum();
            *delta = crate::simd::sum(sums) + rest;
        });
    deltas
}
