//! ComPEFT files: an update of weights as signs of its largest entries and one scale.
//!
//! Method: Yadav, Choshen, Raffel and Bansal, *ComPEFT*, 2023, arXiv 2311.13171. The paper gives no
//! file format; this one is retune's own.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `COMPEFT` and the version, 1 |
//! | 4 | length of the packed header, little endian |
//! | 4 | length of the unpacked header |
//! | 32 | SHA-256 of everything that follows |
//! | … | the header: JSON, packed as a zlib stream |
//! | … | the tensors' streams, in the header's order, without gaps |
//!
//! The header is `{"scale", "metadata", "tensors"}`. A tensor is `{"name", "shape"}` with either
//! `"signs": [non-zeros, modulus, bytes of gaps]`, its stream being that of [`crate::golomb`], or
//! `"raw": dtype`, its stream being the numbers as safetensors has them (whole modules and biases,
//! which are no updates). Tensors are in alphabetical order.
//!
//! An entry of a tensor of signs is `scale`, `-scale` or 0; what it is added to is the reader's
//! concern and stands in the metadata.

mod error;
mod read;
mod write;

pub use error::{CompeftError, CompeftProblem};
pub use read::{CompeftFile, CompeftTensor, Content};
pub use write::CompeftWriter;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The first bytes of a file; the last is the version.
const MAGIC: [u8; 8] = *b"COMPEFT\x01";
/// Bytes before the header.
const HEAD_BYTES: usize = 8 + 4 + 4 + 32;
/// Where the checksum stands.
const CHECKSUM: std::ops::Range<usize> = 16..HEAD_BYTES;
/// Largest header read, unpacked.
const MAX_HEADER_BYTES: u32 = 256 << 20;
/// Entries a file may describe per byte it has: a reader allocates for entries that are zero, which
/// cost nothing in the file.
const MAX_ENTRIES_PER_BYTE: u64 = 1 << 14;

/// The header as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    scale: f64,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    tensors: Vec<RawTensor>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    /// Non-zeros, modulus, bytes of gaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signs: Option<(usize, u32, usize)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    raw: Option<String>,
}

/// What a file takes, and what it would take otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Sizes {
    /// The whole file.
    pub file_bytes: u64,
    /// The streams of signs.
    pub coded_bytes: u64,
    /// The entropy of the signs by the paper's formula: independent entries, one density for all
    /// tensors, 16 bits for the scale. Tensors of different density take less.
    pub entropy_bytes: f64,
    /// Whole tensors kept as they are.
    pub raw_bytes: u64,
    /// Entries of the tensors of signs.
    pub num_entries: u64,
    /// Those that are not zero.
    pub num_nonzero: u64,
    /// All tensors as half-precision numbers.
    pub f16_bytes: u64,
}

impl Sizes {
    /// Returns how many times smaller the file is than half-precision numbers.
    pub fn ratio(&self) -> f64 {
        self.f16_bytes as f64 / self.file_bytes as f64
    }

    /// Returns the share of entries that are not zero.
    pub fn density(&self) -> f64 {
        self.num_nonzero as f64 / self.num_entries as f64
    }
}
