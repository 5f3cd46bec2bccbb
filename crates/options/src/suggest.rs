//! What a person probably meant.

use crate::item::Value;

/// Returns up to three of `names` that `word` may be a slip of, best first.
pub fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let fold = |text: &str| text.to_lowercase().replace('-', "_");
    let folded = fold(word);
    let allowed = (word.chars().count() / 3).max(1);
    let mut scored: Vec<(usize, &str)> = names
        .filter_map(|name| {
            let other = fold(name);
            let distance = strsim::damerau_levenshtein(&folded, &other);
            let initials: String =
                other.split('_').filter_map(|part| part.chars().next()).collect();
            // `lr` for `learning_rate`, `target` for `targets`, `rank` for `lora_rank`.
            let part = folded.len() >= 3 && (other.contains(&folded) || folded.contains(&other));
            match distance {
                d if d <= allowed => Some((d, name)),
                _ if folded.len() >= 2 && folded == initials => Some((allowed + 1, name)),
                _ if part && other.len() >= 3 => Some((allowed + 1, name)),
                _ => None,
            }
        })
        .collect();
    scored.sort_by_key(|(distance, _)| *distance);
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Says how to turn a value of the wrong type into a `kind`, where that is obvious.
pub(crate) fn conversion(value: &Value, kind: &str) -> Option<String> {
    match (value, kind) {
        (Value::String(text), "integer") => {
            text.trim().parse::<i128>().ok().map(|n| format!("write it without quotes: {n}"))
        }
        (Value::String(text), "number") => {
            let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite())?;
            Some(format!("write it without quotes: {}", crate::write::value(&number.into())))
        }
        (Value::String(text), "boolean") => match text.to_lowercase().as_str() {
            "true" | "yes" | "on" => Some("write it without quotes: true".to_owned()),
            "false" | "no" | "off" => Some("write it without quotes: false".to_owned()),
            _ => None,
        },
        (Value::Integer(1), "boolean") => Some("write `true`".to_owned()),
        (Value::Integer(0), "boolean") => Some("write `false`".to_owned()),
        (Value::Float(number), "integer") if number.fract() == 0.0 && number.abs() < 1e15 => {
            Some(format!("write it without a point: {number:.0}"))
        }
        (Value::Integer(_) | Value::Float(_) | Value::Bool(_), "string" | "path") => {
            Some(format!("write it in quotes: \"{}\"", crate::write::value(value)))
        }
        (Value::String(_) | Value::Integer(_) | Value::Float(_) | Value::Bool(_), kind)
            if kind.starts_with("list of ") =>
        {
            Some(format!("write a list: [{}]", crate::write::value(value)))
        }
        _ => None,
    }
}
