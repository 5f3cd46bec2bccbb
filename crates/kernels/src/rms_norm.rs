//! RMS norm.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::Tensor;

use crate::buffer::Buffer;
use crate::parallel::{each, rows_of};
use crate::recompute;
use crate::simd::{self, dot, fma};
use crate::tape::{Operation, apply, from_values, is_fast, values};

/// Divides each token by its root mean square and scales it: `x / √(mean(x²) + ε) · weight`.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `weight`: `[width]`; returns `[tokens, width]`
///
/// # Source
/// Zhang and Sennrich, <https://arxiv.org/abs/1910.07467>.
///
/// # Panics
/// When `weight` is not as long as a token is wide.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "rms_norm: width of x against that of weight");
    if is_fast(&x) && is_fast(&weight) {
        let operation = RmsNorm { epsilon: epsilon as f32 };
        let inputs = [x.into_dispatch(), weight.into_dispatch()];
        return Tensor::from_dispatch(apply(operation, inputs));
    }
    reference(x, weight, epsilon)
}

/// Computes [`rms_norm`] out of tensor operations, on every device and in every float type.
pub fn reference(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let mean = (x.clone() * x.clone()).mean_dim(1);
    x * (mean + epsilon).sqrt().recip() * weight.unsqueeze::<2>()
}

#[derive(Clone, Debug)]
struct RmsNorm {
    epsilon: f32,
}

/// What backward needs.
#[derive(Clone, Debug)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// `[tokens]`, one over the root mean square
    inverse: Arc<[f32]>,
}

impl RmsNorm {
    /// Gives the output, and one over the root mean square of each token.
    fn output(&self, x: &FlexTensor, weight: &FlexTensor) -> (FlexTensor, Vec<f32>) {
        let width = weight.layout().num_elements();
        let tokens = x.layout().num_elements() / width.max(1);
        let mut out = Buffer::dirty(tokens * width);
        let mut inverse = vec![0.0; tokens];
        let rows = rows_of(width);
        let chunk = (rows * width).max(1);
        each(
            values(x).chunks(chunk).zip(out.chunks_mut(chunk)).zip(inverse.chunks_mut(rows)),
            |((x, out), inverse)| forward_rows(x, values(weight), self.epsilon, out, inverse),
        );
        (out.into_tensor([tokens, width]), inverse)
    }
}

impl Operation<2> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [FlexTensor; 2], wanted: [bool; 2]) -> (FlexTensor, Saved) {
        let (out, inverse) = self.output(&x, &weight);
        if wanted != [false; 2] {
            let (operation, x, weight) = (self.clone(), x.clone(), weight.clone());
            recompute::note(&out, move || operation.output(&x, &weight).0);
        }
        (out, Saved { x, weight, inverse: inverse.into() })
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let Saved { x, weight, inverse } = saved;
        let width = weight.layout().num_elements();
        let tokens = inverse.len();
        let rows = rows_of(width);
        let chunk = (rows * width).max(1);
        let mut dx = Buffer::dirty(if wanted[0] { tokens * width } else { 0 });
        if wanted[0] {
            each(
                values(&x)
                    .chunks(chunk)
                    .zip(values(&gradient).chunks(chunk))
                    .zip(inverse.chunks(rows))
                    .zip(dx.chunks_mut(chunk)),
                |(((x, g), inverse), dx)| input_rows(x, values(&weight), g, inverse, dx),
            );
        }
        let dweight = wanted[1].then(|| {
            let parts = tokens.div_ceil(rows);
            let mut sums = vec![0.0; parts * width];
            each(
                values(&x)
                    .chunks(chunk)
                    .zip(values(&gradient).chunks(chunk))
                    .zip(inverse.chunks(rows))
                    .zip(sums.chunks_mut(width.max(1))),
                |(((x, g), inverse), sums)| weight_rows(x, g, inverse, sums),
            );
            from_values(crate::parallel::add_rows(&sums, width), [width])
        });
        [wanted[0].then(|| dx.into_tensor([tokens, width])), dweight]
    }
}

#[inline(always)]
fn forward_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
    inverse: &mut [f32],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for ((x, out), inverse) in rows.zip(inverse) {
        let mean = dot::<LANES, FMA>(x, x) / width as f32;
        *inverse = 1.0 / (mean + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * *inverse * weight;
        }
    }
}

#[inline(always)]
fn input_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    gradient: &[f32],
    inverse: &[f32],
    dx: &mut [f32],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for (((x, g), inverse), dx) in rows.zip(inverse).zip(dx.chunks_exact_mut(width)) {
        for ((dx, g), weight) in dx.iter_mut().zip(g).zip(weight) {
            *dx = g * weight * inverse;
        }
        let back = dot::<LANES, FMA>(dx, x) * inverse * inverse / width as f32;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = fma::<FMA>(-back, *x, *dx);
        }
    }
}

#[inline(always)]
fn weight_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    gradient: &[f32],
    inverse: &[f32],
    sums: &mut [f32],
) {
    let width = sums.len();
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((x, g), inverse) in rows.zip(inverse) {
        for ((sum, x), g) in sums.iter_mut().zip(x).zip(g) {
            *sum = fma::<FMA>(x * inverse, *g, *sum);
        }
    }
}

simd::versions! {
    fn forward_rows(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], inverse: &mut [f32])
        = forward_body;
    fn input_rows(x: &[f32], weight: &[f32], gradient: &[f32], inverse: &[f32], dx: &mut [f32])
        = input_body;
    fn weight_rows(x: &[f32], gradient: &[f32], inverse: &[f32], sums: &mut [f32]) = weight_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree, differences, vector};

    const EPSILON: f64 = 1e-5;

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(1);
        for case in 0..200 {
            let (tokens, width) = (numbers.between(1, 40), numbers.between(1, 150));
            let inputs = [
                numbers.matrix(tokens, width).tracked(case % 3 != 0),
                numbers.matrix(1, width).map(0.3, 1.0).tracked(case % 2 != 0),
            ];
            agree(
                &format!("rms_norm {tokens}x{width}"),
                |x| rms_norm(x[0].clone(), vector(&x[1]), EPSILON),
                |x| reference(x[0].clone(), vector(&x[1]), EPSILON),
                &inputs,
                5e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mut numbers = Numbers(2);
        let inputs = [numbers.matrix(3, 5), numbers.matrix(1, 5)];
        differences("rms_norm", |x| reference(x[0].clone(), vector(&x[1]), EPSILON), &inputs);
    }

    #[test]
    fn divides_by_the_root_mean_square() {
        let device = tensor::Device::flex();
        let x = Tensor::<2>::from_floats([[3.0, 4.0, 0.0, 0.0]], &device);
        let weight = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device);
        // mean square 25/4, root 5/2
        let y = crate::check::numbers(rms_norm(x, weight, 0.0));
        crate::check::close("rms_norm", &y, &[1.2, 3.2, 0.0, 0.0], 1e-6);
    }
}
