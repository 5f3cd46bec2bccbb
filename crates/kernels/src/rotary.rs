//! Rotary position embedding.

use std::sync::Arc;

use tensor::{DType, Device, Tensor, TensorData};

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
