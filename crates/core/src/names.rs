//! Names of things that are searched by people, and the nearest ones for error messages.

/// Returns up to `count` of `names` that are spelled most like `wanted`, nearest first.
///
/// Names that share less than half of their letters in order are left out. Ties keep the order
/// of `names`, so that a message is the same every time.
///
/// ```
/// use retune_core::names::nearest;
/// assert_eq!(nearest("q_porj", ["q_proj", "k_proj", "mlp"], 2), ["q_proj", "k_proj"]);
/// ```
pub fn nearest<'a>(
    wanted: &str,
    names: impl IntoIterator<Item = &'a str>,
    count: usize,
) -> Vec<&'a str> {
    let mut scored: Vec<(f64, &str)> = names
        .into_iter()
        .map(|name| (strsim::normalized_damerau_levenshtein(wanted, name), name))
        .filter(|(score, _)| *score >= 0.5)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.truncate(count);
    scored.into_iter().map(|(_, name)| name).collect()
}

/// Writes [`nearest`] names as a comma-separated list, or "none" where nothing is near.
pub fn nearest_list<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let found = nearest(wanted, names, 5);
    if found.is_empty() { "none".to_owned() } else { found.join(", ") }
}
