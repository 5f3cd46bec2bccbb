//! From bytes to checked metadata and places of tensors.

use std::ops::Range;
use std::path::Path;

use indexmap::IndexMap;
use indexmap::map::Entry;

use super::error::Problem;
use super::metadata::{Array, Metadata, Value};
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_DEPTH, MAX_KEY_BYTES, MAX_RANK,
    VERSION,
};
use crate::ggml::BlockType;

/// Fewest bytes of a key with its value: two lengths of text and type, one byte of value.
const MIN_ENTRY_BYTES: usize = 8 + 4 + 1;
/// Fewest bytes of a tensor's description: empty name, no dimension, type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A tensor's type, shape (slowest dimension first) and place in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    pub(super) kind: BlockType,
    pub(super) shape: Vec<usize>,
    pub(super) span: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) metadata: Metadata,
    pub(super) places: IndexMap<String, Place>,
}

impl Parsed {
    pub(super) fn parse(file: &Path, bytes: &[u8]) -> Result<Self, Problem> {
        let mut cursor = Cursor { bytes, at: 0 };
        let magic = &bytes[..bytes.len().min(4)];
        if magic != MAGIC {
            return Err(Problem::NotGguf { got: magic.to_vec() });
        }
        cursor.at = 4;
        let version = u32::from_le_bytes(cursor.array(|| "the version".into())?);
        if !(2..=VERSION).contains(&version) {
            let swapped = (2..=VERSION).contains(&version.swap_bytes());
            let other = Problem::Version { got: version };
            return Err(if swapped { Problem::BigEndian } else { other });
        }
        let tensors = cursor.count("tensors", MIN_TENSOR_BYTES)?;
        let keys = cursor.count("keys", MIN_ENTRY_BYTES)?;
        let mut metadata = Metadata { file: file.to_path_buf(), entries: IndexMap::new() };
        for _ in 0..keys {
            let (key, value) = cursor.entry()?;
            match metadata.entries.entry(key) {
                Entry::Vacant(entry) => entry.insert(value),
                Entry::Occupied(entry) => {
                    return Err(Problem::DuplicateKey { key: entry.key().clone() });
                }
            };
        }
        let alignment = alignment(&metadata)?;
        let mut infos: IndexMap<String, Info> = IndexMap::new();
        for _ in 0..tensors {
            let (name, info) = cursor.tensor()?;
            match infos.entry(name) {
                Entry::Vacant(entry) => entry.insert(info),
                Entry::Occupied(entry) => {
                    return Err(Problem::DuplicateTensor { tensor: entry.key().clone() });
                }
            };
        }
        // Without tensors there may be no padding, and so no data.
        let data =
            cursor.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX).min(bytes.len());
        let available = (bytes.len() - data) as u64;
        let mut places = IndexMap::with_capacity(infos.len());
        for (tensor, info) in infos {
            let place = info.place(&tensor, alignment, data, available)?;
            places.insert(tensor, place);
        }
        check_overlap(&places, data)?;
        Ok(Self { metadata, places })
    }
}

pub(super) fn alignment(metadata: &Metadata) -> Result<usize, Problem> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() && *n <= MAX_ALIGNMENT => Ok(*n as usize),
        Some(other) => Err(Problem::Alignment { got: other.describe() }),
    }
}

fn check_overlap(places: &IndexMap<String, Place>, data: usize) -> Result<(), Problem> {
    let mut order: Vec<(&String, &Place)> =
        places.iter().filter(|(_, place)| !place.span.is_empty()).collect();
    order.sort_by_key(|(_, place)| place.span.start);
    for pair in order.windows(2) {
        let [(first, before), (second, after)] = pair else { continue };
        if after.span.start < before.span.end {
            return Err(Problem::Overlap {
                first: (*first).clone(),
                end: (before.span.end - data) as u64,
                second: (*second).clone(),
                begin: (after.span.start - data) as u64,
            });
        }
    }
    Ok(())
}

/// A tensor's description as stored.
struct Info {
    kind: BlockType,
    /// Slowest dimension first.
    shape: Vec<u64>,
    offset: u64,
}

impl Info {
    fn place(
        self,
        tensor: &str,
        alignment: usize,
        data: usize,
        available: u64,
    ) -> Result<Place, Problem> {
        let name = || tensor.to_owned();
        let overflow = || Problem::Shape { tensor: name(), shape: self.shape.clone() };
        let shape: Vec<usize> = self
            .shape
            .iter()
            .map(|d| usize::try_from(*d).map_err(|_| overflow()))
            .collect::<Result<_, _>>()?;
        let bytes = byte_count(self.kind, &shape)
            .map_err(|source| Problem::Blocks { tensor: name(), source })?
            .ok_or_else(overflow)?;
        if !self.offset.is_multiple_of(alignment as u64) {
            return Err(Problem::Misaligned { tensor: name(), got: self.offset, alignment });
        }
        let end = self.offset.saturating_add(bytes as u64);
        if end > available {
            let begin = self.offset;
            return Err(Problem::OutOfFile { tensor: name(), begin, end, available });
        }
        let start = data + self.offset as usize;
        Ok(Place { kind: self.kind, shape, span: start..start + bytes })
    }
}

