//! A count, or a fraction of one.

use super::OptionValue;
use crate::{
    item::{Item, Value},
    reader::Place,
    report::Diagnostic,
};
use serde_json::json;

/// A number of things or a fraction of all: `warmup = 100` steps, `warmup = 0.03` of them.
///
/// An integer is a count; a number with a point must lie in `0.0..1.0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Portion {
    /// That many.
    Count(u64),
    /// That fraction of all, in `0.0..1.0`.
    Fraction(f64),
}

impl Portion {
    /// Returns how many of `total` are meant: a fraction rounds up, a count is not cut to `total`.
    ///
    /// # Examples
    /// ```
    /// # use retune_options::Portion;
    /// assert_eq!(Portion::Fraction(0.03).of(200), 6);
    /// assert_eq!(Portion::Fraction(0.03).of(201), 7);
    /// assert_eq!(Portion::Count(10).of(200), 10);
    /// ```
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Count(count) => count,
            Self::Fraction(fraction) => (fraction * total as f64).ceil() as u64,
        }
    }
}

impl Default for Portion {
    fn default() -> Self {
        Self::Count(0)
    }
}

impl OptionValue for Portion {
    type Edge = f64;

    fn kind() -> String {
        "integer or fraction below 1".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let portion = match item.value {
            Value::Integer(count) => u64::try_from(count).ok().map(Self::Count),
            Value::Float(fraction) if (0.0..1.0).contains(&fraction) => {
                Some(Self::Fraction(fraction))
            }
            Value::Float(number) if number >= 1.0 => {
                let error = Diagnostic::error(format!("`{}` is ambiguous", place.path()))
                    .at(item.span)
                    .label("a number with a point is a fraction and must lie below 1")
                    .help("write a count without a point, a fraction as one below 1.0");
                place.report(error);
                return None;
            }
            _ => None,
        };
        if portion.is_none() {
            place.mismatch(item, &Self::kind());
        }
        portion.filter(|_| place.check_bounds(item, &item.value))
    }

    fn to_item(&self) -> Option<Item> {
        Some(match self {
            Self::Count(count) => Value::Integer(i128::from(*count)).into(),
            Self::Fraction(fraction) => Value::Float(*fraction).into(),
        })
    }

    fn schema() -> serde_json::Value {
        json!({"anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        ]})
    }
}
