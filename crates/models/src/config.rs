//! Reads `config.json`, the old spellings and the new ones, with errors that name the key.

use std::path::{Path, PathBuf};

use retune_core::{Error, Result};
use serde_json::Value;

/// The longest side of a matrix that is believed: three of them multiply without overflow.
pub const MAX_SIDE: usize = 1 << 20;

/// The largest number of blocks that is believed.
pub const MAX_LAYERS: usize = 4096;

/// A configuration with the place it came from.
#[derive(Debug, Clone)]
pub struct Config {
    path: PathBuf,
    value: Value,
}

impl Config {
    /// Takes a configuration that was read from `path`.
    pub fn new(path: &Path, value: Value) -> Self {
        Self { path: path.to_path_buf(), value }
    }

    /// Returns the file the configuration came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces one key.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        if let Value::Object(map) = &mut self.value {
            map.insert(key.to_owned(), value.into());
        }
        self
    }

    /// Returns a configuration from the same place that says nothing.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self { path: self.path.clone(), value: Value::Object(serde_json::Map::new()) }
    }

    /// Returns the whole configuration.
    pub fn value(&self) -> &Value {
        &self.value
    }

    fn wrong(&self, key: &str, expected: &str, found: String) -> Error {
        Error::Content {
            path: self.path.clone(),
            what: format!("`{key}` cannot be used"),
            expected: expected.to_owned(),
            found,
            help: "the file is damaged, or of an architecture retune does not have".to_owned(),
        }
    }

    /// Returns a key's value where it is present and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// Reads a token's number that may be absent.
    ///
    /// # Errors
    /// If it is no whole number from 0 to the largest vocabulary.
    pub fn optional_token(&self, key: &str) -> Result<Option<u32>> {
        let Some(id) = self.get(key) else { return Ok(None) };
        id.as_u64()
            .filter(|id| *id < MAX_SIDE as u64)
            .map(|id| Some(id as u32))
            .ok_or_else(|| self.unknown(key, "a token's number"))
    }

    /// Reads a positive whole number.
    ///
    /// # Errors
    /// [`Error::Content`] if it is absent, not a whole number, zero, or absurdly large.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.wrong(key, "a whole number", "nothing".into()))
    }

    /// Reads a positive whole number that may be absent.
    ///
    /// # Errors
    /// As [`Config::size`] where it is present.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (1..=1 << 40).contains(&number) => Ok(Some(number as usize)),
            _ => Err(self.wrong(key, "a whole number between 1 and 2^40", value.to_string())),
        }
    }

    /// Reads the width of a matrix or the number of its rows.
    ///
    /// # Errors
    /// As [`Config::size`]; also above [`MAX_SIDE`], beyond which products of sides overflow.
    pub fn side(&self, key: &str) -> Result<usize> {
        let side = self.size(key)?;
        self.at_most(key, side, MAX_SIDE)
    }

    /// Reads a side that may be absent.
    ///
    /// # Errors
    /// As [`Config::side`] where it is present.
    pub fn optional_side(&self, key: &str) -> Result<Option<usize>> {
        self.optional_size(key)?.map(|side| self.at_most(key, side, MAX_SIDE)).transpose()
    }

    /// Checks a number that was read against a limit.
    ///
    /// # Errors
    /// [`Error::Content`] if it is larger.
    pub fn at_most(&self, key: &str, value: usize, limit: usize) -> Result<usize> {
        if value <= limit {
            return Ok(value);
        }
        Err(self.wrong(key, &format!("at most {limit}"), value.to_string()))
    }

    /// Reads a number above zero that may be absent.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and not a finite number above zero.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => Err(self.unknown(key, "a number above zero")),
            number => Ok(number),
        }
    }

    /// Reads a share of the whole, `default` where absent.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and not in `0..1`.
    pub fn rate(&self, key: &str, default: f64) -> Result<f64> {
        match self.number(key)? {
            None => Ok(default),
            Some(rate) if (0.0..1.0).contains(&rate) => Ok(rate),
            Some(_) => Err(self.unknown(key, "a rate from 0 to below 1")),
        }
    }

    /// Reads a number that may be absent.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and not a finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "a finite number", value.to_string())),
        }
    }

    /// Reads a switch, `default` where absent.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and neither true nor false.
    pub fn switch(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value.to_string()))
    }

    /// Reads a text that may be absent.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and not a text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text", value.to_string()))
    }

    /// Says that a key has a value retune does not know.
    pub fn unknown(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        self.wrong(key, expected, found)
    }

    /// Reads a part of the configuration as one of its own, e.g. `rope_parameters`.
    ///
    /// # Errors
    /// [`Error::Content`] if it is present and not an object.
    pub fn part(&self, key: &str) -> Result<Option<Self>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if !value.is_object() {
            return Err(self.wrong(key, "an object", value.to_string()));
        }
        Ok(Some(Self { path: self.path.clone(), value: value.clone() }))
    }
}
