//! A tuned model in other tools' formats: Hugging Face folders and GGUF.

use std::path::Path;

use crate::error::{Error, Result};
use crate::prepare::Prepared;
use retune_core::change::{Mode, Scope};
use retune_core::model::Tuned;
use retune_core::parameters::to_vec;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_data::tokenizer::{Tokenizer, pre_name};
use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_files::gguf::Metadata;
use retune_methods::adapter::Adapter;
use retune_models::Checkpoint;
use retune_models::export::SHARD_BYTES;
use retune_models::gguf::{AdapterPair, GgufTokenizer};

/// Returns a weight with all its changes, in its logical shape.
///
/// # Errors
/// If the base cannot be read.
pub fn merged(tuned: &Tuned<'_>, weight: &WeightSpec) -> retune_core::Result<Vec<f32>> {
    if tuned.changes.of_weight(&weight.name).is_empty() {
        return tuned.weights.values(&weight.name);
    }
    let scope = Scope::new(tuned.parameters, Mode::Evaluate);
    Ok(to_vec(tuned.changes.materialize(&weight.name, tuned.weights, &scope)?.inner()))
}

/// Files that lie beside a model's weights: its tokenizer's, and what its pictures go through.
#[derive(Debug, Clone, Default)]
pub struct Beside(Vec<(String, Vec<u8>)>);

impl Beside {
    /// Collects those of the model at `path`.
    ///
    /// # Errors
    /// If the tokenizer cannot be written, or a file cannot be read.
    pub fn of(path: &Path, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let files = tokenizer.map(Tokenizer::to_folder_files).transpose()?.unwrap_or_default();
        let mut found: Vec<(String, Vec<u8>)> =
            files.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect();
        let name = retune_data::image::transform::FILE;
        let path = path.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
            found.push((name.to_owned(), bytes));
        }
        Ok(Self(found))
    }

    /// Returns names and contents.
    pub fn files(self) -> Vec<(String, Vec<u8>)> {
        self.0
    }
}

/// Refuses changes that cannot be merged into weights.
pub(crate) fn check_mergeable(tuned: &Tuned<'_>) -> Result<()> {
    match tuned.changes.unmergeable() {
        None => Ok(()),
        Some(what) => Err(Error::Core(retune_core::Error::Unsupported {
            what: format!("merging {what}"),
            help:
                "keep the adapter's folder and run it beside the base (`--adapter`), or tune with \
                   a method that changes weights, such as lora"
                    .to_owned(),
        })),
    }
}

/// Writes a run's tuned model as a Hugging Face folder in F32.
///
/// # Errors
/// If the disk is full; nothing half-written is left.
pub fn write_folder(prepared: &Prepared, tuned: &Tuned<'_>, path: &Path) -> Result<()> {
    let card = crate::card::model_card(prepared);
    let beside = Beside::of(&prepared.located.path, prepared.tokenizer.as_ref())?;
    write_merged(tuned, &beside, Dtype::F32, &card, path)
}

/// Writes a tuned model as a Hugging Face folder, in place of what has its name.
///
/// # Errors
/// If a change cannot be merged, or the disk is full.
pub fn write_merged(
    tuned: &Tuned<'_>,
    beside: &Beside,
    dtype: Dtype,
    card: &str,
    path: &Path,
) -> Result<()> {
    write_weights(&[tuned], tuned.model.spec(), beside, dtype, card, path, |weight| {
        merged(tuned, weight)
    })
}

