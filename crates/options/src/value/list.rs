//! Values made of values: optional ones, lists, maps.

use super::{ChoiceSpec, OptionValue, text::Pattern};
use crate::{
    item::{Item, Table, Value},
    options::{Nested, Presence},
    reader::Place,
};
use serde_json::json;
use std::collections::BTreeMap;

/// A key that may be left out. Give it no default: a plan could not tell that from none.
impl<T: OptionValue> OptionValue for Option<T> {
    type Edge = T::Edge;

    fn kind() -> String {
        T::kind()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        T::from_item(item, place).map(Some)
    }

    fn to_item(&self) -> Option<Item> {
        self.as_ref().and_then(T::to_item)
    }

    fn schema() -> serde_json::Value {
        T::schema()
    }

    fn absent(_place: &Place<'_>) -> Option<Self> {
        Some(None)
    }

    fn choices() -> &'static [ChoiceSpec] {
        T::choices()
    }

    fn nested() -> Option<Nested> {
        T::nested().map(|nested| Nested { presence: Presence::Optional, ..nested })
    }

    fn required() -> bool {
        false
    }
}

/// A list; a declared range holds for each value.
impl<T: OptionValue> OptionValue for Vec<T> {
    type Edge = T::Edge;

    fn kind() -> String {
        format!("list of {}", plural(&T::kind()))
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let Value::List(items) = &item.value else {
            place.mismatch(item, &Self::kind());
            return None;
        };
        // Collected first, so that the mistakes of every element are noted.
        let values: Vec<_> = items
            .iter()
            .enumerate()
            .map(|(index, item)| T::from_item(item, &place.element(index)))
            .collect();
        values.into_iter().collect()
    }

    fn to_item(&self) -> Option<Item> {
        Some(Value::List(self.iter().filter_map(T::to_item).collect()).into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "array", "items": T::schema()})
    }

    fn choices() -> &'static [ChoiceSpec] {
        T::choices()
    }

    fn nested() -> Option<Nested> {
        T::nested().map(|nested| Nested { presence: Presence::List, ..nested })
    }
}

/// One value or a list of them: `targets = "all-linear"`, `targets = ["q_proj", "v_proj"]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T: OptionValue> OptionValue for OneOrMany<T> {
    type Edge = T::Edge;

    fn kind() -> String {
        format!("{} or list of {}", T::kind(), plural(&T::kind()))
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        if let Value::List(_) = &item.value {
            return Vec::from_item(item, place).map(Self);
        }
        let place = place.or_kind(Vec::<T>::kind());
        T::from_item(item, &place).map(|value| Self(vec![value]))
    }

    fn to_item(&self) -> Option<Item> {
        match self.0.as_slice() {
            [one] => one.to_item(),
            _ => self.0.to_item(),
        }
    }

    fn schema() -> serde_json::Value {
        json!({"anyOf": [T::schema(), Vec::<T>::schema()]})
    }

    fn choices() -> &'static [ChoiceSpec] {
        T::choices()
    }
}

/// A table with free keys; a declared range holds for each value.
impl<T: OptionValue> OptionValue for BTreeMap<String, T> {
    type Edge = T::Edge;

    fn kind() -> String {
        format!("table of {}", plural(&T::kind()))
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        entries(item, place, |key, _, _| Some(key.to_owned()))
            .map(|pairs| pairs.into_iter().collect())
    }

    fn to_item(&self) -> Option<Item> {
        Some(table(self.iter().map(|(key, value)| (key.as_str(), value))))
    }

    fn schema() -> serde_json::Value {
        json!({"type": "object", "additionalProperties": T::schema()})
    }

    fn absent(_place: &Place<'_>) -> Option<Self> {
        Some(Self::new())
    }

    fn required() -> bool {
        false
    }
}

/// Values by pattern, in the order written: `{ "layers\\.[0-3]\\." = 4, "q_proj$" = 16 }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(pub Vec<(Pattern, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Patterns<T> {
    /// Returns the value of the first pattern that matches anywhere in `name`.
    pub fn find(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|(pattern, _)| pattern.regex().is_match(name)).map(|(_, value)| value)
    }
}

impl<T: OptionValue> OptionValue for Patterns<T> {
    type Edge = T::Edge;

    fn kind() -> String {
        format!("table of patterns with {}", plural(&T::kind()))
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        entries(item, place, Pattern::compile).map(Self)
    }

    fn to_item(&self) -> Option<Item> {
        Some(table(self.0.iter().map(|(key, value)| (key.regex().as_str(), value))))
    }

    fn schema() -> serde_json::Value {
        json!({
            "type": "object",
            "propertyNames": {"format": "regex"},
            "additionalProperties": T::schema(),
        })
    }

    fn absent(_place: &Place<'_>) -> Option<Self> {
        Some(Self::default())
    }

    fn required() -> bool {
        false
    }
}

/// Reads the pairs of a table with free keys, each key by `read_key`.
fn entries<'d, K, T: OptionValue>(
    item: &'d Item,
    place: &Place<'d>,
    read_key: impl Fn(&str, &Item, &Place<'_>) -> Option<K>,
) -> Option<Vec<(K, T)>> {
    let mut reader = place.reader(item)?;
    let Value::Table(pairs) = &item.value else { return None };
    let mut out = Some(Vec::new());
    for (name, entry) in pairs.iter() {
        reader.declare(name);
        let place = place.key(name);
        let key_item = Item { value: Value::Bool(true), span: entry.key_span };
        let pair = read_key(name, &key_item, &place);
        match (pair, T::from_item(&entry.item, &place), &mut out) {
            (Some(key), Some(value), Some(out)) => out.push((key, value)),
            (_, _, out) => *out = None,
        }
    }
    out
}

fn table<'a, T: OptionValue + 'a>(pairs: impl Iterator<Item = (&'a str, &'a T)>) -> Item {
    let mut table = Table::default();
    for (key, value) in pairs {
        if let Some(item) = value.to_item() {
            table.insert(key, item);
        }
    }
    Item { value: Value::Table(table), span: None }
}

/// Puts a kind in the plural: `list of strings` becomes `lists of strings`.
fn plural(kind: &str) -> String {
    let (noun, rest) = match kind.find(" of ") {
        Some(at) if !kind.starts_with("one of ") => kind.split_at(at),
        _ => (kind, ""),
    };
    match noun.strip_suffix('y') {
        _ if kind.starts_with("one of ") => format!("values, each {kind}"),
        Some(stem) => format!("{stem}ies{rest}"),
        None => format!("{noun}s{rest}"),
    }
}
