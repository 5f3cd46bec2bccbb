//! Chat templates: from a conversation to text, with the assistant's part of it marked.
//!
//! A template is the Jinja program a checkpoint ships (`chat_template`). It is rendered as
//! transformers renders it: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string
//! methods, `raise_exception`, `strftime_now`, `tojson` and `{% generation %}`.

mod date;
mod json;
mod spans;
mod tags;

use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
pub use date::Date;
use json::JsonStyle;

/// The ChatML format (`<|im_start|>role … <|im_end|>`), for models that bring no template.
pub const CHATML: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\
{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Steps a template may take before it is stopped: no conversation that fits a model comes near.
const FUEL: u64 = 20_000_000;

/// What a template is rendered with besides the conversation.
#[derive(Debug, Clone, Default)]
pub struct TemplateSettings {
    /// The text of the beginning-of-sequence token, `bos_token` in templates.
    pub bos_token: Option<String>,
    /// The text of the end token, `eos_token` in templates.
    pub eos_token: Option<String>,
    /// The text of the padding token, `pad_token` in templates.
    pub pad_token: Option<String>,
    /// The text of the unknown token, `unk_token` in templates.
    pub unk_token: Option<String>,
    /// What `strftime_now` prints. A template that asks for the date fails without one.
    pub date: Option<Date>,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl TemplateSettings {
    /// Takes the special tokens' texts from a tokenizer.
    pub fn of(tokenizer: &Tokenizer, date: Option<Date>) -> Self {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        let special = tokenizer.special();
        Self {
            bos_token: text(special.bos),
            eos_token: text(special.eos),
            pad_token: text(special.pad),
            unk_token: text(special.unk),
            date,
            variables: Map::new(),
        }
    }
}

/// A conversation as templates see it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// Objects with at least `role`, in order.
    pub messages: Vec<Value>,
    /// The tools on offer (a list of JSON schemas), if any.
    pub tools: Option<Value>,
    /// Documents to answer from, if any.
    pub documents: Option<Value>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text to tokenise, special tokens included.
    pub text: String,
    /// What the assistant says, in order and without overlap; the end-of-turn token is inside
    /// where the template makes that visible.
    pub spans: Vec<Span>,
}

/// The part of a rendered conversation that one turn of the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The index of the message in [`Conversation::messages`].
    pub message: usize,
    /// Bytes of [`Rendered::text`].
    pub bytes: Range<usize>,
}

/// A compiled chat template.
///
/// ```
/// # use retune_data::template::{ChatTemplate, Conversation, TemplateSettings, CHATML};
/// # use serde_json::json;
/// let template = ChatTemplate::compile(CHATML, TemplateSettings::default())?;
/// let talk = Conversation {
///     messages: vec![
///         json!({"role": "user", "content": "2+2?"}),
///         json!({"role": "assistant", "content": "4"}),
///     ],
///     ..Conversation::default()
/// };
/// let rendered = template.render_with_spans(&talk)?;
/// assert_eq!(
///     rendered.text,
///     "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
/// );
/// assert_eq!(&rendered.text[rendered.spans[0].bytes.clone()], "4<|im_end|>");
/// # Ok::<(), retune_data::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    settings: TemplateSettings,
    has_generation_marks: bool,
}

/// Name of the template as it is, and of the one whose generation blocks write marks.
const PLAIN: &str = "chat";
const MARKED: &str = "chat with marks";

