//! Qwen 2 and 2.5: a llama with biases on queries, keys and values, and a window in some layers.

use crate::config::Config;
use crate::decoder::{Block, Decoder, Family, Sizes, windowed_layers};
use crate::heads::Classes;
use crate::{activation, rope};
use retune_core::Result;
use retune_core::model::Model;

/// The classes of Qwen 2.
pub(crate) const QWEN2: Classes = Classes {
    language: "Qwen2ForCausalLM",
    classifier: "Qwen2ForSequenceClassification",
    bare: "Qwen2Model",
    prefix: "model.",
};

/// Builds a Qwen 2.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn qwen2(config: &Config) -> Result<Box<dyn Model>> {
    let sizes = Sizes::read(config, None)?;
    let family = Family {
        classes: QWEN2,
        sizes,
        input_bias: true,
        output_bias: false,
        feed_forward_bias: false,
        head_norms: false,
        norm_offset: 0.0,
        norms_behind: false,
        embedding_scale: None,
        activation: activation(config, "hidden_act", "silu")?,
        tied: false,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(32_768),
        soft_cap: None,
        blocks: blocks(config, &sizes)?,
    };
    Ok(Box::new(Decoder::new(config, family)?))
}

/// Reads what each block of a Qwen does: from `max_window_layers` on, a window if it is switched on.
///
/// # Errors
/// If a number is missing or impossible.
pub(crate) fn blocks(config: &Config, sizes: &Sizes) -> Result<Vec<Block>> {
    let rope = rope::read(config, sizes.head_width)?;
    let window = if config.switch("use_sliding_window", false)? {
        Some(config.optional_size("sliding_window")?.unwrap_or(4096))
    } else {
        None
    };
    let first = config.number("max_window_layers")?.unwrap_or(28.0);
    let windowed =
        windowed_layers(config, sizes.num_layers, |i| window.is_some() && i as f64 >= first)?;
    let block = |is_windowed: bool| {
        let mut attention = sizes.attention();
        attention.window = window.filter(|_| is_windowed);
        Block { rope: rope.clone(), attention }
    };
    Ok(windowed.into_iter().map(block).collect())
}
