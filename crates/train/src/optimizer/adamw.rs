//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

use super::{Optimizer, Step};
use retune_core::kernels::{AdamwStep, adamw};

/// AdamW's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Optimizer for AdamW {
    fn state_names(&self) -> &'static [&'static str] {
        &["first_moment", "second_moment"]
    }

    fn step(&self, step: Step, values: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>]) {
        let [first, second] = state else { unreachable!("AdamW keeps two lists") };
        let settings = AdamwStep {
            learning_rate: step.learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: if step.decays { self.weight_decay } else { 0.0 },
            step: step.number,
            gradient_scale: step.gradient_scale,
        };
        adamw(&settings, values, gradient, first, second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_rate_times_the_sign_and_the_decay() {
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let mut values = [1.0_f32, -2.0];
        let mut state = vec![vec![0.0; 2], vec![0.0; 2]];
        let step = Step { learning_rate: 0.01, decays: true, number: 1, gradient_scale: 1.0 };
        adamw.step(step, &mut values, &[0.5, -3.0], &mut state);
        // m̂ / √v̂ is the sign; w ← w(1 - 0.01·0.1) - 0.01·sign.
        assert!((values[0] - (0.999 - 0.01)).abs() < 1e-6, "{values:?}");
        assert!((values[1] - (-1.998 + 0.01)).abs() < 1e-6, "{values:?}");
        assert!((state[0][0] - 0.05).abs() < 1e-7 && (state[1][1] - 0.009).abs() < 1e-7);
    }
}
