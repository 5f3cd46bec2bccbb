//! Rotary position embedding.

use std::sync::Arc;

use burn_flex::FlexTensor;
use tensor::{DType, Device, Tensor, TensorData};

use crate::buffer::Buffer;
use crate::parallel::{each, rows_of};
use crate::simd::{self, fma};
use crate::tape::{Operation, apply, is_fast, values};

/// Holds the cosines and sines of every token of a batch; made once per batch for all layers.
///
/// A clone is two reference counts.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// `[tokens, rotated / 2]`
    cos: Arc<[f32]>,
    /// `[tokens, rotated / 2]`
    sin: Arc<[f32]>,
    tokens: usize,
    rotated: usize,
}

impl Rotation {
    /// Computes the angles `position · inverse_frequency` in `f64`.
    ///
    /// - `positions`: one for every token of the batch, counted within its own document
    /// - `inverse_frequencies`: `[rotated / 2]`; the first `rotated` numbers of a head are turned
    /// - `attention_scaling`: factor on cosine and sine, 1 unless the model's scaling (YaRN,
    ///   LongRoPE) has one
    pub fn new(positions: &[usize], inverse_frequencies: &[f64], attention_scaling: f64) -> Self {
        let angles = || {
            positions.iter().flat_map(|&position| {
                inverse_frequencies.iter().map(move |frequency| position as f64 * frequency)
            })
        };
        Self {
            cos: angles().map(|angle| (angle.cos() * attention_scaling) as f32).collect(),
            sin: angles().map(|angle| (angle.sin() * attention_scaling) as f32).collect(),
            tokens: positions.len(),
            rotated: 2 * inverse_frequencies.len(),
        }
    }

    /// Gives the number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Gives how many numbers of each head are turned.
    pub fn rotated(&self) -> usize {
        self.rotated
    }

    fn tables(&self, device: &Device, dtype: DType) -> [Tensor<3>; 2] {
        [&self.cos, &self.sin].map(|table| {
            let data = TensorData::new(table.to_vec(), [self.tokens, 1, self.rotated / 2]);
            Tensor::from_data(data, (device, dtype))
        })
    }
}

/// Turns the first `rotated` numbers of every head by the token's angles.
///
/// Pairs are halves apart, as in Hugging Face checkpoints: number `i` turns with `i + rotated / 2`.
///
/// # Shapes
/// - `x`: `[tokens, heads · head_width]`; returns the same
///
/// # Panics
/// When `x` has another number of tokens than `rotation`, or its width is no multiple of `heads`
/// with heads at least `rotated` wide.
///
/// # Source
/// Su et al., <https://arxiv.org/abs/2104.09864>.
pub fn rotary(x: Tensor<2>, heads: usize, rotation: &Rotation) -> Tensor<2> {
    let [tokens, width] = x.dims();
    assert_eq!(tokens, rotation.tokens, "rotary: tokens of x against tokens of the rotation");
    assert!(
        heads > 0 && width.is_multiple_of(heads) && width / heads >= rotation.rotated,
        "rotary: {heads} heads of at least {} in a width of {width}",
        rotation.rotated
    );
    if is_fast(&x) {
        let operation = Rotary { heads, rotation: rotation.clone() };
        return Tensor::from_dispatch(apply(operation, [x.into_dispatch()]));
    }
    reference(x, heads, rotation)
}

/// Computes [`rotary`] out of tensor operations, on every device and in every float type.
pub fn reference(x: Tensor<2>, heads: usize, rotation: &Rotation) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let (head_width, half) = (width / heads, rotation.rotated / 2);
    if tokens == 0 || half == 0 {
        return x;
    }
    let [cos, sin] = rotation.tables(&x.device(), x.dtype());
    let x = x.reshape([tokens, heads, head_width]);
    let low = x.clone().slice_dim(2, 0..half);
    let high = x.clone().slice_dim(2, half..2 * half);
    let mut parts =
        vec![low.clone() * cos.clone() - high.clone() * sin.clone(), high * cos + low * sin];
    if head_width > 2 * half {
        parts.push(x.slice_dim(2, 2 * half..head_width));
    }
    Tensor::cat(parts, 2).reshape([tokens, width])
}

