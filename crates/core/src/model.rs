//! What an architecture has to say.

use std::fmt::Debug;
use std::sync::Arc;

use crate::batch::Batch;
use crate::change::{Changes, Mode};
use crate::error::Result;
use crate::parameters::Parameters;
use crate::pass::{KeyValueCache, Pass};
use crate::site::Site;
use crate::spec::ModelSpec;
use crate::weights::Weights;
use tensor::Tensor;

/// What a model computes for a batch.
#[derive(Debug, Clone)]
pub enum Output {
    /// Hidden states for the language head, `[tokens, width]`.
    States(Tensor<2>),
    /// Class logits, `[documents, classes]`.
    Classes(Tensor<2>),
    /// Document vectors, `[documents, width]`.
    Embeddings(Tensor<2>),
}

/// An architecture, written once against [`Pass`].
///
/// It comes in three parts rather than one, so that a layer can be run again on its own: that is
/// how activations are recomputed instead of kept, and how layers are dropped or shared.
pub trait Model: Debug + Send + Sync {
    /// Describes the model.
    fn spec(&self) -> &Arc<ModelSpec>;

    /// Returns how many blocks a forward pass runs; more than the weights have where some are
    /// repeated.
    fn depth(&self) -> usize {
        self.spec().num_layers
    }

    /// Turns tokens into the states that enter the first block.
    ///
    /// # Errors
    /// If a weight cannot be read.
    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>>;

    /// Runs the block at one place, from 0 to below [`Model::depth`].
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`
    /// - returns: the same
    ///
    /// # Errors
    /// If a weight cannot be read.
    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>>;

    /// Turns the last block's states into what the head needs.
    ///
    /// # Errors
    /// If a weight cannot be read.
    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output>;

    /// Runs one block between its input and output sites.
    ///
    /// # Errors
    /// Those of [`Model::layer`].
    fn block(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let x = pass.at(Site::LayerInput(index), x);
        let x = self.layer(pass, index, x)?;
        Ok(pass.at(Site::LayerOutput(index), x))
    }

    /// Runs the whole model.
    ///
    /// # Errors
    /// If a weight cannot be read.
    fn forward(&self, pass: &mut Pass<'_>) -> Result<Output> {
        let x = self.embed(pass)?;
        let mut x = pass.at(Site::Embedding, x);
        for index in 0..self.depth() {
            x = self.block(pass, index, x)?;
        }
        self.finish(pass, x)
    }
}

/// The tuned model: frozen base, changes in force, and the numbers that train.
#[derive(Debug, Clone, Copy)]
pub struct Tuned<'a> {
    /// The architecture.
    pub model: &'a dyn Model,
    /// The frozen base.
    pub weights: &'a Weights,
    /// What the method attached.
    pub changes: &'a Changes,
    /// What trains.
    pub parameters: &'a Parameters,
}

impl Tuned<'_> {
    /// Runs the model over `batch` without learning, and lets `read` look at what came out.
    ///
    /// With a cache, the batch continues what the cache holds.
    ///
    /// # Errors
    /// If the batch does not fit, or a weight cannot be read; those of `read`.
    pub fn evaluate<T>(
        &self,
        batch: &Batch,
        cache: Option<&mut KeyValueCache>,
        read: impl FnOnce(&mut Pass<'_>, Output) -> Result<T>,
    ) -> Result<T> {
        let mut pass =
            Pass::new(self.weights, self.changes, self.parameters, batch, Mode::Evaluate)?;
        if let Some(cache) = cache {
            pass = pass.with_cache(cache);
        }
        let output = self.model.forward(&mut pass)?;
        read(&mut pass, output)
    }
}
