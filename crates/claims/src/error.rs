//! What can stop a proof; a claim that does not hold is no error.

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what stopped a proof.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, method or batch is wrong.
    #[error(transparent)]
    Core(#[from] retune_core::Error),

    /// Training failed.
    #[error(transparent)]
    Train(#[from] retune_train::Error),

    /// Grafting, or tuning through an emulator, failed.
    #[error(transparent)]
    Run(#[from] retune_run::Error),

    /// Merging or compressing failed.
    #[error(transparent)]
    Merge(#[from] retune_merge::Error),

    /// A file of tensors cannot be written.
    #[error(transparent)]
    Save(#[from] retune_files::SaveError),

    /// A file of tensors cannot be read.
    #[error(transparent)]
    Read(#[from] retune_files::safetensors::SafetensorsError),

    /// The system has no room for temporary files.
    #[error("temporary files: {0}")]
    Io(#[from] std::io::Error),

    /// The system has no room for another thread.
    #[error("a thread cannot be started: {0}")]
    Thread(#[from] rayon::ThreadPoolBuildError),

    /// A method's options are wrong.
    #[error("the options of a proof are wrong:\n{0}")]
    Options(retune_options::Report),

    /// The proof asks for a method that is not in the registry.
    #[error("there is no method `{0}`")]
    NoMethod(String),
}
