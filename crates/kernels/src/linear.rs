//! Linear layers: trainable, frozen, and frozen with a low-rank change.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{Tensor, TensorData};

use crate::buffer::Buffer;
use crate::matrix::{Arithmetic, PackedMatrix, product, product_nt, product_tn};
use crate::parallel::add_rows;
use crate::recompute::Kept;
use crate::tape::{Operation, apply, from_values, is_fast, values};

/// Applies a linear layer of which everything may be trainable: `x · Wᵀ + b`.
///
/// # Shapes
/// - `x`: `[tokens, in]`; `weight`: `[out, in]`; `bias`: `[out]`; returns `[tokens, out]`
/// # Panics
/// If the shapes do not fit together.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    linear_in(Arithmetic::F32, x, weight, bias)
}

/// Applies [`linear`] in a chosen arithmetic, forward and backward.
///
/// # Panics
/// If the shapes do not fit together.
pub fn linear_in(
    arithmetic: Arithmetic,
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<2> {
    let [out, width] = weight.dims();
    check(&x, width, bias.as_ref(), out);
    if !(is_fast(&x) && is_fast(&weight) && bias.as_ref().is_none_or(is_fast)) {
        return linear_reference(x, weight, bias);
    }
    let operation = Dense { arithmetic };
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias {
        None => apply(operation, [x, weight]),
        Some(bias) => apply(operation, [x, weight, bias.into_dispatch()]),
    })
}

/// Computes [`linear`] out of tensor operations, on every device and in every float type.
pub fn linear_reference(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let y = x.matmul(weight.transpose());
    match bias {
        None => y,
        Some(bias) => y + bias.unsqueeze::<2>(),
    }
}

/// Applies a linear layer with a frozen weight: `x · Wᵀ + b`.
///
/// The input gets a gradient, and the bias if it is tracked. Nothing is kept for the backward pass
/// but the weight, which is shared. The weight's [`Arithmetic`] holds in both directions.
///
/// # Shapes
/// - `x`: `[tokens, in]`; `weight`: `[out, in]`; `bias`: `[out]`; returns `[tokens, out]`
/// # Panics
/// If the shapes do not fit together.
pub fn linear_frozen(
    x: Tensor<2>,
    weight: &Arc<PackedMatrix>,
    bias: Option<Tensor<1>>,
) -> Tensor<2> {
    check(&x, weight.columns(), bias.as_ref(), weight.rows());
    if !(is_fast(&x) && bias.as_ref().is_none_or(is_fast)) {
        return linear_frozen_reference(x, weight, bias);
    }
    let operation = Frozen { weight: Arc::clone(weight) };
    Tensor::from_dispatch(match bias {
        None => apply(operation, [x.into_dispatch()]),
        Some(bias) => apply(operation, [x.into_dispatch(), bias.into_dispatch()]),
    })
}

/// Computes [`linear_frozen`] out of tensor operations, with the weight unpacked.
pub fn linear_frozen_reference(
    x: Tensor<2>,
    weight: &PackedMatrix,
    bias: Option<Tensor<1>>,
) -> Tensor<2> {
    let weight = unpacked(weight, &x);
    linear_reference(x, weight, bias)
}

