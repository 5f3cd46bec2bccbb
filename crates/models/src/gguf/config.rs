//! Makes the Hugging Face configuration a GGUF file's keys describe.

use super::Arch;
use super::source::{ROPE_FACTORS, is_float};
use crate::config::{Config, MAX_LAYERS};
use retune_core::{Error, Result};
use retune_files::gguf::{GgufFile, Metadata};
use serde_json::{Map, Value, json};

/// Finds how a file's architecture is stored.
///
/// # Errors
/// If the key is missing or the architecture is unknown.
pub(crate) fn arch(file: &GgufFile) -> Result<&'static Arch> {
    let name = file.metadata().str("general.architecture")?;
    Arch::named(name).ok_or_else(|| Error::Content {
        path: file.path().to_path_buf(),
        what: "its architecture cannot be read".to_owned(),
        expected: format!("one of {}", Arch::list()),
        found: name.to_owned(),
        help: "use a model of one of these, or its Hugging Face folder".to_owned(),
    })
}

/// Makes the configuration of a GGUF file, as the model's class would have saved it.
///
/// # Errors
/// If the architecture is unknown, a key is missing or has a wrong type, or the file is an adapter.
pub fn read_config(file: &GgufFile) -> Result<Config> {
    let metadata = file.metadata();
    let wrong = |what: &str, expected: &str, found: String| Error::Content {
        path: file.path().to_path_buf(),
        what: what.to_owned(),
        expected: expected.to_owned(),
        found,
        help: "use a GGUF of a whole text model".to_owned(),
    };
    if metadata.optional("general.type", Metadata::str)?.is_some_and(|kind| kind != "model") {
        let found = metadata.str("general.type")?.to_owned();
        return Err(wrong("this is no model", "`general.type` model", found));
    }
    if let Some(tensor) = file.tensors().find(|tensor| !is_float(tensor.kind)) {
        let found = format!("{tensor:?}");
        return Err(wrong("a tensor holds whole numbers", "floats or quantised blocks", found));
    }
    let arch = arch(file)?;
    let keys = Keys { metadata, arch };
    let width = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let layers = keys.size("block_count")?;
    let head_width = match keys.optional_size("attention.key_length")? {
        Some(width) => width,
        None => width / heads.max(1),
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        let found = keys.optional_size(key)?;
        if let Some(found) = found.filter(|found| *found != head_width) {
            let what = format!("`{}` differs from the head's width", keys.name(key));
            return Err(wrong(&what, &head_width.to_string(), found.to_string()));
        }
    }
    if layers > MAX_LAYERS {
        let what = format!("`{}` is too large", keys.name("block_count"));
        return Err(wrong(&what, &format!("at most {MAX_LAYERS}"), layers.to_string()));
    }
    let embedding = file.tensor("token_embd.weight")?;
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| {
        if !value.is_null() {
            config.insert(key.to_owned(), value);
        }
    };
    put("architectures", json!([arch.class]));
    put("model_type", json!(arch.model_type));
    put("vocab_size", json!(embedding.shape.first().copied().unwrap_or(0)));
    put("hidden_size", json!(width));
    put("intermediate_size", json!(keys.size("feed_forward_length")?));
    put("num_hidden_layers", json!(layers));
    put("num_attention_heads", json!(heads));
    put(
        "num_key_value_heads",
        json!(keys.optional_size("attention.head_count_kv")?.unwrap_or(heads)),
    );
    put("head_dim", json!(head_width));
    put("max_position_embeddings", json!(keys.size("context_length")?));
    put("rms_norm_eps", keys.number("attention.layer_norm_rms_epsilon")?);
    put("tie_word_embeddings", json!(file.get("output.weight").is_none()));
    put("initializer_range", json!(0.02));
    for (key, stored) in
        [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]
    {
        let stored = format!("tokenizer.ggml.{stored}_token_id");
        let id = metadata.optional(&stored, Metadata::i64)?.filter(|id| *id >= 0);
        put(key, json!(id));
    }
    let rope = rope(file, &keys, head_width)?;
    match arch.name {
        "gemma2" => {
            // The largest Gemma 2 alone divides scores by the width's share of a head.
            let scalar = if layers == 46 { width / heads.max(1) } else { head_width };
            put("query_pre_attn_scalar", json!(scalar));
            put("sliding_window", json!(keys.optional_size("attention.sliding_window")?));
            put("attn_logit_softcapping", keys.number("attn_logit_softcapping")?);
            put("final_logit_softcapping", keys.number("final_logit_softcapping")?);
            put("hidden_activation", json!("gelu_pytorch_tanh"));
            put("rope_parameters", rope);
        }
        "gemma3" => {
            let scalar = if layers == 62 { width / heads.max(1) } else { head_width };
            put("query_pre_attn_scalar", json!(scalar));
            put("sliding_window", json!(keys.optional_size("attention.sliding_window")?));
            put("final_logit_softcapping", keys.number("final_logit_softcapping")?);
            put("hidden_activation", json!("gelu_pytorch_tanh"));
            put("attention_bias", json!(false));
            let kind = |i: usize| {
                if (i + 1).is_multiple_of(6) { "full_attention" } else { "sliding_attention" }
            };
            put("layer_types", json!((0..layers).map(kind).collect::<Vec<_>>()));
            let local = match keys.number("rope.freq_base_swa")? {
                Value::Null => json!(10_000.0),
                base => base,
            };
            let local = json!({"rope_type": "default", "rope_theta": local});
            put("rope_parameters", json!({"full_attention": rope, "sliding_attention": local}));
        }
        name => {
            if name != "qwen2" {
                put("attention_bias", json!(file.get("blk.0.attn_q.bias").is_some()));
            }
            if name == "llama" {
                put("mlp_bias", json!(file.get("blk.0.ffn_up.bias").is_some()));
            }
            put("hidden_act", json!("silu"));
            put("rope_parameters", rope);
        }
    }
    Ok(Config::new(file.path(), Value::Object(config)))
}

