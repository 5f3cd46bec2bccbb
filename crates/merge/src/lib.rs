//! What happens to weights after training: merging, compressing, comparing.
//!
//! Everything streams: memory holds a few tensors, whatever the size of the model.

mod error;
pub mod source;
pub mod writer;

pub use error::{Error, Result};
