//! Strings, paths and patterns.

use super::OptionValue;
use crate::{
    bounds::NoEdge,
    item::{Item, Value},
    reader::Place,
    report::Diagnostic,
};
use serde_json::json;
use std::path::PathBuf;

impl OptionValue for String {
    type Edge = NoEdge;

    fn kind() -> String {
        "string".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        if let Value::String(text) = &item.value {
            return Some(text.clone());
        }
        place.mismatch(item, "string");
        None
    }

    fn to_item(&self) -> Option<Item> {
        Some(self.as_str().into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "string"})
    }
}

/// Paths are taken as written; an empty one is a mistake.
impl OptionValue for PathBuf {
    type Edge = NoEdge;

    fn kind() -> String {
        "path".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        match &item.value {
            Value::String(text) if !text.is_empty() => Some(Self::from(text)),
            _ => {
                place.mismatch(item, "path");
                None
            }
        }
    }

    fn to_item(&self) -> Option<Item> {
        Some(self.to_string_lossy().into_owned().into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "string", "minLength": 1})
    }
}

/// A regular expression, compiled when the recipe is read.
#[derive(Clone, Debug)]
pub struct Pattern(regex::Regex);

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// The reason when `text` is no regular expression.
    pub fn new(text: &str) -> Result<Self, regex::Error> {
        regex::Regex::new(text).map(Self)
    }

    /// Returns the compiled expression.
    pub fn regex(&self) -> &regex::Regex {
        &self.0
    }

    /// Compiles `text`, which stands at `item`, or notes what is wrong with it.
    pub(crate) fn compile(text: &str, item: &Item, place: &Place<'_>) -> Option<Self> {
        match Self::new(text) {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                let why = error.to_string();
                // The last line says what is wrong; those above redraw the pattern.
                let why = why.lines().last().unwrap_or_default();
                let why = why.strip_prefix("error: ").unwrap_or(why);
                let message = format!("`{}` must be a regular expression", place.path());
                place.report(Diagnostic::error(message).at(item.span).label(why));
                None
            }
        }
    }
}

impl Default for Pattern {
    fn default() -> Self {
        Self(regex::Regex::new("").expect("the empty pattern is valid"))
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl OptionValue for Pattern {
    type Edge = NoEdge;

    fn kind() -> String {
        "regular expression".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let Value::String(text) = &item.value else {
            place.mismatch(item, "regular expression");
            return None;
        };
        Self::compile(text, item, place)
    }

    fn to_item(&self) -> Option<Item> {
        Some(self.0.as_str().into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "string", "format": "regex"})
    }
}
