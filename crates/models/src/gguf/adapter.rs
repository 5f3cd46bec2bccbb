//! Writes a LoRA adapter as GGUF.

use std::path::Path;

use super::tangle;
use super::write::{arch_of, stored_name};
use retune_core::spec::{Kind, ModelSpec};
use retune_core::{Error, Result};
use retune_files::ggml::BlockType;
use retune_files::gguf::{GgufSpec, GgufWriter, Metadata};

/// The low-rank change of one weight: `weight + scale · b · a`.
#[derive(Debug, Clone)]
pub struct AdapterPair {
    /// The weight's name in the model.
    pub weight: String,
    /// The rank.
    pub rank: usize,
    /// The factor on the product, e.g. alpha / rank.
    pub scale: f64,
    /// `[rank, inputs]`
    pub a: Vec<f32>,
    /// `[outputs, rank]`
    pub b: Vec<f32>,
}

/// Writes a LoRA adapter as GGUF, `kind` F32 or F16.
///
/// llama.cpp knows one alpha per file and scales by alpha / rank. Alpha is taken from the first
/// pair; the `b` of a pair with another factor is multiplied to make up for it.
///
/// # Errors
/// If there is no pair, one names no matrix of the model or does not fit it, GGUF has no such
/// architecture, or the file cannot be written.
pub fn write_adapter(
    path: &Path,
    spec: &ModelSpec,
    kind: BlockType,
    name: &str,
    pairs: &[AdapterPair],
) -> Result<()> {
    let arch = arch_of(spec)?;
    let Some(first) = pairs.first() else {
        return Err(Error::Unsupported {
            what: "an adapter without any low-rank pair as GGUF".to_owned(),
            help: "merge it into the model and write that".to_owned(),
        });
    };
    let alpha = first.scale * first.rank as f64;
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", arch.name);
    metadata.insert("general.type", "adapter");
    metadata.insert("general.name", name);
    metadata.insert("adapter.type", "lora");
    metadata.insert("adapter.lora.alpha", alpha as f32);
    let mut specs = Vec::with_capacity(2 * pairs.len());
    let mut tensors = Vec::with_capacity(2 * pairs.len());
    for pair in pairs {
        let weight = spec.weight(&pair.weight).ok_or_else(|| Error::MissingWeight {
            name: pair.weight.clone(),
            needed_by: "the adapter".to_owned(),
            nearest: retune_core::names::nearest_list(
                &pair.weight,
                spec.weights.iter().map(|weight| weight.name.as_str()),
            ),
        })?;
        if !matches!(weight.kind, Kind::Linear { transposed: false }) {
            return Err(Error::Unsupported {
                what: format!("a low-rank change of `{}` as GGUF", pair.weight),
                help: "merge the adapter into the model and write that".to_owned(),
            });
        }
        let [outputs, inputs] = weight.matrix();
        if pair.rank == 0
            || pair.a.len() != pair.rank * inputs
            || pair.b.len() != outputs * pair.rank
        {
            return Err(Error::Shape {
                name: pair.weight.clone(),
                expected: vec![outputs, inputs, pair.rank],
                found: vec![
                    pair.b.len() / pair.rank.max(1),
                    pair.a.len() / pair.rank.max(1),
                    pair.rank,
                ],
                help: "the adapter is for another model".to_owned(),
            });
        }
        let mut b = pair.b.clone();
        if let Some(heads) = arch.heads(weight, spec) {
            b = tangle(&b, outputs, heads);
        }
        let factor = (pair.scale * pair.rank as f64 / alpha) as f32;
        if factor != 1.0 {
            for value in &mut b {
                *value *= factor;
            }
        }
        let stored = stored_name(arch, weight)?;
        let (name_a, name_b) = (format!("{stored}.lora_a"), format!("{stored}.lora_b"));
        specs.push(GgufSpec::new(&name_a, kind, [pair.rank, inputs]));
        specs.push(GgufSpec::new(&name_b, kind, [outputs, pair.rank]));
        tensors.push((name_a, pair.a.clone()));
        tensors.push((name_b, b));
    }
    let mut writer = GgufWriter::create(path, &metadata, &specs)?;
    for (name, values) in &tensors {
        writer.write_f32(name, values)?;
    }
    Ok(writer.finish()?)
}
