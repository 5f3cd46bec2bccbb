//! Models ready to use.

use std::sync::Arc;

use retune_core::spec::ModelSpec;
use retune_core::weights::{Packing, WeightSource, Weights};
use tensor::Device;

/// Joins weights with the model they are for, in `f32` on the CPU.
///
/// # Panics
/// If they do not fit the model.
#[expect(clippy::panic, reason = "weights that do not fit fail the test")]
pub fn weights(source: Arc<dyn WeightSource>, spec: &Arc<ModelSpec>) -> Weights {
    Weights::new(source, Arc::clone(spec), Packing::default(), &Device::flex())
        .unwrap_or_else(|error| panic!("{error}"))
}
