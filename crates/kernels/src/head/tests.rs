use std::sync::Arc;

use super::*;
use crate::check::{Input, Numbers, agree, close, differences, numbers, run, vector};
use crate::matrix::{Form, PackedMatrix};
use tensor::{DType, Device};

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
        ..HeadOptions::default()
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
fn a_plain_sum_of_losses_has_the_same_gradients() {
    let mut source = Numbers(24);
    for _ in 0..200 {
        let (tokens, width) = (source.between(1, 40), source.between(1, 30));
        let rows = source.between(1, 90);
        let case = case(&mut source, tokens, width, rows);
        agree(
            &format!("sum of token_losses {tokens}x{width}x{rows} {:?}", case.options),
            |x| {
                let table = Table::Trainable(x[1].clone());
                let options = with_bias(&case.options, x);
                token_losses(x[0].clone(), &table, &case.labels, &options).sum()
            },
            |x| by_reference(x, &case).sum(),
            &case.inputs,
            1e-5,
        );
    }
}

#[test]
fn a_frozen_head_gives_the_same_in_every_form() {
    let mut source = Numbers(15);
    for index in 0..200 {
        let (tokens, width) = (source.between(1, 40), source.between(1, 30));
        let rows = source.between(1, 90);
        let mut case = case(&mut source, tokens, width, rows);
        case.inputs[1].tracked = false;
        let values: Vec<f32> = case.inputs[1].values.iter().map(|x| *x as f32).collect();
        let form = [Form::F32, Form::Bf16][index % 2];
        let head = PackedMatrix::from_f32(rows, width, values, form).unwrap();
        case.inputs[1].values = head.to_f32().into_iter().map(f64::from).collect();
        let head = Arc::new(head);
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
fn many_tokens_and_words_take_several_tiles() {
    let mut source = Numbers(22);
    for _ in 0..3 {
        let mut case = case(&mut source, 300, 8, 2500);
        case.inputs.iter_mut().for_each(|input| input.tracked = true);
        case.labels[..280].fill(Some(1));
        let losses = |x: &[Tensor<2>]| {
            let table = Table::Trainable(x[1].clone());
            token_losses(x[0].clone(), &table, &case.labels, &with_bias(&case.options, x))
        };
        let wanted = |x: &[Tensor<2>]| by_reference(x, &case);
        agree("token_losses, tiles", losses, wanted, &case.inputs, 1e-5);
        let (losses, wanted) =
            (|x: &[Tensor<2>]| losses(x).sum(), |x: &[Tensor<2>]| wanted(x).sum());
        agree("sum of token_losses, tiles", losses, wanted, &case.inputs, 1e-5);
    }
}

#[test]
fn threads_do_not_change_bits() {
    let mut source = Numbers(23);
    let mut case = case(&mut source, 300, 40, 1500);
    case.inputs.iter_mut().for_each(|input| input.tracked = true);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let losses = |x: &[Tensor<2>]| {
            let table = Table::Trainable(x[1].clone());
            token_losses(x[0].clone(), &table, &case.labels, &with_bias(&case.options, x))
        };
        pool.install(|| {
            let sum = |x: &[Tensor<2>]| losses(x).sum();
            (run(losses, &case.inputs, DType::F32), run(sum, &case.inputs, DType::F32))
        })
    };
    assert_eq!(on(1), on(2));
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

#[test]
fn rows_without_a_label_cost_nothing() {
    let mut source = Numbers(24);
    let (tokens, width, rows) = (60, 20, 300);
    let mut case = case(&mut source, tokens, width, rows);
    for frozen in [true, false] {
        case.inputs.iter_mut().for_each(|input| input.tracked = true);
        case.inputs[1].tracked = !frozen;
        for labelled in [1, 7, 60] {
            case.labels =
                (0..tokens).map(|t| (t % (tokens / labelled) == 0).then_some(3)).collect();
            let count = case.labels.iter().flatten().count();
            let losses = |x: &[Tensor<2>]| {
                let table = Table::Trainable(x[1].clone());
                let options = with_bias(&case.options, x);
                let losses = token_losses(x[0].clone(), &table, &case.labels, &options);
                if frozen { losses } else { losses.sum() }
            };
            let (_, work) = crate::work::counted(|| run(losses, &case.inputs, DType::F32));
            // Logits and the input's gradient; of losses that weigh the same a weight that trains
            // gets its own from the same logits, else they are computed again.
            let products = match (frozen, case.inputs.len()) {
                (true, 2) => 2,
                (true, _) => 3,
                (false, _) => 3,
            };
            assert_eq!(work.products, (products * count * width * rows) as u64, "{count} labels");
        }
    }
}
