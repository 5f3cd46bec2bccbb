//! GGUF: typed metadata and block-quantised tensors in one file, as llama.cpp reads and writes it.
//!
//! Versions 2 and 3 are read, little endian only; version 3 is written. Shapes are given slowest
//! dimension first as everywhere in retune, so `[out, in]` for a linear layer; the file itself
//! stores them reversed. Source: the specification at
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod error;
mod file;
mod metadata;
mod parse;
mod write;

pub use error::{GgufError, Problem};
pub use file::{GgufFile, GgufTensor};
pub use metadata::{Array, Metadata, Value};
pub use write::{GgufSpec, GgufWriter, gguf_bytes};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// Far above any page size; more would only serve to blow up what is written.
const MAX_ALIGNMENT: u32 = 1 << 20;
/// ggml's limit on dimensions.
const MAX_RANK: usize = 4;
/// Arrays of arrays of … ; real files nest at most once.
const MAX_DEPTH: usize = 8;
/// Longest key of the specification.
const MAX_KEY_BYTES: usize = 65_535;
