//! One safetensors file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::{Problem, SafetensorsError};
use super::header::Header;
use crate::near::near;
use crate::{Dtype, FileBytes, FileSlice};

/// One safetensors file, checked whole when opened.
///
/// # Examples
/// ```
/// # use retune_files::{Dtype, safetensors::{SafetensorsFile, TensorSpec, safetensors_bytes}};
/// let spec = TensorSpec::new("norm.weight", Dtype::F32, [2]);
/// let bytes = Dtype::F32.encode(&[1.0, -2.5])?;
/// let file = safetensors_bytes(&[(spec, &bytes)], &Default::default())?;
///
/// let file = SafetensorsFile::from_bytes("memory", file)?;
/// assert_eq!(file.tensor("norm.weight")?.to_f32()?, [1.0, -2.5]);
/// let error = file.tensor("norm.weigth").unwrap_err();
/// assert_eq!(error.to_string(), "memory: has no tensor 'norm.weigth'; near names: norm.weight");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: FileBytes,
    header: std::sync::Arc<Header>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header. Reads no weights.
    ///
    /// # Errors
    /// [`SafetensorsError`] if it cannot be read or breaks any rule of the format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SafetensorsError> {
        let path = path.as_ref();
        let bytes = FileBytes::map(path)
            .map_err(|e| SafetensorsError { file: path.to_path_buf(), problem: e.into() })?;
        Self::from_bytes(path, bytes)
    }

    /// Checks a file held in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// [`SafetensorsError`] if it breaks any rule of the format.
    pub fn from_bytes(
        name: impl Into<PathBuf>,
        bytes: impl Into<FileBytes>,
    ) -> Result<Self, SafetensorsError> {
        let (path, bytes) = (name.into(), bytes.into());
        match Header::parse(&bytes) {
            Ok(header) => Ok(Self { path, bytes, header: header.into() }),
            Err(problem) => Err(SafetensorsError { file: path, problem }),
        }
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the header's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.header.places.len()
    }

    /// Tells whether the file holds no tensor.
    pub fn is_empty(&self) -> bool {
        self.header.places.is_empty()
    }

    /// Lists the tensors' names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.places.keys().map(String::as_str)
    }

    /// Lists the tensors in alphabetical order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names().filter_map(|name| self.get(name))
    }

    /// Looks up a tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, place) = self.header.places.get_key_value(name)?;
        let start = self.header.data_start + place.span.start;
        let bytes = &self.bytes[start..start + place.span.len()];
        Some(TensorView { name, shape: &place.shape, dtype: place.dtype, bytes, file: self, start })
    }

    /// Looks up a tensor that must be there.
    ///
    /// # Errors
    /// [`Problem::Missing`], with near names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, SafetensorsError> {
        self.get(name).ok_or_else(|| {
            let near = near(name, self.names());
            self.error(Problem::Missing { tensor: name.to_owned(), near })
        })
    }

    pub(super) fn error(&self, problem: Problem) -> SafetensorsError {
        SafetensorsError { file: self.path.clone(), problem }
    }
}

/// A tensor as it lies in its file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape, slowest dimension first; empty for a scalar.
    pub shape: &'a [usize],
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Its numbers, row-major, little endian.
    pub bytes: &'a [u8],
    file: &'a SafetensorsFile,
    /// Where the bytes begin in the file.
    start: usize,
}

impl TensorView<'_> {
    /// Returns the count of its numbers.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Tells whether it holds no numbers.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Decodes the numbers of any type as `f32`: integers beyond 24 bits and `F64` round to
    /// nearest, booleans become 0 and 1.
    ///
    /// # Errors
    /// [`Problem::OutOfRange`] for a finite `F64` beyond the range of `f32`.
    pub fn to_f32(&self) -> Result<Vec<f32>, SafetensorsError> {
        self.dtype.decode(self.bytes).map_err(|index| self.out_of_range(index, "f32"))
    }

    /// Copies bytes of the tensor from `start` on until `out` is full, by a read of the file instead
    /// of the map (see [`FileBytes::read_at`]).
    ///
    /// # Errors
    /// [`Problem::Io`] beyond the tensor's end or if the system refuses.
    pub fn read_bytes(&self, start: usize, out: &mut [u8]) -> Result<(), SafetensorsError> {
        let end = start.checked_add(out.len()).filter(|end| *end <= self.bytes.len());
        let inside = end.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        inside
            .and_then(|_| self.file.bytes.read_at(self.start + start, out))
            .map_err(|e| self.file.error(Problem::Io(e)))
    }

    /// Decodes the numbers from index `start` on as `f32`, until `out` is full, by a read of the
    /// file instead of the map (see [`FileBytes::read_at`]).
    ///
    /// `scratch` is reused from call to call.
    ///
    /// # Errors
    /// [`Problem::Io`] beyond the tensor's end or if the system refuses, [`Problem::OutOfRange`]
    /// as [`Self::to_f32`].
    pub fn read_f32(
        &self,
        start: usize,
        out: &mut [f32],
        scratch: &mut Vec<u8>,
    ) -> Result<(), SafetensorsError> {
        let size = self.dtype.size();
        let place = start.saturating_mul(size);
        if self.dtype == Dtype::F32 && cfg!(target_endian = "little") {
            return self.read_bytes(place, bytemuck::cast_slice_mut(out));
        }
        scratch.resize(out.len() * size, 0);
        self.read_bytes(place, scratch)?;
        let decoded = self.dtype.decode_into(scratch, out);
        decoded.map_err(|index| self.out_of_range(start + index, "f32"))
    }

    /// Decodes integers and booleans.
    ///
    /// # Errors
    /// [`Problem::WrongDtype`] for a float type, [`Problem::OutOfRange`] for a `U64` beyond `i64`.
    pub fn to_i64(&self) -> Result<Vec<i64>, SafetensorsError> {
        let (tensor, got) = (self.name, self.dtype);
        match self.dtype.decode_i64(self.bytes) {
            Some(numbers) => numbers.map_err(|index| self.out_of_range(index, "i64")),
            None => Err(self.file.error(Problem::WrongDtype {
                tensor: tensor.to_owned(),
                expected: "an integer type",
                got,
            })),
        }
    }

    /// Borrows the numbers of an `F32` tensor without a copy, where the file has them aligned.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if self.dtype != Dtype::F32 || cfg!(target_endian = "big") {
            return None;
        }
        bytemuck::try_cast_slice(self.bytes).ok()
    }

    /// Shares the tensor's bytes beyond the life of the view; the file stays mapped meanwhile.
    pub fn share(&self) -> FileSlice {
        FileSlice::new(&self.file.bytes, self.start..self.start + self.bytes.len())
    }

    fn out_of_range(&self, index: usize, wanted: &'static str) -> SafetensorsError {
        let (tensor, dtype) = (self.name.to_owned(), self.dtype);
        self.file.error(Problem::OutOfRange { tensor, index, dtype, wanted })
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.name, self.dtype, self.shape)
    }
}
