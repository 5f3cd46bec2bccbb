//! Two methods at once.

use retune_core::Error;
use retune_core::method::Part;
use retune_methods::registry::Plugin;
use retune_methods::stack::stacked;

use crate::case::{Case, Failed, NUM_STEPS, read};
use crate::checks::{
    accumulation, gradient, merge, moves, packed, plan, resume, stacked as saved, start, threads,
};
use crate::subject::Subject;
use crate::suite::{Check, Failure, tried};

/// What a stack must keep, as one method does; its adapters are several.
pub const CHECKS: &[Check] = &[
    plan::CHECK,
    start::CHECK,
    merge::CHECK,
    packed::CHECK,
    accumulation::CHECK,
    threads::CHECK,
    moves::CHECK,
    gradient::CHECK,
    saved::CHECK,
    resume::CHECK,
];

/// What became of two methods together.
#[derive(Debug)]
pub enum Outcome {
    /// One of them refuses the model.
    Inapplicable,
    /// They are refused before the first step, for this reason.
    Refused(String),
    /// They train; these checks failed.
    Trained(Vec<Failure>),
}

/// Stacks `above` on `below`, each with the first of its examples.
///
/// # Errors
/// If an example cannot be read.
pub fn case<'a>(
    below: &Plugin,
    above: &'a Plugin,
    subject: &'a Subject,
) -> Result<Case<'a>, Failed> {
    let part = |plugin: &Plugin| {
        let example = read(plugin, "")?.examples().first().copied().unwrap_or_default();
        Ok::<_, Failed>(Part { name: plugin.card.name.to_owned(), method: read(plugin, example)? })
    };
    let method = stacked(vec![part(below)?, part(above)?]);
    Ok(Case { plugin: above, example: "", subject, method })
}

/// Tries every check on `above` stacked on `below`.
///
/// # Errors
/// If an example cannot be read.
pub fn check_pair(below: &Plugin, above: &Plugin, subject: &Subject) -> Result<Outcome, Failed> {
    let case = case(below, above, subject)?;
    let spec = subject.spec();
    let applies = |part: &Part| part.method.plan(spec).is_ok();
    if !case.method.parts().iter().all(applies) {
        return Ok(Outcome::Inapplicable);
    }
    let planned = case.method.plan(spec).and_then(|_| case.method.stages(NUM_STEPS));
    match planned {
        Ok(_) => {}
        Err(error @ Error::Setting { .. }) => return Ok(Outcome::Refused(error.to_string())),
        Err(error) => return Err(error.into()),
    }
    let failed = |check: &Check| {
        let message = tried(|| (check.run)(&case))?;
        let method = format!("{} + {}", below.card.name, above.card.name);
        Some(Failure { method, model: subject.name, check: check.name, message })
    };
    Ok(Outcome::Trained(CHECKS.iter().filter_map(failed).collect()))
}
