//! `intrinsic-dimension`: the fewest random directions that do what tuning the whole model does.

use std::path::Path;

use retune_run::compare::{ArmResult, arm_recipe};
use retune_run::intrinsic_dimension::{Question, Search, Trained, Trial};
use retune_run::recipe::Recipe;

use super::compare::{carry_out, read};
use super::report;
use crate::args::{Probe, RecipeArguments};
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
    let all_seeds = |trial: &Trial| -> Result<Vec<ArmResult>, Failure> {
        let seeds = (0..probe.seeds).map(|add| recipe.seed.wrapping_add(add));
        seeds
            .map(|seed| {
                let (arm, settings) = trial.arm(seed, probe.direct);
                let overrides = [arguments.set.clone(), settings].concat();
                let text = arm_recipe(&name, &bytes, &overrides, &arm, &folder)
                    .map_err(Failure::Recipe)?;
                carry_out(&folder, &arm, &text, &arm.name(), json)
            })
            .collect()
    };
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
