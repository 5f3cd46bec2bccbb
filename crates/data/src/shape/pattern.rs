//! Prompt texts with `{field}` in place of a row's fields.

use serde_json::Value;

use super::{Fields, listed, plain};
use crate::error::{Error, Result};

/// A parsed prompt template. `{{` and `}}` stand for braces.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pattern {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Text(String),
    Field(String),
}

impl Pattern {
    /// Parses a template.
    pub(super) fn parse(template: &str) -> Result<Self> {
        let refuse = |problem: &str| Error::Setting {
            setting: "prompt_template",
            problem: format!("{problem} in {template:?}"),
            hint: "write fields as {name}, and a brace that is meant as one as {{ or }}".to_owned(),
        };
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut chars = template.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '{' | '}' if chars.peek() == Some(&c) => {
                    chars.next();
                    text.push(c);
                }
                '{' => {
                    let mut name = String::new();
                    let closed = chars.by_ref().any(|c| {
                        if c != '}' {
                            name.push(c);
                        }
                        c == '}'
                    });
                    let name = name.trim();
                    if !closed || name.is_empty() || name.contains('{') {
                        return Err(refuse("a brace opens no field"));
                    }
                    pieces.push(Piece::Text(std::mem::take(&mut text)));
                    pieces.push(Piece::Field(name.to_owned()));
                }
                '}' => return Err(refuse("a brace closes nothing")),
                c => text.push(c),
            }
        }
        pieces.push(Piece::Text(text));
        let pattern = Self { pieces };
        if pattern.fields().next().is_none() {
            return Err(refuse("no field is named"));
        }
        Ok(pattern)
    }

    /// The fields it names.
    pub(super) fn fields(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Field(name) => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// Puts a row's fields in place.
    pub(super) fn fill(&self, fields: &Fields) -> Result<String> {
        let mut out = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Field(name) => match fields.get(name) {
                    None | Some(Value::Null) => {
                        return Err(Error::example(
                            format!(
                                "the prompt template's field `{name}` is missing; the row has {}",
                                listed(fields.keys())
                            ),
                            "correct the field's name in prompt_template",
                        ));
                    }
                    Some(value) => out.push_str(&plain(value, name)?),
                },
            }
        }
        Ok(out)
    }
}
