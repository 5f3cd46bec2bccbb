//! Errors of the search for a model.

use std::fmt::Write as _;
use std::path::PathBuf;

/// One place that was asked for a model and did not have it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Attempt {
    /// The place: a path, a cache, a repository or a package.
    pub place: String,
    /// Why it did not answer.
    pub reason: String,
}

impl Attempt {
    pub(crate) fn new(place: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { place: place.into(), reason: reason.into() }
    }
}

/// Why a model could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The name is not of any form that could name a model.
    #[error(
        "`{name}` names no model: {problem}\n  expected: a folder, a .gguf file, hf:org/name, hf:org/name@revision, builtin:tiny, or one of {known}"
    )]
    BadName {
        /// The name as written.
        name: String,
        /// What is wrong with it.
        problem: String,
        /// Catalogue names.
        known: String,
    },
    /// The path exists and holds no model.
    #[error("{} is no model: {problem}\n  what to do: {advice}", path.display())]
    NotAModel {
        /// The path looked at.
        path: PathBuf,
        /// What is missing there.
        problem: String,
        /// What to do.
        advice: String,
    },
    /// Nothing that was asked has the model.
    #[error("{}", not_found(name, tried, advice))]
    NotFound {
        /// The name as written.
        name: String,
        /// Every place asked, in order.
        tried: Vec<Attempt>,
        /// What a person can do, most useful first.
        advice: Vec<String>,
    },
    /// Downloaded bytes are not the pinned ones.
    #[error(
        "{what} is not the file it should be\n  expected: sha256 {expected}\n  got:      sha256 {got}\n  what to do: nothing of it was kept; try again, and if it stays so, the source or a proxy on the way serves another file"
    )]
    WrongHash {
        /// The file or archive.
        what: String,
        /// The pinned hash, in hex.
        expected: String,
        /// The hash of the bytes that came.
        got: String,
    },
    /// A package's archive cannot be read or lacks a file.
    #[error(
        "{}: {problem}\n  what to do: nothing of it was kept; try again", path.display()
    )]
    BadArchive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}\n  what to do: {}", path.display(), io_advice(source))]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The cache could not be written.
    #[error(transparent)]
    Cache(#[from] retune_files::atomic::WriteError),
    /// There is no folder to keep models in.
    #[error(
        "no folder to keep models in: neither RETUNE_CACHE, XDG_CACHE_HOME nor HOME is set\n  what to do: set RETUNE_CACHE to a folder with room for the models"
    )]
    NoCacheFolder,
}

impl HubError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

fn io_advice(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room, or set RETUNE_CACHE to a folder on another disk"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "set RETUNE_CACHE to a folder you may write to"
        }
        _ => "check the path, or set RETUNE_CACHE to another folder",
    }
}

fn not_found(name: &str, tried: &[Attempt], advice: &[String]) -> String {
    let mut text = format!("cannot find the model `{name}`\n  tried, in order:");
    for (index, attempt) in tried.iter().enumerate() {
        let reason = attempt.reason.replace('\n', "\n       ");
        let _ = write!(text, "\n    {}. {}: {reason}", index + 1, attempt.place);
    }
    text.push_str("\n  what to do:");
    for line in advice {
        let _ = write!(text, "\n    - {line}");
    }
    text
}
