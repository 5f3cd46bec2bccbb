//! Conversations in the forms files hold them, brought to OpenAI's.

use serde_json::{Value, json};

use super::{Chat, Fields, plain, string};
use crate::error::{Error, Result};
use crate::read::kind;
use crate::template::Conversation;

/// OpenAI's form.
pub(super) fn openai(
    list: &Value,
    tools: Option<&Value>,
    documents: Option<&Value>,
) -> Result<Chat> {
    let mut excluded = Vec::new();
    let messages = message_list(list, "messages", |at, message| {
        let (message, learned) = openai_message(message)?;
        if !learned {
            excluded.push(at);
        }
        Ok(message)
    })?;
    let documents = documents.map(|d| decoded(d, "documents")).transpose()?;
    finish(messages, excluded, tools, documents)
}

/// ShareGPT's form: `from` and `value`, a system text beside the list.
pub(super) fn sharegpt(
    list: &Value,
    tools: Option<&Value>,
    system: Option<&Value>,
) -> Result<Chat> {
    let mut excluded = Vec::new();
    let mut messages = match system {
        Some(system) if system.as_str() != Some("") => {
            vec![json!({"role": "system", "content": string(system, "system")?})]
        }
        _ => Vec::new(),
    };
    let shift = messages.len();
    messages.extend(message_list(list, "conversations", |at, message| {
        let (message, learned) = sharegpt_message(message)?;
        if !learned {
            excluded.push(at + shift);
        }
        Ok(message)
    })?);
    finish(messages, excluded, tools, None)
}

/// Alpaca's form. Instruction and input are joined by a line feed; answers of the history are
/// learned too, as LLaMA-Factory does.
pub(super) fn alpaca(
    instruction: &str,
    input: Option<&str>,
    output: &str,
    system: Option<&str>,
    history: Option<&Value>,
) -> Result<Chat> {
    let mut messages = Vec::new();
    if let Some(system) = system {
        messages.push(json!({"role": "system", "content": system}));
    }
    let refuse = || {
        Error::example(
            "the field `history` is not a list of [question, answer]",
            "repair the field",
        )
    };
    if let Some(history) = history {
        for pair in history.as_array().ok_or_else(refuse)? {
            let Some([Value::String(question), Value::String(answer)]) =
                pair.as_array().map(Vec::as_slice)
            else {
                return Err(refuse());
            };
            messages.push(json!({"role": "user", "content": question}));
            messages.push(json!({"role": "assistant", "content": answer}));
        }
    }
    let question = match input {
        Some(input) => format!("{instruction}\n{input}"),
        None => instruction.to_owned(),
    };
    messages.push(json!({"role": "user", "content": question}));
    messages.push(json!({"role": "assistant", "content": output}));
    let before = messages.iter().take(messages.len() - 1);
    let mut prompt = String::new();
    for text in before.filter_map(|message| message["content"].as_str()) {
        prompt.push_str(text);
        prompt.push('\n');
    }
    let mut chat = finish(messages, Vec::new(), None, None)?;
    chat.plain = Some((prompt, output.to_owned()));
    Ok(chat)
}

/// TRL's conversational form: prompt and completion are lists of messages; only the completion is
/// learned.
pub(super) fn prompt_completion(prompt: &Value, completion: &Value) -> Result<Chat> {
    let as_list = |value: &Value, role: &str, name: &str| match value {
        Value::String(text) => Ok(vec![json!({"role": role, "content": text})]),
        list => message_list(list, name, |_, message| Ok(openai_message(message)?.0)),
    };
    let mut messages = as_list(prompt, "user", "prompt")?;
    let excluded = (0..messages.len()).collect();
    messages.extend(as_list(completion, "assistant", "completion")?);
    finish(messages, excluded, None, None)
}

fn finish(
    messages: Vec<Value>,
    excluded: Vec<usize>,
    tools: Option<&Value>,
    documents: Option<Value>,
) -> Result<Chat> {
    let tools = tools.map(|tools| decoded(tools, "tools")).transpose()?;
    // Templates test whether there are tools; an empty list means none.
    let tools = tools.filter(|t| t.as_array().is_none_or(|list| !list.is_empty()));
    Ok(Chat { conversation: Conversation { messages, tools, documents }, excluded, plain: None })
}

fn message_list(
    list: &Value,
    name: &str,
    mut each: impl FnMut(usize, &Fields) -> Result<Value>,
) -> Result<Vec<Value>> {
    let hint = "write a list of messages, each an object";
    let Some(items) = list.as_array() else {
        return Err(Error::example(
            format!("the field `{name}` is {}, expected a list of messages", kind(list)),
            hint,
        ));
    };
    if items.is_empty() {
        return Err(Error::example(format!("the list `{name}` is empty"), "remove the row"));
    }
    items
        .iter()
        .enumerate()
        .map(|(at, item)| {
            let message = item.as_object().ok_or_else(|| {
                Error::example(
                    format!("message {} of `{name}` is {}, expected an object", at + 1, kind(item)),
                    hint,
                )
            })?;
            each(at, message).map_err(|e| match e {
                Error::Example { problem, hint } => Error::Example {
                    problem: format!("message {} of `{name}`: {problem}", at + 1),
                    hint,
                },
                other => other,
            })
        })
        .collect()
}

