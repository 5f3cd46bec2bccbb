//! A merge from plan to folder.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use retune_files::Dtype;
use retune_files::safetensors::TensorSpec;
use serde_json::{Map, Value, json};

use crate::card::card;
use crate::methods::{Group, Values};
use crate::model::Model;
use crate::plan::{ModelName, Plan};
use crate::resolve::{Action, Job, Jobs, Part, open, resolve};
use crate::vocabulary::Aligned;
use crate::writer::{Existing, ModelWriter, SHARD_BYTES};
use crate::{Error, Result};

/// Bytes that wait at most until they are sent to the disk.
const WAITING_BYTES: u64 = 1 << 23;
/// Bytes of a tensor copied at once.
const STEP_BYTES: usize = 1 << 18;
/// Configuration keys that hold the number of layers.
const LAYER_KEYS: [&str; 4] = ["num_hidden_layers", "n_layer", "num_layers", "n_layers"];
/// Files that make up a tokenizer, beside what says how to generate.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];
const CHATML: &str = "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
                      message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{%- if \
                      add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Finds the folder of a model or adapter by the name a plan gives it.
pub type Locate<'l> = &'l mut dyn FnMut(&str) -> Result<PathBuf>;

/// How far a merge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tensors finished, those of an earlier run included.
    pub num_done: usize,
    /// Tensors in all.
    pub num_tensors: usize,
    /// Bytes of the finished tensors.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

/// Is told of every finished tensor; a break stops the merge, which can then be resumed.
pub type Watch<'w> = &'w (dyn Fn(Progress) -> ControlFlow<()> + Sync);

/// What a merge does besides its plan.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What happens to a folder that is there.
    pub existing: Existing,
    /// Largest weight file, in bytes.
    pub max_shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { existing: Existing::Keep, max_shard_bytes: SHARD_BYTES }
    }
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Tensors of the result.
    pub num_tensors: usize,
    /// Tensors an earlier, interrupted run had finished.
    pub num_resumed: usize,
    /// Values of the result.
    pub num_values: u64,
    /// Bytes of the weights.
    pub total_bytes: u64,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Merges models into the folder `target`.
///
/// The weights depend on plan and models only, not on threads or interruptions.
///
/// # Errors
/// If a model is missing or damaged, the models do not fit together, the target exists or lies in a
/// model's folder, or the disk refuses. After [`Error::Interrupted`] the same call goes on where it
/// stopped; the target is as it was in every case.
pub fn merge(
    plan: &Plan,
    target: &Path,
    options: Options,
    locate: Locate<'_>,
    watch: Watch<'_>,
) -> Result<Merged> {
    let models = open_models(plan, locate)?;
    check_apart(target, &models)?;
    let vocabulary = Aligned::new(plan, &models)?;
    let mut jobs = resolve(plan, &models, vocabulary.as_ref())?;
    if plan.dtype == Some(Dtype::F64) || plan.out_dtype == Some(Dtype::F64) {
        jobs.notes.push("float64 is only how numbers are stored: they are computed in F32".into());
    }
    let specs: Vec<TensorSpec> = jobs.list.iter().map(|job| job.spec.clone()).collect();
    let identity = identity(plan, &models, &specs, options)?;
    let writer =
        ModelWriter::open(target, &specs, options.max_shard_bytes, &identity, options.existing)?;
    let num_resumed = writer.resumed().len();
    let total_bytes = specs.iter().map(bytes_of).sum();
    let merged = Merged {
        num_tensors: specs.len(),
        num_resumed,
        num_values: specs.iter().map(|spec| spec.shape.iter().product::<usize>() as u64).sum(),
        total_bytes,
        notes: jobs.notes.clone(),
    };
    let work = Work { plan, models: &models, vocabulary: vocabulary.as_ref(), writer: &writer };
    if let Err(error) = work.run(&jobs.list, total_bytes, watch) {
        return Err(writer.interrupted(error));
    }
    if let Err(error) = work.others(&jobs, target) {
        return Err(writer.interrupted(error));
    }
    writer.publish()?;
    Ok(merged)
}

fn bytes_of(spec: &TensorSpec) -> u64 {
    (spec.shape.iter().product::<usize>() * spec.dtype.size()) as u64
}

