//! The value of a parameter at a tensor: one number, a gradient over layers, or cases by name.

use crate::methods::Kind;

/// A parameter as the plan gives it.
#[derive(Debug, Clone, PartialEq)]
pub enum Setting {
    /// One value for all tensors.
    Value(f64),
    /// Values at even distances from the first layer to the last.
    Gradient(Vec<f64>),
    /// The first case whose filter is part of the tensor's name; without a filter, any tensor.
    Cases(Vec<(Option<String>, Setting)>),
}

impl Setting {
    /// Returns the value for a tensor at `place` (0 first layer, 1 last); `None` where no case fits.
    pub fn at(&self, tensor: &str, place: f64, kind: Kind) -> Option<f64> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Gradient(values) => {
                let last = values.len().checked_sub(1)?;
                let scaled = place * last as f64;
                let before = (scaled as usize).min(last);
                if kind != Kind::Number {
                    return Some(values[before]);
                }
                let share = scaled - before as f64;
                let after = values[(before + 1).min(last)];
                Some((1.0 - share) * values[before] + share * after)
            }
            Self::Cases(cases) => {
                let fits = |filter: &Option<String>| match filter.as_deref() {
                    None | Some("*") => true,
                    Some(filter) => tensor.contains(filter),
                };
                cases.iter().find(|(filter, _)| fits(filter))?.1.at(tensor, place, kind)
            }
        }
    }

    /// Lists all values a tensor may get, but those between the points of a gradient.
    pub fn values(&self) -> Vec<f64> {
        match self {
            Self::Value(value) => vec![*value],
            Self::Gradient(values) => values.clone(),
            Self::Cases(cases) => cases.iter().flat_map(|(_, setting)| setting.values()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(setting: &Setting, tensor: &str, place: f64) -> Option<f64> {
        setting.at(tensor, place, Kind::Number)
    }

    #[test]
    fn gradients_are_interpolated_over_the_layers() {
        let three = Setting::Gradient(vec![0.0, 1.0, 0.5]);
        for (place, value) in [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1.0, 0.5)] {
            assert_eq!(number(&three, "w", place), Some(value), "{place}");
        }
        assert_eq!(number(&Setting::Gradient(vec![7.0]), "w", 0.3), Some(7.0));
        assert_eq!(number(&Setting::Gradient(vec![]), "w", 0.3), None);
        assert_eq!(Setting::Gradient(vec![0.0, 1.0]).at("w", 0.9, Kind::Flag), Some(0.0));
    }

    #[test]
    fn the_first_case_that_fits_holds() {
        let cases = Setting::Cases(vec![
            (Some("self_attn".to_owned()), Setting::Gradient(vec![0.0, 1.0])),
            (Some("mlp".to_owned()), Setting::Value(3.0)),
            (None, Setting::Value(0.5)),
        ]);
        assert_eq!(number(&cases, "model.layers.1.self_attn.q_proj.weight", 1.0), Some(1.0));
        assert_eq!(number(&cases, "model.layers.1.mlp.up_proj.weight", 1.0), Some(3.0));
        assert_eq!(number(&cases, "model.norm.weight", 0.0), Some(0.5));
        let Setting::Cases(mut only) = cases else { unreachable!() };
        only.pop();
        assert_eq!(number(&Setting::Cases(only), "model.norm.weight", 0.0), None);
    }
}
