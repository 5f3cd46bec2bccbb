//! `eval`.

use std::path::Path;

use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_methods::adapter::Adapter;
use retune_run::open::check_base;
use retune_run::prepare::Prepared;
use serde_json::json;

use super::run::read_recipe;
use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::{number, table};

/// Measures a model on a recipe's held-out rows.
pub(crate) fn eval(
    arguments: &RecipeArguments,
    adapter: Option<&Path>,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let (recipe, _) = read_recipe(arguments, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let weights = &prepared.opened.weights;
    let mut parameters = Parameters::new(weights.device());
    let mut changes = Changes::default();
    if let Some(folder) = adapter {
        let adapter = Adapter::read(folder)?;
        check_base(folder, &adapter, &prepared.opened, force)?;
        changes = adapter.method()?.attach(weights, &mut parameters, Seed(0))?;
        adapter.fill(folder, &mut parameters)?;
    }
    let tuned = Tuned {
        model: prepared.opened.checkpoint.model.as_ref(),
        weights,
        changes: &changes,
        parameters: &parameters,
    };
    let (rows, held_out) = prepared.measured();
    let found = prepared.measure(rows).run(&tuned)?;
    if json {
        let value = serde_json::to_value(&found).unwrap_or_default();
        println!("{}", json!({"held_out": held_out, "measurement": value}));
        return Ok(());
    }
    let mut shown = table(&["metric", "value", "standard error"]);
    for (name, measured) in &found.metrics {
        let error = measured.std_error.map_or_else(|| "–".to_owned(), number);
        shown.add_row([name.clone(), number(measured.value), error]);
    }
    println!("{shown}");
    let held = if held_out { "held out" } else { "of the training data" };
    println!("{} rows, {held}", found.num_rows);
    Ok(())
}
