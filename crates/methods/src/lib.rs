//! Tuning methods, one file each.
//!
//! A method knows no architecture: it looks at a model's [`ModelSpec`](retune_core::spec::ModelSpec)
//! and attaches changes at named places. Adding one is a file here and a line in [`registry`].

pub mod adapter;
pub mod full;
pub mod lora;
pub mod registry;
pub mod replacement;