/// Applies a frozen linear layer with a low-rank change: `x · Wᵀ + scale · (x · Aᵀ) · Bᵀ + b`.
///
/// One node and one pass over the output. Kept for the backward pass are the input (shared) and the
/// `[tokens, r]` between the two factors.
///
/// # Shapes
/// - `x`: `[tokens, in]`; `weight`: `[out, in]`; `bias`: `[out]`
/// - `a`: `[r, in]`; `b`: `[out, r]`; returns `[tokens, out]`
/// # Panics
/// If the shapes do not fit together.
/// # Source
/// Hu et al., <https://arxiv.org/abs/2106.09685>.
pub fn linear_low_rank(
    x: Tensor<2>,
    weight: &Arc<PackedMatrix>,
    bias: Option<Tensor<1>>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    check(&x, weight.columns(), bias.as_ref(), weight.rows());
    let rank = a.dims()[0];
    assert_eq!(a.dims(), [rank, weight.columns()], "the change's first factor is not [r, in]");
    assert_eq!(b.dims(), [weight.rows(), rank], "the change's second factor is not [out, r]");
    let fast = is_fast(&x) && is_fast(&a) && is_fast(&b) && bias.as_ref().is_none_or(is_fast);
    if !fast {
        return linear_low_rank_reference(x, weight, bias, a, b, scale);
    }
    let operation = LowRank { weight: Arc::clone(weight), scale: scale as f32 };
    let (x, a, b) = (x.into_dispatch(), a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(match bias {
        None => apply(operation, [x, a, b]),
        Some(bias) => apply(operation, [x, a, b, bias.into_dispatch()]),
    })
}

/// Computes [`linear_low_rank`] out of tensor operations, with the weight unpacked.
pub fn linear_low_rank_reference(
    x: Tensor<2>,
    weight: &PackedMatrix,
    bias: Option<Tensor<1>>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let change = x.clone().matmul(a.transpose()).matmul(b.transpose()) * scale;
    linear_frozen_reference(x, weight, bias) + change
}

/// Multiplies two matrices, both possibly tracked: `a · b`.
///
/// # Shapes
/// - `a`: `[m, k]`; `b`: `[k, n]`; returns `[m, n]`
/// # Panics
/// If the shapes do not fit together.
pub fn matmul(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    assert_eq!(a.dims()[1], b.dims()[0], "columns of the first factor and rows of the second");
    if !(is_fast(&a) && is_fast(&b)) {
        return a.matmul(b);
    }
    Tensor::from_dispatch(apply(Product, [a.into_dispatch(), b.into_dispatch()]))
}

/// Multiplies a matrix with the transpose of another, both possibly tracked: `a · bᵀ`.
///
/// # Shapes
/// - `a`: `[m, k]`; `b`: `[n, k]`; returns `[m, n]`
/// # Panics
/// If the shapes do not fit together.
pub fn matmul_nt(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    linear(a, b, None)
}

fn check(x: &Tensor<2>, width: usize, bias: Option<&Tensor<1>>, out: usize) {
    assert_eq!(x.dims()[1], width, "the width of a linear layer's input");
    if let Some(bias) = bias {
        assert_eq!(bias.dims(), [out], "the width of a linear layer's bias");
    }
}

fn unpacked(weight: &PackedMatrix, like: &Tensor<2>) -> Tensor<2> {
    let data = TensorData::new(weight.to_f32(), [weight.rows(), weight.columns()]);
    Tensor::from_data(data, (&like.device(), like.dtype()))
}

fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// Adds up the rows of a `[tokens, width]` gradient, in order.
pub(crate) fn sum_of_rows(gradient: &FlexTensor) -> FlexTensor {
    let [_, width] = dims(gradient);
    from_values(add_rows(values(gradient), width), [width])
}

/// The optional bias: the input that may follow the first `first` of `N`.
fn bias_of<const N: usize>(inputs: &[FlexTensor; N], first: usize) -> Option<&[f32]> {
    inputs.get(first).map(values)
}

fn bias_gradient<const N: usize>(
    first: usize,
    wanted: [bool; N],
    gradient: &FlexTensor,
) -> Option<FlexTensor> {
    wanted.get(first).is_some_and(|wanted| *wanted).then(|| sum_of_rows(gradient))
}

/// Gradients in the order of the inputs; a bias there is the last.
fn gradients<const N: usize>(
    found: impl IntoIterator<Item = Option<FlexTensor>>,
) -> [Option<FlexTensor>; N] {
    let mut found = found.into_iter();
    std::array::from_fn(|_| found.next().flatten())
}

/// Inputs `x`, `weight` and perhaps `bias`.
#[derive(Clone, Debug)]
struct Dense {
    arithmetic: Arithmetic,
}

impl<const N: usize> Operation<N> for Dense {
    type Saved = (Option<Kept>, Option<FlexTensor>);

    fn forward(&self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Self::Saved) {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let ([n, width], [out, _]) = (dims(x), dims(weight));
        let mut y = Buffer::dirty(n * out);
        let bias = bias_of(&inputs, 2);
        product_nt(self.arithmetic, [n, width, out], values(x), values(weight), bias, &mut y);
        let saved = (wanted[1].then(|| Kept::of(x)), wanted[0].then(|| weight.clone()));
        (y.into_tensor([n, out]), saved)
    }

    fn backward(
        &self,
        (x, weight): Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let [n, out] = dims(&gradient);
        let dy = values(&gradient);
        let dx = weight.map(|weight| {
            let [_, width] = dims(&weight);
            let mut dx = Buffer::dirty(n * width);
            product(self.arithmetic, [n, out, width], dy, values(&weight), &mut dx);
            dx.into_tensor([n, width])
        });
        let dw = x.map(|x| {
            let x = x.tensor();
            let [_, width] = dims(x);
            let mut dw = Buffer::dirty(out * width);
            product_tn(self.arithmetic, [out, n, width], dy, values(x), &mut dw);
            dw.into_tensor([out, width])
        });
        gradients([dx, dw, bias_gradient(2, wanted, &gradient)])
    }
}

/// Inputs `x` and perhaps `bias`.
#[derive(Clone, Debug)]
struct Frozen {
    weight: Arc<PackedMatrix>,
}

impl<const N: usize> Operation<N> for Frozen {
    type Saved = ();

    fn forward(&self, inputs: [FlexTensor; N], _: [bool; N]) -> (FlexTensor, ()) {
        let [n, _] = dims(&inputs[0]);
        let out = self.weight.rows();
        let mut y = Buffer::dirty(n * out);
        self.weight.multiply(values(&inputs[0]), n, &mut y, bias_of(&inputs, 1));
        (y.into_tensor([n, out]), ())
    }

    fn backward(&self, (): (), gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let [n, _] = dims(&gradient);
        let width = self.weight.columns();
        let dx = wanted[0].then(|| {
            let mut dx = Buffer::dirty(n * width);
            self.weight.multiply_transposed(values(&gradient), n, &mut dx);
            dx.into_tensor([n, width])
        });
        gradients([dx, bias_gradient(1, wanted, &gradient)])
    }
}

/// Inputs `x`, `a`, `b` and perhaps `bias`.
#[derive(Clone, Debug)]
struct LowRank {
    weight: Arc<PackedMatrix>,
    scale: f32,
}

/// What [`LowRank`] keeps, each only where a gradient needs it.
#[derive(Clone, Debug)]
struct LowRankSaved {
    x: Option<Kept>,
    /// `scale · x · Aᵀ`.
    u: Option<FlexTensor>,
    a: Option<FlexTensor>,
    b: Option<FlexTensor>,
    rank: usize,
}

impl LowRank {
    fn scaled(&self, mut values: Buffer) -> Buffer {
        for x in values.iter_mut() {
            *x *= self.scale;
        }
        values
    }
}

impl<const N: usize> Operation<N> for LowRank {
    type Saved = LowRankSaved;

    fn forward(&self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Self::Saved) {
        let (x, a, b) = (&inputs[0], &inputs[1], &inputs[2]);
        let ([n, width], [rank, _]) = (dims(x), dims(a));
        let (out, arithmetic) = (self.weight.rows(), self.weight.arithmetic());
        let mut u = Buffer::dirty(n * rank);
        product_nt(arithmetic, [n, width, rank], values(x), values(a), None, &mut u);
        let u = self.scaled(u);
        let mut y = Buffer::dirty(n * out);
        let change = (&u[..], values(b), rank);
        self.weight.multiply_low_rank(values(x), change, n, &mut y, bias_of(&inputs, 3));
        let saved = LowRankSaved {
            x: wanted[1].then(|| Kept::of(x)),
            u: wanted[2].then(|| u.into_tensor([n, rank])),
            a: wanted[0].then(|| a.clone()),
            b: (wanted[0] || wanted[1]).then(|| b.clone()),
            rank,
        };
        (y.into_tensor([n, out]), saved)
    }

    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let [n, out] = dims(&gradient);
        let dy = values(&gradient);
        let (width, rank) = (self.weight.columns(), saved.rank);
        let arithmetic = self.weight.arithmetic();
        let du = saved.b.map(|b| {
            let mut du = Buffer::dirty(n * rank);
            product(arithmetic, [n, out, rank], dy, values(&b), &mut du);
            self.scaled(du)
        });
        let du = du.as_deref();
        let dx = saved.a.zip(du).map(|(a, du)| {
            let mut dx = Buffer::dirty(n * width);
            let change = (du, values(&a), rank);
            self.weight.multiply_transposed_low_rank(dy, change, n, &mut dx);
            dx.into_tensor([n, width])
        });
        let da = saved.x.zip(du).map(|(x, du)| {
            let mut da = Buffer::dirty(rank * width);
            product_tn(arithmetic, [rank, n, width], du, values(x.tensor()), &mut da);
            da.into_tensor([rank, width])
        });
        let db = saved.u.map(|u| {
            let mut db = Buffer::dirty(out * rank);
            product_tn(arithmetic, [out, n, rank], dy, values(&u), &mut db);
            db.into_tensor([out, rank])
        });
        gradients([dx, da, db, bias_gradient(3, wanted, &gradient)])
    }
}

