//! Qwen 3: a llama whose queries and keys are normalised per head.

use crate::config::Config;
use crate::decoder::{Decoder, Family, Sizes};
use crate::heads::Classes;
use crate::{activation, qwen2};
use retune_core::Result;
use retune_core::model::Model;

/// The classes of Qwen 3.
pub(crate) const QWEN3: Classes = Classes {
    language: "Qwen3ForCausalLM",
    classifier: "Qwen3ForSequenceClassification",
    bare: "Qwen3Model",
    prefix: "model.",
};

/// Builds a Qwen 3.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn qwen3(config: &Config) -> Result<Box<dyn Model>> {
    let sizes = Sizes::read(config, Some(128))?;
    let bias = config.switch("attention_bias", false)?;
    let family = Family {
        classes: QWEN3,
        sizes,
        input_bias: bias,
        output_bias: bias,
        feed_forward_bias: false,
        head_norms: true,
        norm_offset: 0.0,
        norms_behind: false,
        embedding_scale: None,
        activation: activation(config, "hidden_act", "silu")?,
        tied: false,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(32_768),
        soft_cap: None,
        blocks: qwen2::blocks(config, &sizes)?,
    };
    Ok(Box::new(Decoder::new(config, family)?))
}
