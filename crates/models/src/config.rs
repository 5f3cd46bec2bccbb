//! Reads `config.json`, the old spellings and the new ones, with errors that name the key.

use std::path::{Path, PathBuf};

use retune_core::{Error, Result};
use serde_json::Value;

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

    /// Returns a part of the configuration as one of its own, e.g. `rope_parameters`.
    pub fn part(&self, key: &str) -> Option<Self> {
        let value = self.get(key).filter(|value| value.is_object())?;
        Some(Self { path: self.path.clone(), value: value.clone() })
    }
}
