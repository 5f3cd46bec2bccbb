//! Attention within documents.

mod backward;
mod block;
mod cache;
mod fast;
mod few;
mod forward;
pub mod reference;

pub use cache::{KeyValues, attention_over_cache};

use std::ops::Range;

use tensor::Tensor;

use crate::spans::Spans;
use crate::tape::{apply, is_fast};

/// Says how queries see keys.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; each serves `heads / key_heads` query heads in a row.
    pub key_heads: usize,
    /// Width of one head.
    pub head_width: usize,
    /// Factor on the scores, usually `1 / √head_width`.
    pub scale: f64,
    /// Whether a query sees only keys up to its own place.
    pub causal: bool,
    /// How many keys a causal query sees, its own included; without `causal` the window reaches
    /// equally far to both sides.
    pub window: Option<usize>,
    /// `cap · tanh(scores / cap)`, as in Gemma 2.
    pub soft_cap: Option<f64>,
    /// How many keys at the start of every document all of its queries see.
    pub prefix: usize,
}

impl AttentionOptions {
    /// Gives causal attention with the usual scale `1 / √head_width`.
    pub fn causal(heads: usize, key_heads: usize, head_width: usize) -> Self {
        let scale = (head_width as f64).sqrt().recip();
        Self {
            heads,
            key_heads,
            head_width,
            scale,
            causal: true,
            window: None,
            soft_cap: None,
            prefix: 0,
        }
    }

    /// Gives the keys that query `t` of `queries` sees among `keys`, the prefix aside.
    ///
    /// The last query stands at the last key, so the queries may be the end of a longer text
    /// whose earlier keys come from a cache.
    pub fn visible(&self, t: usize, queries: usize, keys: usize) -> Range<usize> {
        // One past the place of this query among the keys; negative places see nothing before them.
        let end = (t + 1 + keys).checked_sub(queries);
        let high = match (self.causal, self.window, end) {
            (true, _, end) => end.unwrap_or(0),
            (false, Some(window), _) => (t + keys + window).saturating_sub(queries),
            (false, None, _) => keys,
        };
        let low = match self.window {
            Some(window) => (t + 1 + keys).saturating_sub(queries + window),
            None => 0,
        };
        let high = high.min(keys);
        low.min(high)..high
    }

    fn check(&self, q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, queries: &Spans, keys: &Spans) {
        let Self { heads, key_heads, head_width, .. } = *self;
        assert!(
            key_heads > 0 && heads.is_multiple_of(key_heads),
            "attention: {heads} heads cannot share {key_heads} key heads"
        );
        assert_eq!(
            queries.documents(),
            keys.documents(),
            "attention: documents of queries and of keys"
        );
        let key_shape = [keys.tokens(), key_heads * head_width];
        assert_eq!(q.dims(), [queries.tokens(), heads * head_width], "attention: shape of q");
        assert_eq!(k.dims(), key_shape, "attention: shape of k");
        assert_eq!(v.dims(), key_shape, "attention: shape of v");
    }
}

/// Computes `softmax(scale · q kᵀ) v` for each head, every document by itself.
///
/// Queries of document `i` see keys of document `i` only. A causal query `t` of `Tq` over `Tk`
/// keys sees keys `j ≤ t + (Tk - Tq)`; under a window `w` also `j > t + (Tk - Tq) - w`; the first
/// `prefix` keys of its document always. A query that sees no key gives zeros.
///
/// # Shapes
/// - `q`: `[queries, heads · head_width]`; `k`, `v`: `[keys, key_heads · head_width]`
/// - returns `[queries, heads · head_width]`
///
/// # Panics
/// When shapes, spans and options do not fit each other.
///
/// # Cost and determinism
/// The fast path never holds the score matrix: it walks tiles, keeps one number a query and head,
/// and computes scores again in backward (Dao et al., <https://arxiv.org/abs/2205.14135>).
/// Every number is the work of one task, so threads do not change its bits.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    queries: &Spans,
    keys: &Spans,
    options: &AttentionOptions,
) -> Tensor<2> {
    options.check(&q, &k, &v, queries, keys);
    if is_fast(&q) && is_fast(&k) && is_fast(&v) {
        let operation = fast::Attention {
            options: options.clone(),
            queries: queries.clone(),
            keys: keys.clone(),
        };
        let inputs = [q, k, v].map(Tensor::into_dispatch);
        return Tensor::from_dispatch(apply(operation, inputs));
    }
    reference::attention(q, k, v, queries, keys, options)
}

#[cfg(test)]
mod tests;
