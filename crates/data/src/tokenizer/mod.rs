//! Tokenizers: text to ids with the bytes each id stands for, and back.
//!
//! The work is done by the `tokenizers` crate, so ids are those of transformers. Truncation and
//! padding that a `tokenizer.json` carries are switched off: they cut data silently. Special tokens
//! are added here rather than by the file's post-processor, whose trimmed offsets would shift the
//! borders of loss masks.

mod folder;
mod gguf;

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use tokenizers::tokenizer::{Encoding, PostProcessor as _};
use tokenizers::{PaddingParams, PostProcessorWrapper, TruncationParams};

use crate::error::{Error, Result};
pub use gguf::{GgufTokenizer, pre_name};

/// The ids of the tokens with a role of their own; absent where the model has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of a sequence.
    pub bos: Option<u32>,
    /// End of a sequence; what a model writes to stop.
    pub eos: Option<u32>,
    /// Filler behind short sequences.
    pub pad: Option<u32>,
    /// What stands for text that has no token.
    pub unk: Option<u32>,
}

/// A text as tokens. All lists have the same length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The bytes of the text each token stands for; empty ranges for added special tokens.
    pub bytes: Vec<Range<usize>>,
    /// Which of two texts a token belongs to, 0 or 1 (BERT's token types).
    pub types: Vec<u8>,
}

