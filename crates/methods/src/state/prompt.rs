//! Virtual tokens before a text: what prompt methods share.

use retune_core::Result;
use retune_core::change::{InputChange, InputView, Scope};
use retune_core::parameters::ParameterId;
use retune_core::random::Seed;
use retune_core::spec::ModelSpec;
use serde_json::{Map, Value, json};
use tensor::Tensor;

use super::keys::Keys;
use super::{FileTensors, Slot, Start, embedding};

/// The one tensor of a prompt's file.
pub const NAME: &str = "prompt_embeddings";

/// PEFT's number of stacks of blocks that have a prompt of their own.
pub const STACKS: &str = "num_transformer_submodules";

/// What stands before a module saved beside a prompt: PEFT wraps the model once only.
pub const BESIDE: &str = "base_model.";

/// A prompt that is the same for every document.
#[derive(Debug)]
pub struct Prompt {
    /// Its vectors, `[tokens, width]`.
    pub vectors: ParameterId,
    /// How many they are.
    pub tokens: usize,
    /// The model's width.
    pub width: usize,
}

impl InputChange for Prompt {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.vectors]
    }

    fn num_virtual(&self) -> usize {
        self.tokens
    }

    fn virtual_tokens(
        &self,
        documents: usize,
        _view: &InputView<'_>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let prompt = scope.tensor(self.vectors, [self.tokens, self.width]);
        Some(for_each(prompt, documents))
    }
}

/// Repeats a prompt for every document.
pub fn for_each(prompt: Tensor<2>, documents: usize) -> Tensor<2> {
    if documents == 1 { prompt } else { prompt.repeat_dim(0, documents) }
}

/// Plans the vectors of a prompt, begun as these words of the model, or as random ones of it.
///
/// # Errors
/// If the model reads no words, or one of them is not in its vocabulary.
pub fn slot(spec: &ModelSpec, tokens: usize, words: &[usize], setting: &str) -> Result<Slot> {
    let table = embedding(spec)?;
    let [vocabulary, width] = table.matrix();
    if let Some(word) = words.iter().find(|word| **word >= vocabulary) {
        return Err(retune_core::Error::Setting {
            setting: setting.to_owned(),
            what: "no such token".to_owned(),
            expected: format!("ids below {vocabulary}"),
            found: word.to_string(),
            help: "take ids of the model's own tokenizer".to_owned(),
        });
    }
    let rows = if words.is_empty() {
        // A plan knows no seed of the run.
        let mut random = Seed(0).stream("prompt words", &[tokens as u64]);
        (0..tokens).map(|_| random.below(vocabulary)).collect()
    } else {
        words.iter().cycle().take(tokens).copied().collect()
    };
    let start = Start::Rows(table.name.clone(), rows);
    Ok(Slot::new(NAME, [tokens, width], "embedding", start))
}

/// Adds the keys every prompt of PEFT has; of an encoder-decoder it is before the encoder's input.
pub fn write_config(spec: &ModelSpec, tokens: usize, config: &mut Map<String, Value>) {
    for (key, value) in [
        ("num_virtual_tokens", json!(tokens)),
        ("token_dim", json!(spec.width)),
        (STACKS, json!(1)),
        ("num_attention_heads", json!(spec.num_heads)),
        ("num_layers", json!(spec.encoder_layers().unwrap_or(spec.num_layers))),
    ] {
        config.insert(key.to_owned(), value);
    }
}

/// Drops the rows of a prompt that PEFT saves for a decoder and never reads: by default it plans as
/// many again as stand before the encoder's input.
pub fn drop_unread(config: &mut Value, tensors: &mut FileTensors) {
    let number = |config: &Value, key: &str| config.get(key).and_then(Value::as_u64);
    let kind = config.get("peft_type").and_then(Value::as_str);
    let (stacks, tokens) = (number(config, STACKS), number(config, "num_virtual_tokens"));
    let (Some("PROMPT_TUNING" | "P_TUNING"), Some(2), Some(tokens)) = (kind, stacks, tokens) else {
        return;
    };
    let Some((shape, values)) = tensors.get_mut(NAME) else { return };
    if let [rows, width] = shape.as_mut_slice()
        && *rows as u64 == tokens.saturating_mul(2)
    {
        *rows = tokens as usize;
        values.truncate(*rows * *width);
        config[STACKS] = json!(1);
    }
}

/// Reads how many virtual tokens a prompt's file has.
///
/// # Errors
/// If the number is missing.
pub fn read_tokens(keys: &Keys<'_>) -> Result<usize> {
    keys.count("num_virtual_tokens")
}
