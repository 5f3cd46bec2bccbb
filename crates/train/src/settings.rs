//! The `[train]` table of a recipe.

use crate::optimizer::{AdamW, Optimizer, Sgd};
use crate::schedule::{Schedule, Shape};
use retune_options::{Portion, choice, options};

choice! {
    /// How values move along their gradient.
    pub enum OptimizerName {
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
        /// Stochastic gradient descent.
        Sgd = "sgd",
    }
}

options! {
    /// How the run trains.
    pub struct TrainOptions("train") {
        /// Optimiser steps; given this, `epochs` is ignored.
        steps: Option<u64> = None, in 1..=1_000_000_000;
        /// Passes over the data, where `steps` is not given.
        epochs: f64 = 1.0, in 0.0..=100_000.0;
        /// Highest learning rate; the method's usual one where absent.
        learning_rate: Option<f64> = None, in 0.0..=10.0;
        /// Shape of the learning rate after warm-up.
        schedule: Shape = Shape::Cosine;
        /// Warm-up: steps (a whole number) or a fraction of the run (below 1).
        warmup: Portion = Portion::Fraction(0.03);
        /// Lowest learning rate, as a fraction of the highest.
        floor: f64 = 0.0, in 0.0..=1.0;
        /// Fraction of the run that decays, for warmup-stable-decay.
        decay: f64 = 0.1, in 0.0..=1.0;
        /// Rows (packed or not) in one forward and backward pass.
        batch_size: usize = 4, in 1..=65536;
        /// Passes whose gradients add up to one step.
        accumulation: usize = 1, in 1..=65536;
        /// How values move.
        optimizer: OptimizerName = OptimizerName::AdamW;
        /// Decay of AdamW's first moment.
        beta1: f64 = 0.9, in 0.0..=0.9999;
        /// Decay of AdamW's second moment.
        beta2: f64 = 0.999, in 0.0..=0.999_999;
        /// Added to the root of AdamW's second moment.
        epsilon: f64 = 1e-8, in 0.0..=1.0;
        /// Weight decay.
        weight_decay: f64 = 0.01, in 0.0..=10.0;
        /// Momentum of SGD.
        momentum: f64 = 0.0, in 0.0..=0.9999;
        /// The gradient's norm is cut to this; 0 switches clipping off.
        clip: f64 = 1.0, in 0.0..=1e6;
        /// Steps between evaluations on the validation split; 0 evaluates at the end only.
        evaluate_every: u64 = 0, in 0..=1_000_000_000;
        /// Steps between checkpoints; 0 saves at the end only.
        save_every: u64 = 50, in 0..=1_000_000_000;
        /// How many of the newest checkpoints stay.
        keep_last: usize = 2, in 1..=1000;
        /// Evaluations without a better validation loss before the run stops; 0 never stops early.
        patience: u64 = 0, in 0..=1_000_000;
        /// Runs each layer again in the backward pass instead of keeping its activations.
        recompute: bool = false;
    }
}

impl TrainOptions {
    /// Returns the optimiser these settings describe.
    pub fn optimizer(&self) -> Box<dyn Optimizer> {
        match self.optimizer {
            OptimizerName::AdamW => Box::new(AdamW {
                beta1: self.beta1,
                beta2: self.beta2,
                epsilon: self.epsilon,
                weight_decay: self.weight_decay,
            }),
            OptimizerName::Sgd => {
                Box::new(Sgd { momentum: self.momentum, weight_decay: self.weight_decay })
            }
        }
    }

    /// Returns the learning rates of a run of `num_steps` steps.
    pub fn schedule(&self, num_steps: u64, default_learning_rate: f64) -> Schedule {
        Schedule {
            shape: self.schedule,
            peak: self.learning_rate.unwrap_or(default_learning_rate),
            floor_frac: self.floor,
            warmup_steps: self.warmup.of(num_steps),
            decay_frac: self.decay,
            num_steps,
        }
    }
}
