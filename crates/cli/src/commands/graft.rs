//! `graft`: the few weights of a tuned model that carry its task.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use retune_core::random::Seed;
use retune_data::template::Date;
use retune_methods::adapter::Adapter;
use retune_run::artefacts::heatmap::{HeatMap, svg};
use retune_run::card::{Derived, Outputs, derived_card, with_origins};
use retune_run::graft::Keep;
use retune_run::graft::job::{Arm, Grafted, Options, Report, graft, open_tuned, write};
use retune_run::graft::pair::Pair;
use retune_run::graft::search::{BaseMask, Settings, Step};
use retune_run::graft::sparse::{compose, overlaps, region};
use retune_run::open::Located;
use retune_run::prepare::Prepared;
use serde_json::json;

use super::compress::check_free;
use super::run::read_recipe;
use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::environment::clock;
use crate::failure::Failure;
use crate::table::{grouped, number, table};

/// What `graft` does.
#[derive(Debug, Subcommand)]
pub(crate) enum GraftCommand {
    /// Looks for the smallest set of a tuned model's weights that keeps its task.
    ///
    /// An interrupted search goes on where it stopped when it is started again.
    Find(Box<FindArguments>),
    /// Shows how far the entries of several grafts are the same.
    Overlap {
        /// Folders of grafts, or of other adapters of single entries.
        #[arg(required = true, num_args = 2..)]
        adapters: Vec<PathBuf>,
        /// Writes a heat map.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Adds several grafts of one base up to one.
    Compose {
        /// Folders of grafts.
        #[arg(required = true, num_args = 2..)]
        adapters: Vec<PathBuf>,
        /// The folder to write.
        #[arg(long)]
        output: PathBuf,
        /// Overwrites the output.
        #[arg(long)]
        force: bool,
    },
}

/// What `graft find` is told.
#[derive(Debug, Args)]
pub(crate) struct FindArguments {
    /// The recipe, for the base and the task's rows.
    #[command(flatten)]
    recipe: RecipeArguments,
    /// The tuned model: a folder of the same architecture.
    #[arg(long)]
    tuned: String,
    /// The folder to write.
    #[arg(long)]
    output: PathBuf,
    /// Entries kept at most.
    #[arg(long)]
    budget: Option<usize>,
    /// Where the mask starts.
    #[arg(long, value_enum, default_value = "movement")]
    start: Start,
    /// The share of all entries it starts with.
    #[arg(long, default_value_t = 1e-5)]
    sparsity: f64,
    /// An earlier graft to start from.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["start", "sparsity"])]
    from: Option<PathBuf>,
    /// How far scores start from the border.
    #[arg(long, default_value_t = 10.0)]
    bias: f64,
    /// Learning rate of the scores; by default one that moves the share `--flips` across.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// The share of entries that change sides in the first step.
    #[arg(long, default_value_t = 1e-3, conflicts_with = "learning_rate")]
    flips: f64,
    /// Steps.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Batches of the recipe whose mean loss a step descends.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    batches: u64,
    /// A file of rows of another distribution, measured too.
    #[arg(long, value_name = "FILE")]
    ood: Option<PathBuf>,
    /// Overwrites the output, and takes a tuned model of narrower numbers than the base's.
    #[arg(long)]
    force: bool,
}

/// Where a mask starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Start {
    /// With the entries that moved most.
    Movement,
    /// With random ones.
    Random,
    /// With none.
    Empty,
}

/// Carries out `graft`.
pub(crate) fn run(command: &GraftCommand, json: bool) -> Result<(), Failure> {
    match command {
        GraftCommand::Find(arguments) => find(arguments, json),
        GraftCommand::Overlap { adapters, svg } => overlap(adapters, svg.as_deref(), json),
        GraftCommand::Compose { adapters, output, force } => {
            put_together(adapters, output, *force, json)
        }
    }
}

