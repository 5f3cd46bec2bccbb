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
use tensor::{Int, Tensor, TensorData, activation};

/// What a model computes for a batch.
#[derive(Debug, Clone)]
pub enum Output {
    /// Hidden states for the language head, `[tokens, width]`.
    States(Tensor<2>),
    /// Class logits, `[documents, classes]`.
    Classes(Tensor<2>),
    /// Document vectors, `[documents, width]`.
    Embeddings(Tensor<2>),
    /// Vectors of the batch's images and of its texts.
    Pairs(Box<Pairs>),
}

impl Output {
    /// Returns the numbers whatever they stand for; for pairs, the similarity of each image with
    /// each text.
    ///
    /// # Shapes
    /// - returns: `[rows, columns]`
    pub fn rows(self) -> Tensor<2> {
        match self {
            Self::States(rows) | Self::Classes(rows) | Self::Embeddings(rows) => rows,
            Self::Pairs(pairs) => pairs.similarities(),
        }
    }
}

/// Vectors of images and of texts in one space.
#[derive(Debug, Clone)]
pub struct Pairs {
    /// One row of length 1 per image, `[images, width]`.
    pub images: Tensor<2>,
    /// One row of length 1 per text, `[texts, width]`.
    pub texts: Tensor<2>,
    /// The factor on their products, `[1, 1]`.
    pub scale: Tensor<2>,
}

impl Pairs {
    /// Computes the scaled similarity of every image with every text.
    ///
    /// # Shapes
    /// - returns: `[images, texts]`
    pub fn similarities(&self) -> Tensor<2> {
        self.images.clone().matmul(self.texts.clone().transpose()) * self.scale.clone()
    }

    /// Lays the vectors of paired images and texts beside each other, the factor on the images'.
    ///
    /// # Shapes
    /// - returns: `[documents, 2 · width]`
    ///
    /// # Panics
    /// If there are not as many texts as images.
    pub fn documents(&self) -> Tensor<2> {
        let images = self.images.clone() * self.scale.clone();
        Tensor::cat(vec![images, self.texts.clone()], 1)
    }

    /// Computes the cross-entropy of each image with its text among the texts of `batch`, 0 where
    /// it has none; where every document is a pair, the mean of that and of its text with the
    /// image (Radford et al., 2021, arXiv 2103.00020).
    ///
    /// # Shapes
    /// - returns: `[images]`
    pub fn losses(&self, batch: &Batch) -> Tensor<1> {
        let similarities = self.similarities();
        let matches = batch.matches();
        let of_images = cross_entropy(similarities.clone(), &matches);
        if !batch.is_paired() {
            return of_images;
        }
        (of_images + cross_entropy(similarities.transpose(), &matches)).mul_scalar(0.5)
    }
}

/// Computes the cross-entropy of each row with its class, 0 where it has none.
///
/// # Shapes
/// - `logits`: `[rows, classes]`
/// - returns: `[rows]`
pub fn cross_entropy(logits: Tensor<2>, classes: &[Option<usize>]) -> Tensor<1> {
    let device = logits.clone().inner().device();
    let count = classes.len();
    let index: Vec<i32> = classes.iter().map(|c| c.unwrap_or(0) as i32).collect();
    let counts: Vec<f32> = classes.iter().map(|c| f32::from(u8::from(c.is_some()))).collect();
    let index = Tensor::<2, Int>::from_data(TensorData::new(index, [count, 1]), &device);
    let counts = Tensor::<1>::from_data(TensorData::new(counts, [count]), &device);
    let picked = activation::log_softmax(logits, 1).gather(1, index).reshape([count]);
    picked.neg() * counts
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
    pub fn evaluate<T: Send>(
        &self,
        batch: &Batch,
        cache: Option<&mut KeyValueCache>,
        read: impl FnOnce(&mut Pass<'_>, Output) -> Result<T> + Send,
    ) -> Result<T> {
        retune_kernels::in_pool(|| {
            let mut pass =
                Pass::new(self.weights, self.changes, self.parameters, batch, Mode::Evaluate)?;
            if let Some(cache) = cache {
                pass = pass.with_cache(cache);
            }
            let output = self.model.forward(&mut pass)?;
            read(&mut pass, output)
        })
    }
}