/// A tokenizer with what a checkpoint says about its special tokens and chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    post_processor: Option<PostProcessorWrapper>,
    special: SpecialTokens,
    chat_template: Option<String>,
    /// What the post-processor puts before and behind a single text.
    affixes: (Vec<u32>, Vec<u32>),
    origin: String,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` file, without anything known about roles of special tokens.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Tokenizer`] when the content is not a tokenizer.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(Error::io("read", path))?;
        Self::from_json(&json, &path.display().to_string())
    }

    /// Reads a model folder as Hugging Face lays it out: `tokenizer.json`, and from
    /// `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`, where present,
    /// the special tokens and the chat template.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Tokenizer`], naming the file.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        folder::read(folder)
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for kinds and pre-tokenizers that are not known, and lists that do not
    /// fit together.
    pub fn from_gguf(metadata: GgufTokenizer, origin: &str) -> Result<Self> {
        gguf::build(metadata, origin)
    }

    /// Reads the content of a `tokenizer.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the content is not a tokenizer.
    pub fn from_json(json: &[u8], origin: &str) -> Result<Self> {
        let refuse = |problem: String| {
            Error::tokenizer(
                origin,
                format!("not a tokenizer.json: {problem}"),
                "get the file again, or convert the tokenizer with transformers' save_pretrained",
            )
        };
        // The tokenizers crate panics on some text that is not JSON, and on some that is.
        serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|e| refuse(e.to_string()))?;
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
        let inner = parsed
            .map_err(|_| refuse("its parts do not fit together".to_owned()))?
            .map_err(|e| refuse(e.to_string()))?;
        Self::new(inner, SpecialTokens::default(), None, origin)
    }

    fn new(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<String>,
        origin: &str,
    ) -> Result<Self> {
        let no_post_processor: Option<PostProcessorWrapper> = None;
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(no_post_processor);
        inner.with_padding(None::<PaddingParams>);
        inner.with_truncation(None::<TruncationParams>).map_err(|e| {
            Error::tokenizer(origin, e.to_string(), "get the tokenizer files again")
        })?;
        let affixes = affixes(post_processor.as_ref(), &inner, origin)?;
        let origin = origin.to_owned();
        Ok(Self { inner, post_processor, special, chat_template, affixes, origin })
    }

    /// Encodes a text. With `add_special`, the tokens the checkpoint puts around every text (such
    /// as one beginning-of-sequence token) are added; leave it off for a rendered chat template,
    /// which holds its own.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer has no token for some text and no unknown token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoded> {
        let encoding = self.inner.encode(text, false).map_err(|e| self.failed(&*e))?;
        let (before, behind): (&[u32], &[u32]) =
            if add_special { (&self.affixes.0, &self.affixes.1) } else { (&[], &[]) };
        let mut ids = Vec::with_capacity(before.len() + encoding.len() + behind.len());
        ids.extend_from_slice(before);
        ids.extend_from_slice(encoding.get_ids());
        ids.extend_from_slice(behind);
        let mut bytes = Vec::with_capacity(ids.len());
        bytes.resize(before.len(), 0..0);
        bytes.extend(encoding.get_offsets().iter().map(|&(start, end)| start..end));
        bytes.resize(ids.len(), text.len()..text.len());
        let types = vec![0; ids.len()];
        Ok(Encoded { ids, bytes, types })
    }

    /// Encodes a text that is to be continued: with the tokens the checkpoint puts before every
    /// text, without those behind it, and with one beginning-of-sequence token at most.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_open(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, add_special)?.ids;
        if add_special {
            ids.truncate(ids.len() - self.affixes.1.len());
        }
        while let (Some(bos), [first, second, ..]) = (self.special.bos, ids.as_slice())
            && *first == bos
            && *second == bos
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Encodes one text, or two as one sequence, for an encoder: with the tokens the checkpoint
    /// puts around them (BERT: `[CLS] a [SEP] b [SEP]`, token types 0 and 1), cut so that the whole
    /// has at most `max_tokens`. Of a pair, the longer text is cut first. Byte ranges count within
    /// each text. Returns also the number of tokens cut.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] as for [`Self::encode`]; [`Error::Setting`] if `max_tokens` leaves no
    /// room for any text.
    pub fn encode_fitting(
        &self,
        first: &str,
        second: Option<&str>,
        max_tokens: usize,
    ) -> Result<(Encoded, usize)> {
        let encode = |text| self.inner.encode(text, false).map_err(|e| self.failed(&*e));
        let (mut first, mut second) = (encode(first)?, second.map(encode).transpose()?);
        let pair = second.is_some();
        let around = self.post_processor.as_ref().map_or(0, |p| p.added_tokens(pair));
        let room = max_tokens.saturating_sub(around);
        if room == 0 {
            return Err(Error::Setting {
                setting: "max_tokens",
                problem: format!("{max_tokens} leaves no room beside {around} special tokens"),
                hint: "allow more tokens per row".to_owned(),
            });
        }
        let second_len = second.as_ref().map_or(0, Encoding::len);
        let (keep_first, keep_second) = longest_first(first.len(), second_len, room);
        let cut = first.len() + second_len - keep_first - keep_second;
        let right = tokenizers::TruncationDirection::Right;
        first.truncate(keep_first, 0, right);
        if let Some(second) = &mut second {
            second.truncate(keep_second, 0, right);
        }
        // What was cut must not come back as further sequences.
        first.take_overflowing();
        if let Some(second) = &mut second {
            second.take_overflowing();
        }
        let joined = match &self.post_processor {
            Some(processor) => {
                processor.process(first, second, true).map_err(|e| self.failed(&*e))?
            }
            None => Encoding::merge(std::iter::once(first).chain(second), false),
        };
        let encoded = Encoded {
            ids: joined.get_ids().to_vec(),
            bytes: joined.get_offsets().iter().map(|&(start, end)| start..end).collect(),
            types: joined.get_type_ids().iter().map(|&t| u8::from(t != 0)).collect(),
        };
        Ok((encoded, cut))
    }

    /// Decodes ids to text; ids the tokenizer does not have are left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed(&*e))
    }

    /// The text one token stands for, for showing tokens one by one; bytes that are no character by
    /// themselves appear as `�`, ids without a token as `<unknown id N>`.
    pub fn token_text(&self, id: u32) -> String {
        let Some(token) = self.inner.id_to_token(id) else { return format!("<unknown id {id}>") };
        if self.is_added(id) {
            return token;
        }
        // A decoder may strip the blank that starts a text: decode behind another token.
        let Ok(alone) = self.decode(&[id], false) else { return token };
        let Some(anchor) = self.anchor() else { return alone };
        match (self.decode(&[anchor, id], false), self.decode(&[anchor], false)) {
            (Ok(both), Ok(before)) => both.strip_prefix(&before).map_or(alone, ToOwned::to_owned),
            _ => alone,
        }
    }

    /// An ordinary token that decodes to visible text.
    fn anchor(&self) -> Option<u32> {
        ["a", "▁a", "A", "1"].iter().find_map(|t| self.inner.token_to_id(t))
    }

    /// The id of a token's exact text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary writes it (`Ġthe`, `▁the`, `##s`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the highest id: the rows an embedding needs.
    pub fn vocabulary_size(&self) -> usize {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().keys().max();
        let model = self.inner.get_vocab(false).into_values().max();
        added.copied().max(model).map_or(0, |id| id as usize + 1)
    }

    /// The ids with roles.
    pub fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Sets the ids with roles, where the caller knows better than the files.
    pub fn set_special(&mut self, special: SpecialTokens) {
        self.special = special;
    }

    /// The checkpoint's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Whether a token is special: a control token, never part of ordinary text.
    pub fn is_special(&self, id: u32) -> bool {
        let vocabulary = self.inner.get_added_vocabulary();
        vocabulary.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
            || [self.special.bos, self.special.eos, self.special.pad].contains(&Some(id))
    }

    fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// Whether the checkpoint puts a beginning-of-sequence token before plain text.
    pub fn adds_bos(&self) -> bool {
        self.special.bos.is_some() && self.affixes.0.first() == self.special.bos.as_ref()
    }

    /// Whether the checkpoint puts the end token behind plain text.
    pub fn adds_eos(&self) -> bool {
        self.special.eos.is_some() && self.affixes.1.last() == self.special.eos.as_ref()
    }

    /// Checks that every id has a row in a model's embedding of `rows` rows.
    ///
    /// A model may have more rows than the tokenizer has tokens: many are padded.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming the first token without a row.
    pub fn check_fits(&self, rows: usize) -> Result<()> {
        let size = self.vocabulary_size();
        if size <= rows {
            return Ok(());
        }
        let first = (rows as u32..size as u32).find_map(|id| Some((id, self.id_to_token(id)?)));
        let (id, token) = first.unwrap_or((size as u32 - 1, String::new()));
        Err(Error::tokenizer(
            &self.origin,
            format!(
                "it does not fit the model: its highest id is {}, the model's embedding has {rows} \
                 rows; token {id} ({token:?}) has none",
                size - 1
            ),
            "use the tokenizer that came with this model",
        ))
    }

    /// Serialises to the content of a `tokenizer.json` file.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when a part cannot be written.
    pub fn to_json(&self) -> Result<String> {
        let mut whole = self.inner.clone();
        whole.with_post_processor(self.post_processor.clone());
        whole.to_string(false).map_err(|e| self.failed(&*e))
    }

    /// The files of a Hugging Face folder that hold this tokenizer, as name and content.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when a part cannot be written.
    pub fn to_folder_files(&self) -> Result<Vec<(&'static str, String)>> {
        folder::write(self)
    }

    /// Where it came from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    fn failed(&self, error: &(dyn std::error::Error + Send + Sync)) -> Error {
        Error::tokenizer(
            &self.origin,
            error.to_string(),
            "the tokenizer files are damaged or of a kind not supported; get them again",
        )
    }
}

