//! Runs a model over a batch without any method.

use std::sync::Arc;

use retune_core::Result;
use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::model::{Model, Output, Tuned};
use retune_core::parameters::{Parameters, to_vec};
use retune_core::weights::{Packing, WeightSource, Weights};
use tensor::Device;

/// Returns the logits of every token, of every document, document vectors, or the similarities of
/// every image with every text, row by row.
///
/// # Errors
/// If the weights do not fit the model or the batch does not.
pub fn outputs(
    model: &dyn Model,
    source: &Arc<dyn WeightSource>,
    batch: &Batch,
    packing: Packing,
) -> Result<Vec<f32>> {
    let device = Device::flex();
    let weights = Weights::new(Arc::clone(source), Arc::clone(model.spec()), packing, &device)?;
    let (changes, parameters) = (Changes::default(), Parameters::new(&device));
    let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
    tuned.evaluate(batch, None, |pass, output| {
        Ok(match output {
            Output::States(states) => {
                let rows: Vec<usize> = (0..states.dims()[0]).collect();
                to_vec(pass.logits(&states, &rows)?.inner())
            }
            other => to_vec(other.rows().inner()),
        })
    })
}
