//! Architectures written once against the forward pass, and the readers of their checkpoints.
//!
//! One file per family, each a [`Model`]: it lists its weights and walks through them, and knows
//! neither files nor methods. [`build`] finds the family of a configuration.

pub mod config;
mod decoder;
pub mod folder;
pub mod llama;
mod rope;

use config::Config;
use retune_core::Result;
use retune_core::kernels::Activation;
use retune_core::model::Model;

/// One family: the `model_type`s it reads and how it is made.
struct Family {
    types: &'static [&'static str],
    build: fn(&Config) -> Result<Box<dyn Model>>,
}

/// All families, in the order they are listed to people.
const FAMILIES: &[Family] =
    &[Family { types: &["llama", "mistral"], build: |config| Ok(Box::new(llama::Llama::new(config)?)) }];

/// Returns every `model_type` that can be built.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.types.iter().copied())
}

/// Builds the model a configuration describes.
///
/// # Errors
/// If the type is unknown, or its configuration has a number missing or impossible.
pub fn build(config: &Config) -> Result<Box<dyn Model>> {
    let wanted = config.text("model_type")?.unwrap_or_default();
    match FAMILIES.iter().find(|family| family.types.contains(&wanted)) {
        Some(family) => (family.build)(config),
        None => {
            let known: Vec<&str> = model_types().collect();
            Err(config.unknown("model_type", &known.join(", ")))
        }
    }
}

/// Reads the activation of a feed-forward network.
///
/// # Errors
/// If the name is unknown.
fn activation(config: &Config, key: &str) -> Result<Activation> {
    match config.text(key)?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "quick_gelu" => Ok(Activation::QuickGelu),
        "relu" => Ok(Activation::Relu),
        "tanh" => Ok(Activation::Tanh),
        _ => Err(config.unknown(key, "silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu")),
    }
}
