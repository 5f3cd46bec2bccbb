//! The llama family: Llama 2 and 3, SmolLM2, and Mistral with its sliding window.
//!
//! Pre-norm blocks, rotary positions with the scalings in use, grouped heads, SwiGLU.

use crate::config::Config;
use crate::decoder::{Block, Decoder, Family, Sizes};
use crate::heads::Classes;
use crate::{activation, rope};
use retune_core::Result;
use retune_core::model::Model;

/// The classes of Llama.
pub(crate) const LLAMA: Classes = Classes {
    language: "LlamaForCausalLM",
    classifier: "LlamaForSequenceClassification",
    bare: "LlamaModel",
    prefix: "model.",
};

/// The classes of Mistral.
pub(crate) const MISTRAL: Classes = Classes {
    language: "MistralForCausalLM",
    classifier: "MistralForSequenceClassification",
    bare: "MistralModel",
    prefix: "model.",
};

/// The window of a Mistral whose configuration does not mention one, as in its library class.
const MISTRAL_WINDOW: usize = 4096;

/// Builds a Llama.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn llama(config: &Config) -> Result<Box<dyn Model>> {
    let bias = config.switch("attention_bias", false)?;
    // A Llama's library class ignores `sliding_window`.
    build(config, LLAMA, bias, config.switch("mlp_bias", false)?, None, 2048)
}

/// Builds a Mistral.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn mistral(config: &Config) -> Result<Box<dyn Model>> {
    let window = match config.value().get("sliding_window") {
        None => Some(MISTRAL_WINDOW),
        Some(_) => config.optional_size("sliding_window")?,
    };
    build(config, MISTRAL, false, false, window, 131_072)
}

fn build(
    config: &Config,
    classes: Classes,
    attention_bias: bool,
    feed_forward_bias: bool,
    window: Option<usize>,
    max_positions: usize,
) -> Result<Box<dyn Model>> {
    let sizes = Sizes::read(config, None)?;
    let mut attention = sizes.attention();
    attention.window = window;
    let rope = rope::read(config, sizes.head_width)?;
    let family = Family {
        classes,
        sizes,
        input_bias: attention_bias,
        output_bias: attention_bias,
        feed_forward_bias,
        head_norms: false,
        norm_offset: 0.0,
        norms_behind: false,
        embedding_scale: None,
        activation: activation(config, "hidden_act", "silu")?,
        tied: false,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(max_positions),
        soft_cap: None,
        blocks: vec![Block { rope, attention }; sizes.num_layers],
    };
    Ok(Box::new(Decoder::new(config, family)?))
}
