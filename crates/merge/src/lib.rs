//! What happens to weights after training: merging, compressing, comparing.
//!
//! Everything streams: memory holds a few tensors, whatever the size of the model.

pub mod compeft;
mod error;
pub mod layers;
pub mod methods;
pub mod plan;
pub mod setting;
pub mod source;
pub mod update;
pub mod writer;

pub use error::{Error, Result};
