//! Writes values and tables as TOML.

use crate::item::{Item, Table, Value};
use std::fmt::Write;

/// Writes a table as a TOML document: plain keys first, then one `[header]` per sub-table.
///
/// Reading the text back gives an equal table.
///
/// # Examples
/// ```
/// # use retune_options::{Table, to_toml};
/// let mut lora = Table::default();
/// lora.insert("rank", retune_options::Value::Integer(8));
/// let mut recipe = Table::default();
/// recipe.insert("lora", lora);
/// recipe.insert("model", "smollm2-135m");
/// assert_eq!(to_toml(&recipe), "model = \"smollm2-135m\"\n\n[lora]\nrank = 8\n");
/// ```
pub fn to_toml(table: &Table) -> String {
    let mut out = String::new();
    document(table, "", &mut out);
    out
}

fn document(table: &Table, path: &str, out: &mut String) {
    for (name, entry) in table.iter() {
        if !has_header(&entry.item) {
            let _ = writeln!(out, "{} = {}", key(name), value(&entry.item.value));
        }
    }
    for (name, entry) in table.iter() {
        let inner = if path.is_empty() { key(name) } else { format!("{path}.{}", key(name)) };
        match &entry.item.value {
            Value::Table(sub) => section(sub, &inner, ("[", "]"), out),
            Value::List(items) if has_header(&entry.item) => {
                for item in items {
                    if let Value::Table(sub) = &item.value {
                        section(sub, &inner, ("[[", "]]"), out);
                    }
                }
            }
            _ => {}
        }
    }
}

fn section(table: &Table, path: &str, (open, close): (&str, &str), out: &mut String) {
    let only_sections = !table.is_empty() && table.iter().all(|(_, e)| has_header(&e.item));
    if open == "[[" || !only_sections {
        if !out.is_empty() {
            out.push('\n');
        }
        let _ = writeln!(out, "{open}{path}{close}");
    }
    document(table, path, out);
}

/// Says whether an item is written below a header of its own rather than after `=`.
fn has_header(item: &Item) -> bool {
    match &item.value {
        Value::Table(_) => true,
        Value::List(items) => {
            !items.is_empty() && items.iter().all(|item| matches!(item.value, Value::Table(_)))
        }
        _ => false,
    }
}

/// Writes one value on one line.
pub(crate) fn value(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Integer(value) => value.to_string(),
        Value::Float(value) => float(*value),
        Value::String(text) => string(text),
        Value::Datetime(text) => text.clone(),
        Value::List(items) => {
            let items: Vec<_> = items.iter().map(|item| self::value(&item.value)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Table(table) if table.is_empty() => "{}".to_owned(),
        Value::Table(table) => {
            let pairs: Vec<_> = table
                .iter()
                .map(|(name, entry)| format!("{} = {}", key(name), self::value(&entry.item.value)))
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        }
    }
}

/// Writes a key, quoted only where TOML asks for it.
pub(crate) fn key(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.is_empty() && name.chars().all(bare) { name.to_owned() } else { string(name) }
}

fn float(value: f64) -> String {
    if value.is_nan() { "nan".to_owned() } else { format!("{value:?}") }
}

fn string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04X}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
