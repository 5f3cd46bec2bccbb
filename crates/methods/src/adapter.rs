//! Adapter folders in the layout of the PEFT library, both directions.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use retune_core::method::{FileIntegers, FileTensors, Method};
use retune_core::parameters::{ParameterId, Parameters, integer_bytes};
use retune_core::spec::{Head, ModelSpec};
use retune_core::{Error, Result};
use retune_files::Dtype;
use retune_files::atomic::AtomicFolder;
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde_json::{Map, Value, json};

use crate::state::prompt;
use crate::{adapterhub, compressed, difference, registry};

/// What PEFT puts before a module's path.
pub const PREFIX: &str = "base_model.model.";

/// The key that holds a classifier's class names, without which its head has no place in a base that
/// classifies nothing.
pub const LABELS: &str = "retune_labels";

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Returns the keys every `adapter_config.json` has.
pub fn peft_config(peft_type: &str, spec: &ModelSpec) -> Map<String, Value> {
    let task = match spec.head {
        Head::Language { .. } if spec.decoder_start().is_some() => "SEQ_2_SEQ_LM",
        Head::Language { .. } => "CAUSAL_LM",
        Head::Classes { .. } => "SEQ_CLS",
        Head::Embedding | Head::Pairs => "FEATURE_EXTRACTION",
    };
    let mut map = Map::new();
    for (key, value) in [
        ("peft_type", json!(peft_type)),
        ("task_type", json!(task)),
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", Value::Null),
        ("revision", Value::Null),
        ("inference_mode", json!(true)),
        ("peft_version", json!("0.21.2")),
    ] {
        map.insert(key.to_owned(), value);
    }
    map
}

/// An adapter as it lies in a folder.
#[derive(Debug, Clone, Default)]
pub struct Adapter {
    /// `adapter_config.json`.
    pub config: Value,
    /// Every tensor of floats: name, shape, values in the orientation of the file.
    pub tensors: FileTensors,
    /// Every tensor of whole numbers: name, type, shape, values.
    pub integers: FileIntegers,
}

/// The identity of the base a trained adapter is for, kept in the adapter's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseIdentity {
    /// The name the recipe used.
    pub name: String,
    /// SHA-256 over the base's weights.
    pub fingerprint: String,
    /// Adapters that were merged into the base before it trained.
    pub under: Vec<Lower>,
}

/// An adapter that another was trained on top of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lower {
    /// Its folder, as a person knows it.
    pub name: String,
    /// What [`Adapter::fingerprint`] says.
    pub fingerprint: String,
}

impl BaseIdentity {
    /// Notes the base in an adapter's configuration.
    pub(crate) fn write(&self, config: &mut Value) {
        if let Value::Object(map) = config {
            map.insert("base_model_name_or_path".to_owned(), json!(self.name));
            let identity = json!({"name": self.name, "fingerprint": self.fingerprint});
            map.insert(IDENTITY.to_owned(), identity);
            if !self.under.is_empty() {
                let under = self.under.iter();
                let of = |l: &Lower| json!({"name": l.name, "fingerprint": l.fingerprint});
                map.insert(UNDER.to_owned(), under.map(of).collect());
            }
        }
    }
}

/// The key of [`BaseIdentity`] in `adapter_config.json`; PEFT drops keys it does not know.
const IDENTITY: &str = "retune_base";
/// The key of the adapters that lay under it.
const UNDER: &str = "retune_trained_on";

