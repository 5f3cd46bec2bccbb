//! One block of queries, a lane each, against tiles of keys.
//!
//! Scores lie transposed, `[keys, lanes]`: maxima and sums run down the keys for all queries at
//! once, and every product reads keys and values where they are.

use std::ops::Range;

use super::AttentionOptions;
use crate::simd;
use crate::tile::{self, Left};

/// Keys of one tile.
pub(super) const TILE: usize = 64;

/// Describes the head at which a task works.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    /// Keys of the document from this head's first column on.
    pub(super) k: &'a [f32],
    /// Values of the document from this head's first column on.
    pub(super) v: &'a [f32],
    /// From one key to the next in `k` and `v`.
    pub(super) stride: usize,
    /// Width of the head.
    pub(super) width: usize,
    pub(super) options: &'a AttentionOptions,
    /// Queries and keys of the document.
    pub(super) queries: usize,
    pub(super) keys: usize,
}

impl<'a> Head<'a> {
    /// `[keys, width]` from key `start` on.
    #[inline(always)]
    pub(super) fn rows(values: &'a [f32], start: usize, stride: usize) -> Left<'a> {
        Left { values: &values[start * stride..], row_stride: stride, step_stride: 1 }
    }

    /// `[width, keys]` from key `start` on.
    #[inline(always)]
    pub(super) fn columns(values: &'a [f32], start: usize, stride: usize) -> Left<'a> {
        Left { values: &values[start * stride..], row_stride: 1, step_stride: stride }
    }
}

/// What each lane's query sees.
pub(super) struct Sight<const LANES: usize> {
    low: [i32; LANES],
    high: [i32; LANES],
    prefix: i32,
}

impl<const LANES: usize> Sight<LANES> {
    /// Looks at queries `start..start + count`; lanes beyond repeat the last query.
    #[inline(always)]
    pub(super) fn new(head: &Head<'_>, start: usize, count: usize) -> Self {
        let (mut low, mut high) = ([0; LANES], [0; LANES]);
        for lane in 0..LANES {
            let t = start + lane.min(count - 1);
            let visible = head.options.visible(t, head.queries, head.keys);
            (low[lane], high[lane]) = (visible.start as i32, visible.end as i32);
        }
        Self { low, high, prefix: head.options.prefix.min(head.keys) as i32 }
    }

    /// Gives the two runs of keys that some lane sees, cut to `within`.
    #[inline(always)]
    pub(super) fn runs(&self, within: &Range<usize>) -> [Range<usize>; 2] {
        let prefix = self.prefix as usize;
        let low = self.low.iter().copied().min().unwrap_or(0) as usize;
        let high = self.high.iter().copied().max().unwrap_or(0) as usize;
        [0..prefix, low.max(prefix)..high.max(prefix)].map(|run| {
            let end = run.end.min(within.end);
            run.start.max(within.start).min(end)..end
        })
    }

    /// Tells whether every lane sees all of `keys`.
    #[inline(always)]
    pub(super) fn is_whole(&self, keys: &Range<usize>) -> bool {
        let (start, end) = (keys.start as i32, keys.end as i32);
        end <= self.prefix
            || self.low.iter().all(|low| *low <= start) && self.high.iter().all(|high| end <= *high)
    }

    /// Writes `hidden` over the scores of keys a lane does not see.
    #[inline(always)]
    pub(super) fn hide(&self, keys: &Range<usize>, scores: &mut [[f32; LANES]], hidden: f32) {
        for (key, row) in (keys.start as i32..).zip(scores) {
            if key < self.prefix {
                continue;
            }
            for (score, (low, high)) in row.iter_mut().zip(self.low.iter().zip(&self.high)) {
                let seen = *low <= key && key < *high;
                *score = if seen { *score } else { hidden };
            }
        }
    }
}

/// Writes queries `[count, width]` as `[width, LANES]`, times `factor`; lanes beyond are 0.
#[inline(always)]
pub(super) fn transpose<const LANES: usize>(
    rows: &[f32],
    stride: usize,
    count: usize,
    width: usize,
    factor: f32,
    out: &mut [f32],
) {
    let (out, _) = out.as_chunks_mut::<LANES>();
    for (column, out) in out[..width].iter_mut().enumerate() {
        for (lane, out) in out.iter_mut().enumerate() {
            *out = if lane < count { rows[lane * stride + column] * factor } else { 0.0 };
        }
    }
}

/// Computes the scores of `keys` with the queries in `q`, capped but not hidden.
#[inline(always)]
pub(super) fn scores<const LANES: usize, const FMA: bool>(
    head: &Head<'_>,
    keys: &Range<usize>,
    q: &[f32],
    out: &mut [f32],
) {
    let left = Head::rows(head.k, keys.start, head.stride);
    tile::multiply::<LANES, FMA, false>(keys.len(), head.width, left, q, LANES, out, LANES);
    if let Some(cap) = head.options.soft_cap {
        let (cap, inverse) = (cap as f32, cap.recip() as f32);
        for score in &mut out[..keys.len() * LANES] {
            *score = cap * simd::tanh::<FMA>(*score * inverse);
        }
    }
}

/// Splits runs of keys into tiles.
#[inline(always)]
pub(super) fn tiles(runs: [Range<usize>; 2]) -> impl Iterator<Item = Range<usize>> {
    runs.into_iter().flat_map(|run| {
        run.clone().step_by(TILE).map(move |start| start..(start + TILE).min(run.end))
    })
}
