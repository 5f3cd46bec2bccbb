//! The backward pass over the keys of one head, with scores computed again.

use std::ops::Range;

use super::block::{self, Head, Sight, TILE};
use crate::disjoint::Columns;
use crate::simd::{self, MAX_LANES};
use crate::tile::{self, Left};

/// Keys one task owns. A query that sees more gets its gradient in as many parts.
pub(super) const KEYS: usize = 512;

/// The query heads that share a key head, and where their rows lie.
pub(super) struct Group<'a> {
    pub(super) head: Head<'a>,
    /// Rows of the document's queries, `stride` apart: queries, gradient of the output.
    pub(super) q: &'a [f32],
    pub(super) gradient: &'a [f32],
    pub(super) stride: usize,
    /// Log-sum-exp and `Σ output · gradient` of the document's queries, `heads` apart.
    pub(super) sums: &'a [f32],
    pub(super) deltas: &'a [f32],
    /// Query heads that share this key head.
    pub(super) members: Range<usize>,
    /// Columns of this key head, and the first rows of the document's queries and keys.
    pub(super) key_column: usize,
    pub(super) first_query: usize,
    pub(super) first_key: usize,
}

/// Where gradients go; `None` where nobody wants one.
pub(super) struct Gradients<'a> {
    pub(super) q: Option<&'a Columns<'a>>,
    pub(super) k: Option<&'a Columns<'a>>,
    pub(super) v: Option<&'a Columns<'a>>,
}

/// Writes what the keys `keys` of a group contribute to all three gradients.
///
/// # Safety
/// No other task may at the same time be given the same document, key head and keys, nor the same
/// document and key head with the same `to.q`.
pub(super) unsafe fn backward_group(group: &Group<'_>, keys: &Range<usize>, to: &Gradients<'_>) {
    let width = group.head.width;
    let padded = width.next_multiple_of(MAX_LANES);
    let lengths = [
        width * MAX_LANES,
        width * MAX_LANES,
        MAX_LANES * padded,
        MAX_LANES * padded,
        TILE * MAX_LANES,
        TILE * MAX_LANES,
        width * MAX_LANES,
        keys.len() * padded,
        keys.len() * padded,
    ];
    crate::scratch::with(lengths, |scratch| backward_keys(group, keys, to, scratch));
}

/// Does the work of [`backward_group`], which alone may call it, and under the same promise.
#[inline(always)]
fn keys_body<const LANES: usize, const FMA: bool>(
    group: &Group<'_>,
    keys: &Range<usize>,
    to: &Gradients<'_>,
    [qt, gt, q_rows, g_rows, weights, changes, dq, dk, dv]: [&mut [f32]; 9],
) {
    let Group { head, stride, .. } = *group;
    let width = head.width;
    let padded = width.next_multiple_of(LANES);
    let (q_rows, g_rows) = (&mut q_rows[..LANES * padded], &mut g_rows[..LANES * padded]);
    let (dk, dv) = (&mut dk[..keys.len() * padded], &mut dv[..keys.len() * padded]);
    let dq = &mut dq[..width * LANES];
    dk.fill(0.0);
    dv.fill(0.0);
    q_rows.fill(0.0);
    g_rows.fill(0.0);
    let scale = head.options.scale as f32;
    for member in group.members.clone() {
        for start in (0..head.queries).step_by(LANES) {
            let lanes = LANES.min(head.queries - start);
            let sight = Sight::<LANES>::new(&head, start, lanes);
            let runs = sight.runs(keys);
            if runs.iter().all(Range::is_empty) {
                continue;
            }
            let offset = start * stride + member * width;
            let (q, g) = (&group.q[offset..], &group.gradient[offset..]);
            block::transpose::<LANES>(q, stride, lanes, width, scale, qt);
            block::transpose::<LANES>(g, stride, lanes, width, 1.0, gt);
            copy_rows(q, stride, lanes, width, scale, q_rows, padded);
            copy_rows(g, stride, lanes, width, 1.0, g_rows, padded);
            let heads = head.options.heads;
            // Lanes beyond the last query get no weight.
            let (mut sums, mut deltas) = ([f32::INFINITY; LANES], [0.0; LANES]);
            for lane in 0..lanes {
                let place = (start + lane) * heads + member;
                (sums[lane], deltas[lane]) = (group.sums[place], group.deltas[place]);
            }
            dq.fill(0.0);
            for tile in block::tiles(runs) {
                tile_weights::<LANES, FMA>(&head, &tile, &sight, qt, &sums, weights);
                let own = (tile.start - keys.start) * padded;
                if to.v.is_some() {
                    add_rows::<LANES, FMA>(tile.len(), weights, g_rows, padded, &mut dv[own..]);
                }
                if to.q.is_none() && to.k.is_none() {
                    continue;
                }
                let left = Head::rows(head.v, tile.start, head.stride);
                tile::multiply::<LANES, FMA, false>(
                    tile.len(),
                    width,
                    left,
                    gt,
                    LANES,
                    changes,
                    LANES,
                );
                tile_changes::<LANES, FMA>(&head, &tile, qt, &deltas, weights, changes);
                if to.k.is_some() {
                    add_rows::<LANES, FMA>(tile.len(), changes, q_rows, padded, &mut dk[own..]);
                }
                if to.q.is_some() {
                    let left = Head::columns(head.k, tile.start, head.stride);
                    tile::multiply::<LANES, FMA, true>(
                        width,
                        tile.len(),
                        left,
                        changes,
                        LANES,
                        dq,
                        LANES,
                    );
                }
            }
            if let Some(to) = to.q {
                for lane in 0..lanes {
                    let row = group.first_query + start + lane;
                    // SAFETY: rows of this document, columns of this key head's members.
                    let out = unsafe { to.part(row, member * width, width) };
                    for (column, out) in out.iter_mut().enumerate() {
                        *out = dq[column * LANES + lane] * scale;
                    }
                }
            }
        }
    }
    for (to, found) in [(to.k, dk), (to.v, dv)] {
        let Some(to) = to else { continue };
        for (key, found) in keys.clone().zip(found.chunks_exact(padded)) {
            // SAFETY: rows of this task's keys, columns of this key head.
            let out = unsafe { to.part(group.first_key + key, group.key_column, width) };
            out.copy_from_slice(&found[..width]);
        }
    }
}

