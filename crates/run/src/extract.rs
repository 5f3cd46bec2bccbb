//! A LoRA adapter out of a full tune, layer by layer.

use std::collections::{BTreeMap, BTreeSet};

use retune_core::method::Method;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use retune_merge::extract::{Extracted, extract};
use retune_methods::adapter::{Adapter, BaseIdentity};
use retune_methods::lora::{Bias, Lora, LoraOptions};

use crate::error::{Error, Result};
use crate::open::Opened;

/// What an extraction kept of one block's change.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Share {
    /// The block; `None` for what belongs to none.
    pub layer: Option<usize>,
    /// Squared entries of the change of all its weights.
    pub energy: f64,
    /// Of that, what the adapter holds.
    pub kept: f64,
}

impl Share {
    /// Returns the share kept; 1 where nothing changed.
    pub fn share(&self) -> f64 {
        if self.energy > 0.0 { self.kept / self.energy } else { 1.0 }
    }
}

/// An adapter and what it holds of the change it was made from.
#[derive(Debug)]
pub struct Extraction {
    /// The adapter.
    pub adapter: Adapter,
    /// By block, what belongs to none last.
    pub shares: Vec<Share>,
    /// Weights that changed and are not in the adapter, by falling energy.
    pub left_out: Vec<String>,
}

impl Extraction {
    /// Adds all blocks up.
    pub fn total(&self) -> Share {
        let sum = |f: fn(&Share) -> f64| self.shares.iter().map(f).sum();
        Share { layer: None, energy: sum(|s| s.energy), kept: sum(|s| s.kept) }
    }
}

/// Approximates the change from `base` to `tuned` by a LoRA adapter.
///
/// Linear layers become factors of the given rank. Other weights that changed (norms, embeddings,
/// biases) are saved whole where `keep_rest` asks for it, else left out.
///
/// # Errors
/// If the two are not of one architecture and size, nothing changed, or a value is not finite.
pub fn extract_adapter(
    tuned: &Opened,
    base: &Opened,
    base_name: &str,
    rank: usize,
    keep_rest: bool,
) -> Result<Extraction> {
    let spec = base.checkpoint.model.spec();
    check_same(tuned, base)?;
    let mut factors: BTreeMap<&str, Extracted> = BTreeMap::new();
    let mut rest: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    let mut left_out = Vec::new();
    let mut shares: BTreeMap<(bool, Option<usize>), Share> = BTreeMap::new();
    for weight in &spec.weights {
        let after = tuned.weights.values(&weight.name)?;
        let before = base.weights.values(&weight.name)?;
        let delta: Vec<f32> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        if let Some(index) = delta.iter().position(|value| !value.is_finite()) {
            return Err(Error::Plan {
                what: format!("the change of `{}` cannot be factored", weight.name),
                expected: "finite numbers".to_owned(),
                found: format!("{} at index {index}", delta[index]),
                help: "use a checkpoint from before the training diverged".to_owned(),
            });
        }
        let energy: f64 = delta.iter().map(|d| f64::from(*d).powi(2)).sum();
        // What belongs to no block comes last.
        let share = shares.entry((weight.layer.is_none(), weight.layer)).or_default();
        share.layer = weight.layer;
        share.energy += energy;
        if energy == 0.0 {
            continue;
        }
        let [outputs, inputs] = weight.matrix();
        let found = if becomes_factors(spec, weight) {
            extract(&delta, outputs, inputs, rank)
        } else {
            None
        };
        if let Some(found) = found {
            share.kept += found.kept * energy;
            factors.insert(&weight.name, found);
        } else if keep_rest || is_class_head(spec, weight) {
            // PEFT saves a classifier's head whole by itself.
            share.kept += energy;
            rest.insert(&weight.name, after);
        } else {
            left_out.push((energy, weight.name.clone()));
        }
    }
    if factors.is_empty() {
        return Err(Error::Plan {
            what: "there is nothing to extract".to_owned(),
            expected: "a tuned model whose linear layers differ from the base".to_owned(),
            found: if left_out.is_empty() && rest.is_empty() {
                "the same weights"
            } else {
                "changes of other weights only"
            }
            .to_owned(),
            help: "check that these are the tuned model and its base".to_owned(),
        });
    }
    let method = method(spec, &factors, &rest, rank);
    let mut parameters = Parameters::new(base.weights.device());
    method.attach(&base.weights, &mut parameters, Seed(0))?;
    for planned in method.plan(spec)?.parameters {
        let Some(id) = parameters.find(&planned.name) else { continue };
        let pair = factors.get(planned.place.as_str());
        let values = if planned.name.ends_with(".lora_A.weight") {
            pair.map(|pair| pair.a.clone())
        } else if planned.name.ends_with(".lora_B.weight") {
            pair.map(|pair| pair.b.clone())
        } else {
            rest.get(planned.place.as_str()).cloned()
        };
        match values {
            Some(values) => parameters.set(id, values)?,
            // A layer that a suffix targets although it did not change.
            None if planned.name.contains(".lora_") => {
                parameters.set(id, vec![0.0; planned.shape.iter().product()])?;
            }
            None => {}
        }
    }
    let identity = BaseIdentity {
        name: base_name.to_owned(),
        fingerprint: base.fingerprint.clone(),
        under: base.under.clone(),
    };
    let adapter = Adapter::collect(&method, spec, &parameters, Some(&identity))?;
    left_out.sort_by(|a, b| b.0.total_cmp(&a.0));
    let left_out = left_out.into_iter().map(|(_, name)| name).collect();
    Ok(Extraction { adapter, shares: shares.into_values().collect(), left_out })
}

