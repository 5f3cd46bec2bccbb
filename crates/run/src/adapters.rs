//! Adapters in force on a base: several at once, or merged under what trains next.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retune_core::change::{Changes, Mode, Scope};
use retune_core::model::Tuned;
use retune_core::parameters::{Parameters, to_vec};
use retune_core::random::Seed;
use retune_core::weights::Weights;
use retune_methods::adapter::{Adapter, Lower};

use crate::error::{Error, Result};
use crate::export::check_mergeable;
use crate::merged::Merged;
use crate::open::{Opened, check_base};

/// Adapters with the folders they lie in, in the order in which they apply.
pub type Adapters = Vec<(PathBuf, Adapter)>;

/// Reads adapters; a folder that holds those of several stacked methods stands for them all, in
/// their order.
///
/// # Errors
/// If a file is missing, damaged, or not of an adapter.
pub fn read_adapters<P: AsRef<Path>>(folders: &[P]) -> Result<Adapters> {
    let mut adapters = Vec::new();
    for folder in folders.iter().map(AsRef::as_ref) {
        let stacked = stacked_folders(folder);
        let paths = if stacked.is_empty() { vec![folder.to_path_buf()] } else { stacked };
        for path in paths {
            let adapter = Adapter::read(&path)?;
            adapters.push((path, adapter));
        }
    }
    Ok(adapters)
}

/// Returns the name of the folder of a stack's part, counted from 0.
pub(crate) fn stacked_folder(place: usize, method: &str) -> String {
    format!("{}-{method}", place + 1)
}

/// Lists the folders of a stack's parts in their order; none where the folder is no stack's.
fn stacked_folders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let numbered = |path: PathBuf| {
        let number = path.file_name()?.to_str()?.split_once('-')?.0.parse::<usize>().ok()?;
        path.join("adapter_config.json").exists().then_some((number, path))
    };
    let mut found: Vec<(usize, PathBuf)> =
        entries.flatten().filter_map(|entry| numbered(entry.path())).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Adapters in force.
#[derive(Debug)]
pub struct InForce {
    /// Their changes.
    pub changes: Changes,
    /// Their values.
    pub parameters: Parameters,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Puts adapters in force on a base, each on top of those before it.
///
/// # Errors
/// If one is of another base (unless forced), does not fit, or replaces a weight that one before it
/// changes.
pub fn attach_adapters(adapters: &Adapters, opened: &Opened, force: bool) -> Result<InForce> {
    let weights = &opened.weights;
    let mut parameters = Parameters::new(weights.device());
    let mut changes = Changes::default();
    let mut notes = Vec::new();
    for (place, (folder, adapter)) in adapters.iter().enumerate() {
        check_base(folder, adapter, opened, force)?;
        notes.extend(missing_below(folder, adapter, &adapters[..place], opened));
        let mut list = parameters.continued();
        let more = adapter.method()?.attach(weights, &mut list, Seed(0))?;
        adapter.fill(folder, &mut list)?;
        let under =
            Tuned { model: opened.model(), weights, changes: &changes, parameters: &parameters };
        let over = Tuned { model: opened.model(), weights, changes: &more, parameters: &list };
        if let Some(name) = replaced(&under, &over)? {
            return Err(Error::Plan {
                what: format!(
                    "{} replaces `{name}`, which an adapter before it changes",
                    folder.display()
                ),
                expected: "one adapter that replaces a weight, before those that change it"
                    .to_owned(),
                found: format!("it stands at place {} of {}", place + 1, adapters.len()),
                help: "give it first, or leave one of them out".to_owned(),
            });
        }
        changes.extend(more);
        parameters.append(&(place + 1).to_string(), list);
    }
    Ok(InForce { changes, parameters, notes })
}

fn replaces(tuned: &Tuned<'_>, name: &str) -> bool {
    tuned.changes.of_weight(name).iter().any(|change| change.replaces_base())
}

/// Names a weight that changes replace although others change it before; the very same values (of a
/// head that stacked methods share) fight nobody.
fn replaced(under: &Tuned<'_>, over: &Tuned<'_>) -> Result<Option<String>> {
    let changed = |name: &&str| !under.changes.of_weight(name).is_empty();
    let added_to = |name: &&str| replaces(over, name) && !replaces(under, name);
    let found = over.changes.changed_weights().filter(changed).find(added_to);
    Ok(found.map(str::to_owned).or(both_replace(under, over)?))
}

/// Names a weight that both replace, by different values.
pub(crate) fn both_replace(one: &Tuned<'_>, other: &Tuned<'_>) -> Result<Option<String>> {
    let value = |tuned: &Tuned<'_>, name: &str| -> Result<Vec<f32>> {
        let scope = Scope::new(tuned.parameters, Mode::Evaluate);
        Ok(to_vec(tuned.changes.materialize(name, tuned.weights, &scope)?.inner()))
    };
    for name in one.changes.changed_weights() {
        if replaces(one, name) && replaces(other, name) && value(one, name)? != value(other, name)?
        {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// Says which adapters one was trained on top of that are not in force below it.
fn missing_below(
    folder: &Path,
    adapter: &Adapter,
    below: &[(PathBuf, Adapter)],
    opened: &Opened,
) -> Option<String> {
    let known: Vec<String> = below.iter().map(|(_, adapter)| adapter.fingerprint()).collect();
    let missing: Vec<String> = adapter
        .trained_on()
        .into_iter()
        .filter(|lower| !known.contains(&lower.fingerprint))
        .filter(|lower| !opened.under.iter().any(|under| under.fingerprint == lower.fingerprint))
        .map(|lower| lower.name)
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "{} was trained on top of {}, which is not in force: give that before it, or another \
             that is meant to take its place",
            folder.display(),
            missing.join(", ")
        )
    })
}

/// Returns a base with adapters merged in, which is what training then starts from. The base's own
/// hash stays the one adapters are known by, because changes of one base add up.
///
/// # Errors
/// As [`attach_adapters`], or if an adapter changes states, which cannot be merged.
pub fn merge_under(opened: Opened, adapters: &Adapters, force: bool) -> Result<Opened> {
    if adapters.is_empty() {
        return Ok(opened);
    }
    let in_force = attach_adapters(adapters, &opened, force)?;
    let InForce { changes, parameters, .. } = in_force;
    check_mergeable(&Tuned {
        model: opened.model(),
        weights: &opened.weights,
        changes: &changes,
        parameters: &parameters,
    })?;
    let Opened { checkpoint, weights, fingerprint, .. } = opened;
    let (spec, packing) = (Arc::clone(checkpoint.model.spec()), weights.packing());
    let device = weights.device().clone();
    let under = adapters
        .iter()
        .map(|(path, adapter)| Lower {
            name: path.display().to_string(),
            fingerprint: adapter.fingerprint(),
        })
        .collect();
    let path = adapters.last().map(|(path, _)| path.clone()).unwrap_or_default();
    let source = Arc::new(Merged { weights, changes, parameters, path });
    let weights = Weights::new(source, spec, packing, &device)?;
    Ok(Opened { checkpoint, weights, fingerprint, under })
}
