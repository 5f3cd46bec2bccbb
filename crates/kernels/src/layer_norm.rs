//! Layer norm.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::Tensor;

use crate::buffer::Buffer;
use crate::parallel::{add_rows, each, rows_of};
use crate::recompute;
use crate::simd::{self, dot, fma};
use crate::tape::{Operation, apply, from_values, is_fast, values};

/// Centres each token, divides by its standard deviation, scales and shifts:
/// `(x - mean) / √(variance + ε) · weight + bias`.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `weight`, `bias`: `[width]`; returns `[tokens, width]`
///
/// # Source
/// Ba, Kiros and Hinton, <https://arxiv.org/abs/1607.06450>.
///
/// # Panics
/// When `weight` or `bias` is not as long as a token is wide.
pub fn layer_norm(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<2> {
    let width = x.dims()[1];
    assert_eq!(weight.dims(), [width], "layer_norm: weight against the width of x");
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [width], "layer_norm: bias against the width of x");
    }
    if is_fast(&x) && is_fast(&weight) && bias.as_ref().is_none_or(is_fast) {
        let operation = LayerNorm { epsilon: epsilon as f32 };
        let inputs = [x.into_dispatch(), weight.into_dispatch()];
        return Tensor::from_dispatch(match bias {
            None => apply(operation, inputs),
            Some(bias) => {
                let [x, weight] = inputs;
                apply(operation, [x, weight, bias.into_dispatch()])
            }
        });
    }
    reference(x, weight, bias, epsilon)
}

/// Computes [`layer_norm`] out of tensor operations, on every device and in every float type.
pub fn reference(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<2> {
    let mean = x.clone().mean_dim(1);
    let centred = x - mean;
    let variance = (centred.clone() * centred.clone()).mean_dim(1);
    let scaled = centred * (variance + epsilon).sqrt().recip() * weight.unsqueeze::<2>();
    match bias {
        Some(bias) => scaled + bias.unsqueeze::<2>(),
        None => scaled,
    }
}

#[derive(Clone, Debug)]
struct LayerNorm {
    epsilon: f32,
}

/// What backward needs.
#[derive(Clone, Debug)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// `[tokens]`: mean, and one over the standard deviation
    moments: Arc<[[f32; 2]]>,
}

impl LayerNorm {
    /// Computes the output, and notes how it can be computed again where backward will run.
    fn noted(
        &self,
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        tracked: bool,
    ) -> (FlexTensor, Saved) {
        let none = vec![0.0; weight.layout().num_elements()];
        let (out, saved) = self.output(x, weight, bias.as_ref().map_or(&none[..], values));
        if tracked {
            let (operation, x, weight) = (self.clone(), saved.x.clone(), saved.weight.clone());
            recompute::note(&out, move || {
                let bias = bias.as_ref().map_or(&none[..], values);
                operation.output(x.clone(), weight.clone(), bias).0
            });
        }
        (out, saved)
    }

    fn output(&self, x: FlexTensor, weight: FlexTensor, bias: &[f32]) -> (FlexTensor, Saved) {
        let width = weight.layout().num_elements();
        let tokens = x.layout().num_elements() / width.max(1);
        let mut out = Buffer::dirty(tokens * width);
        let mut moments = vec![[0.0; 2]; tokens];
        let rows = rows_of(width);
        let chunk = (rows * width).max(1);
        each(
            values(&x).chunks(chunk).zip(out.chunks_mut(chunk)).zip(moments.chunks_mut(rows)),
            |((x, out), moments)| {
                forward_rows(x, values(&weight), bias, self.epsilon, out, moments);
            },
        );
        let out = out.into_tensor([tokens, width]);
        (out, Saved { x, weight, moments: moments.into() })
    }

    fn gradients(
        saved: Saved,
        gradient: &FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let Saved { x, weight, moments } = saved;
        let width = weight.layout().num_elements();
        let tokens = moments.len();
        let rows = rows_of(width);
        let chunk = (rows * width).max(1);
        let blocks = || {
            values(&x)
                .chunks(chunk)
                .zip(values(gradient).chunks(chunk))
                .zip(moments.chunks(rows))
                .map(|((x, g), moments)| (x, g, moments))
        };
        let dx = wanted[0].then(|| {
            let mut dx = Buffer::dirty(tokens * width);
            each(blocks().zip(dx.chunks_mut(chunk)), |((x, g, moments), dx)| {
                input_rows(x, values(&weight), g, moments, dx);
            });
            dx.into_tensor([tokens, width])
        });
        let parts = tokens.div_ceil(rows) * width;
        let dweight = wanted[1].then(|| {
            let mut sums = vec![0.0; parts];
            each(blocks().zip(sums.chunks_mut(width.max(1))), |((x, g, moments), sums)| {
                weight_rows(x, g, moments, sums);
            });
            from_values(add_rows(&sums, width), [width])
        });
        let dbias = wanted[2].then(|| {
            let mut sums = vec![0.0; parts];
            each(blocks().zip(sums.chunks_mut(width.max(1))), |((_, g, _), sums)| {
                sums.copy_from_slice(&add_rows(g, width));
            });
            from_values(add_rows(&sums, width), [width])
        });
        [dx, dweight, dbias]
    }
}

