//! Adapters and full changes compressed by ComPEFT, used as they are: decoded into memory only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retune_core::random::Seed;
use retune_core::{Error, Result};
use retune_files::compeft::{CompeftFile, Content};
use serde_json::{Value, json};

use crate::adapter::Adapter;
use crate::difference::PEFT_TYPE;
use crate::lora::initial_factor;

/// The file of a compressed adapter's folder.
pub const FILE: &str = "adapter_model.compeft";

/// Finds the compressed file a path stands for: itself, or the one in a folder that has no
/// uncompressed tensors.
pub(crate) fn find(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_path_buf());
    }
    let file = path.join(FILE);
    (file.is_file() && !path.join("adapter_model.safetensors").exists()).then_some(file)
}

/// Tells whether a path stands for a compressed adapter or change.
pub fn is_compressed(path: &Path) -> bool {
    find(path).is_some_and(|file| file.extension().is_some_and(|end| end == "compeft"))
}

/// Reads a compressed adapter, or a compressed change of a whole model.
///
/// # Errors
/// If the file is damaged, or does not say what it is added to.
pub(crate) fn read(path: &Path) -> Result<Adapter> {
    if path.with_file_name("adapter_config.json").is_file()
        && path.extension().is_some_and(|end| end != "compeft")
    {
        return Err(Error::Content {
            path: path.to_owned(),
            what: "one file of an adapter is not all of it".to_owned(),
            expected: "the adapter's folder".to_owned(),
            found: "a file".to_owned(),
            help: format!("give `{}`", path.parent().unwrap_or(path).display()),
        });
    }
    decode(&CompeftFile::open(path)?, 1.0)
}

/// Decodes a compressed adapter or change, its entries `factor` times as large as the file says.
///
/// # Errors
/// As [`Adapter::read`].
pub fn decode(file: &CompeftFile, factor: f32) -> Result<Adapter> {
    let wrong = |what: &str, expected: &str, found: String| Error::Content {
        path: file.path().to_path_buf(),
        what: what.to_owned(),
        expected: expected.to_owned(),
        found,
        help: "give a file that `retune compress` wrote".to_owned(),
    };
    let start = file.metadata().get("start").map_or("nothing", String::as_str);
    let mut seeded = Seeded::default();
    let (first, mut config) = match (start, file.metadata().get("adapter_config")) {
        ("zero" | "one" | "seeded", Some(text)) => {
            if start == "seeded" {
                seeded = Seeded::read(file).ok_or_else(|| {
                    let expected = "`seed` and a list of numbers `streams`";
                    wrong("its random start is not known", expected, "something else".to_owned())
                })?;
            }
            let config: Value = serde_json::from_str(text).map_err(|error| {
                wrong("its adapter_config is damaged", "JSON", error.to_string())
            })?;
            (if start == "one" { 1.0 } else { 0.0 }, config)
        }
        ("base", _) => (0.0, difference_config(file)),
        _ => {
            let expected = "`start` zero, one or seeded with an `adapter_config`, or `start` base";
            return Err(wrong(
                "it is not known what this is added to",
                expected,
                format!("`start` {start}"),
            ));
        }
    };
    // The file knows the base better than the configuration of an adapter PEFT made.
    if let (Some(name), Some(hash), Value::Object(map)) =
        (file.metadata().get("base"), file.metadata().get("base_sha256"), &mut config)
    {
        map.insert("retune_base".to_owned(), json!({"name": name, "fingerprint": hash}));
    }
    let mut adapter = Adapter { config, ..Adapter::default() };
    for tensor in file.tensors() {
        let mut values = match seeded.place(tensor.name) {
            Some((seed, index)) => initial_factor(seed, index, tensor.name, tensor.shape),
            None => vec![first; tensor.len()],
        };
        tensor.add_scaled(factor * file.scale(), &mut values)?;
        adapter.tensors.insert(tensor.name.to_owned(), (tensor.shape.to_vec(), values));
    }
    Ok(adapter)
}

/// Names the factors that LoRA draws at random.
pub fn is_drawn(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_embedding_B")
}

/// Which stream of the run's seed each drawn factor starts from.
#[derive(Default)]
struct Seeded<'a> {
    seed: u64,
    streams: BTreeMap<&'a str, u64>,
}

impl<'a> Seeded<'a> {
    /// Reads the seed, and a number for each drawn factor in alphabetical order.
    fn read(file: &'a CompeftFile) -> Option<Self> {
        let seed = file.metadata().get("seed")?.parse().ok()?;
        let numbers: Vec<u64> = file
            .metadata()
            .get("streams")?
            .split(',')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        let names: Vec<&str> = file.names().filter(|name| is_drawn(name)).collect();
        let streams = names.iter().copied().zip(numbers.iter().copied()).collect();
        (names.len() == numbers.len()).then_some(Self { seed, streams })
    }

    fn place(&self, name: &str) -> Option<(Seed, u64)> {
        Some((Seed(self.seed), *self.streams.get(name)?))
    }
}

/// Describes a change of a whole model as the configuration of an adapter.
fn difference_config(file: &CompeftFile) -> Value {
    let names = |changed: bool| -> Vec<&str> {
        file.tensors()
            .filter(|tensor| matches!(tensor.content, Content::Signs(_)) == changed)
            .map(|tensor| tensor.name)
            .collect()
    };
    json!({"peft_type": PEFT_TYPE, "changed": names(true), "replaced": names(false)})
}
