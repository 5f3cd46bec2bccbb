//! Booleans, integers and numbers.

use super::OptionValue;
use crate::{
    bounds::NoEdge,
    item::{Item, Value},
    reader::Place,
};
use serde_json::json;

impl OptionValue for bool {
    type Edge = NoEdge;

    fn kind() -> String {
        "boolean".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        if let Value::Bool(value) = item.value {
            return Some(value);
        }
        place.mismatch(item, "boolean");
        None
    }

    fn to_item(&self) -> Option<Item> {
        Some(Value::Bool(*self).into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "boolean"})
    }
}

macro_rules! integer {
    ($($integer:ty, $schema:tt;)*) => {$(
        impl OptionValue for $integer {
            type Edge = $integer;

            fn kind() -> String {
                "integer".to_owned()
            }

            fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
                let Value::Integer(number) = item.value else {
                    place.mismatch(item, "integer");
                    return None;
                };
                if !place.check_bounds(item, &item.value) {
                    return None;
                }
                let value = Self::try_from(number).ok();
                if value.is_none() {
                    let (sense, limit) = match number < Self::MIN as i128 {
                        true => ("at least", Self::MIN as i128),
                        false => ("at most", Self::MAX as i128),
                    };
                    place.mismatch(item, &format!("integer of {sense} {limit}"));
                }
                value
            }

            fn to_item(&self) -> Option<Item> {
                Some(Value::Integer(*self as i128).into())
            }

            fn schema() -> serde_json::Value {
                json!($schema)
            }
        }
    )*};
}
integer! {
    usize, {"type": "integer", "minimum": 0};
    u64, {"type": "integer", "minimum": 0};
    u32, {"type": "integer", "minimum": 0};
    i64, {"type": "integer"};
}

impl OptionValue for f64 {
    type Edge = f64;

    fn kind() -> String {
        "number".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let number = match item.value {
            Value::Integer(number) => number as f64,
            Value::Float(number) if number.is_finite() => number,
            Value::Float(_) => {
                place.mismatch(item, "finite number");
                return None;
            }
            _ => {
                place.mismatch(item, "number");
                return None;
            }
        };
        place.check_bounds(item, &item.value).then_some(number)
    }

    fn to_item(&self) -> Option<Item> {
        Some(Value::Float(*self).into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "number"})
    }
}

impl OptionValue for f32 {
    type Edge = f64;

    fn kind() -> String {
        "number".to_owned()
    }

    fn from_item<'d>(item: &'d Item, place: &Place<'d>) -> Option<Self> {
        let number = f64::from_item(item, place)? as f32;
        if number.is_infinite() {
            place.mismatch(item, "number that fits 32 bits");
            return None;
        }
        Some(number)
    }

    fn to_item(&self) -> Option<Item> {
        // The shortest decimal of the 32-bit number: 0.1 stays 0.1 and is not 0.10000000149.
        let shortest = self.to_string().parse().unwrap_or(f64::from(*self));
        Some(Value::Float(shortest).into())
    }

    fn schema() -> serde_json::Value {
        json!({"type": "number"})
    }
}
