//! A graft for a recipe: found, measured beside its controls, written down.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::model::Tuned;
use retune_core::random::Seed;
use retune_core::spec::Head;
use retune_core::weights::Weights;
use retune_evaluate::answers::Answers;
use retune_files::atomic::write_file;
use retune_files::safetensors::Safetensors;
use retune_methods::adapter::BaseIdentity;
use retune_models::Task as ModelTask;
use retune_train::training::BatchSource;
use serde::Serialize;

use super::Region;
use super::pair::{Bench, Pair};
use super::search::{Found, Settings, Step, Task, search};
use super::sparse::adapter;
use super::state::Keep;
use crate::artefacts::heatmap::{HeatMap, svg};
use crate::card::{Derived, derived_card};
use crate::error::{Error, Result};
use crate::open::packing;
use crate::prepare::Prepared;
use crate::rows::Subset;

/// Tokens in one pass of an evaluation.
const EVALUATION_TOKENS: usize = 2048;

/// What a graft is looked for with.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// How the mask is optimised.
    pub settings: Settings,
    /// Batches of the recipe in each step.
    pub batches: u64,
    /// Rows of another distribution, measured beside the held-out ones.
    pub elsewhere: Option<&'a Subset>,
}

/// How good one model is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Share of right answers.
    pub accuracy: f64,
    /// Expected calibration error, ten bins.
    pub calibration_error: f64,
    /// Share of answers that are the tuned model's.
    pub agreement: f64,
}

/// One model that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arm {
    /// What it is.
    pub name: &'static str,
    /// Entries taken from the tuned model.
    pub num_entries: usize,
    /// On the held-out rows.
    pub held_out: Quality,
    /// On rows of another distribution, where there are some.
    pub elsewhere: Option<Quality>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Entries a graft could have at most.
    pub num_entries: usize,
    /// Entries of this one.
    pub num_grafted: usize,
    /// Accuracy of the graft over the tuned model's, on held-out rows.
    pub retention: f64,
    /// The step whose mask was kept.
    pub step: u64,
    /// The learning rate of the scores.
    pub learning_rate: f64,
    /// Base, tuned model, graft, and the most moved and random entries of its size.
    pub arms: Vec<Arm>,
    /// Entries per block, `None` for those outside of blocks, and how many there are.
    pub layers: Vec<(Option<usize>, usize, usize)>,
    /// The search, step by step.
    pub steps: Vec<Step>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// A graft with its report.
#[derive(Debug)]
pub struct Grafted {
    /// What was found.
    pub report: Report,
    /// The entries.
    pub region: Region,
}

/// Opens the tuned model of a recipe's base.
///
/// # Errors
/// If it cannot be read, or its numbers are narrower than the base's and `force` is not given: their
/// difference would be rounding.
pub fn open_tuned(prepared: &Prepared, path: &Path, force: bool) -> Result<Weights> {
    let spec = prepared.opened.checkpoint.model.spec();
    let task = match &spec.head {
        Head::Classes { labels } => ModelTask::Classify { labels: labels.clone() },
        Head::Language { .. } | Head::Embedding | Head::Pairs => ModelTask::AsSaved,
    };
    let tuned = retune_models::open_for(path, &task, Seed(prepared.recipe.seed))?;
    if tuned.model.spec().architecture != spec.architecture {
        return Err(Error::Run {
            path: path.to_path_buf(),
            what: "the tuned model is of another architecture".to_owned(),
            expected: spec.architecture.clone(),
            found: tuned.model.spec().architecture.clone(),
            help: "give the model that was tuned from the recipe's".to_owned(),
        });
    }
    if !force
        && path.is_dir()
        && prepared.located.path.is_dir()
        && let Some((name, base, narrow)) = narrower(&prepared.located.path, path)?
    {
        return Err(Error::Run {
            path: path.to_path_buf(),
            what: format!("`{name}` has narrower numbers than in the base"),
            expected: base,
            found: narrow,
            help: "give the tuned model as it was trained, or --force: differences of close \
                   numbers then lose their digits"
                .to_owned(),
        });
    }
    let (source, spec) = (Arc::clone(&tuned.source), Arc::clone(tuned.model.spec()));
    let packing = packing(&prepared.recipe.compute);
    Ok(Weights::new(source, spec, packing, prepared.opened.weights.device())?)
}

