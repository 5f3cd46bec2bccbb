//! safetensors: an eight-byte length, a JSON header, then the tensors' bytes.
//!
//! Source: the format's description at <https://github.com/huggingface/safetensors>. The reader
//! accepts exactly the files in which every byte belongs to one tensor; the writer produces the same
//! bytes for the same tensors, and for a file of the reference writer those of that file.

mod error;
mod file;
mod folder;
mod header;
mod layout;
mod write;

pub use error::{Problem, SafetensorsError};
pub use file::{SafetensorsFile, TensorView};
pub use folder::Safetensors;
pub use layout::{CheckpointLayout, FileLayout, TensorSpec};
pub use write::{SafetensorsWriter, ShardedWriter, safetensors_bytes, write_safetensors};

/// File names of a Hugging Face model folder.
const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
