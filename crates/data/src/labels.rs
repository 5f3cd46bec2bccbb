//! Labels of classification and regression data.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::shape::LabelValue;

/// What a labelled row is to be given.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Label {
    /// The number of a class.
    Class(u32),
    /// A score.
    Score(f32),
}

/// The labels a data set uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Labels {
    /// Classes by number, with their names.
    Classes(Vec<String>),
    /// Scores: the task is regression.
    Scores,
}

impl Labels {
    /// The number of a model's outputs for these labels.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Classes(names) => names.len(),
            Self::Scores => 1,
        }
    }

    /// Turns a row's label into what it means here.
    ///
    /// # Errors
    /// [`Error::Example`] for a label that is not among these, as may happen in validation data.
    pub fn resolve(&self, value: &LabelValue) -> Result<Label> {
        let unknown = |shown: &str| {
            Error::example(
                format!("the label {shown:?} is not among the training data's"),
                "correct the label, or add rows with it to the training data",
            )
        };
        match (self, value) {
            (Self::Classes(names), LabelValue::Index(index)) => {
                if (*index as usize) < names.len() {
                    Ok(Label::Class(*index))
                } else {
                    Err(unknown(&index.to_string()))
                }
            }
            (Self::Classes(names), LabelValue::Name(name)) => match names.binary_search(name) {
                Ok(class) => Ok(Label::Class(class as u32)),
                Err(_) => match names.iter().position(|n| n == name) {
                    Some(class) => Ok(Label::Class(class as u32)),
                    None => Err(unknown(name)),
                },
            },
            (Self::Classes(_), LabelValue::Score(score)) => Err(unknown(&score.to_string())),
            (Self::Scores, LabelValue::Score(score)) => Ok(Label::Score(*score)),
            (Self::Scores, LabelValue::Index(index)) => Ok(Label::Score(*index as f32)),
            (Self::Scores, LabelValue::Name(name)) => match name.trim().parse::<f32>() {
                Ok(score) if score.is_finite() => Ok(Label::Score(score)),
                _ => Err(unknown(name)),
            },
        }
    }
}

/// Goes through the labels of a whole data set.
#[derive(Debug, Clone, Default)]
pub struct LabelCollector {
    names: BTreeSet<String>,
    highest: Option<u32>,
    scores: bool,
    rows: u64,
}

impl LabelCollector {
    /// Takes one row's label.
    pub fn add(&mut self, value: &LabelValue) {
        self.rows += 1;
        match value {
            LabelValue::Name(name) if self.names.contains(name) => {}
            LabelValue::Name(name) => {
                self.names.insert(name.clone());
            }
            LabelValue::Index(index) => self.highest = self.highest.max(Some(*index)),
            LabelValue::Score(_) => self.scores = true,
        }
    }

    /// Says what the labels are. Names are numbered in alphabetical order, so that the order of
    /// rows does not matter; numbers keep their value.
    ///
    /// # Errors
    /// [`Error::Example`] when classes and scores are mixed, or a class has a number so high that
    /// the data set cannot hold that many classes.
    pub fn finish(self) -> Result<Labels> {
        match (self.names.is_empty(), self.highest, self.scores) {
            (true, _, true) => Ok(Labels::Scores),
            (true, Some(highest), false) => {
                if u64::from(highest) > self.rows.max(1000) {
                    return Err(Error::example(
                        format!("a label is {highest}, but there are only {} rows", self.rows),
                        "number the classes from 0, or write scores with a decimal point",
                    ));
                }
                Ok(Labels::Classes((0..=highest).map(|class| class.to_string()).collect()))
            }
            (false, None, false) => Ok(Labels::Classes(self.names.into_iter().collect())),
            (true, None, false) => {
                Err(Error::example("there is no label", "check the data set's label field"))
            }
            _ => Err(Error::example(
                "names, numbers and scores are mixed as labels",
                "write all labels in one form",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(values: &[LabelValue]) -> Result<Labels> {
        let mut collector = LabelCollector::default();
        for value in values {
            collector.add(value);
        }
        collector.finish()
    }

    fn names(values: &[&str]) -> Vec<LabelValue> {
        values.iter().map(|v| LabelValue::Name((*v).to_owned())).collect()
    }

    #[test]
    fn names_are_numbered_alphabetically() {
        let labels = collect(&names(&["pos", "neg", "pos", "neutral"])).unwrap();
        assert_eq!(labels, Labels::Classes(vec!["neg".into(), "neutral".into(), "pos".into()]));
        assert_eq!(labels.outputs(), 3);
        assert_eq!(labels.resolve(&LabelValue::Name("pos".into())).unwrap(), Label::Class(2));
        let error = labels.resolve(&LabelValue::Name("odd".into())).unwrap_err();
        assert!(error.to_string().contains("\"odd\" is not among"), "{error}");
    }

    #[test]
    fn numbers_keep_their_value() {
        let values = [LabelValue::Index(2), LabelValue::Index(0)];
        let labels = collect(&values).unwrap();
        assert_eq!(labels.outputs(), 3);
        assert_eq!(labels.resolve(&values[0]).unwrap(), Label::Class(2));
        assert!(labels.resolve(&LabelValue::Index(3)).is_err());
    }

    #[test]
    fn whole_numbers_among_scores_are_scores() {
        let values = [LabelValue::Score(2.5), LabelValue::Index(3)];
        let labels = collect(&values).unwrap();
        assert_eq!((labels.outputs(), labels.resolve(&values[1]).unwrap()), (1, Label::Score(3.0)));
    }

    #[test]
    fn mixtures_and_absurd_numbers_are_refused() {
        let mut mixed = names(&["a"]);
        mixed.push(LabelValue::Score(0.5));
        assert!(collect(&mixed).is_err());
        assert!(collect(&[]).is_err());
        assert!(collect(&[LabelValue::Index(4_000_000_000)]).is_err());
    }
}
