//! `init`: a new model from a configuration.

use std::path::Path;

use retune_core::random::Seed;
use serde_json::json;

use super::compress::check_new;
use crate::failure::Failure;
use crate::table::grouped;

/// Draws the weights of a new model and writes it as a Hugging Face folder.
pub(crate) fn init(folder: &Path, seed: u64, output: &Path, json: bool) -> Result<(), Failure> {
    check_new(output)?;
    if let Some(parent) = output.parent() {
        std::fs::create_dir_all(parent).map_err(|error| {
            Failure::Failed(format!("{}: the folder cannot be made: {error}", parent.display()))
        })?;
    }
    let count = retune_run::init::init(folder, Seed(seed), output)?;
    if json {
        println!("{}", json!({"output": output, "num_parameters": count}));
    } else {
        println!("written: {}, {} values", output.display(), grouped(count as u64));
    }
    Ok(())
}
