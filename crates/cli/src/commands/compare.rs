//! `compare`: one recipe under many methods and seeds.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use retune_core::names::nearest_list;
use retune_methods::registry;
use retune_run::compare::{Arm, ArmResult, Comparison, Standing, arm_recipe, standing};
use retune_run::recipe::Recipe;

use super::report;
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::table;

/// Carries out every run that is not finished yet, each in a process of its own, and reports.
pub(crate) fn compare(
    arguments: &RecipeArguments,
    methods: &[String],
    seeds: u64,
    metric: Option<&str>,
    json: bool,
) -> Result<(), Failure> {
    for method in methods {
        if registry::find(method).is_none() {
            return Err(Failure::Usage(format!(
                "there is no method `{method}`\n  nearest names: {}\n  help: `retune methods` lists all",
                nearest_list(method, registry::names())
            )));
        }
    }
    let (name, bytes) = read(arguments)?;
    let first = methods.first().map(String::as_str);
    let (recipe, _) =
        Recipe::parse_as(&name, &bytes, &arguments.set, first).map_err(Failure::Recipe)?;
    let folder = recipe.runs.join(format!("{}-compare", recipe.name));
    let folder = std::path::absolute(&folder).unwrap_or(folder);
    let arms = methods.iter().flat_map(|method| {
        (0..seeds).map(|add| Arm {
            method: method.clone(),
            variant: None,
            seed: recipe.seed.wrapping_add(add),
        })
    });
    // Every recipe is checked before the first run begins.
    let arms = arms
        .map(|arm| {
            let text = arm_recipe(&name, &bytes, &arguments.set, &arm, &folder)
                .map_err(Failure::Recipe)?;
            Ok((arm, text))
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    let mut results = Vec::new();
    for (place, (arm, text)) in arms.iter().enumerate() {
        let what = format!("[{}/{}] {} with seed {}", place + 1, arms.len(), arm.method, arm.seed);
        results.push(carry_out(&folder, arm, text, &what, json)?);
        // Written after every run: what is done stays visible if the rest never comes.
        write(&folder, &Comparison::of(&recipe.name, None, results.clone())?)?;
    }
    let found = Comparison::of(&recipe.name, metric, results)?;
    write(&folder, &found)?;
    show(&folder, &found, json);
    if found.rows.iter().all(|row| row.num_finished == 0) {
        return Err(Failure::Failed("every run failed; see report.md for each error".to_owned()));
    }
    Ok(())
}

/// Returns the whole path of a recipe, and what it holds.
pub(super) fn read(arguments: &RecipeArguments) -> Result<(String, Vec<u8>), Failure> {
    let path = std::path::absolute(&arguments.recipe).unwrap_or(arguments.recipe.clone());
    let name = path.display().to_string();
    let bytes = std::fs::read(&path).map_err(|error| {
        Failure::Usage(format!(
            "{name}: the recipe cannot be read: {error}\n  help: `retune new {name}` writes one"
        ))
    })?;
    Ok((name, bytes))
}

/// Keeps, continues or makes one run, and says how it ended; one that fails is a result too.
pub(super) fn carry_out(
    folder: &Path,
    arm: &Arm,
    text: &str,
    what: &str,
    quiet: bool,
) -> Result<ArmResult, Failure> {
    let recipes = folder.join("recipes");
    std::fs::create_dir_all(&recipes).map_err(|error| {
        Failure::Failed(format!("{}: the folder cannot be made: {error}", recipes.display()))
    })?;
    let result = match finished(folder, arm, text, what, quiet) {
        Ok(result) => result,
        Err(error) => ArmResult::failed(arm.clone(), error),
    };
    if !quiet {
        match &result.error {
            Some(error) => eprintln!("{what}: failed: {}", error.lines().next().unwrap_or("")),
            None => eprintln!("{what}: {}", shown(&result)),
        }
    }
    Ok(result)
}

fn finished(
    folder: &Path,
    arm: &Arm,
    text: &str,
    what: &str,
    quiet: bool,
) -> Result<ArmResult, String> {
    let plain = |error: retune_run::Error| error.to_string();
    let found = standing(folder, arm, text).map_err(plain)?;
    let recipe = folder.join("recipes").join(format!("{}.toml", arm.name()));
    let run = |arguments: &[&Path]| -> Result<(), String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        let lines = child.stderr.take().map(|stderr| BufReader::new(stderr).lines());
        let mut said = Vec::new();
        for line in lines.into_iter().flatten().map_while(Result::ok) {
            if !quiet && is_progress(&line) {
                eprintln!("{what}: {line}");
            }
            said.push(line);
        }
        let status = child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(failure(&said, &status.to_string())) }
    };
    match found {
        Standing::Finished(done) => return ArmResult::read(arm.clone(), &done).map_err(plain),
        Standing::Cut(cut) => {
            if !quiet {
                eprintln!("{what}: goes on with {}", cut.display());
            }
            run(&[Path::new("resume"), &cut])?;
        }
        Standing::Absent => {
            std::fs::write(&recipe, text)
                .map_err(|error| format!("{}: cannot be written: {error}", recipe.display()))?;
            run(&[Path::new("run"), &recipe])?;
        }
    }
    match standing(folder, arm, text).map_err(plain)? {
        Standing::Finished(done) => ArmResult::read(arm.clone(), &done).map_err(plain),
        other => Err(format!("the run ended without a report: {other:?}")),
    }
}

/// Returns whether a line says how far a run is; the rest is what was decided, which the reports have.
fn is_progress(line: &str) -> bool {
    line.starts_with("step ") || line.ends_with(" …")
}

/// Returns the error among the lines of a run that failed, or else its last lines.
fn failure(said: &[String], status: &str) -> String {
    if let Some(place) = said.iter().position(|line| line.starts_with("error: ")) {
        return said[place..].join("\n").trim_start_matches("error: ").to_owned();
    }
    let tail = &said[said.len().saturating_sub(10)..];
    format!("the run ended with {status}\n{}", tail.join("\n"))
}

fn shown(result: &ArmResult) -> String {
    let metrics: Vec<String> =
        result.metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    format!("{} in {:.1} s", metrics.join(", "), result.train_s)
}

fn write(folder: &Path, found: &Comparison) -> Result<(), Failure> {
    report::write(folder, found, &found.to_markdown(), ("compare.svg", &found.chart()))
}

fn show(folder: &Path, found: &Comparison, json: bool) {
    if json {
        return report::print_json(folder, found);
    }
    let mut rows =
        table(&["method", &found.metric, "seeds", "values that train", "training", "peak memory"]);
    for row in &found.rows {
        rows.add_row(row.cells());
    }
    println!("{rows}");
    if let Some(base) = found.base {
        println!("the base, untuned: {base:.4}");
    }
    println!("written: {}", folder.display());
}
