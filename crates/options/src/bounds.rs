//! Ranges of numeric options.

use crate::{item::Value, write};
use std::ops::{Bound, RangeBounds};

/// The range a number must lie in; each end open, closed or missing.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Lower end.
    pub min: Bound<Value>,
    /// Upper end.
    pub max: Bound<Value>,
}

/// A number that may end a range.
pub trait Edge: Copy {
    /// Returns the number as a recipe's value.
    fn to_value(self) -> Value;
}

macro_rules! edge {
    ($($number:ty => $wide:ty),*) => {$(
        impl Edge for $number {
            fn to_value(self) -> Value {
                Value::from(self as $wide)
            }
        }
    )*};
}
edge!(usize => i128, u64 => i128, u32 => i128, i64 => i128, f64 => f64, f32 => f64);

/// The edge of types that have no range.
#[derive(Clone, Copy, Debug)]
pub enum NoEdge {}

impl Edge for NoEdge {
    fn to_value(self) -> Value {
        match self {}
    }
}

/// Returns the range of everything above `low`, for instance a learning rate above 0.
pub fn above<T>(low: T) -> (Bound<T>, Bound<T>) {
    (Bound::Excluded(low), Bound::Unbounded)
}

impl Bounds {
    /// Every number.
    pub const NONE: Self = Self { min: Bound::Unbounded, max: Bound::Unbounded };

    /// Takes the ends of a range.
    pub fn of<T: Edge>(range: &impl RangeBounds<T>) -> Self {
        Self {
            min: range.start_bound().map(|edge| edge.to_value()),
            max: range.end_bound().map(|edge| edge.to_value()),
        }
    }

    /// Says whether a number lies inside; what is no number never does, unless all may.
    pub fn contains(&self, number: &Value) -> bool {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let low = match &self.min {
            Bound::Included(min) => matches!(compare(number, min), Some(Greater | Equal)),
            Bound::Excluded(min) => matches!(compare(number, min), Some(Greater)),
            Bound::Unbounded => true,
        };
        let high = match &self.max {
            Bound::Included(max) => matches!(compare(number, max), Some(Less | Equal)),
            Bound::Excluded(max) => matches!(compare(number, max), Some(Less)),
            Bound::Unbounded => true,
        };
        low && high
    }

    /// Says the range in words, such as `1 to 4096` or `at least 0.0 and below 1.0`.
    pub fn describe(&self) -> Option<String> {
        let low = match &self.min {
            Bound::Included(min) => Some(format!("at least {}", write::value(min))),
            Bound::Excluded(min) => Some(format!("above {}", write::value(min))),
            Bound::Unbounded => None,
        };
        let high = match &self.max {
            Bound::Included(max) => Some(format!("at most {}", write::value(max))),
            Bound::Excluded(max) => Some(format!("below {}", write::value(max))),
            Bound::Unbounded => None,
        };
        match (&self.min, &self.max, low, high) {
            (Bound::Included(min), Bound::Included(max), ..) => {
                Some(format!("{} to {}", write::value(min), write::value(max)))
            }
            (.., Some(low), Some(high)) => Some(format!("{low} and {high}")),
            (.., low, high) => low.or(high),
        }
    }
}

fn compare(a: &Value, b: &Value) -> Option<std::cmp::Ordering> {
    match (a, b) {
        (Value::Integer(a), Value::Integer(b)) => Some(a.cmp(b)),
        (a, b) => number(a)?.partial_cmp(&number(b)?),
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(value) => Some(*value as f64),
        Value::Float(value) => Some(*value),
        _ => None,
    }
}
