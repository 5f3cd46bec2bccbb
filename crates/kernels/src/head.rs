//! Cross-entropy fused with the output head.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::activation::log_softmax;
use tensor::{Bool, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::matrix::PackedMatrix;
use crate::parallel::each;
use crate::table::Table;
use crate::tape::{Operation, apply, from_values, is_fast, values};

/// What lies between the product with the head and the soft-max.
#[derive(Clone, Debug)]
pub struct HeadOptions {
    /// Added to the product, `[vocabulary]`; gets a gradient if it is tracked.
    pub bias: Option<Tensor<1>>,
    /// Factor on the logits, before the cap.
    pub scale: f64,
    /// `cap · tanh(logits / cap)`, as in Gemma 2.
    pub soft_cap: Option<f64>,
}

impl Default for HeadOptions {
    /// No bias, no factor, no cap.
    fn default() -> Self {
        Self { bias: None, scale: 1.0, soft_cap: None }
    }
}

/// Computes the cross-entropy of every token's next word: `-log softmax(x · headᵀ)[label]`.
///
/// Tokens without a label have loss 0 and cost nothing. Labels are not shifted here.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `labels`: one per token; returns `[tokens]`
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
    if let (Table::Frozen(matrix), None) = (head, &options.bias)
        && is_fast(&x)
        && tokens > 0
    {
        let operation = FrozenHead {
            matrix: Arc::clone(matrix),
            labels: labels.into(),
            scale: options.scale,
            soft_cap: options.soft_cap,
        };
        return Tensor::from_dispatch(apply(operation, [x.into_dispatch()]));
    }
    reference(x, head, labels, options)
}

/// Labelled tokens whose logits exist at once.
const CHUNK: usize = 64;

/// Cross-entropy with a frozen head, without the logits of the whole batch.
///
/// A token's loss depends on its own state only, so the gradient for an upstream gradient of 1 is
/// made while the logits are there; backward multiplies each row by its own number.
#[derive(Clone, Debug)]
struct FrozenHead {
    matrix: Arc<PackedMatrix>,
    labels: Arc<[Option<u32>]>,
    scale: f64,
    soft_cap: Option<f64>,
}

impl FrozenHead {
    /// Returns place and label of each labelled token.
    fn labelled(&self) -> Vec<(usize, usize)> {
        let of = |(place, label): (usize, &Option<u32>)| Some((place, (*label)? as usize));
        self.labels.iter().enumerate().filter_map(of).collect()
    }

    /// Returns the loss of one token, and leaves its gradient in place of the logits.
    fn loss(&self, logits: &mut [f32], label: usize) -> f32 {
        let (scale, cap) = (self.scale as f32, self.soft_cap.map(|cap| cap as f32));
        let bent = |logit: f32| {
            let logit = logit * scale;
            cap.map_or(logit, |cap| cap * (logit / cap).tanh())
        };
        let largest = logits.iter().fold(f32::NEG_INFINITY, |top, l| top.max(bent(*l)));
        let sum: f64 = logits.iter().map(|l| f64::from((bent(*l) - largest).exp())).sum();
        let loss = f64::from(largest) + sum.ln() - f64::from(bent(logits[label]));
        let inverse = (1.0 / sum) as f32;
        for (word, logit) in logits.iter_mut().enumerate() {
            let value = bent(*logit);
            let share = (value - largest).exp() * inverse - f32::from(u8::from(word == label));
            let slope = cap.map_or(scale, |cap| scale * (1.0 - (value / cap).powi(2)));
            *logit = share * slope;
        }
        loss as f32
    }
}

impl Operation<1> for FrozenHead {
    /// `[labelled tokens, width]`, the gradient of each loss for its token; empty if unwanted.
    type Saved = Arc<[f32]>;

    fn forward(&self, [x]: [FlexTensor; 1], [wanted]: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let (width, words) = (self.matrix.columns(), self.matrix.rows());
        let labelled = self.labelled();
        let mut losses = vec![0.0; self.labels.len()];
        let mut unit = vec![0.0; if wanted { labelled.len() * width } else { 0 }];
        let x = values(&x);
        for (index, chunk) in labelled.chunks(CHUNK).enumerate() {
            let rows: Vec<f32> = chunk
                .iter()
                .flat_map(|(place, _)| x[place * width..(place + 1) * width].iter().copied())
                .collect();
            let mut logits = vec![0.0; chunk.len() * words];
            self.matrix.multiply(&rows, chunk.len(), &mut logits, None);
            let mut found = vec![0.0; chunk.len()];
            each(
                logits.chunks_mut(words).zip(chunk).zip(&mut found),
                |((logits, (_, label)), found)| *found = self.loss(logits, *label),
            );
            for ((place, _), loss) in chunk.iter().zip(found) {
                losses[*place] = loss;
            }
            if wanted {
                let out = &mut unit[index * CHUNK * width..][..chunk.len() * width];
                self.matrix.multiply_transposed(&logits, chunk.len(), out);
            }
        }
        (from_values(losses, [self.labels.len()]), unit.into())
    }

    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        [wanted]: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let width = self.matrix.columns();
        let upstream = values(&gradient);
        [wanted.then(|| {
            let mut dx = vec![0.0; self.labels.len() * width];
            for ((place, _), unit) in self.labelled().into_iter().zip(saved.chunks_exact(width)) {
                let row = &mut dx[place * width..(place + 1) * width];
                for (d, u) in row.iter_mut().zip(unit) {
                    *d = u * upstream[place];
                }
            }
            from_values(dx, [self.labels.len(), width])
        })]
    }
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
mod tests {
    use super::*;
    use crate::check::{Input, Numbers, agree, close, differences, numbers, vector};
    use crate::matrix::Form;
    use tensor::Device;

