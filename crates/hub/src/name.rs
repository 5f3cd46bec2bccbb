//! The forms a model's name takes in a recipe.

use crate::HubError;
use crate::catalogue::{BUILTINS, CatalogueEntry, catalogue, catalogue_entry, known_names};

/// A model's name, read from the text of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// `builtin:tiny`: part of the program.
    Builtin(&'static str),
    /// `hf:org/name`, perhaps with a file and a revision.
    Repository(RepositoryName),
    /// A name of the [`catalogue`].
    Catalogue(&'static CatalogueEntry),
    /// Anything else: a path.
    Path(String),
}

/// A repository of the Hugging Face hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryName {
    /// `org/name`, or `name` alone for the oldest repositories.
    pub id: String,
    /// Branch, tag or commit; `main` where none is written.
    pub revision: String,
    /// One `.gguf` file in it, where the repository holds several.
    pub file: Option<String>,
}

impl std::fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hf:{}", self.id)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl ModelName {
    /// Reads a name.
    ///
    /// # Errors
    /// [`HubError::BadName`] for an empty name, an unknown `builtin:` name, or an `hf:` name that
    /// is not `org/name`, `org/name@revision` or `org/name/file.gguf`.
    ///
    /// # Examples
    /// ```
    /// # use retune_hub::{HubError, ModelName};
    /// let ModelName::Repository(name) = ModelName::parse("hf:org/model@v1.0")? else {
    ///     unreachable!()
    /// };
    /// assert_eq!((name.id.as_str(), name.revision.as_str()), ("org/model", "v1.0"));
    /// # Ok::<(), HubError>(())
    /// ```
    pub fn parse(name: &str) -> Result<Self, HubError> {
        let bad = |problem: String| HubError::BadName {
            name: name.to_owned(),
            problem,
            known: known_names(),
        };
        if name.trim().is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        if name.contains('\0') {
            return Err(bad("it holds a NUL character".to_owned()));
        }
        if let Some(builtin) = name.strip_prefix("builtin:") {
            return BUILTINS
                .iter()
                .find(|known| **known == builtin)
                .map(|known| Self::Builtin(known))
                .ok_or_else(|| bad(format!("there is no built-in model `{builtin}`")));
        }
        if let Some(repository) = name.strip_prefix("hf:") {
            return RepositoryName::parse(repository).map(Self::Repository).map_err(bad);
        }
        Ok(catalogue_entry(name).map_or_else(|| Self::Path(name.to_owned()), Self::Catalogue))
    }
}

impl RepositoryName {
    /// Reads `org/name[/file.gguf][@revision]`; the error says what is wrong.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (path, revision) = match text.split_once('@') {
            Some((_, "")) => return Err("nothing follows the `@`".to_owned()),
            Some((path, revision)) => (path, revision),
            None => (text, "main"),
        };
        let mut revision_parts = revision.split('/');
        if !revision_parts.all(is_plain) {
            return Err(format!("`{revision}` cannot be a branch, tag or commit"));
        }
        let parts: Vec<&str> = path.split('/').collect();
        if let Some(part) = parts.iter().find(|part| !is_plain(part)) {
            return Err(format!(
                "`{part}` cannot be part of a repository's name (letters, digits, `.`, `-`, `_`)"
            ));
        }
        let (id, file) = match parts.as_slice() {
            [name] => ((*name).to_owned(), None),
            [org, name] => (format!("{org}/{name}"), None),
            [org, name, rest @ ..] => (format!("{org}/{name}"), Some(rest.join("/"))),
            [] => return Err("nothing follows `hf:`".to_owned()),
        };
        if let Some(file) = &file
            && !has_extension(file, "gguf")
        {
            return Err(format!("a file inside a repository must be a .gguf file, not `{file}`"));
        }
        Ok(Self { id, revision: revision.to_owned(), file })
    }
}

pub(crate) fn has_extension(name: &str, extension: &str) -> bool {
    std::path::Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Whether `part` is safe and legal as one step of a repository path.
fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// The catalogue entry a path-like name may have meant, for hints.
pub(crate) fn looks_like_repository(name: &str) -> bool {
    name.matches('/').count() == 1
        && RepositoryName::parse(name).is_ok()
        && !catalogue().iter().any(|entry| entry.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> Result<RepositoryName, String> {
        RepositoryName::parse(text)
    }

    #[test]
    fn repository_names_are_split() {
        assert_eq!(
            repository("org/model").unwrap(),
            RepositoryName { id: "org/model".into(), revision: "main".into(), file: None }
        );
        assert_eq!(
            repository("org/model/q/w.gguf@refs/pr/1").unwrap(),
            RepositoryName {
                id: "org/model".into(),
                revision: "refs/pr/1".into(),
                file: Some("q/w.gguf".into())
            }
        );
        assert_eq!(repository("gpt2").unwrap().id, "gpt2");
    }

    #[test]
    fn display_reads_back() {
        for text in ["hf:a/b", "hf:a/b@v1", "hf:a/b/c.gguf@v1", "hf:gpt2"] {
            let ModelName::Repository(name) = ModelName::parse(text).unwrap() else {
                panic!("{text}")
            };
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        for text in ["", "/", "../x", "a/..", "a/b@", "a/b@../..", "a b/c", "a/b/c.bin", "a//b"] {
            assert!(repository(text).is_err(), "{text}");
        }
        assert!(ModelName::parse("").is_err());
        assert!(ModelName::parse("builtin:huge").is_err());
    }

    #[test]
    fn each_form_is_told_apart() {
        assert_eq!(ModelName::parse("builtin:tiny").unwrap(), ModelName::Builtin("tiny"));
        assert!(matches!(
            ModelName::parse("smollm2-135m-instruct").unwrap(),
            ModelName::Catalogue(entry) if entry.name == "smollm2-135m-instruct"
        ));
        assert_eq!(ModelName::parse("models/x").unwrap(), ModelName::Path("models/x".into()));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,40}") {
            let _ = ModelName::parse(&text);
            let _ = ModelName::parse(&format!("hf:{text}"));
        }
    }
}
