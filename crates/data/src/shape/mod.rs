//! What a row means: its shape, detected and stated, and the example it holds.

mod messages;
mod pattern;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::read::{Row, kind};
use crate::template::Conversation;
use pattern::Pattern;

/// The shape of a data set's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// OpenAI's `messages`, with `role` and `content`.
    Messages,
    /// ShareGPT's `conversations`, with `from` and `value`.
    Sharegpt,
    /// Alpaca's `instruction`, `input` and `output`.
    Alpaca,
    /// A prompt and what should follow it.
    PromptCompletion,
    /// Running text.
    Text,
    /// A text and its class or score.
    TextLabel,
    /// Two texts and the class or score of the pair.
    TextPairLabel,
}

impl Shape {
    /// The shape's name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::PromptCompletion => "prompt-completion",
            Self::Text => "text",
            Self::TextLabel => "text-label",
            Self::TextPairLabel => "text-pair-label",
        }
    }

    /// The fields a row needs, as named in a recipe's `columns`.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Sharegpt => &["conversations"],
            Self::Alpaca => &["instruction", "output"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::TextLabel => &["text", "label"],
            Self::TextPairLabel => &["text1", "text2", "label"],
        }
    }

    /// The fields a row may have besides.
    fn may_have(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["tools", "documents"],
            Self::Sharegpt => &["system", "tools"],
            Self::Alpaca => &["input", "system", "history"],
            Self::PromptCompletion => &["system"],
            Self::Text | Self::TextLabel | Self::TextPairLabel => &[],
        }
    }
}

/// Shapes in the order they are looked for, with the field names each goes by in the wild; the
/// first that all sampled rows have wins. A longer list of fields comes before a shorter.
const KNOWN: &[(Shape, &[&str])] = &[
    (Shape::Messages, &["messages"]),
    (Shape::Sharegpt, &["conversations"]),
    (Shape::Alpaca, &["instruction", "output"]),
    (Shape::PromptCompletion, &["prompt", "completion"]),
    (Shape::PromptCompletion, &["prompt", "response"]),
    (Shape::PromptCompletion, &["instruction", "response"]),
    (Shape::PromptCompletion, &["question", "answer"]),
    (Shape::TextPairLabel, &["text1", "text2", "label"]),
    (Shape::TextPairLabel, &["sentence1", "sentence2", "label"]),
    (Shape::TextPairLabel, &["premise", "hypothesis", "label"]),
    (Shape::TextLabel, &["text", "label"]),
    (Shape::TextLabel, &["sentence", "label"]),
    (Shape::Text, &["text"]),
];

/// How rows are understood, where the user says so.
#[derive(Debug, Clone, Default)]
pub struct ShapeOptions {
    /// The shape; detected if absent.
    pub shape: Option<Shape>,
    /// From a field's standard name (`prompt`, `completion`, …) to the file's own.
    pub columns: BTreeMap<String, String>,
    /// Text of the prompt with `{field}` in place of the row's fields.
    pub prompt_template: Option<String>,
    /// The field that holds a row's task, counted from 0.
    pub task: Option<String>,
}

/// What one row teaches.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// A conversation.
    Chat(Chat),
    /// A prompt and what should follow it.
    Completion {
        /// What is given.
        prompt: String,
        /// What is to be written.
        completion: String,
    },
    /// Running text.
    Text(String),
    /// One or two texts with a label.
    Labelled {
        /// The text.
        text: String,
        /// The second text of a pair.
        second: Option<String>,
        /// The class or score.
        label: LabelValue,
    },
}

impl Example {
    /// Returns the last answer, if the example holds one.
    pub fn answer(&self) -> Option<&str> {
        match self {
            Self::Chat(chat) => {
                let mut messages = chat.conversation.messages.iter().rev();
                let answer = messages.find(|message| message["role"] == "assistant")?;
                answer["content"].as_str().filter(|text| !text.is_empty())
            }
            Self::Completion { completion, .. } => Some(completion),
            Self::Text(_) | Self::Labelled { .. } => None,
        }
    }
}

