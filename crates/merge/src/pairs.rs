//! LoRA adapters as pairs of factors, from PEFT folders or ComPEFT files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use retune_files::compeft::CompeftFile;
use retune_files::safetensors::Safetensors;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A tensor: shape and values.
pub type Tensor = (Vec<usize>, Vec<f32>);

/// An adapter held in memory.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    /// Where it was read.
    pub path: PathBuf,
    /// `adapter_config.json`.
    pub config: Map<String, Value>,
    /// The pairs by their module's path, as the file has it.
    pub pairs: BTreeMap<String, Pair>,
    /// All other tensors: biases, whole modules.
    pub others: BTreeMap<String, Tensor>,
}

/// The factors of one module: its weight changes by `scale · b · a`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Rank.
    pub rank: usize,
    /// Width of the input (rows of the table, for an embedding).
    pub inputs: usize,
    /// Width of the output.
    pub outputs: usize,
    /// What the product is multiplied by.
    pub scale: f64,
    /// `[rank, inputs]`
    pub a: Vec<f32>,
    /// `[outputs, rank]`
    pub b: Vec<f32>,
    /// Whether the module is an embedding, whose factors have other names.
    pub is_embedding: bool,
}

const LINEAR: (&str, &str) = (".lora_A.weight", ".lora_B.weight");
const EMBEDDING: (&str, &str) = (".lora_embedding_A", ".lora_embedding_B");

impl Pair {
    /// Computes the change of the weight, `[outputs, inputs]`.
    pub fn delta(&self) -> Vec<f32> {
        let mut out = vec![0.0f32; self.outputs * self.inputs];
        let scale = self.scale as f32;
        if self.inputs == 0 || self.rank == 0 {
            return out;
        }
        for (row, b) in out.chunks_exact_mut(self.inputs).zip(self.b.chunks_exact(self.rank)) {
            for (b, a) in b.iter().zip(self.a.chunks_exact(self.inputs)) {
                for (y, a) in row.iter_mut().zip(a) {
                    *y += b * a;
                }
            }
            for y in row {
                *y *= scale;
            }
        }
        out
    }

    /// Returns the names of both factors in a file.
    pub fn names(&self, module: &str) -> (String, String) {
        let (a, b) = if self.is_embedding { EMBEDDING } else { LINEAR };
        (format!("{module}{a}"), format!("{module}{b}"))
    }
}

impl LoraAdapter {
    /// Reads an adapter folder, compressed or not, or a ComPEFT file of an adapter.
    ///
    /// # Errors
    /// [`Error`] if it is no LoRA adapter, its tensors do not fit together, or it is of a variant
    /// that is no product of two factors (DoRA).
    pub fn open(path: &Path) -> Result<Self> {
        let (text, tensors) = read(path)?;
        let config = serde_json::from_str(&text).map_err(|error| Error::Content {
            path: path.to_path_buf(),
            what: "its adapter_config.json is damaged".to_owned(),
            expected: "one JSON object".to_owned(),
            found: error.to_string(),
            help: "copy the adapter again".to_owned(),
        })?;
        Self::from_tensors(path, config, tensors)
    }

