//! Stochastic gradient descent with momentum.

use super::{Optimizer, Step};

/// SGD's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Sgd {
    /// Momentum; 0 keeps no state.
    pub momentum: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
}

impl Optimizer for Sgd {
    fn state_names(&self) -> &'static [&'static str] {
        if self.momentum == 0.0 { &[] } else { &["velocity"] }
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn step(&self, step: Step, values: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>]) {
        let rate = step.learning_rate as f32;
        let decay = if step.decays { self.weight_decay as f32 } else { 0.0 };
        let momentum = self.momentum as f32;
        let scale = step.gradient_scale as f32;
        match state {
            [velocity] => {
                for ((value, g), v) in values.iter_mut().zip(gradient).zip(velocity) {
                    *v = momentum * *v + scale * g + decay * *value;
                    *value -= rate * *v;
                }
            }
            _ => {
                for (value, g) in values.iter_mut().zip(gradient) {
                    *value -= rate * (scale * g + decay * *value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn momentum_adds_up() {
        let sgd = Sgd { momentum: 0.5, weight_decay: 0.0 };
        let step = Step { learning_rate: 0.1, decays: true, number: 1, gradient_scale: 1.0 };
        let (mut values, mut state) = ([1.0_f32], vec![vec![0.0]]);
        sgd.step(step, &mut values, &[1.0], &mut state);
        sgd.step(step, &mut values, &[1.0], &mut state);
        // Velocities are 1 and 1.5.
        assert!((values[0] - 0.75).abs() < 1e-6);
    }
}