fn find(arguments: &FindArguments, json: bool) -> Result<(), Failure> {
    check_free(&arguments.output, arguments.force)?;
    let (recipe, _) = read_recipe(&arguments.recipe, json)?;
    let (prepared, path) = with_environment(json, |environment| {
        let prepared = Prepared::make(recipe, environment)?;
        Ok((prepared, Located::find(&arguments.tuned, environment)?.path))
    })?;
    let tuned = open_tuned(&prepared, &path, arguments.force)?;
    let model = prepared.opened.checkpoint.model.as_ref();
    let pair = Pair::new(model, &prepared.opened.weights, &tuned)?;
    let elsewhere = match &arguments.ood {
        Some(path) => Some(prepared.other_rows(path, Date::from_unix(clock() as i64))?),
        None => None,
    };
    let options = Options {
        settings: settings(arguments, &prepared, &pair)?,
        batches: arguments.batches,
        elsewhere: elsewhere.as_ref(),
    };
    let keep = keep(arguments, &prepared, &path)?;
    let mut watch = |step: Step| {
        if !json {
            eprintln!(
                "step {}: loss {}, {} entries, score {}",
                step.step,
                number(step.loss),
                grouped(step.num_entries as u64),
                number(step.score)
            );
        }
        ControlFlow::Continue(())
    };
    let grafted = graft(&prepared, &pair, &options, &keep, &mut watch)?;
    write(&prepared, &pair, &grafted, &arguments.output)?;
    // The search is over; its scores would only take room.
    let _ = std::fs::remove_file(&keep.path);
    show(&grafted, &arguments.output, json);
    Ok(())
}

fn settings(
    arguments: &FindArguments,
    prepared: &Prepared,
    pair: &Pair<'_>,
) -> Result<Settings, Failure> {
    let base = match (&arguments.from, arguments.start) {
        (Some(folder), _) => BaseMask::Given(region(folder, &Adapter::read(folder)?, pair)?),
        (None, Start::Movement) => BaseMask::Movement(arguments.sparsity),
        (None, Start::Random) => BaseMask::Random(arguments.sparsity),
        (None, Start::Empty) => BaseMask::Empty,
    };
    Ok(Settings {
        base,
        bias: arguments.bias,
        learning_rate: arguments.learning_rate,
        flips: arguments.flips,
        num_steps: arguments.steps,
        budget: arguments.budget,
        seed: Seed(prepared.recipe.seed),
        recompute: prepared.plan.forecast.recompute,
    })
}

/// Names the file of an unfinished search beside the output, and what decides its numbers.
fn keep(arguments: &FindArguments, prepared: &Prepared, tuned: &Path) -> Result<Keep, Failure> {
    let name = arguments.output.file_name().ok_or_else(|| {
        Failure::Usage(format!("{}: this names no folder", arguments.output.display()))
    })?;
    let path = arguments.output.with_file_name(format!(".{}.grafting", name.to_string_lossy()));
    let tuned = retune_models::open(tuned)?.fingerprint();
    let FindArguments { start, sparsity, from, bias, learning_rate, flips, batches, .. } =
        arguments;
    let decides = format!(
        "{} {tuned} {start:?} {sparsity} {from:?} {bias} {learning_rate:?} {flips} {batches}",
        prepared.plan.hash
    );
    Ok(Keep { path, identity: retune_files::sha256(decides.as_bytes()) })
}

fn show(grafted: &Grafted, output: &Path, json: bool) {
    let report = &grafted.report;
    if json {
        println!("{}", json!({"output": output, "report": report}));
        return;
    }
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    arms(report);
    println!(
        "{} of {} entries ({:.4} %) keep {:.1} % of the tuned accuracy; the mask of step {}",
        grouped(report.num_grafted as u64),
        grouped(report.num_entries as u64),
        100.0 * report.num_grafted as f64 / report.num_entries as f64,
        100.0 * report.retention,
        report.step
    );
    println!("written: {}", output.display());
}