/// Inputs `a` and `b`.
#[derive(Clone, Debug)]
struct Product;

impl Operation<2> for Product {
    type Saved = [Option<FlexTensor>; 2];

    fn forward(&self, [a, b]: [FlexTensor; 2], wanted: [bool; 2]) -> (FlexTensor, Self::Saved) {
        let ([m, k], [_, n]) = (dims(&a), dims(&b));
        let mut out = Buffer::dirty(m * n);
        product(Arithmetic::F32, [m, k, n], values(&a), values(&b), &mut out);
        (out.into_tensor([m, n]), [wanted[1].then_some(a), wanted[0].then_some(b)])
    }

    fn backward(
        &self,
        [a, b]: Self::Saved,
        gradient: FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [m, n] = dims(&gradient);
        let dy = values(&gradient);
        let da = b.map(|b| {
            let [k, _] = dims(&b);
            let mut da = Buffer::dirty(m * k);
            product_nt(Arithmetic::F32, [m, n, k], dy, values(&b), None, &mut da);
            da.into_tensor([m, k])
        });
        let db = a.map(|a| {
            let [_, k] = dims(&a);
            let mut db = Buffer::dirty(k * n);
            product_tn(Arithmetic::F32, [k, m, n], values(&a), dy, &mut db);
            db.into_tensor([k, n])
        });
        [da, db]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Input, Numbers, agree, differences, vector};
    use crate::matrix::Form;

