//! The keys of an `adapter_config.json`, read with errors that name them.

use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use serde_json::Value;

use super::prompt::STACKS;

/// The key of the task of texts that do not say theirs; PEFT drops keys it does not know.
pub const TASK: &str = "retune_task";

/// A configuration that is being read.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a>(pub &'a Value);

impl<'a> Keys<'a> {
    /// Returns an error about one key.
    pub fn error(self, key: &str, expected: &str) -> Error {
        Error::Setting {
            setting: format!("adapter_config.json: {key}"),
            what: "cannot be used".to_owned(),
            expected: expected.to_owned(),
            found: self.0.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string),
            help: "the file is damaged, or of a newer PEFT".to_owned(),
        }
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Reads a count that must be there.
    ///
    /// # Errors
    /// If it is missing, no whole number or zero.
    pub fn count(self, key: &str) -> Result<usize> {
        let found = self.optional_count(key)?.filter(|count| *count > 0);
        found.ok_or_else(|| self.error(key, "a whole number above 0"))
    }

    /// Reads a count below 2^24 that may be missing.
    ///
    /// # Errors
    /// If it is no whole number, or absurdly large.
    pub fn optional_count(self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_u64().filter(|count| *count < 1 << 24);
        let count = found.ok_or_else(|| self.error(key, "a whole number below 16777216"))?;
        Ok(Some(count as usize))
    }

    /// Reads a number that may be missing.
    ///
    /// # Errors
    /// If it is none.
    pub fn number(self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.error(key, "a number"))
    }

    /// Reads a word that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, "a text"))
    }

    /// Returns whether a switch is on.
    pub fn switch(self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Reads a list of whole numbers, empty where it is missing.
    ///
    /// # Errors
    /// If it holds something else.
    pub fn counts(self, key: &str) -> Result<Vec<usize>> {
        let wrong = || self.error(key, "whole numbers");
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_u64().map(|count| count as usize))
                .collect::<Option<_>>()
                .ok_or_else(wrong),
            Some(one) => one.as_u64().map(|count| vec![count as usize]).ok_or_else(wrong),
        }
    }

    /// Reads a name or a list of names, empty where it is missing.
    ///
    /// # Errors
    /// If it holds something else.
    pub fn names(self, key: &str) -> Result<Vec<String>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one.clone()]),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or_else(|| self.error(key, "a list of names")),
            Some(_) => Err(self.error(key, "a name or a list of names")),
        }
    }

    /// Reads `modules_to_save` without the names PEFT adds for every classifier; the plan finds a
    /// head by its role.
    ///
    /// # Errors
    /// If it holds something else than names.
    pub fn modules_to_save(self) -> Result<Vec<String>> {
        let mut modules = self.names("modules_to_save")?;
        let task = self.text("task_type")?.unwrap_or_default();
        if matches!(task, "SEQ_CLS" | "TOKEN_CLS") {
            modules.retain(|name| name != "classifier" && name != "score");
        }
        Ok(modules)
    }

    /// Checks for how many stacks of blocks a file is, 1 where it does not say.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if not for `expected`.
    pub fn stacks(self, expected: usize, spec: &ModelSpec) -> Result<()> {
        let count = self.optional_count(STACKS)?.unwrap_or(1);
        if count == expected {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!("an adapter for {count} stacks of blocks (`{STACKS}`) on {}", spec.class),
            help: format!("use one that is for {expected}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn wrong_kinds_are_errors_that_name_the_key() {
        let config = json!({"n": -1, "t": 3, "l": [1, "x"], "huge": 1u64 << 40, "z": 0});
        let keys = Keys(&config);
        for error in [
            keys.count("n").unwrap_err(),
            keys.count("missing").unwrap_err(),
            keys.count("z").unwrap_err(),
            keys.optional_count("huge").unwrap_err(),
            keys.text("t").map(|_| ()).unwrap_err(),
            keys.counts("l").unwrap_err(),
            keys.names("l").unwrap_err(),
        ] {
            assert!(error.to_string().contains("adapter_config.json: "), "{error}");
        }
        assert_eq!(keys.number("missing").unwrap(), None);
        assert!(!keys.switch("missing"));
    }
}
