//! LoRA adapters in PEFT's layout, added to their base while it is read.

use std::collections::BTreeMap;
use std::path::Path;

use retune_files::safetensors::TensorView;
use serde_json::{Map, Value};

use crate::source::{Source, read_json_object};
use crate::{Error, Result};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const PREFIX: &str = "base_model.model.";

/// An adapter whose every tensor has its place in the base.
#[derive(Debug)]
pub(crate) struct Lora {
    source: Source,
    config: Map<String, Value>,
    pairs: BTreeMap<String, Pair>,
    /// Weights the adapter holds whole, and the tensor that does.
    whole: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Pair {
    a: Option<String>,
    b: Option<String>,
    embedding: bool,
}

/// The change `scale · left · right` of a matrix.
#[derive(Debug)]
pub(crate) struct LowRank {
    /// `[rows, rank]`
    left: Vec<f32>,
    /// `[rank, columns]`
    right: Vec<f32>,
    rank: usize,
    columns: usize,
    scale: f32,
}

impl Lora {
    /// Opens an adapter folder and finds the base's weight for each of its tensors.
    pub(crate) fn open(folder: &Path, base: &Source) -> Result<Self> {
        let config_path = folder.join(CONFIG);
        let config = read_json_object(&config_path)?.ok_or_else(|| Error::Content {
            path: folder.to_path_buf(),
            what: "this is no adapter".to_owned(),
            expected: format!("{CONFIG} and {WEIGHTS}"),
            found: "no configuration".to_owned(),
            help: "give the folder PEFT or `retune run` wrote".to_owned(),
        })?;
        let unfit = |what: String| Error::Content {
            path: config_path.clone(),
            what,
            expected: "a plain LoRA adapter".to_owned(),
            found: "another kind".to_owned(),
            help: "merge it into its base first, with `retune merge-adapter`".to_owned(),
        };
        let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" {
            return Err(unfit(format!("adapters of type {kind} are not added here")));
        }
        if config.get("use_dora").and_then(Value::as_bool) == Some(true) {
            return Err(unfit("DoRA is not added here".to_owned()));
        }
        let source = Source::open(&folder.join(WEIGHTS))?;
        let mut lora = Self { source, config, pairs: BTreeMap::new(), whole: BTreeMap::new() };
        let names: Vec<String> = lora.source.files().names().map(str::to_owned).collect();
        for name in names {
            let weight = lora.place(&name);
            if base.get(&weight).is_none() {
                return Err(Error::Content {
                    path: folder.to_path_buf(),
                    what: format!("the adapter's tensor '{name}' changes '{weight}'"),
                    expected: format!("a weight of {}", base.path().display()),
                    found: "none of that name".to_owned(),
                    help: "give the base the adapter was trained on".to_owned(),
                });
            }
        }
        let lonely = lora.pairs.iter().find(|(_, pair)| pair.a.is_none() || pair.b.is_none());
        if let Some((weight, _)) = lonely {
            return Err(unfit(format!("'{weight}' has only one of its two factors")));
        }
        Ok(lora)
    }

    /// Notes a tensor of the adapter and returns the weight it changes.
    fn place(&mut self, name: &str) -> String {
        let bare = name.strip_prefix(PREFIX).unwrap_or(name);
        for (ending, is_a, embedding) in [
            (".lora_A.weight", true, false),
            (".lora_B.weight", false, false),
            (".lora_embedding_A", true, true),
            (".lora_embedding_B", false, true),
        ] {
            if let Some(module) = bare.strip_suffix(ending) {
                let weight = format!("{module}.weight");
                let pair = self.pairs.entry(weight.clone()).or_default();
                pair.embedding = embedding;
                let factor = if is_a { &mut pair.a } else { &mut pair.b };
                *factor = Some(name.to_owned());
                return weight;
            }
        }
        self.whole.insert(bare.to_owned(), name.to_owned());
        bare.to_owned()
    }

    /// Returns the tensor that stands in for a weight, where the adapter holds it whole.
    pub(crate) fn whole(&self, weight: &str) -> Option<TensorView<'_>> {
        self.source.get(self.whole.get(weight)?)
    }

    /// Reads the change of a weight of `[rows, columns]`; `None` where there is none.
    pub(crate) fn change(&self, weight: &str, shape: &[usize]) -> Result<Option<LowRank>> {
        let Some(pair) = self.pairs.get(weight) else { return Ok(None) };
        let (Some(a), Some(b)) = (&pair.a, &pair.b) else { return Ok(None) };
        let transposed = pair.embedding || self.flag("fan_in_fan_out");
        let (a_shape, b_shape) =
            (self.source.tensor(a)?.shape.to_vec(), self.source.tensor(b)?.shape.to_vec());
        let fits = |a: &[usize], b: &[usize]| match (a, b, shape) {
            ([rank, a], [b, other], [rows, columns]) => {
                let sides = if transposed { (a, b) } else { (b, a) };
                rank == other && *rank > 0 && sides == (rows, columns)
            }
            _ => false,
        };
        if !fits(&a_shape, &b_shape) {
            return Err(Error::Content {
                path: self.source.path().to_path_buf(),
                what: format!("the factors of '{weight}' have shapes {a_shape:?} and {b_shape:?}"),
                expected: format!("factors of a matrix of {shape:?}"),
                found: "others".to_owned(),
                help: "give the base the adapter was trained on".to_owned(),
            });
        }
        let rank = a_shape[0];
        let (a, b) = (self.source.read_f32(a)?, self.source.read_f32(b)?);
        let (left, right) =
            if transposed { (transpose(&a, rank), transpose(&b, b_shape[0])) } else { (b, a) };
        let scale = self.scale(weight, rank);
        Ok(Some(LowRank { left, right, rank, columns: shape[1], scale }))
    }

    fn flag(&self, key: &str) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn scale(&self, weight: &str, rank: usize) -> f32 {
        let module = weight.strip_suffix(".weight").unwrap_or(weight);
        let pattern = self.config.get("alpha_pattern").and_then(Value::as_object);
        let own = pattern
            .into_iter()
            .flatten()
            .find(|(key, _)| module == key.as_str() || module.ends_with(&format!(".{key}")));
        let alpha = own.map(|(_, value)| value).or(self.config.get("lora_alpha"));
        let alpha = alpha.and_then(Value::as_f64).unwrap_or(rank as f64);
        let divisor = if self.flag("use_rslora") { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
    }
}

impl LowRank {
    /// Adds the change to the values from index `start` of the flattened matrix on.
    pub(crate) fn add(&self, start: usize, out: &mut [f32]) {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let (row, column) = (at / self.columns, at % self.columns);
            let n = (self.columns - column).min(rest.len());
            let (part, tail) = rest.split_at_mut(n);
            for r in 0..self.rank {
                let factor = self.scale * self.left[row * self.rank + r];
                let begin = r * self.columns + column;
                let right = &self.right[begin..begin + n];
                part.iter_mut().zip(right).for_each(|(x, y)| *x += factor * y);
            }
            rest = tail;
            at += n;
        }
    }
}

/// Turns `[rows, n / rows]` around.
fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}
