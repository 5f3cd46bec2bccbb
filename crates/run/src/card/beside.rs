//! Cards of single files: `NAME.md` beside the file.

use std::path::{Path, PathBuf};

use retune_files::atomic::write_file;
use retune_merge::card::front_matter;

use crate::error::{Error, Result};

/// Returns where the card of a file lies: beside it, under its whole name and `.md`, so that
/// several files of one folder each have a card and nobody's README.md is touched.
pub fn card_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".md");
    PathBuf::from(name)
}

/// Refuses to write a card over a text that is none of ours.
///
/// # Errors
/// [`Error::Run`] if something else stands where the card of `file` would.
pub fn check_card_free(file: &Path) -> Result<()> {
    let path = card_path(file);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    if front_matter(&text).is_some_and(|(front, _)| is_ours(front)) {
        return Ok(());
    }
    Err(Error::Run {
        path,
        what: "the card would be written over this file".to_owned(),
        expected: "nothing, or a card retune wrote".to_owned(),
        found: "another text".to_owned(),
        help: "move it away, or choose another name for the output".to_owned(),
    })
}

/// Writes the card of a file beside it.
///
/// # Errors
/// As [`check_card_free`]; if the disk is full.
pub fn write_card(file: &Path, card: &str) -> Result<()> {
    check_card_free(file)?;
    Ok(write_file(&card_path(file), card.as_bytes())?)
}

/// Tells by its front matter whether retune wrote a card.
pub(super) fn is_ours(front: &str) -> bool {
    front.lines().any(|line| line == "- retune")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cards_are_written_over() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("a.gguf");
        let path = home.path().join("a.gguf.md");
        assert_eq!(card_path(&file), path);
        let (first, second) = ("---\ntags:\n- retune\n---\n1\n", "---\ntags:\n- retune\n---\n2\n");
        for card in [first, second] {
            write_card(&file, card).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), card);
        }
        for text in ["my notes", "---\ntags:\n- retuned\n---\n", ""] {
            std::fs::write(&path, text).unwrap();
            let error = write_card(&file, first).unwrap_err().to_string();
            assert!(error.contains("a.gguf.md") && error.contains("another name"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
