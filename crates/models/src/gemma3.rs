//! Gemma 3, text: Gemma 2 with norms of queries and keys, and another rope in windowed layers.

use crate::config::Config;
use crate::decoder::{Block, Sizes, windowed_layers};
use crate::gemma2;
use crate::heads::Classes;
use crate::rope;
use retune_core::kernels::AttentionOptions;
use retune_core::model::Model;
use retune_core::{Error, Result};

/// The classes of Gemma 3 for text.
pub(crate) const GEMMA3: Classes = Classes {
    language: "Gemma3ForCausalLM",
    classifier: "Gemma3TextForSequenceClassification",
    bare: "Gemma3TextModel",
    prefix: "model.",
};

/// Builds a Gemma 3.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn gemma3(config: &Config) -> Result<Box<dyn Model>> {
    if config.switch("use_bidirectional_attention", false)? {
        return Err(Error::Unsupported {
            what: "a Gemma 3 that looks ahead (`use_bidirectional_attention`)".to_owned(),
            help: "use a causal Gemma 3, or a BERT for embeddings".to_owned(),
        });
    }
    let sizes = Sizes::read(config, Some(256))?;
    let attention = gemma2::attention(config, &sizes, None)?;
    let window = gemma2::window(config)?;
    let pattern = match config.optional_size("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => config.optional_size("_sliding_window_pattern")?.unwrap_or(6),
    };
    let windowed = windowed_layers(config, sizes.num_layers, |i| !(i + 1).is_multiple_of(pattern))?;
    let global = rope::read_for(config, "full_attention", "rope_theta", 1e6, sizes.head_width)?;
    let local =
        rope::read_for(config, "sliding_attention", "rope_local_base_freq", 1e4, sizes.head_width)?;
    let block = |is_windowed: bool| {
        let window = window.filter(|_| is_windowed);
        let rope = if is_windowed { &local } else { &global };
        Block { rope: rope.clone(), attention: AttentionOptions { window, ..attention.clone() } }
    };
    let blocks = windowed.into_iter().map(block).collect();
    let soft_cap = gemma2::soft_cap(config, "final_logit_softcapping", None)?;
    gemma2::family(config, GEMMA3, sizes, true, soft_cap, 131_072, blocks)
}
