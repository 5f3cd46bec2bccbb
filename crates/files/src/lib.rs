//! Checkpoint files of the ecosystem: safetensors and GGUF, and ComPEFT's compressed updates; read
//! by mmap, written atomically.
//!
//! Every reader treats its file as hostile: counts and lengths are checked before anything is
//! allocated, and a malformed file gives an error that names the file, the tensor or key, what was
//! expected, what was found and what to do.

pub mod atomic;
#[allow(unsafe_code, reason = "maps a file into memory")]
mod bytes;
pub mod compeft;
mod digest;
mod dtype;
pub mod ggml;
pub mod gguf;
pub mod golomb;
mod near;
pub mod numbers;
mod placed;
pub mod safetensors;

pub use bytes::{FileBytes, FileSlice, read_exact_at, start_writing, write_all_at};
pub use digest::{sha256, sha256_file};
pub use dtype::{Dtype, EncodeError};
pub use placed::{SaveError, TensorProblem};
