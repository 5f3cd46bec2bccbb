//! ComPEFT files: an update of weights as signs of its largest entries and one scale.
//!
//! Method: Yadav, Choshen, Raffel and Bansal, *ComPEFT*, 2023, arXiv 2311.13171. The paper gives no
//! file format; this one is retune's own.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `COMPEFT` and the version, 2 |
//! | 16 | the first half of the SHA-256 of everything that follows |
//! | 1 to 5 | length of the packed header |
//! | 1 to 5 | length of the unpacked header |
//! | … | the header, packed by DEFLATE |
//! | … | the tensors' streams, in the header's order, without gaps |
//!
//! Numbers are in groups of seven bits, the lowest first, with the highest bit of a byte set where
//! another follows; a text is its length and its bytes. The header is the scale (a little-endian
//! `f32`), the number of metadata and for each key and value, the number of tensors and for each:
//! how many bytes its name shares with the one before, the rest of the name, the number of sides
//! and the sides, and either 0 with non-zeros, modulus and bytes of gaps, its stream being that of
//! [`crate::golomb`], or 1 with the name of a number type, its stream being the numbers as
//! safetensors has them (whole modules and biases, which are no updates). Tensors are in
//! alphabetical order.
//!
//! Version 1 is read, not written: both lengths come first, as four little-endian bytes, then all 32
//! bytes of the checksum; the header is JSON, `{"scale", "metadata", "tensors"}`, in a zlib stream,
//! a tensor `{"name", "shape"}` with `"signs": [non-zeros, modulus, bytes of gaps]` or
//! `"raw": dtype`.
//!
//! An entry of a tensor of signs is `scale`, `-scale` or 0; what it is added to is the reader's
//! concern and stands in the metadata.

mod error;
mod header;
mod read;
mod write;

pub use error::{CompeftError, CompeftProblem};
pub use read::{CompeftFile, CompeftTensor, Content};
pub use write::CompeftWriter;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The first bytes of a file; the last is the version.
const MAGIC: [u8; 8] = *b"COMPEFT\x02";
/// Bytes of the checksum.
const CHECKSUM_BYTES: usize = 16;
/// Largest header read, unpacked.
const MAX_HEADER_BYTES: u32 = 256 << 20;
/// Entries a file may describe per byte it has: a reader allocates for entries that are zero, which
/// cost nothing in the file.
const MAX_ENTRIES_PER_BYTE: u64 = 1 << 14;

/// The header; as JSON in files of version 1.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    scale: f64,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    tensors: Vec<RawTensor>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    /// Non-zeros, modulus, bytes of gaps.
    #[serde(default)]
    signs: Option<(usize, u32, usize)>,
    #[serde(default)]
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
