//! Recipes: TOML with every mistake shown at once, and options defined once.
//!
//! [`Document`] parses a recipe and remembers where each key and value stands. [`Reader`] walks
//! its tables and notes mistakes instead of stopping at the first. [`options!`] declares a struct
//! of options in one place; parsing, defaults, ranges, help ([`markdown_table`],
//! [`commented_toml`]), the JSON [`schema`] and the resolved plan ([`to_toml`]) follow from that
//! declaration. [`Report`] shows what was found, with line, column and a caret.

mod bounds;
mod describe;
mod document;
mod item;
mod options;
mod reader;
mod report;
mod suggest;
mod value;
mod write;
mod yaml;

pub use bounds::{Bounds, Edge, NoEdge, above};
pub use describe::{commented_toml, markdown_table, schema};
pub use document::Document;
pub use item::{Entry, Item, Span, Table, Value};
pub use options::{Field, Nested, OptionSpec, Options, Presence};
pub use reader::{Place, Reader};
pub use report::{Diagnostic, Report, Severity, Style};
/// JSON, as [`schema`] and [`Report::to_json`] return it.
pub use serde_json::Value as Json;
pub use suggest::nearest;
pub use value::{
    Bytes, Choice, ChoiceSpec, OneOrMany, OptionValue, Pattern, Patterns, Portion, read_choice,
    schema_of_choice,
};
pub use write::to_toml;
