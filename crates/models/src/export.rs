//! Writes a model as a Hugging Face folder.

use std::collections::BTreeMap;
use std::path::Path;

use retune_core::spec::{Head, Kind, ModelSpec, WeightSpec};
use retune_core::weights::transpose;
use retune_core::{Error, Result};
use retune_files::Dtype;
use retune_files::atomic::AtomicFolder;
use retune_files::safetensors::{ShardedWriter, TensorSpec};
use serde_json::{Map, Value, json};

/// Shards are cut at this many bytes where the caller has no wish of its own.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Returns the configuration of a model as the Hugging Face library reads it.
///
/// It is the one that was read, with the class and type of number of what is written.
pub fn config(spec: &ModelSpec, dtype: Dtype) -> Value {
    let mut config = match &spec.config {
        Value::Object(config) => config.clone(),
        _ => Map::new(),
    };
    config.shift_remove("torch_dtype");
    config.shift_remove("quantization_config");
    config.insert("architectures".to_owned(), json!([spec.class]));
    config.insert("model_type".to_owned(), json!(spec.architecture));
    config.insert("dtype".to_owned(), json!(dtype_name(dtype)));
    if let Head::Classes { labels } = &spec.head {
        let names: Map<String, Value> =
            labels.iter().enumerate().map(|(i, label)| (i.to_string(), json!(label))).collect();
        let places: Map<String, Value> =
            labels.iter().enumerate().map(|(i, label)| (label.clone(), json!(i))).collect();
        config.insert("id2label".to_owned(), Value::Object(names));
        config.insert("label2id".to_owned(), Value::Object(places));
    }
    Value::Object(config)
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F64 => "float64",
        _ => "float32",
    }
}

/// Writes a folder with `config.json`, safetensors and `others`, which appears whole or not at all
/// in place of what has its name.
///
/// `values` gives a weight in its logical shape (`[outputs, inputs]` for linear layers) and is
/// asked once per weight, so one tensor is in memory at a time. `others` are files to be put
/// beside, such as the tokenizer's.
///
/// # Errors
/// If a value does not fit the type, the type is none of F32, BF16 and F16, or the folder
/// cannot be written; those of `values`.
pub fn write_folder(
    target: &Path,
    spec: &ModelSpec,
    dtype: Dtype,
    shard_bytes: u64,
    others: &[(String, Vec<u8>)],
    mut values: impl FnMut(&WeightSpec) -> Result<Vec<f32>>,
) -> Result<()> {
    if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
        return Err(Error::Unsupported {
            what: format!("weights of type {dtype}"),
            help: "write F32, BF16 or F16".to_owned(),
        });
    }
    let folder = AtomicFolder::create(target)?;
    let mut text = serde_json::to_string_pretty(&config(spec, dtype)).unwrap_or_default();
    text.push('\n');
    put(&folder, "config.json", text.as_bytes())?;
    for (name, content) in others {
        put(&folder, name, content)?;
    }
    let specs: Vec<TensorSpec> = spec
        .weights
        .iter()
        .map(|weight| TensorSpec::new(&weight.name, dtype, stored_shape(weight)))
        .collect();
    let about = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = ShardedWriter::create(folder.path(), &specs, &about, shard_bytes)?;
    for weight in &spec.weights {
        let mut numbers = values(weight)?;
        if numbers.len() == weight.count() && is_transposed(weight) {
            let [rows, columns] = weight.matrix();
            numbers = transpose(&numbers, rows, columns);
        }
        writer.write_f32(&weight.name, &numbers)?;
    }
    writer.finish()?;
    Ok(folder.replace()?)
}

fn is_transposed(weight: &WeightSpec) -> bool {
    weight.kind == Kind::Linear { transposed: true }
}

fn stored_shape(weight: &WeightSpec) -> Vec<usize> {
    let mut shape = weight.shape.clone();
    if is_transposed(weight) {
        shape.reverse();
    }
    shape
}

fn put(folder: &AtomicFolder, name: &str, content: &[u8]) -> Result<()> {
    let path = folder.path().join(name);
    Ok(std::fs::write(path, content).map_err(|error| folder.error(error))?)
}
