//! Learning rates over the steps of a run.

use retune_options::choice;

choice! {
    /// The shape of the learning rate after warm-up.
    pub enum Shape {
        /// Stays at the peak.
        Constant = "constant",
        /// Falls in a straight line to the floor.
        Linear = "linear",
        /// Falls along half a cosine to the floor.
        Cosine = "cosine",
        /// Stays at the peak, then falls in a straight line over the last part (warm-up, stable,
        /// decay; Hu et al., arXiv 2404.06395).
        WarmupStableDecay = "warmup-stable-decay",
    }
}

/// A learning rate as a function of the step.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The shape after warm-up.
    pub shape: Shape,
    /// The highest rate.
    pub peak: f64,
    /// The lowest rate, as a fraction of the peak.
    pub floor_frac: f64,
    /// Steps of warm-up, from 0 in a straight line.
    pub warmup_steps: u64,
    /// Fraction of the run that decays, for warm-up-stable-decay.
    pub decay_frac: f64,
    /// Steps of the whole run.
    pub num_steps: u64,
}

impl Schedule {
    /// Returns the rate of step `step`, counted from 0.
    ///
    /// As in the Hugging Face library, step `s` of the warm-up has `s / warmup_steps` of the peak,
    /// so the very first step of a run with warm-up moves nothing.
    ///
    /// ```
    /// use retune_train::schedule::{Schedule, Shape};
    /// let schedule = Schedule {
    ///     shape: Shape::Linear, peak: 1.0, floor_frac: 0.0, warmup_steps: 2, decay_frac: 0.1, num_steps: 6,
    /// };
    /// let rates: Vec<f64> = (0..6).map(|s| schedule.rate(s)).collect();
    /// assert_eq!(rates, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
    /// ```
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let after = (step - self.warmup_steps) as f64;
        let length = self.num_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let floor = self.floor_frac;
        let frac = match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => floor + (1.0 - floor) * (1.0 - after / length).max(0.0),
            Shape::Cosine => {
                let turn = (std::f64::consts::PI * (after / length).min(1.0)).cos();
                floor + (1.0 - floor) * 0.5 * (1.0 + turn)
            }
            Shape::WarmupStableDecay => {
                let decay = (self.decay_frac * self.num_steps as f64).max(1.0);
                let left = self.num_steps.saturating_sub(step) as f64;
                floor + (1.0 - floor) * (left / decay).min(1.0)
            }
        };
        self.peak * frac
    }
}

impl Schedule {
    /// Gives each stage of a run the whole shape: last steps, and the schedule inside the stage.
    pub fn split(&self, lengths: &[u64]) -> Vec<(u64, Self)> {
        let mut end = 0;
        let stage = |length: u64| {
            end += length;
            let part = length as f64 / self.num_steps.max(1) as f64;
            let warmup_steps = (self.warmup_steps as f64 * part).round() as u64;
            (end, Self { num_steps: length, warmup_steps, ..*self })
        };
        lengths.iter().copied().map(stage).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule {
            shape,
            peak: 2.0,
            floor_frac: 0.1,
            warmup_steps: 0,
            decay_frac: 0.2,
            num_steps: 10,
        }
    }

    #[test]
    fn cosine_is_half_way_in_the_middle() {
        let s = schedule(Shape::Cosine);
        assert_eq!(s.rate(0), 2.0);
        assert!((s.rate(5) - 2.0 * 0.55).abs() < 1e-12);
        assert!((s.rate(10) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn stable_until_the_last_fifth() {
        let s = schedule(Shape::WarmupStableDecay);
        assert_eq!(s.rate(7), 2.0);
        assert_eq!(s.rate(8), 2.0);
        assert!((s.rate(9) - 2.0 * 0.55).abs() < 1e-12);
    }

    #[test]
    fn every_stage_begins_and_ends_like_the_run() {
        let stages = Schedule { warmup_steps: 5, ..schedule(Shape::Linear) }.split(&[4, 6]);
        assert_eq!((stages[0].0, stages[0].1.num_steps, stages[0].1.warmup_steps), (4, 4, 2));
        assert_eq!((stages[1].0, stages[1].1.num_steps, stages[1].1.warmup_steps), (10, 6, 3));
        let whole = schedule(Shape::Cosine);
        assert_eq!(whole.split(&[10]), [(10, whole)]);
    }

    #[test]
    fn constant_stays() {
        assert!((0..20).all(|step| schedule(Shape::Constant).rate(step) == 2.0));
    }
}
