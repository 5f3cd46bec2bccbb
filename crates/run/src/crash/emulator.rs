//! The stand-in as a folder: what is kept of the model, and the list of what runs where.

use std::path::Path;

use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::Weights;
use retune_evaluate::similarity::{Pooling, layer_outputs, linear_cka};
use retune_files::safetensors::Safetensors;
use retune_files::{Dtype, sha256};
use retune_merge::layers::Layered;
use retune_models::EMULATOR_KEY;
use retune_models::config::Config;
use retune_models::export::{SHARD_BYTES, write_folder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::blocks::Blocks;
use crate::artefacts::heatmap::{HeatMap, svg};
use crate::card::{Derived, derived_card};
use crate::error::{Error, Result};
use crate::export::Beside;
use crate::prepare::Prepared;

/// Tokens in one pass of a probe.
const PROBE_TOKENS: usize = 2048;

/// Configuration keys that hold the number of blocks.
const LAYER_KEYS: [&str; 4] = ["num_hidden_layers", "n_layer", "num_layers", "n_layers"];

/// What the configuration of a stand-in says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What the whole model is called.
    pub base: String,
    /// SHA-256 over the whole model's weights.
    pub base_sha256: String,
    /// SHA-256 over the weights of the stand-in that do not train.
    pub frozen_sha256: String,
    /// Blocks of the whole model.
    pub depth: usize,
    /// The number in the whole model of each block that is stored.
    pub kept_blocks: Vec<usize>,
    /// Of the stored blocks, counted in the stand-in, those that train.
    pub trainable: Vec<usize>,
    /// The place at which each stored block is itself.
    pub kept: Vec<usize>,
    /// The stored block that runs at each place.
    pub order: Vec<usize>,
}

impl Manifest {
    /// Reads the manifest of a model's configuration.
    ///
    /// # Errors
    /// [`Error::Run`] if it is no stand-in, or its lists do not fit it.
    pub fn read(path: &Path, spec: &ModelSpec) -> Result<Self> {
        let wrong = |found: String| Error::Run {
            path: path.to_path_buf(),
            what: "this is no emulator".to_owned(),
            expected: "a folder `retune crash emulate` wrote, or one tuned from it".to_owned(),
            found,
            help: "give the folder that was made for the data's owner".to_owned(),
        };
        let part = spec.config.get(EMULATOR_KEY);
        let part = part.ok_or_else(|| wrong(format!("no `{EMULATOR_KEY}` in config.json")))?;
        let manifest: Self =
            serde_json::from_value(part.clone()).map_err(|error| wrong(error.to_string()))?;
        let count = spec.num_layers;
        let blocks = &manifest.kept_blocks;
        let fits = blocks.len() == count
            && blocks.is_sorted_by(|a, b| a < b)
            && blocks.last().is_none_or(|block| *block < manifest.depth)
            && !manifest.trainable.is_empty()
            && manifest.trainable.is_sorted_by(|a, b| a < b)
            && manifest.trainable.last().is_none_or(|block| *block < count);
        if fits {
            Ok(manifest)
        } else {
            Err(wrong(format!("lists that do not fit {count} blocks")))
        }
    }

    /// Returns the name a weight of the stand-in has in the whole model.
    pub fn whole_name(&self, weight: &WeightSpec) -> String {
        renamed(weight, &self.kept_blocks)
    }

    /// Tells whether a weight of the stand-in trains.
    pub fn trains(&self, weight: &WeightSpec) -> bool {
        weight.layer.is_some_and(|layer| self.trainable.contains(&layer))
    }

    /// Writes the options that let a method train these blocks only.
    pub fn recipe(&self, spec: &ModelSpec) -> String {
        let numbers: Vec<String> = self.trainable.iter().map(ToString::to_string).collect();
        let in_block = spec.weights.iter().find_map(|weight| Layered::parse(&weight.name));
        let stack = in_block.map_or_else(String::new, |name| name.stack.replace('.', "\\\\."));
        format!(
            "[method.lora]\nlayers = [{}]\n\n# or, to train them whole:\n# [method.full]\n# \
             targets = [\"{stack}({})\\\\..*\"]\n",
            numbers.join(", "),
            numbers.join("|")
        )
    }
}

/// Gives a weight of block `i` the number `blocks[i]`.
fn renamed(weight: &WeightSpec, blocks: &[usize]) -> String {
    match (weight.layer, Layered::parse(&weight.name)) {
        (Some(layer), Some(name)) => {
            blocks.get(layer).map_or_else(|| weight.name.clone(), |block| name.at(*block))
        }
        _ => weight.name.clone(),
    }
}