impl ChatTemplate {
    /// Compiles a template's Jinja source.
    ///
    /// # Errors
    /// [`Error::Template`] with the line when the source is not valid Jinja.
    pub fn compile(source: &str, settings: TemplateSettings) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| compile_error(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| format_as_python(out, value));
        environment.add_function("raise_exception", raise_exception);
        let date = settings.date;
        environment.add_function("strftime_now", move |format: String| strftime(date, &format));
        environment.add_filter("tojson", tojson);
        environment.add_filter(tags::PLAIN_FILTER, |text: String| text);
        environment.add_filter(tags::MARK_FILTER, |text: String| {
            format!("{}{text}{}", tags::OPEN, tags::CLOSE)
        });
        let (plain, has_generation_marks) = tags::rewrite(source, tags::PLAIN_FILTER);
        environment.add_template_owned(PLAIN, plain).map_err(|e| compile_error(&e))?;
        if has_generation_marks {
            let (marked, _) = tags::rewrite(source, tags::MARK_FILTER);
            environment.add_template_owned(MARKED, marked).map_err(|e| compile_error(&e))?;
        }
        Ok(Self { source: source.to_owned(), environment, settings, has_generation_marks })
    }

    /// The Jinja source it was compiled from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What it is rendered with besides the conversation.
    pub fn settings(&self) -> &TemplateSettings {
        &self.settings
    }

    /// Whether the template itself marks what the assistant says, by `{% generation %}`.
    pub fn has_generation_marks(&self) -> bool {
        self.has_generation_marks
    }

    /// Renders a conversation; with `add_generation_prompt`, up to where the model speaks next.
    ///
    /// # Errors
    /// [`Error::Template`] when the template raises (its own message is kept) or fails.
    pub fn render(&self, talk: &Conversation, add_generation_prompt: bool) -> Result<String> {
        self.run(PLAIN, &Messages::of(talk), add_generation_prompt)
    }

    /// Renders a conversation and finds what the assistant says in it.
    ///
    /// With `{% generation %}` marks in the template they are used. Without, each turn is found by
    /// rendering the conversation up to it and comparing; the span then ends where the turn does,
    /// end token included.
    ///
    /// # Errors
    /// [`Error::Template`] when the template raises or fails; [`Error::Example`] when the
    /// assistant's turns cannot be told apart in the text.
    pub fn render_with_spans(&self, talk: &Conversation) -> Result<Rendered> {
        let messages = Messages::of(talk);
        if self.has_generation_marks {
            self.spans_from_marks(&messages)
        } else {
            self.spans_from_prefixes(&messages)
        }
    }

    fn run(&self, name: &str, messages: &Messages, add_generation_prompt: bool) -> Result<String> {
        let settings = &self.settings;
        let mut context: Vec<(String, Jinja)> = settings
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), Jinja::from(Serde(value))))
            .collect();
        for (name, token) in [
            ("bos_token", &settings.bos_token),
            ("eos_token", &settings.eos_token),
            ("pad_token", &settings.pad_token),
            ("unk_token", &settings.unk_token),
        ] {
            if let Some(token) = token {
                context.push((name.to_owned(), Jinja::from(token)));
            }
        }
        context.push(("messages".to_owned(), Jinja::from(messages.values.clone())));
        context.push(("tools".to_owned(), messages.tools.clone()));
        context.push(("documents".to_owned(), messages.documents.clone()));
        context.push(("add_generation_prompt".to_owned(), Jinja::from(add_generation_prompt)));
        let context = Jinja::from_pairs(context);
        let template = self.environment.get_template(name).map_err(|e| render_error(&e))?;
        template.render(context).map_err(|e| render_error(&e))
    }
}

/// A conversation converted once for many renderings: values are shared, not copied.
#[derive(Debug, Clone)]
struct Messages {
    values: Vec<Jinja>,
    /// Indices of the assistant's messages.
    assistant: Vec<usize>,
    tools: Jinja,
    documents: Jinja,
}

impl Messages {
    fn of(talk: &Conversation) -> Self {
        let optional = |value: &Option<Value>| match value {
            Some(value) => Jinja::from(Serde(value)),
            None => Jinja::from(()),
        };
        Self {
            values: talk.messages.iter().map(|message| Jinja::from(Serde(message))).collect(),
            assistant: talk
                .messages
                .iter()
                .enumerate()
                .filter(|(_, m)| m.get("role").and_then(Value::as_str) == Some("assistant"))
                .map(|(i, _)| i)
                .collect(),
            tools: optional(&talk.tools),
            documents: optional(&talk.documents),
        }
    }

