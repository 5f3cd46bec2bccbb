//! What a checkpoint's class says comes out of it: next tokens, classes or vectors.

use crate::config::{Config, MAX_SIDE};
use crate::weight_list::WeightList;
use retune_core::model::Output;
use retune_core::pass::Pass;
use retune_core::spec::{Head, Role};
use retune_core::{Error, Result};
use serde_json::{Map, Value, json};
use tensor::Tensor;

/// What a checkpoint is to be used for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Task {
    /// What its configuration says it was saved for.
    #[default]
    AsSaved,
    /// One of these classes per document; the head is new unless the checkpoint has one for
    /// exactly these.
    Classify {
        /// Names of the classes, in the order of the logits.
        labels: Vec<String>,
    },
    /// One vector per document, scaled to length 1: the mean over its tokens for an encoder, the
    /// last token's for a decoder.
    Embed,
}

/// How the states of a document's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The first token's.
    First,
    /// The last token's.
    Last,
}

/// What the class of a checkpoint is made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Purpose {
    Language,
    Classes(Vec<String>),
    Embedding,
}

/// The names a family's classes have in the Hugging Face library.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Classes {
    /// Gives next tokens, e.g. `LlamaForCausalLM`; empty where the family has none.
    pub(crate) language: &'static str,
    /// Gives classes, e.g. `LlamaForSequenceClassification`.
    pub(crate) classifier: &'static str,
    /// Gives states, e.g. `LlamaModel`.
    pub(crate) bare: &'static str,
    /// What stands before the names of the bare model inside the other two, e.g. `model.`.
    pub(crate) prefix: &'static str,
}

impl Classes {
    /// Reads which class a configuration was saved by, and what that class is for.
    ///
    /// # Errors
    /// If the class is none of the family's three.
    pub(crate) fn read(&self, config: &Config) -> Result<(&'static str, Purpose)> {
        let saved = match config.get("architectures") {
            None => None,
            Some(Value::Array(list)) => match list.as_slice() {
                [] => None,
                [Value::String(class)] => Some(class.as_str()),
                _ => return Err(config.unknown("architectures", "a list of one class name")),
            },
            Some(_) => return Err(config.unknown("architectures", "a list of one class name")),
        };
        let usual = if self.language.is_empty() { self.bare } else { self.language };
        match saved.unwrap_or(usual) {
            class if class == self.classifier => {
                Ok((self.classifier, Purpose::Classes(labels(config)?)))
            }
            class if class == self.bare => Ok((self.bare, Purpose::Embedding)),
            class if class == self.language => Ok((self.language, Purpose::Language)),
            class => {
                let known = [self.language, self.classifier, self.bare];
                let known: Vec<&str> = known.into_iter().filter(|name| !name.is_empty()).collect();
                Err(Error::Unsupported {
                    what: format!("the head of {class}"),
                    help: format!(
                        "the family is read as {}; to tune the body for another task, ask for \
                         a new head (task `classify` with labels, or `embed`)",
                        known.join(", ")
                    ),
                })
            }
        }
    }

    /// Returns what stands before the body's names in the class used.
    pub(crate) fn prefix(&self, purpose: &Purpose) -> &'static str {
        if *purpose == Purpose::Embedding { "" } else { self.prefix }
    }

    /// Returns the class for a purpose other than language.
    pub(crate) fn class_for(&self, task: &Task) -> Option<&'static str> {
        match task {
            Task::AsSaved => None,
            Task::Classify { .. } => Some(self.classifier),
            Task::Embed => Some(self.bare),
        }
    }
}

/// Reads the names of the classes from `id2label`, or counts them by `num_labels`.
fn labels(config: &Config) -> Result<Vec<String>> {
    let Some(names) = config.get("id2label") else {
        // Two is what the library's configurations begin with.
        let count = config.optional_side("num_labels")?.unwrap_or(2);
        return Ok((0..count).map(|index| format!("LABEL_{index}")).collect());
    };
    let wrong = || config.unknown("id2label", "names under \"0\", \"1\", … without a gap");
    let names = names.as_object().filter(|names| !names.is_empty()).ok_or_else(wrong)?;
    config.at_most("id2label", names.len(), MAX_SIDE)?;
    (0..names.len())
        .map(|index| names.get(&index.to_string()).and_then(Value::as_str).map(str::to_owned))
        .collect::<Option<Vec<String>>>()
        .ok_or_else(wrong)
}

/// Returns whether the saved names say nothing (`LABEL_0`, `LABEL_1`, …).
fn unnamed(labels: &[String]) -> bool {
    labels.iter().enumerate().all(|(index, label)| *label == format!("LABEL_{index}"))
}

/// Rewrites a configuration for a task, and says whether a saved head of classes may be kept.
///
/// # Errors
/// [`Error::Setting`] if the labels are fewer than two, or one is there twice.
pub(crate) fn for_task(config: Config, classes: &Classes, task: &Task) -> Result<(Config, bool)> {
    let Some(class) = classes.class_for(task) else { return Ok((config, true)) };
    if class.is_empty() {
        return Err(Error::Unsupported {
            what: format!("a head of classes on {}", classes.bare),
            help: "its classes are texts: give the data a prompt for them".to_owned(),
        });
    }
    let Task::Classify { labels: wanted } = task else {
        return Ok((config.with("architectures", json!([class])), true));
    };
    let wrong = |what: &str, found: String| Error::Setting {
        setting: "labels".to_owned(),
        what: what.to_owned(),
        expected: format!("two to {MAX_SIDE} different names"),
        found,
        help: "give every class of the data one name".to_owned(),
    };
    if !(2..=MAX_SIDE).contains(&wanted.len()) {
        return Err(wrong("a classifier needs classes", format!("{} names", wanted.len())));
    }
    let mut sorted: Vec<&String> = wanted.iter().collect();
    sorted.sort_unstable();
    if let Some([label, _]) = sorted.array_windows().find(|[a, b]| a == b) {
        return Err(wrong("a class is there twice", format!("`{label}`")));
    }
    let keep = match classes.read(&config) {
        Ok((_, Purpose::Classes(saved))) => {
            saved == *wanted || (unnamed(&saved) && saved.len() == wanted.len())
        }
        _ => false,
    };
    let names: Map<String, Value> =
        wanted.iter().enumerate().map(|(i, label)| (i.to_string(), json!(label))).collect();
    let places: Map<String, Value> =
        wanted.iter().enumerate().map(|(i, label)| (label.clone(), json!(i))).collect();
    let config = config
        .with("architectures", json!([class]))
        .with("id2label", names)
        .with("label2id", places)
        .with("problem_type", "single_label_classification");
    Ok((config, keep))
}

