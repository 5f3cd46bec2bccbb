//! Writes a model as GGUF.

use std::path::Path;

use super::{Arch, tangle};
use crate::config::Config;
use crate::gguf::source::ROPE_FACTORS;
use retune_core::spec::{Head, Kind, ModelSpec, WeightSpec};
use retune_core::{Error, Result};
use retune_files::ggml::BlockType;
use retune_files::gguf::{GgufSpec, GgufWriter, Metadata};
use serde_json::Value;

/// Returns the architecture a language model is written as.
pub(super) fn arch_of(spec: &ModelSpec) -> Result<&'static Arch> {
    let language = matches!(spec.head, Head::Language { .. });
    Arch::of(spec).filter(|_| language).ok_or_else(|| Error::Unsupported {
        what: format!("{} as GGUF", spec.class),
        help: format!("write a Hugging Face folder; GGUF is written for {}", Arch::list()),
    })
}

/// Writes a language model as one GGUF file, tensor by tensor.
///
/// Matrices are stored as `kind`, norms and biases as F32; a matrix whose rows are no whole number
/// of blocks falls back to F16. `values` gives a weight in its logical shape; `tokenizer` is
/// passed on as given.
///
/// # Errors
/// If GGUF has no such architecture, a value does not fit the type, or the file cannot be written;
/// those of `values`.
pub fn write_model(
    path: &Path,
    spec: &ModelSpec,
    kind: BlockType,
    name: &str,
    tokenizer: &Metadata,
    mut values: impl FnMut(&WeightSpec) -> Result<Vec<f32>>,
) -> Result<()> {
    let arch = arch_of(spec)?;
    let config = Config::new(path, spec.config.clone());
    let (mut metadata, factors) = metadata(arch, spec, &config, kind, name)?;
    for (key, value) in tokenizer.iter() {
        metadata.insert(key, value.clone());
    }
    let mut specs = Vec::with_capacity(spec.weights.len() + 1);
    if let Some(factors) = &factors {
        specs.push(GgufSpec::new(ROPE_FACTORS, BlockType::F32, [factors.len()]));
    }
    let mut names = Vec::with_capacity(spec.weights.len());
    for weight in &spec.weights {
        let stored = stored_name(arch, weight)?;
        specs.push(GgufSpec::new(&stored, stored_kind(weight, kind), weight.shape.clone()));
        names.push(stored);
    }
    let mut writer = GgufWriter::create(path, &metadata, &specs)?;
    if let Some(factors) = &factors {
        writer.write_f32(ROPE_FACTORS, factors)?;
    }
    for (weight, stored) in spec.weights.iter().zip(&names) {
        let mut numbers = values(weight)?;
        if numbers.len() != weight.count() {
            return Err(Error::Shape {
                name: weight.name.clone(),
                expected: weight.shape.clone(),
                found: vec![numbers.len()],
                help: "the values to be written do not fill the weight".to_owned(),
            });
        }
        if let Some(heads) = arch.heads(weight, spec) {
            numbers = tangle(&numbers, weight.shape[0], heads);
        }
        let offset = arch.offset(weight);
        if offset != 0.0 {
            for value in &mut numbers {
                *value += offset;
            }
        }
        writer.write_f32(stored, &numbers)?;
    }
    Ok(writer.finish()?)
}

/// Returns what llama.cpp calls a weight.
pub(super) fn stored_name(arch: &Arch, weight: &WeightSpec) -> Result<String> {
    arch.stored_name(&weight.name).ok_or_else(|| Error::Unsupported {
        what: format!("`{}` in a GGUF of architecture {}", weight.name, arch.name),
        help: "write a Hugging Face folder".to_owned(),
    })
}

fn stored_kind(weight: &WeightSpec, kind: BlockType) -> BlockType {
    if matches!(weight.kind, Kind::Norm | Kind::Bias) {
        return BlockType::F32;
    }
    let row = weight.shape.last().copied().unwrap_or(1);
    if row.is_multiple_of(kind.block_len()) { kind } else { BlockType::F16 }
}