/// A conversation and which of the assistant's messages are learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// The messages, tools and documents.
    pub conversation: Conversation,
    /// Indices of messages that must not be learned (`"weight": 0` or `"train": false`).
    pub excluded: Vec<usize>,
    /// The same as plain prompt and completion, for models without a chat template; only for
    /// shapes that do not depend on one.
    pub plain: Option<(String, String)>,
}

/// A label as the file writes it.
#[derive(Debug, Clone, PartialEq, PartialOrd)]
pub enum LabelValue {
    /// The number of a class.
    Index(u32),
    /// The name of a class.
    Name(String),
    /// A score, for regression.
    Score(f32),
}

/// Turns rows into examples, by one shape for the whole file.
#[derive(Debug, Clone)]
pub struct Shaper {
    shape: Shape,
    /// From a field's standard name to the file's.
    fields: BTreeMap<&'static str, String>,
    prompt: Option<Pattern>,
    task: Option<String>,
    statement: String,
}

impl Shaper {
    /// Decides the shape from a file's first rows and what the user said.
    ///
    /// # Errors
    /// [`Error::Setting`] for columns that no shape has; [`Error::File`] when no shape fits;
    /// [`Error::Row`] for the first row that differs from the rows before it.
    pub fn detect(path: &Path, sample: &[Row], options: &ShapeOptions) -> Result<Self> {
        let Some(first) = sample.first() else {
            return Err(Error::file(path, "the file has no rows", "check the file"));
        };
        let prompt = options.prompt_template.as_deref().map(Pattern::parse).transpose()?;
        let said = options.shape.is_some() || !options.columns.is_empty() || prompt.is_some();
        let mut shaper = if said {
            Self::from_options(options, prompt)?
        } else {
            Self::from_names(path, first)?
        };
        shaper.task.clone_from(&options.task);
        for row in sample {
            shaper.check_fields(row).map_err(|e| {
                if row.line == first.line {
                    return e.at(path, row.line);
                }
                let hint = format!(
                    "rows before it are of shape {}: keep one shape in a file",
                    shaper.shape.name()
                );
                match e {
                    Error::Example { problem, .. } => Error::row(path, row.line, problem, hint),
                    other => other,
                }
            })?;
        }
        Ok(shaper.stated(said))
    }

    fn from_options(options: &ShapeOptions, prompt: Option<Pattern>) -> Result<Self> {
        let has = |name: &str| {
            options.columns.contains_key(name) || (name == "prompt" && prompt.is_some())
        };
        // A prompt template needs only the completion's column to be known.
        let named: Vec<&str> = options
            .columns
            .keys()
            .map(String::as_str)
            .chain(prompt.is_some().then_some("prompt"))
            .collect();
        let fits = |shape: Shape| {
            named.iter().all(|n| shape.needs().contains(n) || shape.may_have().contains(n))
        };
        let shape = match options.shape {
            Some(shape) => shape,
            None => KNOWN
                .iter()
                .map(|(shape, _)| *shape)
                .find(|&shape| fits(shape) && shape.needs().iter().any(|n| has(n)))
                .ok_or_else(|| no_such_columns(&named))?,
        };
        if !fits(shape) {
            return Err(no_such_columns(&named));
        }
        let fields = shape
            .needs()
            .iter()
            .chain(shape.may_have())
            .map(|&name| (name, options.columns.get(name).map_or(name, String::as_str).to_owned()))
            .collect();
        Ok(Self { shape, fields, prompt, task: None, statement: String::new() })
    }

    fn from_names(path: &Path, first: &Row) -> Result<Self> {
        let known = KNOWN.iter().find(|(_, names)| {
            names.iter().all(|name| first.fields.get(*name).is_some_and(|v| !v.is_null()))
        });
        let Some((shape, names)) = known else {
            return Err(Error::file(
                path,
                format!(
                    "cannot tell what the rows mean: they have the fields {}, expected for example \
                     messages, or prompt and completion, or text and label",
                    listed(first.fields.keys())
                ),
                "name them in the recipe, as in columns = { prompt = \"question\", completion = \
                 \"reply\" }",
            ));
        };
        // Some files call OpenAI-style messages `conversations`.
        let openai = |v: &Value| v.get(0).is_some_and(|m| m.get("role").is_some());
        let shape = if *shape == Shape::Sharegpt && openai(&first.fields["conversations"]) {
            Shape::Messages
        } else {
            *shape
        };
        let mut fields: BTreeMap<&'static str, String> =
            shape.may_have().iter().map(|&name| (name, name.to_owned())).collect();
        fields.extend(shape.needs().iter().zip(*names).map(|(&to, from)| (to, (*from).to_owned())));
        Ok(Self { shape, fields, prompt: None, task: None, statement: String::new() })
    }

