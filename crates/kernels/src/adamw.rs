//! AdamW.

use tensor::Tensor;

use crate::parallel::{CHUNK, each};
use crate::simd::{self, fma};

/// Holds the settings of one AdamW step; `step` counts from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of a value taken off per unit of learning rate, apart from the gradient.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Factor on the gradient, for clipping by the global norm; 1 leaves it.
    pub gradient_scale: f64,
}

impl AdamwStep {
    fn corrections(&self) -> [f64; 2] {
        let power = |beta: f64| 1.0 - beta.powf(self.step as f64);
        [power(self.beta1), power(self.beta2)]
    }
}

/// Updates the values and both moments of one tensor in place.
///
/// `w ← w · (1 - rate · decay)`; `m ← β₁ m + (1 - β₁) g`; `v ← β₂ v + (1 - β₂) g²`;
/// `w ← w - rate / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)`.
///
/// # Panics
/// When the four slices are not equally long.
///
/// # Source
/// Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>.
pub fn adamw(step: &AdamwStep, value: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
    let count = value.len();
    assert!(
        gradient.len() == count && m.len() == count && v.len() == count,
        "adamw: {count} values, {} gradients, {} and {} moments",
        gradient.len(),
        m.len(),
        v.len()
    );
    let numbers = Numbers::new(step);
    let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
    let chunks = value.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK)).zip(moments);
    each(chunks, |((value, gradient), (m, v))| update_all(&numbers, value, gradient, m, v));
}

/// What a step multiplies with.
struct Numbers {
    keep: f32,
    rate: f32,
    root: f32,
    scale: f32,
    epsilon: f32,
    betas: [f32; 2],
    rests: [f32; 2],
}

impl Numbers {
    fn new(step: &AdamwStep) -> Self {
        let [correction1, correction2] = step.corrections();
        Self {
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            rate: (step.learning_rate / correction1) as f32,
            root: correction2.sqrt().recip() as f32,
            scale: step.gradient_scale as f32,
            epsilon: step.epsilon as f32,
            betas: [step.beta1 as f32, step.beta2 as f32],
            rests: [(1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32],
        }
    }
}

#[inline(always)]
fn update_body<const LANES: usize, const FMA: bool>(
    numbers: &Numbers,
    value: &mut [f32],
    gradient: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    let &Numbers { keep, rate, root, scale, epsilon, betas, rests } = numbers;
    for ((w, g), (m, v)) in value.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
        let g = g * scale;
        *m = fma::<FMA>(betas[0], *m, rests[0] * g);
        *v = fma::<FMA>(betas[1], *v, rests[1] * g * g);
        let size = fma::<FMA>(v.sqrt(), root, epsilon);
        *w = fma::<FMA>(*w, keep, -rate * *m / size);
    }
}

simd::versions! {
    fn update_all(
        numbers: &Numbers,
        value: &mut [f32],
        gradient: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) = update_body;
}

/// Computes [`adamw`] out of tensor operations, on every device and in every float type.
///
/// Returns the new value and both moments.
pub fn reference<const D: usize>(
    step: &AdamwStep,
    value: Tensor<D>,
    gradient: Tensor<D>,
    m: Tensor<D>,
    v: Tensor<D>,
) -> [Tensor<D>; 3] {
    let [correction1, correction2] = step.corrections();
    let gradient = gradient * step.gradient_scale;
    let m = m * step.beta1 + gradient.clone() * (1.0 - step.beta1);
    let v = v * step.beta2 + gradient.clone() * gradient * (1.0 - step.beta2);
    let kept = value * (1.0 - step.learning_rate * step.weight_decay);
    let size = v.clone().sqrt() / correction2.sqrt() + step.epsilon;
    let value = kept - m.clone() / size * (step.learning_rate / correction1);
    [value, m, v]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Numbers, close, numbers};
    use tensor::DType;

    const STEP: AdamwStep = AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 3,
        gradient_scale: 0.5,
    };

    #[test]
    fn first_step_moves_by_the_rate() {
        // With both moments corrected, the first step is rate · sign(g), after the decay.
        let step = AdamwStep { learning_rate: 0.1, weight_decay: 0.5, step: 1, ..STEP };
        let (mut value, mut m, mut v) = ([1.0, -2.0], [0.0; 2], [0.0; 2]);
        adamw(&step, &mut value, &[4.0, -8.0], &mut m, &mut v);
        close("value", &value.map(f64::from), &[0.95 - 0.1, -1.9 + 0.1], 1e-6);
        close("m", &m.map(f64::from), &[0.2, -0.4], 1e-6);
        close("v", &v.map(f64::from), &[0.004, 0.016], 1e-6);
    }

    #[test]
    fn fast_is_the_reference() {
        let mut source = Numbers(13);
        for case in 0..200 {
            let count = source.between(1, 3000);
            let step = AdamwStep { step: 1 + case, ..STEP };
            let inputs = [0, 1, 2, 3].map(|index| {
                let input = source.matrix(1, count);
                if index == 3 { input.map(0.1, 1.0) } else { input }
            });
            let [value, gradient, m, v] = inputs.each_ref().map(|x| x.tensor(DType::F64, false));
            let want = reference(&step, value, gradient, m, v).map(numbers);
            let mut slices = inputs.map(|x| x.values.iter().map(|x| *x as f32).collect::<Vec<_>>());
            let [value, gradient, m, v] = &mut slices;
            adamw(&step, value, gradient, m, v);
            for (name, got, want) in
                [("value", value, &want[0]), ("m", m, &want[1]), ("v", v, &want[2])]
            {
                let got: Vec<_> = got.iter().copied().map(f64::from).collect();
                close(name, &got, want, 1e-6);
            }
        }
    }
}
