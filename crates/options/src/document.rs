//! Text to tree: parsing a recipe, and laying assignments over it.

use crate::{
    item::{Item, Span, Table, Value},
    reader::Reader,
    report::{Diagnostic, Report, Source},
};
use std::{ops::Range, sync::Arc};
use toml::de::{DeTable, DeValue};
use toml_parser::lexer::TokenKind;

/// The most names a dotted key may have. The parser bounds brackets by itself but not dots, and
/// a tree a million levels deep could not even be dropped.
const MAX_KEY_PARTS: usize = 32;

/// A parsed recipe: its tree and the texts it came from.
#[derive(Clone, Debug)]
pub struct Document {
    sources: Arc<Vec<Source>>,
    root: Table,
}

impl Document {
    /// Parses a recipe's text.
    ///
    /// # Errors
    /// A [`Report`] of every syntax error, duplicate keys included. `file_name` is only shown.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, Report> {
        // A byte-order mark is no part of the text; editors on Windows still write it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let sources = vec![Source { name: file_name.to_owned(), text: text.to_owned() }];
        match parse_source(text, 0) {
            Ok(root) => Ok(Self { sources: Arc::new(sources), root }),
            Err(diagnostics) => Err(Report::new(Arc::new(sources), diagnostics)),
        }
    }

    /// Parses a YAML text that holds one table.
    ///
    /// Anchors, aliases and `<<` are resolved; a key without a value counts as not written.
    ///
    /// # Errors
    /// A [`Report`] of the first syntax error, or of every duplicate key and empty list value.
    pub fn parse_yaml(file_name: &str, text: &str) -> Result<Self, Report> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let sources = vec![Source { name: file_name.to_owned(), text: text.to_owned() }];
        match crate::yaml::parse(text) {
            Ok(root) => Ok(Self { sources: Arc::new(sources), root }),
            Err(diagnostics) => Err(Report::new(Arc::new(sources), diagnostics)),
        }
    }

    /// Parses the bytes of a recipe file.
    ///
    /// # Errors
    /// As [`Document::parse`]; bytes that are not UTF-8 are reported with their place.
    pub fn parse_bytes(file_name: &str, bytes: &[u8]) -> Result<Self, Report> {
        Self::parse(file_name, text_of(file_name, bytes)?)
    }

    /// Parses the bytes of a YAML file.
    ///
    /// # Errors
    /// As [`Document::parse_yaml`]; bytes that are not UTF-8 are reported with their place.
    pub fn parse_yaml_bytes(file_name: &str, bytes: &[u8]) -> Result<Self, Report> {
        Self::parse_yaml(file_name, text_of(file_name, bytes)?)
    }

    /// Lays `assignment`, such as `train.steps=10`, over the recipe.
    ///
    /// The right side is a TOML value; what is none and has no quote, bracket or brace in it is
    /// taken as a string, so that `model=smollm2-135m` needs no quotes in a shell. Tables are
    /// merged, everything else is replaced. `origin` names the source in later reports.
    ///
    /// # Errors
    /// A [`Report`] when `assignment` is not of the form `key = value`.
    pub fn set(&mut self, origin: &str, assignment: &str) -> Result<(), Report> {
        let source = self.sources.len();
        let quoted = assignment.split_once('=').and_then(|(key, value)| {
            let plain = !value.trim().is_empty() && !value.contains(['"', '\'', '[', '{', '\n']);
            plain.then(|| format!("{}={}", key, crate::write::value(&value.trim().into())))
        });
        let parsed = parse_source(assignment, source).map(|table| (assignment.to_owned(), table));
        let parsed = match (parsed, quoted) {
            (Err(errors), Some(quoted)) => {
                parse_source(&quoted, source).map(|table| (quoted, table)).map_err(|_| errors)
            }
            (parsed, _) => parsed,
        };
        let (text, parsed) = match parsed {
            Ok((text, table)) => (text, Ok(table)),
            Err(errors) => (assignment.to_owned(), Err(errors)),
        };
        let added = Source { name: origin.to_owned(), text };
        let copy = |s: &Source| Source { name: s.name.clone(), text: s.text.clone() };
        let sources = Arc::new(self.sources.iter().map(copy).chain([added]).collect::<Vec<_>>());
        match parsed {
            Ok(table) => {
                self.sources = sources;
                merge(&mut self.root, table);
                Ok(())
            }
            Err(errors) => Err(Report::new(sources, errors)),
        }
    }

    /// Leaves one of the tables below `table`, which is made where it is absent: `method.lora` of
    /// everything below `method`.
    pub fn choose(&mut self, table: &str, key: &str) {
        let below = match self.root.get(table).map(|entry| &entry.item.value) {
            Some(Value::Table(below)) => below.clone(),
            // What is no table is left for the reader to refuse.
            Some(_) => return,
            None => Table::default(),
        };
        let chosen = below.get(key).map_or_else(|| Table::default().into(), |e| e.item.clone());
        let mut only = Table::default();
        only.insert(key, chosen);
        self.root.insert(table, only);
    }

    /// Returns the tree.
    pub fn root(&self) -> &Table {
        &self.root
    }

    /// Returns the place of a dotted path's value, such as `method.lora.rank`.
    ///
    /// Falls back to the nearest table on the way that is there, so that a diagnostic about a
    /// default still has a place to point at.
    pub fn locate(&self, path: &str) -> Option<Span> {
        let mut table = &self.root;
        let mut span = None;
        for name in path.split('.') {
            let Some(entry) = table.get(name) else { break };
            span = entry.item.span;
            match &entry.item.value {
                Value::Table(inner) => table = inner,
                _ => break,
            }
        }
        span
    }

    /// Makes a report about this document from diagnostics found later, say against a model.
    pub fn report(&self, diagnostics: Vec<Diagnostic>) -> Report {
        Report::new(Arc::clone(&self.sources), diagnostics)
    }

    /// Reads the whole document with `read` and checks that no key is left over.
    ///
    /// Returns what `read` made and a report that holds warnings only.
    ///
    /// # Errors
    /// A [`Report`] of every mistake met while reading, and of every key nobody asked for.
    pub fn read<T>(&self, read: impl FnOnce(&mut Reader<'_>) -> T) -> Result<(T, Report), Report> {
        let mut reader = Reader::root(&self.root);
        let value = read(&mut reader);
        let report = self.report(reader.finish());
        if report.has_errors() { Err(report) } else { Ok((value, report)) }
    }
}

