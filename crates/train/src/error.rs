//! What can go wrong while training.

use std::path::PathBuf;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what happened, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model, a method or a batch is wrong.
    #[error(transparent)]
    Core(#[from] retune_core::Error),

    /// The rows of a step cannot be read.
    #[error("{0}")]
    Data(Box<dyn std::error::Error + Send + Sync>),

    /// A checkpoint's tensors cannot be read.
    #[error(transparent)]
    Safetensors(#[from] retune_files::safetensors::SafetensorsError),

    /// A checkpoint cannot be written.
    #[error(transparent)]
    Save(#[from] retune_files::SaveError),

    /// A file or folder cannot be published.
    #[error(transparent)]
    Write(#[from] retune_files::atomic::WriteError),

    /// The loss or the gradient is not a number any more.
    #[error(
        "step {step}: the {what} is {value}\n  rows of this batch: {rows}\n  last good checkpoint: {checkpoint}\n  help: lower `train.learning_rate`, set `train.clip`, or look at these rows with `retune doctor`; `retune resume` goes on from the checkpoint"
    )]
    NotFinite {
        /// The step that failed, counted from 1.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// NaN or infinity.
        value: f64,
        /// Row numbers of the batch.
        rows: String,
        /// Where the last good checkpoint lies, or that there is none.
        checkpoint: String,
    },

    /// A batch has nothing to learn.
    #[error(
        "step {step}: no token of the batch is learned\n  rows of this batch: {rows}\n  help: look at the mask with `retune doctor`; `data.loss_on` and `data.max_length` decide what is learned"
    )]
    NothingToLearn {
        /// The step, counted from 1.
        step: u64,
        /// Row numbers of the batch.
        rows: String,
    },

    /// No checkpoint can be used.
    #[error("{path}: no usable checkpoint\n  found: {found}\n  help: start anew with `retune run`")]
    NoCheckpoint {
        /// The folder that was searched.
        path: PathBuf,
        /// What was there, and why each was refused.
        found: String,
    },

    /// A checkpoint belongs to another run.
    #[error("{path}: {what}\n  expected: {expected}\n  found: {found}\n  help: {help}")]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// What this run needs.
        expected: String,
        /// What the checkpoint has.
        found: String,
        /// What to do.
        help: String,
    },
}