    fn stated(mut self, said: bool) -> Self {
        let from: Vec<String> = self
            .shape
            .needs()
            .iter()
            .map(|&name| match (&self.prompt, self.fields.get(name)) {
                (Some(pattern), _) if name == "prompt" => {
                    format!("prompt from {}", listed(pattern.fields()))
                }
                (_, Some(field)) if field != name => format!("{name} from `{field}`"),
                _ => format!("`{name}`"),
            })
            .collect();
        let how = if said { "set" } else { "detected" };
        self.statement = format!("shape {} ({how}): {}", self.shape.name(), from.join(", "));
        self
    }

    /// The shape decided on.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What was decided and from which fields, for people.
    pub fn statement(&self) -> &str {
        &self.statement
    }

    fn check_fields(&self, row: &Row) -> Result<()> {
        for &name in self.shape.needs() {
            if name == "prompt"
                && let Some(pattern) = &self.prompt
            {
                pattern.fill(&row.fields)?;
                continue;
            }
            self.field(row, name)?;
        }
        Ok(())
    }

    /// A field that the shape needs.
    fn field<'r>(&self, row: &'r Row, name: &'static str) -> Result<&'r Value> {
        let column = &self.fields[name];
        match row.fields.get(column) {
            Some(value) if !value.is_null() => Ok(value),
            found => Err(Error::example(
                format!(
                    "the field `{column}` is {}; the row has {}",
                    if found.is_some() { "null" } else { "missing" },
                    listed(row.fields.keys())
                ),
                "give every row the same fields, or name others in `columns`",
            )),
        }
    }

    /// Returns the row's task, where the data has any.
    ///
    /// # Errors
    /// [`Error::Example`] when the field is missing or holds no whole number.
    pub fn task(&self, row: &Row) -> Result<Option<u32>> {
        let Some(column) = &self.task else { return Ok(None) };
        let found = row.fields.get(column);
        let number = match found {
            Some(Value::String(text)) => text.trim().parse().ok(),
            Some(value) => value.as_u64().and_then(|number| u32::try_from(number).ok()),
            None => None,
        };
        let problem = || match found {
            Some(value) => format!("the task in the field `{column}` is {value}"),
            None => format!("the field `{column}` is missing, which holds the row's task"),
        };
        let hint = "give every row its task as a whole number, counted from 0";
        number.map(Some).ok_or_else(|| Error::example(problem(), hint))
    }

