//! The fast path of a change against its definition.

use std::sync::Arc;

use retune_core::change::{Mode, Scope, WeightChange};
use retune_core::kernels::linear;
use retune_core::parameters::to_vec;
use retune_core::random::Seed;
use retune_core::spec::WeightSpec;
use tensor::{Tensor, TensorData};

use crate::case::{Attached, Case, Failed, close};
use crate::suite::Check;

/// `linear` of a change gives what the materialised weight gives, values and gradients.
pub const CHECK: Check = Check {
    name: "fast path",
    about: "a change's fast product equals the product with the materialised weight",
    run,
};

const TOKENS: usize = 5;

fn run(case: &Case<'_>) -> Result<(), Failed> {
    let mut attached = case.attach()?;
    attached.stir();
    let names: Vec<String> = attached.changes.changed_weights().map(str::to_owned).collect();
    for name in names {
        // A bias that a method adds is no weight of the model.
        if !case.subject.spec().weight(&name).is_some_and(WeightSpec::is_linear) {
            continue;
        }
        for change in attached.changes.of_weight(&name) {
            compare(&attached, &name, change.as_ref())?;
        }
    }
    Ok(())
}

/// What one way of computing the product gives.
struct Found {
    output: Vec<f32>,
    input_gradient: Option<Vec<f32>>,
    gradients: Vec<(String, Vec<f32>)>,
}

fn compare(attached: &Attached, name: &str, change: &dyn WeightChange) -> Result<(), Failed> {
    let train = |seed| Mode::Train { seed: Seed(seed), pass: 1 };
    let Some(fast) = product(attached, name, change, Mode::Evaluate, true)? else { return Ok(()) };
    let Some(slow) = product(attached, name, change, Mode::Evaluate, false)? else { return Ok(()) };
    close(&format!("{name}: fast product"), &fast.output, &slow.output, 1e-5)?;
    let Some(fast) = product(attached, name, change, train(1), true)? else { return Ok(()) };
    let Some(other) = product(attached, name, change, train(2), true)? else { return Ok(()) };
    // Dropout is in the fast path only, so there is nothing to compare it with.
    if fast.output != other.output {
        return Ok(());
    }
    let Some(slow) = product(attached, name, change, train(1), false)? else { return Ok(()) };
    close(&format!("{name}: fast product while training"), &fast.output, &slow.output, 1e-5)?;
    if let (Some(fast), Some(slow)) = (&fast.input_gradient, &slow.input_gradient) {
        close(&format!("{name}: gradient of the input"), fast, slow, 1e-4)?;
    }
    if fast.gradients.len() != slow.gradients.len() {
        let names = |found: &Found| {
            found.gradients.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>().join(", ")
        };
        return Err(Failed(format!(
            "{name}: the fast path has gradients of [{}], the definition of [{}]",
            names(&fast),
            names(&slow)
        )));
    }
    for ((parameter, fast), (_, slow)) in fast.gradients.iter().zip(&slow.gradients) {
        close(&format!("{name}: gradient of {parameter}"), fast, slow, 1e-4)?;
    }
    Ok(())
}

/// Computes the product one way; nothing where the change has no fast path.
fn product(
    attached: &Attached,
    name: &str,
    change: &dyn WeightChange,
    mode: Mode,
    fast: bool,
) -> Result<Option<Found>, Failed> {
    let weights = &attached.weights;
    let [rows, columns] = weights.describe(name)?.matrix();
    let draw = |purpose: &str, shape: [usize; 2]| {
        let mut values = vec![0.0; shape[0] * shape[1]];
        Seed(13).stream(purpose, &[]).fill_normal(&mut values, 1.0);
        TensorData::new(values, shape)
    };
    let data = draw("input", [TOKENS, columns]);
    let trains = matches!(mode, Mode::Train { .. });
    let x: Tensor<2> = if trains {
        Tensor::from_data(data, &weights.device().clone().autodiff()).require_grad()
    } else {
        Tensor::from_data(data, weights.device())
    };
    let mut scope = Scope::new(&attached.parameters, mode);
    let y = if fast {
        let fast = if change.replaces_base() {
            change.linear_alone(&x, None, &mut scope)
        } else {
            let base = Arc::clone(&weights.matrix(name)?);
            change.linear(&x, &base, None, &mut scope)
        };
        match fast {
            Some(y) => y,
            None => return Ok(None),
        }
    } else {
        linear(x.clone(), change.materialize(weights.dense(name)?, &scope), None)
    };
    let output = to_vec(y.clone().inner());
    if !trains || !y.is_tracked() {
        return Ok(Some(Found { output, input_gradient: None, gradients: Vec::new() }));
    }
    let upstream = Tensor::from_data(draw("upstream", [TOKENS, rows]), weights.device());
    let mut gradients = (y * upstream).sum().backward();
    let input_gradient = x.grad_remove(&mut gradients).map(to_vec);
    let parameters = &attached.parameters;
    let gradients = parameters
        .iter()
        .filter(|(_, parameter)| parameter.trains)
        .filter_map(|(id, parameter)| {
            Some((parameter.name.clone(), parameters.take_gradient(id, &mut gradients)?))
        })
        .collect();
    Ok(Some(Found { output, input_gradient, gradients }))
}
