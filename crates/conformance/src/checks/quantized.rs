//! A base whose matrices stay in quantised blocks.

use super::{fast, merge, moves, start};
use crate::case::{Case, Failed};
use crate::subject::Subject;
use crate::suite::Check;

/// The method works over quantised blocks, or refuses them as it says.
pub const CHECK: Check = Check {
    name: "quantised base",
    about: "on matrices kept in Q8_0 blocks start, fast path, merge and gradients hold, or attaching is refused",
    run,
};

/// The model that is also tried in quantised blocks.
const MODEL: &str = "llama";

fn run(case: &Case<'_>) -> Result<(), Failed> {
    if case.subject.name != MODEL {
        return Ok(());
    }
    let subject = Subject::quantized()?;
    let case = Case::new(case.plugin, case.example, &subject)?;
    if !case.method.promises().quantized_base {
        return match case.attach() {
            Err(_) => Ok(()),
            Ok(_) => Err(Failed("it is attached, although the method says it refuses".to_owned())),
        };
    }
    for check in [start::CHECK, fast::CHECK, merge::CHECK, moves::CHECK] {
        (check.run)(&case).map_err(|Failed(why)| Failed(format!("{}: {why}", check.name)))?;
    }
    Ok(())
}
