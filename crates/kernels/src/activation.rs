//! Activation functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn_flex::FlexTensor;
use tensor::Tensor;
use tensor::activation::{relu, sigmoid};

use crate::buffer::Buffer;
use crate::parallel::{CHUNK, each};
use crate::recompute;
use crate::simd::{self, fma};
use crate::tape::{Operation, apply, is_fast, values};

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
    if activation == Activation::Identity {
        return x;
    }
    if is_fast(&x) {
        return Tensor::from_dispatch(apply(activation, [x.into_dispatch()]));
    }
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

impl Activation {
    fn output(self, x: &FlexTensor) -> FlexTensor {
        let numbers = values(x);
        let mut out = Buffer::dirty(numbers.len());
        each(numbers.chunks(CHUNK).zip(out.chunks_mut(CHUNK)), |(x, out)| {
            activate_all(self, x, out);
        });
        out.into_tensor(x.layout().shape().clone())
    }
}

impl Operation<1> for Activation {
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1], [wanted]: [bool; 1]) -> (FlexTensor, FlexTensor) {
        let out = self.output(&x);
        if wanted {
            let (activation, x) = (*self, x.clone());
            recompute::note(&out, move || activation.output(&x));
        }
        (out, x)
    }

    fn backward(
        &self,
        x: FlexTensor,
        gradient: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let mut dx = Buffer::dirty(x.layout().num_elements());
        each(
            values(&x).chunks(CHUNK).zip(values(&gradient).chunks(CHUNK)).zip(dx.chunks_mut(CHUNK)),
            |((x, g), dx)| slope_all(*self, x, g, dx),
        );
        [Some(dx.into_tensor(x.layout().shape().clone()))]
    }
}

/// A loop that is compiled for each activation function by itself.
pub(crate) trait Loop {
    /// Runs with a function that gives value and slope.
    fn run(self, function: impl Fn(f32) -> (f32, f32));
}

/// Runs a loop with an activation function.
#[inline(always)]
pub(crate) fn run<const FMA: bool>(activation: Activation, work: impl Loop) {
    match activation {
        Activation::Silu => work.run(|x| swish::<FMA>(x, 1.0)),
        Activation::QuickGelu => work.run(|x| swish::<FMA>(x, 1.702)),
        Activation::GeluTanh => work.run(gelu_tanh::<FMA>),
        Activation::Gelu => work.run(|x| {
            let (below, density) = simd::normal::<FMA>(x);
            (x * below, fma::<FMA>(x, density, below))
        }),
        Activation::Relu => work.run(|x| if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }),
        Activation::Tanh => work.run(|x| {
            let tanh = simd::tanh::<FMA>(x);
            (tanh, 1.0 - tanh * tanh)
        }),
        Activation::Identity => work.run(|x| (x, 1.0)),
    }
}

#[inline(always)]
fn swish<const FMA: bool>(x: f32, factor: f32) -> (f32, f32) {
    let share = simd::sigmoid::<FMA>(factor * x);
    (x * share, share * fma::<FMA>(factor * x, 1.0 - share, 1.0))
}

#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> (f32, f32) {
    // (1 + tanh u) / 2 = sigmoid(2 u); this is 2 √(2/π).
    const FACTOR: f32 = 1.595_769;
    let square = x * x;
    let share = simd::sigmoid::<FMA>(FACTOR * x * fma::<FMA>(0.044_715, square, 1.0));
    let steep = FACTOR * fma::<FMA>(3.0 * 0.044_715, square, 1.0);
    (x * share, share * fma::<FMA>(x * (1.0 - share), steep, 1.0))
}

struct Values<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Loop for Values<'_> {
    #[inline(always)]
    fn run(self, function: impl Fn(f32) -> (f32, f32)) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = function(*x).0;
        }
    }
}

struct Slopes<'a> {
    x: &'a [f32],
    gradient: &'a [f32],
    dx: &'a mut [f32],
}

impl Loop for Slopes<'_> {
    #[inline(always)]
    fn run(self, function: impl Fn(f32) -> (f32, f32)) {
        for ((dx, x), g) in self.dx.iter_mut().zip(self.x).zip(self.gradient) {
            *dx = function(*x).1 * g;
        }
    }
}

#[inline(always)]
fn activate_body<const LANES: usize, const FMA: bool>(
    activation: Activation,
    x: &[f32],
    out: &mut [f32],
) {
    run::<FMA>(activation, Values { x, out });
}

#[inline(always)]
fn slope_body<const LANES: usize, const FMA: bool>(
    activation: Activation,
    x: &[f32],
    gradient: &[f32],
    dx: &mut [f32],
) {
    run::<FMA>(activation, Slopes { x, gradient, dx });
}

simd::versions! {
    fn activate_all(activation: Activation, x: &[f32], out: &mut [f32]) = activate_body;
    fn slope_all(activation: Activation, x: &[f32], gradient: &[f32], dx: &mut [f32]) = slope_body;
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
                // The GELUs' inner sums reach 10, and their rounding shifts the sigmoid as much.
                4e-6,
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
