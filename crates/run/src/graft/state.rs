//! A search that can be interrupted: its scores and its best mask in one file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde::{Deserialize, Serialize};

use super::Region;
use super::pair::Pair;
use super::search::Step;
use crate::error::{Error, Result};

/// The best mask so far, rounded and cut to the budget.
#[derive(Debug, Default)]
pub(super) struct Best {
    pub(super) score: f64,
    pub(super) step: u64,
    pub(super) region: Region,
}

/// Where a search is.
#[derive(Debug)]
pub(super) struct State {
    pub(super) step: u64,
    pub(super) learning_rate: Option<f64>,
    pub(super) scores: Vec<Vec<f32>>,
    pub(super) best: Option<Best>,
    pub(super) steps: Vec<Step>,
}

impl State {
    pub(super) fn new(scores: Vec<Vec<f32>>) -> Self {
        Self { step: 0, learning_rate: None, scores, best: None, steps: Vec::new() }
    }

    /// Notes a step, and keeps its mask where it is better than all before.
    pub(super) fn note(&mut self, step: Step, region: Region) {
        if self.best.as_ref().is_none_or(|best| step.score > best.score) {
            self.best = Some(Best { score: step.score, step: step.step, region });
        }
        self.steps.push(step);
    }
}

/// What the file says beside its tensors.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    identity: String,
    step: u64,
    learning_rate: Option<f64>,
    best_score: f64,
    best_step: u64,
    steps: Vec<Step>,
}

/// The key of [`About`] in the file's metadata.
const ABOUT: &str = "graft search";

/// Where a search is written down, and what must be the same for it to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// The file.
    pub path: PathBuf,
    /// Stands for everything that decides the numbers.
    pub identity: String,
}

impl Keep {
    /// Reads an earlier search of the same work, if there is one.
    pub(super) fn read(&self, pair: &Pair<'_>) -> Result<Option<State>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let file = SafetensorsFile::open(&self.path).map_err(retune_core::Error::from)?;
        let about = file.metadata().get(ABOUT).and_then(|text| serde_json::from_str(text).ok());
        let Some(about) = about.filter(|about: &About| about.identity == self.identity) else {
            return Ok(None);
        };
        let tensor = |kind: &str, name: &str| {
            file.tensor(&format!("{kind}.{name}")).map_err(retune_core::Error::from)
        };
        let (mut scores, mut entries) = (Vec::new(), Vec::new());
        for weight in pair.weights() {
            let values = tensor("scores", &weight.name)?.to_f32();
            let values = values.map_err(retune_core::Error::from)?;
            let places = tensor("entries", &weight.name)?.to_i64();
            let places = places.map_err(retune_core::Error::from)?;
            let list: Vec<u32> = places.iter().filter_map(|p| u32::try_from(*p).ok()).collect();
            let fits = values.len() == weight.count()
                && list.len() == places.len()
                && list.is_sorted_by(|one, next| one < next)
                && list.last().is_none_or(|entry| (*entry as usize) < weight.count());
            if !fits {
                return Err(Error::Run {
                    path: self.path.clone(),
                    what: format!("the scores of `{}` are damaged", weight.name),
                    expected: format!("one of each of its {} entries", weight.count()),
                    found: format!("{} scores, {} entries", values.len(), places.len()),
                    help: "remove the file; the search then starts anew".to_owned(),
                });
            }
            scores.push(values);
            entries.push(list);
        }
        Ok(Some(State {
            step: about.step,
            learning_rate: about.learning_rate,
            scores,
            best: Some(Best {
                score: about.best_score,
                step: about.best_step,
                region: pair.region(entries),
            }),
            steps: about.steps,
        }))
    }

    /// Writes a search down; the file before stays until the new one is whole.
    pub(super) fn write(&self, pair: &Pair<'_>, state: &State) -> Result<()> {
        // A search is written down after its steps, so there is a best mask.
        let Some(best) = &state.best else { return Ok(()) };
        let about = About {
            identity: self.identity.clone(),
            step: state.step,
            learning_rate: state.learning_rate,
            best_score: best.score,
            best_step: best.step,
            steps: state.steps.clone(),
        };
        let text = serde_json::to_string(&about)
            .unwrap_or_else(|error| unreachable!("plain numbers are always JSON: {error}"));
        let metadata = BTreeMap::from([(ABOUT.to_owned(), text)]);
        let mut specs = Vec::new();
        let named = || pair.weights().iter().map(|weight| &weight.name);
        for name in named() {
            let count = best.region.of(name).len();
            specs.push(TensorSpec::new(format!("entries.{name}"), Dtype::I64, [count]));
        }
        for (name, scores) in named().zip(&state.scores) {
            specs.push(TensorSpec::new(format!("scores.{name}"), Dtype::F32, [scores.len()]));
        }
        let save = || -> Result<(), retune_files::SaveError> {
            let mut writer = SafetensorsWriter::create(&self.path, &specs, &metadata)?;
            for name in named() {
                let entries = best.region.of(name).iter();
                let places = entries.flat_map(|entry| i64::from(*entry).to_le_bytes());
                writer.write(&format!("entries.{name}"), &places.collect::<Vec<u8>>())?;
            }
            for (name, scores) in named().zip(&state.scores) {
                writer.write_f32(&format!("scores.{name}"), scores)?;
            }
            writer.finish()
        };
        Ok(save().map_err(retune_core::Error::from)?)
    }
}