#[inline(always)]
fn copy_rows(
    rows: &[f32],
    stride: usize,
    count: usize,
    width: usize,
    factor: f32,
    out: &mut [f32],
    padded: usize,
) {
    for (lane, out) in out.chunks_exact_mut(padded).enumerate() {
        if lane < count {
            for (out, x) in out.iter_mut().zip(&rows[lane * stride..][..width]) {
                *out = x * factor;
            }
        } else {
            out.fill(0.0);
        }
    }
}

/// Computes the soft-max's weights `[keys, LANES]` out of the log-sum-exp of each lane.
#[inline(always)]
fn tile_weights<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    keys: &Range<usize>,
    sight: &Sight<LANES>,
    qt: &[f32],
    sums: &[f32; LANES],
    weights: &mut [f32],
) {
    block::scores::<LANES, FMA>(head, keys, qt, weights);
    let (rows, _) = weights[..keys.len() * LANES].as_chunks_mut::<LANES>();
    for row in rows.iter_mut() {
        for lane in 0..LANES {
            row[lane] = simd::exp::<FMA>(row[lane] - sums[lane]);
        }
    }
    if !sight.is_whole(keys) {
        sight.hide(keys, rows, 0.0);
    }
}

/// Turns the weights' gradient in `changes` into that of the scores before cap.
#[inline(always)]
fn tile_changes<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    keys: &Range<usize>,
    qt: &[f32],
    deltas: &[f32; LANES],
    weights: &mut [f32],
    changes: &mut [f32],
) {
    let used = keys.len() * LANES;
    let (changed, _) = changes[..used].as_chunks_mut::<LANES>();
    for (change, weight) in changed.iter_mut().zip(weights[..used].as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            change[lane] = weight[lane] * (change[lane] - deltas[lane]);
        }
    }
    if let Some(cap) = head.options.soft_cap {
        // The weights have done their work; their place takes the capped scores.
        block::scores::<LANES, FMA>(head, keys, qt, weights);
        let inverse = cap.recip() as f32;
        for (change, score) in changes[..used].iter_mut().zip(&weights[..used]) {
            let tanh = score * inverse;
            *change *= 1.0 - tanh * tanh;
        }
    }
}

/// Adds `[keys, LANES] · [LANES, padded]` to `out`, `[keys, padded]`.
#[inline(always)]
fn add_rows<const LANES: usize, const FMA: bool>(
    keys: usize,
    left: &[f32],
    right: &[f32],
    padded: usize,
    out: &mut [f32],
) {
    for column in (0..padded).step_by(LANES) {
        let left = Left { values: left, row_stride: LANES, step_stride: 1 };
        tile::multiply::<LANES, FMA, true>(
            keys,
            LANES,
            left,
            &right[column..],
            padded,
            &mut out[column..],
            padded,
        );
    }
}

simd::versions! {
    fn backward_keys(
        group: &Group<'_>,
        keys: &Range<usize>,
        to: &Gradients<'_>,
        scratch: [&mut [f32]; 9],
    ) = keys_body;
}
