//! Walking a recipe's tables, collecting every mistake on the way.

use crate::{
    bounds::Bounds,
    item::{Item, Span, Table, Value},
    report::{Diagnostic, Severity},
    suggest,
    value::OptionValue,
    write,
};
use indexmap::IndexSet;
use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// Reads one table: typed, and never stopping at a mistake.
///
/// A getter that meets a mistake notes it and returns a stand-in, so that the mistakes after it
/// are found too. The reader remembers each name asked for; when the document has been read, what
/// nobody asked for is an unknown key.
pub struct Reader<'d> {
    state: Shared<'d>,
    table: Option<&'d Table>,
    span: Option<Span>,
    path: String,
    errors_before: usize,
}

type Shared<'d> = Rc<RefCell<State<'d>>>;

#[derive(Default)]
struct State<'d> {
    diagnostics: Vec<Diagnostic>,
    num_errors: usize,
    opened: BTreeMap<String, Opened<'d>>,
}

/// A table someone reads, and what they asked for.
#[derive(Default)]
struct Opened<'d> {
    table: Option<&'d Table>,
    names: IndexSet<String>,
    foreign: Vec<(&'static str, &'static str)>,
}

impl State<'_> {
    fn report(&mut self, diagnostic: Diagnostic) {
        self.num_errors += usize::from(diagnostic.severity == Severity::Error);
        self.diagnostics.push(diagnostic);
    }
}

impl<'d> Reader<'d> {
    pub(crate) fn root(table: &'d Table) -> Self {
        Self::open(Shared::default(), Some(table), None, String::new())
    }

    fn open(state: Shared<'d>, table: Option<&'d Table>, span: Option<Span>, path: String) -> Self {
        let errors_before = {
            let mut state = state.borrow_mut();
            state.opened.entry(path.clone()).or_default().table = table;
            state.num_errors
        };
        Self { state, table, span, path, errors_before }
    }

