//! Grafts as adapters: the entries of a region with their changes, merged and used like any other.

use std::collections::BTreeMap;
use std::path::Path;

use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_files::Dtype;
use retune_methods::adapter::{Adapter, BaseIdentity};
use retune_methods::difference::Difference;
use retune_methods::sparse::name as value_name;

use super::Region;
use super::pair::Pair;
use crate::error::{Error, Result};

/// The entries of one weight, as row and column, with their changes.
type Entries = BTreeMap<(i64, i64), f32>;

/// Makes the adapter of a region.
///
/// # Errors
/// If a file cannot be read.
pub fn adapter(pair: &Pair<'_>, region: &Region, base: Option<&BaseIdentity>) -> Result<Adapter> {
    use retune_core::method::Method;
    let grafted: Vec<String> = region.0.keys().cloned().collect();
    let heads = pair.heads().iter().map(|head| head.name.clone()).collect();
    let method = Difference::of_entries(grafted, heads);
    let mut parameters = Parameters::new(pair.base().device());
    method.attach(pair.base(), &mut parameters, Seed(0))?;
    for weight in pair.weights().iter().filter(|weight| !region.of(&weight.name).is_empty()) {
        let entries = region.of(&weight.name).to_vec();
        let delta = pair.delta(weight)?;
        let values = entries.iter().map(|entry| delta[*entry as usize]).collect();
        if let Some(id) = parameters.find(&value_name(weight)) {
            parameters.set_entries(id, entries, values)?;
        }
    }
    for head in pair.heads() {
        if let Some(id) = parameters.find(&head.name) {
            parameters.set(id, pair.tuned().values(&head.name)?)?;
        }
    }
    Ok(Adapter::collect(&method, pair.base().spec(), &parameters, base)?)
}

/// Reads the entries of every sparse change of an adapter, by the name of its values.
///
/// # Errors
/// [`Error::Run`] if it holds none, or its places are damaged.
fn entries(path: &Path, adapter: &Adapter) -> Result<BTreeMap<String, Entries>> {
    let wrong = |what: String, found: String| Error::Run {
        path: path.to_path_buf(),
        what,
        expected: "an adapter of single entries: a graft, or one of lt-sft, spiel, sara, shira"
            .to_owned(),
        found,
        help: "make one with `retune graft find`".to_owned(),
    };
    let mut found = BTreeMap::new();
    for (name, (_, shape, places)) in &adapter.integers {
        let Some(start) = name.strip_suffix("_indices") else { continue };
        let values_name = format!("{start}_weight");
        let Some((_, values)) = adapter.tensors.get(&values_name) else { continue };
        if *shape != [2, values.len()] {
            let what = format!("the places `{name}` are damaged");
            return Err(wrong(what, format!("{shape:?} for {} values", values.len())));
        }
        let (rows, columns) = places.split_at(values.len());
        let places = rows.iter().copied().zip(columns.iter().copied());
        found.insert(values_name, places.zip(values.iter().copied()).collect());
    }
    if found.is_empty() {
        let kind = adapter.config.get("peft_type").map_or("none".to_owned(), ToString::to_string);
        return Err(wrong("there are no entries".to_owned(), format!("`peft_type` {kind}")));
    }
    Ok(found)
}

/// Reads the region of a graft of this model.
///
/// # Errors
/// [`Error::Run`] if it is no sparse adapter, or holds entries outside of the model.
pub fn region(path: &Path, adapter: &Adapter, pair: &Pair<'_>) -> Result<Region> {
    let mut found = entries(path, adapter)?;
    let mut region = Region::default();
    for weight in pair.weights() {
        let [rows, columns] = weight.matrix();
        let Some(entries) = found.remove(&value_name(weight)) else { continue };
        let inside = |(row, column): &(i64, i64)| {
            (0..rows as i64).contains(row) && (0..columns as i64).contains(column)
        };
        if !entries.keys().all(inside) {
            found.insert(weight.name.clone(), entries);
            break;
        }
        let flat = entries.keys().map(|(row, column)| (row * columns as i64 + column) as u32);
        region.0.insert(weight.name.clone(), flat.collect());
    }
    match found.keys().next() {
        None => Ok(region),
        Some(name) => Err(Error::Run {
            path: path.to_path_buf(),
            what: format!("`{name}` belongs to no weight of this model that can be grafted"),
            expected: "a graft of this model".to_owned(),
            found: "entries of another".to_owned(),
            help: "give a graft that was found for this base".to_owned(),
        }),
    }
}