impl Adapter {
    /// Collects what a method trained.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the method's result is a whole model, not an adapter.
    pub fn collect(
        method: &dyn Method,
        spec: &ModelSpec,
        parameters: &Parameters,
        base: Option<&BaseIdentity>,
    ) -> Result<Self> {
        let mut config = method.adapter_config(spec).ok_or_else(|| Error::Unsupported {
            what: format!("writing `{}` as an adapter", method.card().name),
            help: "save the whole model instead (`retune export`)".to_owned(),
        })?;
        if let Some(base) = base {
            base.write(&mut config);
            if let Head::Classes { labels } = &spec.head {
                config[LABELS] = json!(labels);
            }
        }
        method.describe(parameters, &mut config);
        let mut adapter = Self { config, tensors: BTreeMap::new(), integers: BTreeMap::new() };
        for (id, p) in parameters.iter().filter(|(_, p)| p.saved) {
            let (name, shape) = (p.name.clone(), p.shape.clone());
            if let Some(support) = parameters.support(id) {
                let columns = support.matrix[1].max(1) as i64;
                let places = || support.indices.iter().map(|index| i64::from(*index));
                let indices = places().map(|i| i / columns).chain(places().map(|i| i % columns));
                let of = (Dtype::I32, vec![2, support.indices.len()], indices.collect());
                adapter.integers.insert(indices_name(&name), of);
            }
            if p.dtype() == Dtype::F32 {
                adapter.tensors.insert(name, (shape, parameters.values(id)));
            } else {
                let values = parameters.integers(id).iter().map(|v| i64::from(*v)).collect();
                adapter.integers.insert(name, (p.dtype(), shape, values));
            }
        }
        method.fold(parameters, &mut adapter.tensors);
        Ok(adapter)
    }

    /// Reads a folder, or a file that ComPEFT compressed.
    ///
    /// # Errors
    /// If a file is missing, damaged, or not of an adapter.
    pub fn read(folder: &Path) -> Result<Self> {
        if let Some(file) = compressed::find(folder) {
            return compressed::read(&file);
        }
        let path = folder.join(CONFIG);
        let wrong = |what: &str, found: String| {
            let inside = folder.join("adapter");
            let run = inside.join(CONFIG).is_file().then(|| format!("`{}`, ", inside.display()));
            Error::Content {
                path: path.clone(),
                what: what.to_owned(),
                expected: "the adapter_config.json of a PEFT adapter".to_owned(),
                found,
                help: format!(
                    "give {}the folder that holds adapter_config.json and adapter_model.safetensors",
                    run.unwrap_or_default()
                ),
            }
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|error| wrong("the file cannot be read", error.to_string()))?;
        let config: Value = serde_json::from_str(&text)
            .map_err(|error| wrong("the file is not JSON", error.to_string()))?;
        if adapterhub::is_config(&config) {
            return adapterhub::read(folder, &config);
        }
        let file = SafetensorsFile::open(folder.join(TENSORS))?;
        let mut adapter = Self { config, tensors: BTreeMap::new(), integers: BTreeMap::new() };
        for view in file.tensors() {
            let (name, shape) = (view.name.to_owned(), view.shape.to_vec());
            if matches!(view.dtype, Dtype::U8 | Dtype::I16 | Dtype::I32 | Dtype::I64) {
                adapter.integers.insert(name, (view.dtype, shape, view.to_i64()?));
            } else {
                adapter.tensors.insert(name, (shape, view.to_f32()?));
            }
        }
        prompt::drop_unread(&mut adapter.config, &mut adapter.tensors);
        Ok(adapter)
    }

