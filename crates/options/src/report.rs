//! Mistakes, collected, and how they are shown.

use crate::item::Span;
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet, renderer::DecorStyle};
use std::{fmt, sync::Arc};

/// How bad a diagnostic is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The recipe cannot be used.
    Error,
    /// The recipe can be used, but something in it is probably not meant.
    Warning,
}

/// One thing to say about a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where; `None` when it concerns no place in particular.
    pub span: Option<Span>,
    /// What to write beside the caret; may be empty.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// Starts an error.
    pub fn error(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            span: None,
            label: String::new(),
            help: None,
        }
    }

    /// Starts a warning.
    pub fn warning(message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(message) }
    }

    /// Sets the place.
    #[must_use]
    pub fn at(mut self, span: Option<Span>) -> Self {
        self.span = span;
        self
    }

    /// Sets the words beside the caret.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// Sets what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// A text that diagnostics point into.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
}

/// Whether a rendered report carries terminal colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Text without terminal codes.
    Plain,
    /// ANSI colours.
    Coloured,
}

/// Every diagnostic of a document, in the order of their places.
///
/// `Display` renders it without colours.
#[derive(Clone, Debug)]
pub struct Report {
    sources: Arc<Vec<Source>>,
    diagnostics: Vec<Diagnostic>,
}

impl Report {
    pub(crate) fn new(sources: Arc<Vec<Source>>, mut diagnostics: Vec<Diagnostic>) -> Self {
        diagnostics.sort_by_key(|d| (d.span.is_none(), d.span));
        Self { sources, diagnostics }
    }

    /// Returns the diagnostics in the order of their places, those without a place last.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    /// Says whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.diagnostics.is_empty()
    }

    /// Says whether any diagnostic is an error.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(|d| d.severity == Severity::Error)
    }

    /// Returns line and column of a place, both counted from 1, the column in characters.
    pub fn position(&self, span: Span) -> (usize, usize) {
        let text = self.text(span);
        let start = floor(text, span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line = text[..line_start].matches('\n').count() + 1;
        (line, text[line_start..start].chars().count() + 1)
    }

    /// Renders every diagnostic with its line and a caret under the place.
    pub fn render(&self, style: Style) -> String {
        let renderer = match style {
            Style::Plain => Renderer::plain(),
            Style::Coloured => Renderer::styled(),
        };
        let renderer = renderer.decor_style(DecorStyle::Ascii);
        let mut out = String::new();
        for diagnostic in &self.diagnostics {
            if !out.is_empty() {
                out.push('\n');
            }
            out.push_str(&self.render_one(&renderer, diagnostic));
            out.push('\n');
        }
        out
    }

    fn render_one(&self, renderer: &Renderer, diagnostic: &Diagnostic) -> String {
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(diagnostic.message.as_str()));
        if let Some(span) = diagnostic.span {
            let text = self.text(span);
            let start = floor(text, span.start);
            let end = floor(text, span.end.max(start));
            // Only the lines concerned are handed over: a report may hold thousands of places.
            let from = text[..start].rfind('\n').map_or(0, |at| at + 1);
            let to = text[end..].find('\n').map_or(text.len(), |at| end + at);
            let mut annotation = AnnotationKind::Primary.span(start - from..end - from);
            if !diagnostic.label.is_empty() {
                annotation = annotation.label(diagnostic.label.as_str());
            }
            let name = self.sources.get(span.source).map_or("", |s| s.name.as_str());
            group = group.element(
                Snippet::source(&text[from..to])
                    .path(name)
                    .line_start(self.position(span).0)
                    .annotation(annotation),
            );
        } else if let Some(source) = self.sources.first() {
            group = group.element(annotate_snippets::Origin::path(source.name.as_str()));
        }
        if let Some(help) = &diagnostic.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        renderer.render(&[group])
    }

    /// Returns the diagnostics as a JSON list.
    ///
    /// Each has `severity`, `message`, `label`, `help` and, where the place is known, `file`,
    /// `line`, `column` (from 1, in characters), `start` and `end` (bytes).
    pub fn to_json(&self) -> serde_json::Value {
        let one = |d: &Diagnostic| {
            let mut json = serde_json::json!({
                "severity": match d.severity {
                    Severity::Error => "error",
                    Severity::Warning => "warning",
                },
                "message": d.message,
                "label": d.label,
                "help": d.help,
            });
            if let Some(span) = d.span {
                let (line, column) = self.position(span);
                json["file"] = self.sources.get(span.source).map(|s| s.name.as_str()).into();
                json["line"] = line.into();
                json["column"] = column.into();
                json["start"] = span.start.into();
                json["end"] = span.end.into();
            }
            json
        };
        self.diagnostics.iter().map(one).collect()
    }

    fn text(&self, span: Span) -> &str {
        self.sources.get(span.source).map_or("", |source| source.text.as_str())
    }
}

/// Returns the nearest character border at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(Style::Plain).trim_end())
    }
}

impl std::error::Error for Report {}