/// Counts entries and overlaps of several sparse adapters.
///
/// # Errors
/// If one of them is no sparse adapter.
pub fn overlaps(adapters: &[(&Path, &Adapter)]) -> Result<Overlaps> {
    let all = adapters.iter().map(|(path, a)| entries(path, a)).collect::<Result<Vec<_>>>()?;
    let count = |entries: &BTreeMap<String, Entries>| entries.values().map(BTreeMap::len).sum();
    let shared = |one: &BTreeMap<String, Entries>, other: &BTreeMap<String, Entries>| {
        let both = |(name, places): (&String, &Entries)| {
            let theirs = other.get(name);
            places.keys().filter(|p| theirs.is_some_and(|theirs| theirs.contains_key(p))).count()
        };
        one.iter().map(both).sum::<usize>()
    };
    let counts: Vec<usize> = all.iter().map(count).collect();
    let share = |i: usize, j: usize| {
        if counts[j] == 0 { 0.0 } else { shared(&all[i], &all[j]) as f64 / counts[j] as f64 }
    };
    let places = 0..all.len();
    let shares = places.clone().map(|i| places.clone().map(|j| share(i, j)).collect()).collect();
    Ok(Overlaps { counts, shares })
}

/// How far the regions of several tasks are the same.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Overlaps {
    /// Entries of each.
    pub counts: Vec<usize>,
    /// `[i][j]`: the share of `j`'s entries that are `i`'s too.
    pub shares: Vec<Vec<f64>>,
}

/// Adds several grafts of one base up to one: `base + Σ γ · change`.
///
/// # Errors
/// [`Error::Run`] for an adapter that is no graft, is of another base than the first, or brings a
/// second head.
pub fn compose(adapters: &[(&Path, &Adapter)]) -> Result<Adapter> {
    let mut sum: BTreeMap<String, Entries> = BTreeMap::new();
    let mut out = Adapter::default();
    let mut weights: Vec<String> = Vec::new();
    let mut replaced: Vec<String> = Vec::new();
    for (place, (path, adapter)) in adapters.iter().enumerate() {
        let wrong = |what: &str, expected: String, found: String| Error::Run {
            path: path.to_path_buf(),
            what: what.to_owned(),
            expected,
            found,
            help: "compose grafts of one base, of which at most one is a classifier's".to_owned(),
        };
        let entries = entries(path, adapter)?;
        let graft = Difference::from_adapter(&adapter.config).map_err(|_| {
            let kind = adapter.config.get("peft_type").map_or("none".into(), ToString::to_string);
            wrong("this is no graft", "what `retune graft find` wrote".to_owned(), kind)
        })?;
        if place == 0 {
            out.config = adapter.config.clone();
        } else if adapter.base() != adapters[0].1.base() {
            let name = |adapter: &Adapter| {
                adapter.base().map_or("an unknown base".to_owned(), |base| {
                    format!("{} ({})", base.name, base.fingerprint)
                })
            };
            return Err(wrong("another base", name(adapters[0].1), name(adapter)));
        }
        for name in graft.replaced() {
            if replaced.contains(name) {
                return Err(wrong(
                    "two tasks bring a head of one name",
                    format!("one `{name}`"),
                    "two".to_owned(),
                ));
            }
            replaced.push(name.clone());
            if let Some(head) = adapter.tensors.get(name) {
                out.tensors.insert(name.clone(), head.clone());
            }
        }
        weights.extend(graft.sparse().iter().cloned());
        for (name, entries) in entries {
            let sum = sum.entry(name).or_default();
            for (place, value) in entries {
                *sum.entry(place).or_insert(0.0) += value;
            }
        }
    }
    weights.sort();
    weights.dedup();
    out.config["sparse"] = weights.into();
    out.config["replaced"] = replaced.into();
    for (name, entries) in sum {
        let rows = entries.keys().map(|(row, _)| *row);
        let places: Vec<i64> = rows.chain(entries.keys().map(|(_, column)| *column)).collect();
        let indices = format!("{}_indices", name.strip_suffix("_weight").unwrap_or(&name));
        out.integers.insert(indices, (Dtype::I32, vec![2, entries.len()], places));
        out.tensors.insert(name, (vec![entries.len()], entries.into_values().collect()));
    }
    Ok(out)
}
