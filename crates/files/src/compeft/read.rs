//! Reading a ComPEFT file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miniz_oxide::inflate;
use sha2::{Digest, Sha256};

use super::error::{CompeftError, CompeftProblem};
use super::{
    CHECKSUM_BYTES, MAGIC, MAX_ENTRIES_PER_BYTE, MAX_HEADER_BYTES, RawHeader, RawTensor, Sizes,
    header,
};
use crate::golomb::{Coding, decode, entropy_bits};
use crate::near::near;
use crate::{Dtype, FileBytes};

/// One ComPEFT file, checked whole when opened; tensors are decoded when they are asked for.
///
/// # Examples
/// ```
/// # use std::collections::BTreeMap;
/// # use retune_files::compeft::{CompeftFile, CompeftWriter};
/// let mut writer = CompeftWriter::new(0.5, BTreeMap::new());
/// writer.signs("a", &[2, 2], &[0, 1, 0, -1])?;
/// let file = CompeftFile::from_bytes("memory", writer.finish()?)?;
/// assert_eq!(file.tensor("a")?.to_f32()?, [0.0, 0.5, 0.0, -0.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CompeftFile {
    path: PathBuf,
    bytes: FileBytes,
    header: Arc<Header>,
}

#[derive(Debug)]
struct Header {
    scale: f32,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    shape: Vec<usize>,
    len: usize,
    content: Content,
    span: Range<usize>,
}

/// How a tensor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Signs, to be scaled.
    Signs(Coding),
    /// Numbers as they are.
    Raw(Dtype),
}

impl CompeftFile {
    /// Maps a file and checks its checksum and header.
    ///
    /// # Errors
    /// [`CompeftError`] if it cannot be read, is damaged or breaks a rule of the format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CompeftError> {
        let path = path.as_ref();
        let bytes = FileBytes::map(path)
            .map_err(|e| CompeftError { file: path.to_path_buf(), problem: e.into() })?;
        Self::from_bytes(path, bytes)
    }

    /// Checks a file held in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// [`CompeftError`] if it is damaged or breaks a rule of the format.
    pub fn from_bytes(
        name: impl Into<PathBuf>,
        bytes: impl Into<FileBytes>,
    ) -> Result<Self, CompeftError> {
        let (path, bytes) = (name.into(), bytes.into());
        match Header::parse(&bytes) {
            Ok(header) => Ok(Self { path, bytes, header: header.into() }),
            Err(problem) => Err(CompeftError { file: path, problem }),
        }
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of a non-zero entry.
    pub fn scale(&self) -> f32 {
        self.header.scale
    }

    /// Returns the header's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Lists the tensors' names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Lists the tensors in alphabetical order.
    pub fn tensors(&self) -> impl Iterator<Item = CompeftTensor<'_>> {
        self.names().filter_map(|name| self.get(name))
    }

    /// Looks up a tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<CompeftTensor<'_>> {
        let (name, place) = self.header.tensors.get_key_value(name)?;
        let bytes = &self.bytes[place.span.clone()];
        Some(CompeftTensor { name, shape: &place.shape, content: place.content, bytes, file: self })
    }

    /// Looks up a tensor that must be there.
    ///
    /// # Errors
    /// [`CompeftProblem::Missing`], with near names.
    pub fn tensor(&self, name: &str) -> Result<CompeftTensor<'_>, CompeftError> {
        self.get(name).ok_or_else(|| {
            let near = near(name, self.names());
            self.error(CompeftProblem::Missing { tensor: name.to_owned(), near })
        })
    }

    /// Counts what the file takes.
    pub fn sizes(&self) -> Sizes {
        let mut sizes = Sizes { file_bytes: self.bytes.len() as u64, ..Sizes::default() };
        for place in self.header.tensors.values() {
            sizes.f16_bytes += 2 * place.len as u64;
            match place.content {
                Content::Signs(coding) => {
                    sizes.coded_bytes += place.span.len() as u64;
                    sizes.num_entries += coding.len as u64;
                    sizes.num_nonzero += coding.num_nonzero as u64;
                }
                Content::Raw(_) => sizes.raw_bytes += place.span.len() as u64,
            }
        }
        let bits = entropy_bits(sizes.num_entries, sizes.num_nonzero) + 16.0;
        Sizes { entropy_bytes: bits / 8.0, ..sizes }
    }

    fn error(&self, problem: CompeftProblem) -> CompeftError {
        CompeftError { file: self.path.clone(), problem }
    }
}

/// A tensor as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub struct CompeftTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape, slowest dimension first; empty for a scalar.
    pub shape: &'a [usize],
    /// How it is kept.
    pub content: Content,
    /// Its stream.
    pub bytes: &'a [u8],
    file: &'a CompeftFile,
}

