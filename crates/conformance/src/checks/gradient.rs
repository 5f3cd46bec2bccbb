//! Gradients against finite differences.

use retune_core::batch::Batch;
use retune_core::parameters::ParameterId;
use retune_train::backprop::{Backprop, StepResult, global_norm};

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

/// Points at which gradients are added up along a path that has a bend.
const PATH_POINTS: u32 = 32;

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
        let mut at = |reach: f64| -> Result<StepResult, Failed> {
            let factor = (reach / norm) as f32;
            let moved = values.iter().zip(gradient).map(|(v, g)| v + factor * g).collect();
            attached.parameters.set(id, moved)?;
            Ok(loss(&attached)?)
        };
        let mut slope = |reach: f64| -> Result<f64, Failed> {
            let mut between = |reach: f64| -> Result<f64, Failed> {
                Ok((at(reach)?.loss - at(-reach)?.loss) / (2.0 * reach))
            };
            // Two widths, extrapolated (Richardson): what the third derivative bends drops out.
            Ok((4.0 * between(0.5 * reach)? - between(reach)?) / 3.0)
        };
        let allowed = |reach: f64| TOLERANCE * norm + ROUNDING * found.loss.abs() / reach;
        // A ReLU that opens within reach bends the loss; nearer by it is left behind, as long as
        // rounding leaves something to compare.
        let nearer = [0.3, 0.1, 0.03].map(|share| share * widest).into_iter();
        let mut reaches = [widest].into_iter().chain(nearer.filter(|r| allowed(*r) < 0.2 * norm));
        let (mut found_slope, mut expected, mut limit) = (f64::NAN, norm, 0.0);
        let off = |found: f64, expected: f64, limit: f64| {
            (found - expected).abs() > limit || found.is_nan()
        };
        while off(found_slope, expected, limit) {
            let Some(reach) = reaches.next() else { break };
            (found_slope, limit) = (slope(reach)?, allowed(reach));
        }
        if off(found_slope, expected, limit) {
            // A bend too near to be left behind: then the loss must still change by what the
            // gradients on both sides of it add up to.
            let mut along = 0.0;
            for point in 0..PATH_POINTS {
                let share = (2.0 * f64::from(point) + 1.0) / f64::from(PATH_POINTS) - 1.0;
                let there = at(share * widest)?;
                let Some(slope) = &there.gradients[id.index()] else { break };
                let products = slope.iter().zip(gradient);
                along += products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / norm;
            }
            expected = along / f64::from(PATH_POINTS);
            found_slope = (at(widest)?.loss - at(-widest)?.loss) / (2.0 * widest);
            limit = allowed(widest);
        }
        attached.parameters.set(id, values)?;
        if off(found_slope, expected, limit) {
            return Err(Failed(format!(
                "along the gradient of `{}` the loss changes by {found_slope:.6} per unit, the \
                 gradients say {expected:.6} (allowed: {limit:.6} off)",
                attached.parameters.get(id).name
            )));
        }
    }
    Ok(())
}