/// Writes weights computed from one or several tuned models as a Hugging Face folder.
///
/// # Errors
/// As [`write_merged`]; those of `values`.
pub fn write_weights(
    tuned: &[&Tuned<'_>],
    spec: &ModelSpec,
    beside: &Beside,
    dtype: Dtype,
    card: &str,
    path: &Path,
    values: impl FnMut(&WeightSpec) -> retune_core::Result<Vec<f32>>,
) -> Result<()> {
    for tuned in tuned {
        check_mergeable(tuned)?;
    }
    let mut others = beside.0.clone();
    others.push(("README.md".to_owned(), card.as_bytes().to_vec()));
    Ok(retune_models::export::write_folder(path, spec, dtype, SHARD_BYTES, &others, values)?)
}

/// Writes a tuned model as one GGUF file.
///
/// # Errors
/// If GGUF has no such architecture, a change cannot be merged, or the disk is full.
pub fn write_gguf(
    tuned: &Tuned<'_>,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    kind: BlockType,
    name: &str,
    path: &Path,
) -> Result<()> {
    check_mergeable(tuned)?;
    let mut metadata = Metadata::default();
    let raw = match checkpoint.tokenizer()? {
        Some(raw) => raw,
        None => raw_tokenizer(tokenizer)?,
    };
    raw.write(&mut metadata);
    Ok(retune_models::gguf::write_model(
        path,
        tuned.model.spec(),
        kind,
        name,
        &metadata,
        |weight| merged(tuned, weight),
    )?)
}

/// Writes a LoRA adapter as GGUF.
///
/// # Errors
/// If the adapter is of another kind, or holds what GGUF cannot.
pub fn write_gguf_adapter(
    adapter: &Adapter,
    spec: &ModelSpec,
    name: &str,
    path: &Path,
) -> Result<()> {
    let kind = adapter.config.get("peft_type").and_then(serde_json::Value::as_str);
    if kind != Some("LORA") {
        return Err(Error::Core(retune_core::Error::Unsupported {
            what: format!("an adapter of type {} as GGUF", kind.unwrap_or("nothing")),
            help: "GGUF knows LoRA only; merge the adapter into the model where it merges, and \
                   export that"
                .to_owned(),
        }));
    }
    let method = retune_methods::lora::Lora::from_adapter(&adapter.config)?;
    let refuse = |what: &str| {
        Error::Core(retune_core::Error::Unsupported {
            what: format!("{what} as a GGUF adapter"),
            help: "merge the adapter into the model and export that".to_owned(),
        })
    };
    if method.options.dora {
        return Err(refuse("DoRA"));
    }
    let mut pairs = Vec::new();
    let mut used = 0;
    for (weight, rank, scale) in method.scales(spec)? {
        let module = format!("{}{}", retune_methods::adapter::PREFIX, weight.module());
        let factor = |letter: &str| {
            adapter.tensors.get(&format!("{module}.lora_{letter}.weight")).map(|(_, v)| v.clone())
        };
        let (Some(a), Some(b)) = (factor("A"), factor("B")) else {
            return Err(refuse("a change of an embedding"));
        };
        used += 2;
        pairs.push(AdapterPair { weight: weight.name.clone(), rank, scale, a, b });
    }
    if used != adapter.tensors.len() {
        return Err(refuse("an adapter with whole modules or biases"));
    }
    Ok(retune_models::gguf::write_adapter(path, spec, BlockType::F32, name, &pairs)?)
}

/// Turns a byte-level BPE tokenizer into the lists a GGUF file holds.
fn raw_tokenizer(tokenizer: &Tokenizer) -> Result<GgufTokenizer> {
    let unsupported = |what: &str| {
        Error::Core(retune_core::Error::Unsupported {
            what: format!("{what} in GGUF"),
            help: "export a Hugging Face folder and convert it with llama.cpp".to_owned(),
        })
    };
    let json: serde_json::Value = serde_json::from_str(&tokenizer.to_json()?)
        .map_err(|error| unsupported(&format!("this tokenizer ({error})")))?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(unsupported("a tokenizer that is not byte-level BPE"));
    }
    let pre = pre_name(&json)
        .ok_or_else(|| unsupported("a tokenizer that cuts text in a way without a name"))?;
    let size = tokenizer.vocabulary_size();
    let tokens = (0..size as u32)
        .map(|id| tokenizer.id_to_token(id).unwrap_or_else(|| format!("[unused{id}]")))
        .collect();
    let token_types = (0..size as u32).map(|id| if tokenizer.is_special(id) { 3 } else { 1 });
    let merges = model["merges"]
        .as_array()
        .map(|merges| {
            let text = |merge: &serde_json::Value| match merge {
                serde_json::Value::String(text) => text.clone(),
                pair => format!(
                    "{} {}",
                    pair[0].as_str().unwrap_or_default(),
                    pair[1].as_str().unwrap_or_default()
                ),
            };
            merges.iter().map(text).collect()
        })
        .unwrap_or_default();
    let special = tokenizer.special();
    Ok(GgufTokenizer {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        scores: Vec::new(),
        token_types: token_types.collect(),
        merges,
        bos: special.bos,
        eos: special.eos,
        unknown: special.unk,
        padding: special.pad,
        add_bos: Some(tokenizer.adds_bos()),
        add_eos: Some(tokenizer.adds_eos()),
        add_space_prefix: None,
        chat_template: tokenizer.chat_template().map(str::to_owned),
    })
}
