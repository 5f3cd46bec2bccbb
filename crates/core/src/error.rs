//! What can go wrong between a checkpoint, a method and a pass.

use std::path::PathBuf;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what happened, where, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A safetensors file cannot be read.
    #[error(transparent)]
    Safetensors(#[from] retune_files::safetensors::SafetensorsError),

    /// A compressed update cannot be read.
    #[error(transparent)]
    Compeft(#[from] retune_files::compeft::CompeftError),

    /// A GGUF file cannot be read.
    #[error(transparent)]
    Gguf(#[from] retune_files::gguf::GgufError),

    /// Quantised blocks cannot be read or made.
    #[error(transparent)]
    Blocks(#[from] retune_files::ggml::GgmlError),

    /// A matrix cannot be kept in the form asked for.
    #[error(transparent)]
    Matrix(#[from] retune_kernels::matrix::PackedMatrixError),

    /// A file or folder cannot be written.
    #[error(transparent)]
    Save(#[from] retune_files::SaveError),

    /// A file or folder cannot be published.
    #[error(transparent)]
    Write(#[from] retune_files::atomic::WriteError),

    /// A file says something that does not fit together.
    #[error("{path}: {what}\n  expected: {expected}\n  found: {found}\n  help: {help}")]
    Content {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, with the place inside the file.
        what: String,
        /// What a correct file has.
        expected: String,
        /// What this file has.
        found: String,
        /// What to do about it.
        help: String,
    },

    /// A weight is missing from the checkpoint.
    #[error(
        "the checkpoint has no tensor `{name}`\n  needed by: {needed_by}\n  nearest names: {nearest}\n  help: the file may be for another architecture, or a shard is missing"
    )]
    MissingWeight {
        /// The checkpoint's own name of the weight.
        name: String,
        /// Which part of the model asks for it.
        needed_by: String,
        /// Names that are spelled almost the same.
        nearest: String,
    },

    /// A tensor has another shape than the model needs.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}\n  help: {help}")]
    Shape {
        /// The tensor's name in its file.
        name: String,
        /// The shape the model's configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
        /// What to do about it.
        help: String,
    },

    /// A target pattern selects nothing.
    #[error(
        "target `{target}` matches no {kind} of this model\n  nearest names: {nearest}\n  help: {help}"
    )]
    NoTarget {
        /// The pattern as written.
        target: String,
        /// What was searched, e.g. "linear layer".
        kind: &'static str,
        /// Names that are spelled almost the same.
        nearest: String,
        /// What to do about it.
        help: String,
    },

    /// A setting is impossible for this model.
    #[error("{setting}: {what}\n  expected: {expected}\n  found: {found}\n  help: {help}")]
    Setting {
        /// The setting as the recipe spells it, e.g. `method.lora.rank`.
        setting: String,
        /// What is wrong.
        what: String,
        /// Which values are possible.
        expected: String,
        /// The value asked for.
        found: String,
        /// What to do about it.
        help: String,
    },

    /// Input tokens do not fit the model.
    #[error("{what}\n  expected: {expected}\n  found: {found}\n  help: {help}")]
    Input {
        /// What is wrong with the batch.
        what: String,
        /// What the model takes.
        expected: String,
        /// What it was given.
        found: String,
        /// What to do about it.
        help: String,
    },

    /// Something exists in the field, but not here.
    #[error("{what} is not supported\n  help: {help}")]
    Unsupported {
        /// The thing asked for.
        what: String,
        /// The nearest possibility.
        help: String,
    },
}
