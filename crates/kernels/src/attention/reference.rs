//! Attention with the whole score matrix, document by document.

use tensor::activation::softmax;
use tensor::{Bool, Device, Tensor, TensorData};

use super::AttentionOptions;
use crate::spans::Spans;

/// Computes [`attention`](super::attention) out of tensor operations, on every device and in every
/// float type.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    queries: &Spans,
    keys: &Spans,
    options: &AttentionOptions,
) -> Tensor<2> {
    let documents: Vec<_> = queries
        .iter()
        .zip(keys.iter())
        .filter(|(queries, _)| !queries.is_empty())
        .map(|(queries, keys)| {
            let q = q.clone().slice_dim(0, queries);
            if keys.is_empty() {
                return q.zeros_like();
            }
            let k = k.clone().slice_dim(0, keys.clone());
            document(q, k, v.clone().slice_dim(0, keys), options)
        })
        .collect();
    if documents.is_empty() { q } else { Tensor::cat(documents, 0) }
}

fn document(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, options: &AttentionOptions) -> Tensor<2> {
    let AttentionOptions { heads, key_heads, head_width, .. } = *options;
    let (queries, keys) = (q.dims()[0], k.dims()[0]);
    let q = q.reshape([queries, heads, head_width]).swap_dims(0, 1);
    let [k, v] = [k, v].map(|x| {
        x.reshape([keys, key_heads, head_width])
            .swap_dims(0, 1)
            .unsqueeze_dim::<4>(1)
            .repeat_dim(1, heads / key_heads)
            .reshape([heads, keys, head_width])
    });
    let mut scores = q.matmul(k.swap_dims(1, 2)) * options.scale;
    if let Some(cap) = options.soft_cap {
        scores = (scores / cap).tanh() * cap;
    }
    let [hidden, blocked] = masks(queries, keys, options, &scores.device())
        .map(|mask| mask.unsqueeze::<3>().expand([heads, queries, keys]));
    let weights = softmax(scores.mask_fill(blocked, f64::NEG_INFINITY), 2).mask_fill(hidden, 0.0);
    weights.matmul(v).swap_dims(0, 1).reshape([queries, heads * head_width])
}

/// Gives `[queries, keys]` twice: which keys are hidden, and which of them the soft-max must not
/// see. They differ in queries that see nothing, whose soft-max would be over nothing.
fn masks(
    queries: usize,
    keys: usize,
    options: &AttentionOptions,
    device: &Device,
) -> [Tensor<2, Bool>; 2] {
    let hidden: Vec<Vec<bool>> = (0..queries)
        .map(|t| {
            let visible = options.visible(t, queries, keys);
            (0..keys).map(|j| !(visible.contains(&j) || j < options.prefix)).collect()
        })
        .collect();
    let blocked = hidden.iter().map(|row| {
        let blind = row.iter().all(|hidden| *hidden);
        row.iter().map(|hidden| *hidden && !blind).collect::<Vec<_>>()
    });
    let blocked = blocked.flatten().collect();
    [hidden.concat(), blocked]
        .map(|mask| Tensor::from_data(TensorData::new(mask, [queries, keys]), device))
}
