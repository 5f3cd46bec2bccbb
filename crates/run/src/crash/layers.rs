//! Trained blocks on their way back: taken out of the stand-in, put into the whole model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retune_core::model::Tuned;
use retune_core::spec::WeightSpec;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_files::atomic::AtomicFolder;
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde::{Deserialize, Serialize};

use super::emulator::{Manifest, hash_weights};
use crate::card::{Derived, Outputs, derived_card, with_origins};
use crate::error::{Error, Result};
use crate::export::{Beside, check_mergeable, merged, write_weights};
use crate::open::Opened;

/// The file of trained blocks.
const FILE: &str = "layers.safetensors";
/// The key of what it says of itself.
const ABOUT: &str = "retune_crash";
/// Names that are listed at most.
const SHOWN: usize = 3;

/// What a file of trained blocks says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    manifest: Manifest,
}

/// What was collected or put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Blocks of the whole model.
    pub blocks: Vec<usize>,
    /// Their tensors.
    pub num_tensors: usize,
    /// Their values.
    pub num_values: usize,
}

fn wrong(path: &Path, what: &str, expected: String, found: String, help: &str) -> Error {
    let (path, help) = (path.to_path_buf(), help.to_owned());
    Error::Run { path, what: what.to_owned(), expected, found, help }
}