/// Finds a tensor whose type is narrower in the tuned model than in the base.
fn narrower(base: &Path, tuned: &Path) -> Result<Option<(String, String, String)>> {
    let open = |path| Safetensors::open(path).map_err(retune_core::Error::from);
    let (base, tuned) = (open(base)?, open(tuned)?);
    let found = base.tensors().find_map(|before| {
        let after = tuned.get(before.name)?;
        (after.dtype.is_float() && after.dtype.size() < before.dtype.size())
            .then(|| (before.name.to_owned(), before.dtype.to_string(), after.dtype.to_string()))
    });
    Ok(found)
}

/// Looks for the graft of a tuned model, and measures it beside its controls.
///
/// An interrupted search goes on from `keep`.
///
/// # Errors
/// If the models do not belong together, the recipe has no rows to choose and measure on, or one of
/// the settings is impossible.
pub fn graft(
    prepared: &Prepared,
    pair: &Pair<'_>,
    options: &Options<'_>,
    keep: &Keep,
    watch: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<Grafted> {
    let rows = prepared.recipe.evaluate.rows;
    let batches = |subset: &Subset| subset.batches(rows, EVALUATION_TOKENS);
    let train = batches(&prepared.splits.train)?;
    let validation = prepared.splits.validation.as_ref().map(batches).transpose()?;
    let mut notes = Vec::new();
    if validation.is_none() {
        notes.push("there are no validation rows: the mask was chosen on training rows".to_owned());
    }
    let left = pair.left_behind()?;
    if !left.is_empty() {
        let (count, some) = (left.len(), left[..left.len().min(3)].join(", "));
        notes.push(format!(
            "tuning moved {count} weights that are no part of a graft and stay the base's: {some}"
        ));
    }
    let mut source = prepared.batches.clone();
    let mut of_step = |step: u64| -> Result<Vec<Batch>> {
        let mut all = Vec::new();
        for place in 0..options.batches {
            all.extend(source.micro_batches(step * options.batches + place)?);
        }
        Ok(all)
    };
    let mut judge = |tuned: &Tuned<'_>| -> Result<f64> {
        let mut score = Answers::of(tuned, &train)?.accuracy()?;
        if let Some(validation) = &validation {
            score += Answers::of(tuned, validation)?.accuracy()?;
        }
        Ok(score)
    };
    let task = Task { batches: &mut of_step, judge: &mut judge, watch };
    let found = search(pair, &options.settings, Some(keep), task)?;
    let (measured, held_out) = prepared.measured();
    if !held_out {
        notes.push("there are no held-out rows: what follows was measured on training rows".into());
    }
    let elsewhere = options.elsewhere.map(batches).transpose()?;
    let measured = Measured { pair, here: batches(measured)?, elsewhere };
    report(measured, found, &options.settings, notes)
}

/// What all arms are measured on.
struct Measured<'a> {
    pair: &'a Pair<'a>,
    here: Vec<Batch>,
    elsewhere: Option<Vec<Batch>>,
}

fn report(
    measured: Measured<'_>,
    found: Found,
    settings: &Settings,
    notes: Vec<String>,
) -> Result<Grafted> {
    let pair = measured.pair;
    let count = found.region.len();
    let regions = [
        ("base", Some(Region::default())),
        ("tuned", None),
        ("graft", Some(found.region.clone())),
        ("most moved", Some(pair.most_moved(count)?)),
        ("random", Some(pair.random(count, settings.seed))),
    ];
    let mut bench = Bench::new(pair)?;
    let mut answers = Vec::new();
    for (name, region) in &regions {
        match region {
            Some(region) => bench.graft(region)?,
            None => bench.mix(|_, _| 1.0)?,
        }
        let here = Answers::of(&bench.tuned(), &measured.here)?;
        let elsewhere = measured.elsewhere.as_ref();
        let elsewhere = elsewhere.map(|rows| Answers::of(&bench.tuned(), rows)).transpose()?;
        let entries = region.as_ref().map_or(pair.num_entries(), Region::len);
        answers.push((*name, entries, here, elsewhere));
    }
    let (_, _, tuned, tuned_elsewhere) = &answers[1];
    let arm = |(name, num_entries, here, elsewhere): &(&'static str, usize, Answers, _)| {
        let elsewhere: &Option<Answers> = elsewhere;
        let both = elsewhere.as_ref().zip(tuned_elsewhere.as_ref());
        Ok(Arm {
            name,
            num_entries: *num_entries,
            held_out: quality(here, tuned)?,
            elsewhere: both.map(|(found, tuned)| quality(found, tuned)).transpose()?,
        })
    };
    let arms: Vec<Arm> = answers.iter().map(arm).collect::<Result<_>>()?;
    let report = Report {
        num_entries: pair.num_entries(),
        num_grafted: count,
        retention: arms[2].held_out.accuracy / arms[1].held_out.accuracy,
        step: found.step,
        learning_rate: found.learning_rate,
        arms,
        layers: layers(pair, &found.region),
        steps: found.steps,
        notes,
    };
    Ok(Grafted { report, region: found.region })
}

