//! RMS norm.

use tensor::Tensor;

/// Divides each token by its root mean square and scales it: `x / √(mean(x²) + ε) · weight`.
///
/// # Shapes
/// - `x`: `[tokens, width]`; `weight`: `[width]`; returns `[tokens, width]`
///
/// # Source
/// Zhang and Sennrich, <https://arxiv.org/abs/1910.07467>.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    reference(x, weight, epsilon)
}

/// Computes [`rms_norm`] out of tensor operations, on every device and in every float type.
pub fn reference(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let mean = (x.clone() * x.clone()).mean_dim(1);
    x * (mean + epsilon).sqrt().recip() * weight.unsqueeze::<2>()
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
