//! GPT-2: learned positions, one projection for queries, keys and values, weights stored
//! transposed.

use std::sync::Arc;

use crate::activation;
use crate::config::{Config, MAX_LAYERS};
use crate::heads::{Classes, decoder_head, decoder_output};
use crate::weight_list::WeightList;
use retune_core::kernels::{Activation, AttentionOptions, activate, add};
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{ModelSpec, Role};
use retune_core::{Error, Result};
use tensor::Tensor;

/// The classes of GPT-2.
pub(crate) const GPT2: Classes = Classes {
    language: "GPT2LMHeadModel",
    classifier: "GPT2ForSequenceClassification",
    bare: "GPT2Model",
    prefix: "transformer.",
};

/// A GPT-2.
#[derive(Debug)]
pub(crate) struct Gpt2 {
    spec: Arc<ModelSpec>,
    prefix: &'static str,
    epsilon: f64,
    activation: Activation,
    attention: AttentionOptions,
    /// Whether scores are divided by the block's number, counted from 1.
    scale_by_layer: bool,
    embedding_dropout: f64,
    residual_dropout: f64,
}

/// Builds a GPT-2.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn gpt2(config: &Config) -> Result<Box<dyn Model>> {
    if config.switch("add_cross_attention", false)? {
        return Err(Error::Unsupported {
            what: "a GPT-2 with cross-attention".to_owned(),
            help: "use a GPT-2 that stands alone".to_owned(),
        });
    }
    let width = config.side("n_embd")?;
    let heads = config.side("n_head")?;
    if !width.is_multiple_of(heads) {
        return Err(config.unknown("n_head", "a divisor of n_embd"));
    }
    let num_layers = config.at_most("n_layer", config.size("n_layer")?, MAX_LAYERS)?;
    let inner = config.optional_side("n_inner")?.unwrap_or(4 * width);
    let vocabulary = config.side("vocab_size")?;
    let positions = config.optional_side("n_positions")?.unwrap_or(1024);
    let (class, purpose) = GPT2.read(config)?;
    let prefix = GPT2.prefix(&purpose);

    let mut weights = WeightList::default();
    let embedding = format!("{prefix}wte");
    weights.embedding(&embedding, vocabulary, width, Role::Embedding);
    weights.embedding(&format!("{prefix}wpe"), positions, width, Role::Position);
    for i in 0..num_layers {
        let block = format!("{prefix}h.{i}");
        let layer = Some(i);
        let mut add = |name: &str, shape, role| {
            weights.conv1d(&format!("{block}.{name}"), shape, role, layer);
        };
        add("attn.c_attn", [3 * width, width], Role::QueryKeyValue);
        add("attn.c_proj", [width, width], Role::AttentionOutput);
        add("mlp.c_fc", [inner, width], Role::Up);
        add("mlp.c_proj", [width, inner], Role::Down);
        weights.norm(&format!("{block}.ln_1"), width, true, layer);
        weights.norm(&format!("{block}.ln_2"), width, true, layer);
    }
    weights.norm(&format!("{prefix}ln_f"), width, true, None);
    let tied = config.switch("tie_word_embeddings", true)?;
    let head = decoder_head(&mut weights, purpose, &embedding, [vocabulary, width], tied, None);
    let spec = ModelSpec {
        architecture: "gpt2".to_owned(),
        class: class.to_owned(),
        num_layers,
        width,
        inner_width: inner,
        num_heads: heads,
        num_key_heads: heads,
        head_width: width / heads,
        vocabulary,
        max_positions: positions,
        causal: true,
        towers: Vec::new(),
        weights: weights.0,
        head,
        config: config.value().clone(),
    };
    let mut attention = AttentionOptions::causal(heads, heads, width / heads);
    if !config.switch("scale_attn_weights", true)? {
        attention.scale = 1.0;
    }
    Ok(Box::new(Gpt2 {
        spec: Arc::new(spec),
        prefix,
        epsilon: config.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        activation: activation(config, "activation_function", "gelu_new")?,
        attention,
        scale_by_layer: config.switch("scale_attn_by_inverse_layer_idx", false)?,
        embedding_dropout: config.rate("embd_pdrop", 0.1)?,
        residual_dropout: config.rate("resid_pdrop", 0.1)?,
    }))
}

impl Model for Gpt2 {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let positions: Vec<u32> = pass.positions().iter().map(|p| *p as u32).collect();
        let words = pass.embed_words(&format!("{}wte", self.prefix), None)?;
        let x = words + pass.embed(&format!("{}wpe", self.prefix), &positions)?;
        Ok(pass.dropout(x, self.embedding_dropout))
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = format!("{}h.{index}", self.prefix);
        let mut options = self.attention.clone();
        if self.scale_by_layer {
            options.scale /= (index + 1) as f64;
        }
        let h = pass.layer_norm(&format!("{block}.ln_1"), x.clone(), self.epsilon)?;
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let qkv = pass.linear(&format!("{block}.attn.c_attn"), h)?;
            let width = self.spec.width;
            let part = |i: usize| qkv.clone().narrow(1, i * width, width);
            let heads = pass.attention(index, part(0), part(1), part(2), &options);
            let heads = pass.at(Site::Heads(index, Sublayer::Attention), heads);
            let h = pass.linear(&format!("{block}.attn.c_proj"), heads)?;
            Ok(pass.dropout(h, self.residual_dropout))
        })?;
        let x = add(x, h);
        let h = pass.layer_norm(&format!("{block}.ln_2"), x.clone(), self.epsilon)?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            let h = pass.linear(&format!("{block}.mlp.c_fc"), h)?;
            let h = activate(h, self.activation);
            let h = pass.at(Site::Hidden(index, Sublayer::FeedForward), h);
            let h = pass.linear(&format!("{block}.mlp.c_proj"), h)?;
            Ok(pass.dropout(h, self.residual_dropout))
        })?;
        Ok(add(x, h))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = pass.layer_norm(&format!("{}ln_f", self.prefix), x, self.epsilon)?;
        let x = pass.at(Site::Final, x);
        decoder_output(pass, &self.spec.head, x)
    }
}
