//! The main job: measure, train, measure, write everything down.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapters::stacked_folder;
use crate::artefacts::plot::{Plot, Scale, Series, svg};
use crate::artefacts::report::{
    Better, Cost, DataSummary, Example, File, Metric, Outcome, RunReport,
};
use crate::artefacts::tensorboard::{EventWriter, file_name};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::folder::{EventLog, RunFolder, read_events};
use crate::measure::{MEASURED_TOKENS, Measurement};
use crate::prefetch::Prefetched;
use crate::prepare::Prepared;
use crate::recipe::Recipe;
use retune_core::change::Changes;
use retune_core::event::{Event, Observer};
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_evaluate::validation::validate;
use retune_files::atomic::write_file;
use retune_methods::adapter::{Adapter, BaseIdentity};
use retune_methods::stack;
use retune_train::training::{Training, Validation, Walk};

/// A run that is over.
#[derive(Debug)]
pub struct Done {
    /// Its folder.
    pub folder: RunFolder,
    /// What was measured.
    pub report: RunReport,
}

/// Carries a recipe out, from the first measurement to the report.
///
/// # Errors
/// Whatever fails first; what was written before stays, and `resume` goes on from there.
pub fn run(
    prepared: Prepared,
    recipe_text: &str,
    environment: &mut Environment<'_>,
    observer: &mut dyn Observer,
) -> Result<Done> {
    let folder = RunFolder::create(&prepared.recipe.runs, &prepared.recipe.name)?;
    folder.write("recipe.toml", recipe_text)?;
    folder.write("plan.toml", &prepared.plan.recipe)?;
    let plan = serde_json::to_string_pretty(&prepared.plan)
        .unwrap_or_else(|error| unreachable!("a plan is always JSON: {error}"));
    folder.write("plan.json", &plan)?;
    walk(prepared, folder, false, environment, observer)
}

/// Goes on with a run that was interrupted, from its newest whole checkpoint.
///
/// # Errors
/// If the recipe, data or model changed since, or no checkpoint can be used.
pub fn resume(
    path: &Path,
    environment: &mut Environment<'_>,
    observer: &mut dyn Observer,
) -> Result<Done> {
    let folder = RunFolder::open(path)?;
    let text = folder.read("plan.toml")?;
    let (mut recipe, _) =
        Recipe::parse("plan.toml", text.as_bytes(), &[]).map_err(Error::Recipe)?;
    if let Some(runs) = path.parent() {
        recipe.runs = runs.to_path_buf();
    }
    let prepared = Prepared::make(recipe, environment)?;
    let before: crate::plan::Plan =
        serde_json::from_str(&folder.read("plan.json")?).map_err(|error| Error::Run {
            path: folder.file("plan.json"),
            what: "the plan cannot be read".to_owned(),
            expected: "the file `retune run` wrote".to_owned(),
            found: error.to_string(),
            help: "start anew with `retune run`".to_owned(),
        })?;
    if before.hash != prepared.plan.hash {
        return Err(Error::Run {
            path: folder.path().to_path_buf(),
            what: "the run cannot be continued: what it stands on has changed".to_owned(),
            expected: format!("plan {}", &before.hash[..before.hash.len().min(16)]),
            found: format!("plan {}", &prepared.plan.hash[..16]),
            help: "put the data, the model and this version of retune back, or start anew"
                .to_owned(),
        });
    }
    walk(prepared, folder, true, environment, observer)
}

/// Several observers as one.
struct All<'a>(Vec<&'a mut dyn Observer>);

impl Observer for All<'_> {
    fn on_event(&mut self, event: &Event) {
        for observer in &mut self.0 {
            observer.on_event(event);
        }
    }
}

/// Measures the validation loss during training.
struct ValidationLoss {
    batches: Vec<retune_core::batch::Batch>,
}

impl Validation for ValidationLoss {
    fn measure(&mut self, tuned: &Tuned<'_>) -> retune_train::Result<BTreeMap<String, f64>> {
        let found = validate(tuned, &self.batches)?;
        let mut metrics = BTreeMap::from([("loss".to_owned(), found.loss)]);
        if let Some(accuracy) = found.accuracy {
            metrics.insert("accuracy".to_owned(), accuracy);
        }
        Ok(metrics)
    }
}

