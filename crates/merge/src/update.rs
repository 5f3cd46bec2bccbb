//! What tuning changed: an adapter, or a tuned model less its base.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retune_files::safetensors::{Safetensors, TensorView};
use serde_json::Value;

use crate::{Error, Result};

/// What an update is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Zero: the factors of LoRA.
    Zero,
    /// What LoRA drew before training, where that is known; zero elsewhere.
    Seeded,
    /// One: the gains of IA3.
    One,
    /// The weights of the base.
    Base,
}

impl Start {
    /// Returns the name files store.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Seeded => "seeded",
            Self::One => "one",
            Self::Base => "base",
        }
    }
}

/// One tensor of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether it is a change; otherwise it is kept as it is (biases, whole modules, counters).
    pub is_change: bool,
}

/// An update whose tensors are read one at a time.
#[derive(Debug, Clone)]
pub struct Update {
    path: PathBuf,
    tuned: Safetensors,
    base: Option<Safetensors>,
    config: Option<String>,
    start: Start,
    drawn: BTreeMap<String, Vec<f32>>,
    parts: Vec<Part>,
}

/// Ends of names whose tensors are changes, per adapter type of PEFT, and what they start from.
///
/// A tensor of another name is kept whole. Types are listed only where every start is known.
const ADAPTERS: &[(&str, Start, &[&str])] = &[
    (
        "LORA",
        Start::Zero,
        &[
            ".lora_A.weight",
            ".lora_B.weight",
            ".lora_A.bias",
            ".lora_B.bias",
            ".lora_embedding_A",
            ".lora_embedding_B",
        ],
    ),
    ("IA3", Start::One, &[".ia3_l"]),
];

impl Update {
    /// Opens an adapter folder of PEFT. Reads no weights.
    ///
    /// # Errors
    /// [`Error`] if the folder is no adapter, is compressed already, or of a type whose starting
    /// point is not known.
    pub fn adapter(folder: &Path) -> Result<Self> {
        let path = folder.join("adapter_config.json");
        let wrong = |path: &Path, expected: &str, found: String| Error::Content {
            path: path.to_path_buf(),
            what: "this is no adapter that can be transformed".to_owned(),
            expected: expected.to_owned(),
            found,
            help: "give the folder that holds adapter_config.json and adapter_model.safetensors"
                .to_owned(),
        };
        if folder.extension().is_some_and(|end| end == "compeft")
            || folder.join("adapter_model.compeft").exists()
        {
            return Err(Error::Content {
                path: folder.to_path_buf(),
                what: "this is compressed already".to_owned(),
                expected: "an adapter as it was trained".to_owned(),
                found: "a ComPEFT file".to_owned(),
                help: "give the adapter it was made from, or decompress it first".to_owned(),
            });
        }
        let text = std::fs::read_to_string(&path)
            .map_err(|e| wrong(&path, "the adapter_config.json of PEFT", e.to_string()))?;
        let config: Value = serde_json::from_str(&text)
            .map_err(|e| wrong(&path, "the adapter_config.json of PEFT", e.to_string()))?;
        let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
        let Some((_, start, ends)) = ADAPTERS.iter().find(|(name, ..)| *name == kind) else {
            let known: Vec<&str> = ADAPTERS.iter().map(|(name, ..)| *name).collect();
            let expected =
                format!("one of the adapter types whose start is known: {}", known.join(", "));
            return Err(wrong(&path, &expected, format!("`peft_type` {kind}")));
        };
        let tuned = Safetensors::open(folder.join("adapter_model.safetensors"))?;
        let parts: Vec<Part> = tuned
            .tensors()
            .map(|tensor| Part {
                name: tensor.name.to_owned(),
                shape: tensor.shape.to_vec(),
                is_change: tensor.dtype.is_float()
                    && ends.iter().any(|end| tensor.name.ends_with(end)),
            })
            .collect();
        if !parts.iter().any(|part| part.is_change) {
            let names: Vec<&str> = tuned.names().take(3).collect();
            let expected = format!("tensors whose names end in one of {}", ends.join(", "));
            return Err(wrong(folder, &expected, names.join(", ")));
        }
        let (path, start) = (folder.to_path_buf(), *start);
        Ok(Self {
            path,
            tuned,
            base: None,
            config: Some(text),
            start,
            drawn: BTreeMap::new(),
            parts,
        })
    }

    /// Takes the values factors were drawn with as their start, if they are nearer to the trained
    /// ones than zero is; tells whether they are.
    ///
    /// They are not where the seed is another one: two draws are further apart than either is from
    /// zero.
    ///
    /// # Errors
    /// [`Error`] if a tensor cannot be read, or has another size.
    pub fn start_from(&mut self, drawn: BTreeMap<String, Vec<f32>>) -> Result<bool> {
        let (mut moved, mut size) = (0.0, 0.0);
        for (name, start) in &drawn {
            let values = self.tuned.tensor(name)?.to_f32()?;
            if values.len() != start.len() {
                return Err(Error::Content {
                    path: self.path.clone(),
                    what: format!("`{name}` has another size than what it started from"),
                    expected: start.len().to_string(),
                    found: values.len().to_string(),
                    help: "give the recipe this adapter was trained with".to_owned(),
                });
            }
            for (value, start) in values.iter().zip(start) {
                moved += f64::from(value - start).powi(2);
                size += f64::from(*value).powi(2);
            }
        }
        if self.start != Start::Zero || drawn.is_empty() || moved >= size {
            return Ok(false);
        }
        (self.start, self.drawn) = (Start::Seeded, drawn);
        Ok(true)
    }

