//! What survives a kill: parameters, optimiser state and place, written atomically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use retune_core::method::ParameterState;
use retune_core::parameters::Parameters;
use retune_core::tap::{Tap, Window};
use retune_files::Dtype;
use retune_files::atomic::{AtomicFolder, recover};
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
/// Which entries sparse parameters stand for, and what taps on gradients have gathered.
const ENTRIES: &str = "entries.safetensors";
const STATE: &str = "state.json";

/// Where a run stands, beside its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The layout of this file.
    pub format: u32,
    /// Hash of the plan the run follows.
    pub plan: String,
    /// Steps done.
    pub step: u64,
    /// Best validation loss so far and the step it was seen at.
    pub best: Option<(f64, u64)>,
    /// Evaluations since then.
    pub evaluations_without_better: u64,
    /// SHA-256 of the two safetensors files, so that a file cut in half is noticed.
    pub hashes: BTreeMap<String, String>,
    /// What is known of each parameter beside its numbers.
    #[serde(default)]
    pub parameters: BTreeMap<String, Record>,
    /// What the method keeps beside the parameters.
    #[serde(default)]
    pub method: serde_json::Value,
}

/// What is known of a parameter beside its numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whether it trains.
    pub trains: bool,
    /// Steps that were done when its optimiser state was made.
    pub since: u64,
    /// Where a tap on its gradient is open: candidates it has yet to choose, steps it has summed.
    pub tap: Option<(usize, u64)>,
}

/// Optimiser state, in the order of the parameters.
pub type OptimizerState = Vec<ParameterState>;

/// Returns the folder of the checkpoint after `step` steps.
pub fn folder(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step:08}"))
}

/// Writes a checkpoint; it is there whole or not at all.
///
/// # Errors
/// If the disk is full or the folder read-only; checkpoints written before stay as they are.
pub fn save(
    root: &Path,
    mut state: State,
    parameters: &Parameters,
    state_names: &[&str],
    optimizer: &OptimizerState,
) -> Result<PathBuf> {
    let path = folder(root, state.step);
    let staging = AtomicFolder::create(&path)?;
    let specs: Vec<TensorSpec> = parameters
        .iter()
        .map(|(_, p)| TensorSpec::new(&p.name, p.dtype(), p.shape.clone()))
        .collect();
    let file = staging.path().join(PARAMETERS);
    let mut writer = SafetensorsWriter::create(&file, &specs, &BTreeMap::new())?;
    for (id, _) in parameters.iter() {
        parameters.write(id, &mut writer)?;
    }
    writer.finish()?;
    let lists: Vec<(String, &Vec<f32>)> = parameters
        .iter()
        .zip(optimizer)
        .flat_map(|((_, parameter), state)| {
            let keys = state_names.iter().map(|name| format!("{name}/{}", parameter.name));
            let ages = state.ages.iter().map(|ages| (format!("{AGE}/{}", parameter.name), ages));
            keys.zip(&state.lists).chain(ages).collect::<Vec<_>>()
        })
        .collect();
    let specs: Vec<TensorSpec> = lists
        .iter()
        .map(|(key, list)| TensorSpec::new(key, Dtype::F32, vec![list.len()]))
        .collect();
    let file = staging.path().join(OPTIMIZER);
    let mut writer = SafetensorsWriter::create(&file, &specs, &BTreeMap::new())?;
    for (key, list) in &lists {
        writer.write_f32(key, list)?;
    }
    writer.finish()?;
    let mut files = vec![PARAMETERS, OPTIMIZER];
    if write_entries(&staging.path().join(ENTRIES), parameters)? {
        files.push(ENTRIES);
    }
    state.parameters = parameters
        .iter()
        .zip(optimizer)
        .map(|((id, parameter), state)| {
            let tap = parameters.tap(id).and_then(Tap::window).map(|w| (w.room, w.updates));
            (parameter.name.clone(), Record { trains: parameter.trains, since: state.since, tap })
        })
        .collect();
    for name in files {
        let hash = sha256(&staging.path().join(name)).map_err(|error| staging.error(error))?;
        state.hashes.insert(name.to_owned(), hash);
    }
    let text = serde_json::to_string_pretty(&state)
        .unwrap_or_else(|error| unreachable!("a state is always JSON: {error}"));
    std::fs::write(staging.path().join(STATE), text).map_err(|error| staging.error(error))?;
    // A resumed run may save the same step again, with the same bits.
    staging.replace()?;
    Ok(path)
}

