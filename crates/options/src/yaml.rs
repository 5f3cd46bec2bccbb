//! YAML to the same tree, for the plans of other tools that are written in it.
//!
//! Built from the parser's events rather than through serde, because a tree with the place of every
//! value is what makes all mistakes showable at once. Plain scalars follow the core schema of
//! YAML 1.2, and `yes`, `no`, `on`, `off` are booleans as in 1.1, which most tools still read.

use std::collections::BTreeMap;
use std::iter::Peekable;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Tag};

use crate::item::{Item, Span, Table, Value};
use crate::report::Diagnostic;

/// Lists and tables inside one another.
const MAX_DEPTH: usize = 64;
/// Values in all, those of aliases counted each time: ten lines can stand for billions.
const MAX_VALUES: usize = 100_000;
const MAX_BYTES: usize = 16 << 20;

/// Parses a text that holds one table.
pub(crate) fn parse(text: &str) -> Result<Table, Vec<Diagnostic>> {
    if text.len() > MAX_BYTES {
        let found = format!("it has {} bytes", text.len());
        return Err(vec![Diagnostic::error("the file is no plan").label(found)]);
    }
    let offsets = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let events = Parser::new_from_str(text).peekable();
    let mut builder = Builder {
        text,
        events,
        offsets,
        anchors: BTreeMap::new(),
        errors: Vec::new(),
        num_values: 0,
    };
    match builder.document() {
        Ok(table) if builder.errors.is_empty() => Ok(table),
        Ok(_) => Err(builder.errors),
        Err(error) => {
            builder.errors.push(error);
            Err(builder.errors)
        }
    }
}

struct Builder<'t> {
    text: &'t str,
    events: Peekable<Parser<'t, saphyr_parser::StrInput<'t>>>,
    /// Byte offset of each character.
    offsets: Vec<usize>,
    anchors: BTreeMap<usize, Parsed>,
    errors: Vec<Diagnostic>,
    num_values: usize,
}

/// A value, or nothing where the text says so.
type Parsed = Option<Item>;

