//! The decoder with rotary positions and a gated feed-forward network, of which the llama, Qwen
//! and Gemma families are settings.

use std::sync::Arc;

use crate::config::{Config, MAX_LAYERS, MAX_SIDE};
use crate::heads::{Classes, decoder_head, decoder_output};
use crate::weight_list::WeightList;
use retune_core::Result;
use retune_core::kernels::{Activation, AttentionOptions, add, gated};
use retune_core::model::{Model, Output};
use retune_core::pass::{Pass, Rope};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{ModelSpec, Role};
use tensor::Tensor;

/// The sizes every family states under the same keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) width: usize,
    pub(crate) inner: usize,
    pub(crate) num_layers: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) head_width: usize,
    pub(crate) vocabulary: usize,
}

impl Sizes {
    /// Reads them; a head's width is `head_width` where the key is absent, or the width's share.
    ///
    /// # Errors
    /// If one is missing or impossible, or they do not fit together.
    pub(crate) fn read(config: &Config, head_width: Option<usize>) -> Result<Self> {
        let width = config.side("hidden_size")?;
        let heads = config.side("num_attention_heads")?;
        let key_heads = config.optional_side("num_key_value_heads")?.unwrap_or(heads);
        let head_width = match config.optional_side("head_dim")?.or(head_width) {
            Some(head_width) => head_width,
            None if width.is_multiple_of(heads) => width / heads,
            None => return Err(config.unknown("num_attention_heads", "a divisor of hidden_size")),
        };
        if !heads.is_multiple_of(key_heads) {
            return Err(config.unknown("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        if !head_width.is_multiple_of(2) {
            return Err(config.unknown("head_dim", "an even number, as rotary positions need"));
        }
        config.at_most("num_attention_heads", heads * head_width, MAX_SIDE)?;
        let num_layers = config.size("num_hidden_layers")?;
        Ok(Self {
            width,
            inner: config.side("intermediate_size")?,
            num_layers: config.at_most("num_hidden_layers", num_layers, MAX_LAYERS)?,
            heads,
            key_heads,
            head_width,
            vocabulary: config.side("vocab_size")?,
        })
    }

    /// Returns what attention does in a block that sees everything before it.
    pub(crate) fn attention(&self) -> AttentionOptions {
        AttentionOptions::causal(self.heads, self.key_heads, self.head_width)
    }
}

/// What one block does apart from its weights.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) rope: Rope,
    pub(crate) attention: AttentionOptions,
}

/// What tells the families apart.
#[expect(clippy::struct_excessive_bools, reason = "each is a feature a family has or lacks")]
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) classes: Classes,
    pub(crate) sizes: Sizes,
    /// Biases of q, k and v.
    pub(crate) input_bias: bool,
    /// Bias of the projection after the heads.
    pub(crate) output_bias: bool,
    pub(crate) feed_forward_bias: bool,
    /// Whether queries and keys are normalised per head.
    pub(crate) head_norms: bool,
    /// Added to the gain of every norm: Gemma stores `gain - 1`.
    pub(crate) norm_offset: f64,
    /// Whether a norm stands behind each sub-layer too.
    pub(crate) norms_behind: bool,
    /// Factor on the embeddings.
    pub(crate) embedding_scale: Option<f64>,
    pub(crate) activation: Activation,
    /// Whether the head is the embedding where the configuration does not say.
    pub(crate) tied: bool,
    pub(crate) max_positions: usize,
    pub(crate) soft_cap: Option<f64>,
    /// One per layer.
    pub(crate) blocks: Vec<Block>,
}

/// A decoder with rotary positions and a gated feed-forward network.
#[derive(Debug)]
pub(crate) struct Decoder {
    spec: Arc<ModelSpec>,
    family: Family,
    prefix: &'static str,
    epsilon: f64,
}

impl Decoder {
    /// Lists the weights of a family's model.
    ///
    /// # Errors
    /// If the configuration asks for a head the family does not have.
    pub(crate) fn new(config: &Config, family: Family) -> Result<Self> {
        let Sizes { width, inner, num_layers, heads, key_heads, head_width, vocabulary } =
            family.sizes;
        let (class, purpose) = family.classes.read(config)?;
        let prefix = family.classes.prefix(&purpose);
        let tied = config.switch("tie_word_embeddings", family.tied)?;

        let mut weights = WeightList::default();
        let embedding = format!("{prefix}embed_tokens");
        weights.embedding(&embedding, vocabulary, width, Role::Embedding);
        let (q, kv) = (heads * head_width, key_heads * head_width);
        for i in 0..num_layers {
            let block = format!("{prefix}layers.{i}");
            let layer = Some(i);
            let attention = format!("{block}.self_attn");
            weights.norm(&format!("{block}.input_layernorm"), width, false, layer);
            let inputs = [
                ("q_proj", q, Role::Query),
                ("k_proj", kv, Role::Key),
                ("v_proj", kv, Role::Value),
            ];
            for (name, rows, role) in inputs {
                let module = format!("{attention}.{name}");
                weights.linear(&module, [rows, width], family.input_bias, role, layer);
            }
            if family.head_norms {
                weights.norm(&format!("{attention}.q_norm"), head_width, false, layer);
                weights.norm(&format!("{attention}.k_norm"), head_width, false, layer);
            }
            let module = format!("{attention}.o_proj");
            weights.linear(&module, [width, q], family.output_bias, Role::AttentionOutput, layer);
            weights.norm(&format!("{block}.post_attention_layernorm"), width, false, layer);
            if family.norms_behind {
                weights.norm(&format!("{block}.pre_feedforward_layernorm"), width, false, layer);
            }
            let parts = [
                ("gate_proj", [inner, width], Role::Gate),
                ("up_proj", [inner, width], Role::Up),
                ("down_proj", [width, inner], Role::Down),
            ];
            for (name, shape, role) in parts {
                let module = format!("{block}.mlp.{name}");
                weights.linear(&module, shape, family.feed_forward_bias, role, layer);
            }
            if family.norms_behind {
                weights.norm(&format!("{block}.post_feedforward_layernorm"), width, false, layer);
            }
        }
        weights.norm(&format!("{prefix}norm"), width, false, None);
        let sides = [vocabulary, width];
        let head = decoder_head(&mut weights, purpose, &embedding, sides, tied, family.soft_cap);
        let spec = ModelSpec {
            architecture: config.text("model_type")?.unwrap_or_default().to_owned(),
            class: class.to_owned(),
            num_layers,
            width,
            inner_width: inner,
            num_heads: heads,
            num_key_heads: key_heads,
            head_width,
            vocabulary,
            max_positions: family.max_positions,
            causal: true,
            towers: Vec::new(),
            weights: weights.0,
            head,
            config: config.value().clone(),
        };
        let epsilon = config.positive("rms_norm_eps")?.unwrap_or(1e-6);
        Ok(Self { spec: Arc::new(spec), family, prefix, epsilon })
    }

