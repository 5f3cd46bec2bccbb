//! What survives a kill: parameters, optimiser state and place, written atomically.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use retune_core::parameters::Parameters;
use retune_files::atomic::AtomicFolder;
use retune_files::safetensors::{SafeTensors, TensorToWrite, write_file};
use serde::{Deserialize, Serialize};

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
    let tensors: Vec<TensorToWrite> = parameters
        .iter()
        .map(|(id, p)| TensorToWrite::f32(p.name.clone(), p.shape.clone(), parameters.values(id)))
        .collect();
    write_file(&staging.path().join(PARAMETERS), tensors, &BTreeMap::new())?;
    let mut tensors = Vec::new();
    for ((_, parameter), lists) in parameters.iter().zip(optimizer) {
        for (name, list) in state_names.iter().zip(lists) {
            let key = format!("{name}/{}", parameter.name);
            tensors.push(TensorToWrite::f32(key, vec![list.len()], list.clone()));
        }
    }
    write_file(&staging.path().join(OPTIMIZER), tensors, &BTreeMap::new())?;
    for name in [PARAMETERS, OPTIMIZER] {
        let hash = retune_files::sha256_file(&staging.path().join(name))?;
        state.hashes.insert(name.to_owned(), hash);
    }
    let text = serde_json::to_string_pretty(&state)
        .unwrap_or_else(|error| unreachable!("a state is always JSON: {error}"));
    retune_files::atomic::write(&staging.path().join(STATE), text.as_bytes())?;
    staging.publish()?;
    Ok(path)
}

/// Lists the steps of all checkpoints under `root`, newest first. Unfinished ones are not listed.
///
/// # Errors
/// If the folder exists and cannot be read.
pub fn list(root: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = retune_files::list_folder(root)?
        .iter()
        .filter_map(|name| name.strip_prefix("step-")?.parse().ok())
        .collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    Ok(steps)
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
    let found =
        if refused.is_empty() { "no checkpoint".to_owned() } else { refused.join("; ") };
    Err(Error::NoCheckpoint { path: root.to_path_buf(), found })
}

/// Reads the state of one checkpoint and checks that its files are the ones that were written.
fn read_whole(path: &Path) -> Result<State> {
    let text = retune_files::read_to_string(&path.join(STATE))?;
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
        let found = retune_files::sha256_file(&path.join(name))?;
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
    let values = SafeTensors::open(&path.join(PARAMETERS))?;
    let ids: Vec<_> = parameters.iter().map(|(id, p)| (id, p.name.clone())).collect();
    for (id, name) in ids {
        parameters.set(id, values.tensor(&name)?.to_f32()?)?;
    }
    Ok(())
}

fn fill(
    path: &Path,
    parameters: &mut Parameters,
    state_names: &[&str],
) -> Result<OptimizerState> {
    let values = SafeTensors::open(&path.join(PARAMETERS))?;
    let moments = SafeTensors::open(&path.join(OPTIMIZER))?;
    let ids: Vec<_> = parameters.iter().map(|(id, p)| (id, p.name.clone(), p.trains)).collect();
    let mut optimizer = Vec::with_capacity(ids.len());
    for (id, name, trains) in ids {
        parameters.set(id, values.tensor(&name)?.to_f32()?)?;
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
