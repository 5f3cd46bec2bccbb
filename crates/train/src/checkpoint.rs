//! What survives a kill: parameters, optimiser state and place, written atomically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use retune_core::parameters::Parameters;
use retune_files::Dtype;
use retune_files::atomic::{AtomicFolder, recover};
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
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
}

/// Optimiser state: one set of lists per parameter, in the order of the parameters.
pub type OptimizerState = Vec<Vec<Vec<f32>>>;

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
        .flat_map(|((_, parameter), lists)| {
            let keys = state_names.iter().map(|name| format!("{name}/{}", parameter.name));
            keys.zip(lists).collect::<Vec<_>>()
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
    for name in [PARAMETERS, OPTIMIZER] {
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
                let optimizer = fill(&path, parameters, state_names)?;
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
    read_whole(path)?;
    let values = SafetensorsFile::open(path.join(PARAMETERS))?;
    let ids: Vec<_> = parameters.iter().map(|(id, p)| (id, p.name.clone())).collect();
    for (id, name) in ids {
        parameters.read(id, &values.tensor(&name)?)?;
    }
    Ok(())
}

fn fill(path: &Path, parameters: &mut Parameters, state_names: &[&str]) -> Result<OptimizerState> {
    let values = SafetensorsFile::open(path.join(PARAMETERS))?;
    let moments = SafetensorsFile::open(path.join(OPTIMIZER))?;
    let ids: Vec<_> = parameters.iter().map(|(id, p)| (id, p.name.clone(), p.trains)).collect();
    let mut optimizer = Vec::with_capacity(ids.len());
    for (id, name, trains) in ids {
        parameters.read(id, &values.tensor(&name)?)?;
        let mut lists = Vec::new();
        if trains {
            for state in state_names {
                lists.push(moments.tensor(&format!("{state}/{name}"))?.to_f32()?);
            }
        }
        optimizer.push(lists);
    }
    Ok(optimizer)
}
