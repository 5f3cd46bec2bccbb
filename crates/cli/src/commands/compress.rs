//! `compress` and `decompress`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use retune_merge::compeft::Settings;
use retune_merge::update::Update;
use retune_methods::adapter::Adapter;
use retune_run::card::{Derived, Outputs, derived_card, with_origins};
use retune_run::compress::{Base, Compressed, Trial, best, start_seeded};
use retune_run::open::{Located, fingerprint};
use retune_run::prepare::Prepared;
use serde_json::json;

use super::run::read_recipe;
use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::{grouped, number, table};

/// What `compress` is told.
#[derive(Debug, Args)]
pub(crate) struct CompressArguments {
    /// A PEFT adapter folder (LoRA, IA3), or a tuned model's folder or safetensors file.
    tuned: PathBuf,
    /// The model a tuned model was made from: a catalogue name, hf:org/name or a folder.
    #[arg(long)]
    base: Option<String>,
    /// Share of entries that keep their sign: 0.05 for large models to 0.5 for small ones.
    #[arg(long, default_value_t = 0.1)]
    density: f64,
    /// Size of a kept entry in standard deviations; falls as the density grows.
    #[arg(long, default_value_t = 4.0)]
    alpha: f64,
    /// Chooses a setting by measuring on a recipe's held-out rows.
    #[arg(long, value_enum, requires = "recipe")]
    search: Option<Search>,
    /// The recipe the adapter was trained with: its seed tells what LoRA's random factors started
    /// from, and its held-out rows are what `--search` measures on.
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// The folder to write, or a file that ends in .compeft.
    #[arg(long)]
    output: PathBuf,
    /// Overwrites the output, and measures an adapter on another base.
    #[arg(long)]
    force: bool,
}

/// A setting that can be searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Search {
    /// The scale of the kept entries.
    Alpha,
}

/// What `decompress` is told.
#[derive(Debug, Args)]
pub(crate) struct DecompressArguments {
    /// A folder or file `compress` wrote.
    adapter: PathBuf,
    /// The folder to write.
    #[arg(long)]
    output: PathBuf,
    /// Overwrites the output.
    #[arg(long)]
    force: bool,
}

/// Refuses to overwrite, where nothing can be forced.
pub(crate) fn check_new(output: &Path) -> Result<(), Failure> {
    if output.exists() {
        return Err(Failure::Failed(format!(
            "{}: exists already\n  help: choose another name, or remove it",
            output.display()
        )));
    }
    Ok(())
}

/// Refuses to overwrite, unless forced, and then what is no model or adapter: a folder of other
/// things would be lost with all that is in it.
pub(crate) fn check_free(output: &Path, force: bool) -> Result<(), Failure> {
    if !output.exists() {
        return Ok(());
    }
    if !force {
        return Err(Failure::Failed(format!(
            "{}: exists already\n  help: choose another name, or --force to overwrite",
            output.display()
        )));
    }
    let ours = ["config.json", "adapter_config.json", "adapter_model.compeft", "crash.json"];
    let is_ours = || ours.iter().any(|name| output.join(name).is_file());
    let is_empty = || output.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if output.is_dir() && !is_ours() && !is_empty() {
        return Err(Failure::Failed(format!(
            "{}: --force would remove this folder\n  expected: a model or an adapter\n  found: other \
             files\n  help: choose another name, or remove it yourself",
            output.display()
        )));
    }
    Ok(())
}

/// Opens an adapter, or a tuned model beside its base.
fn open(arguments: &CompressArguments, quiet: bool) -> Result<(Update, Option<Base>), Failure> {
    let tuned = &arguments.tuned;
    let Some(name) = &arguments.base else {
        if tuned.join("config.json").exists() && !tuned.join("adapter_config.json").exists() {
            return Err(Failure::Usage(format!(
                "{}: this is a whole model\n  help: give the model it was tuned from with --base",
                tuned.display()
            )));
        }
        return Ok((Update::adapter(tuned)?, None));
    };
    with_environment(quiet, |environment| {
        let located = Located::find(name, environment)?;
        let update = Update::full(tuned, &located.path)?;
        let base = Base { name: name.clone(), fingerprint: fingerprint(&located)? };
        Ok((update, Some(base)))
    })
}

