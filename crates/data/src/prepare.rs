//! From examples to token rows: rendering, tokenising, masking, cutting.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, Result};
use crate::labels::{Label, Labels};
use crate::mask::{LossOn, Masked, mask};
use crate::shape::{Chat, Example};
use crate::statistics::Statistics;
use crate::template::{ChatTemplate, Conversation, Span};
use crate::tokenizer::Tokenizer;

/// One document ready for training. `ids` and `learn` have the same length.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRow {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether a token is learned, that is, predicted from those before it. Never true for the
    /// first. All false in labelled rows.
    pub learn: Vec<bool>,
    /// The class or score of a labelled row.
    pub label: Option<Label>,
    /// Which of two texts each token belongs to, in rows of text pairs.
    pub token_types: Option<Vec<u8>>,
    /// The row's task, where the data says it.
    pub task: Option<u32>,
    /// The line of the data file the row came from, counted from 1.
    pub source_line: usize,
}

impl TokenRow {
    /// The number of learned tokens.
    pub fn learned(&self) -> usize {
        self.learn.iter().filter(|l| **l).count()
    }
}

/// What happens to rows longer than `max_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TooLong {
    /// The end is cut off.
    #[default]
    Cut,
    /// The row is left out.
    Drop,
    /// The run does not start.
    Error,
}

/// How examples become token rows.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Which tokens the loss counts.
    pub loss_on: LossOn,
    /// The longest row, in tokens.
    pub max_tokens: usize,
    /// What happens to longer rows.
    pub too_long: TooLong,
    /// Puts the end token behind running text that does not end with it.
    pub end_texts: bool,
    /// The token between the two sides of an encoder-decoder's rows: what the encoder reads stands
    /// before it, what the decoder learns behind it.
    pub decoder_start: Option<u32>,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            loss_on: LossOn::Assistant,
            max_tokens: 1024,
            too_long: TooLong::Cut,
            end_texts: true,
            decoder_start: None,
        }
    }
}

/// Turns examples into token rows for one model.
#[derive(Debug)]
pub struct Preparer {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    options: PrepareOptions,
}

/// One token of a row, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownToken {
    /// The token's id.
    pub id: u32,
    /// The text it stands for.
    pub text: String,
    /// Whether it is learned.
    pub learn: bool,
}

impl Preparer {
    /// Puts a tokenizer, a chat template and settings together. Prompts and completions, and
    /// Alpaca's instructions, go through the template if there is one; without, they stay plain.
    ///
    /// # Errors
    /// [`Error::Setting`] if `max_tokens` is below 2.
    pub fn new(
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        options: PrepareOptions,
    ) -> Result<Self> {
        if options.max_tokens < 2 {
            return Err(Error::Setting {
                setting: "max_tokens",
                problem: format!("{} tokens leave nothing to predict", options.max_tokens),
                hint: "allow at least 2, better several hundred".to_owned(),
            });
        }
        Ok(Self { tokenizer, template, options })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template in use.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The settings.
    pub fn options(&self) -> &PrepareOptions {
        &self.options
    }

    /// Renders an example to the text that is tokenised, with the byte ranges that are learned.
    ///
    /// # Errors
    /// [`Error::Template`] or [`Error::Example`] when the template refuses the conversation or the
    /// answer cannot be found in it.
    pub fn render(&self, example: &Example) -> Result<(String, Vec<Range<usize>>)> {
        if let (Some(start), Example::Completion { prompt, completion }) =
            (self.options.decoder_start, example)
        {
            let text = format!("{prompt}{}{completion}", self.tokenizer.token_text(start));
            let learned = text.len() - completion.len()..text.len();
            return Ok((text, std::iter::once(learned).collect()));
        }
        let rendered = self.rendered(example)?;
        Ok((rendered.text, rendered.ranges))
    }

    /// Turns an example into a token row and counts it; `None` if it is left out (too long, or
    /// nothing to learn). Labelled examples need the data set's labels.
    ///
    /// # Errors
    /// As [`Self::render`]; [`Error::Example`] for a row that is too long where that is an error.
    pub fn row(
        &self,
        example: &Example,
        labels: Option<&Labels>,
        line: usize,
        statistics: &mut Statistics,
    ) -> Result<Option<TokenRow>> {
        if let Example::Labelled { text, second, label } = example {
            let label = match labels {
                Some(labels) => labels.resolve(label)?,
                None => {
                    return Err(Error::example(
                        "the row is a labelled text, but the task has no labels",
                        "train a classifier on this data set, or name prompt and completion columns",
                    ));
                }
            };
            return self.labelled(text, second.as_deref(), label, line, statistics);
        }
        if let Some(start) = self.options.decoder_start {
            return self.two_sided(example, start, line, statistics);
        }
        let rendered = self.rendered(example)?;
        let encoded = self.tokenizer.encode(&rendered.text, rendered.add_special)?;
        let mut ranges = rendered.ranges;
        if rendered.ends_itself {
            // Nothing to end: the mask is the whole text.
            ranges.clear();
        }
        let mut masked = mask(encoded, &ranges, &self.tokenizer);
        if rendered.ends_itself {
            masked.learn.iter_mut().skip(1).for_each(|learn| *learn = true);
        }
        Ok(self.fit(masked, line, statistics)?.map(|(ids, learn)| TokenRow {
            ids,
            learn,
            label: None,
            token_types: None,
            task: None,
            source_line: line,
        }))
    }

    /// Encodes a text with one end token behind it.
    fn ended(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text, true)?.ids;
        if let Some(end) = self.tokenizer.special().eos
            && ids.last() != Some(&end)
        {
            ids.push(end);
        }
        Ok(ids)
    }

