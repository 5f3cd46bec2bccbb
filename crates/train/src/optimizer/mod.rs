//! Optimisers: how values move along their gradient. State is data, one list per parameter.

mod adamw;
mod sgd;

pub use adamw::AdamW;
pub use sgd::Sgd;

use std::fmt::Debug;

use retune_core::method::Memory;

/// What an optimiser is told about one step of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Learning rate, the parameter's own factor included.
    pub learning_rate: f64,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Steps including this one, from 1.
    pub number: u64,
    /// Factor on the gradient (clipping).
    pub gradient_scale: f64,
}

/// Moves values along their gradient.
///
/// The optimiser holds settings only; its state comes in and goes out as plain lists, so that
/// saving, resuming and surgery on single elements are written once.
pub trait Optimizer: Debug + Send + Sync {
    /// Returns the names of the state lists, each as long as the parameter.
    fn state_names(&self) -> &'static [&'static str];

    /// Moves `values`, and the lists of `state` in the order of their names.
    ///
    /// # Panics
    /// If a list has another length than `values`: a mistake of the caller.
    fn step(&self, step: Step, values: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>]);

    /// Moves values that have each had another number of steps, this one included: `ages`.
    ///
    /// Optimisers whose step does not depend on its number need nothing else than
    /// [`Optimizer::step`].
    ///
    /// # Panics
    /// As [`Optimizer::step`].
    fn step_aged(
        &self,
        step: Step,
        _ages: &[f32],
        values: &mut [f32],
        gradient: &[f32],
        state: &mut [Vec<f32>],
    ) {
        self.step(step, values, gradient, state);
    }

    /// Returns what the state lists hold of an element after `age` steps with this mean gradient
    /// and mean squared gradient, so that bias correction gives the means back.
    fn seeded(&self, _mean: f32, _mean_square: f32, _age: f32) -> Vec<f32> {
        vec![0.0; self.state_names().len()]
    }

    /// Returns the share of a value that decays per unit of learning rate.
    fn weight_decay(&self) -> f64;

    /// Returns the bytes of state per trained value.
    fn state_bytes_per_value(&self) -> usize {
        self.state_names().len() * size_of::<f32>()
    }
}

/// An optimiser as methods see it.
#[derive(Debug)]
pub(crate) struct MemoryOf<'a>(pub(crate) &'a dyn Optimizer);

impl Memory for MemoryOf<'_> {
    fn num_lists(&self) -> usize {
        self.0.state_names().len()
    }

    fn seeded(&self, mean: f32, mean_square: f32, age: f32) -> Vec<f32> {
        self.0.seeded(mean, mean_square, age)
    }

    fn weight_decay(&self) -> f64 {
        self.0.weight_decay()
    }
}
