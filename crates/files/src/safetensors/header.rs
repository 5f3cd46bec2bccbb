//! The JSON header: from bytes to checked places of tensors, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::error::Problem;
use crate::Dtype;

/// Longest header read: the reference implementation's limit, and so that of every file it wrote.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;
pub(super) const METADATA: &str = "__metadata__";

/// A tensor's type, shape and place in the data behind the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) span: Range<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) places: BTreeMap<String, Place>,
    /// Where the data begins in the file.
    pub(super) data_start: usize,
}

impl Header {
    pub(super) fn parse(file: &[u8]) -> Result<Self, Problem> {
        let too_short = Problem::TooShort { got: file.len() };
        let (length, rest) = file.split_first_chunk::<8>().ok_or(too_short)?;
        let claimed = u64::from_le_bytes(*length);
        let available = (rest.len() as u64).min(MAX_HEADER_BYTES);
        if claimed > available {
            return Err(Problem::HeaderTooLong { claimed, available });
        }
        let (json, data) = rest.split_at(claimed as usize);
        // Copied so that a file changed meanwhile cannot change text that was already checked.
        let json = String::from_utf8(json.to_vec())
            .map_err(|e| Problem::Header { message: e.to_string() })?;
        if !json.starts_with('{') {
            let message = "it does not begin with '{'".to_owned();
            return Err(Problem::Header { message });
        }
        let raw: RawHeader =
            serde_json::from_str(&json).map_err(|e| Problem::Header { message: e.to_string() })?;
        let mut header = Self { data_start: 8 + json.len(), ..Self::default() };
        header.add_metadata(raw.metadata)?;
        header.add_places(raw.tensors, data.len() as u64)?;
        Ok(header)
    }

    fn add_metadata(&mut self, entries: Vec<Pairs<String>>) -> Result<(), Problem> {
        for (i, Pairs(entries)) in entries.into_iter().enumerate() {
            if i > 0 {
                return Err(Problem::DuplicateName { name: METADATA.to_owned() });
            }
            for (key, value) in entries {
                if self.metadata.contains_key(&key) {
                    return Err(Problem::DuplicateName { name: key });
                }
                self.metadata.insert(key, value);
            }
        }
        Ok(())
    }

    fn add_places(&mut self, raw: Vec<(String, RawPlace)>, data_len: u64) -> Result<(), Problem> {
        let mut order = Vec::with_capacity(raw.len());
        let mut seen = BTreeSet::new();
        for (name, raw) in &raw {
            if !seen.insert(name) {
                return Err(Problem::DuplicateName { name: name.clone() });
            }
            let place = raw.check(name, data_len)?;
            order.push((place, name));
        }
        order.sort_by_key(|(place, name)| (place.span.start, place.span.end, *name));
        let mut end = 0;
        for (place, name) in order {
            if place.span.start != end {
                return Err(Problem::NotContiguous {
                    tensor: name.clone(),
                    expected: end as u64,
                    got: place.span.start as u64,
                });
            }
            end = place.span.end;
            self.places.insert(name.clone(), place);
        }
        if end as u64 != data_len {
            return Err(Problem::TrailingBytes { expected: end as u64, got: data_len });
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlace {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawPlace {
    fn check(&self, name: &str, data_len: u64) -> Result<Place, Problem> {
        let tensor = || name.to_owned();
        let dtype = Dtype::from_name(&self.dtype)
            .ok_or_else(|| Problem::UnknownDtype { tensor: tensor(), got: self.dtype.clone() })?;
        let overflow = || Problem::ShapeOverflow { tensor: tensor(), shape: self.shape.clone() };
        let shape: Vec<usize> = self
            .shape
            .iter()
            .map(|d| usize::try_from(*d).map_err(|_| overflow()))
            .collect::<Result<_, _>>()?;
        let bytes = byte_count(dtype, &shape).ok_or_else(overflow)?;
        let [begin, end] = self.data_offsets;
        if end.checked_sub(begin) != Some(bytes as u64) {
            let expected = bytes as u64;
            return Err(Problem::WrongSpan {
                tensor: tensor(),
                shape,
                dtype,
                expected,
                begin,
                end,
            });
        }
        if end > data_len {
            return Err(Problem::CutShort { tensor: tensor(), end, available: data_len });
        }
        Ok(Place { dtype, shape, span: begin as usize..end as usize })
    }
}

/// Returns the bytes a tensor takes; `None` if the product overflows, also where a zero among the
/// dimensions would hide it.
pub(super) fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let mut nonzero = shape.iter().filter(|d| **d != 0);
    let product = nonzero.try_fold(dtype.size(), |product, d| product.checked_mul(*d))?;
    Some(if shape.contains(&0) { 0 } else { product })
}

/// Writes a header for tensors given in the order of their data, and returns where each begins and
/// ends in the file, with the file's length.
pub(super) fn build<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], usize)>,
    metadata: &BTreeMap<String, String>,
) -> (Vec<u8>, Vec<Range<u64>>) {
    let mut fields = Vec::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v)));
        let entries: Vec<String> = entries.collect();
        fields.push(format!(r#""{METADATA}":{{{}}}"#, entries.join(",")));
    }
    let mut spans = Vec::new();
    let mut end = 0;
    for (name, dtype, shape, bytes) in tensors {
        let begin = end;
        end += bytes as u64;
        let name = quoted(name);
        let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
        let shape = shape.join(",");
        fields.push(format!(
            r#"{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#
        ));
        spans.push(begin..end);
    }
    let mut json = format!("{{{}}}", fields.join(","));
    // Tensors then begin at a multiple of 8, so that a mapped file can be used in place.
    let padded = json.len().next_multiple_of(8);
    json.extend(std::iter::repeat_n(' ', padded - json.len()));
    let mut head = (padded as u64).to_le_bytes().to_vec();
    head.extend_from_slice(json.as_bytes());
    let start = head.len() as u64;
    (head, spans.into_iter().map(|s| s.start + start..s.end + start).collect())
}

/// Quotes and escapes text as JSON does.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The header as written, duplicates kept so that they can be named.
struct RawHeader {
    metadata: Vec<Pairs<String>>,
    tensors: Vec<(String, RawPlace)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { metadata: Vec::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        header.metadata.push(map.next_value()?);
                    } else {
                        let place = map
                            .next_value()
                            .map_err(|e| de::Error::custom(format_args!("tensor '{name}': {e}")))?;
                        header.tensors.push((name, place));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A JSON object with its entries in order, repeated keys included.
pub(super) struct Pairs<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}
