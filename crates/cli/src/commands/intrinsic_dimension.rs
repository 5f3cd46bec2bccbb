//! `intrinsic-dimension`: the fewest random directions that do what tuning the whole model does.

use std::path::Path;
use std::time::Duration;

use indicatif::HumanDuration;
use retune_core::spec::Head;
use retune_run::compare::{ArmResult, arm_recipe};
use retune_run::intrinsic_dimension::{Question, Search, Trained, Trial};
use retune_run::prepare::Prepared;
use retune_run::recipe::{EvaluationKind, Recipe};

use super::compare::{carry_out, read};
use super::report;
use super::session::with_environment;
use crate::args::{Probe, RecipeArguments};
use crate::environment::clock;
use crate::failure::Failure;
use crate::table::table;

/// Tunes the whole model, then along more and fewer directions, until the answer is close enough.
pub(crate) fn intrinsic_dimension(
    arguments: &RecipeArguments,
    probe: &Probe,
    json: bool,
) -> Result<(), Failure> {
    let question = Question {
        share: probe.share,
        from: probe.from,
        to: probe.to,
        precision: probe.precision,
        direct: probe.direct,
    };
    question.check().map_err(|error| Failure::Usage(error.to_string()))?;
    let (name, bytes) = read(arguments)?;
    let (recipe, _) =
        Recipe::parse_as(&name, &bytes, &arguments.set, Some("said")).map_err(Failure::Recipe)?;
    let folder = recipe.runs.join(format!("{}-intrinsic-dimension", recipe.name));
    let folder = std::path::absolute(&folder).unwrap_or(folder);
    let mut begun = 0;
    let mut all_seeds = |trial: &Trial| -> Result<Vec<ArmResult>, Failure> {
        let seeds = (0..probe.seeds).map(|add| recipe.seed.wrapping_add(add));
        seeds
            .map(|seed| {
                let (arm, settings) = trial.arm(seed, probe.direct);
                let overrides = [arguments.set.clone(), settings].concat();
                let text = arm_recipe(&name, &bytes, &overrides, &arm, &folder)
                    .map_err(Failure::Recipe)?;
                begun += 1;
                carry_out(&folder, &arm, &text, &format!("[{begun}] {}", arm.name()), json)
            })
            .collect()
    };
    // A mistake shows before the whole model is tuned, which may take hours.
    for method in ["full", "said"] {
        let (recipe, _) = Recipe::parse_as(&name, &bytes, &arguments.set, Some(method))
            .map_err(Failure::Recipe)?;
        check(recipe, probe.metric.as_deref(), json)?;
    }
    let started = clock();
    let per_dimension = probe.seeds as usize * probe.rates.len();
    let mut runs = Vec::new();
    let mut trained = Trained::Full;
    let found = loop {
        let rates = match trained {
            Trained::Full if probe.full_rates.is_empty() => vec![None],
            Trained::Full => probe.full_rates.iter().copied().map(Some).collect(),
            Trained::Dimension(_) => probe.rates.iter().copied().map(Some).collect(),
        };
        for rate in rates {
            let trial = Trial { trained, rate };
            let results = all_seeds(&trial)?;
            runs.push((trial, results));
            // Written after every run: what is done stays visible if the rest never comes.
            let search = Search::of(&recipe.name, &question, probe.metric.as_deref(), &runs)?;
            write(&folder, &search)?;
        }
        let search = Search::of(&recipe.name, &question, probe.metric.as_deref(), &runs)?;
        if !json {
            let all = || runs.iter().flat_map(|(_, results)| results);
            // Runs an earlier call finished take no time now.
            let trained: f64 = all().map(|run| run.train_s).sum();
            let left = search.most_left() * per_dimension;
            let time = (clock() - started).max(trained) / all().count() as f64 * left as f64;
            let time = HumanDuration(Duration::from_secs_f64(time.clamp(0.0, 1e9)));
            eprintln!("at most {left} runs are left, about {time} at the pace so far");
        }
        if search.full.is_none() {
            let error = search.trials.iter().find_map(|trial| trial.error.clone());
            return Err(Failure::Failed(format!(
                "full tuning did not finish, so there is nothing to reach\n{}",
                error.unwrap_or_default()
            )));
        }
        match search.next_dimension() {
            Some(dimension) => trained = Trained::Dimension(dimension),
            None => break search,
        }
    };
    show(&folder, &found, json);
    let mut directions = found.trials.iter().filter(|trial| trial.trained != Trained::Full);
    if directions.all(|trial| trial.score.is_none()) {
        return Err(Failure::Failed("every run failed; see report.md for each error".to_owned()));
    }
    Ok(())
}

/// Opens the model and reads the rows, and refuses what the first run would fail at.
fn check(recipe: Recipe, metric: Option<&str>, json: bool) -> Result<(), Failure> {
    let kind = recipe.evaluate.kind;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let is_language = matches!(prepared.opened.checkpoint.model.spec().head, Head::Language { .. });
    if is_language && kind == EvaluationKind::Loss && metric.is_none() {
        return Err(Failure::Failed(
            "nothing would be scored: the recipe measures the loss, of which less is better\n  \
             expected: a score, of which full tuning's share can be reached\n  found: \
             evaluate.kind = \"loss\"\n  help: set `evaluate.kind` to \"choice\" or \"generate\""
                .to_owned(),
        ));
    }
    Ok(())
}

fn write(folder: &Path, found: &Search) -> Result<(), Failure> {
    let picture = ("intrinsic-dimension.svg", &found.chart());
    report::write(folder, found, &found.to_markdown(), picture)
}

fn show(folder: &Path, found: &Search, json: bool) {
    if json {
        return report::print_json(folder, found);
    }
    let mut rows = table(&found.columns());
    for row in found.cells() {
        rows.add_row(row);
    }
    println!("{rows}");
    println!("{}", found.verdict());
    println!("written: {}", folder.display());
}
