//! `combine`: several adapters as one.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use retune_merge::combine::{Form, MajoritySign, Merge, NAMES, Settings, combine as merge};
use retune_merge::pairs::LoraAdapter;
use retune_methods::adapter::Adapter;
use retune_run::card::{Derived, Outputs, derived_card, with_origins};
use retune_run::compose::write_composed;
use retune_run::export::Beside;
use retune_run::open::{Located, Opened};
use retune_run::recipe::ComputeOptions;
use serde_json::{Value, json};

use super::compress::check_free;
use super::session::with_environment;
use crate::failure::Failure;

/// What `combine` is told.
#[derive(Debug, Args)]
pub(crate) struct CombineArguments {
    /// Adapter folders or compressed files.
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    /// A weight for each adapter; negative ones subtract. 1 each where absent.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    weights: Vec<f64>,
    /// How, by PEFT's name; `cat` is exact.
    #[arg(long = "type", value_name = "TYPE", default_value = "cat", value_parser = names())]
    form: String,
    /// Rank of the result of types with svd; the adapters' largest where absent.
    #[arg(long)]
    rank: Option<usize>,
    /// Share of entries kept by ties, dare and magnitude_prune.
    #[arg(long)]
    density: Option<f64>,
    /// How ties elects a sign.
    #[arg(long, value_enum, default_value = "total")]
    majority_sign: Sign,
    /// Decides what dare drops.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Adds adapters of any kind to this model, and writes a model instead of an adapter.
    #[arg(long, conflicts_with_all = ["form", "rank", "density"])]
    base: Option<String>,
    /// The folder to write.
    #[arg(long)]
    output: PathBuf,
    /// Overwrites the output, and takes adapters of another base.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sign {
    /// By the sum of the entries.
    Total,
    /// By the count of the signs.
    Frequency,
}

fn names() -> clap::builder::PossibleValuesParser {
    NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().into()
}

/// Combines adapters.
pub(crate) fn combine(arguments: &CombineArguments, json: bool) -> Result<(), Failure> {
    let output = &arguments.output;
    check_free(output, arguments.force)?;
    let count = arguments.adapters.len();
    let weights = match arguments.weights.len() {
        0 => vec![1.0; count],
        given if given == count => arguments.weights.clone(),
        given => {
            return Err(Failure::Usage(format!(
                "--weights: expected one for each of {count} adapters, found {given}"
            )));
        }
    };
    if let Some(folder) = arguments.adapters.iter().find(|path| inside(output, path)) {
        return Err(Failure::Usage(format!(
            "{}: the output lies inside {}\n  help: choose another folder",
            output.display(),
            folder.display()
        )));
    }
    let kept = match &arguments.base {
        Some(base) => {
            compose(arguments, base, &weights, json)?;
            None
        }
        None => adapter(arguments, &weights)?,
    };
    if json {
        println!("{}", json!({"output": output, "kept": kept}));
        return Ok(());
    }
    if let Some(kept) = kept {
        println!("{:.2} % of the energy kept, on the mean of the modules", 100.0 * kept);
    }
    println!("written: {}", output.display());
    Ok(())
}

/// Tells whether a path lies inside a folder.
pub(crate) fn inside(path: &Path, folder: &Path) -> bool {
    let absolute = |path| std::path::absolute(path).unwrap_or_default();
    absolute(path).starts_with(absolute(folder))
}

/// Adds adapters to a base and writes the model.
fn compose(
    arguments: &CombineArguments,
    base: &str,
    weights: &[f64],
    json: bool,
) -> Result<(), Failure> {
    let adapters: Vec<(PathBuf, f64)> =
        arguments.adapters.iter().cloned().zip(weights.iter().copied()).collect();
    with_environment(json, |environment| {
        let located = Located::find(base, environment)?;
        let (task, seed) = (retune_models::Task::AsSaved, retune_core::random::Seed(0));
        let opened = Opened::open(&located, &task, seed, &ComputeOptions::default(), None)?;
        // A folder without a tokenizer can still be changed.
        let tokenizer = located.tokenizer().ok();
        let beside = Beside::of(&located.path, tokenizer.as_ref())?;
        let output = &arguments.output;
        Ok(write_composed(&opened, base, &adapters, &beside, arguments.force, output)?)
    })
}

/// Combines LoRA adapters and writes one; returns the share of energy kept.
fn adapter(arguments: &CombineArguments, weights: &[f64]) -> Result<Option<f64>, Failure> {
    let form = NAMES.iter().find(|(name, _)| *name == arguments.form);
    let settings = Settings {
        form: form.map_or(Form::Svd(Merge::Linear), |(_, form)| *form),
        rank: arguments.rank,
        density: arguments.density,
        majority_sign: match arguments.majority_sign {
            Sign::Total => MajoritySign::Total,
            Sign::Frequency => MajoritySign::Frequency,
        },
        seed: arguments.seed,
    };
    let mut adapters = Vec::new();
    for (path, weight) in arguments.adapters.iter().zip(weights) {
        adapters.push((lora(path)?, *weight));
    }
    check_bases(&adapters, arguments.force)?;
    let combined = merge(&adapters, &settings)?;
    let mut facts: Vec<(String, String)> = adapters
        .iter()
        .map(|(adapter, weight)| (format!("`{}`", adapter.path.display()), weight.to_string()))
        .collect();
    facts.push(("combined by".to_owned(), format!("`{}`", arguments.form)));
    facts.push(("rank".to_owned(), combined.rank.to_string()));
    let facts: Vec<(&str, String)> =
        facts.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    let base = combined.config.get("base_model_name_or_path").and_then(Value::as_str);
    let card = derived_card(&Derived {
        library: "peft",
        base,
        tag: "lora",
        title: &arguments
            .output
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into()),
        summary: "Several LoRA adapters combined as PEFT's `add_weighted_adapter` does.",
        facts: &facts,
    });
    let adapter = Adapter {
        config: Value::Object(combined.config.clone()),
        tensors: combined.tensors,
        ..Adapter::default()
    };
    let card = with_origins(&card, &arguments.adapters, Outputs::Moved);
    adapter.write(&arguments.output, &card)?;
    Ok(combined.kept)
}

/// Reads a LoRA adapter, compressed or not.
pub(crate) fn lora(path: &Path) -> Result<LoraAdapter, Failure> {
    let adapter = Adapter::read(path)?;
    let config = adapter.config.as_object().cloned().unwrap_or_default();
    Ok(LoraAdapter::from_tensors(path, config, adapter.tensors)?)
}

/// Refuses adapters that say they were trained on different bases.
fn check_bases(adapters: &[(LoraAdapter, f64)], force: bool) -> Result<(), Failure> {
    let base =
        |adapter: &LoraAdapter| adapter.config.get("retune_base")?.get("fingerprint").cloned();
    let known: Vec<(&LoraAdapter, Value)> =
        adapters.iter().filter_map(|(adapter, _)| Some((adapter, base(adapter)?))).collect();
    match known.iter().find(|(_, hash)| *hash != known[0].1) {
        Some((other, hash)) if !force => Err(Failure::Failed(format!(
            "{}: the adapters were trained on different bases\n  expected: {}\n  found: {hash}\n  \
             help: combine adapters of one base, or --force if you know better",
            other.path.display(),
            known[0].1
        ))),
        _ => Ok(()),
    }
}
