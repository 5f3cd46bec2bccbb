//! Changes merged into the weights.

use std::sync::Arc;

use retune_core::change::{Mode, Scope};
use retune_core::parameters::to_vec;
use retune_core::spec::Kind;
use retune_core::weights::{Weights, transpose};
use retune_testkit::tiny::MemorySource;

use crate::case::{Attached, Case, Failed, close, same_bits};
use crate::suite::Check;

/// The model with merged weights is the tuned model, and the base is as it was.
pub const CHECK: Check = Check {
    name: "merge",
    about: "merged weights give the tuned model's output; without its changes the base is as before",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let batch = case.subject.batch("merge")?;
    let mut attached = case.attach()?;
    let before = case.base_outputs(&attached.weights, &batch)?;
    attached.stir();
    let tuned = case.outputs(&attached, &batch)?;
    // Entries may come in only while a run is under way.
    if tuned == before && attached.parameters.num_trainable() > 0 {
        return Err(Failed("moving everything that trains does not change the output".to_owned()));
    }
    let spec = case.subject.spec();
    let mergeable = attached.changes.unmergeable().is_none()
        && attached.changes.changed_weights().all(|name| spec.weight(name).is_some());
    if mergeable {
        let merged = merged(case, &attached)?;
        close("merged output", &case.base_outputs(&merged, &batch)?, &tuned, 1e-4)?;
    }
    let after = case.base_outputs(&attached.weights, &batch)?;
    same_bits("the base's output once its changes are taken off", &after, &before)
}

/// Returns a base that holds the changed weights.
fn merged(case: &Case<'_>, attached: &Attached) -> Result<Weights, Failed> {
    let scope = Scope::new(&attached.parameters, Mode::Evaluate);
    let mut source = MemorySource::default();
    let spec = case.subject.spec();
    for weight in &spec.weights {
        let name = &weight.name;
        let mut values = if attached.changes.of_weight(name).is_empty() {
            attached.weights.values(name)?
        } else {
            to_vec(attached.changes.materialize(name, &attached.weights, &scope)?.inner())
        };
        let mut shape = weight.shape.clone();
        if weight.kind == (Kind::Linear { transposed: true }) {
            let [rows, columns] = weight.matrix();
            values = transpose(&values, rows, columns);
            shape.reverse();
        }
        source.insert(name, &shape, values);
    }
    let packing = retune_core::weights::Packing::default();
    Ok(Weights::new(Arc::new(source), Arc::clone(spec), packing, attached.weights.device())?)
}
