//! A query by itself, as in generation: numbers of the head are lanes, not queries.

use super::block::{self, Head, TILE};
use crate::simd::{self, fma};

/// Queries of a document up to which each is taken by itself; in blocks most lanes would idle.
pub(super) const FEW: usize = 4;

/// Writes the output of query `t` and gives its log-sum-exp.
#[inline(always)]
fn query_body<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    t: usize,
    q: &[f32],
    out: &mut [f32],
) -> f32 {
    let options = head.options;
    let scale = options.scale as f32;
    let prefix = options.prefix.min(head.keys);
    let visible = options.visible(t, head.queries, head.keys);
    let after = visible.start.max(prefix)..visible.end.max(prefix);
    let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
    let mut scores = [0.0f32; TILE];
    out.fill(0.0);
    for keys in block::tiles([0..prefix, after]) {
        let scores = &mut scores[..keys.len()];
        let mut top = largest;
        for (score, key) in scores.iter_mut().zip(keys.clone()) {
            let key = &head.k[key * head.stride..][..head.width];
            *score = simd::dot::<LANES, FMA>(q, key) * scale;
            if let Some(cap) = options.soft_cap {
                let cap = cap as f32;
                *score = cap * simd::tanh::<FMA>(*score / cap);
            }
            top = simd::larger(*score, top);
        }
        if top > largest {
            let fade = simd::exp::<FMA>(largest - top);
            sum *= fade;
            for x in out.iter_mut() {
                *x *= fade;
            }
            largest = top;
        }
        for score in scores.iter_mut() {
            *score = simd::exp::<FMA>(*score - largest);
        }
        for (share, key) in scores.iter().zip(keys) {
            sum += share;
            for (out, v) in out.iter_mut().zip(&head.v[key * head.stride..][..head.width]) {
                *out = fma::<FMA>(*share, *v, *out);
            }
        }
    }
    if sum == 0.0 {
        // Saw nothing: zeros, and no weight to any key in backward.
        return f32::INFINITY;
    }
    let share = sum.recip();
    for x in out {
        *x *= share;
    }
    largest + sum.ln()
}

simd::versions! {
    pub(super) fn query(head: &Head<'_>, t: usize, q: &[f32], out: &mut [f32]) -> f32 = query_body;
}