    /// Opens a tuned model beside its base. Reads no weights.
    ///
    /// # Errors
    /// [`Error`] if a tensor of the base is missing from the tuned model or has another shape.
    pub fn full(tuned_path: &Path, base_path: &Path) -> Result<Self> {
        let (tuned, base) = (Safetensors::open(tuned_path)?, Safetensors::open(base_path)?);
        let wrong = |what: &str, expected: String, found: String| Error::Content {
            path: tuned_path.to_path_buf(),
            what: what.to_owned(),
            expected,
            found,
            help: format!("check that {} is the base it was tuned from", base_path.display()),
        };
        let missing: Vec<&str> = base.names().filter(|name| tuned.get(name).is_none()).collect();
        if let Some(first) = missing.first() {
            let surplus: Vec<&str> =
                tuned.names().filter(|name| base.get(name).is_none()).take(3).collect();
            return Err(wrong(
                "tensors of the base are missing",
                format!("all tensors of {}", base_path.display()),
                format!(
                    "no `{first}` and {} more; its own names: {}",
                    missing.len() - 1,
                    if surplus.is_empty() { "none".to_owned() } else { surplus.join(", ") }
                ),
            ));
        }
        let mut parts = Vec::new();
        for tensor in tuned.tensors() {
            let is_change = match base.get(tensor.name) {
                None => false,
                Some(before) if before.shape != tensor.shape => {
                    return Err(wrong(
                        &format!("`{}` has another shape", tensor.name),
                        format!("{:?}", before.shape),
                        format!("{:?}", tensor.shape),
                    ));
                }
                Some(before) if !(tensor.dtype.is_float() && before.dtype.is_float()) => {
                    // Counters and masks are no weights; where they are the base's own, they need
                    // not be kept.
                    if before.dtype == tensor.dtype && before.bytes == tensor.bytes {
                        continue;
                    }
                    false
                }
                Some(_) => true,
            };
            parts.push(Part {
                name: tensor.name.to_owned(),
                shape: tensor.shape.to_vec(),
                is_change,
            });
        }
        let path = tuned_path.to_path_buf();
        Ok(Self {
            path,
            tuned,
            base: Some(base),
            config: None,
            start: Start::Base,
            drawn: BTreeMap::new(),
            parts,
        })
    }

    /// Returns the path of the adapter or tuned model.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what the changes are added to.
    pub fn start(&self) -> Start {
        self.start
    }

    /// Returns the text of `adapter_config.json`, where it is an adapter.
    pub fn config(&self) -> Option<&str> {
        self.config.as_deref()
    }

    /// Lists the tensors in alphabetical order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Returns the bytes of a tensor that is kept as it is.
    ///
    /// # Errors
    /// [`Error::Read`] if there is no such tensor.
    pub fn kept(&self, part: &Part) -> Result<TensorView<'_>> {
        Ok(self.tuned.tensor(&part.name)?)
    }

    /// Computes a tensor of changes.
    ///
    /// # Errors
    /// [`Error::Content`] for a value that is not finite, naming tensor and index.
    pub fn change(&self, part: &Part) -> Result<Vec<f32>> {
        let mut values = self.tuned.tensor(&part.name)?.to_f32()?;
        match (self.start, &self.base) {
            (Start::Base, Some(base)) => {
                let before = base.tensor(&part.name)?.to_f32()?;
                for (value, before) in values.iter_mut().zip(before) {
                    *value -= before;
                }
            }
            (Start::Seeded, _) => {
                for (value, start) in
                    values.iter_mut().zip(self.drawn.get(&part.name).into_iter().flatten())
                {
                    *value -= start;
                }
            }
            (Start::One, _) => values.iter_mut().for_each(|value| *value -= 1.0),
            _ => {}
        }
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(Error::Content {
                path: self.path.clone(),
                what: format!("`{}` cannot be used", part.name),
                expected: "finite numbers".to_owned(),
                found: format!("a change of {} at index {index}", values[index]),
                help: "use a checkpoint from before the training diverged".to_owned(),
            }),
        }
    }
}

/// Writes a safetensors file for a test.
#[cfg(test)]
pub(crate) fn write_tensors(path: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    use retune_files::Dtype;
    use retune_files::safetensors::{TensorSpec, write_safetensors};
    let encoded: Vec<(TensorSpec, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let bytes = Dtype::F32.encode(values).expect("F32 holds every f32");
            (TensorSpec::new(*name, Dtype::F32, *shape), bytes)
        })
        .collect();
    let list: Vec<_> = encoded.iter().map(|(spec, bytes)| (spec.clone(), &bytes[..])).collect();
    write_safetensors(path, &list, &BTreeMap::new()).expect("a file for a test");
}
