//! Datasets: readers, chat templates, loss masks, packing, splits.

mod error;
#[cfg(test)]
mod fixtures;
pub mod read;
pub mod template;
pub mod tokenizer;

pub use error::{Error, Result};