/// How much to keep of two texts in `room` tokens when always the longer one is cut.
fn longest_first(first: usize, second: usize, room: usize) -> (usize, usize) {
    if first + second <= room {
        return (first, second);
    }
    let shorter = first.min(second).min(room / 2);
    if first <= second { (shorter, room - shorter) } else { (room - shorter, shorter) }
}

/// What a post-processor puts around a single text, found by processing an empty one.
fn affixes(
    processor: Option<&PostProcessorWrapper>,
    inner: &tokenizers::Tokenizer,
    origin: &str,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let Some(processor) = processor else { return Ok(Default::default()) };
    let refuse = |problem: String| {
        Error::tokenizer(origin, problem, "get the tokenizer files again, or remove post_processor")
    };
    // A token in the middle shows what comes before it and what behind.
    let middle = tokenizers::Token::new(u32::MAX, String::new(), (0, 0));
    let around = processor
        .process(Encoding::from_tokens(vec![middle], 0), None, true)
        .map_err(|e| refuse(format!("its post-processor fails: {e}")))?;
    let ids = around.get_ids();
    let Some(at) = ids.iter().position(|&id| id == u32::MAX) else {
        return Err(refuse("its post-processor drops the text".to_owned()));
    };
    let (before, behind) = (ids[..at].to_vec(), ids[at + 1..].to_vec());
    match before.iter().chain(&behind).find(|&&id| inner.id_to_token(id).is_none()) {
        Some(id) => Err(refuse(format!("its post-processor adds id {id}, which has no token"))),
        None => Ok((before, behind)),
    }
}

/// Parses a small part of a tokenizer from its JSON form.
fn part<T: serde::de::DeserializeOwned>(json: Value, origin: &str) -> Result<T> {
    serde_json::from_value(json).map_err(|e| {
        Error::tokenizer(origin, e.to_string(), "this is a bug in retune: please report it")
    })
}

#[cfg(test)]
mod tests;
