//! `adapter_config.json` to options and back, driven by a method's list of keys.

use retune_core::spec::ModelSpec;
use retune_core::{Error, Result};
use retune_options::{Document, Item, Options, Table, to_toml};
use serde_json::{Map, Value, json};

use crate::adapter::peft_config;
use crate::frame::{Facts, Places, Target};
use crate::replacement;

/// The key that says that the file holds what PEFT would make again from a seed; PEFT drops keys
/// it does not know.
pub const COMPLETE: &str = "retune_complete";

/// Returns an error about one key.
pub fn error(key: &str, config: &Value, expected: &str) -> Error {
    Error::Setting {
        setting: format!("adapter_config.json: {key}"),
        what: "cannot be used".to_owned(),
        expected: expected.to_owned(),
        found: config.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string),
        help: "the file is damaged, or of a newer PEFT".to_owned(),
    }
}

/// Returns an error about a variant that is not supported.
pub fn unsupported(peft_type: &str, key: &str, config: &Value) -> Error {
    let found = config.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
    Error::Unsupported {
        what: format!("an adapter of type {peft_type} with `{key}` = {found}"),
        help: "merge it with the tool that made it, and use the merged model".to_owned(),
    }
}

/// Refuses a configuration in which a key is not what it has to be.
///
/// # Errors
/// [`Error::Unsupported`] for the first such key.
pub fn check_fixed(config: &Value, peft_type: &str, fixed: &[(&str, &str)]) -> Result<()> {
    for (key, expected) in fixed {
        let expected = parse(expected);
        let equal = match config.get(*key) {
            None | Some(Value::Null) => true,
            Some(found) => {
                *found == expected || found.as_f64().is_some_and(|f| Some(f) == expected.as_f64())
            }
        };
        if !equal {
            return Err(unsupported(peft_type, key, config));
        }
    }
    Ok(())
}

fn parse(json: &str) -> Value {
    serde_json::from_str(json)
        .unwrap_or_else(|error| unreachable!("a method's own JSON {json}: {error}"))
}

/// Reads options; a key that is missing or null has the option's default.
///
/// # Errors
/// [`Error::Setting`] with the first value that is of the wrong kind or out of range.
pub fn options<T: Options>(config: &Value, keys: &[(&str, &str)]) -> Result<T> {
    let mut table = Table::default();
    for (option, key) in keys {
        match config.get(*key) {
            None | Some(Value::Null) => {}
            Some(value) => {
                let item = item(value).ok_or_else(|| error(key, config, "a plain value"))?;
                table.insert(*option, item);
            }
        }
    }
    let wrong = |report: &retune_options::Report| {
        let first = report.diagnostics().first();
        Error::Setting {
            setting: "adapter_config.json".to_owned(),
            what: first.map_or_else(String::new, |d| d.message.clone()),
            expected: "a configuration as PEFT writes it".to_owned(),
            found: first.map_or_else(String::new, |d| d.label.clone()),
            help: "the file is damaged, or of a newer PEFT".to_owned(),
        }
    };
    let document =
        Document::parse("adapter_config.json", &to_toml(&table)).map_err(|r| wrong(&r))?;
    Ok(document.read(T::read).map_err(|report| wrong(&report))?.0)
}

fn item(value: &Value) -> Option<Item> {
    use retune_options::Value as Own;
    Some(match value {
        Value::Null => return None,
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => i128::from(whole).into(),
            None => number.as_f64()?.into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => Own::List(items.iter().map(item).collect::<Option<_>>()?).into(),
        Value::Object(map) => {
            let mut table = Table::default();
            for (key, value) in map {
                table.insert(key, item(value)?);
            }
            table.into()
        }
    })
}

/// Reads a key that holds one name or a list of names.
///
/// # Errors
/// [`Error::Setting`] if it holds something else.
pub fn names(config: &Value, key: &str) -> Result<Vec<String>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| error(key, config, "a list of names")),
        Some(_) => Err(error(key, config, "a name or a list of names")),
    }
}

/// Reads which modules an adapter changes.
///
/// # Errors
/// [`Error::Setting`] if there are none, or a list is none.
pub fn places(config: &Value) -> Result<Places> {
    let targets = names(config, "target_modules")?;
    if targets.is_empty() {
        return Err(error("target_modules", config, "the modules the adapter changes"));
    }
    if config.get("layers_pattern").is_some_and(|v| !v.is_null() && *v != json!([])) {
        // PEFT reads the layer's number behind this word; retune knows the layer of each weight.
        names(config, "layers_pattern")?;
    }
    let layer = |value: &Value| value.as_u64().map(|layer| layer as usize);
    let layers = match config.get("layers_to_transform") {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(layer).collect(),
        Some(one) => layer(one).map(|layer| vec![layer]),
    };
    let mut modules_to_save = names(config, "modules_to_save")?;
    let task = config.get("task_type").and_then(Value::as_str).unwrap_or_default();
    if matches!(task, "SEQ_CLS" | "TOKEN_CLS") {
        // PEFT writes both names whatever the head is called; the plan finds it by its role.
        modules_to_save.retain(|name| name != "classifier" && name != "score");
    }
    Ok(Places {
        targets,
        exclude: names(config, "exclude_modules")?,
        layers: layers.ok_or_else(|| error("layers_to_transform", config, "layer numbers"))?,
        modules_to_save,
    })
}

/// Writes the configuration of a new adapter.
pub fn write(
    facts: &Facts,
    options: &Table,
    places: &Places,
    spec: &ModelSpec,
    targets: &[Target],
) -> Map<String, Value> {
    let mut config = peft_config(facts.peft_type, spec);
    for (key, value) in facts.fixed.iter().chain(facts.written) {
        config.insert((*key).to_owned(), parse(value));
    }
    for (option, key) in facts.keys {
        let value = options.get(option).map_or(Value::Null, |entry| entry.item.value.to_json());
        config.insert((*key).to_owned(), number(value));
    }
    let list = |items: &[String]| if items.is_empty() { Value::Null } else { json!(items) };
    let knows = |key: &str| facts.written.iter().any(|(known, _)| *known == key);
    let expressible = (places.exclude.is_empty() || knows("exclude_modules"))
        && (places.layers.is_empty() || knows("layers_to_transform"))
        && !places.targets.is_empty();
    config.insert(
        "target_modules".to_owned(),
        match places.targets.as_slice() {
            // A module's whole path selects exactly it, whatever else PEFT's type has no key for.
            _ if !expressible => {
                json!(targets.iter().map(|t| t.module.as_str()).collect::<Vec<_>>())
            }
            [one] if one == "all-linear" || one.contains(['*', '(', '[', '\\', '|', '^', '$']) => {
                json!(one)
            }
            many => json!(many),
        },
    );
    if expressible && !places.exclude.is_empty() {
        config.insert("exclude_modules".to_owned(), list(&places.exclude));
    }
    if expressible && !places.layers.is_empty() {
        config.insert("layers_to_transform".to_owned(), json!(places.layers));
    }
    if knows("fan_in_fan_out") {
        let transposed = targets.iter().any(|target| replacement::is_transposed_kind(target.kind));
        config.insert("fan_in_fan_out".to_owned(), json!(transposed));
    }
    config.insert("modules_to_save".to_owned(), list(&places.modules_to_save));
    config
}

/// Writes whole numbers without a fraction, as PEFT does.
fn number(value: Value) -> Value {
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if float.fract() == 0.0 && float.abs() < 1e15 => json!(float as i64),
            _ => Value::Number(number),
        },
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, self::number(v))).collect(),
        other => other,
    }
}
