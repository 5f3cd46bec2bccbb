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

    fn seeded(&self, mean: f32, mean_square: f32, age: f32) -> Vec<f32> {
        let part = |beta: f64| 1.0 - beta.powf(f64::from(age));
        vec![
            (f64::from(mean) * part(self.beta1)) as f32,
            (f64::from(mean_square) * part(self.beta2)) as f32,
        ]
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn step_aged(
        &self,
        step: Step,
        ages: &[f32],
        values: &mut [f32],
        gradient: &[f32],
        state: &mut [Vec<f32>],
    ) {
        let [first, second] = state else { unreachable!("AdamW keeps two lists") };
        let decay = if step.decays { self.weight_decay } else { 0.0 };
        let keep = (1.0 - step.learning_rate * decay) as f32;
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        let (rest1, rest2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let (scale, epsilon) = (step.gradient_scale as f32, self.epsilon as f32);
        // Neighbours mostly have the same age, and powers cost more than all else here.
        let mut known = (f32::NAN, 0.0, 0.0);
        let moments = first.iter_mut().zip(second);
        for (((value, g), (m, v)), age) in values.iter_mut().zip(gradient).zip(moments).zip(ages) {
            if *age != known.0 {
                let age = f64::from(*age);
                let rate = step.learning_rate / (1.0 - self.beta1.powf(age));
                let root = (1.0 - self.beta2.powf(age)).sqrt().recip();
                known = (age as f32, rate as f32, root as f32);
            }
            let (_, rate, root) = known;
            let g = g * scale;
            *m = beta1 * *m + rest1 * g;
            *v = beta2 * *v + rest2 * g * g;
            *value = *value * keep - rate * *m / (v.sqrt() * root + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_element_is_corrected_by_its_own_age() {
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
        let gradients = [0.5_f32, -3.0];
        let run = |steps: u64| {
            let (mut values, mut state) = (vec![1.0_f32, -2.0], vec![vec![0.0; 2], vec![0.0; 2]]);
            for number in 1..=steps {
                let step = Step { learning_rate: 0.01, decays: true, number, gradient_scale: 0.5 };
                adamw.step(step, &mut values, &gradients, &mut state);
            }
            (values, state)
        };
        // The second element comes in two steps after the first.
        let (mut values, mut state) = (vec![1.0_f32, -2.0], vec![vec![0.0; 2], vec![0.0; 2]]);
        for age in 1..=5_u64 {
            let step = Step { learning_rate: 0.01, decays: true, number: 77, gradient_scale: 0.5 };
            let count = if age <= 2 { 1 } else { 2 };
            let ages: Vec<f32> =
                [age, age.saturating_sub(2)][..count].iter().map(|a| *a as f32).collect();
            let mut part: Vec<Vec<f32>> = state.iter().map(|list| list[..count].to_vec()).collect();
            adamw.step_aged(step, &ages, &mut values[..count], &gradients[..count], &mut part);
            for (list, part) in state.iter_mut().zip(part) {
                list[..count].copy_from_slice(&part);
            }
        }
        let (five, three) = (run(5), run(3));
        assert!((values[0] - five.0[0]).abs() < 1e-6 && (values[1] - three.0[1]).abs() < 1e-6);
        assert!(
            (state[1][0] - five.1[1][0]).abs() < 1e-7 && (state[1][1] - three.1[1][1]).abs() < 1e-6
        );
    }

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
