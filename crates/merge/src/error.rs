//! What can go wrong, said with place, expectation, finding and help.

use std::path::{Path, PathBuf};

use retune_files::SaveError;
use retune_files::atomic::WriteError;
use retune_files::safetensors::SafetensorsError;

/// Why weights could not be transformed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Weights cannot be read.
    #[error(transparent)]
    Read(#[from] SafetensorsError),
    /// Weights cannot be laid out or written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A compressed update cannot be read or made.
    #[error(transparent)]
    Compeft(#[from] retune_files::compeft::CompeftError),
    /// A setting is impossible.
    #[error("{setting}: expected {expected}, found {found}")]
    Setting {
        /// Its name.
        setting: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The system refused to write.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The system refused something else.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file or folder is not what it should be.
    #[error("{}: {what}: expected {expected}, found {found}; {help}", path.display())]
    Content {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
        /// What to do.
        help: String,
    },
    /// A method has no answer for the values of a tensor.
    #[error("tensor '{tensor}' of {model}: {what}; {help}")]
    Values {
        /// The tensor.
        tensor: String,
        /// The model, or all.
        model: String,
        /// What is wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// The plan has mistakes.
    #[error(transparent)]
    Plan(#[from] retune_options::Report),
    /// The models do not fit together.
    #[error("the models do not fit together:\n{}", list(problems))]
    Misfit {
        /// Everything that was found.
        problems: Vec<String>,
    },
    /// Whoever watched asked to stop.
    #[error("the merge was stopped")]
    Stopped,
    /// A model could not be found.
    #[error("{0}")]
    NotFound(String),
    /// Writing stopped after some tensors, which are kept.
    #[error(
        "{source}; {done} of {total} tensors are kept in {}: repeat the command to go on, or \
         delete that folder to start again",
        kept.display()
    )]
    Interrupted {
        /// The hidden folder with the work so far.
        kept: PathBuf,
        /// Tensors that need not be written again.
        done: usize,
        /// Tensors in all.
        total: usize,
        /// Why it stopped.
        source: Box<Error>,
    },
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Names the path of a system's error.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }
}

/// Most problems shown; a pair of strange models has one per tensor.
const SHOWN: usize = 8;

fn list(problems: &[String]) -> String {
    let mut lines: Vec<String> =
        problems.iter().take(SHOWN).map(|problem| format!("  - {problem}")).collect();
    if problems.len() > SHOWN {
        lines.push(format!("  - and {} more", problems.len() - SHOWN));
    }
    lines.join("\n")
}