fn quality(found: &Answers, tuned: &Answers) -> Result<Quality> {
    Ok(Quality {
        accuracy: found.accuracy()?,
        calibration_error: found.calibration_error()?,
        agreement: found.agreement(tuned)?,
    })
}

/// Counts the entries of each block.
fn layers(pair: &Pair<'_>, region: &Region) -> Vec<(Option<usize>, usize, usize)> {
    let mut layers = std::collections::BTreeMap::new();
    for weight in pair.weights() {
        let (grafted, all) = layers.entry(weight.layer).or_insert((0, 0));
        *grafted += region.of(&weight.name).len();
        *all += weight.count();
    }
    layers.into_iter().map(|(layer, (grafted, all))| (layer, grafted, all)).collect()
}

/// Draws which share of each kind of weight was grafted, by block.
fn heat_map(pair: &Pair<'_>, region: &Region) -> HeatMap {
    let mut layers: Vec<Option<usize>> = pair.weights().iter().map(|weight| weight.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let mut kinds: Vec<(String, Vec<Option<f64>>)> = Vec::new();
    for weight in pair.weights() {
        let number = weight.layer.map(|layer| format!(".{layer}."));
        let kind = number.and_then(|number| weight.name.split_once(&number));
        let kind = kind.map_or(weight.name.as_str(), |(_, kind)| kind);
        let place = kinds.iter().position(|(known, _)| known == kind).unwrap_or_else(|| {
            kinds.push((kind.to_owned(), vec![None; layers.len()]));
            kinds.len() - 1
        });
        if let Some(column) = layers.iter().position(|layer| *layer == weight.layer) {
            let share = region.of(&weight.name).len() as f64 / weight.count().max(1) as f64;
            kinds[place].1[column] = Some(share);
        }
    }
    let (rows, values) = kinds.into_iter().unzip();
    let column = |layer: &Option<usize>| layer.map_or_else(|| "–".to_owned(), |l| l.to_string());
    HeatMap {
        title: "grafted entries".to_owned(),
        value_label: "share of the weight's entries".to_owned(),
        column_label: "block".to_owned(),
        rows,
        columns: layers.iter().map(column).collect(),
        values,
    }
}

/// Writes a graft as an adapter folder, with its card, its report and where its entries lie.
///
/// # Errors
/// If the disk is full; nothing half-written is left.
pub fn write(prepared: &Prepared, pair: &Pair<'_>, grafted: &Grafted, output: &Path) -> Result<()> {
    let base = BaseIdentity {
        name: prepared.plan.model.name.clone(),
        fingerprint: prepared.plan.model.fingerprint.clone(),
        under: prepared.opened.under.clone(),
    };
    let report = &grafted.report;
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let mut facts = vec![
        ("entries grafted", format!("{} of {}", report.num_grafted, report.num_entries)),
        ("retention", percent(report.retention)),
        ("data", format!("`{}`", prepared.recipe.data.train.display())),
    ];
    for arm in &report.arms {
        let q = &arm.held_out;
        let text = format!(
            "accuracy {:.4}, calibration error {:.4}, agreement with the tuned model {:.4}",
            q.accuracy, q.calibration_error, q.agreement
        );
        facts.push((arm.name, text));
    }
    let title = output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
    let card = derived_card(&Derived {
        library: "retune",
        base: Some(&base.name),
        tag: "grafting",
        title: &title,
        summary: "The entries of a tuned model's weights that carry its task (grafting: \
                  Panigrahi et al., 2023, arXiv 2302.06600). `retune merge-adapter` adds them to \
                  the base.",
        facts: &facts,
    });
    adapter(pair, &grafted.region, Some(&base))?.write(output, &card)?;
    let text = serde_json::to_string_pretty(report)
        .unwrap_or_else(|error| unreachable!("a report is always JSON: {error}"));
    write_file(&output.join("graft.json"), text.as_bytes())?;
    Ok(write_file(&output.join("graft.svg"), svg(&heat_map(pair, &grafted.region)).as_bytes())?)
}
