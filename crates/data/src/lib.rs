//! Datasets: readers, chat templates, loss masks, packing, splits, pictures.
//!
//! The way of a row: [`read`] finds it in a file, [`shape`] says what it means, [`template`] and
//! [`tokenizer`] turn it into tokens, [`mask`] says which are learned, [`dataset`] keeps them.
//! Pictures go through [`image`] instead.

pub mod dataset;
mod error;
#[cfg(test)]
mod fixtures;
pub mod image;
pub mod labels;
pub mod mask;
pub mod order;
pub mod pack;
pub mod prepare;
pub mod prompt;
pub mod read;
pub mod shape;
pub mod statistics;
pub mod template;
pub mod tokenizer;

pub use error::{Error, Result};