/// Brings a message to the form templates expect: text content, tool arguments as objects.
fn openai_message(message: &Fields) -> Result<(Value, bool)> {
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        return Err(Error::example("it has no `role`", "add \"role\": \"user\" or \"assistant\""));
    };
    let mut out = message.clone();
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            out.insert("content".to_owned(), Value::String(joined_parts(parts)?));
        }
        Some(Value::Null) | None if message.contains_key("tool_calls") => {
            // Templates add content to strings; what is not said is an empty text.
            out.insert("content".to_owned(), json!(""));
        }
        Some(Value::Null) | None => {
            return Err(Error::example(
                format!("the {role}'s message has no `content`"),
                "add the text, or remove the message",
            ));
        }
        Some(other) => {
            return Err(Error::example(
                format!("`content` is {}, expected a string", kind(other)),
                "write the text as a string",
            ));
        }
    }
    if let Some(Value::Array(calls)) = out.get_mut("tool_calls") {
        for call in calls {
            decode_arguments(call);
        }
    }
    if out.get("tool_calls").is_some_and(|calls| calls.is_null() || *calls == json!([])) {
        out.remove("tool_calls");
    }
    let learned = learned(message)?;
    Ok((Value::Object(out), learned))
}

/// OpenAI sends a call's arguments as JSON in a string; templates write them as JSON themselves,
/// which would encode them twice.
fn decode_arguments(call: &mut Value) {
    for path in ["/function/arguments", "/arguments"] {
        if let Some(arguments) = call.pointer_mut(path)
            && let Some(text) = arguments.as_str()
            && let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text)
        {
            *arguments = parsed;
        }
    }
}

fn joined_parts(parts: &[Value]) -> Result<String> {
    let mut text = String::new();
    for part in parts {
        let part_kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        match part.get("text").and_then(Value::as_str) {
            Some(piece) if part_kind == "text" => text.push_str(piece),
            _ => {
                return Err(Error::example(
                    format!("a part of `content` is of type {part_kind:?}, expected text"),
                    "remove parts that are not text: this data set is for text models",
                ));
            }
        }
    }
    Ok(text)
}

/// mistral-finetune's `weight` and axolotl's `train` say whether a message is learned.
fn learned(message: &Fields) -> Result<bool> {
    let weight = match message.get("weight") {
        None | Some(Value::Null) => true,
        Some(Value::Number(n)) if n.as_f64() == Some(0.0) => false,
        Some(Value::Number(n)) if n.as_f64() == Some(1.0) => true,
        Some(other) => {
            return Err(Error::example(
                format!("`weight` is {other}, expected 0 or 1"),
                "set 0 for a message not to learn",
            ));
        }
    };
    let train = match message.get("train").or_else(|| message.get("training")) {
        Some(Value::Bool(train)) => *train,
        _ => true,
    };
    Ok(weight && train)
}

fn sharegpt_message(message: &Fields) -> Result<(Value, bool)> {
    let from = message.get("from").and_then(Value::as_str);
    let value = message.get("value");
    let (Some(from), Some(value)) = (from, value) else {
        return Err(Error::example(
            "it lacks `from` or `value`",
            "write {\"from\": \"human\", \"value\": \"…\"}",
        ));
    };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bot" | "model" | "function_call" => "assistant",
        "system" => "system",
        "observation" | "tool" | "function_response" => "tool",
        other => {
            return Err(Error::example(
                format!(
                    "`from` is {other:?}, expected human, gpt, system, function_call, observation \
                     or tool"
                ),
                "rename the speaker",
            ));
        }
    };
    let text = plain(value, "value")?;
    let out = match (from, serde_json::from_str::<Value>(&text)) {
        ("function_call", Ok(mut call @ Value::Object(_))) => {
            decode_arguments(&mut call);
            json!({"role": role, "content": "",
                   "tool_calls": [{"type": "function", "function": call}]})
        }
        _ => json!({"role": role, "content": text}),
    };
    Ok((out, learned(message)?))
}

/// Tools and documents are lists, but many files hold them as JSON in a string.
fn decoded(value: &Value, name: &str) -> Result<Value> {
    let Value::String(text) = value else { return Ok(value.clone()) };
    if text.trim().is_empty() {
        return Ok(json!([]));
    }
    serde_json::from_str(text).map_err(|e| {
        Error::example(
            format!("the field `{name}` is a string that is not JSON: {e}"),
            "write a list, or its JSON",
        )
    })
}
