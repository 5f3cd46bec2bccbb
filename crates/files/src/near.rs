//! Names close to a mistyped or missing one, for error messages.

/// Names looked at before giving up; a hostile file may hold millions.
const MAX_NAMES: usize = 20_000;
const MAX_SHOWN: usize = 3;

/// Formats up to three names within a third of `wanted`'s length in edits, nearest first, as the
/// tail of a message; empty if there are none.
pub(crate) fn near<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    let limit = wanted.len() / 3;
    let mut found: Vec<(usize, &str)> = names
        .take(MAX_NAMES)
        .filter(|name| name.len().abs_diff(wanted.len()) <= limit && name.len() < 256)
        .map(|name| (edits(wanted.as_bytes(), name.as_bytes()), name))
        .filter(|(distance, _)| *distance <= limit)
        .collect();
    found.sort_unstable();
    let shown: Vec<&str> = found.iter().take(MAX_SHOWN).map(|(_, name)| *name).collect();
    if shown.is_empty() { String::new() } else { format!("; near names: {}", shown.join(", ")) }
}

/// Levenshtein distance, one row at a time.
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_insertions_deletions_and_replacements() {
        assert_eq!(edits(b"kitten", b"sitting"), 3);
        assert_eq!(edits(b"", b"abc"), 3);
        assert_eq!(edits(b"same", b"same"), 0);
    }

    #[test]
    fn nearest_come_first_and_strangers_not_at_all() {
        let names = ["lm_head.weight", "model.norm.bias", "model.norm.weight", "norm.weight"];
        assert_eq!(
            near("model.norms.weight", names.into_iter()),
            "; near names: model.norm.weight, model.norm.bias"
        );
        assert_eq!(near("x", names.into_iter()), "");
    }
}
