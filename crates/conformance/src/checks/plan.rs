//! What is attached is what was planned.

use retune_core::method::POOL;

use crate::case::{Case, Failed};
use crate::suite::Check;

/// The plan names every tensor in order; a refused model is refused by the plan.
pub const CHECK: Check = Check {
    name: "plan",
    about: "names, shapes and counts of the plan are those of what is attached",
    run,
};

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let spec = case.subject.spec();
    let planned = case.method.plan(spec);
    if case.is_refused() {
        return match planned {
            Err(_) => Ok(()),
            Ok(_) => Err(Failed("the card says it is refused, but the plan accepts it".to_owned())),
        };
    }
    let planned = planned?;
    let attached = case.attach()?;
    let made: Vec<_> = attached.parameters.iter().map(|(_, p)| p).collect();
    let pooled = planned.is_pooled();
    let listed: Vec<_> = planned.parameters.iter().filter(|p| p.place != POOL).collect();
    for (place, (plan, made)) in listed.iter().zip(&made).enumerate() {
        let shape = if pooled && plan.shape == [0] { &made.shape } else { &plan.shape };
        if (&plan.name, shape, plan.trains) != (&made.name, &made.shape, made.trains) {
            return Err(Failed(format!(
                "tensor {place} is planned as `{}` {:?} (trains: {}), made as `{}` {:?} (trains: \
                 {})",
                plan.name, plan.shape, plan.trains, made.name, made.shape, made.trains
            )));
        }
    }
    if attached.parameters.num_trainable() > planned.num_trainable() {
        return Err(Failed(format!(
            "{} values are planned, {} train",
            planned.num_trainable(),
            attached.parameters.num_trainable()
        )));
    }
    if listed.len() != made.len() {
        return Err(Failed(format!("{} tensors are planned, {} made", listed.len(), made.len())));
    }
    if planned.num_trainable() == 0 {
        return Err(Failed("nothing trains".to_owned()));
    }
    let (promised, found) = (case.method.promises().num_tasks, attached.changes.num_tasks());
    if promised != found {
        return Err(Failed(format!("{promised:?} tasks are promised, {found:?} are told apart")));
    }
    for name in attached.changes.changed_weights() {
        // A layer may be given the bias it has not.
        let beside = name.strip_suffix(".bias").map(|module| format!("{module}.weight"));
        let known = spec.weight(name).or(beside.and_then(|weight| spec.weight(&weight)));
        if known.is_none() {
            return Err(Failed(format!("a change is attached to `{name}`, which is no weight")));
        }
    }
    for site in attached.changes.changed_sites() {
        if site.layer().is_some_and(|layer| layer >= spec.num_layers) {
            return Err(Failed(format!("a change is attached to {site}, beyond the last layer")));
        }
    }
    Ok(())
}
