//! Gradients against finite differences.

use retune_core::batch::Batch;
use retune_core::parameters::ParameterId;
use retune_train::backprop::{Backprop, global_norm};

use crate::case::{Attached, Case, Failed, SEED};
use crate::suite::Check;

/// The gradient of each tensor is the slope of the loss along it.
pub const CHECK: Check = Check {
    name: "gradient",
    about: "along its gradient each tensor changes the loss as fast as the gradient says",
    run,
};

/// How far the slope may be off, as a fraction; the curvature of a tiny model bends it a little.
const TOLERANCE: f64 = 0.03;

/// Tensors of one model that are tried.
const MOST_TENSORS: usize = 6;

/// What rounding leaves of a loss.
const ROUNDING: f64 = 5e-6;

fn run(case: &Case<'_>) -> Result<(), Failed> {
    if !case.method.promises().exact_gradients {
        return Ok(());
    }
    let mut attached = case.attach()?;
    attached.stir();
    let batches = [Batch::new(&case.subject.documents("gradient", &[8, 12]))?];
    // The same step's number draws the same dropout, so the loss is one function throughout.
    let loss = |attached: &Attached| {
        let tuned = attached.tuned(&*case.subject.model);
        Backprop { seed: SEED, recompute: false }.step(&tuned, &batches, 0)
    };
    let found = loss(&attached)?;
    let whole = global_norm(&found.gradients);
    let ids: Vec<ParameterId> = attached.parameters.iter().map(|(id, _)| id).collect();
    // Some tensors of each model, other ones on each; an odd stride meets both halves of a pair.
    let stride = found.gradients.iter().flatten().count().div_ceil(MOST_TENSORS) | 1;
    let first = case.subject.name.len() % stride;
    let reached =
        ids.into_iter().zip(&found.gradients).filter_map(|(id, g)| Some((id, g.as_ref()?)));
    for (id, gradient) in reached.skip(first).step_by(stride) {
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        // Some slopes are zero by nature, e.g. of a key's bias before the soft-max.
        if norm < 1e-3 * whole {
            continue;
        }
        let widest = (0.02 / norm).min(0.02 * (gradient.len() as f64).sqrt());
        let values = attached.parameters.values(id);
        let mut slope = |reach: f64| -> Result<f64, Failed> {
            let mut at = |sign: f64| -> Result<f64, Failed> {
                let factor = (sign * reach / norm) as f32;
                let moved = values.iter().zip(gradient).map(|(v, g)| v + factor * g).collect();
                attached.parameters.set(id, moved)?;
                Ok(loss(&attached)?.loss)
            };
            // Two widths, extrapolated (Richardson): what the third derivative bends drops out.
            let wide = (at(1.0)? - at(-1.0)?) / (2.0 * reach);
            let narrow = (at(0.5)? - at(-0.5)?) / reach;
            Ok((4.0 * narrow - wide) / 3.0)
        };
        let allowed = |reach: f64| TOLERANCE * norm + ROUNDING * found.loss.abs() / reach;
        // A ReLU that opens within reach bends the loss; nearer by it is left behind, as long as
        // rounding leaves something to compare.
        let nearer = [0.3, 0.1, 0.03].map(|share| share * widest).into_iter();
        let mut reaches = [widest].into_iter().chain(nearer.filter(|r| allowed(*r) < 0.3 * norm));
        let (mut found_slope, mut limit) = (f64::NAN, 0.0);
        while (found_slope - norm).abs() > limit || found_slope.is_nan() {
            let Some(reach) = reaches.next() else { break };
            (found_slope, limit) = (slope(reach)?, allowed(reach));
        }
        attached.parameters.set(id, values)?;
        if (found_slope - norm).abs() > limit || found_slope.is_nan() {
            return Err(Failed(format!(
                "along the gradient of `{}` the loss changes by {found_slope:.6} per unit, its \
                 length says {norm:.6} (allowed: {limit:.6} off)",
                attached.parameters.get(id).name
            )));
        }
    }
    Ok(())
}