/// Checks that a file is text.
fn text_of<'b>(file_name: &str, bytes: &'b [u8]) -> Result<&'b str, Report> {
    let error = match std::str::from_utf8(bytes) {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    // What precedes the first bad byte is unchanged by the lossy copy, so offsets agree.
    let text = String::from_utf8_lossy(bytes).into_owned();
    let start = error.valid_up_to();
    let span = Span { source: 0, start, end: start + '\u{fffd}'.len_utf8() };
    let diagnostic = Diagnostic::error("the file is not UTF-8 text")
        .at(Some(span))
        .label(format!("byte 0x{:02x} at offset {start}", bytes[start]))
        .help("save the file as UTF-8");
    let sources = vec![Source { name: file_name.to_owned(), text }];
    Err(Report::new(Arc::new(sources), vec![diagnostic]))
}

fn parse_source(text: &str, source: usize) -> Result<Table, Vec<Diagnostic>> {
    if let Some(span) = overlong_key(text) {
        let error = Diagnostic::error("the key has too many parts")
            .at(Some(Span { source, start: span.start, end: span.end }))
            .label(format!("more than {MAX_KEY_PARTS} names joined by dots"));
        return Err(vec![error]);
    }
    let (root, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(errors.iter().map(|error| syntax_error(error, text, source)).collect());
    }
    let mut errors = Vec::new();
    let table = convert_table(root.get_ref(), source, &mut errors);
    if errors.is_empty() { Ok(table) } else { Err(errors) }
}

