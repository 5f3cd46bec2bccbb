//! `merge`.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use retune_merge::plan::Plan;
use retune_merge::writer::Existing;
use retune_merge::{Error, Merged, Options, Progress, merge};
use retune_options::Report;
use retune_run::environment::Environment;
use retune_run::open::Located;
use retune_run::plan::mebibytes;
use serde_json::json;

use super::session::with_environment;
use crate::args::MergeArguments;
use crate::environment::{clock, peak_bytes};
use crate::failure::Failure;
use crate::table::grouped;

/// Merges models as a plan says.
pub(crate) fn run(arguments: &MergeArguments, json: bool) -> Result<(), Failure> {
    let name = arguments.plan.display().to_string();
    let bytes = std::fs::read(&arguments.plan)
        .map_err(|error| Failure::Usage(format!("{name}: the plan cannot be read: {error}")))?;
    let (plan, warnings) = Plan::parse(&name, &bytes).map_err(Failure::Recipe)?;
    if !json && !warnings.is_empty() {
        eprint!("{warnings}");
    }
    if let Some(threads) = arguments.threads {
        // Fails only if a pool exists already, which nothing before this makes.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    let options = Options {
        existing: if arguments.force { Existing::Replace } else { Existing::Keep },
        max_shard_bytes: arguments.max_shard_mb.saturating_mul(1_000_000),
    };
    let bar = bar(json);
    let watch = |progress: Progress| {
        if let Some(bar) = &bar {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        }
        ControlFlow::Continue(())
    };
    let started = clock();
    let merged = with_environment(json, |environment| {
        let mut locate = |name: &str| locate(name, environment);
        Ok(merge(&plan, &arguments.output, options, &mut locate, &watch)?)
    });
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    show(&merged?, &warnings, &arguments.output, clock() - started, json);
    Ok(())
}

/// Finds a model or adapter: a path, a name retune knows, or `org/name` of the hub.
fn locate(name: &str, environment: &mut Environment<'_>) -> Result<PathBuf, Error> {
    let path = Path::new(name);
    let is_gguf = |path: &Path| path.is_file() && path.extension().is_some_and(|e| e == "gguf");
    if path.exists() && !is_gguf(path) {
        return Ok(path.to_path_buf());
    }
    // mergekit writes the hub's names as they are.
    let is_hub = name.matches('/').count() == 1 && !name.starts_with(['.', '/', '~']);
    let hub = format!("hf:{name}");
    let name = if is_hub && !name.contains(':') { &hub } else { name };
    let located = Located::find(name, environment).map_err(|e| Error::NotFound(e.to_string()))?;
    if located.path.is_dir() {
        return Ok(located.path);
    }
    Err(Error::NotFound(format!(
        "{name} cannot be merged: expected a Hugging Face folder or a safetensors file, found a GGUF \
         file; write a folder with `retune export --model {name} --format hf --output FOLDER` and \
         give that"
    )))
}

fn bar(quiet: bool) -> Option<ProgressBar> {
    if quiet || !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} · {eta} left")
    {
        bar.set_style(style);
    }
    Some(bar)
}

fn show(merged: &Merged, warnings: &Report, output: &Path, seconds: f64, json: bool) {
    if json {
        let value = json!({
            "output": output,
            "num_tensors": merged.num_tensors,
            "num_resumed": merged.num_resumed,
            "num_values": merged.num_values,
            "total_bytes": merged.total_bytes,
            "notes": merged.notes,
            "warnings": warnings.to_json(),
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
        });
        println!("{value}");
        return;
    }
    for note in &merged.notes {
        eprintln!("note: {note}");
    }
    let resumed = match merged.num_resumed {
        0 => String::new(),
        n => format!(", {n} of them by an earlier run"),
    };
    println!(
        "{} tensors with {} values{resumed}; {} in {seconds:.1} s",
        merged.num_tensors,
        grouped(merged.num_values),
        mebibytes(merged.total_bytes)
    );
    println!("written: {}", output.display());
}
