//! Writing tensors, in any order, to places fixed beforehand in a file that appears when complete.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::EncodeError;
use crate::atomic::{AtomicFile, WriteError};
use crate::ggml::GgmlError;
use crate::near::near;

/// Why a checkpoint file could not be written. The target is as it was before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The system refused.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A tensor cannot be part of the file.
    #[error("{}: tensor '{tensor}' {problem}", file.display())]
    Tensor {
        /// The file being written.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: TensorProblem,
    },
    /// Something else than a tensor does not fit the format.
    #[error("{}: {message}", file.display())]
    Unfit {
        /// The file being written.
        file: PathBuf,
        /// What, expected, got and what to do.
        message: String,
    },
}

/// What is wrong with a tensor to be written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Two tensors have this name.
    #[error("is listed twice; give every tensor its own name")]
    Duplicate,
    /// The format does not allow this name.
    #[error("cannot have this name: {0}")]
    Name(&'static str),
    /// The shape's product overflows, or the format has no room for it.
    #[error("of shape {shape:?} does not fit the format: {why}")]
    Shape {
        /// The shape.
        shape: Vec<usize>,
        /// The rule it breaks.
        why: String,
    },
    /// It was not announced when the file was started.
    #[error("was not announced when the file was started{near}")]
    Unknown {
        /// Names close to it, as the tail of the message.
        near: String,
    },
    /// Its bytes do not fill its place.
    #[error("takes {expected} bytes by its shape and type, got {got}")]
    WrongLength {
        /// Bytes announced.
        expected: u64,
        /// Bytes given.
        got: u64,
    },
    /// It came a second time.
    #[error("was already written; write every tensor once")]
    Twice,
    /// It never came.
    #[error("and {others} more were announced but not written; write every tensor, then finish")]
    Unwritten {
        /// How many besides this one.
        others: usize,
    },
    /// A value is beyond the type.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A value is beyond the block type.
    #[error(transparent)]
    Quantize(#[from] GgmlError),
}

impl SaveError {
    pub(crate) fn tensor(file: &Path, tensor: &str, problem: impl Into<TensorProblem>) -> Self {
        let (file, tensor) = (file.to_path_buf(), tensor.to_owned());
        Self::Tensor { file, tensor, problem: problem.into() }
    }
}

#[derive(Debug)]
struct Slot {
    span: Range<u64>,
    written: bool,
}

/// A file with a head and a fixed place for every tensor.
#[derive(Debug)]
pub(crate) struct PlacedFile {
    path: PathBuf,
    file: AtomicFile,
    slots: BTreeMap<String, Slot>,
}

impl PlacedFile {
    /// Starts the file; bytes between the tensors stay zero up to `length`.
    ///
    /// Names must differ from one another, and spans must not overlap.
    pub(crate) fn create(
        path: &Path,
        head: &[u8],
        spans: impl Iterator<Item = (String, Range<u64>)>,
        length: u64,
    ) -> Result<Self, SaveError> {
        let mut file = AtomicFile::create(path)?;
        file.set_len(length).and_then(|()| file.write_all(head)).map_err(|e| file.error(e))?;
        let slots = spans.map(|(name, span)| (name, Slot { span, written: false })).collect();
        Ok(Self { path: path.to_path_buf(), file, slots })
    }

    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let fail = |problem| Err(SaveError::tensor(&self.path, name, problem));
        let Some(slot) = self.slots.get(name) else {
            let near = near(name, self.slots.keys().map(String::as_str));
            return fail(TensorProblem::Unknown { near });
        };
        let expected = slot.span.end - slot.span.start;
        if expected != bytes.len() as u64 {
            return fail(TensorProblem::WrongLength { expected, got: bytes.len() as u64 });
        }
        if slot.written {
            return fail(TensorProblem::Twice);
        }
        let start = SeekFrom::Start(slot.span.start);
        let done = self.file.seek(start).and_then(|_| self.file.write_all(bytes));
        done.map_err(|e| self.file.error(e))?;
        if let Some(slot) = self.slots.get_mut(name) {
            slot.written = true;
        }
        Ok(())
    }

    /// Flushes and publishes the file.
    pub(crate) fn finish(self) -> Result<(), SaveError> {
        self.check_complete()?;
        Ok(self.file.commit()?)
    }

    pub(crate) fn check_complete(&self) -> Result<(), SaveError> {
        let mut missing = self.slots.iter().filter(|(_, slot)| !slot.written);
        let Some((name, _)) = missing.next() else { return Ok(()) };
        let others = missing.count();
        Err(SaveError::tensor(&self.path, name, TensorProblem::Unwritten { others }))
    }
}
