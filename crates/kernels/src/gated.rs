//! Gated activations: SwiGLU, GeGLU and their kin.

use burn_flex::FlexTensor;
use tensor::Tensor;

use crate::activation::{self, Activation, Loop};
use crate::buffer::Buffer;
use crate::parallel::{CHUNK, each};
use crate::recompute;
use crate::simd;
use crate::tape::{Operation, apply, is_fast, values};

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
    if is_fast(&gate) && is_fast(&up) {
        let inputs = [gate.into_dispatch(), up.into_dispatch()];
        return Tensor::from_dispatch(apply(Gated(activation), inputs));
    }
    reference(gate, up, activation)
}

/// Computes [`gated`] out of tensor operations, on every device and in every float type.
pub fn reference(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    activation::reference(gate, activation) * up
}

#[derive(Clone, Debug)]
struct Gated(Activation);

impl Gated {
    fn output(&self, inputs: &[FlexTensor; 2]) -> FlexTensor {
        let [gate, up] = inputs.each_ref().map(values);
        let mut out = Buffer::dirty(gate.len());
        each(
            gate.chunks(CHUNK).zip(up.chunks(CHUNK)).zip(out.chunks_mut(CHUNK)),
            |((gate, up), out)| gate_all(self.0, gate, up, out),
        );
        out.into_tensor(inputs[0].layout().shape().clone())
    }
}

impl Operation<2> for Gated {
    type Saved = [FlexTensor; 2];

    fn forward(&self, inputs: [FlexTensor; 2], wanted: [bool; 2]) -> (FlexTensor, [FlexTensor; 2]) {
        let output = self.output(&inputs);
        if wanted != [false; 2] {
            let (operation, inputs) = (self.clone(), inputs.clone());
            recompute::note(&output, move || operation.output(&inputs));
        }
        (output, inputs)
    }

    fn backward(
        &self,
        inputs: [FlexTensor; 2],
        gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gate, up] = inputs.each_ref().map(values);
        let shape = inputs[0].layout().shape();
        let g = values(&gradient);
        // Both come out of one pass; the one nobody wants is the price of an uncommon case.
        let [mut dgate, mut dup] = [(); 2].map(|()| Buffer::dirty(gate.len()));
        each(
            gate.chunks(CHUNK)
                .zip(up.chunks(CHUNK))
                .zip(g.chunks(CHUNK))
                .zip(dgate.chunks_mut(CHUNK).zip(dup.chunks_mut(CHUNK))),
            |(((gate, up), g), (dgate, dup))| slope_all(self.0, gate, up, g, dgate, dup),
        );
        [
            wanted[0].then(|| dgate.into_tensor(shape.clone())),
            wanted[1].then(|| dup.into_tensor(shape.clone())),
        ]
    }
}

struct Products<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Loop for Products<'_> {
    #[inline(always)]
    fn run(self, function: impl Fn(f32) -> (f32, f32)) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = function(*gate).0 * up;
        }
    }
}

struct Slopes<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    gradient: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Loop for Slopes<'_> {
    #[inline(always)]
    fn run(self, function: impl Fn(f32) -> (f32, f32)) {
        let inputs = self.gate.iter().zip(self.up).zip(self.gradient);
        for (((gate, up), g), (dgate, dup)) in inputs.zip(self.dgate.iter_mut().zip(self.dup)) {
            let (value, slope) = function(*gate);
            *dgate = g * up * slope;
            *dup = g * value;
        }
    }
}

#[inline(always)]
fn gate_body<const LANES: usize, const FMA: bool>(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    activation::run::<FMA>(activation, Products { gate, up, out });
}

#[inline(always)]
fn slope_body<const LANES: usize, const FMA: bool>(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    gradient: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    activation::run::<FMA>(activation, Slopes { gate, up, gradient, dgate, dup });
}

simd::versions! {
    fn gate_all(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) = gate_body;
    fn slope_all(
        activation: Activation,
        gate: &[f32],
        up: &[f32],
        gradient: &[f32],
        dgate: &mut [f32],
        dup: &mut [f32],
    ) = slope_body;
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
                // The GELUs' inner sums reach 10, and their rounding shifts the sigmoid as much.
                4e-6,
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
