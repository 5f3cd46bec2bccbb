use std::io;
use std::path::PathBuf;

use crate::Dtype;

/// A safetensors file or folder that cannot be used: which, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct SafetensorsError {
    /// The file or folder, as the caller named it.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a safetensors file.
///
/// Messages name the tensor, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The system could not read it.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Fewer bytes than the header's length takes.
    #[error("has {got} bytes, a safetensors file has at least 8; copy or download it again")]
    TooShort {
        /// Bytes in the file.
        got: usize,
    },
    /// The header's length points past the end of the file or beyond the limit.
    #[error(
        "says its header has {claimed} bytes, at most {available} are possible; \
         it is cut short or not a safetensors file: copy or download it again"
    )]
    HeaderTooLong {
        /// Header length the file states.
        claimed: u64,
        /// Bytes that could belong to a header.
        available: u64,
    },
    /// The header is not the JSON the format asks for.
    #[error("has a bad header: {message}; it is damaged or not a safetensors file")]
    Header {
        /// The parser's message, with line and column.
        message: String,
    },
    /// Two tensors have one name, or two metadata entries one key.
    #[error("names '{name}' twice in its header; write it again with unique names")]
    DuplicateName {
        /// The repeated name.
        name: String,
    },
    /// A number type this crate does not read.
    #[error(
        "tensor '{tensor}' has dtype {got}, expected one of {}; convert the file to one of these",
        Dtype::ALL.map(Dtype::name).join(", ")
    )]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The type the header names.
        got: String,
    },
    /// The shape's product overflows.
    #[error("tensor '{tensor}' of shape {shape:?} is larger than any machine's memory")]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Offsets and shape disagree.
    #[error(
        "tensor '{tensor}' of shape {shape:?} and dtype {dtype} takes {expected} bytes, \
         its offsets {begin}..{end} do not span that; the file is damaged"
    )]
    WrongSpan {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: Dtype,
        /// Bytes shape and type ask for.
        expected: u64,
        /// Its first byte in the data.
        begin: u64,
        /// Its end in the data.
        end: u64,
    },
    /// A tensor ends behind the file.
    #[error(
        "tensor '{tensor}' ends at byte {end} of the data, which has {available}; \
         the file is cut short: copy or download it again"
    )]
    CutShort {
        /// The tensor.
        tensor: String,
        /// Its end in the data.
        end: u64,
        /// Bytes of data there are.
        available: u64,
    },
    /// Bytes between tensors belong to none, or to two.
    #[error(
        "tensor '{tensor}' begins at byte {got} of the data, expected {expected}: tensors must \
         follow one another without gap or overlap; write the file again"
    )]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Where the tensor before it ends.
        expected: u64,
        /// Where it begins.
        got: u64,
    },
    /// Bytes behind the last tensor.
    #[error(
        "has {got} bytes of data, its tensors take {expected}; \
         something was appended to it: copy or download it again"
    )]
    TrailingBytes {
        /// Bytes all tensors take.
        expected: u64,
        /// Bytes of data there are.
        got: u64,
    },
    /// No tensor of that name.
    #[error("has no tensor '{tensor}'{near}")]
    Missing {
        /// The name asked for.
        tensor: String,
        /// Names close to it, as the tail of the message.
        near: String,
    },
    /// The tensor holds numbers of another kind.
    #[error("tensor '{tensor}' has dtype {got}, expected {expected}")]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// What was asked for.
        expected: &'static str,
        /// Its type.
        got: Dtype,
    },
    /// A number that the wanted type cannot hold.
    #[error("tensor '{tensor}', index {index}: the {dtype} value is beyond the range of {wanted}")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// Index of the value in the flattened tensor.
        index: usize,
        /// Its type.
        dtype: Dtype,
        /// The type asked for.
        wanted: &'static str,
    },
    /// A folder without weights.
    #[error(
        "has neither model.safetensors nor model.safetensors.index.json; \
         give the folder or file that holds the weights"
    )]
    NoWeights,
    /// The index of a sharded folder is not the JSON expected.
    #[error("is a bad index: {message}; copy or download it again")]
    Index {
        /// The parser's message.
        message: String,
    },
    /// The index names a file outside of its folder.
    #[error(
        "maps tensor '{tensor}' to '{shard}', which leaves the folder; \
         expected a plain file name: do not trust this checkpoint"
    )]
    EscapesFolder {
        /// The tensor.
        tensor: String,
        /// The path the index gives.
        shard: String,
    },
    /// The index names a file that is not there.
    #[error(
        "names shard '{shard}' for {tensors} tensors (the first is '{first}'), but there is no \
         such file; download the missing shard"
    )]
    MissingShard {
        /// The file's name.
        shard: String,
        /// How many tensors it should hold.
        tensors: usize,
        /// The first of them.
        first: String,
    },
    /// A shard lacks a tensor that the index puts there.
    #[error(
        "maps tensor '{tensor}' to '{shard}', which does not hold it; \
         index and shards belong to different checkpoints: download all of them again"
    )]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard the index names.
        shard: String,
    },
    /// Two shards hold one tensor and the index does not say which counts.
    #[error(
        "tensor '{tensor}' is in both '{first}' and '{second}', and the index does not name it; \
         remove one of the two"
    )]
    InTwoShards {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
}