    /// Returns the dotted path of this table; empty for the whole recipe.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the keys that were written, in order.
    pub fn keys(&self) -> Vec<&'d str> {
        self.table.into_iter().flat_map(Table::iter).map(|(key, _)| key).collect()
    }

    /// Returns the item of a key and declares the key known.
    pub fn item(&mut self, name: &str) -> Option<&'d Item> {
        self.declare(name);
        Some(&self.table?.get(name)?.item)
    }

    /// Declares a key known without reading it.
    pub fn declare(&mut self, name: &str) {
        let mut state = self.state.borrow_mut();
        let names = &mut state.opened.entry(self.path.clone()).or_default().names;
        if !names.contains(name) {
            names.insert(name.to_owned());
        }
    }

    /// Declares what other tools call a key, to suggest the name it has here.
    pub fn declare_foreign(&mut self, foreign: &'static str, name: &'static str) {
        let mut state = self.state.borrow_mut();
        state.opened.entry(self.path.clone()).or_default().foreign.push((foreign, name));
    }

    /// Reads a key; a missing one takes `default`, or is a mistake when there is none and the
    /// type cannot do without.
    ///
    /// After a mistake the value is the default or, where there is none, an empty stand-in.
    pub fn field<T: OptionValue>(&mut self, name: &str, default: Option<T>, bounds: Bounds) -> T {
        let item = self.item(name);
        let place = Place { bounds, ..self.place(name) };
        let value = match (item, &default) {
            (Some(item), _) => T::from_item(item, &place),
            (None, Some(_)) => None,
            (None, None) => {
                let value = T::absent(&place);
                if value.is_none() {
                    self.report_missing(name, &T::kind());
                }
                value
            }
        };
        value.or(default).unwrap_or_default()
    }

    /// Reads a key that must be there.
    pub fn required<T: OptionValue>(&mut self, name: &str) -> T {
        self.field(name, None, Bounds::NONE)
    }

    /// Reads a key that may be missing.
    pub fn optional<T: OptionValue>(&mut self, name: &str) -> Option<T> {
        let item = self.item(name)?;
        T::from_item(item, &self.place(name))
    }

    /// Opens a sub-table; `None` when it is missing or, which is noted, no table.
    pub fn table(&mut self, name: &str) -> Option<Reader<'d>> {
        let item = self.item(name)?;
        self.place(name).reader(item)
    }

    /// Opens each table of a list, in order; what is no list or no table is noted and left out.
    pub fn tables(&mut self, name: &str) -> Vec<Reader<'d>> {
        let Some(item) = self.item(name) else { return Vec::new() };
        let place = self.place(name);
        let Value::List(items) = &item.value else {
            place.mismatch(item, "list of tables");
            return Vec::new();
        };
        let tables = items.iter().enumerate();
        tables.filter_map(|(i, item)| place.element(i).reader(item)).collect()
    }

    /// Opens the sub-tables of `name` that say which variants are meant, in the order they were
    /// written: `[method.lora]` gives `lora` and a reader of its table.
    ///
    /// Notes a mistake, and returns none, when there is no variant or an unknown one.
    pub fn variants(&mut self, name: &str, variants: &[&str]) -> Vec<(String, Reader<'d>)> {
        let path = self.join(name);
        let how = match variants {
            [only] => format!("write `[{path}.{}]`", write::key(only)),
            [_, ..] => format!("write `[{path}.<name>]`, the name one of {}", list(variants)),
            [] => String::new(),
        };
        let Some(item) = self.item(name) else {
            let error = Diagnostic::error(format!("`{path}` is missing"));
            self.report(error.at(self.span).help(how));
            return Vec::new();
        };
        if let Value::String(word) = &item.value {
            let error = Diagnostic::error(format!("`{path}` must be a table"))
                .at(item.span)
                .label(format!("found {}", item.value.describe()));
            let meant = variants.contains(&word.as_str());
            let how = if meant { format!("write `[{path}.{}]`", write::key(word)) } else { how };
            self.report(error.help(how));
            return Vec::new();
        }
        let Some(mut outer) = self.table(name) else { return Vec::new() };
        let written = outer.keys();
        for variant in variants {
            outer.declare(variant);
        }
        if written.is_empty() {
            let error = Diagnostic::error(format!("`{}` names no variant", outer.path));
            self.report(error.at(outer.span).help(how));
        }
        let known = written.into_iter().filter(|key| variants.contains(key));
        known.filter_map(|key| Some((key.to_owned(), outer.table(key)?))).collect()
    }

    /// Declares every key that was written known: the table is free in its keys.
    pub fn declare_all(&mut self) {
        for key in self.keys() {
            self.declare(key);
        }
    }

    /// Says whether a key was written.
    pub fn has(&self, name: &str) -> bool {
        self.table.is_some_and(|table| table.get(name).is_some())
    }

    /// Returns the place of a key's value, or this table's header when the key was not written.
    pub fn span(&self, name: &str) -> Option<Span> {
        let entry = self.table.and_then(|table| table.get(name));
        entry.and_then(|entry| entry.item.span).or(self.span)
    }

    /// Notes a diagnostic.
    pub fn report(&self, diagnostic: Diagnostic) {
        self.state.borrow_mut().report(diagnostic);
    }

    /// Notes an error about a key's value; `help` says what to do.
    pub fn error(&self, name: &str, message: impl Into<String>, help: impl Into<String>) {
        self.report(Diagnostic::error(message).at(self.span(name)).help(help));
    }

    /// Notes a warning about a key's value; `help` says what to do.
    pub fn warn(&self, name: &str, message: impl Into<String>, help: impl Into<String>) {
        self.report(Diagnostic::warning(message).at(self.span(name)).help(help));
    }

    /// Says whether an error was noted since this table was opened.
    pub fn has_errors(&self) -> bool {
        self.state.borrow().num_errors > self.errors_before
    }

    fn place(&self, name: &str) -> Place<'d> {
        Place {
            state: Rc::clone(&self.state),
            path: self.join(name),
            bounds: Bounds::NONE,
            or_kind: None,
            parent: self.span,
        }
    }

    fn join(&self, name: &str) -> String {
        let name = write::key(name);
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    fn report_missing(&self, name: &str, kind: &str) {
        let table = if self.path.is_empty() { "the recipe" } else { &format!("`{}`", self.path) };
        let error = Diagnostic::error(format!("{table} needs the key `{name}`"))
            .at(self.span)
            .label(format!("`{name}` is missing"))
            .help(format!("add `{name} = …`, {}", article(kind)));
        self.report(error);
    }

    /// Notes the unknown keys of every table that was opened and returns all diagnostics.
    pub(crate) fn finish(self) -> Vec<Diagnostic> {
        let unknown = {
            let state = self.state.borrow();
            let mut unknown = Vec::new();
            for (path, opened) in &state.opened {
                for (key, entry) in opened.table.into_iter().flat_map(Table::iter) {
                    if !opened.names.contains(key) {
                        let help = suggest_key(key, path, opened, &state.opened);
                        let table =
                            if path.is_empty() { "the recipe" } else { &format!("`{path}`") };
                        unknown.push(
                            Diagnostic::error(format!("unknown key `{key}`"))
                                .at(entry.key_span)
                                .label(format!("not a key of {table}"))
                                .help(help),
                        );
                    }
                }
            }
            unknown
        };
        let mut state = self.state.borrow_mut();
        state.diagnostics.extend(unknown);
        std::mem::take(&mut state.diagnostics)
    }
}

