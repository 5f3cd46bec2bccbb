//! Finding what the assistant says in a rendered conversation.

use std::cell::LazyCell;

use super::{ChatTemplate, MARKED, Messages, PLAIN, Rendered, Span, tags};
use crate::error::{Error, Result};

impl ChatTemplate {
    /// Spans from the template's own `{% generation %}` blocks.
    pub(super) fn spans_from_marks(&self, messages: &Messages) -> Result<Rendered> {
        let text = self.run(PLAIN, messages, false)?;
        if text.contains([tags::OPEN, tags::CLOSE]) {
            return Err(reserved_character());
        }
        let marked = self.run(MARKED, messages, false)?;
        let mut clean = String::with_capacity(text.len());
        let mut ranges = Vec::new();
        let mut open = None;
        for c in marked.chars() {
            match c {
                tags::OPEN if open.is_none() => open = Some(clean.len()),
                tags::CLOSE => ranges.extend(open.take().map(|start| start..clean.len())),
                tags::OPEN => {}
                c => clean.push(c),
            }
        }
        // A template may trim or compare what it printed; marks must not have changed that.
        if clean != text {
            return Err(Error::example(
                "the template's {% generation %} marks change the text it prints, so the \
                 assistant's part cannot be told",
                "repair the template's generation blocks or remove them",
            ));
        }
        if ranges.len() != messages.assistant.len() {
            return Err(Error::example(
                format!(
                    "the template marks {} generation blocks for {} assistant messages",
                    ranges.len(),
                    messages.assistant.len()
                ),
                "put exactly one {% generation %} block around each assistant message",
            ));
        }
        let spans = messages
            .assistant
            .iter()
            .zip(ranges)
            .map(|(&message, bytes)| Span { message, bytes })
            .collect();
        Ok(Rendered { text, spans })
    }

    /// Spans by comparing renderings of the conversation cut off around each turn.
    pub(super) fn spans_from_prefixes(&self, messages: &Messages) -> Result<Rendered> {
        let text = self.run(PLAIN, messages, false)?;
        if text.contains([tags::OPEN, tags::CLOSE]) {
            return Err(reserved_character());
        }
        let mut spans: Vec<Span> = Vec::with_capacity(messages.assistant.len());
        for &message in &messages.assistant {
            let floor = spans.last().map_or(0, |span| span.bytes.end);
            let bytes = self.turn(messages, message, &text);
            match bytes {
                Some((start, end)) if floor <= start && start <= end => {
                    spans.push(Span { message, bytes: start..end });
                }
                _ => {
                    return Err(Error::example(
                        format!(
                            "message {} (assistant) cannot be found in the rendered template: the \
                             template rewrites earlier turns and has no {{% generation %}} marks",
                            message + 1
                        ),
                        "add {% generation %} marks to the template, or learn from all tokens \
                         (loss_on = \"all\")",
                    ));
                }
            }
        }
        Ok(Rendered { text, spans })
    }

    /// Bytes of `text`, the whole conversation, that the assistant's `message` wrote.
    ///
    /// Templates rewrite (they drop earlier reasoning, trim, append an end token to the last turn
    /// only), so a cut conversation is trusted only if the whole one starts with its text.
    fn turn(&self, messages: &Messages, message: usize, text: &str) -> Option<(usize, usize)> {
        let cut = |n: usize, prompt: bool| self.run(PLAIN, &messages.up_to(n), prompt).ok();
        let before = cut(message, false);
        let prompt = cut(message, true);
        let through = cut(message + 1, false);
        let around = LazyCell::new(|| self.around_content(messages, message, text));
        // Exact: what the model is given when it is to speak here.
        let start = prompt
            .as_ref()
            .filter(|prompt| Some(*prompt) != before.as_ref() && text.starts_with(prompt.as_str()))
            .map(String::len)
            .or_else(|| around.map(|(start, _)| start))
            .or_else(|| {
                let before = before.filter(|before| text.starts_with(before.as_str()))?;
                Some(before.len().max(common_prefix(&prompt?, text)))
            })?;
        let end = through
            .filter(|through| text.starts_with(through.as_str()) && through.len() >= start)
            .map(|through| through.len())
            .or_else(|| around.map(|(_, end)| end))
            .or((message + 1 == messages.values.len()).then_some(text.len()))?;
        Some((start, end))
    }

    /// Where a message's content stands, found by rendering a mark in its place.
    fn around_content(
        &self,
        messages: &Messages,
        message: usize,
        text: &str,
    ) -> Option<(usize, usize)> {
        let mark = tags::OPEN.to_string();
        let marked = self.run(PLAIN, &messages.with_content(message, &mark), false).ok()?;
        let mut parts = marked.split(tags::OPEN);
        let (before, after) = (parts.next()?, parts.next()?);
        let unique = parts.next().is_none();
        (unique
            && before.len() + after.len() <= text.len()
            && text.starts_with(before)
            && text.ends_with(after))
        .then(|| (before.len(), text.len() - after.len()))
    }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices()
        .zip(b.chars())
        .find(|((_, x), y)| x != y)
        .map_or_else(|| a.len().min(b.len()), |((at, _), _)| at)
}

fn reserved_character() -> Error {
    Error::example(
        "the row holds the Unicode noncharacter U+FDD0 or U+FDD1, which retune uses to mark spans",
        "remove it: it is not valid in exchanged text",
    )
}
