//! Hugging Face folders: `config.json` and safetensors, single or sharded.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::config::Config;
use retune_core::kernels::matrix::SharedBytes;
use retune_core::spec::ModelSpec;
use retune_core::weights::{Stored, WeightSource};
use retune_core::{Error, Result};
use retune_files::safetensors::Safetensors;

/// A configuration of more bytes than this is not read.
const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// The weights of a folder, under the names of the model's class.
#[derive(Debug)]
pub struct FolderSource {
    tensors: Safetensors,
    /// The class's name of each tensor to the name in the file.
    names: BTreeMap<String, String>,
}

/// What a file's names lack or have too much against the class's.
#[derive(Debug, Clone, Copy)]
enum Prefix {
    Same,
    Add(&'static str),
    Strip(&'static str),
}

impl Prefix {
    fn apply(self, stored: &str) -> String {
        // Encoders converted from TensorFlow keep that library's words for gain and shift.
        let stored = stored
            .strip_suffix("LayerNorm.gamma")
            .map(|rest| format!("{rest}LayerNorm.weight"))
            .or_else(|| stored.strip_suffix("LayerNorm.beta").map(|r| format!("{r}LayerNorm.bias")))
            .unwrap_or_else(|| stored.to_owned());
        match self {
            Self::Same => stored,
            Self::Add(prefix) => format!("{prefix}{stored}"),
            Self::Strip(prefix) => stored.strip_prefix(prefix).unwrap_or(&stored).to_owned(),
        }
    }
}

impl FolderSource {
    /// Opens the safetensors of a folder for a model. Reads no weights.
    ///
    /// A checkpoint of the bare model lacks what stands before its names in a class with a head
    /// (`bert.`, `model.`, `transformer.`, `vit.`), and the other way round; it is added or taken away
    /// where that makes the names fit.
    ///
    /// # Errors
    /// If the files cannot be read.
    pub fn open(path: &Path, spec: &ModelSpec) -> Result<Self> {
        Ok(Self::new(Safetensors::open(path)?, spec))
    }

    /// Takes the safetensors of a folder for a model, as [`FolderSource::open`].
    pub fn new(tensors: Safetensors, spec: &ModelSpec) -> Self {
        let mut ways = vec![Prefix::Same];
        for prefix in ["model.", "bert.", "transformer.", "vit."] {
            ways.extend([Prefix::Add(prefix), Prefix::Strip(prefix)]);
        }
        let rename = |way: Prefix| -> BTreeMap<String, String> {
            tensors.names().map(|name| (way.apply(name), name.to_owned())).collect()
        };
        let fits = |names: &BTreeMap<String, String>| {
            spec.weights.iter().filter(|weight| names.contains_key(&weight.name)).count()
        };
        // The first of equals wins, so that names that fit as they are stay as they are.
        let mut names = rename(Prefix::Same);
        let mut most = fits(&names);
        for way in ways {
            let renamed = rename(way);
            let count = fits(&renamed);
            if count > most {
                (names, most) = (renamed, count);
            }
        }
        Self { tensors, names }
    }
}

impl WeightSource for FolderSource {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.tensors.get(self.names.get(name)?)?.shape.to_vec())
    }

    fn shared_f32(&self, name: &str) -> Option<SharedBytes> {
        let tensor = self.tensors.get(self.names.get(name)?)?;
        tensor.as_f32()?;
        Some(Arc::new(tensor.share()))
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let stored = self.names.get(name).map_or(name, String::as_str);
        let tensor = self.tensors.tensor(stored)?;
        // Read rather than mapped: touched pages of the file would count beside the copy.
        let mut values = vec![0.0; tensor.shape.iter().product()];
        tensor.read_f32(0, &mut values, &mut Vec::new())?;
        Ok(Stored::Values(values))
    }
}

/// Reads `config.json` of a folder.
///
/// # Errors
/// If it is absent, too large or not a JSON object.
pub fn read_config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let content = |what: &str, found: String| Error::Content {
        path: path.clone(),
        what: what.to_owned(),
        expected: "the configuration of a Hugging Face model".to_owned(),
        found,
        help: "give a folder with config.json and model.safetensors, or a .gguf file".to_owned(),
    };
    let unreadable = |error: std::io::Error| content("the file cannot be read", error.to_string());
    let bytes = std::fs::metadata(&path).map_err(unreadable)?.len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(content("the file is too large", format!("{bytes} bytes")));
    }
    let text = std::fs::read_to_string(&path).map_err(unreadable)?;
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| content("the file is not JSON", error.to_string()))?;
    if !value.is_object() {
        return Err(content("the file is not a JSON object", "another JSON value".to_owned()));
    }
    Ok(Config::new(&path, value))
}
