//! Why a ComPEFT file cannot be read or made.

use std::path::PathBuf;

use crate::golomb::StreamError;

/// A file that cannot be read or made, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct CompeftError {
    /// The file, or what stands for it.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: CompeftProblem,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompeftProblem {
    /// The system refused it.
    #[error("{0}; check the path")]
    Io(#[from] std::io::Error),
    /// The first bytes are not those of the format.
    #[error(
        "is no ComPEFT file: it begins with {found:02x?}, expected {:02x?}; give a file that \
         `retune compress` wrote",
        super::MAGIC
    )]
    Magic {
        /// The first bytes, at most eight.
        found: Vec<u8>,
    },
    /// The version is one this program does not know.
    #[error("has version {0}, this program reads versions 1 and 2; use a newer retune")]
    Version(u8),
    /// The file is shorter or longer than its header says.
    #[error("{what}: expected {expected} bytes, got {got}; copy the file again")]
    Length {
        /// The part of the file.
        what: &'static str,
        /// Bytes announced.
        expected: u64,
        /// Bytes there.
        got: u64,
    },
    /// The content is not what was written.
    #[error("is damaged: the checksum of its content differs; copy the file again")]
    Checksum,
    /// The header breaks a rule.
    #[error("its header cannot be read: {0}; the writer of this file does not follow the format")]
    Header(String),
    /// A tensor breaks a rule.
    #[error("tensor '{tensor}': {message}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What, expected, got.
        message: String,
    },
    /// A tensor's stream cannot be decoded.
    #[error("tensor '{tensor}': {problem}")]
    Stream {
        /// The tensor.
        tensor: String,
        /// What is wrong with the stream.
        problem: StreamError,
    },
    /// So many entries, so few bytes.
    #[error(
        "describes {entries} entries in {bytes} bytes, at most {} a byte are accepted; compress \
         with a higher density",
        super::MAX_ENTRIES_PER_BYTE
    )]
    TooSparse {
        /// Entries of all tensors.
        entries: u64,
        /// Bytes of the file.
        bytes: u64,
    },
    /// There is no such tensor.
    #[error("has no tensor '{tensor}'{near}")]
    Missing {
        /// The tensor asked for.
        tensor: String,
        /// Names close to it, as the tail of the message.
        near: String,
    },
}
