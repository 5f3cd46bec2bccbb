use std::io;
use std::path::PathBuf;

use super::{MAX_ALIGNMENT, MAX_DEPTH, MAX_KEY_BYTES, MAX_RANK};
use crate::ggml::GgmlError;

/// A GGUF file that cannot be used: which, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct GgufError {
    /// The file, as the caller named it.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a GGUF file.
///
/// Messages name the key or tensor, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The system could not read it.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The first four bytes are others.
    #[error("begins with {}, expected \"GGUF\"; it is not a GGUF file", got.escape_ascii())]
    NotGguf {
        /// Its first bytes.
        got: Vec<u8>,
    },
    /// The numbers are stored big endian.
    #[error(
        "is stored big endian, only little endian is read; convert it on the machine it is from"
    )]
    BigEndian,
    /// Another version of the format.
    #[error("has GGUF version {got}, expected 2 or 3; convert it with a current llama.cpp")]
    Version {
        /// The version found.
        got: u32,
    },
    /// The file ends before what it announces.
    #[error(
        "ends in {what}: {wanted} bytes wanted at byte {at}, {left} left; \
         it is cut short: copy or download it again"
    )]
    CutShort {
        /// What was being read.
        what: String,
        /// Where.
        at: usize,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes left.
        left: usize,
    },
    /// A count that the rest of the file cannot hold.
    #[error(
        "announces {claimed} {what} at byte {at}, the rest of the file has room for {possible}; \
         it is damaged or cut short: copy or download it again"
    )]
    Count {
        /// What is counted.
        what: String,
        /// Where the count stands.
        at: usize,
        /// The count.
        claimed: u64,
        /// The most there could be.
        possible: u64,
    },
    /// Text that is not UTF-8.
    #[error("has {what} that is not UTF-8; convert the model again")]
    NotUtf8 {
        /// Which text.
        what: String,
    },
    /// A key longer than the format allows.
    #[error("has a key of {got} bytes, at most {MAX_KEY_BYTES} are allowed; it is damaged")]
    LongKey {
        /// Its length.
        got: usize,
    },
    /// A key occurs twice.
    #[error("has the key '{key}' twice; convert the model again")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A value type outside of the specification.
    #[error("gives key '{key}' the value type {got}, expected 0 to 12; it is damaged")]
    ValueType {
        /// The key.
        key: String,
        /// The type's number.
        got: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("gives key '{key}' the boolean {got}, expected 0 or 1; it is damaged")]
    Boolean {
        /// The key.
        key: String,
        /// The byte found.
        got: u8,
    },
    /// Arrays nested too deep.
    #[error("nests arrays of key '{key}' more than {MAX_DEPTH} deep; it is damaged or hostile")]
    Depth {
        /// The key.
        key: String,
    },
    /// An alignment that is not a power of two.
    #[error(
        "has general.alignment {got}, expected a power of two up to {MAX_ALIGNMENT} stored as u32; \
         convert the model again"
    )]
    Alignment {
        /// The value found.
        got: String,
    },
    /// A tensor occurs twice.
    #[error("has the tensor '{tensor}' twice; convert the model again")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// More dimensions than ggml has.
    #[error("gives tensor '{tensor}' {got} dimensions, expected at most {MAX_RANK}; it is damaged")]
    Rank {
        /// The tensor.
        tensor: String,
        /// The number found.
        got: u32,
    },
    /// The shape's product overflows.
    #[error("gives tensor '{tensor}' the shape {shape:?}, larger than any machine's memory")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape, slowest dimension first.
        shape: Vec<u64>,
    },
    /// Its type is unknown or does not divide its rows, or a value does not fit.
    #[error("tensor '{tensor}': {source}")]
    Blocks {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        source: GgmlError,
    },
    /// Data that does not begin at a multiple of the alignment.
    #[error(
        "puts tensor '{tensor}' at offset {got}, expected a multiple of {alignment}; it is damaged"
    )]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset in the data.
        got: u64,
        /// The file's alignment.
        alignment: usize,
    },
    /// Data behind the end of the file.
    #[error(
        "puts tensor '{tensor}' at bytes {begin} to {end} of the data, which has {available}; \
         it is cut short: copy or download it again"
    )]
    OutOfFile {
        /// The tensor.
        tensor: String,
        /// Its first byte.
        begin: u64,
        /// Its end.
        end: u64,
        /// Bytes of data there are.
        available: u64,
    },
    /// Two tensors claim the same bytes.
    #[error("lets tensor '{second}' at offset {begin} overlap '{first}', which ends at {end}")]
    Overlap {
        /// The tensor before.
        first: String,
        /// Where it ends.
        end: u64,
        /// The tensor that begins too early.
        second: String,
        /// Where it begins.
        begin: u64,
    },
    /// No tensor of that name.
    #[error("has no tensor '{tensor}'{near}")]
    MissingTensor {
        /// The name asked for.
        tensor: String,
        /// Names close to it, as the tail of the message.
        near: String,
    },
    /// No such key.
    #[error("has no key '{key}'{near}")]
    MissingKey {
        /// The key asked for.
        key: String,
        /// Keys close to it, as the tail of the message.
        near: String,
    },
    /// The key's value has another type, or is out of range.
    #[error("gives key '{key}' the value {got}, expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What was asked for.
        expected: &'static str,
        /// Type and, where short, value.
        got: String,
    },
}
