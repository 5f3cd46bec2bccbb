//! What can go wrong between a recipe and its report.

use std::path::{Path, PathBuf};

use retune_options::Report;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what happened, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The recipe has mistakes; all of them are in the report.
    #[error("the recipe has mistakes")]
    Recipe(Report),

    /// The model was not found.
    #[error(transparent)]
    Hub(#[from] retune_hub::HubError),

    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] retune_data::Error),

    /// The model, the method or a batch is wrong.
    #[error(transparent)]
    Core(#[from] retune_core::Error),

    /// Training failed.
    #[error(transparent)]
    Train(#[from] retune_train::Error),

    /// Weights cannot be transformed.
    #[error(transparent)]
    Merge(#[from] retune_merge::Error),

    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] retune_files::atomic::WriteError),

    /// The operating system refused a file or folder.
    #[error("{}: cannot {action}: {source}\n  help: {help}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
        /// What to do.
        help: String,
    },

    /// A run folder is not what it should be.
    #[error("{}: {what}\n  expected: {expected}\n  found: {found}\n  help: {help}", path.display())]
    Run {
        /// The run folder or a file in it.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
        /// What to do.
        help: String,
    },

    /// An adapter is for another base.
    #[error(
        "{}: the adapter was trained on another base\n  expected: {expected}\n  found: {found}\n  help: give the right base with --model, or --force if you know better",
        path.display()
    )]
    OtherBase {
        /// The adapter's folder.
        path: PathBuf,
        /// The base it was trained on.
        expected: String,
        /// The base it is used with.
        found: String,
    },

    /// The plan cannot be carried out on this machine.
    #[error("{what}\n  expected: {expected}\n  found: {found}\n  help: {help}")]
    Plan {
        /// What is impossible.
        what: String,
        /// What the machine or the recipe allows.
        expected: String,
        /// What the plan needs.
        found: String,
        /// The nearest settings that would do.
        help: String,
    },
}

impl Error {
    /// Says that the system refused a file.
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        let help = match source.kind() {
            std::io::ErrorKind::StorageFull => "free some space; what was saved before is whole",
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                "choose a folder you may write to with `runs = \"…\"`"
            }
            std::io::ErrorKind::NotFound => "check the path",
            _ => "check the disk",
        };
        Self::Io { path: path.to_path_buf(), action, source, help: help.to_owned() }
    }
}