/// The list of ages in the optimiser's file, beside the optimiser's own.
const AGE: &str = "age";

/// Writes the entries of sparse parameters and the windows of open taps; says whether there are any.
fn write_entries(path: &Path, parameters: &Parameters) -> Result<bool> {
    let mut integers: Vec<(String, Vec<u32>)> = Vec::new();
    let mut floats: Vec<(String, Vec<f32>)> = Vec::new();
    for (id, parameter) in parameters.iter() {
        let name = &parameter.name;
        if let Some(support) = parameters.support(id) {
            integers.push((format!("indices/{name}"), support.indices.to_vec()));
        }
        if let Some(window) = parameters.tap(id).and_then(Tap::window) {
            integers.push((format!("tap.candidates/{name}"), window.candidates));
            for (part, list) in [
                ("weights", window.weights),
                ("pending", window.pending),
                ("sums", window.sums),
                ("squares", window.squares),
            ] {
                floats.push((format!("tap.{part}/{name}"), list));
            }
        }
    }
    if integers.is_empty() {
        return Ok(false);
    }
    let specs: Vec<TensorSpec> = integers
        .iter()
        .map(|(key, list)| TensorSpec::new(key, Dtype::U32, vec![list.len()]))
        .chain(floats.iter().map(|(key, list)| TensorSpec::new(key, Dtype::F32, vec![list.len()])))
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &BTreeMap::new())?;
    for (key, list) in &integers {
        let bytes: Vec<u8> = list.iter().flat_map(|index| index.to_le_bytes()).collect();
        writer.write(key, &bytes)?;
    }
    for (key, list) in &floats {
        writer.write_f32(key, list)?;
    }
    writer.finish()?;
    Ok(true)
}

/// Lists the steps of all checkpoints under `root`, newest first. Unfinished ones are not listed.
///
/// # Errors
/// If the folder exists and cannot be read.
pub fn list(root: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(root, &error)),
    };
    let mut steps: Vec<u64> = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| unreadable(root, &error))?.file_name();
        let step: Option<u64> =
            name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
        steps.extend(step);
    }
    steps.sort_unstable_by(|a, b| b.cmp(a));
    Ok(steps)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::Checkpoint {
        path: path.to_path_buf(),
        what: "cannot be read".to_owned(),
        expected: "a readable file".to_owned(),
        found: error.to_string(),
        help: "check the permissions of the run folder".to_owned(),
    }
}

/// Returns the SHA-256 of a file in hexadecimal.
fn sha256(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()))
}

/// Removes what a killed save left behind, and all but the newest `keep` checkpoints and `best`.
///
/// # Errors
/// If the folder cannot be read or changed.
pub fn tidy(root: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    for step in list(root)?.into_iter().skip(keep) {
        if Some(step) != best {
            let path = folder(root, step);
            std::fs::remove_dir_all(&path).map_err(|error| unreadable(&path, &error))?;
        }
    }
    Ok(())
}

/// Mends what a crash in the middle of [`save`] left at `step`.
///
/// # Errors
/// If the folder cannot be changed.
pub fn mend(root: &Path, step: u64) -> Result<()> {
    recover(&folder(root, step))?;
    Ok(())
}

/// Reads the newest checkpoint that is whole into `parameters`, and says which ones were passed
/// over and why.
///
/// # Errors
/// [`Error::NoCheckpoint`] if none can be used; [`Error::Checkpoint`] if the newest whole one
/// belongs to another plan.
pub fn load_newest(
    root: &Path,
    plan: &str,
    parameters: &mut Parameters,
    state_names: &[&str],
) -> Result<(State, OptimizerState, Vec<String>)> {
    let mut refused = Vec::new();
    for step in list(root)? {
        let path = folder(root, step);
        match read_whole(&path) {
            Ok(state) => {
                if state.plan != plan {
                    return Err(Error::Checkpoint {
                        path,
                        what: "the checkpoint belongs to another plan".to_owned(),
                        expected: format!("plan {plan}"),
                        found: format!("plan {}", state.plan),
                        help: "the recipe, the data or the model changed since; undo that, or start anew with `retune run`".to_owned(),
                    });
                }
                let optimizer = fill(&path, &state, parameters, state_names)?;
                return Ok((state, optimizer, refused));
            }
            Err(error) => refused.push(format!("{} is damaged: {error}", path.display())),
        }
    }
    let found = if refused.is_empty() { "no checkpoint".to_owned() } else { refused.join("; ") };
    Err(Error::NoCheckpoint { path: root.to_path_buf(), found })
}

