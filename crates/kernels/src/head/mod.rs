//! Cross-entropy fused with the output head.

mod fast;
mod learned;

use tensor::activation::log_softmax;
use tensor::{Bool, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::matrix::Arithmetic;
use crate::table::Table;
use crate::tape::{apply, is_fast};

/// What lies between the product with the head and the soft-max.
#[derive(Clone, Debug)]
pub struct HeadOptions {
    /// Added to the product, `[vocabulary]`; gets a gradient if it is tracked.
    pub bias: Option<Tensor<1>>,
    /// Factor on the logits, before the cap.
    pub scale: f64,
    /// `cap · tanh(logits / cap)`, as in Gemma 2.
    pub soft_cap: Option<f64>,
    /// How products with a trainable head are computed; a frozen one has its own.
    pub arithmetic: Arithmetic,
}

impl Default for HeadOptions {
    /// No bias, no factor, no cap, in `f32`.
    fn default() -> Self {
        Self { bias: None, scale: 1.0, soft_cap: None, arithmetic: Arithmetic::F32 }
    }
}

/// Computes the cross-entropy of every token's next word: `-log softmax(x · headᵀ)[label]`.
///
/// Tokens without a label have loss 0 and cost nothing. Labels are not shifted here.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `labels`: one per token; returns `[tokens]`
///
/// # Cost
/// The fast path walks tiles of the vocabulary with a running soft-max, so the logits of a few
/// hundred tokens by a thousand words exist at a time. The same walk sums up each loss's gradient
/// by its token, because that does not depend on what comes after. Where head or bias train, their
/// gradients are made in it too, and up to 128 MiB of logits exist at a time; only losses that are
/// weighed differently need the logits again in backward.
///
/// # Panics
/// When shapes do not fit or a label is outside the vocabulary.
pub fn token_losses(
    x: Tensor<2>,
    head: &Table,
    labels: &[Option<u32>],
    options: &HeadOptions,
) -> Tensor<1> {
    let [tokens, width] = x.dims();
    let rows = head.rows();
    assert_eq!(tokens, labels.len(), "token_losses: tokens against labels");
    assert_eq!(width, head.columns(), "token_losses: width of x against that of the head");
    if let Some(bias) = &options.bias {
        assert_eq!(bias.dims(), [rows], "token_losses: bias against vocabulary");
    }
    if let Some(label) = labels.iter().flatten().max() {
        assert!((*label as usize) < rows, "token_losses: label {label} in a vocabulary of {rows}");
    }
    let on_cpu = is_fast(&x) && options.bias.as_ref().is_none_or(is_fast);
    let (frozen, weight) = match head {
        Table::Frozen(matrix) => (Some(matrix.clone()), None),
        Table::Trainable(tensor) => (None, Some(tensor.clone())),
    };
    if tokens == 0 || !on_cpu || !weight.as_ref().is_none_or(is_fast) {
        return reference(x, head, labels, options);
    }
    let operation = fast::Head::new(frozen, labels, options);
    let x = x.into_dispatch();
    let weight = weight.map(Tensor::into_dispatch);
    let bias = options.bias.clone().map(Tensor::into_dispatch);
    Tensor::from_dispatch(match (weight, bias) {
        (None, None) => apply(operation, [x]),
        (Some(other), None) | (None, Some(other)) => apply(operation, [x, other]),
        (Some(weight), Some(bias)) => apply(operation, [x, weight, bias]),
    })
}

/// Computes [`token_losses`] out of tensor operations, on every device and in every float type.
pub fn reference(
    x: Tensor<2>,
    head: &Table,
    labels: &[Option<u32>],
    options: &HeadOptions,
) -> Tensor<1> {
    let (device, tokens) = (x.device(), labels.len());
    let losses = Tensor::<1>::zeros([tokens], (&device, x.dtype()));
    let (mut places, mut words): (Vec<i64>, Vec<i64>) = labels
        .iter()
        .enumerate()
        .filter_map(|(place, label)| label.map(|label| (place as i64, i64::from(label))))
        .unzip();
    let unlabelled = places.is_empty();
    if unlabelled {
        if tokens == 0 {
            return losses;
        }
        // One loss, taken back below, keeps the zeros a function of what is tracked.
        (places, words) = (vec![0], vec![0]);
    }
    let count = places.len();
    let head = head.dense(&device, x.dtype());
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
    let words = Tensor::<2, Int>::from_data(TensorData::new(words, [count, 1]), &device);
    let mut logits = x.select(0, places.clone()).matmul(head.transpose());
    if let Some(bias) = &options.bias {
        logits = logits + bias.clone().unsqueeze::<2>();
    }
    logits = logits * options.scale;
    if let Some(cap) = options.soft_cap {
        logits = (logits / cap).tanh() * cap;
    }
    let mut found = log_softmax(logits, 1).gather(1, words).neg().reshape([count]);
    if unlabelled {
        let all = Tensor::<1, Bool>::from_data(TensorData::new(vec![true], [1]), &device);
        found = found.mask_fill(all, 0.0);
    }
    losses.select_assign(0, places, found, IndexingUpdateOp::Add)
}

#[cfg(test)]
mod tests;