#[derive(Clone, Debug)]
struct Rotary {
    heads: usize,
    rotation: Rotation,
}

impl Rotary {
    /// Turns forward with `direction` 1, and with -1 as the transpose does.
    fn turn(&self, x: &FlexTensor, direction: f32) -> FlexTensor {
        let Rotation { cos, sin, tokens, rotated } = &self.rotation;
        let half = rotated / 2;
        if *tokens == 0 || half == 0 {
            return x.clone();
        }
        let numbers = values(x);
        let width = numbers.len() / tokens;
        let mut out = Buffer::dirty(numbers.len());
        let rows = rows_of(width);
        each(
            numbers
                .chunks(rows * width)
                .zip(out.chunks_mut(rows * width))
                .zip(cos.chunks(rows * half).zip(sin.chunks(rows * half))),
            |((x, out), (cos, sin))| turn_rows(x, self.heads, [cos, sin], half, direction, out),
        );
        out.into_tensor([*tokens, width])
    }
}

impl Operation<1> for Rotary {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        (self.turn(&x, 1.0), ())
    }

    fn backward(&self, (): (), gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.turn(&gradient, -1.0))]
    }
}

#[inline(always)]
fn turn_body<const LANES: usize, const FMA: bool>(
    x: &[f32],
    heads: usize,
    [cos, sin]: [&[f32]; 2],
    half: usize,
    direction: f32,
    out: &mut [f32],
) {
    let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    let width = x.len() / angles.len();
    let head_width = width / heads;
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for ((x, out), (cos, sin)) in rows.zip(angles) {
        for (x, out) in x.chunks_exact(head_width).zip(out.chunks_exact_mut(head_width)) {
            let (x, x_rest) = x.split_at(2 * half);
            let (out, out_rest) = out.split_at_mut(2 * half);
            out_rest.copy_from_slice(x_rest);
            let (low, high) = x.split_at(half);
            let (out_low, out_high) = out.split_at_mut(half);
            let inputs = low.iter().zip(high).zip(cos.iter().zip(sin));
            let outputs = out_low.iter_mut().zip(out_high);
            for (((low, high), (cos, sin)), (out_low, out_high)) in inputs.zip(outputs) {
                let sin = sin * direction;
                *out_low = fma::<FMA>(*low, *cos, -high * sin);
                *out_high = fma::<FMA>(*high, *cos, low * sin);
            }
        }
    }
}

simd::versions! {
    fn turn_rows(
        x: &[f32],
        heads: usize,
        angles: [&[f32]; 2],
        half: usize,
        direction: f32,
        out: &mut [f32],
    ) = turn_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, agree, differences};

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(5);
        for _ in 0..200 {
            let (tokens, heads) = (numbers.between(1, 30), numbers.between(1, 5));
            let (half, rest) = (numbers.between(0, 20), numbers.between(0, 1) * 3);
            let positions: Vec<_> = (0..tokens).map(|_| numbers.between(0, 3000)).collect();
            let frequencies: Vec<_> = (0..half).map(|i| 0.7f64.powi(i as i32)).collect();
            let rotation = Rotation::new(&positions, &frequencies, 1.1);
            let width = heads * (2 * half + rest).max(1);
            let inputs = [numbers.matrix(tokens, width)];
            agree(
                &format!("rotary {tokens}x{heads}x{half}"),
                |x| rotary(x[0].clone(), heads, &rotation),
                |x| reference(x[0].clone(), heads, &rotation),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mut numbers = Numbers(6);
        let rotation = Rotation::new(&[0, 1, 5], &[1.0, 0.1], 1.0);
        let inputs = [numbers.matrix(3, 10)];
        differences("rotary", |x| reference(x[0].clone(), 2, &rotation), &inputs);
    }

    #[test]
    fn halves_turn_together() {
        // A quarter turn takes (a, b) to (-b, a); the last number of the head stays.
        let rotation = Rotation::new(&[1], &[std::f64::consts::FRAC_PI_2], 1.0);
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0]], &Device::flex());
        let y = crate::check::numbers(rotary(x, 1, &rotation));
        crate::check::close("rotary", &y, &[-2.0, 1.0, 3.0], 1e-7);
    }
}
