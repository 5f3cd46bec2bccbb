//! One batch of four documents against four batches of one.

use retune_core::batch::Batch;
use retune_core::spec::Head;
use retune_train::backprop::{Backprop, FlatGradients};

use crate::case::{Case, Failed, SEED, close};
use crate::suite::Check;

/// Accumulating over micro-batches gives the gradient of the undivided batch.
pub const CHECK: Check = Check {
    name: "accumulation",
    about: "four micro-batches of one document give the gradient of one batch of four",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    // A pair is told from the others of its batch: another batch is another loss.
    if case.subject.spec().head == Head::Pairs {
        return Ok(());
    }
    let mut attached = case.attach()?;
    attached.stir();
    let tuned = attached.tuned(&*case.subject.model);
    let documents = case.subject.documents("accumulation", &[4, 9, 6, 12]);
    let whole = [Batch::new(&documents)?];
    let learner = |seed| Backprop { seed, recompute: false };
    let expected = learner(SEED).step(&tuned, &whole, 0)?;
    // Dropout draws per pass: there is nothing to compare.
    let other = learner(retune_core::random::Seed(8)).step(&tuned, &whole, 0)?;
    if other.loss.to_bits() != expected.loss.to_bits() {
        return Ok(());
    }
    let parts = documents.iter().map(|d| Batch::new(std::slice::from_ref(d)));
    let found = learner(SEED).step(&tuned, &parts.collect::<Result<Vec<_>, _>>()?, 0)?;
    close("loss", &[found.loss as f32], &[expected.loss as f32], 1e-5)?;
    let flat = |gradients: &FlatGradients| -> Vec<f32> {
        gradients.iter().flatten().flatten().copied().collect()
    };
    close("gradient", &flat(&found.gradients), &flat(&expected.gradients), 1e-5)?;
    let again = Backprop { seed: SEED, recompute: true }.step(&tuned, &whole, 0);
    if let Some(site) = tuned.changes.across_layers() {
        return match again {
            Err(_) => Ok(()),
            Ok(_) => Err(Failed(format!("layers run again one by one although {site} reads far"))),
        };
    }
    let again = again?;
    close(
        "gradient of recomputed layers",
        &flat(&again.gradients),
        &flat(&expected.gradients),
        1e-5,
    )
}
