//! Tiny random models of every family, made in code.

use std::collections::BTreeMap;

use retune_core::random::Seed;
use retune_core::spec::{Kind, ModelSpec};
use retune_core::weights::{Stored, WeightSource};
use retune_core::{Error, Result};
use serde_json::{Value, json};

/// Returns a configuration per family: 2 blocks, width 16, 4 heads, 32 tokens, 64 positions.
///
/// The last two are classifiers of three labels on a decoder and on an encoder.
pub fn configs() -> Vec<(&'static str, Value)> {
    let decoder = |kind: &str, class: &str, extra: Value| {
        let mut config = json!({
            "architectures": [class], "model_type": kind, "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
        });
        merge(&mut config, extra);
        config
    };
    let labels = json!({"id2label": {"0": "a", "1": "b", "2": "c"}});
    let encoder = |class: &str, extra: Value| {
        let mut config = json!({
            "architectures": [class], "model_type": "bert", "vocab_size": 32, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        });
        merge(&mut config, extra);
        config
    };
    let gemma = json!({"tie_word_embeddings": true, "sliding_window": 4,
        "query_pre_attn_scalar": 6});
    vec![
        ("llama", decoder("llama", "LlamaForCausalLM", json!({}))),
        ("llama tied", decoder("llama", "LlamaForCausalLM", json!({"tie_word_embeddings": true}))),
        ("mistral", decoder("mistral", "MistralForCausalLM", json!({"sliding_window": 4}))),
        ("qwen2", decoder("qwen2", "Qwen2ForCausalLM", json!({"tie_word_embeddings": true}))),
        ("qwen3", decoder("qwen3", "Qwen3ForCausalLM", json!({}))),
        ("gemma2", decoder("gemma2", "Gemma2ForCausalLM", gemma.clone())),
        ("gemma3", decoder("gemma3_text", "Gemma3ForCausalLM", gemma)),
        (
            "gpt2",
            json!({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 32,
                "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24,
                "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
        ),
        ("bert", encoder("BertModel", json!({}))),
        ("llama classes", decoder("llama", "LlamaForSequenceClassification", labels.clone())),
        ("bert classes", encoder("BertForSequenceClassification", labels)),
    ]
}

/// Returns configurations of models that read images: 2 blocks of width 16 and 4 heads, images of
/// 2 × 8 × 8 numbers in 4 patches; the two towers of the last differ in width and in depth.
pub fn image_configs() -> Vec<(&'static str, Value)> {
    let vision = json!({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 2});
    let mut vit = json!({"architectures": ["ViTForImageClassification"], "model_type": "vit",
        "id2label": {"0": "a", "1": "b", "2": "c"}});
    merge(&mut vit, vision.clone());
    let text = json!({"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16,
        "eos_token_id": 31});
    let clip = json!({"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 16,
        "vision_config": vision, "text_config": text});
    vec![("vit classes", vit), ("clip", clip)]
}

/// Returns configurations of models with an encoder beside a decoder: 2 blocks each of width 16 and
/// 4 heads, 32 tokens, 64 positions.
pub fn sided_configs() -> Vec<(&'static str, Value)> {
    let t5 = json!({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
        "vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2,
        "num_decoder_layers": 2, "is_encoder_decoder": true, "decoder_start_token_id": 0,
        "n_positions": 32, "dropout_rate": 0.0, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12});
    vec![("t5", t5)]
}

fn merge(config: &mut Value, extra: Value) {
    if let (Value::Object(config), Value::Object(extra)) = (config, extra) {
        config.extend(extra);
    }
}

/// Weights held in memory.
#[derive(Debug, Clone, Default)]
pub struct MemorySource {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl MemorySource {
    /// Draws weights for a model, of a size that makes every part matter: no norm is exactly 1,
    /// no bias exactly 0.
    pub fn random(spec: &ModelSpec, seed: Seed) -> Self {
        // Gemma stores the gain less 1.
        let gain = if spec.architecture.starts_with("gemma") { 0.0 } else { 1.0 };
        let mut source = Self::default();
        for weight in &spec.weights {
            let [_, inputs] = weight.matrix();
            let (mean, deviation) = match weight.kind {
                Kind::Norm => (gain, 0.1),
                Kind::Bias => (0.0, 0.1),
                Kind::Embedding | Kind::Constant => (0.0, 0.3),
                Kind::Linear { .. } | Kind::Convolution => (0.0, (inputs as f64).powf(-0.5)),
            };
            let mut values = vec![0.0; weight.count()];
            seed.stream(&weight.name, &[]).fill_normal(&mut values, deviation);
            for value in &mut values {
                *value += mean;
            }
            let mut shape = weight.shape.clone();
            if weight.kind == (Kind::Linear { transposed: true }) {
                shape.reverse();
            }
            source.insert(&weight.name, &shape, values);
        }
        source
    }

    /// Adds or replaces a tensor, in its stored shape.
    pub fn insert(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    /// Takes a tensor away.
    pub fn remove(&mut self, name: &str) {
        self.tensors.remove(name);
    }
}

impl WeightSource for MemorySource {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|(shape, _)| shape.clone())
    }

    fn read(&self, name: &str) -> Result<Stored> {
        match self.tensors.get(name) {
            Some((_, values)) => Ok(Stored::Values(values.clone())),
            None => Err(Error::MissingWeight {
                name: name.to_owned(),
                needed_by: "a tiny model".to_owned(),
                nearest: "none".to_owned(),
            }),
        }
    }
}