fn is_class_head(spec: &ModelSpec, weight: &WeightSpec) -> bool {
    matches!(spec.head, Head::Classes { .. }) && weight.role == Role::Head
}

fn becomes_factors(spec: &ModelSpec, weight: &WeightSpec) -> bool {
    weight.is_linear() && !is_class_head(spec, weight)
}

/// Makes the LoRA that has exactly these factors and whole modules.
fn method(
    spec: &ModelSpec,
    factors: &BTreeMap<&str, Extracted>,
    rest: &BTreeMap<&str, Vec<f32>>,
    rank: usize,
) -> Lora {
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let all = |suffix: &str| {
        spec.weights
            .iter()
            .filter(|w| w.is_linear() && last(w.module()) == suffix)
            .all(|w| factors.contains_key(w.name.as_str()))
    };
    let changed: BTreeSet<String> = spec
        .weights
        .iter()
        .filter(|weight| factors.contains_key(weight.name.as_str()))
        // The short name, where every layer of that name is meant.
        .map(|w| if all(&last(w.module())) { last(w.module()) } else { w.module().to_owned() })
        .collect();
    let of = |wanted: bool| {
        let weights = spec.weights.iter().filter(|w| rest.contains_key(w.name.as_str()));
        weights.filter(move |weight| (weight.kind == Kind::Bias) == wanted)
    };
    let whole: BTreeSet<String> = of(false).map(|weight| weight.module().to_owned()).collect();
    let biases = of(true).any(|bias| !whole.contains(bias.module()));
    Lora {
        options: LoraOptions {
            rank,
            alpha: rank as f64,
            targets: changed.into_iter().collect(),
            modules_to_save: whole.into_iter().collect(),
            bias: if biases { Bias::All } else { Bias::None },
            ..LoraOptions::default()
        },
        original: None,
    }
}

/// Weights that are named where two models differ; another model differs in all of its weights.
const SHOWN: usize = 24;

/// Refuses models that have not the same weights, and names the first that differ.
pub(crate) fn check_same(tuned: &Opened, base: &Opened) -> Result<()> {
    let shapes = |opened: &Opened| -> BTreeMap<String, Vec<usize>> {
        let weights = &opened.checkpoint.model.spec().weights;
        weights.iter().map(|weight| (weight.name.clone(), weight.shape.clone())).collect()
    };
    let (after, before) = (shapes(tuned), shapes(base));
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let other: Vec<&String> =
        names.into_iter().filter(|name| after.get(*name) != before.get(*name)).collect();
    if other.is_empty() {
        return Ok(());
    }
    let list = |shapes: &BTreeMap<String, Vec<usize>>| {
        let one = |name: &&String| format!("`{name}` {}", described(shapes.get(*name)));
        let shown = other.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", ");
        match other.len().saturating_sub(SHOWN) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    };
    Err(Error::Plan {
        what: "the two models have different weights".to_owned(),
        expected: list(&before),
        found: list(&after),
        help: "give the base the model was tuned from; a resized vocabulary or another head \
               has to be put back first"
            .to_owned(),
    })
}

fn described(shape: Option<&Vec<usize>>) -> String {
    shape.map_or_else(|| "nowhere".to_owned(), |shape| format!("of shape {shape:?}"))
}