/// Returns the bytes a tensor takes; `None` if the product of its shape overflows, also where a zero
/// among the dimensions would hide it from some orders of multiplying.
///
/// # Errors
/// If a row does not divide into blocks: blocks do not span rows.
pub(super) fn byte_count(
    kind: BlockType,
    shape: &[usize],
) -> Result<Option<usize>, crate::ggml::GgmlError> {
    kind.bytes_for(shape.last().copied().unwrap_or(1))?;
    let mut nonzero = shape.iter().filter(|d| **d != 0);
    let values = nonzero.try_fold(1usize, |product, d| product.checked_mul(*d));
    match values {
        Some(_) if shape.contains(&0) => Ok(Some(0)),
        Some(values) => kind.bytes_for(values).map(Some),
        None => Ok(None),
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64, what: impl Fn() -> String) -> Result<&'a [u8], Problem> {
        let (at, left) = (self.at, self.left());
        if n > left as u64 {
            return Err(Problem::CutShort { what: what(), at, wanted: n, left });
        }
        self.at += n as usize;
        Ok(&self.bytes[at..self.at])
    }

    fn array<const N: usize>(&mut self, what: impl Fn() -> String) -> Result<[u8; N], Problem> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    /// Reads a count of things of at least `min_bytes` each, checked against what is left.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, Problem> {
        let at = self.at;
        let claimed = u64::from_le_bytes(self.array(|| format!("the number of {what}"))?);
        let possible = (self.left() / min_bytes) as u64;
        if claimed > possible {
            return Err(Problem::Count { what: what.to_owned(), at, claimed, possible });
        }
        Ok(claimed as usize)
    }

    fn text(&mut self, what: impl Fn() -> String) -> Result<String, Problem> {
        let length = u64::from_le_bytes(self.array(&what)?);
        let bytes = self.take(length, &what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| Problem::NotUtf8 { what: what() })
    }

    fn entry(&mut self) -> Result<(String, Value), Problem> {
        let key = self.text(|| "a key".into())?;
        if key.len() > MAX_KEY_BYTES {
            return Err(Problem::LongKey { got: key.len() });
        }
        let of_key = || format!("the value of key '{key}'");
        let kind = u32::from_le_bytes(self.array(of_key)?);
        let value = match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(of_key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(of_key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(of_key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(of_key)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(of_key)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(of_key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(of_key)?)),
            7 => {
                let [byte] = self.array(of_key)?;
                Value::Bool(boolean(&key, byte)?)
            }
            8 => Value::String(self.text(of_key)?),
            9 => Value::Array(self.values(&key, 0)?),
            10 => Value::U64(u64::from_le_bytes(self.array(of_key)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(of_key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(of_key)?)),
            got => return Err(Problem::ValueType { key, got }),
        };
        Ok((key, value))
    }

    fn values(&mut self, key: &str, depth: usize) -> Result<Array, Problem> {
        if depth == MAX_DEPTH {
            return Err(Problem::Depth { key: key.to_owned() });
        }
        let kind = u32::from_le_bytes(self.array(|| format!("the array of key '{key}'"))?);
        Ok(match kind {
            0 => Array::U8(self.numbers(key, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, f32::from_le_bytes)?),
            7 => {
                let bytes = self.numbers(key, u8::from_le_bytes)?;
                let booleans = bytes.into_iter().map(|byte| boolean(key, byte));
                Array::Bool(booleans.collect::<Result<_, _>>()?)
            }
            8 => {
                let n = self.count(&format!("texts in key '{key}'"), 8)?;
                let mut texts = Vec::with_capacity(n);
                for i in 0..n {
                    texts.push(self.text(|| format!("text {i} of key '{key}'"))?);
                }
                Array::String(texts)
            }
            9 => {
                let n = self.count(&format!("arrays in key '{key}'"), 4 + 8)?;
                let mut arrays = Vec::with_capacity(n);
                for _ in 0..n {
                    arrays.push(self.values(key, depth + 1)?);
                }
                Array::Array(arrays)
            }
            10 => Array::U64(self.numbers(key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, f64::from_le_bytes)?),
            got => return Err(Problem::ValueType { key: key.to_owned(), got }),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        key: &str,
        number: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Problem> {
        let what = || format!("numbers in key '{key}'");
        let n = self.count(&what(), N)?;
        let bytes = self.take((n * N) as u64, what)?;
        Ok(bytes.as_chunks().0.iter().map(|b| number(*b)).collect())
    }

    fn tensor(&mut self) -> Result<(String, Info), Problem> {
        let name = self.text(|| "a tensor's name".into())?;
        let what = || format!("the description of tensor '{name}'");
        let rank = u32::from_le_bytes(self.array(what)?);
        if rank as usize > MAX_RANK {
            return Err(Problem::Rank { tensor: name, got: rank });
        }
        let mut shape = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            shape.push(u64::from_le_bytes(self.array(what)?));
        }
        shape.reverse();
        let id = u32::from_le_bytes(self.array(what)?);
        let offset = u64::from_le_bytes(self.array(what)?);
        match BlockType::from_id(id) {
            Ok(kind) => Ok((name, Info { kind, shape, offset })),
            Err(source) => Err(Problem::Blocks { tensor: name, source }),
        }
    }
}

fn boolean(key: &str, byte: u8) -> Result<bool, Problem> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        got => Err(Problem::Boolean { key: key.to_owned(), got }),
    }
}