fn open_models(plan: &Plan, locate: Locate<'_>) -> Result<Vec<Model>> {
    let mut models = Vec::new();
    for name in plan.models() {
        let folder = locate(&name.path)?;
        let lora = name.lora.as_ref().map(|lora| locate(lora)).transpose()?;
        models.push(Model::open(name, &folder, lora.as_deref())?);
    }
    Ok(models)
}

/// Refuses a target inside a model's folder, or around it.
fn check_apart(target: &Path, models: &[Model]) -> Result<()> {
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Ok(parent) = parent.canonicalize() else { return Ok(()) };
    let whole = target.file_name().map_or(parent.clone(), |name| parent.join(name));
    let whole = whole.canonicalize().unwrap_or(whole);
    for model in models {
        for folder in model.folders() {
            let Ok(folder) = folder.canonicalize() else { continue };
            if whole.starts_with(&folder) || folder.starts_with(&whole) {
                return Err(Error::Content {
                    path: target.to_path_buf(),
                    what: format!("the result would lie in or around the model {}", model.name),
                    expected: "a folder apart from all models".to_owned(),
                    found: folder.display().to_string(),
                    help: "choose another folder".to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// Names everything that decides the result's bytes, so that only the same work is resumed.
fn identity(
    plan: &Plan,
    models: &[Model],
    specs: &[TensorSpec],
    options: Options,
) -> Result<String> {
    let mut parts = vec![
        format!("retune {}", env!("CARGO_PKG_VERSION")),
        plan.text.clone(),
        format!("seed {} shards {}", plan.seed, options.max_shard_bytes),
    ];
    for model in models {
        for folder in model.folders() {
            let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
                .map_err(Error::io(folder, "read"))?;
            names.sort();
            for path in names {
                let found = std::fs::metadata(&path).map_err(Error::io(&path, "read"))?;
                let changed = found.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                parts.push(format!("{} {} {changed:?}", path.display(), found.len()));
            }
        }
    }
    parts.extend(specs.iter().map(|spec| format!("{spec:?}")));
    Ok(retune_files::sha256(parts.join("\n").as_bytes()))
}

struct Work<'a> {
    plan: &'a Plan,
    models: &'a [Model],
    vocabulary: Option<&'a Aligned>,
    writer: &'a ModelWriter,
}

impl Work<'_> {
    /// Writes all tensors, the largest first, so that no thread is left with one at the end.
    fn run(&self, jobs: &[Job], total_bytes: u64, watch: Watch<'_>) -> Result<()> {
        let resumed = self.writer.resumed();
        let is_done = |job: &&Job| resumed.contains(&job.spec.name);
        let done_bytes =
            AtomicU64::new(jobs.iter().filter(is_done).map(|j| bytes_of(&j.spec)).sum());
        let num_done = AtomicUsize::new(resumed.len());
        let stop = AtomicBool::new(false);
        let failures: Mutex<BTreeMap<usize, Error>> = Mutex::new(BTreeMap::new());
        let mut open: Vec<(usize, &Job)> =
            jobs.iter().enumerate().filter(|(_, job)| !is_done(job)).collect();
        open.sort_by_key(|(i, job)| (std::cmp::Reverse(bytes_of(&job.spec)), *i));
        let fail = |i: usize, error: Error| {
            stop.store(true, Ordering::Relaxed);
            failures.lock().unwrap_or_else(PoisonError::into_inner).insert(i, error);
        };
        std::thread::scope(|scope| {
            let (tell, told) = channel();
            scope.spawn(|| {
                if let Err(error) = self.send_when_told(told) {
                    fail(jobs.len(), error);
                }
            });
            // One job at a time: rayon's own halving would give the largest all to one thread.
            open.into_par_iter().with_max_len(1).for_each(|(i, job)| {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.tensor(job) {
                    fail(i, error);
                    return;
                }
                let bytes = bytes_of(&job.spec);
                let progress = Progress {
                    num_done: num_done.fetch_add(1, Ordering::Relaxed) + 1,
                    num_tensors: jobs.len(),
                    done_bytes: done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes,
                    total_bytes,
                };
                // A failure has ended the thread, and with it the merge.
                let _ = tell.send(bytes);
                if watch(progress).is_break() {
                    stop.store(true, Ordering::Relaxed);
                }
            });
            drop(tell);
        });
        let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, error)) = failures.into_iter().next() {
            return Err(error);
        }
        if stop.into_inner() && num_done.into_inner() < jobs.len() {
            return Err(Error::Stopped);
        }
        Ok(())
    }

    /// Lets the disk write while tensors are merged: told of the bytes of each, sends
    /// them to the disk now and then.
    fn send_when_told(&self, told: Receiver<u64>) -> Result<()> {
        let mut waiting = 0;
        for bytes in told {
            waiting += bytes;
            if waiting >= WAITING_BYTES {
                self.writer.start_writing()?;
                waiting = 0;
            }
        }
        Ok(())
    }

    fn tensor(&self, job: &Job) -> Result<()> {
        match &job.action {
            Action::Copy(part) => self.copy(job, part),
            Action::Merge { base, inputs, shared, own, by_token } => {
                let vocabulary = self.vocabulary.filter(|_| *by_token);
                let all: Vec<&Part> = base.iter().chain(inputs).collect();
                // Without a method that knows a base, the plan's base still decides on embeddings.
                let named = self.plan.base.as_ref();
                let base_model = named.and_then(|name| self.index(name));
                let open = |part| open(part, &all, base_model, self.models, vocabulary);
                let base = base.as_ref().map(open).transpose()?;
                let inputs: Vec<Box<dyn Values>> =
                    inputs.iter().map(open).collect::<Result<_>>()?;
                let group = Group {
                    name: &job.spec.name,
                    shape: &job.spec.shape,
                    base: base.as_deref(),
                    inputs: inputs.iter().map(AsRef::as_ref).collect(),
                    shared,
                    own,
                    seed: self.plan.seed,
                    compat: self.plan.compat,
                };
                let mut out = self.writer.tensor(&job.spec.name)?;
                self.plan.method.merge(&group, &mut |values| out.push(values))?;
                out.finish()
            }
        }
    }

    fn index(&self, name: &ModelName) -> Option<usize> {
        self.models.iter().position(|model| model.name == *name)
    }

    fn copy(&self, job: &Job, part: &Part) -> Result<()> {
        let view = self.models[part.model].source.tensor(&part.tensor)?;
        let mut out = self.writer.tensor(&job.spec.name)?;
        let mut step = vec![0; STEP_BYTES.min(view.bytes.len())];
        let mut at = 0;
        while at < view.bytes.len() {
            let n = step.len().min(view.bytes.len() - at);
            view.read_bytes(at, &mut step[..n])?;
            out.push_bytes(&step[..n])?;
            at += n;
        }
        out.finish()
    }

    /// Writes configuration, tokenizer and card.
    fn others(&self, jobs: &Jobs, target: &Path) -> Result<()> {
        let first = self.plan.modules.iter().flat_map(|module| &module.slices);
        let first = first.flat_map(|slice| &slice.sources).map(|input| &input.model).next();
        let lender = self.plan.base.as_ref().or(first).and_then(|name| self.index(name));
        let lender = lender.unwrap_or(0);
        let config = self.config(&self.models[lender].config, jobs);
        self.json("config.json", &Value::Object(config))?;
        self.take_over(lender, "generation_config.json")?;
        let lender = self.vocabulary.map_or(lender, |vocabulary| vocabulary.lender);
        let tokenizer = self.vocabulary.and_then(|vocabulary| vocabulary.tokenizer.as_ref());
        let template = self.template()?;
        for name in TOKENIZER_FILES {
            match (name, tokenizer, &template) {
                ("tokenizer.json", Some(tokenizer), _) => self.json(name, tokenizer)?,
                // Forms of the vocabulary that lack the added tokens.
                (
                    "vocab.json" | "vocab.txt" | "merges.txt" | "tokenizer.model"
                    | "added_tokens.json",
                    Some(_),
                    _,
                ) => {}
                ("chat_template.jinja", _, Some(text)) => {
                    self.writer.file(name, text.as_bytes())?;
                }
                ("tokenizer_config.json", _, Some(_)) => self.without_template(lender, name)?,
                _ => self.take_over(lender, name)?,
            }
        }
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned());
        let card = card(self.plan, self.models, &name.unwrap_or_default());
        self.writer.file("README.md", card.as_bytes())
    }

    fn json(&self, name: &str, value: &Value) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)
            .unwrap_or_else(|error| unreachable!("a JSON value is always JSON: {error}"));
        text.push('\n');
        self.writer.file(name, text.as_bytes())
    }

    fn take_over(&self, model: usize, name: &str) -> Result<()> {
        let path = self.models[model].source.folder().join(name);
        if !path.is_file() {
            return Ok(());
        }
        let content = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
        self.writer.file(name, &content)
    }

    /// Takes over the tokenizer's configuration without a template that would win over the plan's.
    fn without_template(&self, model: usize, name: &str) -> Result<()> {
        let path = self.models[model].source.folder().join(name);
        match crate::source::read_json_object(&path)? {
            Some(mut config) => {
                config.shift_remove("chat_template");
                self.json(name, &Value::Object(config))
            }
            None => Ok(()),
        }
    }

    fn config(&self, lent: &Map<String, Value>, jobs: &Jobs) -> Map<String, Value> {
        let mut config = lent.clone();
        if let Some(stacked) = &jobs.stacked {
            for key in LAYER_KEYS {
                if config.contains_key(key) {
                    config.insert(key.to_owned(), json!(stacked.len()));
                }
            }
            // Attention kinds and the like, one per layer.
            let kinds: Option<Vec<Value>> = stacked
                .iter()
                .map(|(model, layer)| {
                    self.models[*model].config.get("layer_types")?.get(layer).cloned()
                })
                .collect();
            if let (Some(kinds), true) = (kinds, config.contains_key("layer_types")) {
                config.insert("layer_types".to_owned(), Value::from(kinds));
            }
        }
        if let Some(vocabulary) = self.vocabulary {
            config.insert("vocab_size".to_owned(), json!(vocabulary.num_rows));
        }
        let floats = jobs.list.iter().map(|job| &job.spec).filter(|spec| spec.dtype.is_float());
        let largest = floats.max_by_key(|spec| bytes_of(spec)).map(|spec| spec.dtype);
        let name = match largest {
            Some(Dtype::F32) => Some("float32"),
            Some(Dtype::BF16) => Some("bfloat16"),
            Some(Dtype::F16) => Some("float16"),
            Some(Dtype::F64) => Some("float64"),
            _ => None,
        };
        if let Some(name) = name {
            let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            config.insert(key.to_owned(), json!(name));
        }
        config
    }

    /// Returns the chat template the plan asks for.
    fn template(&self) -> Result<Option<String>> {
        let Some(wanted) = &self.plan.chat_template else { return Ok(None) };
        match wanted.as_str() {
            "auto" => {
                let mut counts: Vec<(String, usize)> = Vec::new();
                for model in self.models {
                    let Some(template) = template_of(model.source.folder())? else { continue };
                    match counts.iter_mut().find(|(known, _)| *known == template) {
                        Some((_, count)) => *count += 1,
                        None => counts.push((template, 1)),
                    }
                }
                // Of several that are equally common the first model's.
                let most = counts.iter().map(|(_, count)| *count).max();
                Ok(counts.into_iter().find(|(_, count)| Some(*count) == most).map(|(text, _)| text))
            }
            "chatml" => Ok(Some(CHATML.to_owned())),
            text if text.contains('{') => Ok(Some(text.to_owned())),
            other => Err(Error::Misfit {
                problems: vec![format!(
                    "chat template `{other}` is not known: write `auto`, `chatml` or the template"
                )],
            }),
        }
    }
}

/// Reads a model's chat template from its own file or its tokenizer's configuration.
fn template_of(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return std::fs::read_to_string(&path).map(Some).map_err(Error::io(&path, "read"));
    }
    let config = crate::source::read_json_object(&folder.join("tokenizer_config.json"))?;
    let template = config.and_then(|config| config.get("chat_template").cloned());
    Ok(match template {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(named)) => named
            .iter()
            .find(|one| one.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|one| one.get("template")?.as_str().map(str::to_owned)),
        _ => None,
    })
}
