//! Making a ComPEFT file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::error::{CompeftError, CompeftProblem};
use super::header::{encode as encode_header, put_number};
use super::{CHECKSUM_BYTES, MAGIC, MAX_ENTRIES_PER_BYTE, MAX_HEADER_BYTES, RawHeader, RawTensor};
use crate::Dtype;
use crate::golomb::encode;

/// Where what the checksum is of begins.
const CHECKED_FROM: usize = MAGIC.len() + CHECKSUM_BYTES;

/// Makes a file tensor by tensor; it holds what is coded, which is small.
///
/// The bytes depend on scale, metadata and tensors only, not on the order they come in.
#[derive(Debug)]
pub struct CompeftWriter {
    scale: f32,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (RawTensor, Vec<u8>)>,
}

impl CompeftWriter {
    /// Starts a file whose non-zero entries have the size `scale`.
    pub fn new(scale: f32, metadata: BTreeMap<String, String>) -> Self {
        Self { scale, metadata, tensors: BTreeMap::new() }
    }

    /// Adds a tensor of signs: negative, zero or positive.
    ///
    /// # Errors
    /// [`CompeftProblem::Tensor`] for a repeated name, or signs that do not fill the shape.
    pub fn signs(&mut self, name: &str, shape: &[usize], signs: &[i8]) -> Result<(), CompeftError> {
        check_count(name, shape, signs.len(), 1)?;
        let (coding, bytes) = encode(signs);
        let tensor = RawTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            signs: Some((coding.num_nonzero, coding.modulus, coding.gap_bytes)),
            raw: None,
        };
        self.push(tensor, bytes)
    }

    /// Adds a tensor as it is: row-major, little endian.
    ///
    /// # Errors
    /// [`CompeftProblem::Tensor`] for a repeated name, or bytes that do not fill the shape.
    pub fn raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CompeftError> {
        check_count(name, shape, bytes.len(), dtype.size())?;
        let tensor = RawTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            signs: None,
            raw: Some(dtype.name().to_owned()),
        };
        self.push(tensor, bytes.to_vec())
    }

    fn push(&mut self, tensor: RawTensor, bytes: Vec<u8>) -> Result<(), CompeftError> {
        let name = tensor.name.clone();
        if self.tensors.insert(name.clone(), (tensor, bytes)).is_some() {
            return Err(refuse(&name, "comes a second time; give every tensor its own name"));
        }
        Ok(())
    }

    /// Returns the file's bytes.
    ///
    /// # Errors
    /// [`CompeftProblem`] if the scale is not a finite number above 0, the header would not fit its
    /// field, or nearly every entry is zero, so that readers would refuse the file.
    pub fn finish(self) -> Result<Vec<u8>, CompeftError> {
        let fail = |problem| CompeftError { file: new_file(), problem };
        if !(self.scale.is_finite() && self.scale > 0.0) {
            let message = format!("the scale is {}, expected a number above 0", self.scale);
            return Err(fail(CompeftProblem::Header(message)));
        }
        let (tensors, streams): (Vec<_>, Vec<_>) = self.tensors.into_values().unzip();
        let entries: u64 = tensors
            .iter()
            .filter(|tensor| tensor.signs.is_some())
            .map(|tensor| tensor.shape.iter().product::<usize>() as u64)
            .sum();
        let header = RawHeader { scale: f64::from(self.scale), metadata: self.metadata, tensors };
        let unpacked = encode_header(&header);
        let packed = miniz_oxide::deflate::compress_to_vec(&unpacked, 9);
        let mut out = MAGIC.to_vec();
        out.resize(CHECKED_FROM, 0);
        for bytes in [&packed, &unpacked] {
            if bytes.len() > MAX_HEADER_BYTES as usize {
                let found = bytes.len();
                let message = format!("it takes {found} bytes, at most {MAX_HEADER_BYTES} fit");
                return Err(fail(CompeftProblem::Header(message)));
            }
            put_number(&mut out, bytes.len() as u64);
        }
        out.extend(packed);
        for stream in streams {
            out.extend(stream);
        }
        if entries / MAX_ENTRIES_PER_BYTE > out.len() as u64 {
            return Err(fail(CompeftProblem::TooSparse { entries, bytes: out.len() as u64 }));
        }
        let checksum = Sha256::digest(&out[CHECKED_FROM..]);
        out[MAGIC.len()..CHECKED_FROM].copy_from_slice(&checksum[..CHECKSUM_BYTES]);
        Ok(out)
    }
}

fn check_count(name: &str, shape: &[usize], got: usize, size: usize) -> Result<(), CompeftError> {
    let len = shape.iter().try_fold(size, |product, side| product.checked_mul(*side));
    if len == Some(got) {
        return Ok(());
    }
    Err(refuse(name, &format!("its shape {shape:?} takes {len:?} bytes or signs, got {got}")))
}

fn refuse(name: &str, message: &str) -> CompeftError {
    let (tensor, message) = (name.to_owned(), message.to_owned());
    CompeftError { file: new_file(), problem: CompeftProblem::Tensor { tensor, message } }
}

/// Stands for a file that has no name yet.
fn new_file() -> PathBuf {
    PathBuf::from("a new ComPEFT file")
}