impl Operation<2> for LayerNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [FlexTensor; 2], wanted: [bool; 2]) -> (FlexTensor, Saved) {
        self.noted(x, weight, None, wanted != [false; 2])
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        [x, weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [x, weight, _] = Self::gradients(saved, &gradient, [x, weight, false]);
        [x, weight]
    }
}

impl Operation<3> for LayerNorm {
    type Saved = Saved;

    fn forward(
        &self,
        [x, weight, bias]: [FlexTensor; 3],
        wanted: [bool; 3],
    ) -> (FlexTensor, Saved) {
        self.noted(x, weight, Some(bias), wanted != [false; 3])
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        Self::gradients(saved, &gradient, wanted)
    }
}

#[inline(always)]
fn forward_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    epsilon: f32,
    out: &mut [f32],
    moments: &mut [[f32; 2]],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for ((x, out), moments) in rows.zip(moments) {
        let mean = sum::<LANES>(x) / width as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = x - mean;
        }
        let variance = dot::<LANES, FMA>(out, out) / width as f32;
        let inverse = 1.0 / (variance + epsilon).sqrt();
        *moments = [mean, inverse];
        for ((out, weight), bias) in out.iter_mut().zip(weight).zip(bias) {
            *out = fma::<FMA>(*out * inverse, *weight, *bias);
        }
    }
}

#[inline(always)]
fn input_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    gradient: &[f32],
    moments: &[[f32; 2]],
    dx: &mut [f32],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for (((x, g), [mean, inverse]), dx) in rows.zip(moments).zip(dx.chunks_exact_mut(width)) {
        for ((dx, g), weight) in dx.iter_mut().zip(g).zip(weight) {
            *dx = g * weight;
        }
        let average = sum::<LANES>(dx) / width as f32;
        let along = dot_centred::<LANES, FMA>(dx, x, *mean) / width as f32;
        let back = along * inverse * inverse;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx - average - back * (x - mean)) * inverse;
        }
    }
}

#[inline(always)]
fn weight_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    gradient: &[f32],
    moments: &[[f32; 2]],
    sums: &mut [f32],
) {
    let width = sums.len();
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((x, g), [mean, inverse]) in rows.zip(moments) {
        for ((sum, x), g) in sums.iter_mut().zip(x).zip(g) {
            *sum = fma::<FMA>((x - mean) * inverse, *g, *sum);
        }
    }
}

/// Computes `Σ a · (b - mean)`.
#[inline(always)]
fn dot_centred<const LANES: usize, const FMA: bool>(a: &[f32], b: &[f32], mean: f32) -> f32 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = fma::<FMA>(a[lane], b[lane] - mean, sums[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest);
    simd::sum(sums) + rest.fold(0.0, |sum, (a, b)| fma::<FMA>(*a, *b - mean, sum))
}

#[inline(always)]
fn sum<const LANES: usize>(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for x in chunks {
        for lane in 0..LANES {
            sums[lane] += x[lane];
        }
    }
    simd::sum(sums) + rest.iter().sum::<f32>()
}

simd::versions! {
    fn forward_rows(
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        epsilon: f32,
        out: &mut [f32],
        moments: &mut [[f32; 2]],
    ) = forward_body;
    fn input_rows(
        x: &[f32],
        weight: &[f32],
        gradient: &[f32],
        moments: &[[f32; 2]],
        dx: &mut [f32],
    ) = input_body;
    fn weight_rows(x: &[f32], gradient: &[f32], moments: &[[f32; 2]], sums: &mut [f32])
        = weight_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree, differences, vector};

    const EPSILON: f64 = 1e-5;

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(3);
        for case in 0..200 {
            let (tokens, width) = (numbers.between(1, 40), numbers.between(2, 150));
            let inputs = [
                numbers.matrix(tokens, width).map(1.0, 0.5).tracked(case % 3 != 0),
                numbers.matrix(1, width).map(0.3, 1.0).tracked(case % 2 != 0),
                numbers.matrix(1, width).tracked(case % 5 != 0),
            ];
            let with_bias = case % 4 != 0;
            let inputs = &inputs[..if with_bias { 3 } else { 2 }];
            agree(
                &format!("layer_norm {tokens}x{width}"),
                |x| layer_norm(x[0].clone(), vector(&x[1]), x.get(2).map(vector), EPSILON),
                |x| reference(x[0].clone(), vector(&x[1]), x.get(2).map(vector), EPSILON),
                inputs,
                1e-5,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mut numbers = Numbers(4);
        let inputs = [numbers.matrix(3, 5), numbers.matrix(1, 5), numbers.matrix(1, 5)];
        differences(
            "layer_norm",
            |x| reference(x[0].clone(), vector(&x[1]), Some(vector(&x[2])), EPSILON),
            &inputs,
        );
    }

    #[test]
    fn centres_and_divides_by_the_deviation() {
        let device = tensor::Device::flex();
        let x = Tensor::<2>::from_floats([[1.0, 3.0, 1.0, 3.0]], &device);
        let weight = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device);
        let bias = Tensor::<1>::from_floats([0.0, 0.0, 10.0, 10.0], &device);
        let y = crate::check::numbers(layer_norm(x, weight, Some(bias), 0.0));
        crate::check::close("layer_norm", &y, &[-1.0, 2.0, 7.0, 14.0], 1e-6);
    }
}
