//! ComPEFT from end to end: compress an adapter or a tuned model, and pick the scale by measuring.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_evaluate::validation::validate;
use retune_files::atomic::{AtomicFolder, write_file};
use retune_files::compeft::{CompeftFile, Sizes};
use retune_merge::compeft::{ALPHAS, Selection, Settings, compress};
use retune_merge::update::{Start, Update};
use retune_methods::adapter::Adapter;
use retune_methods::compressed::{FILE, decode, is_drawn};
use retune_methods::lora::initial_factor;
use serde_json::Value;

use crate::card::{
    Derived, Outputs, check_card_free, derived_card, with_measured, with_origins, write_card,
};
use crate::error::{Error, Result};
use crate::open::check_base;
use crate::prepare::Prepared;

/// Tokens in one pass of an evaluation.
const EVALUATION_TOKENS: usize = 2048;

/// An update after compression, in memory.
#[derive(Debug)]
pub struct Compressed {
    bytes: Vec<u8>,
    /// What it takes.
    pub sizes: Sizes,
    /// What was kept.
    pub selection: Selection,
    settings: Settings,
    config: Option<String>,
    base: Option<String>,
    /// The adapter or tuned model.
    origin: PathBuf,
    /// What was measured on which rows.
    measured: Option<(Trial, String)>,
}

/// One scale that was tried.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Trial {
    /// The scale in standard deviations of the update.
    pub alpha: f64,
    /// Mean loss of the rows.
    pub loss: f64,
    /// Share of rows whose class was right, for classifiers.
    pub accuracy: Option<f64>,
}

/// The base of a full change: its name, and the hash it is recognised by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// What the person called it.
    pub name: String,
    /// SHA-256 over its weights.
    pub fingerprint: String,
}

/// The random start of a LoRA adapter: the run's seed, and which of its streams drew each factor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeded {
    seed: u64,
    streams: String,
}

/// Lets an update start from what its recipe's seed drew, so that only what training changed is
/// kept; `None` where the adapter did not start there.
///
/// # Errors
/// If the adapter does not fit the recipe's model.
pub fn start_seeded(update: &mut Update, prepared: &Prepared) -> Result<Option<Seeded>> {
    let method = prepared.recipe.method.options();
    let drawn = method.get("init").is_none_or(|init| init.item.value.to_json() == "random");
    if update.start() != Start::Zero || !drawn {
        return Ok(None);
    }
    let adapter = Adapter::read(update.path())?;
    let seed = Seed(prepared.recipe.seed);
    let plan = adapter.method()?.plan(prepared.opened.weights.spec())?;
    let mut places = BTreeMap::new();
    let mut num_pairs = 0u64;
    for parameter in &plan.parameters {
        // Of each pair, the factor that comes first counts.
        let is_first = [".lora_A.weight", ".lora_embedding_A"];
        num_pairs += u64::from(is_first.iter().any(|end| parameter.name.ends_with(end)));
        if is_drawn(&parameter.name) {
            let index = num_pairs - 1;
            let start = initial_factor(seed, index, &parameter.name, &parameter.shape);
            places.insert(parameter.name.clone(), (index, start));
        }
    }
    // Every drawn factor of the file needs its place.
    let file = update.parts().iter().filter(|part| is_drawn(&part.name));
    if !file.map(|part| &part.name).eq(places.keys()) {
        return Ok(None);
    }
    let streams: Vec<String> = places.values().map(|(index, _)| index.to_string()).collect();
    let drawn = places.into_iter().map(|(name, (_, start))| (name, start)).collect();
    let seeded = Seeded { seed: seed.0, streams: streams.join(",") };
    Ok(update.start_from(drawn)?.then_some(seeded))
}

impl Compressed {
    /// Compresses an update.
    ///
    /// # Errors
    /// Those of reading, and of settings that keep nothing.
    pub fn make(
        update: &Update,
        settings: Settings,
        base: Option<&Base>,
        seeded: Option<&Seeded>,
    ) -> Result<Self> {
        let mut metadata = BTreeMap::new();
        if let Some(seeded) = seeded {
            metadata.insert("seed".to_owned(), seeded.seed.to_string());
            metadata.insert("streams".to_owned(), seeded.streams.clone());
        }
        if let Some(base) = base {
            metadata.insert("base".to_owned(), base.name.clone());
            metadata.insert("base_sha256".to_owned(), base.fingerprint.clone());
        }
        let (bytes, selection) = compress(update, settings, &metadata)?;
        let file = CompeftFile::from_bytes("the compressed update", bytes.clone())
            .map_err(retune_core::Error::from)?;
        let config = update.config().map(str::to_owned);
        let named = |text: &String| {
            let config: Value = serde_json::from_str(text).ok()?;
            config.get("base_model_name_or_path")?.as_str().map(str::to_owned)
        };
        let base = base.map(|base| base.name.clone()).or_else(|| config.as_ref().and_then(named));
        debug_assert_eq!(update.start() == Start::Base, config.is_none());
        let (origin, sizes) = (update.path().to_path_buf(), file.sizes());
        Ok(Self { sizes, bytes, selection, settings, config, base, origin, measured: None })
    }

