//! One GGUF file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{GgufError, Problem};
use super::metadata::Metadata;
use super::parse::{Parsed, Place};
use crate::ggml::BlockType;
use crate::near::near;
use crate::{FileBytes, FileSlice};

/// One GGUF file, checked whole when opened; cloning shares it.
#[derive(Debug, Clone)]
pub struct GgufFile {
    path: PathBuf,
    bytes: FileBytes,
    parsed: Arc<Parsed>,
}

impl GgufFile {
    /// Maps a file and reads its metadata. Reads no weights.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be read or breaks a rule of the format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let bytes = FileBytes::map(path)
            .map_err(|e| GgufError { file: path.to_path_buf(), problem: e.into() })?;
        Self::from_bytes(path, bytes)
    }

    /// Reads a file held in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// [`GgufError`] if it breaks a rule of the format.
    pub fn from_bytes(
        name: impl Into<PathBuf>,
        bytes: impl Into<FileBytes>,
    ) -> Result<Self, GgufError> {
        let (path, bytes) = (name.into(), bytes.into());
        match Parsed::parse(&path, &bytes) {
            Ok(parsed) => Ok(Self { path, bytes, parsed: Arc::new(parsed) }),
            Err(problem) => Err(GgufError { file: path, problem }),
        }
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.parsed.metadata
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.parsed.places.len()
    }

    /// Tells whether the file holds no tensor.
    pub fn is_empty(&self) -> bool {
        self.parsed.places.is_empty()
    }

    /// Lists the tensors' names in the file's order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parsed.places.keys().map(String::as_str)
    }

    /// Lists the tensors in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.parsed.places.iter().map(|(name, place)| self.view(name, place))
    }

    /// Looks up a tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<GgufTensor<'_>> {
        let (name, place) = self.parsed.places.get_key_value(name)?;
        Some(self.view(name, place))
    }

    /// Looks up a tensor that must be there.
    ///
    /// # Errors
    /// [`Problem::MissingTensor`], with near names.
    pub fn tensor(&self, name: &str) -> Result<GgufTensor<'_>, GgufError> {
        self.get(name).ok_or_else(|| {
            let near = near(name, self.names());
            let problem = Problem::MissingTensor { tensor: name.to_owned(), near };
            GgufError { file: self.path.clone(), problem }
        })
    }

    fn view<'a>(&'a self, name: &'a str, place: &'a Place) -> GgufTensor<'a> {
        let bytes = &self.bytes[place.span.clone()];
        GgufTensor { name, shape: &place.shape, kind: place.kind, bytes, file: self, place }
    }
}

/// A tensor as it lies in its file.
#[derive(Clone, Copy)]
pub struct GgufTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape, slowest dimension first (`[out, in]` for a linear layer).
    pub shape: &'a [usize],
    /// How its numbers are stored.
    pub kind: BlockType,
    /// Its blocks, row after row.
    pub bytes: &'a [u8],
    file: &'a GgufFile,
    place: &'a Place,
}

impl GgufTensor<'_> {
    /// Returns the count of its numbers.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.block_bytes() * self.kind.block_len()
    }

    /// Tells whether it holds no numbers.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Decodes all numbers.
    ///
    /// # Shapes
    /// - returns: the tensor's shape, flattened row-major
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        let fits = self.kind.dequantize(self.bytes, &mut out);
        debug_assert!(fits.is_ok(), "the length was taken from the bytes");
        out
    }

    /// Decodes all numbers, read rather than mapped: touched pages of the file would count as
    /// memory beside the copy.
    ///
    /// # Errors
    /// If the system cannot read the file.
    pub fn read_f32(&self) -> Result<Vec<f32>, GgufError> {
        let mut bytes = vec![0; self.bytes.len()];
        self.share()
            .read_at(0, &mut bytes)
            .map_err(|error| GgufError { file: self.file.path.clone(), problem: error.into() })?;
        let mut out = vec![0.0; self.len()];
        let fits = self.kind.dequantize(&bytes, &mut out);
        debug_assert!(fits.is_ok(), "the length was taken from the bytes");
        Ok(out)
    }

    /// Shares the tensor's blocks beyond the life of the view; the file stays mapped meanwhile.
    pub fn share(&self) -> FileSlice {
        FileSlice::new(&self.file.bytes, self.place.span.clone())
    }
}

impl std::fmt::Debug for GgufTensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.name, self.kind, self.shape)
    }
}