/// Hashes the weights `names` by value, whatever type they are stored in, under the names `known_as`
/// and with their shapes.
///
/// # Errors
/// If one cannot be read.
pub fn hash_weights(weights: &Weights, names: &[String], known_as: &[String]) -> Result<String> {
    let mut parts = Vec::with_capacity(names.len());
    for (name, known_as) in names.iter().zip(known_as) {
        let shape = &weights.describe(name)?.shape;
        let values = weights.values(name)?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        parts.push(format!("{known_as} {shape:?} {}", sha256(&bytes)));
    }
    // Two lists of the same weights may come in different orders.
    parts.sort_unstable();
    Ok(sha256(parts.join("\n").as_bytes()))
}

/// How blocks are chosen.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// How the states of a text become one vector.
    pub pooling: Pooling,
    /// Training rows that are read.
    pub num_rows: usize,
}

/// Measures how alike the outputs of all blocks are on a recipe's training rows, `[block][block]`.
///
/// # Errors
/// If there are fewer than two rows.
pub fn similarity(prepared: &Prepared, probe: Probe) -> Result<Vec<Vec<f64>>> {
    let batches = prepared.splits.train.batches(probe.num_rows, PROBE_TOKENS)?;
    let weights = &prepared.opened.weights;
    let nothing = (retune_core::change::Changes::default(), parameters(weights));
    let tuned = retune_core::model::Tuned {
        model: prepared.opened.checkpoint.model.as_ref(),
        weights,
        changes: &nothing.0,
        parameters: &nothing.1,
    };
    Ok(linear_cka(&layer_outputs(&tuned, &batches, probe.pooling)?)?)
}

fn parameters(weights: &Weights) -> retune_core::parameters::Parameters {
    retune_core::parameters::Parameters::new(weights.device())
}

/// What is written down of how the blocks were chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// The blocks.
    pub blocks: Blocks,
    /// First block and the one behind the last of each cluster; none for lists a person wrote.
    pub clusters: Vec<(usize, usize)>,
    /// Linear CKA of the blocks' outputs; none for lists a person wrote.
    pub similarity: Vec<Vec<f64>>,
}

/// Draws the similarity of all blocks.
pub fn heat_map(similarity: &[Vec<f64>]) -> HeatMap {
    let names: Vec<String> = (0..similarity.len()).map(|block| block.to_string()).collect();
    HeatMap {
        title: "similarity of the blocks' outputs".to_owned(),
        value_label: "linear CKA".to_owned(),
        column_label: "block".to_owned(),
        rows: names.clone(),
        columns: names,
        values: similarity.iter().map(|row| row.iter().map(|v| Some(*v)).collect()).collect(),
    }
}

/// Writes a stand-in as a folder: the kept blocks, embeddings, last norm and head, the list of what
/// runs where, tokenizer and card. Of the removed blocks nothing is in it.
///
/// Returns its manifest.
///
/// # Errors
/// If the model's blocks differ by their place in a way that cannot be written down, or the folder
/// cannot be written.
pub fn write(prepared: &Prepared, choice: &Choice, output: &Path) -> Result<Manifest> {
    let opened = &prepared.opened;
    if let Some(head) = opened.checkpoint.fresh.first() {
        return Err(Error::Core(retune_core::Error::Unsupported {
            what: format!("an emulator of a model that has no `{head}` yet"),
            help: "give a recipe of texts or conversations, or a classifier that is trained"
                .to_owned(),
        }));
    }
    let (full, blocks) = (opened.checkpoint.model.spec(), &choice.blocks);
    let stored = |block: &usize| blocks.stored(*block).unwrap_or(0);
    let own = blocks.own_places();
    let mut manifest = Manifest {
        base: prepared.plan.model.name.clone(),
        base_sha256: opened.fingerprint.clone(),
        frozen_sha256: String::new(),
        depth: blocks.depth,
        kept_blocks: blocks.kept.clone(),
        trainable: blocks.trainable.iter().map(stored).collect(),
        kept: blocks.kept.iter().filter_map(|block| own[*block]).collect(),
        order: blocks.order.iter().map(stored).collect(),
    };
    let spec = small_spec(full, blocks, &manifest)?;
    let frozen: Vec<String> = spec
        .weights
        .iter()
        .filter(|weight| !manifest.trains(weight))
        .map(|weight| manifest.whole_name(weight))
        .collect();
    manifest.frozen_sha256 = hash_weights(&opened.weights, &frozen, &frozen)?;
    let spec = small_spec(full, blocks, &manifest)?;

    let mut others = Beside::of(&opened.checkpoint.path, prepared.tokenizer.as_ref())?.files();
    let card = card(prepared, blocks, &manifest, &spec, output);
    others.push(("README.md".to_owned(), card.into_bytes()));
    if !choice.similarity.is_empty() {
        let drawn = svg(&heat_map(&choice.similarity));
        others.push(("similarity.svg".to_owned(), drawn.into_bytes()));
    }
    let text = serde_json::to_string_pretty(choice)
        .unwrap_or_else(|error| unreachable!("a choice is always JSON: {error}"));
    others.push(("crash.json".to_owned(), text.into_bytes()));
    write_folder(output, &spec, own_dtype(prepared), SHARD_BYTES, &others, |weight| {
        opened.weights.values(&manifest.whole_name(weight))
    })?;
    Ok(manifest)
}