    /// Measures the scales of the paper's grid on a recipe's held-out rows, in their order.
    ///
    /// The signs stay; only their size changes, so nothing is selected again.
    ///
    /// # Errors
    /// If the recipe has no held-out rows, or the update does not fit its model.
    pub fn try_alphas(&self, path: &Path, prepared: &Prepared, force: bool) -> Result<Vec<Trial>> {
        let Some(rows) = &prepared.splits.validation else {
            return Err(Error::Plan {
                what: "the scale cannot be chosen".to_owned(),
                expected: "rows the model was not trained on".to_owned(),
                found: "a recipe without validation rows".to_owned(),
                help: "set `data.validation` or `data.validation_fraction` in the recipe"
                    .to_owned(),
            });
        };
        let batches = rows.batches(prepared.recipe.evaluate.rows, EVALUATION_TOKENS)?;
        let file =
            CompeftFile::from_bytes(path, self.bytes.clone()).map_err(retune_core::Error::from)?;
        let weights = &prepared.opened.weights;
        let mut parameters = Parameters::new(weights.device());
        let mut adapter = decode(&file, 1.0)?;
        check_base(path, &adapter, &prepared.opened, force)?;
        let changes = adapter.method()?.attach(weights, &mut parameters, Seed(0))?;
        let mut trials = Vec::new();
        for alpha in ALPHAS {
            adapter = decode(&file, (alpha / self.settings.alpha) as f32)?;
            adapter.fill(path, &mut parameters)?;
            let tuned = Tuned {
                model: prepared.opened.checkpoint.model.as_ref(),
                weights,
                changes: &changes,
                parameters: &parameters,
            };
            let found = validate(&tuned, &batches)?;
            trials.push(Trial { alpha, loss: found.loss, accuracy: found.accuracy });
        }
        Ok(trials)
    }

    /// Notes for the card what was measured with this very scale, and on which rows.
    pub fn note(&mut self, trial: Trial, data: &Path) {
        self.measured = Some((trial, data.display().to_string()));
    }

    /// Writes one file with its card beside it, where the path ends in `.compeft`, or a folder with
    /// the file, a card and, for adapters, PEFT's configuration.
    ///
    /// # Errors
    /// If the disk is full or the place read-only; nothing half-written is left. If the card of a
    /// file would be written over another text.
    pub fn write(&self, title: &str, output: &Path) -> Result<()> {
        if output.extension().is_some_and(|end| end == "compeft") {
            check_card_free(output)?;
            write_file(output, &self.bytes)?;
            return write_card(output, &self.card(title));
        }
        let staging = AtomicFolder::create(output)?;
        let write = |name: &str, content: &[u8]| {
            std::fs::write(staging.path().join(name), content).map_err(|e| staging.error(e))
        };
        write(FILE, &self.bytes)?;
        write("README.md", self.card(title).as_bytes())?;
        if let Some(config) = &self.config {
            write("adapter_config.json", config.as_bytes())?;
        }
        Ok(staging.replace()?)
    }

    fn card(&self, title: &str) -> String {
        let sizes = &self.sizes;
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        let facts = [
            ("entries kept", format!("{} of {}", sizes.num_nonzero, sizes.num_entries)),
            ("density", percent(sizes.density())),
            ("alpha", format!("{} standard deviations", self.settings.alpha)),
            ("size", format!("{} bytes", sizes.file_bytes)),
            ("of its half-precision size", percent(1.0 / sizes.ratio())),
        ];
        let card = derived_card(&Derived {
            library: "retune",
            base: self.base.as_deref(),
            tag: "compeft",
            title,
            summary: "An update of weights compressed with ComPEFT (Yadav et al., 2023, arXiv \
                      2311.13171): the signs of its largest entries and one scale. `retune` uses \
                      it as it is; `retune decompress` makes an ordinary adapter of it.",
            facts: &facts,
        });
        let card = match &self.measured {
            None => card,
            Some((trial, data)) => {
                let mut found = vec![("loss", trial.loss)];
                found.extend(trial.accuracy.map(|accuracy| ("accuracy", accuracy)));
                with_measured(&card, title, data, &found)
            }
        };
        with_origins(&card, std::slice::from_ref(&self.origin), Outputs::Moved)
    }
}

/// Returns the trial with the least loss; the smaller scale where two are equal.
pub fn best(trials: &[Trial]) -> Option<Trial> {
    trials.iter().copied().min_by(|a, b| a.loss.total_cmp(&b.loss))
}