fn walk(
    prepared: Prepared,
    folder: RunFolder,
    resumed: bool,
    environment: &mut Environment<'_>,
    observer: &mut dyn Observer,
) -> Result<Done> {
    let started = (environment.clock)();
    let recipe = &prepared.recipe;
    let plan = prepared.plan.clone();
    let schedule = recipe.train.schedule(plan.num_steps, plan.learning_rate);
    let walk = Walk {
        num_steps: plan.num_steps,
        schedule,
        clip: recipe.train.clip,
        evaluate_every: recipe.train.evaluate_every,
        save_every: recipe.train.save_every,
        keep_last: recipe.train.keep_last,
        patience: recipe.train.patience,
        seed: Seed(recipe.seed),
        recompute: plan.forecast.recompute,
        plan: plan.hash.clone(),
        checkpoints: folder.file("checkpoints"),
    };
    let method = recipe.method.boxed_clone();
    let optimizer = recipe.train.optimizer();

    let known = if resumed { read_measurement(&folder)? } else { None };
    let before = match known {
        Some(before) => Some(before),
        None if recipe.evaluate.before => {
            let measured = measure_base(&prepared, observer)?;
            write_measurement(&folder, &measured)?;
            Some(measured)
        }
        None => None,
    };

    let model = prepared.opened.checkpoint.model.as_ref();
    let weights = &prepared.opened.weights;
    let mut training = Training::new(model, weights, method, optimizer, walk)?;
    let mut warnings = plan.warnings.clone();
    if resumed {
        match training.resume() {
            Ok((step, refused)) => {
                warnings.extend(refused);
                warnings.push(format!("the run was interrupted and continued from step {step}"));
            }
            Err(retune_train::Error::NoCheckpoint { .. }) => {
                warnings.push(
                    "the run was interrupted before its first checkpoint and began anew".to_owned(),
                );
            }
            Err(error) => return Err(error.into()),
        }
    }
    let mut log = EventLog::open(&folder, training.step_number())?;
    for message in &warnings {
        let event = Event::Warned { message: message.clone() };
        log.on_event(&event);
        observer.on_event(&event);
    }
    let mut validation = match &prepared.splits.validation {
        Some(rows) => {
            Some(ValidationLoss { batches: rows.batches(recipe.evaluate.rows, MEASURED_TOKENS)? })
        }
        None => None,
    };
    let train_started = (environment.clock)();
    {
        let mut all = All(vec![observer, &mut log]);
        training.walk(
            &mut Prefetched::new(prepared.batches.clone(), plan.num_steps),
            validation.as_mut().map(|v| v as &mut dyn Validation),
            &mut all,
        )?;
    }
    let train_s = (environment.clock)() - train_started;
    if let Some(error) = log.failed.take() {
        warnings.push(format!("events.jsonl is incomplete: {error}"));
    }
    if let Some(step) = training.take_best()? {
        warnings.push(format!("the result is the best checkpoint, of step {step}, not the last"));
    }

    let after = {
        observer.on_event(&Event::Progress { stage: "measuring after".into(), done: 0, total: 1 });
        let (rows, _) = prepared.measured();
        prepared.measure(rows).run(&training.tuned())?
    };
    let files = save_result(&prepared, &training, &folder)?;
    let mut report = make_report(&prepared, before.as_ref(), &after, environment, started)?;
    report.warnings = warnings;
    report.cost.train_s = train_s;
    report.cost.total_s = (environment.clock)() - started;
    report.files = files;
    add_to_cards(&folder, &report)?;
    finish(&folder, &mut report, environment)?;
    Ok(Done { folder, report })
}

fn measure_base(prepared: &Prepared, observer: &mut dyn Observer) -> Result<Measurement> {
    observer.on_event(&Event::Progress { stage: "measuring before".into(), done: 0, total: 1 });
    let weights = &prepared.opened.weights;
    let tuned = Tuned {
        model: prepared.opened.checkpoint.model.as_ref(),
        weights,
        changes: &Changes::default(),
        parameters: &Parameters::new(weights.device()),
    };
    let (rows, _) = prepared.measured();
    prepared.measure(rows).run(&tuned)
}

fn write_measurement(folder: &RunFolder, found: &Measurement) -> Result<()> {
    let text = serde_json::to_string_pretty(found)
        .unwrap_or_else(|error| unreachable!("a measurement is always JSON: {error}"));
    folder.write("before.json", &text)
}

