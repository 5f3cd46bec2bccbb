//! Sizes and durations: numbers that carry their unit.

use super::OptionValue;
use crate::{
    bounds::NoEdge,
    item::{Item, Value},
    reader::Place,
};
use serde_json::json;
use std::{fmt, time::Duration};

/// A number of bytes, written `"4GiB"`, `"500 MB"` or as a bare integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

/// Durations in nanoseconds, the longest unit first.
const TIMES: [(&str, u64); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("min", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl Bytes {
    /// Parses `4GiB`, `1.5 GB` or `1024`; units are matched without regard to case.
    ///
    /// # Examples
    /// ```
    /// # use retune_options::Bytes;
    /// assert_eq!(Bytes::parse("4GiB"), Some(Bytes(4 << 30)));
    /// assert_eq!(Bytes::parse("1.5 kb"), Some(Bytes(1500)));
    /// assert_eq!(Bytes::parse("4 gigs"), None);
    /// ```
    pub fn parse(text: &str) -> Option<Self> {
        match amounts(text, &SIZES)?.as_slice() {
            [bytes] => Some(Self(*bytes)),
            _ => None,
        }
    }
}

/// Writes the largest unit that gives a whole number.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, size): &&(&str, u64)| self.0 >= *size && self.0.is_multiple_of(*size);
        let (unit, size) = SIZES.iter().find(fits).unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / size)
    }
}

impl OptionValue for Bytes {
    type Edge = NoEdge;

    fn kind() -> String {
        "size such as \"4GiB\"".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let size = match &item.value {
            Value::Integer(bytes) => u64::try_from(*bytes).ok().map(Self),
            Value::String(text) => Self::parse(text),
            _ => None,
        };
        if size.is_none() {
            place.mismatch(item, &Self::kind());
        }
        size
    }

    fn to_item(&self) -> Option<Item> {
        Some(self.to_string().into())
    }

    fn schema() -> serde_json::Value {
        json!({"examples": ["4GiB"], "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"},
        ]})
    }
}

/// A duration with its unit, written `"90s"`, `"1h 30min"` or `"250ms"`.
impl OptionValue for Duration {
    type Edge = NoEdge;

    fn kind() -> String {
        "duration such as \"90s\" or \"1h 30min\"".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let duration = match &item.value {
            Value::String(text) if text.trim().ends_with(char::is_alphabetic) => {
                let parts = amounts(text, &TIMES);
                parts.and_then(|parts| parts.into_iter().try_fold(0u64, u64::checked_add))
            }
            _ => None,
        };
        if duration.is_none() {
            place.mismatch(item, &Self::kind());
        }
        duration.map(Self::from_nanos)
    }

    fn to_item(&self) -> Option<Item> {
        let mut rest = u64::try_from(self.as_nanos()).unwrap_or(u64::MAX);
        let mut parts = Vec::new();
        for (unit, size) in TIMES {
            if rest >= size {
                parts.push(format!("{}{unit}", rest / size));
                rest %= size;
            }
        }
        let text = if parts.is_empty() { "0s".to_owned() } else { parts.join(" ") };
        Some(text.into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "string", "examples": ["90s"], "pattern": r"^(\s*[0-9]+(\.[0-9]+)?\s*(d|h|min|s|ms|us|ns))+\s*$"})
    }
}

/// Parses numbers, each followed by a unit; a unit may only be missing when it is the only one.
fn amounts(text: &str, units: &[(&str, u64)]) -> Option<Vec<u64>> {
    let mut rest = text.trim();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let after = after.trim_start();
        let letters = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let size = match units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
            Some((_, size)) => *size,
            None if unit.is_empty() && out.is_empty() && after.is_empty() => 1,
            None => return None,
        };
        out.push(scaled(number, size)?);
        rest = after.trim_start();
    }
    (!out.is_empty()).then_some(out)
}

fn scaled(number: &str, size: u64) -> Option<u64> {
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(size);
    }
    let value = number.parse::<f64>().ok()? * size as f64;
    (value.is_finite() && value < u64::MAX as f64).then_some(value.round() as u64)
}
