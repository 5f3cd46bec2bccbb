//! `run`, `plan`, `resume`.

use std::path::Path;

use retune_run::artefacts::report::RunReport;
use retune_run::execute::{self, Done};
use retune_run::plan::mebibytes;
use retune_run::prepare::Prepared;
use retune_run::recipe::Recipe;
use serde_json::json;

use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::table::{grouped, number, table};

/// Reads a recipe, prints its warnings, and sets the number of threads.
pub(crate) fn read_recipe(
    arguments: &RecipeArguments,
    quiet: bool,
) -> Result<(Recipe, String), Failure> {
    let path = std::path::absolute(&arguments.recipe).unwrap_or(arguments.recipe.clone());
    let name = path.display().to_string();
    let bytes = std::fs::read(&arguments.recipe).map_err(|error| {
        Failure::Usage(format!(
            "{name}: the recipe cannot be read: {error}\n  help: `retune new {name}` writes one"
        ))
    })?;
    let (recipe, warnings) =
        Recipe::parse(&name, &bytes, &arguments.set).map_err(Failure::Recipe)?;
    if !quiet && !warnings.is_empty() {
        eprint!("{warnings}");
    }
    let threads = recipe.compute.threads;
    if threads > 0 {
        // Fails only if a pool exists already, which nothing before this makes.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    Ok((recipe, String::from_utf8_lossy(&bytes).into_owned()))
}

/// Tunes a model as a recipe says.
pub(crate) fn run(arguments: &RecipeArguments, json: bool) -> Result<(), Failure> {
    let (recipe, text) = read_recipe(arguments, json)?;
    let done = with_environment(json, |environment| {
        let prepared = Prepared::make(recipe, environment)?;
        if !json {
            eprintln!("{}", prepared.plan.data.understood);
        }
        Ok(execute::run(prepared, &text, environment, &mut Progress::new(json))?)
    })?;
    show(&done, json);
    Ok(())
}

/// Goes on with an interrupted run.
pub(crate) fn resume(path: &Path, json: bool) -> Result<(), Failure> {
    let done = with_environment(json, |environment| {
        Ok(execute::resume(path, environment, &mut Progress::new(json))?)
    })?;
    show(&done, json);
    Ok(())
}

/// Shows what a run would do.
pub(crate) fn plan(arguments: &RecipeArguments, json: bool) -> Result<(), Failure> {
    let (recipe, _) = read_recipe(arguments, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let plan = &prepared.plan;
    if json {
        println!("{}", serde_json::to_value(plan).unwrap_or_default());
        return Ok(());
    }
    println!("{}", plan.recipe);
    let mut rows = table(&["decided", "value"]);
    let f = &plan.forecast;
    for (name, value) in [
        ("model", format!("{} ({})", plan.model.name, plan.model.source)),
        ("class", plan.model.class.clone()),
        ("values", grouped(plan.model.num_parameters as u64)),
        ("values that train", grouped(plan.num_trainable as u64)),
        ("data", plan.data.understood.clone()),
        (
            "rows",
            format!(
                "{} train, {} validation, {} test",
                plan.data.num_train, plan.data.num_validation, plan.data.num_test
            ),
        ),
        ("steps", format!("{} ({} an epoch)", plan.num_steps, plan.steps_per_epoch)),
        ("highest learning rate", format!("{:e}", plan.learning_rate)),
        ("longest row", format!("{} tokens", plan.max_length)),
        (
            "memory forecast",
            format!(
                "{} (weights {}, training {}, activations {}; measuring {})",
                mebibytes(f.total_bytes),
                mebibytes(f.weight_bytes),
                mebibytes(f.training_bytes),
                mebibytes(f.activation_bytes),
                mebibytes(f.evaluation_bytes)
            ),
        ),
        ("recomputed layers", if f.recompute { "yes" } else { "no" }.to_owned()),
        ("plan", plan.hash.clone()),
    ] {
        rows.add_row([name.to_owned(), value]);
    }
    println!("{rows}");
    for warning in &plan.warnings {
        println!("warning: {warning}");
    }
    Ok(())
}

fn show(done: &Done, json: bool) {
    let report = &done.report;
    if json {
        let value = json!({
            "run": done.folder.path(),
            "report": serde_json::to_value(report).unwrap_or_default(),
        });
        println!("{value}");
        return;
    }
    println!();
    println!("{}", metrics(report));
    for example in &report.examples {
        println!("\nprompt   {}", shorten(&example.prompt));
        if let Some(reference) = &example.reference {
            println!("expected {}", shorten(reference));
        }
        println!("before   {}", shorten(&example.before));
        println!("after    {}", shorten(&example.after));
    }
    println!(
        "\n{} steps in {:.0} s, {:.0} s in all, peak memory {}",
        report.cost.num_steps,
        report.cost.train_s,
        report.cost.total_s,
        mebibytes(report.cost.peak_bytes)
    );
    println!("run folder: {}", done.folder.path().display());
}

fn metrics(report: &RunReport) -> comfy_table::Table {
    let mut rows = table(&["metric", "before", "after", "rows"]);
    let shown = |measured: &Option<retune_run::artefacts::report::Measured>| match measured {
        None => "–".to_owned(),
        Some(m) => match m.std_error {
            Some(error) => format!("{} ± {}", number(m.value), number(error)),
            None => number(m.value),
        },
    };
    for metric in &report.metrics {
        let held = if metric.held_out { "held out" } else { "training" };
        rows.add_row([
            metric.name.clone(),
            shown(&metric.before),
            shown(&metric.after),
            format!("{} {held}", metric.num_examples),
        ]);
    }
    rows
}

fn shorten(text: &str) -> String {
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
