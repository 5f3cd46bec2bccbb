//! The tree a recipe is read into: TOML values that remember where they stand.

use indexmap::IndexMap;

/// A place in one of a document's sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Which source: 0 is the recipe file, the others are the assignments added to it.
    pub source: usize,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// One value with the place it was read from.
///
/// Two items are equal when their values are; where they stand does not count.
#[derive(Clone, Debug, Default)]
pub struct Item {
    /// The value.
    pub value: Value,
    /// Its place; `None` for a value that no person wrote, such as a default.
    pub span: Option<Span>,
}

/// A TOML value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number. Wider than TOML's 64 bits so that every `u64` seed fits.
    Integer(i128),
    /// A number with a point or an exponent, `inf` and `nan` included.
    Float(f64),
    /// Text.
    String(String),
    /// A date, a time or both, as written.
    Datetime(String),
    /// A list; also the tables of `[[name]]`.
    List(Vec<Item>),
    /// A table.
    Table(Table),
}

/// The key-value pairs of a table, in the order they were written.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: IndexMap<String, Entry>,
}

/// One value of a table, with the place of its key.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where the key stands.
    pub key_span: Option<Span>,
    /// What it was set to.
    pub item: Item,
}

impl Table {
    /// Returns the entry of a key.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Returns the entry of a key for editing.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Entry> {
        self.entries.get_mut(key)
    }

    /// Sets a key. A key that is there already keeps its position.
    pub fn insert(&mut self, key: impl Into<String>, item: impl Into<Item>) {
        self.insert_at(key, None, item.into());
    }

    pub(crate) fn insert_at(&mut self, key: impl Into<String>, key_span: Option<Span>, item: Item) {
        self.entries.insert(key.into(), Entry { key_span, item });
    }

    pub(crate) fn into_entries(self) -> impl Iterator<Item = (String, Entry)> {
        self.entries.into_iter()
    }

    /// Returns the pairs in the order they were written.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(key, entry)| (key.as_str(), entry))
    }

    /// Returns how many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Says whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && self.iter().all(|(key, entry)| other.get(key).is_some_and(|o| o.item == entry.item))
    }
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl Default for Value {
    fn default() -> Self {
        Self::Table(Table::default())
    }
}

impl<T: Into<Value>> From<T> for Item {
    fn from(value: T) -> Self {
        Self { value: value.into(), span: None }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i128> for Value {
    fn from(value: i128) -> Self {
        Self::Integer(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::String(value)
    }
}

impl From<Vec<Item>> for Value {
    fn from(value: Vec<Item>) -> Self {
        Self::List(value)
    }
}

impl From<Table> for Value {
    fn from(value: Table) -> Self {
        Self::Table(value)
    }
}

impl Value {
    /// Says in a person's words what this is, with the value itself where it is short.
    pub fn describe(&self) -> String {
        match self {
            Self::Bool(value) => format!("the boolean `{value}`"),
            Self::Integer(value) => format!("the integer `{value}`"),
            Self::Float(_) => format!("the number `{}`", crate::write::value(self)),
            Self::String(text) if text.chars().count() <= 40 => {
                format!("the string {}", crate::write::value(self))
            }
            Self::String(_) => "a string".to_owned(),
            Self::Datetime(text) => format!("the date or time `{text}`"),
            Self::List(items) => match items.len() {
                0 => "an empty list".to_owned(),
                1 => "a list of one value".to_owned(),
                n => format!("a list of {n} values"),
            },
            Self::Table(_) => "a table".to_owned(),
        }
    }

    /// Returns the same value as JSON; a number JSON has no form for becomes `null`.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match self {
            Self::Bool(value) => Json::from(*value),
            Self::Integer(value) => i64::try_from(*value)
                .map(Json::from)
                .or_else(|_| u64::try_from(*value).map(Json::from))
                .unwrap_or(Json::Null),
            Self::Float(value) => Json::from(*value),
            Self::String(text) | Self::Datetime(text) => Json::from(text.as_str()),
            Self::List(items) => items.iter().map(|item| item.value.to_json()).collect(),
            Self::Table(table) => table
                .iter()
                .map(|(key, entry)| (key.to_owned(), entry.item.value.to_json()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }
}