/// Makes the keys of a model, and the table of rope factors where its scaling needs one.
fn metadata(
    arch: &Arch,
    spec: &ModelSpec,
    config: &Config,
    kind: BlockType,
    name: &str,
) -> Result<(Metadata, Option<Vec<f32>>)> {
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", arch.name);
    metadata.insert("general.type", "model");
    metadata.insert("general.name", name);
    metadata.insert("general.quantization_version", 2_u32);
    let file_type = match kind {
        BlockType::F32 => Some(0_u32),
        BlockType::F16 => Some(1),
        BlockType::Q4_0 => Some(2),
        BlockType::Q4_1 => Some(3),
        BlockType::Q8_0 => Some(7),
        BlockType::BF16 => Some(32),
        _ => None,
    };
    if let Some(file_type) = file_type {
        metadata.insert("general.file_type", file_type);
    }
    let mut put = |key: &str, value: usize| {
        metadata.insert(format!("{}.{key}", arch.name), value as u32);
    };
    put("context_length", spec.max_positions);
    put("embedding_length", spec.width);
    put("block_count", spec.num_layers);
    put("feed_forward_length", spec.inner_width);
    put("attention.head_count", spec.num_heads);
    put("attention.head_count_kv", spec.num_key_heads);
    put("attention.key_length", spec.head_width);
    put("attention.value_length", spec.head_width);
    put("rope.dimension_count", spec.head_width);
    put("vocab_size", spec.vocabulary);
    if arch.norms_behind
        && let Some(window) = crate::gemma2::window(config)?
    {
        put("attention.sliding_window", window);
    }
    let mut put = |key: &str, value: f64| {
        metadata.insert(format!("{}.{key}", arch.name), value as f32);
    };
    put("attention.layer_norm_rms_epsilon", config.positive("rms_norm_eps")?.unwrap_or(1e-6));
    if arch.name == "gemma2" {
        let cap = crate::gemma2::soft_cap(config, "attn_logit_softcapping", Some(50.0))?;
        put("attn_logit_softcapping", cap.unwrap_or(0.0));
    }
    if let Head::Language { soft_cap: Some(cap), .. } = spec.head {
        put("final_logit_softcapping", cap);
    }
    let factors = rope(arch, spec, config, &mut metadata)?;
    Ok((metadata, factors))
}

/// Writes base and scaling of the rope.
fn rope(
    arch: &Arch,
    spec: &ModelSpec,
    config: &Config,
    metadata: &mut Metadata,
) -> Result<Option<Vec<f32>>> {
    let usual = if arch.name == "gemma3" { 1e6 } else { 1e4 };
    let parameters = config.part("rope_parameters")?;
    let part = match &parameters {
        Some(part) if arch.name == "gemma3" => part.part("full_attention")?,
        Some(part) => Some(part.clone()),
        None => config.part("rope_scaling")?,
    };
    let inner = part.as_ref().map(|part| part.positive("rope_theta")).transpose()?.flatten();
    let theta = match inner {
        Some(theta) => theta,
        None => config.positive("rope_theta")?.unwrap_or(usual),
    };
    let key = |name: &str| format!("{}.rope.{name}", arch.name);
    metadata.insert(key("freq_base"), theta as f32);
    if arch.name == "gemma3" {
        let rope =
            crate::rope::read_for(config, "sliding_attention", "rope_local_base_freq", 1e4, 4)?;
        // Of a head of width 4 the second frequency is the base to the power of -1/2.
        let local = rope.inverse_frequencies[1].powi(-2);
        metadata.insert(key("freq_base_swa"), local as f32);
    }
    let Some(part) = part else { return Ok(None) };
    let kind = match part.text("rope_type")? {
        Some(kind) => kind,
        None => part.text("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok(None),
        "linear" | "yarn" => {
            metadata.insert(key("scaling.type"), kind);
            let factor = part.positive("factor")?.unwrap_or(1.0);
            metadata.insert(key("scaling.factor"), factor as f32);
            let original = part.optional_size("original_max_position_embeddings")?;
            if let Some(original) = original {
                metadata.insert(key("scaling.original_context_length"), original as u32);
            }
            Ok(None)
        }
        _ => {
            let scaled = crate::rope::read(config, spec.head_width)?;
            let bare =
                Value::Object([("rope_theta".to_owned(), theta.into())].into_iter().collect());
            let plain = crate::rope::read(&Config::new(config.path(), bare), spec.head_width)?;
            let pairs = plain.inverse_frequencies.iter().zip(scaled.inverse_frequencies.iter());
            Ok(Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect()))
        }
    }
}