    const SIZES: [usize; 9] = [1, 2, 3, 8, 16, 17, 33, 50, 130];

    /// Tracks every other input of every other case, and drops the bias in two cases of five.
    fn varied(case: usize, inputs: &[Input]) -> Vec<Input> {
        let keep = inputs.len() - usize::from(case % 5 < 2);
        let inputs = inputs[..keep].iter().cloned().enumerate();
        inputs.map(|(index, input)| input.tracked(case >> index & 1 == 0)).collect()
    }

    fn frozen(numbers: &mut Numbers, rows: usize, columns: usize) -> Arc<PackedMatrix> {
        let form = numbers.pick(&[Form::F32, Form::Bf16]);
        let values: Vec<f32> = (0..rows * columns).map(|_| numbers.normal() as f32).collect();
        Arc::new(PackedMatrix::from_f32(rows, columns, values, form).unwrap())
    }

    fn bias_at(x: &[Tensor<2>], index: usize) -> Option<Tensor<1>> {
        x.get(index).map(vector)
    }

    #[test]
    fn trainable_fast_is_the_reference() {
        let mut numbers = Numbers(1);
        for case in 0..200 {
            let [n, width, out] = [(); 3].map(|()| numbers.pick(&SIZES));
            let inputs =
                [numbers.matrix(n, width), numbers.matrix(out, width), numbers.matrix(1, out)];
            agree(
                &format!("linear {n}x{width}x{out}"),
                |x| linear(x[0].clone(), x[1].clone(), bias_at(x, 2)),
                |x| linear_reference(x[0].clone(), x[1].clone(), bias_at(x, 2)),
                &varied(case, &inputs),
                1e-5,
            );
        }
    }

    #[test]
    fn frozen_fast_is_the_reference() {
        let mut numbers = Numbers(2);
        for case in 0..200 {
            let [n, width, out] = [(); 3].map(|()| numbers.pick(&SIZES));
            let weight = frozen(&mut numbers, out, width);
            let inputs = [numbers.matrix(n, width), numbers.matrix(1, out)];
            agree(
                &format!("frozen {n}x{width}x{out}"),
                |x| linear_frozen(x[0].clone(), &weight, bias_at(x, 1)),
                |x| linear_frozen_reference(x[0].clone(), &weight, bias_at(x, 1)),
                &varied(case, &inputs),
                1e-5,
            );
        }
    }

