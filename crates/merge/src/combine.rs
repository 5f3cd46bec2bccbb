//! Several LoRA adapters as one, by the combinations of PEFT's `add_weighted_adapter`.
//!
//! Sources: task arithmetic, Ilharco et al., 2023, arXiv 2212.04089; TIES, Yadav et al., 2023, arXiv
//! 2306.01708; DARE, Yu et al., 2024, arXiv 2311.03099. The rules are those of PEFT 0.21, checked
//! against it by `tests/interop/peft_combine.py`.
//!
//! | kind | works on | rank of the result |
//! |---|---|---|
//! | `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | each factor by itself, with the root of the weight | that of all adapters |
//! | `cat` | the factors side by side: exact | sum of all |
//! | `svd` and the same names with `_svd` | the changes themselves, then the best approximation | any |

mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use rules::{Draw, Task};
pub use rules::{MajoritySign, Merge};

use crate::pairs::{LoraAdapter, Pair, Tensor};
use crate::spectrum::{MAX_SIDE, truncate};
use crate::{Error, Result};

/// What a combination is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Each factor is merged by itself. A rough approximation: the product of sums is no sum of
    /// products.
    Factors(Merge),
    /// The factors stand side by side, which is exact.
    Concatenation,
    /// The changes are merged and factored again.
    Svd(Merge),
}

/// All names, as PEFT has them.
pub const NAMES: [(&str, Form); 11] = [
    ("linear", Form::Factors(Merge::Linear)),
    ("cat", Form::Concatenation),
    ("svd", Form::Svd(Merge::Linear)),
    ("ties", Form::Factors(Merge::Ties)),
    ("ties_svd", Form::Svd(Merge::Ties)),
    ("dare_linear", Form::Factors(Merge::DareLinear)),
    ("dare_linear_svd", Form::Svd(Merge::DareLinear)),
    ("dare_ties", Form::Factors(Merge::DareTies)),
    ("dare_ties_svd", Form::Svd(Merge::DareTies)),
    ("magnitude_prune", Form::Factors(Merge::MagnitudePrune)),
    ("magnitude_prune_svd", Form::Svd(Merge::MagnitudePrune)),
];

/// How adapters are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// What is merged, and how.
    pub form: Form,
    /// Rank of the result of the SVD forms; the largest of the adapters where absent.
    pub rank: Option<usize>,
    /// Share of entries kept; TIES, DARE and pruning need it.
    pub density: Option<f64>,
    /// How TIES elects a sign.
    pub majority_sign: MajoritySign,
    /// Decides what DARE drops.
    pub seed: u64,
}

/// One adapter made of several.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined {
    /// Its `adapter_config.json`.
    pub config: Map<String, Value>,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Its rank.
    pub rank: usize,
    /// Mean share of the merged changes' energy that the SVD forms keep.
    pub kept: Option<f64>,
}

/// Combines adapters, each with a weight (negative ones subtract).
///
/// # Errors
/// [`Error`] if settings do not fit together, ranks or shapes differ where they may not, a module
/// saved whole is in two adapters, or a matrix is too large to be factored.
pub fn combine(adapters: &[(LoraAdapter, f64)], settings: &Settings) -> Result<Combined> {
    let form = check(adapters, settings)?;
    let largest = adapters.iter().map(|(adapter, _)| adapter.max_rank()).max().unwrap_or(0);
    let rank = match form {
        Form::Factors(_) => largest,
        Form::Concatenation => adapters.iter().map(|(adapter, _)| adapter.max_rank()).sum(),
        Form::Svd(_) => settings.rank.unwrap_or(largest),
    };
    let modules: BTreeSet<&String> =
        adapters.iter().flat_map(|(adapter, _)| adapter.pairs.keys()).collect();
    let mut tensors = others(adapters)?;
    let mut shares = Vec::new();
    for module in modules {
        // A module only some adapters have is made of those alone.
        let found: Vec<(&LoraAdapter, &Pair, f64)> = adapters
            .iter()
            .filter_map(|(adapter, weight)| Some((adapter, adapter.pairs.get(module)?, *weight)))
            .collect();
        check_shapes(module, &found, form)?;
        let (a, b) = match form {
            Form::Factors(merge) => factors(module, &found, merge, settings, rank),
            Form::Concatenation => side_by_side(&found, rank),
            Form::Svd(merge) => {
                let (a, b, share) = factored(module, &found, merge, settings, rank)?;
                shares.push(share);
                (a, b)
            }
        };
        let first = found[0].1;
        let (a_name, b_name) = first.names(module);
        tensors.insert(a_name, (vec![rank, first.inputs], a));
        tensors.insert(b_name, (vec![first.outputs, rank], b));
    }
    let kept = (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64);
    Ok(Combined { config: config(adapters, rank), tensors, rank, kept })
}

