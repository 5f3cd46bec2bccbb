//! The kinds of values an option may have.
//!
//! A new kind is a new implementation of [`OptionValue`]; nothing else has to change.

mod choice;
mod list;
mod number;
mod portion;
mod text;
mod unit;

pub use choice::{Choice, ChoiceSpec, read_choice, schema_of_choice};
pub use list::{OneOrMany, Patterns};
pub use portion::Portion;
pub use text::Pattern;
pub use unit::Bytes;

use crate::{bounds::Edge, item::Item, options::Nested, reader::Place};

/// A type a recipe's key can have: how it is read, written and described.
///
/// `Default` gives the stand-in that follows a mistake; it is never used in a run.
pub trait OptionValue: Clone + Default {
    /// What a declared range is made of; [`crate::NoEdge`] where a range makes no sense.
    type Edge: Edge;

    /// Names the kind, without an article: `integer`, `list of strings`.
    fn kind() -> String;

    /// Reads a value; notes every mistake at `place` and then returns `None`.
    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self>;

    /// Writes the value so that reading gives it back; `None` where the key is left out.
    fn to_item(&self) -> Option<Item>;

    /// Returns the JSON Schema of the value, without range and default.
    fn schema() -> serde_json::Value;

    /// Returns the value of a key that is missing and has no default; `None` makes it required.
    fn absent(_place: &Place<'_>) -> Option<Self> {
        None
    }

    /// Lists the words the value may be, when it is one of a few.
    fn choices() -> &'static [ChoiceSpec] {
        &[]
    }

    /// Returns the options below this one, when it is a table of options.
    fn nested() -> Option<Nested> {
        None
    }

    /// Says whether the key must be written when it has no default.
    fn required() -> bool {
        true
    }
}
