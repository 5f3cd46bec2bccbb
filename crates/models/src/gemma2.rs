//! Gemma 2: norms before and behind each sub-layer, soft caps, a window in every other layer.

use crate::config::Config;
use crate::decoder::{Block, Decoder, Family, Sizes, windowed_layers};
use crate::heads::Classes;
use crate::{activation, rope};
use retune_core::Result;
use retune_core::kernels::AttentionOptions;
use retune_core::model::Model;

/// The classes of Gemma 2.
pub(crate) const GEMMA2: Classes = Classes {
    language: "Gemma2ForCausalLM",
    classifier: "Gemma2ForSequenceClassification",
    bare: "Gemma2Model",
    prefix: "model.",
};

/// Builds a Gemma 2.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn gemma2(config: &Config) -> Result<Box<dyn Model>> {
    let sizes = Sizes::read(config, Some(256))?;
    let attention = attention(config, &sizes, Some(50.0))?;
    let window = window(config)?;
    let rope = rope::read(config, sizes.head_width)?;
    let windowed = windowed_layers(config, sizes.num_layers, |i| i.is_multiple_of(2))?;
    let block = |is_windowed: bool| {
        let window = window.filter(|_| is_windowed);
        Block { rope: rope.clone(), attention: AttentionOptions { window, ..attention.clone() } }
    };
    let blocks = windowed.into_iter().map(block).collect();
    family(
        config,
        GEMMA2,
        sizes,
        false,
        soft_cap(config, "final_logit_softcapping", Some(30.0))?,
        8192,
        blocks,
    )
}

/// Puts together what Gemma 2 and 3 share.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn family(
    config: &Config,
    classes: Classes,
    sizes: Sizes,
    head_norms: bool,
    soft_cap: Option<f64>,
    max_positions: usize,
    blocks: Vec<Block>,
) -> Result<Box<dyn Model>> {
    let bias = config.switch("attention_bias", false)?;
    let family = Family {
        classes,
        sizes,
        input_bias: bias,
        output_bias: bias,
        feed_forward_bias: false,
        head_norms,
        norm_offset: 1.0,
        norms_behind: true,
        // The library rounds the factor to the type of the states before it multiplies.
        embedding_scale: Some(f64::from((sizes.width as f64).sqrt() as f32)),
        activation: activation(config, "hidden_activation", "gelu_pytorch_tanh")?,
        tied: true,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(max_positions),
        soft_cap,
        blocks,
    };
    Ok(Box::new(Decoder::new(config, family)?))
}

/// Reads the attention of a block without window: its scale is not the head's width's.
///
/// # Errors
/// If a number is impossible.
pub(crate) fn attention(
    config: &Config,
    sizes: &Sizes,
    usual_cap: Option<f64>,
) -> Result<AttentionOptions> {
    let scalar = config.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    let mut attention = sizes.attention();
    attention.scale = scalar.powf(-0.5);
    attention.soft_cap = soft_cap(config, "attn_logit_softcapping", usual_cap)?;
    Ok(attention)
}

/// Reads a cap; null means none, and absent the usual one.
///
/// # Errors
/// If it is not above zero.
pub(crate) fn soft_cap(config: &Config, key: &str, usual: Option<f64>) -> Result<Option<f64>> {
    match config.value().get(key) {
        None => Ok(usual),
        Some(_) => config.positive(key),
    }
}

/// Reads the window of the layers that have one; null means none.
///
/// # Errors
/// If it is impossible.
pub(crate) fn window(config: &Config) -> Result<Option<usize>> {
    match config.value().get("sliding_window") {
        None => Ok(Some(4096)),
        Some(_) => config.optional_size("sliding_window"),
    }
}