impl CompeftTensor<'_> {
    /// Returns the count of its entries.
    pub fn len(&self) -> usize {
        match self.content {
            Content::Signs(coding) => coding.len,
            Content::Raw(dtype) => self.bytes.len() / dtype.size(),
        }
    }

    /// Tells whether it has no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a tensor of signs, scaled, to values; puts raw numbers in their place.
    ///
    /// # Shapes
    /// - `values`: as many as [`Self::len`]
    /// # Errors
    /// [`CompeftProblem::Stream`] if the stream is not one the writer makes.
    pub fn add_to(&self, values: &mut [f32]) -> Result<(), CompeftError> {
        self.add_scaled(self.file.scale(), values)
    }

    /// Adds as [`Self::add_to`], with another scale than the file's.
    ///
    /// # Errors
    /// As [`Self::add_to`].
    pub fn add_scaled(&self, scale: f32, values: &mut [f32]) -> Result<(), CompeftError> {
        if values.len() != self.len() {
            let message = format!("has {} entries, {} values were given", self.len(), values.len());
            let tensor = self.name.to_owned();
            return Err(self.file.error(CompeftProblem::Tensor { tensor, message }));
        }
        match self.content {
            Content::Signs(coding) => {
                let steps = [scale, -scale];
                decode(&coding, self.bytes, |place, minus| {
                    values[place] += steps[usize::from(minus)];
                })
                .map_err(|problem| {
                    let tensor = self.name.to_owned();
                    self.file.error(CompeftProblem::Stream { tensor, problem })
                })
            }
            Content::Raw(dtype) => {
                let numbers = dtype.decode(self.bytes).map_err(|index| {
                    let tensor = self.name.to_owned();
                    let message = format!("value {index} is beyond the range of f32");
                    self.file.error(CompeftProblem::Tensor { tensor, message })
                })?;
                values.copy_from_slice(&numbers);
                Ok(())
            }
        }
    }

    /// Decodes the update itself: `scale`, `-scale` or 0; or the raw numbers.
    ///
    /// # Errors
    /// As [`Self::add_to`].
    pub fn to_f32(&self) -> Result<Vec<f32>, CompeftError> {
        let mut values = vec![0.0; self.len()];
        self.add_to(&mut values)?;
        Ok(values)
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, CompeftProblem> {
        let (raw, mut start) = unpack(bytes)?;
        let scale = raw.scale as f32;
        if f64::from(scale) != raw.scale {
            let message = format!("the scale {} is no 32-bit number", raw.scale);
            return Err(CompeftProblem::Header(message));
        }
        let mut tensors: BTreeMap<String, Place> = BTreeMap::new();
        let mut entries = 0u64;
        for tensor in raw.tensors {
            if tensors.last_key_value().is_some_and(|(last, _)| *last >= tensor.name) {
                return Err(CompeftProblem::Tensor {
                    tensor: tensor.name,
                    message: "comes twice or out of alphabetical order".to_owned(),
                });
            }
            let place = Place::parse(&tensor, start).map_err(|message| CompeftProblem::Tensor {
                tensor: tensor.name.clone(),
                message,
            })?;
            start = place.span.end;
            if start > bytes.len() {
                break;
            }
            if let Content::Signs(_) = place.content {
                entries = entries.saturating_add(place.len as u64);
            }
            tensors.insert(tensor.name, place);
        }
        if start != bytes.len() {
            return Err(CompeftProblem::Length {
                what: "the whole file",
                expected: start as u64,
                got: bytes.len() as u64,
            });
        }
        if entries / MAX_ENTRIES_PER_BYTE > bytes.len() as u64 {
            let bytes = bytes.len() as u64;
            return Err(CompeftProblem::TooSparse { entries, bytes });
        }
        Ok(Self { scale, metadata: raw.metadata, tensors })
    }
}

impl Place {
    /// Works out where a tensor's stream lies; says which rule is broken where it cannot.
    fn parse(tensor: &RawTensor, start: usize) -> Result<Self, String> {
        let shape = tensor.shape.clone();
        let len = shape
            .iter()
            .try_fold(1usize, |product, side| product.checked_mul(*side))
            .ok_or_else(|| format!("the product of its shape {shape:?} overflows"))?;
        let (content, num_bytes) = match (tensor.signs, &tensor.raw) {
            (Some((num_nonzero, modulus, gap_bytes)), None) => {
                let coding = Coding { len, num_nonzero, modulus, gap_bytes };
                coding.check().map_err(|error| error.to_string())?;
                (Content::Signs(coding), coding.num_bytes())
            }
            (None, Some(name)) => {
                let dtype = Dtype::from_name(name)
                    .ok_or_else(|| format!("its number type {name:?} is unknown"))?;
                let num_bytes = len
                    .checked_mul(dtype.size())
                    .ok_or_else(|| format!("the size of its shape {shape:?} overflows"))?;
                (Content::Raw(dtype), num_bytes)
            }
            _ => return Err("needs either `signs` or `raw`".to_owned()),
        };
        let end = start.checked_add(num_bytes).ok_or("its stream's length overflows")?;
        Ok(Self { shape, len, content, span: start..end })
    }
}

