//! What a gradient reaches.

use retune_core::batch::Batch;
use retune_core::parameters::Parameters;
use retune_core::spec::ModelSpec;
use retune_core::step::StepParts;
use retune_train::backprop::{Backprop, global_norm};

use crate::case::{Attached, Case, Failed, NUM_STEPS, SEED};
use crate::suite::Check;

/// Gradients reach everything that is planned to train, and nothing else moves by them.
pub const CHECK: Check = Check {
    name: "moves",
    about: "in three steps a gradient reaches every tensor that trains, and no base weight moves",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let mut method = case.method.boxed_clone();
    let weights = case.subject.weights()?;
    let mut parameters = Parameters::new(weights.device());
    let changes = method.attach(&weights, &mut parameters, SEED)?;
    let mut attached = Attached { weights, changes, parameters };
    let base: Vec<Vec<f32>> = base_values(case, &attached)?;
    let mut reached = vec![false; attached.parameters.iter().count()];
    for step in 0..3 {
        let documents = case.subject.documents(&format!("step {step}"), &[6, 9]);
        let mut parts = StepParts::new(&attached.parameters);
        parts.spec = ModelSpec::clone(case.subject.spec());
        method.before_step(&mut parts.view(step + 1, NUM_STEPS, &mut attached.parameters))?;
        let tuned = attached.tuned(&*case.subject.model);
        let learner = Backprop { seed: SEED, recompute: false };
        let mut result = learner.step(&tuned, &[Batch::new(&documents)?], step)?;
        parts.gradients = std::mem::take(&mut result.gradients);
        method.on_gradients(&mut parts.view(step + 1, NUM_STEPS, &mut attached.parameters))?;
        result.gradients = parts.gradients;
        reached.resize(attached.parameters.iter().count(), false);
        let rate = (0.1 / global_norm(&result.gradients).max(1e-12)) as f32;
        let ids: Vec<_> = attached.parameters.iter().map(|(id, _)| id).collect();
        for (id, gradient) in ids.into_iter().zip(&mut result.gradients) {
            let parameter = attached.parameters.get(id);
            if let (Some(gradient), true) = (&*gradient, parameter.moved_by_method) {
                reached[id.index()] |= gradient.iter().any(|g| *g != 0.0);
                continue;
            }
            let Some(gradient) = gradient.take() else { continue };
            if gradient.len() != parameter.count() {
                return Err(Failed(format!(
                    "the gradient of `{}` has {} numbers, expected {}",
                    parameter.name,
                    gradient.len(),
                    parameter.count()
                )));
            }
            reached[id.index()] |= gradient.iter().any(|g| *g != 0.0);
            attached.parameters.update(id, |values| {
                values.iter_mut().zip(&gradient).for_each(|(value, g)| *value -= rate * g);
            });
        }
        parts.gradients = result.gradients;
        method.on_step(&mut parts.view(step + 1, NUM_STEPS, &mut attached.parameters))?;
    }
    if base_values(case, &attached)? != base {
        return Err(Failed("a weight of the frozen base has moved".to_owned()));
    }
    let trains = attached.parameters.iter().filter(|(_, parameter)| parameter.trains);
    let missed: Vec<&str> = trains
        .filter(|(id, _)| !reached[id.index()])
        .map(|(_, parameter)| parameter.name.as_str())
        .collect();
    match (missed.as_slice(), case.method.promises().reaches_all) {
        ([], true) | ([_, ..], false) => Ok(()),
        ([], false) => Err(Failed(
            "every tensor is reached, which the method does not promise: set `reaches_all`"
                .to_owned(),
        )),
        ([first, ..], true) => Err(Failed(format!(
            "no gradient reaches {} of the tensors that train, e.g. `{first}`",
            missed.len()
        ))),
    }
}

fn base_values(case: &Case<'_>, attached: &Attached) -> Result<Vec<Vec<f32>>, Failed> {
    let spec = case.subject.spec();
    Ok(spec.weights.iter().map(|w| attached.weights.values(&w.name)).collect::<Result<_, _>>()?)
}