/// Reads the state of one checkpoint and checks that its files are the ones that were written.
fn read_whole(path: &Path) -> Result<State> {
    let text = std::fs::read_to_string(path.join(STATE))
        .map_err(|error| unreadable(&path.join(STATE), &error))?;
    let wrong = |what: String, expected: String, found: String| Error::Checkpoint {
        path: path.to_path_buf(),
        what,
        expected,
        found,
        help: "the checkpoint before it is used".to_owned(),
    };
    let state: State = serde_json::from_str(&text).map_err(|error| {
        wrong(format!("{STATE} cannot be read"), "a whole JSON file".to_owned(), error.to_string())
    })?;
    for (name, expected) in &state.hashes {
        let file = path.join(name);
        let found = sha256(&file).map_err(|error| unreadable(&file, &error))?;
        if found != *expected {
            return Err(wrong(format!("{name} is not what was written"), expected.clone(), found));
        }
    }
    Ok(state)
}

/// Reads the values of one checkpoint into `parameters`, and nothing else.
///
/// # Errors
/// If the checkpoint is damaged or belongs to another run.
pub fn load_values(path: &Path, parameters: &mut Parameters) -> Result<()> {
    let state = read_whole(path)?;
    fill_values(path, &state, parameters)
}

fn fill_values(path: &Path, state: &State, parameters: &mut Parameters) -> Result<()> {
    let values = SafetensorsFile::open(path.join(PARAMETERS))?;
    let entries = if state.hashes.contains_key(ENTRIES) {
        Some(SafetensorsFile::open(path.join(ENTRIES))?)
    } else {
        None
    };
    let integers = |key: &str| -> Result<Vec<u32>> {
        let Some(file) = &entries else { return Ok(Vec::new()) };
        Ok(file.tensor(key)?.to_i64()?.into_iter().map(|index| index as u32).collect())
    };
    let floats = |key: &str| -> Result<Vec<f32>> {
        let Some(file) = &entries else { return Ok(Vec::new()) };
        Ok(file.tensor(key)?.to_f32()?)
    };
    let ids: Vec<_> = parameters.iter().map(|(id, p)| (id, p.name.clone())).collect();
    for (id, name) in ids {
        let record = state.parameters.get(&name);
        let tensor = values.tensor(&name)?;
        if parameters.support(id).is_some() {
            parameters.set_entries(id, integers(&format!("indices/{name}"))?, tensor.to_f32()?)?;
        } else if tensor.shape == [0] && parameters.get(id).count() > 0 {
            parameters.release(id);
        } else {
            parameters.read(id, &tensor)?;
        }
        let Some(record) = record else { continue };
        parameters.set_trains(id, record.trains);
        if let Some(tap) = parameters.tap(id) {
            let window = match record.tap {
                None => None,
                Some((room, updates)) => Some(Window {
                    room,
                    updates,
                    candidates: integers(&format!("tap.candidates/{name}"))?,
                    weights: floats(&format!("tap.weights/{name}"))?,
                    pending: floats(&format!("tap.pending/{name}"))?,
                    sums: floats(&format!("tap.sums/{name}"))?,
                    squares: floats(&format!("tap.squares/{name}"))?,
                }),
            };
            tap.restore(window);
        }
    }
    Ok(())
}

fn fill(
    path: &Path,
    state: &State,
    parameters: &mut Parameters,
    state_names: &[&str],
) -> Result<OptimizerState> {
    fill_values(path, state, parameters)?;
    let moments = SafetensorsFile::open(path.join(OPTIMIZER))?;
    let mut optimizer = Vec::new();
    for (_, parameter) in parameters.iter() {
        let name = &parameter.name;
        let mut of = ParameterState {
            since: state.parameters.get(name).map_or(0, |record| record.since),
            ..ParameterState::default()
        };
        if parameter.trains && !parameter.moved_by_method {
            for list in state_names {
                of.lists.push(moments.tensor(&format!("{list}/{name}"))?.to_f32()?);
            }
            if parameter.counts_ages {
                of.ages = Some(moments.tensor(&format!("{AGE}/{name}"))?.to_f32()?);
            }
        }
        optimizer.push(of);
    }
    Ok(optimizer)
}
