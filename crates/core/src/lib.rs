//! Where methods and models meet.
//!
//! A tuned model is a frozen base plus changes at named places. [`weights::Weights`] holds the
//! base, [`parameters::Parameters`] everything that trains, [`change::Changes`] what is in force,
//! and a [`pass::Pass`] is one run through the model with all three. A [`model::Model`] is written
//! against the pass and never asks which method is attached; a [`method::Method`] plans and
//! attaches changes and never asks which architecture it changes.

pub mod batch;
pub mod change;
pub mod error;
pub mod event;
mod history;
mod layout;
pub mod method;
pub mod model;
pub mod names;
pub mod parameters;
pub mod pass;
pub mod random;
pub mod site;
pub mod spec;
pub mod step;
pub mod tap;
pub mod targets;
pub mod weights;

pub use error::{Error, Result};
pub use retune_kernels as kernels;
pub use tensor;
