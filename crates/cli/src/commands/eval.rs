//! `eval`.

use std::path::PathBuf;

use retune_core::model::Tuned;
use retune_run::adapters::{InForce, attach_adapters, read_adapters};
use retune_run::prepare::Prepared;
use serde_json::json;

use super::run::read_recipe;
use super::session::{warn, with_environment};
use crate::args::RecipeArguments;
use crate::failure::Failure;
use crate::table::{number, table};

/// Measures a model on a recipe's held-out rows.
pub(crate) fn eval(
    arguments: &RecipeArguments,
    adapters: &[PathBuf],
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let (recipe, _) = read_recipe(arguments, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let weights = &prepared.opened.weights;
    let adapters = read_adapters(adapters)?;
    let in_force = attach_adapters(&adapters, &prepared.opened, force)?;
    let InForce { changes, parameters, notes } = in_force;
    warn(&notes, json);
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