/// Reads the header, and where the streams begin.
fn unpack(bytes: &[u8]) -> Result<(RawHeader, usize), CompeftProblem> {
    let found = &bytes[..bytes.len().min(MAGIC.len())];
    let Some(([start @ .., version], rest)) = bytes.split_first_chunk::<8>() else {
        return Err(CompeftProblem::Magic { found: found.to_vec() });
    };
    if *start != MAGIC[..7] {
        return Err(CompeftProblem::Magic { found: found.to_vec() });
    }
    let head = match version {
        1 => Head::of_version_1(rest),
        2 => Head::of_version_2(rest),
        other => return Err(CompeftProblem::Version(*other)),
    }?;
    let header_end = (MAGIC.len() + head.num_bytes) as u64 + head.packed;
    if header_end > bytes.len() as u64 {
        return Err(too_short("head and header", header_end, bytes.len()));
    }
    if head.unpacked > u64::from(MAX_HEADER_BYTES) {
        let unpacked = head.unpacked;
        let message = format!("it takes {unpacked} bytes, at most {MAX_HEADER_BYTES} are read");
        return Err(CompeftProblem::Header(message));
    }
    if !Sha256::digest(head.checked).starts_with(head.checksum) {
        return Err(CompeftProblem::Checksum);
    }
    let header_end = header_end as usize;
    let packed = &bytes[MAGIC.len() + head.num_bytes..header_end];
    let limit = head.unpacked as usize;
    let wrong = |message: String| CompeftProblem::Header(message);
    let text = match version {
        1 => inflate::decompress_to_vec_zlib_with_limit(packed, limit),
        _ => inflate::decompress_to_vec_with_limit(packed, limit),
    };
    let text = text.map_err(|error| wrong(error.to_string()))?;
    if text.len() != limit {
        return Err(wrong(format!("it unpacks to {} bytes, expected {limit}", text.len())));
    }
    let header = match version {
        1 => serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?,
        _ => header::decode(&text).map_err(wrong)?,
    };
    Ok((header, header_end))
}

/// What stands between the version and the header.
struct Head<'a> {
    /// Bytes up to the header.
    num_bytes: usize,
    checksum: &'a [u8],
    /// What the checksum is of.
    checked: &'a [u8],
    /// Bytes of the header, packed and unpacked.
    packed: u64,
    unpacked: u64,
}

impl<'a> Head<'a> {
    fn of_version_1(bytes: &'a [u8]) -> Result<Self, CompeftProblem> {
        const NUM_BYTES: usize = 4 + 4 + 32;
        let Some((head, checked)) = bytes.split_at_checked(NUM_BYTES) else {
            let expected = MAGIC.len() + NUM_BYTES;
            return Err(too_short("the head", expected as u64, MAGIC.len() + bytes.len()));
        };
        let length = |at: usize| {
            u64::from(u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]))
        };
        let (packed, unpacked) = (length(0), length(4));
        Ok(Self { num_bytes: NUM_BYTES, checksum: &head[8..], checked, packed, unpacked })
    }

    fn of_version_2(bytes: &'a [u8]) -> Result<Self, CompeftProblem> {
        let Some((checksum, checked)) = bytes.split_at_checked(CHECKSUM_BYTES) else {
            let expected = MAGIC.len() + CHECKSUM_BYTES;
            return Err(too_short("the head", expected as u64, MAGIC.len() + bytes.len()));
        };
        let mut reader = header::Reader { bytes: checked, at: 0 };
        let mut length = || match reader.number() {
            Ok(length) if u32::try_from(length).is_ok() => Ok(length),
            Ok(length) => Err(CompeftProblem::Header(format!("it takes {length} bytes"))),
            Err(message) => Err(CompeftProblem::Header(message)),
        };
        let (packed, unpacked) = (length()?, length()?);
        let num_bytes = CHECKSUM_BYTES + reader.at;
        Ok(Self { num_bytes, checksum, checked, packed, unpacked })
    }
}

fn too_short(what: &'static str, expected: u64, got: usize) -> CompeftProblem {
    CompeftProblem::Length { what, expected, got: got as u64 }
}