    #[test]
    fn low_rank_fast_is_the_reference() {
        let mut numbers = Numbers(3);
        for case in 0..200 {
            let [n, width, out] = [(); 3].map(|()| numbers.pick(&SIZES));
            let (rank, scale) = (numbers.between(1, 20), numbers.pick(&[0.25, 2.0]));
            let weight = frozen(&mut numbers, out, width);
            let inputs = [
                numbers.matrix(n, width),
                numbers.matrix(rank, width),
                numbers.matrix(out, rank),
                numbers.matrix(1, out),
            ];
            agree(
                &format!("low rank {n}x{width}x{out}, r {rank}"),
                |x| {
                    let [a, b] = [x[1].clone(), x[2].clone()];
                    linear_low_rank(x[0].clone(), &weight, bias_at(x, 3), a, b, scale)
                },
                |x| {
                    let [a, b] = [x[1].clone(), x[2].clone()];
                    linear_low_rank_reference(x[0].clone(), &weight, bias_at(x, 3), a, b, scale)
                },
                &varied(case, &inputs),
                1e-5,
            );
        }
    }

    #[test]
    fn plain_products_are_the_reference() {
        let mut numbers = Numbers(4);
        for case in 0..200 {
            let [m, k, n] = [(); 3].map(|()| numbers.pick(&SIZES));
            let tracked = [case % 2 == 0, case % 3 == 0];
            let a = numbers.matrix(m, k).tracked(tracked[0]);
            let b = numbers.matrix(k, n).tracked(tracked[1]);
            agree(
                &format!("{m}x{k}x{n}"),
                |x| matmul(x[0].clone(), x[1].clone()),
                |x| x[0].clone().matmul(x[1].clone()),
                &[a.clone(), b],
                1e-5,
            );
            let b = numbers.matrix(n, k).tracked(tracked[1]);
            agree(
                &format!("{m}x{k}x{n}, transposed"),
                |x| matmul_nt(x[0].clone(), x[1].clone()),
                |x| x[0].clone().matmul(x[1].clone().transpose()),
                &[a, b],
                1e-5,
            );
        }
    }

    #[test]
    fn references_follow_their_differences() {
        let mut numbers = Numbers(5);
        let inputs = [numbers.matrix(3, 4), numbers.matrix(5, 4), numbers.matrix(1, 5)];
        differences(
            "linear",
            |x| linear_reference(x[0].clone(), x[1].clone(), bias_at(x, 2)),
            &inputs,
        );
        let weight = frozen(&mut numbers, 5, 4);
        let inputs = [numbers.matrix(3, 4), numbers.matrix(1, 5)];
        differences(
            "frozen",
            |x| linear_frozen_reference(x[0].clone(), &weight, bias_at(x, 1)),
            &inputs,
        );
        let inputs = [
            numbers.matrix(3, 4),
            numbers.matrix(2, 4),
            numbers.matrix(5, 2),
            numbers.matrix(1, 5),
        ];
        differences(
            "low rank",
            |x| {
                let [a, b] = [x[1].clone(), x[2].clone()];
                linear_low_rank_reference(x[0].clone(), &weight, bias_at(x, 3), a, b, 0.5)
            },
            &inputs,
        );
    }

    /// Of sums of at least sixteen products: in short ones terms cancel and their rounding does not.
    #[test]
    fn bf16_arithmetic_stays_within_its_rounding() {
        let mut numbers = Numbers(6);
        for case in 0..200 {
            let [n, width, out] = [(); 3].map(|()| numbers.pick(&SIZES[4..]));
            let weight = frozen(&mut numbers, out, width);
            let weight = Arc::new((*weight).clone().with_arithmetic(Arithmetic::Bf16));
            let rank = numbers.between(1, 9);
            let inputs = [
                numbers.matrix(n, width),
                numbers.matrix(rank, width),
                numbers.matrix(out, rank),
                numbers.matrix(1, out),
            ];
            agree(
                &format!("low rank {n}x{width}x{out}, r {rank}"),
                |x| {
                    let [a, b] = [x[1].clone(), x[2].clone()];
                    linear_low_rank(x[0].clone(), &weight, bias_at(x, 3), a, b, 0.5)
                },
                |x| {
                    let [a, b] = [x[1].clone(), x[2].clone()];
                    linear_low_rank_reference(x[0].clone(), &weight, bias_at(x, 3), a, b, 0.5)
                },
                &varied(case, &inputs),
                1e-2,
            );
        }
    }
}