/// The keys of one architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'a Arch,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name)
    }

    fn size(&self, key: &str) -> Result<usize> {
        Ok(self.metadata.usize(&self.name(key))?)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.metadata.optional(&self.name(key), Metadata::usize)?)
    }

    /// Reads a number as its shortest decimal, so that 1e-5 does not become 9.99999974e-6.
    fn number(&self, key: &str) -> Result<Value> {
        let number = self.metadata.optional(&self.name(key), Metadata::f32)?;
        Ok(number.map_or(Value::Null, |number| json!(shortest(number))))
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        Ok(self.metadata.optional(&self.name(key), Metadata::str)?)
    }
}

fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}

/// Makes `rope_parameters` from base, scaling keys and the table of factors, if there is one.
fn rope(file: &GgufFile, keys: &Keys<'_>, head_width: usize) -> Result<Value> {
    let theta = match keys.number("rope.freq_base")? {
        Value::Null => json!(10_000.0),
        theta => theta,
    };
    let mut rope = json!({"rope_type": "default", "rope_theta": theta.clone()});
    if let Some(table) = file.get(ROPE_FACTORS) {
        let context = keys.size("context_length")?;
        let theta = theta.as_f64().unwrap_or(10_000.0);
        return llama3(file, &table.to_f32(), theta, head_width, context);
    }
    let unsupported = |kind: &str| Error::Unsupported {
        what: format!("rope scaling `{kind}` of {}", file.path().display()),
        help: "use a model with linear, yarn or Llama 3 scaling, or none".to_owned(),
    };
    match keys.text("rope.scaling.type")? {
        None | Some("none") => {
            // How files said it before scalings had types.
            let factor = keys.number("rope.scale_linear")?;
            if !factor.is_null() && factor != json!(1.0) {
                rope["rope_type"] = json!("linear");
                rope["factor"] = factor;
            }
        }
        Some(kind @ ("linear" | "yarn")) => {
            rope["rope_type"] = json!(kind);
            rope["factor"] = keys.number("rope.scaling.factor")?;
            if kind == "yarn" {
                let original = keys.optional_size("rope.scaling.original_context_length")?;
                if let Some(original) = original {
                    rope["original_max_position_embeddings"] = json!(original);
                }
            }
        }
        Some(kind) => return Err(unsupported(kind)),
    }
    Ok(rope)
}

/// Finds the numbers of Llama 3's scaling behind a table of factors.
///
/// llama.cpp stores what each frequency is divided by; its shape gives the numbers back. Models
/// scaled so use 1, 4 and 8192 beside the factor; another table is refused rather than guessed.
fn llama3(
    file: &GgufFile,
    table: &[f32],
    theta: f64,
    head_width: usize,
    context: usize,
) -> Result<Value> {
    let factor = shortest(table.iter().copied().fold(1.0, f32::max));
    let original = context.min(8192);
    let parameters = json!({
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    });
    let config = |parameters: &Value| {
        Config::new(
            file.path(),
            json!({"rope_parameters": parameters, "max_position_embeddings": context}),
        )
    };
    let scaled = crate::rope::read(&config(&parameters), head_width)?;
    let plain = crate::rope::read(&config(&json!({"rope_theta": theta})), head_width)?;
    let frequencies = plain.inverse_frequencies.iter().zip(scaled.inverse_frequencies.iter());
    let fits = table.len() == head_width / 2
        && frequencies.zip(table).all(|((plain, scaled), factor)| {
            (plain / scaled / f64::from(*factor) - 1.0).abs() < 1e-3
        });
    if fits {
        return Ok(parameters);
    }
    Err(Error::Unsupported {
        what: format!("the table of rope factors in {}", file.path().display()),
        help: "use the model's Hugging Face folder, which names the scaling".to_owned(),
    })
}
