//! A search that can be interrupted: its scores and its best mask in one file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde::{Deserialize, Serialize};

use super::pair::Pair;
use super::search::Step;
use crate::error::{Error, Result};

/// The best rounded mask so far.
#[derive(Debug, Default)]
pub(super) struct Best {
    pub(super) score: f64,
    pub(super) step: u64,
    /// Per weight the entries of the mask and their scores.
    pub(super) entries: Vec<(Vec<u32>, Vec<f32>)>,
}

/// Where a search is.
#[derive(Debug)]
pub(super) struct State {
    pub(super) step: u64,
    pub(super) learning_rate: Option<f64>,
    pub(super) scores: Vec<Vec<f32>>,
    pub(super) best: Best,
    pub(super) steps: Vec<Step>,
}

impl State {
    pub(super) fn new(scores: Vec<Vec<f32>>) -> Self {
        Self { step: 0, learning_rate: None, scores, best: Best::default(), steps: Vec::new() }
    }

    /// Notes a step, and keeps its mask where it is better than all before.
    pub(super) fn note(&mut self, step: Step) {
        if self.steps.is_empty() || step.score > self.best.score {
            let inside = |scores: &Vec<f32>| {
                let inside = scores.iter().enumerate().filter(|(_, score)| **score > 0.0);
                inside.map(|(entry, score)| (entry as u32, *score)).unzip()
            };
            let entries = self.scores.iter().map(inside).collect();
            self.best = Best { score: step.score, step: step.step, entries };
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
const ABOUT: &str = "graft";

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
            let floats = |kind: &str| -> Result<Vec<f32>> {
                Ok(tensor(kind, &weight.name)?.to_f32().map_err(retune_core::Error::from)?)
            };
            scores.push(floats("scores")?);
            let places = tensor("entries", &weight.name)?.to_i64();
            let places = places.map_err(retune_core::Error::from)?;
            let inside: Vec<u32> = places.iter().filter_map(|p| u32::try_from(*p).ok()).collect();
            let best = floats("best")?;
            let fits = scores.last().is_some_and(|scores| scores.len() == weight.count())
                && inside.len() == best.len()
                && inside.iter().all(|entry| (*entry as usize) < weight.count());
            if !fits {
                return Err(Error::Run {
                    path: self.path.clone(),
                    what: format!("the scores of `{}` are damaged", weight.name),
                    expected: format!("one of each of its {} entries", weight.count()),
                    found: format!(
                        "{} scores, {} entries",
                        scores.last().map_or(0, Vec::len),
                        best.len()
                    ),
                    help: "remove the file; the search then starts anew".to_owned(),
                });
            }
            entries.push((inside, best));
        }
        Ok(Some(State {
            step: about.step,
            learning_rate: about.learning_rate,
            scores,
            best: Best { score: about.best_score, step: about.best_step, entries },
            steps: about.steps,
        }))
    }

    /// Writes a search down; the file before stays until the new one is whole.
    pub(super) fn write(&self, pair: &Pair<'_>, state: &State) -> Result<()> {
        let about = About {
            identity: self.identity.clone(),
            step: state.step,
            learning_rate: state.learning_rate,
            best_score: state.best.score,
            best_step: state.best.step,
            steps: state.steps.clone(),
        };
        let text = serde_json::to_string(&about)
            .unwrap_or_else(|error| unreachable!("plain numbers are always JSON: {error}"));
        let metadata = BTreeMap::from([(ABOUT.to_owned(), text)]);
        let mut specs = Vec::new();
        let named = || pair.weights().iter().map(|weight| &weight.name);
        for (name, (entries, _)) in named().zip(&state.best.entries) {
            specs.push(TensorSpec::new(format!("best.{name}"), Dtype::F32, [entries.len()]));
            specs.push(TensorSpec::new(format!("entries.{name}"), Dtype::I64, [entries.len()]));
        }
        for (name, scores) in named().zip(&state.scores) {
            specs.push(TensorSpec::new(format!("scores.{name}"), Dtype::F32, [scores.len()]));
        }
        let save = || -> Result<(), retune_files::SaveError> {
            let mut writer = SafetensorsWriter::create(&self.path, &specs, &metadata)?;
            for (name, (entries, scores)) in named().zip(&state.best.entries) {
                let places = entries.iter().flat_map(|entry| i64::from(*entry).to_le_bytes());
                writer.write(&format!("entries.{name}"), &places.collect::<Vec<u8>>())?;
                writer.write_f32(&format!("best.{name}"), scores)?;
            }
            for (name, scores) in named().zip(&state.scores) {
                writer.write_f32(&format!("scores.{name}"), scores)?;
            }
            writer.finish()
        };
        Ok(save().map_err(retune_core::Error::from)?)
    }
}
