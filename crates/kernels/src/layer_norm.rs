//! Layer norm.

use tensor::Tensor;

/// Centres each token, divides by its standard deviation, scales and shifts:
/// `(x - mean) / √(variance + ε) · weight + bias`.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `weight`, `bias`: `[width]`; returns `[tokens, width]`
///
/// # Source
/// Ba, Kiros and Hinton, <https://arxiv.org/abs/1607.06450>.
pub fn layer_norm(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<2> {
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
