//! Architectures written once against the forward pass, and the readers of their checkpoints.
//!
//! One file per family: it lists its weights and walks through them, and knows neither files nor
//! methods. [`build`] makes the model a configuration describes, [`open`] reads a checkpoint.
//!
//! | family | classes | from |
//! |---|---|---|
//! | Llama 2 and 3, SmolLM2 | language, classes, embedding | folder, GGUF |
//! | Mistral | language, classes, embedding | folder, GGUF |
//! | Qwen 2, Qwen 3 | language, classes, embedding | folder, GGUF |
//! | Gemma 2, Gemma 3 (text) | language, classes, embedding | folder, GGUF |
//! | GPT-2 | language, classes, embedding | folder |
//! | BERT, RoBERTa, XLM-RoBERTa | classes, embedding | folder |
//! | T5 1.0 and 1.1 | encoder-decoder | folder |
//! | ViT | classes, embedding | folder |
//! | CLIP | images beside texts | folder |

mod bert;
mod checkpoint;
mod clip;
pub mod config;
mod decoder;
mod emulator;
pub mod export;
mod fingerprint;
pub mod folder;
mod fresh;
mod gemma2;
mod gemma3;
pub mod gguf;
mod gpt2;
mod heads;
mod llama;
mod qwen2;
mod qwen3;
mod rope;
mod t5;
mod tower;
mod vit;
mod weight_list;

pub use checkpoint::{Checkpoint, FileKind, open, open_for};
pub use emulator::{EMULATOR_KEY, Emulator};
pub use folder::{FolderSource, read_config};
pub use fresh::{Beginning, FreshHead};
pub use heads::Task;

use config::Config;
use heads::Classes;
use retune_core::Result;
use retune_core::kernels::Activation;
use retune_core::model::Model;

/// One `model_type`: its classes and how it is made.
struct Family {
    kind: &'static str,
    classes: Classes,
    build: fn(&Config) -> Result<Box<dyn Model>>,
}

/// All families, in the order they are listed to people.
const FAMILIES: &[Family] = &[
    Family { kind: "llama", classes: llama::LLAMA, build: llama::llama },
    Family { kind: "mistral", classes: llama::MISTRAL, build: llama::mistral },
    Family { kind: "qwen2", classes: qwen2::QWEN2, build: qwen2::qwen2 },
    Family { kind: "qwen3", classes: qwen3::QWEN3, build: qwen3::qwen3 },
    Family { kind: "gemma2", classes: gemma2::GEMMA2, build: gemma2::gemma2 },
    Family { kind: "gemma3_text", classes: gemma3::GEMMA3, build: gemma3::gemma3 },
    Family { kind: "gpt2", classes: gpt2::GPT2, build: gpt2::gpt2 },
    Family { kind: "bert", classes: bert::BERT, build: bert::bert },
    Family { kind: "roberta", classes: bert::ROBERTA, build: bert::roberta },
    Family { kind: "xlm-roberta", classes: bert::XLM_ROBERTA, build: bert::xlm_roberta },
    Family { kind: "t5", classes: t5::T5, build: t5::t5 },
    Family { kind: "vit", classes: vit::VIT, build: vit::vit },
    Family { kind: "clip", classes: clip::CLIP, build: clip::clip },
];

/// Returns every `model_type` that can be built.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.kind)
}

fn family(config: &Config) -> Result<&'static Family> {
    let wanted = config.text("model_type")?.unwrap_or_default();
    FAMILIES.iter().find(|family| family.kind == wanted).ok_or_else(|| {
        let known: Vec<&str> = model_types().collect();
        config.unknown("model_type", &format!("one of {}", known.join(", ")))
    })
}

/// Builds the model a configuration describes, with the head it was saved with.
///
/// # Errors
/// If the type is unknown, or its configuration has a number missing or impossible.
pub fn build(config: &Config) -> Result<Box<dyn Model>> {
    emulator::as_configured((family(config)?.build)(config)?, config)
}

/// Builds the model a configuration describes for a task of the caller's choice.
///
/// # Errors
/// As [`build`]; also if the task's labels are fewer than two or not all different.
pub fn build_for(config: &Config, task: &Task) -> Result<Box<dyn Model>> {
    let family = family(config)?;
    let (config, _) = heads::for_task(config.clone(), &family.classes, task)?;
    emulator::as_configured((family.build)(&config)?, &config)
}

/// Reads the activation of a feed-forward network, `usual` where the key is absent.
///
/// # Errors
/// If the name is unknown.
fn activation(config: &Config, key: &str, usual: &str) -> Result<Activation> {
    match config.text(key)?.unwrap_or(usual) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "quick_gelu" => Ok(Activation::QuickGelu),
        "relu" => Ok(Activation::Relu),
        "tanh" => Ok(Activation::Tanh),
        _ => Err(config.unknown(key, "silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu")),
    }
}