fn arms(report: &Report) {
    let elsewhere = report.arms.iter().any(|arm| arm.elsewhere.is_some());
    let mut head = vec!["", "entries", "accuracy", "calibration error", "as tuned"];
    if elsewhere {
        head.extend(["accuracy elsewhere", "calibration error elsewhere"]);
    }
    let mut shown = table(&head);
    for Arm { name, num_entries, held_out, elsewhere } in &report.arms {
        let mut row = vec![
            (*name).to_owned(),
            grouped(*num_entries as u64),
            number(held_out.accuracy),
            number(held_out.calibration_error),
            number(held_out.agreement),
        ];
        if let Some(other) = elsewhere {
            row.extend([number(other.accuracy), number(other.calibration_error)]);
        }
        shown.add_row(row);
    }
    println!("{shown}");
}

fn read(folders: &[PathBuf]) -> Result<Vec<Adapter>, Failure> {
    folders.iter().map(|folder| Ok(Adapter::read(folder)?)).collect()
}

fn named<'a>(folders: &'a [PathBuf], adapters: &'a [Adapter]) -> Vec<(&'a Path, &'a Adapter)> {
    folders.iter().map(PathBuf::as_path).zip(adapters).collect()
}

fn overlap(folders: &[PathBuf], drawing: Option<&Path>, json: bool) -> Result<(), Failure> {
    let adapters = read(folders)?;
    let found = overlaps(&named(folders, &adapters))?;
    let names: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    if let Some(path) = drawing {
        let map = HeatMap {
            title: "overlap of grafts".to_owned(),
            value_label: "share of the column's entries".to_owned(),
            column_label: "graft".to_owned(),
            rows: names.clone(),
            columns: (1..=names.len()).map(|number| number.to_string()).collect(),
            values: found.shares.iter().map(|r| r.iter().map(|v| Some(*v)).collect()).collect(),
        };
        retune_files::atomic::write_file(path, svg(&map).as_bytes())?;
    }
    if json {
        println!("{}", json!({"grafts": folders, "overlaps": found}));
        return Ok(());
    }
    let mut head = vec!["share of the column's entries".to_owned(), "entries".to_owned()];
    head.extend((1..=names.len()).map(|number| number.to_string()));
    let mut shown = table(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for (place, name) in names.iter().enumerate() {
        let mut row = vec![format!("{} {name}", place + 1), grouped(found.counts[place] as u64)];
        row.extend(found.shares[place].iter().map(|share| number(*share)));
        shown.add_row(row);
    }
    println!("{shown}");
    Ok(())
}

fn put_together(
    folders: &[PathBuf],
    output: &Path,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    check_free(output, force)?;
    let adapters = read(folders)?;
    let named = named(folders, &adapters);
    let whole = compose(&named)?;
    let counts = overlaps(&named)?.counts;
    let entries: usize = whole.integers.values().map(|(_, shape, _)| shape[1]).sum();
    let twice = counts.iter().sum::<usize>() - entries;
    let facts: Vec<(String, String)> = folders
        .iter()
        .zip(&counts)
        .map(|(folder, count)| (format!("`{}`", folder.display()), format!("{count} entries")))
        .collect();
    let mut shown: Vec<(&str, String)> =
        facts.iter().map(|(name, count)| (name.as_str(), count.clone())).collect();
    shown.push(("entries of two or more", twice.to_string()));
    let base = whole.base().map(|base| base.name);
    let card = derived_card(&Derived {
        library: "retune",
        base: base.as_deref(),
        tag: "grafting",
        title: &output.file_name().map_or_else(String::new, |name| name.to_string_lossy().into()),
        summary: "Grafts of several tasks on one base, added up (Panigrahi et al., 2023, arXiv \
                  2302.06600).",
        facts: &shown,
    });
    whole.write(output, &with_origins(&card, folders, Outputs::Moved))?;
    if json {
        println!("{}", json!({"output": output, "entries": entries, "in_several": twice}));
    } else {
        println!("{entries} entries, {twice} of them of two or more grafts, whose changes add up");
        println!("written: {}", output.display());
    }
    Ok(())
}
