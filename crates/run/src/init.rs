//! A new model: weights drawn from a seed, for a configuration that has none.

use std::path::Path;

use crate::card::{Derived, derived_card};
use crate::error::Result;
use crate::export::Beside;
use retune_core::random::Seed;
use retune_data::tokenizer::Tokenizer;
use retune_files::Dtype;
use retune_models::export::{SHARD_BYTES, write_folder};
use retune_models::{Beginning, build, read_config};

/// Draws the weights of the model a folder's `config.json` describes and writes it with what else a
/// model needs of the folder; returns the number of values.
///
/// # Errors
/// If the configuration cannot be used, the tokenizer is missing for a model that reads text, or
/// the disk is full.
pub fn init(folder: &Path, seed: Seed, output: &Path) -> Result<usize> {
    let config = read_config(folder)?;
    let model = build(&config)?;
    let spec = model.spec();
    let beginning = Beginning::read(&config, spec, seed)?;
    let tokenizer = if spec.vocabulary > 0 { Some(Tokenizer::from_folder(folder)?) } else { None };
    if let Some(tokenizer) = &tokenizer {
        tokenizer.check_fits(spec.vocabulary)?;
    }
    let mut files = Beside::of(folder, tokenizer.as_ref())?.files();
    let card = derived_card(&Derived {
        library: "transformers",
        base: None,
        tag: "from-scratch",
        title: &output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "A model whose weights are drawn at random: it knows nothing yet.",
        facts: &[("class", spec.class.clone()), ("seed", seed.0.to_string())],
    });
    files.push(("README.md".to_owned(), card.into_bytes()));
    write_folder(output, spec, Dtype::F32, SHARD_BYTES, &files, |weight| {
        Ok(beginning.values(weight))
    })?;
    Ok(spec.count())
}