    fn optional<'r>(&self, row: &'r Row, name: &str) -> Option<&'r Value> {
        self.fields.get(name).and_then(|c| row.fields.get(c)).filter(|v| !v.is_null())
    }

    /// Turns a row into the example it holds.
    ///
    /// # Errors
    /// [`Error::Example`] when a field is missing or of the wrong kind; add the place with
    /// [`Error::at`].
    pub fn example(&self, row: &Row) -> Result<Example> {
        match self.shape {
            Shape::Messages => {
                let list = self.field(row, "messages")?;
                let tools = self.optional(row, "tools");
                messages::openai(list, tools, self.optional(row, "documents")).map(Example::Chat)
            }
            Shape::Sharegpt => {
                let list = self.field(row, "conversations")?;
                let tools = self.optional(row, "tools");
                messages::sharegpt(list, tools, self.optional(row, "system")).map(Example::Chat)
            }
            Shape::Alpaca => {
                let text = |name| string(self.field(row, name)?, name);
                let optional = |name| match self.optional(row, name) {
                    Some(value) => string(value, name).map(|s| (!s.is_empty()).then_some(s)),
                    None => Ok(None),
                };
                messages::alpaca(
                    text("instruction")?,
                    optional("input")?,
                    text("output")?,
                    optional("system")?,
                    self.optional(row, "history"),
                )
                .map(Example::Chat)
            }
            Shape::PromptCompletion => self.prompt_completion(row),
            Shape::Text => Ok(Example::Text(string(self.field(row, "text")?, "text")?.to_owned())),
            Shape::TextLabel => Ok(Example::Labelled {
                text: string(self.field(row, "text")?, "text")?.to_owned(),
                second: None,
                label: label(self.field(row, "label")?)?,
            }),
            Shape::TextPairLabel => Ok(Example::Labelled {
                text: string(self.field(row, "text1")?, "text1")?.to_owned(),
                second: Some(string(self.field(row, "text2")?, "text2")?.to_owned()),
                label: label(self.field(row, "label")?)?,
            }),
        }
    }

    fn prompt_completion(&self, row: &Row) -> Result<Example> {
        let completion = self.field(row, "completion")?;
        if let Some(pattern) = &self.prompt {
            let prompt = pattern.fill(&row.fields)?;
            return Ok(Example::Completion {
                prompt,
                completion: plain(completion, "completion")?,
            });
        }
        let prompt = self.field(row, "prompt")?;
        match (prompt, completion) {
            (Value::Array(_), _) | (_, Value::Array(_)) => {
                messages::prompt_completion(prompt, completion).map(Example::Chat)
            }
            _ => {
                let mut prompt = plain(prompt, "prompt")?;
                if let Some(system) = self.optional(row, "system") {
                    prompt = format!("{}\n{prompt}", string(system, "system")?);
                }
                Ok(Example::Completion { prompt, completion: plain(completion, "completion")? })
            }
        }
    }
}

fn no_such_columns(named: &[&str]) -> Error {
    let shapes: Vec<String> = [
        Shape::Messages,
        Shape::Sharegpt,
        Shape::Alpaca,
        Shape::PromptCompletion,
        Shape::Text,
        Shape::TextLabel,
        Shape::TextPairLabel,
    ]
    .iter()
    .map(|shape| format!("{} ({})", shape.name(), shape.needs().join(", ")))
    .collect();
    Error::Setting {
        setting: "columns",
        problem: format!("no shape has the fields {}", listed(named)),
        hint: format!("the shapes and their fields are: {}", shapes.join("; ")),
    }
}

/// Field names in a sentence.
fn listed<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    let names: Vec<String> = names.into_iter().map(|n| format!("`{}`", n.as_ref())).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

pub(crate) fn string<'v>(value: &'v Value, name: &str) -> Result<&'v str> {
    value.as_str().ok_or_else(|| {
        Error::example(
            format!("the field `{name}` is {}, expected a string", kind(value)),
            "write the text as a string",
        )
    })
}

/// Text of a field that may also be a number or a truth value, as answers often are.
fn plain(value: &Value, name: &str) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        other => string(other, name).map(ToOwned::to_owned),
    }
}

pub(crate) fn label(value: &Value) -> Result<LabelValue> {
    let refuse = || {
        Error::example(
            format!(
                "the label is {value}, expected a class (a string or a whole number from 0) or a score"
            ),
            "repair the label",
        )
    };
    match value {
        Value::String(text) => match text.trim().parse::<u32>() {
            // CSV has no numbers.
            Ok(index) => Ok(LabelValue::Index(index)),
            Err(_) if text.trim().is_empty() => Err(refuse()),
            Err(_) => match text.trim().parse::<f32>() {
                Ok(score) if text.contains('.') && score.is_finite() => {
                    Ok(LabelValue::Score(score))
                }
                _ => Ok(LabelValue::Name(text.clone())),
            },
        },
        Value::Bool(truth) => Ok(LabelValue::Index(u32::from(*truth))),
        Value::Number(number) => match number.as_u64().map(u32::try_from) {
            Some(Ok(index)) => Ok(LabelValue::Index(index)),
            Some(Err(_)) => Err(refuse()),
            None => match number.as_f64() {
                Some(score) if number.is_f64() && (score as f32).is_finite() => {
                    Ok(LabelValue::Score(score as f32))
                }
                _ => Err(refuse()),
            },
        },
        _ => Err(refuse()),
    }
}

/// A JSON object's fields by name.
type Fields = Map<String, Value>;

#[cfg(test)]
mod tests;
