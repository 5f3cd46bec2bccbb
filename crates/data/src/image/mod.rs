//! Pictures: from folders, packed files and rows of paths to the numbers a model reads.
//!
//! The way of a picture: [`set`] finds it, [`decode`] reads PNG and JPEG, [`packed`] reads IDX and
//! CIFAR, [`transform`] brings it to the model's size and numbers, as `preprocessor_config.json` says.

pub mod decode;
pub mod packed;
mod picture;
pub mod resize;
pub mod set;
pub mod transform;

pub use picture::Picture;
