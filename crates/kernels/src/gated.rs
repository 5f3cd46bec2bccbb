//! Gated activations: SwiGLU, GeGLU and their kin.

use tensor::Tensor;

use crate::activation::{self, Activation};

/// Multiplies one projection by the activation of another: `activation(gate) · up`.
///
/// [`Activation::Silu`] makes it SwiGLU, the GELUs make it GeGLU.
///
/// # Shapes
/// - `gate`, `up`: `[tokens, width]`; returns the same
///
/// # Source
/// Shazeer, <https://arxiv.org/abs/2002.05202>.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gated: shapes of gate and up");
    reference(gate, up, activation)
}

/// Computes [`gated`] out of tensor operations, on every device and in every float type.
pub fn reference(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    activation::reference(gate, activation) * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::tests::ALL;
    use crate::check::{Numbers, agree, differences};

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(9);
        for case in 0..200 {
            let activation = ALL[case % ALL.len()];
            let (tokens, width) = (numbers.between(1, 20), numbers.between(1, 70));
            let inputs = [
                numbers.matrix(tokens, width).map(2.0, 0.0).tracked(case % 3 != 0),
                numbers.matrix(tokens, width).tracked(case % 5 != 0),
            ];
            agree(
                &format!("gated {activation:?}"),
                |x| gated(x[0].clone(), x[1].clone(), activation),
                |x| reference(x[0].clone(), x[1].clone(), activation),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        let mut numbers = Numbers(10);
        let inputs = [numbers.matrix(2, 5), numbers.matrix(2, 5)];
        differences("gated", |x| reference(x[0].clone(), x[1].clone(), Activation::Silu), &inputs);
    }
}