    /// Writes a folder; it is there whole or not at all.
    ///
    /// # Errors
    /// If the disk is full or the place read-only.
    pub fn write(&self, folder: &Path, card: &str) -> Result<()> {
        let staging = AtomicFolder::create(folder)?;
        let text = pretty_sorted(&self.config);
        for (name, text) in [(CONFIG, text.as_str()), ("README.md", card)] {
            std::fs::write(staging.path().join(name), text).map_err(|e| staging.error(e))?;
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let floats = self.tensors.iter().map(|(name, (shape, _))| (name, Dtype::F32, shape));
        let integers = self.integers.iter().map(|(name, (dtype, shape, _))| (name, *dtype, shape));
        let mut specs: Vec<TensorSpec> = floats
            .chain(integers)
            .map(|(name, dtype, shape)| TensorSpec::new(name, dtype, shape.clone()))
            .collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        let file = staging.path().join(TENSORS);
        let mut writer = SafetensorsWriter::create(&file, &specs, &metadata)?;
        for TensorSpec { name, .. } in &specs {
            match (self.tensors.get(name), self.integers.get(name)) {
                (Some((_, values)), _) => writer.write_f32(name, values)?,
                (None, Some((dtype, _, values))) => {
                    let values: Vec<i32> = values.iter().map(|value| *value as i32).collect();
                    writer.write(name, &integer_bytes(&values, *dtype))?;
                }
                (None, None) => unreachable!("the list is made of the two maps"),
            }
        }
        writer.finish()?;
        staging.replace()?;
        Ok(())
    }

    /// Returns the base this adapter was trained on, where the file says so.
    pub fn base(&self) -> Option<BaseIdentity> {
        let base = self.config.get(IDENTITY)?;
        Some(BaseIdentity {
            name: base.get("name")?.as_str()?.to_owned(),
            fingerprint: base.get("fingerprint")?.as_str()?.to_owned(),
            under: self.trained_on(),
        })
    }

    /// Returns the adapters this one was trained on top of, where the file says so.
    pub fn trained_on(&self) -> Vec<Lower> {
        let list = self.config.get(UNDER).and_then(Value::as_array);
        let text = |value: &Value, key: &str| Some(value.get(key)?.as_str()?.to_owned());
        list.into_iter()
            .flatten()
            .filter_map(|lower| {
                Some(Lower { name: text(lower, "name")?, fingerprint: text(lower, "fingerprint")? })
            })
            .collect()
    }

    /// Computes the SHA-256 an adapter is recognised by: of names, shapes and values.
    pub fn fingerprint(&self) -> String {
        let mut bytes = Vec::new();
        for (name, (shape, values)) in &self.tensors {
            bytes.extend(format!("{name} {shape:?}\n").into_bytes());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        for (name, (_, shape, values)) in &self.integers {
            bytes.extend(format!("{name} {shape:?}\n").into_bytes());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        retune_files::sha256(&bytes)
    }

    /// Returns the method this adapter was made with.
    ///
    /// # Errors
    /// If the type is unknown, or a setting of it is not supported.
    pub fn method(&self) -> Result<Box<dyn Method>> {
        if self.config.get("peft_type").is_some_and(|kind| kind == difference::PEFT_TYPE) {
            return Ok(Box::new(difference::Difference::from_adapter(&self.config)?));
        }
        registry::from_adapter(&self.config)
    }

    /// Puts the adapter's values into parameters that its method has made.
    ///
    /// # Errors
    /// [`Error::Content`] that lists every tensor that is missing, surplus or misshapen.
    pub fn fill(&self, folder: &Path, parameters: &mut Parameters) -> Result<()> {
        self.fill_as(&*self.method()?, folder, parameters)
    }

    /// Puts the adapter's values into parameters that `method` has made, whatever the registry says.
    ///
    /// # Errors
    /// As [`Adapter::fill`].
    pub fn fill_as(
        &self,
        method: &dyn Method,
        folder: &Path,
        parameters: &mut Parameters,
    ) -> Result<()> {
        let keeps_head = self.config.get(adapterhub::KEEPS_HEAD).is_some();
        let mut floats = Cow::Borrowed(&self.tensors);
        let mut wrong = method.unfold(parameters, &self.integers, &mut floats);
        let known: Vec<_> = parameters
            .iter()
            .filter(|(_, p)| p.saved)
            .map(|(id, p)| (id, p.name.clone(), p.shape.clone(), p.dtype() == Dtype::F32))
            .collect();
        let mut entries = Vec::new();
        for (id, name, shape, is_float) in &known {
            if parameters.support(*id).is_some() {
                entries.push(indices_name(name));
                if let Err(error) = self.fill_sparse(*id, name, parameters) {
                    wrong.push(format!("`{name}`: {error}"));
                }
                continue;
            }
            let (float, whole) = (floats.get(name), self.integers.get(name));
            match (float.map(|(shape, _)| shape), whole.map(|(_, shape, _)| shape)) {
                (None, None) if keeps_head && !adapterhub::is_bottleneck(name) => {}
                (None, None) => wrong.push(format!("`{name}` is missing")),
                (Some(found), _) | (None, Some(found)) if found != shape => {
                    wrong.push(format!("`{name}` has shape {found:?}, expected {shape:?}"));
                }
                (Some(_), _) if !is_float => {
                    wrong.push(format!("`{name}` holds floats, expected whole numbers"));
                }
                (None, Some(_)) if *is_float => {
                    wrong.push(format!("`{name}` holds whole numbers, expected floats"));
                }
                _ => match (float, whole) {
                    (Some((_, values)), _) => parameters.set(*id, values.clone())?,
                    (None, Some((_, _, values))) => parameters.set_integers(*id, values)?,
                    (None, None) => {}
                },
            }
        }
        for name in floats.keys().chain(self.integers.keys()) {
            let belongs =
                known.iter().any(|(_, known, ..)| known == name) || entries.contains(name);
            if !belongs && !is_carried(name, &known) {
                wrong.push(format!("`{name}` belongs to nothing in this model"));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let shown = wrong.len().min(8);
        let mut found = wrong[..shown].join("\n    ");
        if wrong.len() > shown {
            found = format!("{found}\n    and {} more", wrong.len() - shown);
        }
        Err(Error::Content {
            path: folder.to_path_buf(),
            what: "the adapter does not fit this model".to_owned(),
            expected: "every tensor of the adapter at its place in the base".to_owned(),
            found,
            help:
                "use the base the adapter was trained on; if this is it, the file is damaged: copy \
                   it again"
                    .to_owned(),
        })
    }
}

/// Returns whether a tensor is one that PEFT writes a second time.
///
/// The frozen weight of a targeted embedding is the base's own, and RandLoRA's shared projections
/// are repeated in every layer.
fn is_carried(name: &str, known: &[(ParameterId, String, Vec<usize>, bool)]) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let repeated = matches!(last, "randlora_A" | "randlora_B")
        && known.iter().any(|(_, known, ..)| *known == format!("base_model.{last}"));
    name.ends_with(".base_layer.weight") || repeated
}

impl Adapter {
    /// Takes entries and values of a sparse change from the file, in any order.
    fn fill_sparse(
        &self,
        id: ParameterId,
        name: &str,
        parameters: &mut Parameters,
    ) -> Result<(), String> {
        let [rows, columns] = parameters.support(id).map_or([0, 0], |support| support.matrix);
        let (_, values) = self.tensors.get(name).ok_or("it is missing")?;
        let indices = indices_name(name);
        let (_, shape, places) = self
            .integers
            .get(&indices)
            .ok_or_else(|| format!("its indices `{indices}` are missing"))?;
        if *shape != [2, values.len()] {
            return Err(format!("indices of shape {shape:?}, expected [2, {}]", values.len()));
        }
        let (of_rows, of_columns) = places.split_at(values.len());
        let mut entries = Vec::with_capacity(values.len());
        for ((row, column), value) in of_rows.iter().zip(of_columns).zip(values) {
            if !(0..rows as i64).contains(row) || !(0..columns as i64).contains(column) {
                return Err(format!("entry ({row}, {column}) lies outside {rows} x {columns}"));
            }
            entries.push(((row * columns as i64 + column) as u32, *value));
        }
        entries.sort_by_key(|(index, _)| *index);
        let (indices, values) = entries.into_iter().unzip();
        parameters.set_entries(id, indices, values).map_err(|error| error.to_string())
    }
}

/// Returns the name of the entries of a sparse change, beside its values.
fn indices_name(values: &str) -> String {
    format!("{}_indices", values.strip_suffix("_weight").unwrap_or(values))
}

/// Writes JSON with sorted keys and an indent of 2, as PEFT does.
fn pretty_sorted(value: &Value) -> String {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let ordered: BTreeMap<_, _> = map.iter().collect();
                Value::Object(ordered.into_iter().map(|(k, v)| (k.clone(), sorted(v))).collect())
            }
            other => other.clone(),
        }
    }
    serde_json::to_string_pretty(&sorted(value))
        .unwrap_or_else(|error| unreachable!("a value is always JSON: {error}"))
}
