//! The forward pass over one block of queries after the other.

use super::block::{self, Head, Sight, TILE};
use crate::simd::{self, MAX_LANES};
use crate::tile;

/// Rows of queries one task computes; a multiple of every number of lanes.
pub(super) const ROWS: usize = 64;

/// Writes output and log-sum-exp of the queries `first..first + count` of a document, for one head.
///
/// - `q`: from this head's first column of query `first` on, `stride` to the next query
/// - `out`: as `q`; `sums`: from this head's number on, `sums_stride` to the next query
pub(super) fn forward_head(
    head: &Head<'_>,
    first: usize,
    count: usize,
    q: &[f32],
    out: &mut [f32],
    stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let block = head.width * MAX_LANES;
    crate::scratch::with([block, TILE * MAX_LANES, block], |scratch| {
        forward_rows(head, first, count, q, out, stride, sums, sums_stride, scratch);
    });
}

#[inline(always)]
fn rows_body<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    first: usize,
    count: usize,
    q: &[f32],
    out: &mut [f32],
    stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
    [qt, scores, ot]: [&mut [f32]; 3],
) {
    let width = head.width;
    let ot = &mut ot[..width * LANES];
    for start in (0..count).step_by(LANES) {
        let lanes = LANES.min(count - start);
        let scale = head.options.scale as f32;
        block::transpose::<LANES>(&q[start * stride..], stride, lanes, width, scale, qt);
        let (largest, sum) = block_body::<LANES, FMA>(head, first + start, lanes, qt, scores, ot);
        for lane in 0..lanes {
            let row = start + lane;
            let blind = sum[lane] == 0.0;
            // A query that saw nothing gives zeros, and no weight to any key in backward.
            let share = if blind { 0.0 } else { sum[lane].recip() };
            sums[row * sums_stride] =
                if blind { f32::INFINITY } else { largest[lane] + sum[lane].ln() };
            let out = &mut out[row * stride..][..width];
            for (column, out) in out.iter_mut().enumerate() {
                *out = ot[column * LANES + lane] * share;
            }
        }
    }
}

/// Accumulates one block; returns each lane's largest score and sum of exponentials above it.
#[inline(always)]
fn block_body<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    start: usize,
    lanes: usize,
    qt: &[f32],
    scores: &mut [f32],
    ot: &mut [f32],
) -> ([f32; LANES], [f32; LANES]) {
    let sight = Sight::<LANES>::new(head, start, lanes);
    let (mut largest, mut sum) = ([f32::NEG_INFINITY; LANES], [0.0f32; LANES]);
    ot.fill(0.0);
    for keys in block::tiles(sight.runs(&(0..head.keys))) {
        block::scores::<LANES, FMA>(head, &keys, qt, scores);
        let (rows, _) = scores[..keys.len() * LANES].as_chunks_mut::<LANES>();
        if !sight.is_whole(&keys) {
            sight.hide(&keys, rows, f32::NEG_INFINITY);
        }
        let before = largest;
        for row in rows.iter() {
            for lane in 0..LANES {
                largest[lane] = simd::larger(row[lane], largest[lane]);
            }
        }
        let (mut shift, mut fade) = ([0.0; LANES], [0.0; LANES]);
        for lane in 0..LANES {
            // A lane that has seen nothing yet has no finite score to subtract.
            shift[lane] = if largest[lane] == f32::NEG_INFINITY { 0.0 } else { largest[lane] };
            fade[lane] = simd::exp::<FMA>(before[lane] - shift[lane]);
        }
        if before != largest {
            for lane in 0..LANES {
                sum[lane] *= fade[lane];
            }
            for row in ot.as_chunks_mut::<LANES>().0 {
                for lane in 0..LANES {
                    row[lane] *= fade[lane];
                }
            }
        }
        for row in rows.iter_mut() {
            for lane in 0..LANES {
                row[lane] = simd::exp::<FMA>(row[lane] - shift[lane]);
                sum[lane] += row[lane];
            }
        }
        let left = Head::columns(head.v, keys.start, head.stride);
        tile::multiply::<LANES, FMA, true>(head.width, keys.len(), left, scores, LANES, ot, LANES);
    }
    (largest, sum)
}

simd::versions! {
    fn forward_rows(
        head: &Head<'_>,
        first: usize,
        count: usize,
        q: &[f32],
        out: &mut [f32],
        stride: usize,
        sums: &mut [f32],
        sums_stride: usize,
        scratch: [&mut [f32]; 3],
    ) = rows_body;
}