    struct Case {
        inputs: Vec<Input>,
        labels: Vec<Option<u32>>,
        options: HeadOptions,
    }

    /// Inputs are `x`, the head and, in some cases, a bias.
    fn case(source: &mut Numbers, tokens: usize, width: usize, rows: usize) -> Case {
        let mut inputs = vec![source.matrix(tokens, width), source.matrix(rows, width)];
        if source.chance() {
            inputs.push(source.matrix(1, rows));
        }
        for input in &mut inputs {
            input.tracked = source.between(0, 3) > 0;
        }
        let labels = (0..tokens)
            .map(|_| (source.between(0, 2) > 0).then(|| source.between(0, rows - 1) as u32))
            .collect();
        let options = HeadOptions {
            bias: None,
            scale: source.pick(&[1.0, 0.25]),
            soft_cap: source.pick(&[None, Some(3.0)]),
        };
        Case { inputs, labels, options }
    }

    fn with_bias(options: &HeadOptions, x: &[Tensor<2>]) -> HeadOptions {
        HeadOptions { bias: x.get(2).map(vector), ..options.clone() }
    }

    fn by_reference(x: &[Tensor<2>], case: &Case) -> Tensor<1> {
        let options = with_bias(&case.options, x);
        reference(x[0].clone(), &Table::Trainable(x[1].clone()), &case.labels, &options)
    }

    #[test]
    fn fast_is_the_reference() {
        let mut source = Numbers(14);
        for _ in 0..200 {
            let (tokens, width) = (source.between(1, 40), source.between(1, 30));
            let rows = source.between(1, 90);
            let case = case(&mut source, tokens, width, rows);
            agree(
                &format!("token_losses {tokens}x{width}x{rows} {:?}", case.options),
                |x| {
                    let table = Table::Trainable(x[1].clone());
                    token_losses(x[0].clone(), &table, &case.labels, &with_bias(&case.options, x))
                },
                |x| by_reference(x, &case),
                &case.inputs,
                1e-5,
            );
        }
    }

    #[test]
    fn a_frozen_head_gives_the_same() {
        let mut source = Numbers(15);
        for _ in 0..50 {
            let (tokens, width) = (source.between(1, 40), source.between(1, 30));
            let rows = source.between(1, 90);
            let mut case = case(&mut source, tokens, width, rows);
            case.inputs[1].tracked = false;
            let values: Vec<f32> = case.inputs[1].values.iter().map(|x| *x as f32).collect();
            let head = Arc::new(
                PackedMatrix::from_f32(rows, width, values.as_slice(), Form::F32).unwrap(),
            );
            agree(
                "token_losses, frozen",
                |x| {
                    let table = Table::Frozen(head.clone());
                    token_losses(x[0].clone(), &table, &case.labels, &with_bias(&case.options, x))
                },
                |x| by_reference(x, &case),
                &case.inputs,
                1e-5,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mut source = Numbers(16);
        for _ in 0..8 {
            let mut case = case(&mut source, 4, 3, 5);
            case.labels = vec![Some(4), None, Some(0), Some(4)];
            case.inputs.iter_mut().for_each(|input| input.tracked = true);
            differences("token_losses", |x| by_reference(x, &case), &case.inputs);
        }
    }

    #[test]
    fn loss_is_the_log_of_the_words_share() {
        // Logits 0 and ln 3: shares 1/4 and 3/4.
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[1.0], [1.0], [1.0]], &device);
        let head = Table::Trainable(Tensor::from_floats([[0.0], [3.0f32.ln()]], &device));
        let labels = [Some(0), None, Some(1)];
        let losses = numbers(token_losses(x, &head, &labels, &HeadOptions::default()));
        close("losses", &losses, &[4.0f64.ln(), 0.0, (4.0f64 / 3.0).ln()], 1e-6);
    }

    #[test]
    fn no_labels_cost_nothing_and_lose_nothing() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[1.0], [2.0]], &device);
        let head = Table::Trainable(Tensor::from_floats([[1.0]], &device));
        let losses = token_losses(x, &head, &[None, None], &HeadOptions::default());
        assert_eq!(numbers(losses), [0.0, 0.0]);
    }
}