    /// Encodes what the encoder reads, with the token that begins the decoder's side.
    pub(crate) fn source(&self, prompt: &str, start: u32) -> Result<Vec<u32>> {
        let mut ids = self.ended(prompt)?;
        ids.push(start);
        Ok(ids)
    }

    /// Makes the row of an encoder-decoder; where it is too long, the source gives way down to half.
    fn two_sided(
        &self,
        example: &Example,
        start: u32,
        line: usize,
        statistics: &mut Statistics,
    ) -> Result<Option<TokenRow>> {
        let (Example::Completion { prompt, completion }
        | Example::Chat(Chat { plain: Some((prompt, completion)), .. })) = example
        else {
            return Err(Error::example(
                "an encoder-decoder learns to turn one text into another",
                "give rows of prompt and completion, or of instruction and output",
            ));
        };
        let (mut source, mut target) = (self.ended(prompt)?, self.ended(completion)?);
        let room = self.options.max_tokens - 1;
        let whole = source.len() + target.len();
        if whole > room && self.options.too_long == TooLong::Cut {
            let kept = target.len().min((room / 2).max(room.saturating_sub(source.len())));
            let lost = target.len() - kept;
            target.truncate(kept);
            let end = source.pop();
            source.truncate((room - kept).saturating_sub(1));
            source.extend(end);
            statistics.longest_uncut = statistics.longest_uncut.max(whole + 1);
            statistics.rows_cut += 1;
            statistics.rows_cut_learned += usize::from(lost > 0);
            statistics.tokens_cut += (whole - source.len() - target.len()) as u64;
            statistics.learned_tokens_cut += lost as u64;
        }
        let mut learn = vec![false; source.len() + 1];
        learn.resize(source.len() + 1 + target.len(), true);
        source.push(start);
        source.extend(target);
        let masked = Masked { ids: source, learn, ..Masked::default() };
        Ok(self.fit(masked, line, statistics)?.map(|(ids, learn)| TokenRow {
            ids,
            learn,
            label: None,
            token_types: None,
            task: None,
            source_line: line,
        }))
    }

    /// Shows a row token by token.
    pub fn show(&self, row: &TokenRow) -> Vec<ShownToken> {
        row.ids
            .iter()
            .zip(&row.learn)
            .map(|(&id, &learn)| ShownToken { id, text: self.tokenizer.token_text(id), learn })
            .collect()
    }

    fn labelled(
        &self,
        text: &str,
        second: Option<&str>,
        label: Label,
        line: usize,
        statistics: &mut Statistics,
    ) -> Result<Option<TokenRow>> {
        let max = self.options.max_tokens;
        let (encoded, cut) = self.tokenizer.encode_fitting(text, second, max)?;
        let whole = encoded.ids.len() + cut;
        statistics.longest_uncut = statistics.longest_uncut.max(whole);
        if cut > 0 {
            match self.options.too_long {
                TooLong::Cut => {
                    statistics.rows_cut += 1;
                    statistics.tokens_cut += cut as u64;
                }
                TooLong::Drop => {
                    statistics.rows_too_long += 1;
                    return Ok(None);
                }
                TooLong::Error => return Err(too_long(whole, max)),
            }
        }
        statistics.count_kept(encoded.ids.len(), 0, line);
        Ok(Some(TokenRow {
            learn: vec![false; encoded.ids.len()],
            token_types: second.map(|_| encoded.types),
            ids: encoded.ids,
            label: Some(label),
            task: None,
            source_line: line,
        }))
    }

