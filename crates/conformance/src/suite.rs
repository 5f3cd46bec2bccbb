//! The list of checks, and the walk over methods and models.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use retune_methods::registry::Plugin;

use crate::case::{Case, Failed, read};
use crate::checks;
use crate::subject::Subject;

/// One thing every method must keep.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// One or two words.
    pub name: &'static str,
    /// What must hold.
    pub about: &'static str,
    /// Tries it.
    pub run: fn(&Case<'_>) -> Result<(), Failed>,
}

/// All checks, cheapest first.
pub const CHECKS: &[Check] = &[
    checks::plan::CHECK,
    checks::start::CHECK,
    checks::fast::CHECK,
    checks::merge::CHECK,
    checks::quantized::CHECK,
    checks::packed::CHECK,
    checks::accumulation::CHECK,
    checks::threads::CHECK,
    checks::moves::CHECK,
    checks::gradient::CHECK,
    checks::options::CHECK,
    checks::saved::CHECK,
    checks::resume::CHECK,
];

/// A check that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The method's name and its options.
    pub method: String,
    /// The model.
    pub model: &'static str,
    /// The check.
    pub check: &'static str,
    /// What was found, with the numbers.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}: {}: {}", self.method, self.model, self.check, self.message)
    }
}

/// Tries one check on every method, each of its examples, and every model.
pub fn check_all(check: &Check, plugins: &[Plugin], subjects: &[Subject]) -> Vec<Failure> {
    let mut failures = Vec::new();
    for plugin in plugins {
        // The defaults must be readable; which examples there are, only a method can say.
        let examples = match read(plugin, "") {
            Ok(method) => method.examples(),
            Err(_) => &[""],
        };
        for (example, subject) in
            examples.iter().flat_map(|example| subjects.iter().map(move |s| (*example, s)))
        {
            let message = tried(|| {
                let case = Case::new(plugin, example, subject)?;
                // A plan that fails where it should not is the plan check's to tell, once.
                let plans = case.method.plan(subject.spec()).is_ok();
                if check.name != checks::plan::CHECK.name
                    && (case.is_refused() || !plans || case.is_refused_by_pass()?)
                {
                    return Ok(());
                }
                (check.run)(&case)
            });
            let Some(message) = message else { continue };
            let options = example.replace('\n', ", ");
            failures.push(Failure {
                method: format!("{} {{{options}}}", plugin.card.name),
                model: subject.name,
                check: check.name,
                message,
            });
        }
    }
    failures
}

/// Says why a check failed, if it did; a panic is a failure too.
pub(crate) fn tried(check: impl FnOnce() -> Result<(), Failed>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(check)) {
        Ok(Ok(())) => None,
        Ok(Err(Failed(message))) => Some(message),
        Err(panic) => Some(format!("it panics: {}", text_of(panic.as_ref()))),
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
