//! Options that are wrong.

use std::ops::Bound;

use retune_core::parameters::Parameters;
use retune_options::{Bounds, OptionSpec, Table, Value, to_toml};

use crate::case::{Case, Failed, SEED, read};
use crate::suite::Check;

/// Every option refuses what is beyond its range, and no value inside it makes the method panic.
pub const CHECK: Check = Check {
    name: "options",
    about: "unknown, mistyped and out-of-range options are refused; the ends of ranges work or are refused",
    run,
};

/// More values than this are not made for an option at the end of its range.
const MOST_VALUES: usize = 1 << 20;

fn run(case: &Case<'_>) -> Result<(), Failed> {
    // Which options there are does not depend on the example; each example only has to come back.
    if case.method.examples().first() != Some(&case.example) {
        return written_and_read(case);
    }
    let specs = (case.plugin.card.options)();
    refuse(case, "conformance_no_such_option = 1", "an unknown option")?;
    for spec in &specs {
        let name = spec.name;
        if spec.help.is_empty() {
            return Err(Failed(format!("`{name}` has no help")));
        }
        if spec.nested.is_some() {
            continue;
        }
        if spec.kind != "date" {
            refuse(case, &format!("{name} = 1979-05-27"), "a date")?;
        }
        if spec.name == "targets" || spec.name == "target_modules" {
            no_target(case, spec)?;
        }
        for wrong in outside(&spec.bounds) {
            refuse(case, &line(spec, wrong), "a number out of its range")?;
        }
        for edge in inside(&spec.bounds) {
            survives(case, &line(spec, edge))?;
        }
    }
    written_and_read(case)
}

/// Returns whether a list or map of numbers is meant, whose range is that of each.
fn line(spec: &OptionSpec, number: Value) -> String {
    let mut table = Table::default();
    match spec.schema["type"].as_str() {
        Some("array") => {
            table.insert(spec.name, Value::List(vec![number.into()]));
        }
        Some("object") => {
            let mut inner = Table::default();
            inner.insert(".*", number);
            table.insert(spec.name, inner);
        }
        _ => {
            table.insert(spec.name, number);
        }
    }
    to_toml(&table)
}

/// Returns a number beyond each end.
fn outside(bounds: &Bounds) -> Vec<Value> {
    let beyond = |edge: &Bound<Value>, by: i128| match edge {
        Bound::Excluded(value) => Some(value.clone()),
        Bound::Included(Value::Integer(value)) => Some(Value::Integer(value + by)),
        Bound::Included(Value::Float(value)) => Some(Value::Float(value + by as f64)),
        Bound::Unbounded | Bound::Included(_) => None,
    };
    [beyond(&bounds.min, -1), beyond(&bounds.max, 1)].into_iter().flatten().collect()
}

/// Returns the numbers at each end.
fn inside(bounds: &Bounds) -> Vec<Value> {
    let at = |edge: &Bound<Value>| match edge {
        Bound::Included(value) => Some(value.clone()),
        _ => None,
    };
    [at(&bounds.min), at(&bounds.max)].into_iter().flatten().collect()
}

fn refuse(case: &Case<'_>, options: &str, what: &str) -> Result<(), Failed> {
    match read(case.plugin, options) {
        Err(_) => Ok(()),
        Ok(_) => Err(Failed(format!("{what} is accepted: `{}`", options.trim_end()))),
    }
}

/// A value that is allowed either works on this model or is refused by the plan; the plan and what
/// is attached agree on it.
fn survives(case: &Case<'_>, options: &str) -> Result<(), Failed> {
    let Ok(method) = read(case.plugin, options) else {
        // A check across several options may refuse it.
        return Ok(());
    };
    let Ok(plan) = method.plan(case.subject.spec()) else { return Ok(()) };
    if plan.num_trainable() > MOST_VALUES {
        return Ok(());
    }
    let weights = case.subject.weights()?;
    let mut parameters = Parameters::new(weights.device());
    method.attach(&weights, &mut parameters, SEED).map_err(|error| {
        Failed(format!("`{}` is planned but cannot be attached: {error}", options.trim_end()))
    })?;
    // What is shared out while the run is under way is not there yet.
    let made = parameters.num_trainable();
    if made > plan.num_trainable() || (made < plan.num_trainable() && !plan.is_pooled()) {
        return Err(Failed(format!(
            "`{}` plans {} values and makes {}",
            options.trim_end(),
            plan.num_trainable(),
            parameters.num_trainable()
        )));
    }
    Ok(())
}

/// A target that matches nothing is refused by the plan, by its name.
fn no_target(case: &Case<'_>, spec: &OptionSpec) -> Result<(), Failed> {
    const NOWHERE: &str = "no_such_module";
    let options = format!("{} = [\"{NOWHERE}\"]", spec.name);
    let Ok(method) = read(case.plugin, &options) else { return Ok(()) };
    match method.plan(case.subject.spec()) {
        Err(error) if error.to_string().contains(NOWHERE) => Ok(()),
        Err(error) => Err(Failed(format!("the error of `{options}` does not name it: {error}"))),
        Ok(_) => Err(Failed(format!("a target without a match is planned: `{options}`"))),
    }
}

/// The resolved options, read again, are the same.
fn written_and_read(case: &Case<'_>) -> Result<(), Failed> {
    let written = to_toml(&case.method.options());
    let again = to_toml(&read(case.plugin, &written)?.options());
    if written == again {
        return Ok(());
    }
    Err(Failed(format!("the resolved options\n{written}\nare read back as\n{again}")))
}
