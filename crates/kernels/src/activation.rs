//! Activation functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use tensor::Tensor;
use tensor::activation::{relu, sigmoid};

/// Names an element-wise activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x · sigmoid(x)`, also called swish
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))`
    Gelu,
    /// `x · sigmoid(1.702 x)`
    QuickGelu,
    /// `max(x, 0)`
    Relu,
    /// `tanh(x)`
    Tanh,
    /// `x`
    Identity,
}

/// Applies an activation function to every element.
///
/// # Shapes
/// - `x`: `[tokens, width]`; returns the same
pub fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    reference(x, activation)
}

/// Computes [`activate`] out of tensor operations, on every device and in every float type.
pub fn reference(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Silu => x.clone() * sigmoid(x),
        Activation::GeluTanh => {
            let cube = x.clone() * x.clone() * x.clone();
            let inner = (x.clone() + cube * 0.044715) * (FRAC_2_SQRT_PI * FRAC_1_SQRT_2);
            x * (inner.tanh() + 1.0) * 0.5
        }
        Activation::Gelu => x.clone() * ((x * FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Activation::QuickGelu => x.clone() * sigmoid(x * 1.702),
        Activation::Relu => relu(x),
        Activation::Tanh => x.tanh(),
        Activation::Identity => x,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::check::{Numbers, agree, close, differences, numbers};

    pub(crate) const ALL: [Activation; 7] = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::Tanh,
        Activation::Identity,
    ];

    #[test]
    fn fast_is_the_reference() {
        let mut numbers = Numbers(7);
        for case in 0..200 {
            let activation = ALL[case % ALL.len()];
            let (tokens, width) = (numbers.between(1, 20), numbers.between(1, 70));
            let inputs = [numbers.matrix(tokens, width).map(3.0, 0.0).tracked(case % 5 != 0)];
            agree(
                &format!("{activation:?}"),
                |x| activate(x[0].clone(), activation),
                |x| reference(x[0].clone(), activation),
                &inputs,
                1e-6,
            );
        }
    }

    #[test]
    fn reference_follows_its_differences() {
        for activation in ALL {
            let inputs = [Numbers(8).matrix(3, 5)];
            differences("activate", |x| reference(x[0].clone(), activation), &inputs);
        }
    }

    #[test]
    fn values_of_published_tables() {
        let x = Tensor::<2>::from_floats([[-1.0, 0.0, 2.0]], &tensor::Device::flex());
        for (activation, want) in [
            (Activation::Silu, [-0.268_941_42, 0.0, 1.761_594_2]),
            (Activation::GeluTanh, [-0.158_808, 0.0, 1.954_597_7]),
            (Activation::Gelu, [-0.158_655_25, 0.0, 1.954_499_7]),
            (Activation::QuickGelu, [-0.154_204_2, 0.0, 1.935_659_9]),
            (Activation::Relu, [0.0, 0.0, 2.0]),
            (Activation::Tanh, [-0.761_594_2, 0.0, 0.964_027_6]),
            (Activation::Identity, [-1.0, 0.0, 2.0]),
        ] {
            let found = numbers(activate(x.clone(), activation));
            close(&format!("{activation:?}"), &found, &want, 1e-6);
        }
    }
}