fn read_measurement(folder: &RunFolder) -> Result<Option<Measurement>> {
    if !folder.file("before.json").exists() {
        return Ok(None);
    }
    Ok(serde_json::from_str(&folder.read("before.json")?).ok())
}

/// Adds what was measured to the cards beside the result.
fn add_to_cards(folder: &RunFolder, report: &RunReport) -> Result<()> {
    for file in &report.files {
        let path = folder.file(&file.path).join("README.md");
        let card = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, "read", e))?;
        write_file(&path, crate::card::with_results(&card, report).as_bytes())?;
    }
    Ok(())
}

/// Writes the adapter, or the whole model where the method has no adapter form.
fn save_result(
    prepared: &Prepared,
    training: &Training<'_>,
    folder: &RunFolder,
) -> Result<Vec<File>> {
    let spec = prepared.opened.checkpoint.model.spec();
    let base = BaseIdentity {
        name: prepared.plan.model.name.clone(),
        fingerprint: prepared.plan.model.fingerprint.clone(),
        under: prepared.opened.under.clone(),
    };
    let method = training.method();
    if !method.parts().is_empty() {
        let mut files = Vec::new();
        let parent = folder.file("adapter");
        std::fs::create_dir_all(&parent).map_err(|error| Error::io(&parent, "make", error))?;
        let adapters = stack::adapters(method, spec, &training.parameters, Some(&base))?;
        for (place, (part, (name, adapter))) in method.parts().iter().zip(adapters).enumerate() {
            let path = parent.join(stacked_folder(place, &name));
            adapter.write(&path, &crate::card::adapter_card(prepared, &part.method.card()))?;
            files.push(written(folder, &path, &format!("the adapter of {name}")));
        }
        return Ok(files);
    }
    let (path, what) = if training.method().adapter_config(spec).is_some() {
        let adapter = Adapter::collect(training.method(), spec, &training.parameters, Some(&base))?;
        let path = folder.file("adapter");
        adapter.write(&path, &crate::card::adapter_card(prepared, &method.card()))?;
        (path, "the adapter, in PEFT's layout")
    } else {
        let path = folder.file("model");
        crate::export::write_folder(prepared, &training.tuned(), &path)?;
        (path, "the tuned model, as a Hugging Face folder")
    };
    Ok(vec![written(folder, &path, what)])
}

fn written(folder: &RunFolder, path: &Path, what: &str) -> File {
    File { path: relative(folder, path), what: what.to_owned(), num_bytes: folder_bytes(path) }
}

fn relative(folder: &RunFolder, path: &Path) -> String {
    path.strip_prefix(folder.path()).unwrap_or(path).display().to_string()
}

