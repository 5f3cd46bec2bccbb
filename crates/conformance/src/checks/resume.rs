//! Cut and resumed.

use std::path::Path;

use retune_core::event::Silent;
use retune_train::checkpoint;

use crate::case::{Case, Failed, NUM_STEPS, Source, all_values, folder, same_bits};
use crate::suite::Check;

/// A run cut at any step and resumed ends as the uninterrupted one.
pub const CHECK: Check = Check {
    name: "resume",
    about: "a run that is cut and resumed ends with the bits of one that was not",
    run,
};

/// Steps done when the run is cut: odd and even, so that a rhythm of two is cut at both phases.
const CUTS: [u64; 2] = [3, 4];

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let weights = case.subject.weights()?;
    let whole = folder()?;
    let mut straight = case.training(&weights, whole.path(), 0)?;
    let steps = |fails_at| Source { subject: case.subject, fails_at };
    straight.walk(&mut steps(None), None, &mut Silent)?;
    let expected = all_values(&straight.parameters);
    if expected.iter().any(|value| !value.is_finite()) {
        return Err(Failed(format!("a value is not finite after {NUM_STEPS} steps")));
    }
    for cut in CUTS {
        let folder = folder()?;
        let mut first = case.training(&weights, folder.path(), cut)?;
        let stopped = first.walk(&mut steps(Some(cut)), None, &mut Silent);
        if !matches!(stopped, Err(retune_train::Error::Data(_))) {
            return Err(Failed(format!("the run did not reach step {cut}: {stopped:?}")));
        }
        drop(first);
        let mut second = case.training(&weights, folder.path(), 0)?;
        let (step, refused) = second.resume()?;
        if step != cut || !refused.is_empty() {
            return Err(Failed(format!("resumed at step {step}, expected {cut}; {refused:?}")));
        }
        second.walk(&mut steps(None), None, &mut Silent)?;
        let what = format!("values of a run cut after step {cut}");
        same_bits(&what, &all_values(&second.parameters), &expected)?;
        for name in ["parameters.safetensors", "optimizer.safetensors"] {
            let read = |root: &Path| std::fs::read(checkpoint::folder(root, NUM_STEPS).join(name));
            if read(whole.path())? != read(folder.path())? {
                return Err(Failed(format!("{name} of a run cut after step {cut} differs")));
            }
        }
    }
    Ok(())
}
