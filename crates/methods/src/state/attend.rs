//! Attention of a text over keys that a method adds.

use retune_core::kernels::{AttentionOptions, Spans, attention};
use tensor::Tensor;

/// Lets every query see the same keys and nothing else.
///
/// # Shapes
/// - `queries`: `[tokens, heads · head width]`
/// - `keys`, `values`: `[n, key heads · head width]`
pub fn beside(
    queries: &Tensor<2>,
    keys: Tensor<2>,
    values: Tensor<2>,
    options: &AttentionOptions,
) -> Tensor<2> {
    let options = AttentionOptions {
        causal: false,
        window: None,
        soft_cap: None,
        prefix: 0,
        ..options.clone()
    };
    let [seeing, seen] = [queries, &keys].map(|rows| Spans::from_lengths([rows.dims()[0]]));
    attention(queries.clone(), keys, values, &seeing, &seen, &options)
}
