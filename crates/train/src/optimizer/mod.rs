//! Optimisers: how values move along their gradient. State is data, one list per parameter.

mod adamw;
mod sgd;

pub use adamw::AdamW;
pub use sgd::Sgd;

use std::fmt::Debug;

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
pub trait Optimizer: Debug + Send {
    /// Returns the names of the state lists, each as long as the parameter.
    fn state_names(&self) -> &'static [&'static str];

    /// Moves `values`, and the lists of `state` in the order of their names.
    ///
    /// # Panics
    /// If a list has another length than `values`: a mistake of the caller.
    fn step(&self, step: Step, values: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>]);

    /// Returns the bytes of state per trained value.
    fn state_bytes_per_value(&self) -> usize {
        self.state_names().len() * size_of::<f32>()
    }
}
