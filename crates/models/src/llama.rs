//! The llama family: Llama 2 and 3, SmolLM2, Mistral with its sliding window.
//!
//! Pre-norm blocks, rotary positions, grouped heads, SwiGLU.

use std::sync::Arc;

use crate::config::Config;
use crate::decoder::{WeightList, gated_feed_forward, rotary_attention};
use crate::rope;
use retune_core::kernels::{Activation, AttentionOptions};
use retune_core::model::{Model, Output};
use retune_core::pass::{Pass, Rope};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{Head, ModelSpec, Role};
use retune_core::Result;
use tensor::Tensor;

/// A model of the llama family.
#[derive(Debug)]
pub struct Llama {
    spec: Arc<ModelSpec>,
    epsilon: f64,
    activation: Activation,
    rope: Rope,
    attention: AttentionOptions,
}

impl Llama {
    /// Reads the configuration of a `llama` or `mistral` model.
    ///
    /// # Errors
    /// If a number is missing or impossible, or a feature is unknown.
    pub fn new(config: &Config) -> Result<Self> {
        let width = config.size("hidden_size")?;
        let inner = config.size("intermediate_size")?;
        let num_layers = config.size("num_hidden_layers")?;
        let heads = config.size("num_attention_heads")?;
        let key_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
        let head_width = match config.optional_size("head_dim")? {
            Some(head_width) => head_width,
            None if width.is_multiple_of(heads) => width / heads,
            None => return Err(config.unknown("num_attention_heads", "a divisor of hidden_size")),
        };
        if !heads.is_multiple_of(key_heads) {
            return Err(config.unknown("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let vocabulary = config.size("vocab_size")?;
        let attention_bias = config.switch("attention_bias", false)?;
        let mlp_bias = config.switch("mlp_bias", false)?;
        let tied = config.switch("tie_word_embeddings", false)?;
        let activation = crate::activation(config, "hidden_act")?;

        let mut weights = WeightList::default();
        weights.embedding("model.embed_tokens", vocabulary, width, Role::Embedding);
        for i in 0..num_layers {
            let block = format!("model.layers.{i}");
            let layer = Some(i);
            weights.norm(&format!("{block}.input_layernorm"), width, false, layer);
            let attention = format!("{block}.self_attn");
            let (q, kv) = (heads * head_width, key_heads * head_width);
            let mut add = |name: &str, shape, bias, role| {
                weights.linear(&format!("{attention}.{name}"), shape, bias, role, layer);
            };
            add("q_proj", [q, width], attention_bias, Role::Query);
            add("k_proj", [kv, width], attention_bias, Role::Key);
            add("v_proj", [kv, width], attention_bias, Role::Value);
            add("o_proj", [width, q], attention_bias, Role::AttentionOutput);
            weights.norm(&format!("{block}.post_attention_layernorm"), width, false, layer);
            let mut add = |name: &str, shape, role| {
                weights.linear(&format!("{block}.mlp.{name}"), shape, mlp_bias, role, layer);
            };
            add("gate_proj", [inner, width], Role::Gate);
            add("up_proj", [inner, width], Role::Up);
            add("down_proj", [width, inner], Role::Down);
        }
        weights.norm("model.norm", width, false, None);
        if !tied {
            weights.linear("lm_head", [vocabulary, width], false, Role::Head, None);
        }
        let head = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let mistral = config.text("model_type")? == Some("mistral");
        let spec = ModelSpec {
            architecture: if mistral { "mistral" } else { "llama" }.to_owned(),
            class: if mistral { "MistralForCausalLM" } else { "LlamaForCausalLM" }.to_owned(),
            num_layers,
            width,
            inner_width: inner,
            num_heads: heads,
            num_key_heads: key_heads,
            head_width,
            vocabulary,
            max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(2048),
            causal: true,
            weights: weights.0,
            head: Head::Language { weight: head.to_owned(), bias: None, soft_cap: None },
            config: config.value().clone(),
        };
        Ok(Self {
            spec: Arc::new(spec),
            epsilon: config.number("rms_norm_eps")?.unwrap_or(1e-6),
            activation,
            rope: rope::read(config, head_width)?,
            attention: AttentionOptions {
                heads,
                key_heads,
                head_width,
                scale: (head_width as f64).powf(-0.5),
                causal: true,
                // Only Mistral's library class reads the window; Llama's ignores the key.
                window: if mistral { config.optional_size("sliding_window")? } else { None },
                soft_cap: None,
                prefix: 0,
            },
        })
    }
}

impl Model for Llama {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        pass.embed("model.embed_tokens", &pass.batch().tokens)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = format!("model.layers.{index}");
        let h =
            pass.rms_norm(&format!("{block}.input_layernorm"), x.clone(), self.epsilon, 0.0)?;
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let module = format!("{block}.self_attn");
            rotary_attention(pass, index, &module, h, &self.rope, &self.attention, None)
        })?;
        let x = x + h;
        let norm = format!("{block}.post_attention_layernorm");
        let h = pass.rms_norm(&norm, x.clone(), self.epsilon, 0.0)?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            gated_feed_forward(pass, index, &format!("{block}.mlp"), h, self.activation)
        })?;
        Ok(x + h)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = pass.rms_norm("model.norm", x, self.epsilon, 0.0)?;
        Ok(Output::States(pass.at(Site::Final, x)))
    }
}
