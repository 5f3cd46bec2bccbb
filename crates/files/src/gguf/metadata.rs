//! The typed keys and values of a GGUF file.

use std::path::PathBuf;

use indexmap::IndexMap;

use super::error::{GgufError, Problem};
use crate::near::near;

/// One metadata value.
#[expect(missing_docs, reason = "variants are the format's types by name")]
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: one type for all elements.
#[expect(missing_docs, reason = "variants are the format's types by name")]
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    pub(super) fn describe(&self) -> String {
        match self {
            Self::U8(v) => format!("{v} (u8)"),
            Self::I8(v) => format!("{v} (i8)"),
            Self::U16(v) => format!("{v} (u16)"),
            Self::I16(v) => format!("{v} (i16)"),
            Self::U32(v) => format!("{v} (u32)"),
            Self::I32(v) => format!("{v} (i32)"),
            Self::U64(v) => format!("{v} (u64)"),
            Self::I64(v) => format!("{v} (i64)"),
            Self::F32(v) => format!("{v} (f32)"),
            Self::F64(v) => format!("{v} (f64)"),
            Self::Bool(v) => v.to_string(),
            Self::String(v) if v.len() <= 40 => format!("{v:?}"),
            Self::String(v) => format!("a text of {} bytes", v.len()),
            Self::Array(v) => format!("an array of {} {}", v.len(), v.element_type()),
        }
    }

    /// Widens any integer; `None` for other types.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }
}

impl Array {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Tells whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    const fn element_type(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "booleans",
            Self::String(_) => "texts",
            Self::Array(_) => "arrays",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    fn integers(&self) -> Option<Vec<i64>> {
        Some(match self {
            Self::U8(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::I8(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::U16(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::I16(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::U32(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::I32(v) => v.iter().map(|v| i64::from(*v)).collect(),
            Self::I64(v) => v.clone(),
            Self::U64(v) => v.iter().map(|v| i64::try_from(*v).ok()).collect::<Option<_>>()?,
            _ => return None,
        })
    }
}

macro_rules! into_value {
    ($($from:ty => $variant:ident),+) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                Self::$variant(value)
            }
        }
        impl From<Vec<$from>> for Value {
            fn from(values: Vec<$from>) -> Self {
                Self::Array(Array::$variant(values))
            }
        }
    )+};
}

into_value!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32);
into_value!(bool => Bool, String => String, u64 => U64, i64 => I64, f64 => F64);

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// All keys of a file, in the file's order, with getters whose errors name file and key.
///
/// Writers differ in the width of the integers they store, so integer getters take any width and
/// check the range.
///
/// # Examples
/// ```
/// # use retune_files::gguf::Metadata;
/// let mut metadata = Metadata::default();
/// metadata.insert("llama.block_count", 30u32);
/// assert_eq!(metadata.usize("llama.block_count")?, 30);
/// assert_eq!(metadata.optional("llama.expert_count", Metadata::usize)?, None);
/// let error = metadata.usize("llama.block_counts").unwrap_err().to_string();
/// assert!(error.ends_with("has no key 'llama.block_counts'; near names: llama.block_count"));
/// # Ok::<(), retune_files::gguf::GgufError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    pub(super) file: PathBuf,
    pub(super) entries: IndexMap<String, Value>,
}

impl Metadata {
    /// Sets a key; a new key comes last, a known one keeps its place.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.entries.insert(key.into(), value.into());
    }

    /// Removes a key and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.entries.shift_remove(key)
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tells whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Tells whether a key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Lists keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Looks up a value that may be absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// Reads a key that may be absent with one of the getters: `None` if it is, an error if it is
    /// there with the wrong type.
    ///
    /// # Errors
    /// Those of the getter, except [`Problem::MissingKey`].
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        getter: impl FnOnce(&'a Self, &str) -> Result<T, GgufError>,
    ) -> Result<Option<T>, GgufError> {
        if self.contains(key) { getter(self, key).map(Some) } else { Ok(None) }
    }

    /// Reads a key with `read`, or says what was expected instead.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, GgufError> {
        let fail = |problem| GgufError { file: self.file.clone(), problem };
        let Some(value) = self.get(key) else {
            let near = near(key, self.entries.keys().map(String::as_str));
            return Err(fail(Problem::MissingKey { key: key.to_owned(), near }));
        };
        read(value).ok_or_else(|| {
            fail(Problem::WrongType { key: key.to_owned(), expected, got: value.describe() })
        })
    }

    /// Reads a non-negative integer of any width.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        self.typed(key, "an integer of 0 or more", |v| v.integer()?.try_into().ok())
    }

    /// Reads a non-negative integer that counts something in memory.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn usize(&self, key: &str) -> Result<usize, GgufError> {
        self.typed(key, "a count", |v| v.integer()?.try_into().ok())
    }

    /// Reads an integer of any width.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn i64(&self, key: &str) -> Result<i64, GgufError> {
        self.typed(key, "an integer", |v| v.integer()?.try_into().ok())
    }

    /// Reads a float of either width, rounding to `f32`.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.typed(key, "a float", |v| match v {
            Value::F32(v) => Some(*v),
            Value::F64(v) => Some(*v as f32),
            _ => None,
        })
    }

    /// Reads a boolean.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.typed(key, "a boolean", |v| if let Value::Bool(v) = v { Some(*v) } else { None })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.typed(
            key,
            "a text",
            |v| if let Value::String(v) = v { Some(v.as_str()) } else { None },
        )
    }

    /// Reads an array of texts.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        self.typed(key, "an array of texts", |v| match v {
            Value::Array(Array::String(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// Reads an array of `f32`.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn f32s(&self, key: &str) -> Result<&[f32], GgufError> {
        self.typed(key, "an array of f32", |v| match v {
            Value::Array(Array::F32(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// Reads an array of integers of any width.
    ///
    /// # Errors
    /// [`Problem::MissingKey`] or [`Problem::WrongType`].
    pub fn i64s(&self, key: &str) -> Result<Vec<i64>, GgufError> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Array(v) => v.integers(),
            _ => None,
        })
    }
}