/// Adds the head of a decoder to its weights and describes it.
pub(crate) fn decoder_head(
    weights: &mut WeightList,
    purpose: Purpose,
    embedding: &str,
    [vocabulary, width]: [usize; 2],
    tied: bool,
    soft_cap: Option<f64>,
) -> Head {
    match purpose {
        Purpose::Language => {
            if !tied {
                weights.linear("lm_head", [vocabulary, width], false, Role::Head, None);
            }
            let weight =
                if tied { format!("{embedding}.weight") } else { "lm_head.weight".to_owned() };
            Head::Language { weight, bias: None, soft_cap }
        }
        Purpose::Classes(labels) => {
            weights.linear("score", [labels.len(), width], false, Role::Head, None);
            Head::Classes { labels }
        }
        Purpose::Embedding => Head::Embedding,
    }
}

/// Turns a decoder's last states into what its head gives.
///
/// # Errors
/// If a weight cannot be read, or the batch has no document.
pub(crate) fn decoder_output(pass: &mut Pass<'_>, head: &Head, x: Tensor<2>) -> Result<Output> {
    match head {
        Head::Language { .. } => Ok(Output::States(x)),
        Head::Classes { .. } => {
            let last = pool(pass, x, Pooling::Last)?;
            Ok(Output::Classes(pass.linear("score", last)?))
        }
        Head::Embedding | Head::Pairs => {
            Ok(Output::Embeddings(unit_rows(pool(pass, x, Pooling::Last)?)))
        }
    }
}

/// Makes one vector of each document's states.
///
/// # Shapes
/// - `x`: `[tokens, width]`
/// - returns: `[documents, width]`
///
/// # Errors
/// [`Error::Input`] if the batch has no document.
pub(crate) fn pool(pass: &Pass<'_>, x: Tensor<2>, pooling: Pooling) -> Result<Tensor<2>> {
    let rows: Vec<Tensor<2>> = pass
        .spans()
        .iter()
        .map(|span| match pooling {
            Pooling::Mean => x.clone().narrow(0, span.start, span.len()).mean_dim(0),
            Pooling::First => x.clone().narrow(0, span.start, 1),
            Pooling::Last => x.clone().narrow(0, span.end - 1, 1),
        })
        .collect();
    if rows.is_empty() {
        return Err(Error::Input {
            what: "the batch is empty".to_owned(),
            expected: "at least one document".to_owned(),
            found: "none".to_owned(),
            help: "drop empty batches".to_owned(),
        });
    }
    Ok(Tensor::cat(rows, 0))
}

/// Scales every row to length 1; rows shorter than 1e-12 are divided by that instead.
pub(crate) fn unit_rows(x: Tensor<2>) -> Tensor<2> {
    let length = x.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(1e-12);
    x / length
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const LLAMA: Classes = Classes {
        language: "LlamaForCausalLM",
        classifier: "LlamaForSequenceClassification",
        bare: "LlamaModel",
        prefix: "model.",
    };

    fn config(value: Value) -> Config {
        Config::new(Path::new("config.json"), value)
    }

    #[test]
    fn a_class_is_read_with_its_labels() {
        let config = config(json!({"architectures": ["LlamaForSequenceClassification"],
            "id2label": {"1": "spam", "0": "ham"}}));
        let (class, purpose) = LLAMA.read(&config).unwrap();
        assert_eq!(class, LLAMA.classifier);
        assert_eq!(purpose, Purpose::Classes(vec!["ham".into(), "spam".into()]));
    }

    #[test]
    fn labels_with_a_gap_and_unknown_classes_are_refused() {
        let gap = config(json!({"architectures": ["LlamaForSequenceClassification"],
            "id2label": {"0": "a", "2": "b"}}));
        assert!(LLAMA.read(&gap).unwrap_err().to_string().contains("id2label"));
        let other = config(json!({"architectures": ["LlamaForTokenClassification"]}));
        assert!(
            LLAMA.read(&other).unwrap_err().to_string().contains("LlamaForTokenClassification")
        );
    }

    #[test]
    fn a_new_head_is_kept_only_for_the_same_labels() {
        let saved = config(json!({"architectures": ["LlamaForSequenceClassification"],
            "id2label": {"0": "no", "1": "yes"}}));
        let task = |labels: [&str; 2]| Task::Classify { labels: labels.map(str::to_owned).into() };
        let (_, keep) = for_task(saved.clone(), &LLAMA, &task(["no", "yes"])).unwrap();
        assert!(keep);
        let (config, keep) = for_task(saved.clone(), &LLAMA, &task(["yes", "no"])).unwrap();
        assert!(!keep, "the same names in another order are another head");
        assert_eq!(config.value()["label2id"], json!({"yes": 0, "no": 1}));
        assert!(for_task(saved, &LLAMA, &task(["no", "no"])).is_err());
    }
}
