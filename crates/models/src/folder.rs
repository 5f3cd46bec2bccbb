//! Hugging Face folders: `config.json` and safetensors, single or sharded.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use retune_core::spec::ModelSpec;
use retune_core::weights::{Stored, WeightSource};
use retune_core::{Error, Result};
use retune_files::safetensors::Safetensors;

/// The weights of a folder, under the names of the model's class.
#[derive(Debug)]
pub struct FolderSource {
    tensors: Safetensors,
    /// The class's name of each tensor to the name in the file.
    names: BTreeMap<String, String>,
}

impl FolderSource {
    /// Opens the safetensors of a folder for a model.
    ///
    /// A checkpoint of the bare encoder or decoder lacks the class's prefix (`bert.`, `model.`,
    /// `transformer.`); the prefix is added where that makes the names fit.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn open(path: &Path, spec: &ModelSpec) -> Result<Self> {
        let tensors = Safetensors::open(path)?;
        let prefixes = ["", "model.", "bert.", "roberta.", "transformer."];
        let fits = |prefix: &str| {
            spec.weights
                .iter()
                .filter(|weight| {
                    let stored = weight.name.strip_prefix(prefix);
                    stored.is_some_and(|stored| tensors.get(stored).is_some())
                })
                .count()
        };
        // The first of equals wins, so that names that fit as they are stay as they are.
        let mut best = ("", fits(""));
        for prefix in &prefixes[1..] {
            let count = fits(prefix);
            if count > best.1 {
                best = (prefix, count);
            }
        }
        let (prefix, _) = best;
        let names =
            tensors.names().map(|name| (format!("{prefix}{name}"), name.to_owned())).collect();
        Ok(Self { tensors, names })
    }
}

impl WeightSource for FolderSource {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.tensors.get(self.names.get(name)?)?.shape.to_vec())
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let stored = self.names.get(name).map_or(name, String::as_str);
        Ok(Stored::Values(self.tensors.tensor(stored)?.to_f32()?))
    }
}

/// Reads `config.json` of a folder.
///
/// # Errors
/// If it is absent or not JSON.
pub fn read_config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let content = |what: &str, found: String| Error::Content {
        path: path.clone(),
        what: what.to_owned(),
        expected: "the configuration of a Hugging Face model".to_owned(),
        found,
        help: "give a folder with config.json and model.safetensors, or a .gguf file".to_owned(),
    };
    let text = std::fs::read_to_string(&path)
        .map_err(|error| content("the file cannot be read", error.to_string()))?;
    let value = serde_json::from_str(&text)
        .map_err(|error| content("the file is not JSON", error.to_string()))?;
    Ok(Config::new(&path, value))
}