/// Returns the place of the first run of more than [`MAX_KEY_PARTS`] names joined by dots.
fn overlong_key(text: &str) -> Option<Range<usize>> {
    let mut dots = 0;
    let mut start = None;
    for token in toml_parser::Source::new(text).lex() {
        let span = token.span();
        match token.kind() {
            TokenKind::Dot => {
                dots += 1;
                if dots >= MAX_KEY_PARTS {
                    return Some(start.unwrap_or(span.start())..span.end());
                }
            }
            TokenKind::Atom | TokenKind::BasicString | TokenKind::LiteralString => {
                start.get_or_insert(span.start());
            }
            TokenKind::Whitespace => {}
            _ => {
                dots = 0;
                start = None;
            }
        }
    }
    None
}

fn syntax_error(error: &toml::de::Error, text: &str, source: usize) -> Diagnostic {
    let (what, expected) = error.message().split_once(", expected ").unzip();
    let what = what.unwrap_or(error.message());
    let span = error.span().map(|span| Span { source, start: span.start, end: span.end });
    if what == "duplicate key" {
        let key = error.span().and_then(|span| text.get(span)).unwrap_or_default();
        return Diagnostic::error(format!("the key `{key}` is set twice"))
            .at(span)
            .label("set here again")
            .help("keep one of the two");
    }
    if what == "string values must be quoted" {
        let word = error.span().and_then(|span| text.get(span)).unwrap_or_default();
        let error = match word {
            "" => Diagnostic::error("the key has no value").label("expected a value"),
            word => Diagnostic::error("a string must be in quotes")
                .label("expected a value")
                .help(format!("write {}", crate::write::value(&word.into()))),
        };
        return error.at(span);
    }
    let label = expected.map(|expected| format!("expected {expected}"));
    Diagnostic::error(what).at(span).label(label.unwrap_or_default())
}

fn convert_table(table: &DeTable<'_>, source: usize, errors: &mut Vec<Diagnostic>) -> Table {
    let mut out = Table::default();
    for (key, value) in table {
        let span = key.span();
        let key_span = Span { source, start: span.start, end: span.end };
        let item = convert(value, source, errors);
        out.insert_at(key.get_ref().as_ref(), Some(key_span), item);
    }
    out
}

fn convert(
    value: &toml::Spanned<DeValue<'_>>,
    source: usize,
    errors: &mut Vec<Diagnostic>,
) -> Item {
    let span = value.span();
    let span = Some(Span { source, start: span.start, end: span.end });
    let value = match value.get_ref() {
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Datetime(value) => Value::Datetime(value.to_string()),
        DeValue::Integer(value) => {
            let number = i128::from_str_radix(value.as_str(), value.radix());
            if number.is_err() {
                errors.push(Diagnostic::error("the integer is too large").at(span));
            }
            Value::Integer(number.unwrap_or_default())
        }
        DeValue::Float(value) => match value.as_str().parse::<f64>() {
            Ok(number) if number.is_finite() || value.as_str().contains(['i', 'n']) => {
                Value::Float(number)
            }
            _ => {
                errors.push(Diagnostic::error("the number is too large").at(span));
                Value::Float(0.0)
            }
        },
        DeValue::Array(items) => {
            Value::List(items.iter().map(|item| convert(item, source, errors)).collect())
        }
        DeValue::Table(table) => Value::Table(convert_table(table, source, errors)),
    };
    Item { value, span }
}

/// Lays `over` on `base`: tables are merged, everything else is replaced.
fn merge(base: &mut Table, over: Table) {
    for (key, entry) in over.into_entries() {
        if let Some(old) = base.get_mut(&key)
            && let (Value::Table(old), Value::Table(_)) = (&mut old.item.value, &entry.item.value)
        {
            if let Value::Table(new) = entry.item.value {
                merge(old, new);
            }
        } else {
            base.insert_at(key, entry.key_span, entry.item);
        }
    }
}