    /// Takes an adapter that was read elsewhere; `path` stands for it in messages.
    ///
    /// # Errors
    /// As [`LoraAdapter::open`].
    pub fn from_tensors(
        path: &Path,
        config: Map<String, Value>,
        tensors: BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let wrong = |what: String, expected: &str, found: String| Error::Content {
            path: path.to_path_buf(),
            what,
            expected: expected.to_owned(),
            found,
            help: "give LoRA adapters as PEFT or retune wrote them".to_owned(),
        };
        let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("nothing");
        if kind != "LORA" {
            let what = "this is no LoRA adapter".to_owned();
            return Err(wrong(what, "peft_type LORA", format!("peft_type {kind}")));
        }
        if config.get("use_dora").and_then(Value::as_bool) == Some(true) {
            let what = "a DoRA adapter is no product of two factors".to_owned();
            return Err(wrong(what, "LoRA without use_dora", "use_dora".to_owned()));
        }
        let scales = Scales::read(&config).map_err(|(key, expected, found)| {
            wrong(format!("`{key}` is wrong"), expected, found)
        })?;
        let mut adapter = Self {
            path: path.to_path_buf(),
            config,
            pairs: BTreeMap::new(),
            others: BTreeMap::new(),
        };
        let mut rest = tensors.clone();
        for (name, (a_shape, a)) in &tensors {
            for (ends, is_embedding) in [(LINEAR, false), (EMBEDDING, true)] {
                let Some(module) = name.strip_suffix(ends.0) else { continue };
                let partner = format!("{module}{}", ends.1);
                let fits = |shape: &[usize]| shape.len() == 2 && shape[1] == a_shape[0];
                let b = match tensors.get(&partner) {
                    Some((shape, b)) if a_shape.len() == 2 && fits(shape) => (shape[0], b),
                    other => {
                        let found = other.map_or_else(
                            || format!("no `{partner}`"),
                            |(shape, _)| format!("shapes {a_shape:?} and {shape:?}"),
                        );
                        let what = format!("`{name}` has no partner that fits");
                        return Err(wrong(what, "[rank, in] and [out, rank]", found));
                    }
                };
                rest.remove(name);
                rest.remove(&partner);
                let pair = Pair {
                    rank: a_shape[0],
                    inputs: a_shape[1],
                    outputs: b.0,
                    scale: scales.of(module, a_shape[0]),
                    a: a.clone(),
                    b: b.1.clone(),
                    is_embedding,
                };
                adapter.pairs.insert(module.to_owned(), pair);
            }
        }
        if adapter.pairs.is_empty() {
            let what = "there are no factors".to_owned();
            let names: Vec<&str> = tensors.keys().take(3).map(String::as_str).collect();
            return Err(wrong(what, "tensors that end in lora_A.weight", names.join(", ")));
        }
        adapter.others = rest;
        Ok(adapter)
    }

    /// Returns the largest rank.
    pub fn max_rank(&self) -> usize {
        self.pairs.values().map(|pair| pair.rank).max().unwrap_or(0)
    }
}

/// Reads configuration and tensors.
fn read(path: &Path) -> Result<(String, BTreeMap<String, Tensor>)> {
    let packed =
        if path.is_file() { path.to_path_buf() } else { path.join("adapter_model.compeft") };
    let plain = path.join("adapter_model.safetensors");
    if packed.is_file() && !plain.exists() {
        let file = CompeftFile::open(&packed)?;
        let (Some("zero"), Some(text)) = (
            file.metadata().get("start").map(String::as_str),
            file.metadata().get("adapter_config"),
        ) else {
            return Err(Error::Content {
                path: packed,
                what: "this is no compressed LoRA adapter".to_owned(),
                expected: "`start` zero and an `adapter_config`".to_owned(),
                found: format!("{:?}", file.metadata().get("start")),
                help: "write it out with `retune decompress` first".to_owned(),
            });
        };
        let mut tensors = BTreeMap::new();
        for tensor in file.tensors() {
            tensors.insert(tensor.name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32()?));
        }
        return Ok((text.clone(), tensors));
    }
    let config = path.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).map_err(|source| Error::Io {
        path: config,
        action: "read",
        source,
    })?;
    let mut tensors = BTreeMap::new();
    for tensor in Safetensors::open(&plain)?.tensors() {
        tensors.insert(tensor.name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32()?));
    }
    Ok((text, tensors))
}

/// How large each product is.
struct Scales {
    alpha: f64,
    patterns: Vec<(Regex, f64)>,
    root: bool,
}

