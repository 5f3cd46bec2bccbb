//! Before the first step.

use crate::case::{Case, Failed, close};
use crate::suite::Check;

/// The tuned model equals its base where the method promises so, and only there.
pub const CHECK: Check = Check {
    name: "start",
    about: "before the first step the output is the base's, where the method promises so",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let batch = case.subject.batch("start")?;
    let attached = case.attach()?;
    let base = case.base_outputs(&attached.weights, &batch)?;
    let tuned = case.outputs(&attached, &batch)?;
    let same = close("the output before the first step", &tuned, &base, 1e-5);
    if case.method.promises().starts_at_base {
        return same;
    }
    if tuned.iter().any(|value| !value.is_finite()) {
        return Err(Failed("the output before the first step is not finite".to_owned()));
    }
    match same {
        Err(_) => Ok(()),
        Ok(()) => Err(Failed(
            "the output before the first step is the base's, which the method does not promise: \
             set `starts_at_base`"
                .to_owned(),
        )),
    }
}
