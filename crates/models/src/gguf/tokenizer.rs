//! The tokenizer inside a GGUF file, as plain values.

use retune_core::Result;
use retune_files::gguf::{Array, Metadata, Value};

/// What the keys `tokenizer.*` say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub model: String,
    /// Name of the splitting rule of a BPE, e.g. `smollm`.
    pub pre: Option<String>,
    /// The tokens by id.
    pub tokens: Vec<String>,
    /// Score per token, of SentencePiece.
    pub scores: Vec<f32>,
    /// Per token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// The merges of a BPE, two tokens with a space between.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what no token covers.
    pub unknown: Option<u32>,
    /// Fills up rows.
    pub padding: Option<u32>,
    /// Whether texts begin with `bos`.
    pub add_bos: Option<bool>,
    /// Whether texts end with `eos`.
    pub add_eos: Option<bool>,
    /// Whether a space is put before a text.
    pub add_space_prefix: Option<bool>,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
}

const KEY: &str = "tokenizer.ggml.";

impl GgufTokenizer {
    /// Reads the keys.
    ///
    /// # Errors
    /// If the model or its tokens are missing, or a key has a wrong type.
    pub fn read(metadata: &Metadata) -> Result<Self> {
        let key = |name: &str| format!("{KEY}{name}");
        let text = |key: &str| -> Result<Option<String>> {
            Ok(metadata.optional(key, Metadata::str)?.map(str::to_owned))
        };
        let id = |name: &str| -> Result<Option<u32>> {
            let id = metadata.optional(&key(name), Metadata::i64)?;
            // Converters write -1 for a token the model does not have.
            Ok(id.and_then(|id| u32::try_from(id).ok()))
        };
        let switch = |name: &str| -> Result<Option<bool>> {
            Ok(metadata.optional(&key(name), Metadata::bool)?)
        };
        let strings = |name: &str| -> Result<Vec<String>> {
            let found = metadata.optional(&key(name), Metadata::strings)?;
            Ok(found.map(<[String]>::to_vec).unwrap_or_default())
        };
        let types = metadata.optional(&key("token_type"), Metadata::i64s)?.unwrap_or_default();
        Ok(Self {
            model: metadata.str(&key("model"))?.to_owned(),
            pre: text(&key("pre"))?,
            tokens: metadata.strings(&key("tokens"))?.to_vec(),
            scores: metadata
                .optional(&key("scores"), Metadata::f32s)?
                .map(<[f32]>::to_vec)
                .unwrap_or_default(),
            token_types: types.into_iter().map(|kind| kind as i32).collect(),
            merges: strings("merges")?,
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            unknown: id("unknown_token_id")?,
            padding: id("padding_token_id")?,
            add_bos: switch("add_bos_token")?,
            add_eos: switch("add_eos_token")?,
            add_space_prefix: switch("add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
        })
    }

    /// Writes the keys, in the order converters use.
    pub fn write(&self, metadata: &mut Metadata) {
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                metadata.insert(format!("{KEY}{name}"), value);
            }
        };
        let some = |value: Array| (!value.is_empty()).then_some(Value::Array(value));
        put("model", Some(Value::from(self.model.as_str())));
        put("pre", self.pre.as_deref().map(Value::from));
        put("tokens", Some(Value::from(self.tokens.clone())));
        put("scores", some(Array::F32(self.scores.clone())));
        put("token_type", some(Array::I32(self.token_types.clone())));
        put("merges", some(Array::String(self.merges.clone())));
        put("bos_token_id", self.bos.map(Value::from));
        put("eos_token_id", self.eos.map(Value::from));
        put("unknown_token_id", self.unknown.map(Value::from));
        put("padding_token_id", self.padding.map(Value::from));
        put("add_bos_token", self.add_bos.map(Value::from));
        put("add_eos_token", self.add_eos.map(Value::from));
        put("add_space_prefix", self.add_space_prefix.map(Value::from));
        if let Some(template) = &self.chat_template {
            metadata.insert("tokenizer.chat_template", template.as_str());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let tokenizer = GgufTokenizer {
            model: "gpt2".into(),
            pre: Some("smollm".into()),
            tokens: vec!["a".into(), "b".into(), "ab".into()],
            token_types: vec![1, 1, 3],
            merges: vec!["a b".into()],
            bos: Some(2),
            add_bos: Some(false),
            chat_template: Some("{{ messages }}".into()),
            ..GgufTokenizer::default()
        };
        let mut metadata = Metadata::default();
        tokenizer.write(&mut metadata);
        assert_eq!(GgufTokenizer::read(&metadata).unwrap(), tokenizer);
        metadata.insert("tokenizer.ggml.bos_token_id", -1_i32);
        assert_eq!(GgufTokenizer::read(&metadata).unwrap().bos, None);
        metadata.insert("tokenizer.ggml.tokens", 3_u32);
        let error = GgufTokenizer::read(&metadata).unwrap_err().to_string();
        assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
    }
}