impl Scales {
    fn read(config: &Map<String, Value>) -> Result<Self, (String, &'static str, String)> {
        let key = "lora_alpha".to_owned();
        let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        let found = config.get("lora_alpha");
        let alpha = found.and_then(Value::as_f64).ok_or((key, "a number", shown(found)))?;
        let mut patterns = Vec::new();
        if let Some(map) = config.get("alpha_pattern").and_then(Value::as_object) {
            for (pattern, value) in map {
                let wrong = || {
                    (
                        format!("alpha_pattern.{pattern}"),
                        "a pattern and a number",
                        shown(Some(value)),
                    )
                };
                // PEFT's own rule: the pattern ends the path, at a point.
                let regex = Regex::new(&format!(r"^(.*\.)?({pattern})$")).map_err(|_| wrong())?;
                patterns.push((regex, value.as_f64().ok_or_else(wrong)?));
            }
        }
        let root = config.get("use_rslora").and_then(Value::as_bool) == Some(true);
        Ok(Self { alpha, patterns, root })
    }

    fn of(&self, module: &str, rank: usize) -> f64 {
        let path = module.strip_prefix("base_model.model.").unwrap_or(module);
        let pattern = self.patterns.iter().find(|(pattern, _)| pattern.is_match(path));
        let alpha = pattern.map_or(self.alpha, |(_, alpha)| *alpha);
        let rank = rank as f64;
        alpha / if self.root { rank.sqrt() } else { rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::write_tensors;

    fn folder(config: &str, tensors: &[(&str, &[usize], Vec<f32>)]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("adapter_config.json"), config).unwrap();
        write_tensors(&home.path().join("adapter_model.safetensors"), tensors);
        home
    }

    const PAIR: [(&str, &[usize]); 2] = [
        ("base_model.model.m.q.lora_A.weight", &[1, 3]),
        ("base_model.model.m.q.lora_B.weight", &[2, 1]),
    ];

    fn pair(b: Vec<f32>) -> Vec<(&'static str, &'static [usize], Vec<f32>)> {
        vec![(PAIR[0].0, PAIR[0].1, vec![1.0, 2.0, 3.0]), (PAIR[1].0, PAIR[1].1, b)]
    }

    #[test]
    fn a_product_worked_out_by_hand() {
        let config = r#"{"peft_type":"LORA","r":1,"lora_alpha":4,"alpha_pattern":{"k":8,"q":2}}"#;
        let home = folder(config, &pair(vec![10.0, -1.0]));
        let adapter = LoraAdapter::open(home.path()).unwrap();
        let pair = &adapter.pairs["base_model.model.m.q"];
        assert_eq!((pair.rank, pair.inputs, pair.outputs, pair.scale), (1, 3, 2, 2.0));
        assert_eq!(pair.delta(), [20.0, 40.0, 60.0, -2.0, -4.0, -6.0]);
        assert!(adapter.others.is_empty());
    }

    #[test]
    fn what_is_no_pair_is_refused_or_kept_apart() {
        let lora = r#"{"peft_type":"LORA","lora_alpha":1}"#;
        let message = |config: &str, tensors: &[(&str, &[usize], Vec<f32>)]| {
            LoraAdapter::open(folder(config, tensors).path()).unwrap_err().to_string()
        };
        let good = pair(vec![1.0, 1.0]);
        assert!(message(r#"{"peft_type":"IA3"}"#, &good).contains("IA3"));
        assert!(message("[]", &good).contains("damaged"));
        assert!(message(r#"{"peft_type":"LORA"}"#, &good).contains("lora_alpha"));
        let dora = r#"{"peft_type":"LORA","lora_alpha":1,"use_dora":true}"#;
        assert!(message(dora, &good).contains("DoRA"));
        assert!(message(lora, &good[..1]).contains("no partner"));
        assert!(message(lora, &good[1..]).contains("no factors"));
        let odd = vec![good[0].clone(), (PAIR[1].0, &[1usize, 2] as &[usize], vec![1.0, 1.0])];
        assert!(message(lora, &odd).contains("[1, 2]"));
        let mut more = good.clone();
        more.push(("base_model.model.head.weight", &[1], vec![5.0]));
        let adapter = LoraAdapter::open(folder(lora, &more).path()).unwrap();
        assert_eq!(adapter.others.keys().collect::<Vec<_>>(), ["base_model.model.head.weight"]);
        assert!(LoraAdapter::open(Path::new("/nowhere")).is_err());
    }
}