/// Compresses an adapter or a full change.
pub(crate) fn compress(arguments: &CompressArguments, json: bool) -> Result<(), Failure> {
    check_free(&arguments.output, arguments.force)?;
    let (mut update, base) = open(arguments, json)?;
    let mut settings = Settings { density: arguments.density, alpha: arguments.alpha };
    let prepared = match &arguments.recipe {
        Some(path) => {
            let recipe = RecipeArguments { recipe: path.clone(), set: Vec::new() };
            let (recipe, _) = read_recipe(&recipe, json)?;
            Some(with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?)
        }
        None => None,
    };
    let seeded = match &prepared {
        Some(prepared) => start_seeded(&mut update, prepared)?,
        None => None,
    };
    let make = |settings| Compressed::make(&update, settings, base.as_ref(), seeded.as_ref());
    let mut compressed = make(settings)?;
    let mut trials = Vec::new();
    if let (Some(Search::Alpha), Some(prepared)) = (arguments.search, &prepared) {
        trials = compressed.try_alphas(&arguments.tuned, prepared, arguments.force)?;
        if let Some(best) = best(&trials) {
            settings.alpha = best.alpha;
            compressed = make(settings)?;
            compressed.note(best, &prepared.recipe.data.train);
        }
    }
    let title =
        arguments.tuned.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
    compressed.write(&title, &arguments.output)?;
    let shown = Shown { settings, trials: &trials, start: update.start().name() };
    show(&compressed, &shown, arguments, json);
    Ok(())
}

/// What was decided, to be shown.
struct Shown<'a> {
    settings: Settings,
    trials: &'a [Trial],
    start: &'a str,
}

fn show(compressed: &Compressed, shown: &Shown<'_>, arguments: &CompressArguments, json: bool) {
    let Shown { settings, trials, start } = *shown;
    let sizes = &compressed.sizes;
    if json {
        let value = json!({
            "output": arguments.output, "density": settings.density, "alpha": settings.alpha,
            "deviation": compressed.selection.deviation,
            "threshold": compressed.selection.threshold,
            "sizes": sizes, "ratio": sizes.ratio(), "trials": trials, "start": start,
        });
        println!("{value}");
        return;
    }
    if !trials.is_empty() {
        let mut shown = table(&["alpha", "loss", "accuracy"]);
        for trial in trials {
            let accuracy = trial.accuracy.map_or_else(|| "–".to_owned(), number);
            shown.add_row([trial.alpha.to_string(), number(trial.loss), accuracy]);
        }
        println!("{shown}");
    }
    let over = 100.0 * (sizes.coded_bytes as f64 / sizes.entropy_bytes - 1.0);
    let mut shown = table(&["", "bytes"]);
    let bytes = |count: f64| grouped(count.round() as u64);
    shown.add_row(["as half-precision numbers".to_owned(), grouped(sizes.f16_bytes)]);
    shown.add_row(["the file".to_owned(), grouped(sizes.file_bytes)]);
    shown.add_row(["of it signs, coded".to_owned(), grouped(sizes.coded_bytes)]);
    shown.add_row(["their entropy at one density".to_owned(), bytes(sizes.entropy_bytes)]);
    if sizes.raw_bytes > 0 {
        shown.add_row(["kept as they are".to_owned(), grouped(sizes.raw_bytes)]);
    }
    println!("{shown}");
    println!(
        "{} of {} entries kept, alpha {}, {:.1} times smaller, signs {over:+.2} % from their entropy",
        grouped(sizes.num_nonzero),
        grouped(sizes.num_entries),
        settings.alpha,
        sizes.ratio()
    );
    if start == "zero" {
        println!(
            "LoRA's random start is part of what was compressed; with --recipe, the one it was \
             trained with, only the change is"
        );
    }
    println!("written: {}", arguments.output.display());
}

/// Writes a compressed adapter as an ordinary one.
pub(crate) fn decompress(arguments: &DecompressArguments, json: bool) -> Result<(), Failure> {
    check_free(&arguments.output, arguments.force)?;
    let adapter = Adapter::read(&arguments.adapter)?;
    if adapter.method()?.card().name == "difference" {
        return Err(Failure::Usage(format!(
            "{}: this is a change of whole weights, which no other tool reads as an adapter\n  \
             help: `retune merge-adapter --model BASE --adapter {} --output FOLDER`",
            arguments.adapter.display(),
            arguments.adapter.display()
        )));
    }
    let base = adapter.config.get("base_model_name_or_path").and_then(|base| base.as_str());
    let card = derived_card(&Derived {
        library: "peft",
        base,
        tag: "compeft",
        title: &arguments
            .adapter
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into()),
        summary: "An adapter that was compressed with ComPEFT (Yadav et al., 2023, arXiv \
                  2311.13171) and written out again.",
        facts: &[],
    });
    let origin = std::slice::from_ref(&arguments.adapter);
    adapter.write(&arguments.output, &with_origins(&card, origin, Outputs::Same))?;
    if json {
        println!("{}", json!({"output": arguments.output}));
    } else {
        println!("written: {}", arguments.output.display());
    }
    Ok(())
}