    fn norm(&self, pass: &mut Pass<'_>, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        pass.rms_norm(module, x, self.epsilon, self.family.norm_offset)
    }

    fn attention(
        &self,
        pass: &mut Pass<'_>,
        layer: usize,
        module: &str,
        x: Tensor<2>,
    ) -> Result<Tensor<2>> {
        let Block { rope, attention } = &self.family.blocks[layer];
        let mut q = pass.linear(&format!("{module}.q_proj"), x.clone())?;
        let mut k = pass.linear(&format!("{module}.k_proj"), x.clone())?;
        let v = pass.linear(&format!("{module}.v_proj"), x)?;
        if self.family.head_norms {
            q = self.norm_heads(pass, &format!("{module}.q_norm"), q)?;
            k = self.norm_heads(pass, &format!("{module}.k_norm"), k)?;
        }
        let q = pass.rotary(q, attention.heads, rope);
        let k = pass.rotary(k, attention.key_heads, rope);
        let heads = pass.attention(layer, q, k, v, attention);
        let heads = pass.at(Site::Heads(layer, Sublayer::Attention), heads);
        pass.linear(&format!("{module}.o_proj"), heads)
    }

    fn norm_heads(&self, pass: &mut Pass<'_>, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        let [tokens, width] = x.dims();
        let head_width = self.family.sizes.head_width;
        let heads = x.reshape([tokens * width / head_width, head_width]);
        Ok(self.norm(pass, module, heads)?.reshape([tokens, width]))
    }

    fn feed_forward(
        &self,
        pass: &mut Pass<'_>,
        layer: usize,
        module: &str,
        x: Tensor<2>,
    ) -> Result<Tensor<2>> {
        let gate = pass.linear(&format!("{module}.gate_proj"), x.clone())?;
        let up = pass.linear(&format!("{module}.up_proj"), x)?;
        let hidden = gated(gate, up, self.family.activation);
        let hidden = pass.at(Site::Hidden(layer, Sublayer::FeedForward), hidden);
        pass.linear(&format!("{module}.down_proj"), hidden)
    }
}

impl Model for Decoder {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        pass.embed_words(&format!("{}embed_tokens", self.prefix), self.family.embedding_scale)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = format!("{}layers.{index}", self.prefix);
        let behind = self.family.norms_behind;
        let h = self.norm(pass, &format!("{block}.input_layernorm"), x.clone())?;
        // With norms behind the sub-layers, `post_attention_layernorm` is one of them; without,
        // it is the norm before the feed-forward network.
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let h = self.attention(pass, index, &format!("{block}.self_attn"), h)?;
            if !behind {
                return Ok(h);
            }
            self.norm(pass, &format!("{block}.post_attention_layernorm"), h)
        })?;
        let x = add(x, h);
        let before = if behind { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let h = self.norm(pass, &format!("{block}.{before}"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            let h = self.feed_forward(pass, index, &format!("{block}.mlp"), h)?;
            if !behind {
                return Ok(h);
            }
            self.norm(pass, &format!("{block}.post_feedforward_layernorm"), h)
        })?;
        Ok(add(x, h))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = self.norm(pass, &format!("{}norm", self.prefix), x)?;
        let x = pass.at(Site::Final, x);
        decoder_output(pass, &self.spec.head, x)
    }
}

/// Reads which layers see only a window: `layer_types`, or `usual` where the key is absent.
///
/// # Errors
/// If the list has another length than there are layers, or a type is unknown.
pub(crate) fn windowed_layers(
    config: &Config,
    num_layers: usize,
    usual: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    const EXPECTED: &str = "one of sliding_attention, full_attention per layer";
    let Some(types) = config.get("layer_types") else {
        return Ok((0..num_layers).map(usual).collect());
    };
    let types = types.as_array().filter(|types| types.len() == num_layers);
    let types = types.ok_or_else(|| config.unknown("layer_types", EXPECTED))?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(config.unknown("layer_types", EXPECTED)),
        })
        .collect()
}
