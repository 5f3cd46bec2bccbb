//! The training loop: learners, optimisers, schedules, checkpoints.
//!
//! [`training::Training`] walks the steps; what a step computes is in [`backprop`], how values move
//! in [`optimizer`], at which rate in [`schedule`], and what survives a kill in [`checkpoint`].

pub mod backprop;
pub mod checkpoint;
pub mod optimizer;
pub mod schedule;
pub mod settings;
pub mod training;

pub use error::{Error, Result};

mod error;