fn suggest_key(
    key: &str,
    path: &str,
    opened: &Opened<'_>,
    all: &BTreeMap<String, Opened<'_>>,
) -> String {
    if let Some((_, name)) = opened.foreign.iter().find(|(foreign, _)| *foreign == key) {
        return format!("it is called `{name}` here");
    }
    let near = suggest::nearest(key, opened.names.iter().map(String::as_str));
    if !near.is_empty() {
        return format!("did you mean {}?", list(&near));
    }
    let elsewhere = all.iter().find(|(other, table)| *other != path && table.names.contains(key));
    match elsewhere {
        Some((other, _)) if other.is_empty() => {
            format!("`{key}` belongs at the top of the recipe, before the first `[table]`")
        }
        Some((other, _)) => format!("`{key}` belongs to `[{other}]`"),
        None if opened.names.is_empty() => "this table takes no keys".to_owned(),
        None => {
            let names: Vec<_> = opened.names.iter().map(String::as_str).collect();
            format!("the keys are {}", list(&names))
        }
    }
}

/// Where a value is being read: its dotted path, the range it must lie in, and the report.
pub struct Place<'d> {
    state: Shared<'d>,
    path: String,
    bounds: Bounds,
    or_kind: Option<String>,
    parent: Option<Span>,
}

impl<'d> Place<'d> {
    /// Returns the dotted path of the value.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the range declared for the value.
    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Returns the place of the `index`-th value of a list read here; the range is passed on.
    #[must_use]
    pub fn element(&self, index: usize) -> Self {
        self.inner(format!("{}[{index}]", self.path))
    }

    /// Returns the place of a key of a table read here; the range is passed on.
    #[must_use]
    pub fn key(&self, name: &str) -> Self {
        self.inner(format!("{}.{}", self.path, write::key(name)))
    }

    fn inner(&self, path: String) -> Self {
        Self {
            state: Rc::clone(&self.state),
            path,
            bounds: self.bounds.clone(),
            or_kind: None,
            parent: self.parent,
        }
    }

    /// Returns the same place where a mismatch also names `kind` as possible.
    #[must_use]
    pub fn or_kind(&self, kind: String) -> Self {
        Self { or_kind: Some(kind), ..self.inner(self.path.clone()) }
    }

    /// Opens `item` as a table; notes a mistake when it is none.
    pub fn reader(&self, item: &'d Item) -> Option<Reader<'d>> {
        let Value::Table(table) = &item.value else {
            self.mismatch(item, "table");
            return None;
        };
        Some(Reader::open(Rc::clone(&self.state), Some(table), item.span, self.path.clone()))
    }

    /// Opens the table that was not written, to read its defaults.
    pub fn absent_reader(&self) -> Reader<'d> {
        Reader::open(Rc::clone(&self.state), None, self.parent, self.path.clone())
    }

    /// Notes a diagnostic.
    pub fn report(&self, diagnostic: Diagnostic) {
        self.state.borrow_mut().report(diagnostic);
    }

    /// Notes that `item` is not what was expected; `kind` is a noun without its article.
    pub fn mismatch(&self, item: &Item, kind: &str) {
        let mut expected = article(kind);
        if let Some(or_kind) = &self.or_kind {
            expected = format!("{expected} or {}", article(or_kind));
        }
        if let Some(bounds) = self.bounds.describe() {
            expected = format!("{expected}, {bounds}");
        }
        let error = Diagnostic::error(format!("`{}` must be {expected}", self.path))
            .at(item.span)
            .label(format!("found {}", item.value.describe()));
        self.report(match suggest::conversion(&item.value, kind) {
            Some(help) => error.help(help),
            None => error,
        });
    }

    /// Checks a number against the declared range and notes a mistake when it lies outside.
    pub fn check_bounds(&self, item: &Item, number: &Value) -> bool {
        if self.bounds.contains(number) {
            return true;
        }
        let bounds = self.bounds.describe().unwrap_or_default();
        let error = Diagnostic::error(format!("`{}` must be {bounds}", self.path))
            .at(item.span)
            .label(format!("found {}", item.value.describe()));
        self.report(error);
        false
    }
}

/// Puts `a` or `an` before a noun that has no article yet.
pub(crate) fn article(noun: &str) -> String {
    if noun.starts_with("one of ") {
        return noun.to_owned();
    }
    let an = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if an { "an" } else { "a" })
}

/// Joins names as a person would: `` `a`, `b` or `c` ``.
pub(crate) fn list(names: &[&str]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}
