//! What a card takes over from the cards of the adapters its weights were made of.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use retune_merge::card::{front_matter, licence_in};

use super::beside::{card_path, is_ours};

/// Whether the model a card describes gives the outputs its adapter's card was measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outputs {
    /// It does, but for rounding: what was measured holds.
    Same,
    /// It was thinned out, quantised or mixed since: what was measured is told, not claimed.
    Moved,
}

/// Largest card read, in bytes.
const MAX_CARD_BYTES: u64 = 1 << 20;

/// Adds what the cards of adapters say to the card of what was made of them: their tags, their
/// licence where the card has none, method, data and figures; the hub's `metrics` and `model-index`
/// where one adapter's outputs are the same still.
pub fn with_origins(card: &str, adapters: &[PathBuf], outputs: Outputs) -> String {
    let Some((head, body)) = front_matter(card) else { return card.to_owned() };
    let mut head = format!("{head}\n");
    let mut told = String::new();
    for (path, text) in adapters.iter().filter_map(|path| Some((path, read(path)?))) {
        let Some((front, about)) = front_matter(&text) else { continue };
        if let (None, Some(licence)) = (licence_in(&head), licence_in(front)) {
            let _ = writeln!(head, "license: {licence}");
        }
        // Of cards others wrote, lines of front matter may mean anything.
        if !is_ours(front) {
            continue;
        }
        let is_new = |line: &String| {
            line.starts_with("- ") && !head.lines().any(|known| known == line.as_str())
        };
        let tags: Vec<String> = block(front, "tags").into_iter().filter(is_new).collect();
        let tags: Vec<&str> =
            ["tags:"].into_iter().chain(tags.iter().map(String::as_str)).collect();
        head = head.replacen("tags:", &tags.join("\n"), 1);
        if adapters.len() == 1 && outputs == Outputs::Same {
            for line in ["metrics", "model-index"].iter().flat_map(|key| block(front, key)) {
                let _ = writeln!(head, "{line}");
            }
        }
        let about = about.trim_start();
        let about = about.strip_prefix("# ").and_then(|about| about.split_once('\n'));
        if let Some((title, about)) = about {
            let about = about.trim();
            let _ = write!(told, "\n## {title}: `{}`\n\n{about}\n", path.display());
        }
    }
    if !told.is_empty() && outputs == Outputs::Moved {
        told.insert_str(0, "\nFigures below were measured with the adapter as it was trained.\n");
    }
    format!("---\n{head}---\n{body}{told}")
}

/// Reads the card of an adapter's folder or file.
fn read(adapter: &Path) -> Option<String> {
    let path = if adapter.is_dir() { adapter.join("README.md") } else { card_path(adapter) };
    let is_small = std::fs::metadata(&path).ok()?.len() <= MAX_CARD_BYTES;
    is_small.then(|| std::fs::read_to_string(&path).ok())?
}

/// Returns the lines of a key of front matter, the key's first.
fn block(front: &str, key: &str) -> Vec<String> {
    let key = format!("{key}:");
    let mut lines = front.lines().skip_while(|line| !line.starts_with(&key));
    let first: Vec<String> = lines.next().map(str::to_owned).into_iter().collect();
    let rest = lines.take_while(|line| line.starts_with([' ', '-']));
    first.into_iter().chain(rest.map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "---\nlibrary_name: peft\nbase_model: b\nlicense: mit\ntags:\n- lora\n- retune\n\
                        metrics:\n- loss\nmodel-index:\n- name: \"run\"\n  results: []\n---\n\n# run\n\n\
                        A method.\n\n| data | `rows.jsonl` |\n";
    const CARD: &str = "---\nbase_model: b\ntags:\n- gguf\n- retune\n---\n\n# file\n";

    fn adapter(home: &Path, name: &str, card: &str) -> PathBuf {
        let folder = home.join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("README.md"), card).unwrap();
        folder
    }

    #[test]
    fn method_data_licence_and_figures_come_along() {
        let home = tempfile::tempdir().unwrap();
        let one = adapter(home.path(), "one", OURS);
        let shown = one.display();
        let alone = std::slice::from_ref(&one);
        let same = with_origins(CARD, alone, Outputs::Same);
        let expected = format!(
            "---\nbase_model: b\ntags:\n- lora\n- gguf\n- retune\nlicense: mit\nmetrics:\n- loss\n\
             model-index:\n- name: \"run\"\n  results: []\n---\n\n# file\n\n## run: `{shown}`\n\n\
             A method.\n\n| data | `rows.jsonl` |\n"
        );
        assert_eq!(same, expected);
        // What moved the outputs leaves no figure where a machine reads it, nor do several.
        let moved = with_origins(CARD, alone, Outputs::Moved);
        assert!(!moved.contains("model-index") && moved.contains("as it was trained"), "{moved}");
        let two = adapter(home.path(), "two", &OURS.replace("lora", "ia3"));
        let both = with_origins(CARD, &[one, two], Outputs::Same);
        assert!(both.contains("tags:\n- ia3\n- lora\n- gguf\n- retune\n"), "{both}");
        assert!(both.matches("## run").count() == 2 && !both.contains("metrics"), "{both}");
    }

    #[test]
    fn of_cards_others_wrote_the_licence_alone_is_taken() {
        let home = tempfile::tempdir().unwrap();
        let theirs = adapter(home.path(), "theirs", &OURS.replace("- retune\n", "- peft\n"));
        let card = with_origins(CARD, &[theirs], Outputs::Same);
        assert_eq!(card, CARD.replace("---\n\n", "license: mit\n---\n\n"));
        let none = [home.path().join("nowhere"), adapter(home.path(), "bare", "no front matter")];
        assert_eq!(with_origins(CARD, &none, Outputs::Same), CARD);
        let stated = CARD.replace("tags:", "license: apache-2.0\ntags:");
        let other = adapter(home.path(), "other", OURS);
        let card = with_origins(&stated, &[other], Outputs::Same);
        assert!(card.contains("license: apache-2.0\n") && !card.contains("license: mit"), "{card}");
    }

    #[test]
    fn a_compressed_file_has_its_card_beside_it() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("a.compeft");
        std::fs::write(home.path().join("a.compeft.md"), OURS).unwrap();
        assert!(with_origins(CARD, &[file], Outputs::Same).contains("rows.jsonl"));
    }
}
