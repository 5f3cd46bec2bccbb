//! `doctor`: what half of the field's complaints would have been caught by.

use retune_core::method::MethodPlan;
use retune_run::plan::mebibytes;
use retune_run::prepare::Prepared;
use retune_run::rows::RowSet;
use serde_json::json;

use super::run::read_recipe;
use super::session::with_environment;
use crate::args::RecipeArguments;
use crate::environment::clock;
use crate::failure::Failure;
use crate::table::{grouped, table};

/// Shows template, mask, trainable list and forecasts.
pub(crate) fn doctor(arguments: &RecipeArguments, rows: usize, json: bool) -> Result<(), Failure> {
    let (recipe, _) = read_recipe(arguments, json)?;
    let prepared = with_environment(json, |environment| Ok(Prepared::make(recipe, environment)?))?;
    let method = prepared.recipe.method.plan(prepared.opened.checkpoint.model.spec())?;
    let seconds = prepared.plan.forecast.flops_per_step / measured_flops();
    if json {
        println!("{}", as_json(&prepared, &method, rows, seconds)?);
        return Ok(());
    }
    let plan = &prepared.plan;
    println!("data      {}", plan.data.understood);
    let s = &plan.data.statistics;
    println!(
        "rows      {} train, {} validation, {} test; {} tokens, {} of them learned",
        plan.data.num_train,
        plan.data.num_validation,
        plan.data.num_test,
        grouped(s.tokens),
        grouped(s.learned_tokens)
    );
    let train = &prepared.splits.train;
    for index in train.rows.iter().copied().take(rows) {
        let dataset = match &*train.dataset {
            RowSet::Texts(dataset) => dataset,
            RowSet::Images(images) => {
                println!("{}", images.show(index)?);
                continue;
            }
        };
        let (example, line) = dataset.example(index)?;
        let (text, _) = dataset.preparer().render(&example)?;
        println!("\nline {line}, as the model reads it:\n{text}");
        println!("token by token; what is learned stands in ⟦ ⟧:");
        let shown: String = dataset
            .preparer()
            .show(&dataset.row(index)?)
            .into_iter()
            .map(|token| if token.learn { format!("⟦{}⟧", token.text) } else { token.text })
            .collect();
        println!("{shown}");
    }
    println!();
    let mut list = table(&["trains", "shape", "values"]);
    let shown = method.parameters.len().min(12);
    for parameter in &method.parameters[..shown] {
        let count: usize = parameter.shape.iter().product();
        list.add_row([
            parameter.name.clone(),
            format!("{:?}", parameter.shape),
            grouped(count as u64),
        ]);
    }
    if method.parameters.len() > shown {
        list.add_row([
            format!("and {} more", method.parameters.len() - shown),
            String::new(),
            String::new(),
        ]);
    }
    println!("{list}");
    println!(
        "{} of {} values train ({:.3} %)",
        grouped(plan.num_trainable as u64),
        grouped(plan.model.num_parameters as u64),
        100.0 * plan.num_trainable as f64 / plan.model.num_parameters.max(1) as f64
    );
    let f = &plan.forecast;
    println!(
        "memory    about {} (weights {}, training {}, activations {}; measuring {})",
        mebibytes(f.total_bytes),
        mebibytes(f.weight_bytes),
        mebibytes(f.training_bytes),
        mebibytes(f.activation_bytes),
        mebibytes(f.evaluation_bytes)
    );
    println!(
        "time      at least {seconds:.1} s a step, {:.0} s for {} steps",
        seconds * plan.num_steps as f64,
        plan.num_steps
    );
    if plan.warnings.is_empty() {
        println!("no warnings");
    }
    for warning in &plan.warnings {
        println!("warning: {warning}");
    }
    Ok(())
}

fn as_json(
    prepared: &Prepared,
    method: &MethodPlan,
    rows: usize,
    seconds: f64,
) -> Result<serde_json::Value, Failure> {
    let train = &prepared.splits.train;
    let mut shown = Vec::new();
    for index in train.rows.iter().copied().take(rows) {
        let dataset = match &*train.dataset {
            RowSet::Texts(dataset) => dataset,
            RowSet::Images(images) => {
                shown.push(json!({"picture": images.show(index)?}));
                continue;
            }
        };
        let (example, line) = dataset.example(index)?;
        let (text, _) = dataset.preparer().render(&example)?;
        let tokens: Vec<_> = dataset
            .preparer()
            .show(&dataset.row(index)?)
            .into_iter()
            .map(|token| json!({"id": token.id, "text": token.text, "learn": token.learn}))
            .collect();
        shown.push(json!({"line": line, "text": text, "tokens": tokens}));
    }
    let trainable: Vec<_> = method
        .parameters
        .iter()
        .filter(|parameter| parameter.trains)
        .map(|parameter| json!({"name": parameter.name, "shape": parameter.shape}))
        .collect();
    Ok(json!({
        "plan": serde_json::to_value(&prepared.plan).unwrap_or_default(),
        "rows": shown,
        "trainable": trainable,
        "step_seconds_at_least": seconds,
    }))
}

/// Measures floating-point operations per second on a product of the size of a small layer.
fn measured_flops() -> f64 {
    let (n, inputs, outputs) = (512, 576, 1536);
    let matrix = retune_core::kernels::matrix::PackedMatrix::from_f32(
        outputs,
        inputs,
        vec![0.5; inputs * outputs],
        retune_core::kernels::matrix::Form::F32,
    );
    let Ok(matrix) = matrix else { return f64::INFINITY };
    let x = vec![0.5; n * inputs];
    let mut out = vec![0.0; n * outputs];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = clock();
        matrix.multiply(&x, n, &mut out, None);
        best = best.min(clock() - started);
    }
    2.0 * (n * inputs * outputs) as f64 / best
}
