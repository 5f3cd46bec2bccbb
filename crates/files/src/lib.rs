//! Checkpoint files of the ecosystem: safetensors and GGUF, read by mmap, written atomically.
//!
//! Every reader treats its file as hostile: counts and lengths are checked before anything is
//! allocated, and a malformed file gives an error that names the file, the tensor or key, what was
//! expected, what was found and what to do.

pub mod atomic;
mod bytes;
pub mod ggml;
mod near;
pub mod numbers;

pub use bytes::{FileBytes, FileSlice};