    /// Cuts a row to length and counts it.
    fn fit(
        &self,
        mut masked: Masked,
        line: usize,
        statistics: &mut Statistics,
    ) -> Result<Option<(Vec<u32>, Vec<bool>)>> {
        let (max, length) = (self.options.max_tokens, masked.ids.len());
        statistics.longest_uncut = statistics.longest_uncut.max(length);
        if length > max && self.options.too_long == TooLong::Error {
            return Err(too_long(length, max));
        }
        if length > max && self.options.too_long == TooLong::Drop {
            statistics.rows_too_long += 1;
            return Ok(None);
        }
        statistics.double_bos += usize::from(masked.double_bos);
        statistics.appended_end += usize::from(masked.appended_end);
        statistics.turns_without_end += masked.missing_ends;
        statistics.melted_borders += usize::from(masked.straddles);
        if length > max {
            let lost = masked.learn[max..].iter().filter(|l| **l).count();
            statistics.rows_cut += 1;
            statistics.rows_cut_learned += usize::from(lost > 0);
            statistics.tokens_cut += (length - max) as u64;
            statistics.learned_tokens_cut += lost as u64;
            masked.ids.truncate(max);
            masked.learn.truncate(max);
        }
        let learned = masked.learn.iter().filter(|l| **l).count();
        if learned == 0 {
            statistics.rows_without_learned_token += 1;
            return Ok(None);
        }
        statistics.count_kept(masked.ids.len(), learned, line);
        Ok(Some((masked.ids, masked.learn)))
    }

    fn rendered(&self, example: &Example) -> Result<RenderedExample> {
        match (example, &self.template) {
            (Example::Chat(chat), Some(template)) => self.chat(chat, template),
            (Example::Completion { prompt, completion }, Some(template)) => {
                let messages = vec![
                    json!({"role": "user", "content": prompt}),
                    json!({"role": "assistant", "content": completion}),
                ];
                let conversation = Conversation { messages, ..Conversation::default() };
                let chat = Chat { conversation, excluded: Vec::new(), plain: None };
                self.chat(&chat, template)
            }
            (
                Example::Completion { prompt, completion }
                | Example::Chat(Chat { plain: Some((prompt, completion)), .. }),
                None,
            ) => Ok(self.completion(prompt, completion)),
            (Example::Chat(_), None) => Err(Error::example(
                "the row is a conversation, but the model has no chat template",
                "set a template in the recipe (template = \"chatml\", or a Jinja file), or use the \
                 model's instruction-tuned form",
            )),
            (Example::Text(text) | Example::Labelled { text, .. }, _) => Ok(RenderedExample {
                text: text.clone(),
                ranges: std::iter::once(0..text.len()).collect(),
                add_special: true,
                ends_itself: !self.options.end_texts,
            }),
        }
    }

    fn chat(&self, chat: &Chat, template: &ChatTemplate) -> Result<RenderedExample> {
        let bytes = |span: Span| span.bytes;
        let (text, ranges) = match self.options.loss_on {
            LossOn::All => {
                let text = template.render(&chat.conversation, false)?;
                let ranges = std::iter::once(0..text.len()).collect();
                (text, ranges)
            }
            LossOn::Assistant | LossOn::Completion => {
                let rendered = template.render_with_spans(&chat.conversation)?;
                let mut spans = rendered.spans;
                spans.retain(|span| !chat.excluded.contains(&span.message));
                if self.options.loss_on == LossOn::Completion {
                    spans.drain(..spans.len().saturating_sub(1));
                }
                (rendered.text, spans.into_iter().map(bytes).collect())
            }
        };
        Ok(RenderedExample { text, ranges, add_special: false, ends_itself: false })
    }

    fn completion(&self, prompt: &str, completion: &str) -> RenderedExample {
        let text = format!("{prompt}{completion}");
        let start = if self.options.loss_on == LossOn::All { 0 } else { prompt.len() };
        let ranges = std::iter::once(start..text.len()).collect();
        RenderedExample { text, ranges, add_special: true, ends_itself: false }
    }
}

/// An example as text.
struct RenderedExample {
    text: String,
    /// What is learned.
    ranges: Vec<Range<usize>>,
    /// Whether the tokenizer's own special tokens are to be added: a rendered template has them.
    add_special: bool,
    /// Whether the text is left without an end token on purpose.
    ends_itself: bool,
}

fn too_long(length: usize, max: usize) -> Error {
    Error::example(
        format!("the row has {length} tokens, more than max_tokens = {max}"),
        "raise max_tokens, shorten the row, or set too_long = \"cut\" or \"drop\"",
    )
}

#[cfg(test)]
mod tests;
