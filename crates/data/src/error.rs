//! What can go wrong between a file of rows and its tokens.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error about data, a template or a tokenizer: what, where, expected, got, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file.
    #[error("cannot {action} {}: {source}{}", path.display(), where_from(path, source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb: `open`, `read`.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },

    /// A whole data file cannot be used.
    #[error("{}: {problem}; {hint}", path.display())]
    File {
        /// The data file.
        path: PathBuf,
        /// What is wrong, with what was expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },

    /// One row of a data file cannot be used.
    #[error("{}, line {line}: {problem}; {hint}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// The line the row starts on, counted from 1 (for Parquet: the row, counted from 1).
        line: usize,
        /// What is wrong, with what was expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },

    /// A row cannot be turned into a training example. [`Error::at`] adds the place.
    #[error("{problem}; {hint}")]
    Example {
        /// What is wrong, with what was expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },

    /// A chat template does not compile, or raised while rendering.
    #[error("the chat template {place}: {problem}; {hint}")]
    Template {
        /// Where: `does not compile (line 3)`, `failed (line 12)`, `refused the conversation`.
        place: String,
        /// What the template engine or the template itself said.
        problem: String,
        /// What to do.
        hint: String,
    },

    /// A tokenizer cannot be built, or does not fit its model.
    #[error("tokenizer {origin}: {problem}; {hint}")]
    Tokenizer {
        /// The file it came from, or what it was built from.
        origin: String,
        /// What is wrong, with what was expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },

    /// Settings of this crate contradict each other or are impossible.
    #[error("{setting}: {problem}; {hint}")]
    Setting {
        /// The setting's name.
        setting: &'static str,
        /// What is wrong, with what was expected and found.
        problem: String,
        /// What to do.
        hint: String,
    },
}

/// Points to the description beside a file that is missing: data that may not be passed on have only
/// that in a repository.
fn where_from(path: &Path, source: &std::io::Error) -> String {
    let readme = path.parent().map(|folder| folder.join("README.md"));
    match readme.filter(|readme| source.kind() == ErrorKind::NotFound && readme.is_file()) {
        Some(readme) => format!("\n  help: {} may say where it comes from", readme.display()),
        None => String::new(),
    }
}

impl Error {
    /// Makes an [`Error::Io`] out of a failed call, for use with `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    pub(crate) fn file(path: &Path, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into(), hint: hint.into() }
    }

    pub(crate) fn row(
        path: &Path,
        line: usize,
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::Row { path: path.to_owned(), line, problem: problem.into(), hint: hint.into() }
    }

    pub(crate) fn example(problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Example { problem: problem.into(), hint: hint.into() }
    }

    pub(crate) fn tokenizer(
        origin: impl Into<String>,
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::Tokenizer { origin: origin.into(), problem: problem.into(), hint: hint.into() }
    }

    /// Adds file and line to an error about one example; an error that knows its place is kept.
    #[must_use]
    pub fn at(self, path: &Path, line: usize) -> Self {
        match self {
            Self::Example { problem, hint } => {
                Self::Row { path: path.to_owned(), line, problem, hint }
            }
            Self::Template { place, problem, hint } => Self::Row {
                path: path.to_owned(),
                line,
                problem: format!("the chat template {place}: {problem}"),
                hint,
            },
            other => other,
        }
    }
}