fn folder_bytes(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

fn make_report(
    prepared: &Prepared,
    before: Option<&Measurement>,
    after: &Measurement,
    environment: &Environment<'_>,
    started: f64,
) -> Result<RunReport> {
    let recipe = &prepared.recipe;
    let plan = &prepared.plan;
    let (rows, held_out) = prepared.measured();
    let metrics = after
        .metrics
        .iter()
        .map(|(name, value)| Metric {
            name: name.clone(),
            better: match name.as_str() {
                "loss" | "perplexity" => Better::Lower,
                _ => Better::Higher,
            },
            before: before.and_then(|b| b.metrics.get(name).copied()),
            after: Some(*value),
            num_examples: after.num_rows as u64,
            held_out,
        })
        .collect();
    let questions = prepared.measure(rows).questions()?;
    let examples = after
        .answers
        .iter()
        .enumerate()
        .zip(questions)
        .map(|((place, answer), question)| Example {
            prompt: question.shown,
            reference: Some(question.reference),
            before: before.and_then(|b| b.answers.get(place).cloned()).unwrap_or_default(),
            after: answer.clone(),
        })
        .collect();
    let s = &plan.data.statistics;
    let left_out = [
        ("broken", s.rows_broken),
        ("nothing to learn", s.rows_without_learned_token),
        ("too long", s.rows_too_long),
    ];
    Ok(RunReport {
        name: recipe.name.clone(),
        outcome: Outcome::Finished,
        model: recipe.model.clone(),
        method: recipe.method_name.clone(),
        started: iso8601(started),
        num_trained: plan.num_trainable as u64,
        num_total: plan.model.num_parameters as u64,
        data: DataSummary {
            source: recipe.data.train.display().to_string(),
            num_train: plan.data.num_train as u64,
            num_held_out: rows.len() as u64 * u64::from(held_out),
            left_out: left_out
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .map(|(why, count)| (why.to_owned(), count as u64))
                .collect(),
            num_tokens: s.tokens,
            num_loss_tokens: s.learned_tokens,
        },
        cost: Cost {
            num_steps: plan.num_steps,
            peak_bytes: (environment.peak_bytes)().unwrap_or(0),
            ..Cost::default()
        },
        metrics,
        examples,
        settings: recipe.settings(),
        seeds: vec![("run".to_owned(), recipe.seed)],
        versions: vec![
            ("retune".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("base".to_owned(), plan.model.fingerprint.clone()),
            ("plan".to_owned(), plan.hash.clone()),
        ],
        machine: environment.machine.clone(),
        ..RunReport::default()
    })
}

/// Writes a time as ISO 8601 in UTC.
fn iso8601(seconds: f64) -> String {
    let whole = seconds as i64;
    let date = retune_data::template::Date::from_unix(whole);
    let of_day = whole.rem_euclid(86_400);
    let day = date.strftime("%Y-%m-%d").unwrap_or_default();
    format!("{day}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Writes curves, TensorBoard's file and the report.
fn finish(folder: &RunFolder, report: &mut RunReport, environment: &Environment<'_>) -> Result<()> {
    let events = read_events(folder)?;
    let number = |event: &serde_json::Value, key: &str| event.get(key)?.as_f64();
    let steps = |kind: &str| {
        let kind = kind.to_owned();
        events.iter().filter(move |event| event["event"] == kind.as_str())
    };
    let curve = |kind: &str, read: &dyn Fn(&serde_json::Value) -> Option<f64>| -> Vec<(f64, f64)> {
        steps(kind).filter_map(|e| Some((number(e, "step")?, read(e)?))).collect()
    };
    let train = curve("step_done", &|e| number(e, "loss"));
    let validation = curve("evaluated", &|e| e.get("metrics")?.get("loss")?.as_f64());
    let rate = curve("step_done", &|e| number(e, "learning_rate"));
    let norm = curve("step_done", &|e| number(e, "gradient_norm"));
    report.cost.num_tokens = steps("step_done").filter_map(|e| e.get("num_tokens")?.as_u64()).sum();

    let series = |name: &str, points: &[(f64, f64)], smooth: bool| Series {
        name: name.to_owned(),
        points: points.to_vec(),
        smooth,
    };
    let mut losses = vec![series("training", &train, true)];
    if !validation.is_empty() {
        losses.push(series("validation", &validation, false));
    }
    let plots = [
        ("loss", "Loss per learned token", "loss", losses),
        ("learning_rate", "Learning rate", "learning rate", vec![series("rate", &rate, false)]),
        ("gradient_norm", "Gradient norm", "norm", vec![series("norm", &norm, true)]),
    ];
    for (name, title, y_label, series) in plots {
        let plot = Plot {
            title: title.to_owned(),
            x_label: "step".to_owned(),
            y_label: y_label.to_owned(),
            scale: Scale::Linear,
            series,
        };
        let path = format!("plots/{name}.svg");
        folder.write(&path, &svg(&plot))?;
        report.plots.push((title.to_owned(), path));
    }

    let now = (environment.clock)();
    let path = folder.file("tensorboard").join(file_name(now as u64, "retune", 0, 0));
    write_tensorboard(
        &path,
        now,
        &[
            ("train/loss", &train),
            ("train/learning_rate", &rate),
            ("train/gradient_norm", &norm),
            ("validation/loss", &validation),
        ],
    )
    .map_err(|error| Error::io(&path, "write", error))?;

    report.infer_limits();
    let json =
        report.to_json().unwrap_or_else(|error| unreachable!("a report is always JSON: {error}"));
    folder.write("report.json", &json)?;
    folder.write("report.md", &report.to_markdown())
}

fn write_tensorboard(
    path: &PathBuf,
    now: f64,
    curves: &[(&str, &Vec<(f64, f64)>)],
) -> std::io::Result<()> {
    let file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let mut writer = EventWriter::new(file, now)?;
    for (tag, points) in curves {
        for (step, value) in *points {
            writer.scalar(now, *step as u64, tag, *value as f32)?;
        }
    }
    writer.flush()
}