fn some(names: &[&str]) -> String {
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

/// Refuses a change of what must stay as it is.
///
/// `tuned` is the stand-in with an adapter, or a stand-in that was tuned whole.
fn check_frozen(path: &Path, manifest: &Manifest, tuned: &Tuned<'_>) -> Result<()> {
    check_mergeable(tuned)?;
    let spec = tuned.weights.spec();
    let frozen = |weight: &&WeightSpec| !manifest.trains(weight);
    let changed: Vec<&str> = spec
        .weights
        .iter()
        .filter(frozen)
        .map(|weight| weight.name.as_str())
        .filter(|name| !tuned.changes.of_weight(name).is_empty())
        .collect();
    let help = "train only these blocks; the emulator's README.md has the options";
    let expected = format!("changes of blocks {:?} of the emulator", manifest.trainable);
    if !changed.is_empty() {
        return Err(wrong(path, "frozen weights were trained", expected, some(&changed), help));
    }
    if frozen_hash(manifest, tuned.weights)? != manifest.frozen_sha256 {
        let found = "other frozen weights than the emulator was made with".to_owned();
        return Err(wrong(path, "frozen weights were trained", expected, found, help));
    }
    Ok(())
}

/// Hashes the frozen weights of a stand-in under their names in the whole model.
fn frozen_hash(manifest: &Manifest, weights: &Weights) -> Result<String> {
    let spec = weights.spec();
    let mut parts = Vec::new();
    for weight in spec.weights.iter().filter(|weight| !manifest.trains(weight)) {
        parts.push((weight.name.clone(), manifest.whole_name(weight)));
    }
    let names: Vec<String> = parts.iter().map(|(name, _)| name.clone()).collect();
    let whole: Vec<String> = parts.into_iter().map(|(_, whole)| whole).collect();
    hash_weights(weights, &names, &whole)
}

/// Takes the trained blocks out of a tuned stand-in and writes them as a folder to be sent back;
/// its card takes over those of `origins`, the adapter or model that was tuned.
///
/// # Errors
/// If `tuned` is no stand-in, something else than its trainable blocks was trained, or the disk is
/// full.
pub fn collect(
    path: &Path,
    tuned: &Tuned<'_>,
    origins: &[PathBuf],
    output: &Path,
) -> Result<Moved> {
    let spec = tuned.model.spec();
    let manifest = Manifest::read(path, spec)?;
    check_frozen(path, &manifest, tuned)?;
    let trained: Vec<&WeightSpec> =
        spec.weights.iter().filter(|weight| manifest.trains(weight)).collect();
    let moved = Moved {
        blocks: manifest.trainable.iter().map(|block| manifest.kept_blocks[*block]).collect(),
        num_tensors: trained.len(),
        num_values: trained.iter().map(|weight| weight.count()).sum(),
    };
    let specs: Vec<TensorSpec> = trained
        .iter()
        .map(|weight| {
            TensorSpec::new(manifest.whole_name(weight), Dtype::F32, weight.shape.clone())
        })
        .collect();
    let about = serde_json::to_string(&About { manifest: manifest.clone() })
        .unwrap_or_else(|error| unreachable!("a manifest is always JSON: {error}"));
    let metadata = BTreeMap::from([(ABOUT.to_owned(), about)]);
    let staging = AtomicFolder::create(output)?;
    let save = || -> Result<()> {
        let file = staging.path().join(FILE);
        let mut writer = SafetensorsWriter::create(&file, &specs, &metadata).map_err(core)?;
        for (weight, spec) in trained.iter().zip(&specs) {
            writer.write_f32(&spec.name, &merged(tuned, weight)?).map_err(core)?;
        }
        writer.finish().map_err(core)
    };
    save()?;
    let blocks: Vec<String> = moved.blocks.iter().map(ToString::to_string).collect();
    let card = derived_card(&Derived {
        library: "retune",
        base: Some(&manifest.base),
        tag: "crash",
        title: &output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "Blocks that were trained on a stand-in of the base (CRaSh: Zhang et al., 2023, \
                  arXiv 2310.15477). `retune crash plug-in` puts them into the whole model.",
        facts: &[
            ("blocks", blocks.join(", ")),
            ("values", moved.num_values.to_string()),
            ("base", format!("`{}`", manifest.base_sha256)),
        ],
    });
    let card = with_origins(&card, origins, Outputs::Moved);
    std::fs::write(staging.path().join("README.md"), card).map_err(|e| staging.error(e))?;
    staging.commit()?;
    Ok(moved)
}

fn core(error: retune_files::SaveError) -> Error {
    retune_core::Error::from(error).into()
}

/// Puts trained blocks into the whole model and writes it as a Hugging Face folder.
///
/// # Errors
/// If the blocks were trained on a stand-in of another model, a tensor is missing or misshapen, or
/// the folder cannot be written. With `force` a whole model of the same frozen weights but
/// another hash is taken.
pub fn plug_in(
    base: &Opened,
    tuned: &Tuned<'_>,
    beside: &Beside,
    layers: &Path,
    dtype: Dtype,
    force: bool,
    output: &Path,
) -> Result<Moved> {
    let path = layers.join(FILE);
    let file = SafetensorsFile::open(&path).map_err(retune_core::Error::from)?;
    let about = file.metadata().get(ABOUT).and_then(|text| serde_json::from_str(text).ok());
    let Some(About { manifest }) = about else {
        return Err(wrong(
            &path,
            "these are no trained blocks",
            "a folder `retune crash collect` wrote".to_owned(),
            format!("no `{ABOUT}` in the file's metadata"),
            "collect them from the tuned emulator",
        ));
    };
    let spec = base.checkpoint.model.spec();
    let help = "give the model the emulator was made of";
    if manifest.base_sha256 != base.fingerprint && !force {
        let found = format!("{} ({})", base.checkpoint.path.display(), base.fingerprint);
        let expected = format!("{} ({})", manifest.base, manifest.base_sha256);
        return Err(wrong(&path, "the blocks belong to another model", expected, found, help));
    }
    let trained: Vec<usize> = manifest
        .trainable
        .iter()
        .filter_map(|block| manifest.kept_blocks.get(*block).copied())
        .collect();
    let is_trained = |w: &WeightSpec| w.layer.is_some_and(|layer| trained.contains(&layer));
    let is_kept = |weight: &WeightSpec| {
        !is_trained(weight)
            && weight.layer.is_none_or(|layer| manifest.kept_blocks.contains(&layer))
    };
    let frozen: Vec<String> =
        spec.weights.iter().filter(|w| is_kept(w)).map(|w| w.name.clone()).collect();
    if hash_weights(&base.weights, &frozen, &frozen)? != manifest.frozen_sha256 {
        return Err(wrong(
            &path,
            "the blocks were trained beside other frozen weights",
            format!("a hash of {}", manifest.frozen_sha256),
            "another".to_owned(),
            help,
        ));
    }
    let mut misfit = Vec::new();
    for weight in spec.weights.iter().filter(|weight| is_trained(weight)) {
        match file.get(&weight.name) {
            None => misfit.push(format!("`{}` is missing", weight.name)),
            Some(found) if found.shape != weight.shape => misfit.push(format!(
                "`{}` has shape {:?}, expected {:?}",
                weight.name, found.shape, weight.shape
            )),
            Some(_) => {}
        }
    }
    let surplus = file.names().filter(|name| !spec.weight(name).is_some_and(is_trained));
    misfit.extend(surplus.map(|name| format!("`{name}` is in no trained block")));
    if !misfit.is_empty() {
        let names: Vec<&str> = misfit.iter().map(String::as_str).collect();
        let expected = format!("the weights of blocks {trained:?}");
        return Err(wrong(&path, "the blocks do not fit the model", expected, some(&names), help));
    }
    let card = derived_card(&Derived {
        library: "transformers",
        base: Some(&manifest.base),
        tag: "crash",
        title: &output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "A model with blocks that were trained on a stand-in of it (CRaSh: Zhang et al., \
                  2023, arXiv 2310.15477).",
        facts: &[("blocks trained", format!("{trained:?}"))],
    });
    let card = with_origins(&card, &[layers.to_path_buf()], Outputs::Moved);
    write_weights(&[tuned], spec, beside, dtype, &card, output, |weight| {
        match file.get(&weight.name) {
            Some(found) => Ok(found.to_f32()?),
            None => base.weights.values(&weight.name),
        }
    })?;
    Ok(Moved {
        blocks: trained,
        num_tensors: file.len(),
        num_values: file.tensors().map(|tensor| tensor.shape.iter().product::<usize>()).sum(),
    })
}