/// Returns the type the base is stored in, so that nothing is lost and nothing is blown up; F32 for
/// quantised bases.
pub(super) fn own_dtype(prepared: &Prepared) -> Dtype {
    let tensors = Safetensors::open(&prepared.located.path).ok();
    let widest = tensors.as_ref().and_then(|tensors| {
        let floats = tensors.tensors().map(|tensor| tensor.dtype).filter(|d| d.is_float());
        floats.max_by_key(|dtype| dtype.size())
    });
    widest.filter(|d| matches!(d, Dtype::BF16 | Dtype::F16)).unwrap_or(Dtype::F32)
}

/// Describes the stand-in: the configuration with fewer blocks, and the model it makes.
fn small_spec(full: &ModelSpec, blocks: &Blocks, manifest: &Manifest) -> Result<ModelSpec> {
    let mut config = full.config.clone();
    let unsupported = |what: String, help: &str| {
        Error::Core(retune_core::Error::Unsupported { what, help: help.to_owned() })
    };
    if full.has_sides() {
        let help = "use a model with one stack of blocks";
        return Err(unsupported(format!("an emulator of {}", full.class), help));
    }
    if config.get(EMULATOR_KEY).is_some() {
        let what = "an emulator of an emulator".to_owned();
        return Err(unsupported(what, "give the whole model"));
    }
    let kinds = config.get("layer_types").and_then(Value::as_array).cloned();
    let switched = config.get("use_sliding_window").and_then(Value::as_bool).unwrap_or(false);
    match kinds {
        Some(kinds) => {
            let kept: Vec<&Value> = blocks.kept.iter().filter_map(|b| kinds.get(*b)).collect();
            config["layer_types"] = json!(kept);
        }
        None if full.architecture.starts_with("gemma") || switched => {
            return Err(unsupported(
                format!("an emulator of {} whose windows follow the place of a block", full.class),
                "write `layer_types` into its config.json, one for each block",
            ));
        }
        None => {}
    }
    for key in LAYER_KEYS {
        if config.get(key).is_some() {
            config[key] = json!(blocks.kept.len());
        }
    }
    config[EMULATOR_KEY] = json!(manifest);
    let model = retune_models::build(&Config::new(Path::new("config.json"), config))?;
    Ok(ModelSpec::clone(model.spec()))
}

fn card(
    prepared: &Prepared,
    blocks: &Blocks,
    manifest: &Manifest,
    spec: &ModelSpec,
    output: &Path,
) -> String {
    let list =
        |blocks: &[usize]| blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let whole = prepared.opened.checkpoint.model.spec().count();
    let facts = [
        ("blocks of the whole model that are here", list(&blocks.kept)),
        ("of these to be trained", list(&blocks.trainable)),
        ("what runs at each place", list(&blocks.order)),
        ("values", format!("{} of {whole}", spec.count())),
    ];
    let title = output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
    let card = derived_card(&Derived {
        library: "retune",
        base: Some(&manifest.base),
        tag: "crash",
        title: &title,
        summary: "A stand-in for a larger model, made without training (CRaSh: Zhang et al., 2023, \
                  arXiv 2310.15477). Train the blocks named below on it, collect them with \
                  `retune crash collect` and send them back.",
        facts: &facts,
    });
    format!(
        "{card}\nIn a recipe with this folder as `model`:\n\n```toml\n{}```\n",
        manifest.recipe(spec)
    )
}
