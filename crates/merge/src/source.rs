//! Weights to be transformed: a Hugging Face folder or one safetensors file, read tensor by tensor.

use std::path::{Path, PathBuf};

use retune_files::safetensors::{Safetensors, TensorSpec, TensorView};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Largest configuration read, in bytes; real ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Weights that are read one tensor at a time.
#[derive(Debug, Clone)]
pub struct Source {
    path: PathBuf,
    tensors: Safetensors,
}

impl Source {
    /// Opens a folder (one file or shards with an index), an index, or one safetensors file. Reads
    /// no weights.
    ///
    /// # Errors
    /// [`Error::Content`] if there is nothing at `path`, [`Error::Read`] if a file is missing or
    /// damaged.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::Content {
                path: path.to_path_buf(),
                what: "there are no weights here".to_owned(),
                expected: "a model folder or a safetensors file".to_owned(),
                found: "nothing".to_owned(),
                help: "check the path; relative paths start where the program runs".to_owned(),
            });
        }
        Ok(Self { path: path.to_path_buf(), tensors: Safetensors::open(path)? })
    }

    /// Returns the path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the folder that holds the weights and whatever lies beside them.
    pub fn folder(&self) -> &Path {
        if self.path.is_dir() { &self.path } else { self.path.parent().unwrap_or(Path::new("")) }
    }

    /// Returns the files of the checkpoint.
    pub fn files(&self) -> &Safetensors {
        &self.tensors
    }

    /// Lists name, type and shape of all tensors, in alphabetical order.
    pub fn specs(&self) -> impl Iterator<Item = TensorSpec> {
        self.tensors.tensors().map(|t| TensorSpec::new(t.name, t.dtype, t.shape))
    }

    /// Looks up a tensor that may be absent. Its view reads parts by
    /// [`TensorView::read_f32`], which keeps whole models out of the process's memory.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name)
    }

    /// Looks up a tensor that must be there.
    ///
    /// # Errors
    /// [`Error::Read`] with near names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        Ok(self.tensors.tensor(name)?)
    }

    /// Reads one tensor as `f32`.
    ///
    /// # Errors
    /// [`Error::Read`] if there is none, the system refuses, or a value is beyond `f32`.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let mut values = vec![0.0; tensor.len()];
        tensor.read_f32(0, &mut values, &mut Vec::new())?;
        Ok(values)
    }

    /// Reads `config.json` beside the weights; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Content`] if it is not an object of JSON.
    pub fn config(&self) -> Result<Option<Map<String, Value>>> {
        read_json_object(&self.folder().join("config.json"))
    }
}

/// Reads a file that holds one JSON object; `None` where there is none.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Content`] if it is something else.
pub fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let wrong = |found: String| Error::Content {
        path: path.to_path_buf(),
        what: "this file is damaged".to_owned(),
        expected: "one JSON object".to_owned(),
        found,
        help: "copy or download it again".to_owned(),
    };
    let bytes = std::fs::metadata(path).map_err(Error::io(path, "read"))?.len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(wrong(format!("{bytes} bytes, more than any configuration has")));
    }
    let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(wrong("other JSON".to_owned())),
        Err(error) => Err(wrong(error.to_string())),
    }
}
