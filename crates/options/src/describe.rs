//! What follows from a declaration: schema, table of options, commented recipe.

use crate::{
    item::Value,
    options::{OptionSpec, Presence},
    write,
};
use serde_json::{Value as Json, json};
use std::{fmt::Write, ops::Bound};

/// Returns the JSON Schema (draft 2020-12) of a table of options.
pub fn schema(specs: &[OptionSpec]) -> Json {
    let properties: serde_json::Map<_, _> =
        specs.iter().map(|spec| (spec.name.to_owned(), property(spec))).collect();
    let required: Vec<_> = specs.iter().filter(|s| s.required).map(|s| s.name).collect();
    let mut schema =
        json!({"type": "object", "properties": properties, "additionalProperties": false});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn property(spec: &OptionSpec) -> Json {
    let mut schema = spec.schema.clone();
    // The range is that of the numbers, which in a list or map sit one level down.
    let inner = match &mut schema {
        Json::Object(fields) if fields.contains_key("items") => &mut schema["items"],
        Json::Object(fields) if fields.get("additionalProperties").is_some_and(Json::is_object) => {
            &mut schema["additionalProperties"]
        }
        _ => &mut schema,
    };
    for (bound, included, excluded) in [
        (&spec.bounds.min, "minimum", "exclusiveMinimum"),
        (&spec.bounds.max, "maximum", "exclusiveMaximum"),
    ] {
        match bound {
            Bound::Included(edge) => inner[included] = edge.to_json(),
            Bound::Excluded(edge) => inner[excluded] = edge.to_json(),
            Bound::Unbounded => {}
        }
    }
    schema["description"] = spec.help.as_str().into();
    if let Some(default) = &spec.default {
        schema["default"] = default.value.to_json();
    }
    schema
}

/// Returns the options as a Markdown table; nested ones follow with dotted names.
pub fn markdown_table(specs: &[OptionSpec]) -> String {
    let mut out = "| option | type | default | meaning |\n|---|---|---|---|\n".to_owned();
    rows(specs, "", &mut out);
    out
}

fn rows(specs: &[OptionSpec], prefix: &str, out: &mut String) {
    for spec in specs {
        let name = format!("{prefix}{}", spec.name);
        let mut kind = spec.kind.clone();
        if let Some(bounds) = spec.bounds.describe() {
            let _ = write!(kind, ", {bounds}");
        }
        let mut help = spec.help.clone();
        for choice in spec.choices {
            let _ = write!(help, "<br>`{}`: {}", choice.name, choice.help);
        }
        let default = match &spec.default {
            Some(default) => format!("`{}`", write::value(&default.value)),
            None if spec.required => "required".to_owned(),
            None => String::new(),
        };
        let cells = [format!("`{name}`"), kind, default, help];
        let cells = cells.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
        let _ = writeln!(out, "| {} |", cells.join(" | "));
        if let Some(nested) = spec.nested {
            rows(nested.specs, &format!("{name}."), out);
        }
    }
}

/// Returns a commented recipe of one table: each option with its help, range and default.
///
/// Options that have a default are commented out, so that the recipe says only what its writer
/// decides. `table` is the dotted name for the header; empty for the top of a recipe.
pub fn commented_toml(table: &str, specs: &[OptionSpec]) -> String {
    let mut out = String::new();
    section(table, specs, &mut out);
    out
}

fn section(table: &str, specs: &[OptionSpec], out: &mut String) {
    if !table.is_empty() {
        let _ = writeln!(out, "[{table}]");
    }
    for spec in specs.iter().filter(|spec| spec.nested.is_none()) {
        comment(&spec.help, out);
        let mut kind = spec.kind.clone();
        if let Some(bounds) = spec.bounds.describe() {
            let _ = write!(kind, ", {bounds}");
        }
        if spec.choices.is_empty() {
            comment(&format!("({kind}{})", if spec.required { ", required" } else { "" }), out);
        }
        for choice in spec.choices {
            comment(&format!("  {:12} {}", format!("{:?}", choice.name), choice.help), out);
        }
        let value = match &spec.default {
            Some(default) => write::value(&default.value),
            None => example(spec),
        };
        let mark = if spec.required { "" } else { "# " };
        let _ = writeln!(out, "{mark}{} = {value}\n", write::key(spec.name));
    }
    for spec in specs {
        let Some(nested) = spec.nested else { continue };
        comment(&spec.help, out);
        let name = write::key(spec.name);
        let inner = if table.is_empty() { name } else { format!("{table}.{name}") };
        match nested.presence {
            Presence::Always => section(&inner, nested.specs, out),
            Presence::Optional => commented_section(&format!("[{inner}]"), nested.specs, out),
            Presence::List => commented_section(&format!("[[{inner}]]"), nested.specs, out),
        }
    }
}

/// Writes a table that is not there by default, every line of it a comment.
fn commented_section(header: &str, specs: &[OptionSpec], out: &mut String) {
    let _ = writeln!(out, "# {header}");
    for spec in specs.iter().filter(|spec| spec.nested.is_none()) {
        let value = match &spec.default {
            Some(default) => write::value(&default.value),
            None => example(spec),
        };
        let _ = writeln!(out, "# {} = {value}", write::key(spec.name));
    }
    out.push('\n');
}

/// Makes up a value of the right type for an option without default.
fn example(spec: &OptionSpec) -> String {
    let edge = |bound: &Bound<Value>| match bound {
        Bound::Included(edge) => Some(write::value(edge)),
        _ => None,
    };
    if let Some(choice) = spec.choices.first() {
        return format!("{:?}", choice.name);
    }
    if let Some(text) = spec.schema["examples"][0].as_str() {
        return format!("{text:?}");
    }
    match spec.schema["type"].as_str() {
        Some("integer") => edge(&spec.bounds.min).unwrap_or_else(|| "0".to_owned()),
        Some("number") => edge(&spec.bounds.min).unwrap_or_else(|| "1.0".to_owned()),
        Some("boolean") => "false".to_owned(),
        Some("array") => "[]".to_owned(),
        Some("object") => "{}".to_owned(),
        _ => "\"…\"".to_owned(),
    }
}

/// Writes a text as comment lines of at most 88 characters.
fn comment(text: &str, out: &mut String) {
    let indent: String = text.chars().take_while(|c| *c == ' ').collect();
    let mut line = format!("# {indent}");
    let start = line.len();
    for word in text.split_whitespace() {
        if line.len() > start && line.chars().count() + word.chars().count() >= 88 {
            let _ = writeln!(out, "{}", line.trim_end());
            line = format!("# {indent}");
        }
        line.push_str(word);
        line.push(' ');
    }
    let _ = writeln!(out, "{}", line.trim_end());
}