    /// The first `n` messages.
    fn up_to(&self, n: usize) -> Self {
        Self { values: self.values[..n].to_vec(), ..self.clone() }
    }

    /// The conversation with another text in one message.
    fn with_content(&self, message: usize, content: &str) -> Self {
        let mut changed = self.clone();
        let entries: Vec<(Jinja, Jinja)> = match self.values[message].try_iter() {
            Ok(keys) => keys
                .map(|key| {
                    let value = if key.as_str() == Some("content") {
                        Jinja::from(content)
                    } else {
                        self.values[message].get_item(&key).unwrap_or_default()
                    };
                    (key, value)
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        changed.values[message] = Jinja::from_pairs(entries);
        changed
    }
}

fn compile_error(error: &minijinja::Error) -> Error {
    Error::Template {
        place: match error.line() {
            Some(line) => format!("does not compile (line {line})"),
            None => "does not compile".to_owned(),
        },
        problem: chain(error),
        hint: "repair the template, or set another one in the recipe".to_owned(),
    }
}

/// Marks an error that the template raised on purpose.
const RAISED: &str = "raise_exception: ";

fn render_error(error: &minijinja::Error) -> Error {
    let problem = chain(error);
    if let Some(at) = problem.find(RAISED) {
        return Error::Template {
            place: "refused the conversation".to_owned(),
            problem: problem[at + RAISED.len()..].to_owned(),
            hint: "change the row so that the template accepts it (order and names of roles are \
                   what templates check most)"
                .to_owned(),
        };
    }
    let hint = if matches!(error.kind(), ErrorKind::OutOfFuel) {
        "the template loops without end or the row is huge; repair it or drop the row"
    } else {
        "check that the row has the fields the template reads, or set another template"
    };
    Error::Template {
        place: match error.line() {
            Some(line) => format!("failed (line {line})"),
            None => "failed".to_owned(),
        },
        problem,
        hint: hint.to_owned(),
    }
}

/// An engine error and what caused it, in one line.
fn chain(error: &minijinja::Error) -> String {
    let mut text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn raise_exception(message: String) -> Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn strftime(date: Option<Date>, format: &str) -> Result<String, minijinja::Error> {
    let refuse = |why: String| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    let date = date.ok_or_else(|| {
        refuse("the template prints today's date, but no date was given (set `date`)".to_owned())
    })?;
    date.strftime(format)
        .map_err(|code| refuse(format!("strftime_now cannot print {code:?} in {format:?}")))
}

fn tojson(
    value: &Jinja,
    indent: Option<Jinja>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    let as_data = serde_json::to_value(value).map_err(|e| {
        minijinja::Error::new(ErrorKind::InvalidOperation, "cannot write as JSON").with_source(e)
    })?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Jinja>>("indent")?,
    };
    let indent = match indent {
        Some(indent) if !indent.is_none() => Some(usize::try_from(indent)?.min(16)),
        _ => None,
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        Some(pair) => match <[String; 2]>::try_from(pair) {
            Ok([item, key]) => Some((item, key)),
            Err(_) => {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson's separators are two strings",
                ));
            }
        },
        None => None,
    };
    let style = JsonStyle {
        indent,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators,
    };
    options.assert_all_used()?;
    Ok(json::dumps(&as_data, &style))
}

/// Prints a value as Python's `str` does, because templates were written against it.
fn format_as_python(out: &mut minijinja::Output, value: &Jinja) -> Result<(), minijinja::Error> {
    let text = match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).to_owned(),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(x) => json::python_float(x),
            Err(_) => value.to_string(),
        },
        _ => return Ok(std::fmt::Write::write_fmt(out, format_args!("{value}"))?),
    };
    Ok(std::fmt::Write::write_str(out, &text)?)
}

#[cfg(test)]
mod tests;