impl<'t> Builder<'t> {
    fn document(&mut self) -> Result<Table, Diagnostic> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
                Event::DocumentStart(_) if root.is_some() => {
                    return Err(Diagnostic::error("the file holds more than one document")
                        .at(Some(span))
                        .label("a second one begins here")
                        .help("put it into a file of its own"));
                }
                Event::DocumentStart(_) => {
                    let (event, span) = self.next()?;
                    root = Some(self.value(event, span, 0)?);
                }
                Event::StreamEnd => break,
                _ => return Err(Diagnostic::error("the text ends in a strange way").at(Some(span))),
            }
        }
        match root.flatten() {
            Some(Item { value: Value::Table(table), .. }) => Ok(table),
            Some(item) => Err(Diagnostic::error("the file must hold keys and values")
                .at(item.span)
                .label(format!("found {}", item.value.describe()))),
            None => Ok(Table::default()),
        }
    }

    fn next(&mut self) -> Result<(Event<'t>, Span), Diagnostic> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok((event, self.span(span.start, span.end))),
            Some(Err(error)) => Err(self.syntax_error(&error)),
            None => Err(Diagnostic::error("the text ends too early")),
        }
    }

    fn value(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Parsed, Diagnostic> {
        self.num_values += 1;
        if depth > MAX_DEPTH {
            let help = format!("at most {MAX_DEPTH} lists and tables lie inside one another");
            return Err(Diagnostic::error("the values are nested too deep")
                .at(Some(span))
                .help(help));
        }
        if self.num_values > MAX_VALUES {
            let help = format!("at most {MAX_VALUES} are read, those of aliases counted each time");
            return Err(Diagnostic::error("the file has too many values")
                .at(Some(span))
                .help(help));
        }
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = self.scalar(&text, style, tag.as_deref(), span);
                let parsed = value.map(|value| Item { value, span: Some(span) });
                Ok(self.remember(anchor, parsed))
            }
            Event::SequenceStart(anchor, _) => {
                let mut items = Vec::new();
                loop {
                    let (event, place) = self.next()?;
                    if matches!(event, Event::SequenceEnd) {
                        let span = Span { end: place.end.max(span.end), ..span };
                        let item = Item { value: Value::List(items), span: Some(span) };
                        return Ok(self.remember(anchor, Some(item)));
                    }
                    match self.value(event, place, depth + 1)? {
                        Some(item) => items.push(item),
                        None => self.errors.push(
                            Diagnostic::error("the list has an empty value")
                                .at(Some(place))
                                .help("write the value, or remove its dash"),
                        ),
                    }
                }
            }
            Event::MappingStart(anchor, _) => {
                let table = self.mapping(depth)?;
                let item = Item { value: Value::Table(table), span: Some(span) };
                Ok(self.remember(anchor, Some(item)))
            }
            Event::Alias(anchor) => {
                let parsed = self.anchors.get(&anchor).cloned().unwrap_or_default();
                self.num_values += parsed.as_ref().map_or(0, |item| count(&item.value));
                if self.num_values > MAX_VALUES {
                    return Err(
                        Diagnostic::error("the aliases stand for too many values").at(Some(span))
                    );
                }
                Ok(parsed)
            }
            _ => Err(Diagnostic::error("a value is missing").at(Some(span))),
        }
    }

    fn remember(&mut self, anchor: usize, parsed: Parsed) -> Parsed {
        if anchor != 0 {
            self.anchors.insert(anchor, parsed.clone());
        }
        parsed
    }

    fn mapping(&mut self, depth: usize) -> Result<Table, Diagnostic> {
        let mut table = Table::default();
        let mut merged = Vec::new();
        loop {
            let (event, key_span) = self.next()?;
            let key = match event {
                Event::MappingEnd => break,
                Event::Scalar(text, ..) => text.into_owned(),
                _ => {
                    return Err(Diagnostic::error("a key must be a word")
                        .at(Some(key_span))
                        .label("found a list, table or alias"));
                }
            };
            let (event, span) = self.next()?;
            let parsed = self.value(event, span, depth + 1)?;
            if key == "<<" {
                merged.extend(parsed);
                continue;
            }
            if table.get(&key).is_some() {
                self.errors.push(
                    Diagnostic::error(format!("the key `{key}` is set twice"))
                        .at(Some(key_span))
                        .label("set here again")
                        .help("keep one of the two"),
                );
            }
            // A key without a value counts as not written.
            if let Some(item) = parsed {
                table.insert_at(key, Some(key_span), item);
            }
        }
        for item in merged {
            self.merge(&mut table, item);
        }
        Ok(table)
    }

    /// Adds the keys of `<<: *other` that are not set themselves.
    fn merge(&mut self, table: &mut Table, item: Item) {
        match item.value {
            Value::Table(other) => {
                for (key, entry) in other.into_entries() {
                    if table.get(&key).is_none() {
                        table.insert_at(key, entry.key_span, entry.item);
                    }
                }
            }
            Value::List(items) => items.into_iter().for_each(|item| self.merge(table, item)),
            value => self.errors.push(
                Diagnostic::error("`<<` takes an alias of a table")
                    .at(item.span)
                    .label(format!("found {}", value.describe())),
            ),
        }
    }

    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        tag: Option<&Tag>,
        span: Span,
    ) -> Option<Value> {
        if let Some(tag) = tag {
            let known = tag.is_yaml_core_schema();
            if known && tag.suffix == "str" {
                return Some(Value::from(text));
            }
            if !known || !matches!(tag.suffix.as_str(), "int" | "float" | "bool" | "null") {
                let error = Diagnostic::error(format!("the tag `{tag}` is not known"));
                self.errors.push(error.at(Some(span)).help("remove it"));
            }
        }
        if style != ScalarStyle::Plain {
            return Some(Value::from(text));
        }
        Some(match text {
            "" | "~" | "null" | "Null" | "NULL" => return None,
            "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => {
                Value::Bool(true)
            }
            "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
                Value::Bool(false)
            }
            _ => number(text).unwrap_or_else(|| Value::from(text)),
        })
    }

    fn syntax_error(&self, error: &ScanError) -> Diagnostic {
        let at = *error.marker();
        Diagnostic::error(format!("this is not YAML: {}", error.info()))
            .at(Some(self.span(at, at)))
            .help("check indentation, colons and quotes around here")
    }

    fn span(&self, start: Marker, end: Marker) -> Span {
        let offset =
            |marker: Marker| self.offsets.get(marker.index()).copied().unwrap_or(self.text.len());
        let (start, end) = (offset(start), offset(end));
        Span { source: 0, start, end: end.max(start) }
    }
}

fn count(value: &Value) -> usize {
    match value {
        Value::List(items) => 1 + items.iter().map(|item| count(&item.value)).sum::<usize>(),
        Value::Table(table) => {
            1 + table.iter().map(|(_, entry)| count(&entry.item.value)).sum::<usize>()
        }
        _ => 1,
    }
}

/// Reads a number of the core schema.
fn number(text: &str) -> Option<Value> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(rest) = text.strip_prefix(prefix) {
            let plain = !rest.starts_with(['+', '-']);
            let number = plain.then(|| i128::from_str_radix(rest, radix).ok()).flatten();
            return number.map(Value::Integer);
        }
    }
    match digits {
        ".inf" | ".Inf" | ".INF" => {
            let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
            return Some(Value::Float(sign * f64::INFINITY));
        }
        ".nan" | ".NaN" | ".NAN" if digits.len() == text.len() => {
            return Some(Value::Float(f64::NAN));
        }
        _ => {}
    }
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        || !digits.contains(|c: char| c.is_ascii_digit())
        || digits
            .contains(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | 'e' | 'E' | '+' | '-'))
    {
        return None;
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().map(Value::Integer);
    }
    text.parse().ok().map(Value::Float)
}