/// Checks what can be checked before anything is computed.
fn check(adapters: &[(LoraAdapter, f64)], settings: &Settings) -> Result<Form> {
    let wrong = |setting: &str, expected: &str, found: String| Error::Setting {
        setting: setting.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    if adapters.is_empty() {
        return Err(wrong("adapters", "at least one", "none".to_owned()));
    }
    if let Some((_, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(wrong("weights", "a finite number for each adapter", weight.to_string()));
    }
    // One adapter is only scaled; PEFT takes `linear` then, whatever was asked for.
    let form = if adapters.len() == 1 { Form::Factors(Merge::Linear) } else { settings.form };
    let merge = match form {
        Form::Factors(merge) | Form::Svd(merge) => merge,
        Form::Concatenation => Merge::Linear,
    };
    match settings.density {
        None if merge != Merge::Linear => {
            return Err(wrong("density", "a share above 0 and at most 1", "none".to_owned()));
        }
        Some(density) if !(density > 0.0 && density <= 1.0) => {
            return Err(wrong("density", "a share above 0 and at most 1", density.to_string()));
        }
        _ => {}
    }
    if settings.rank == Some(0) {
        return Err(wrong("rank", "at least 1", "0".to_owned()));
    }
    Ok(form)
}

fn conflict(adapter: &LoraAdapter, what: String, expected: String, found: String) -> Error {
    Error::Content {
        path: adapter.path.clone(),
        what,
        expected,
        found,
        help: "leave the adapter out, or combine the models they make instead".to_owned(),
    }
}

fn check_shapes(module: &str, found: &[(&LoraAdapter, &Pair, f64)], form: Form) -> Result<()> {
    let (_, first, _) = found[0];
    for (adapter, pair, _) in found {
        let shape = |pair: &Pair| [pair.outputs, pair.inputs];
        if shape(pair) != shape(first) || pair.is_embedding != first.is_embedding {
            let what = format!("`{module}` has another shape than in the first adapter");
            let (expected, found) = (shape(first), shape(pair));
            return Err(conflict(adapter, what, format!("{expected:?}"), format!("{found:?}")));
        }
        if matches!(form, Form::Factors(_)) && pair.rank != first.rank {
            return Err(Error::Content {
                path: adapter.path.clone(),
                what: format!("`{module}` has another rank than in the first adapter"),
                expected: format!("rank {}", first.rank),
                found: format!("rank {}", pair.rank),
                help: "use cat, svd or a type that ends in _svd".to_owned(),
            });
        }
    }
    Ok(())
}

/// Carries over what is no pair, as long as one adapter alone has it.
fn others(adapters: &[(LoraAdapter, f64)]) -> Result<BTreeMap<String, Tensor>> {
    let mut all: BTreeMap<String, (Tensor, PathBuf)> = BTreeMap::new();
    for (adapter, _) in adapters {
        for (name, tensor) in &adapter.others {
            if let Some((_, other)) = all.get(name) {
                return Err(conflict(
                    adapter,
                    format!("`{name}` is saved whole and cannot be combined"),
                    "whole modules in one adapter at most".to_owned(),
                    format!("it is in {} too", other.display()),
                ));
            }
            all.insert(name.clone(), (tensor.clone(), adapter.path.clone()));
        }
    }
    Ok(all.into_iter().map(|(name, (tensor, _))| (name, tensor)).collect())
}

/// Merges each factor by itself; the sign of a weight goes to the first.
fn factors(
    module: &str,
    found: &[(&LoraAdapter, &Pair, f64)],
    merge: Merge,
    settings: &Settings,
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    let scaled = |pair: &Pair, weight: f64| weight * pair.scale;
    let root = |pair: &Pair, weight: f64| scaled(pair, weight).abs().sqrt();
    let a: Vec<Task<'_>> = found
        .iter()
        .map(|(_, pair, weight)| {
            let sign = if scaled(pair, *weight) < 0.0 { -1.0 } else { 1.0 };
            (pair.a.as_slice(), (root(pair, *weight) * sign) as f32)
        })
        .collect();
    let b: Vec<Task<'_>> = found
        .iter()
        .map(|(_, pair, weight)| (pair.b.as_slice(), root(pair, *weight) as f32))
        .collect();
    let own = found[0].1.rank;
    let draw = |factor: &str| Draw::new(settings.seed, &format!("{module}{factor}"));
    let a = rules::merge(&a, merge, settings.density, settings.majority_sign, draw(".a"));
    let b = rules::merge(&b, merge, settings.density, settings.majority_sign, draw(".b"));
    widen(a, b, own, rank)
}

/// Fills both factors up with zeros.
fn widen(mut a: Vec<f32>, b: Vec<f32>, own: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    if own == rank {
        return (a, b);
    }
    a.resize(a.len() / own.max(1) * rank, 0.0);
    let mut wide = Vec::with_capacity(b.len() / own.max(1) * rank);
    for row in b.chunks_exact(own.max(1)) {
        wide.extend_from_slice(row);
        wide.resize(wide.len() + rank - own, 0.0);
    }
    (a, wide)
}

fn side_by_side(found: &[(&LoraAdapter, &Pair, f64)], rank: usize) -> (Vec<f32>, Vec<f32>) {
    let mut a = Vec::new();
    let own: usize = found.iter().map(|(_, pair, _)| pair.rank).sum();
    let outputs = found[0].1.outputs;
    let mut b = vec![0.0f32; outputs * own];
    let mut start = 0;
    for (_, pair, weight) in found {
        let (weight, scale) = (*weight as f32, pair.scale as f32);
        a.extend(pair.a.iter().map(|x| x * weight * scale));
        for (wide, row) in b.chunks_exact_mut(own).zip(pair.b.chunks_exact(pair.rank)) {
            wide[start..start + pair.rank].copy_from_slice(row);
        }
        start += pair.rank;
    }
    widen(a, b, own, rank)
}

/// Merges the changes and factors the result; also returns the share of the energy kept.
fn factored(
    module: &str,
    found: &[(&LoraAdapter, &Pair, f64)],
    merge: Merge,
    settings: &Settings,
    rank: usize,
) -> Result<(Vec<f32>, Vec<f32>, f64)> {
    let (adapter, first, _) = found[0];
    let (rows, columns) = (first.outputs, first.inputs);
    if rows.min(columns) > MAX_SIDE {
        return Err(conflict(
            adapter,
            format!("`{module}` is too large to be factored"),
            format!("a smaller side of at most {MAX_SIDE}"),
            format!("{rows} x {columns}"),
        ));
    }
    let deltas: Vec<Vec<f32>> = found.iter().map(|(_, pair, _)| pair.delta()).collect();
    let tasks: Vec<Task<'_>> = deltas
        .iter()
        .zip(found)
        .map(|(delta, (_, _, weight))| (delta.as_slice(), *weight as f32))
        .collect();
    let draw = Draw::new(settings.seed, module);
    let merged = rules::merge(&tasks, merge, settings.density, settings.majority_sign, draw);
    let factors = truncate(&merged, rows, columns, rank);
    let share = factors.kept(rank);
    Ok((factors.right, factors.left, share))
}

/// Makes the configuration: that of the first adapter, with what the combination changes.
fn config(adapters: &[(LoraAdapter, f64)], rank: usize) -> Map<String, Value> {
    let mut config = adapters[0].0.config.clone();
    let mut set = |key: &str, value: Value| {
        config.insert(key.to_owned(), value);
    };
    // The scale is 1 then; rsLoRA would make it the root of the rank.
    set("r", json!(rank));
    set("lora_alpha", json!(rank));
    set("use_rslora", json!(false));
    set("rank_pattern", json!({}));
    set("alpha_pattern", json!({}));
    set("target_modules", targets(adapters));
    let whole: BTreeSet<String> = adapters
        .iter()
        .flat_map(|(adapter, _)| names(&adapter.config, "modules_to_save"))
        .collect();
    set("modules_to_save", if whole.is_empty() { Value::Null } else { json!(whole) });
    config
}

fn names(config: &Map<String, Value>, key: &str) -> Vec<String> {
    let list = config.get(key).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Unites what the adapters target: lists become one list, expressions one expression. Where both
/// kinds meet, every module is listed by its path.
fn targets(adapters: &[(LoraAdapter, f64)]) -> Value {
    let given: Vec<&Value> =
        adapters.iter().filter_map(|(adapter, _)| adapter.config.get("target_modules")).collect();
    if given.len() == adapters.len() && given.iter().all(|targets| targets.is_array()) {
        let all: BTreeSet<String> = adapters
            .iter()
            .flat_map(|(adapter, _)| names(&adapter.config, "target_modules"))
            .collect();
        return json!(all);
    }
    let texts: BTreeSet<&str> = given.iter().filter_map(|targets| targets.as_str()).collect();
    if given.iter().all(|targets| targets.is_string()) && given.len() == adapters.len() {
        return match texts.iter().next() {
            Some(one) if texts.len() == 1 => json!(one),
            _ => {
                let parts: Vec<String> = texts.iter().map(|text| format!("({text})")).collect();
                json!(parts.join("|"))
            }
        };
    }
    let paths: BTreeSet<&str> = adapters
        .iter()
        .flat_map(|(adapter, _)| adapter.pairs.keys())
        .map(|module| module.strip_prefix("base_model.model.").unwrap_or(module))
        .collect();
    json!(paths)
}

#[cfg(test)]
mod tests;
