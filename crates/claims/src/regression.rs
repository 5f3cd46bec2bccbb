//! Networks that are taught numbers: the squared error, learned as a cross-entropy.

use std::sync::Arc;

use retune_core::Result;
use retune_core::batch::Document;
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::spec::{ModelSpec, Role};
use tensor::Tensor;

use crate::mlp::{Inputs, Mlp};

/// A perceptron without biases whose outputs are compared with a table.
///
/// The engine learns by cross-entropy. Of two classes whose logits differ by `log(eᵐ − 1)` that of
/// the first is `m`, and so is every gradient; here `m` is the mean squared error of a row.
#[derive(Debug)]
pub(crate) struct Regression {
    net: Mlp,
    spec: Arc<ModelSpec>,
    targets: Inputs,
}

/// Errors below this teach nothing: their logarithm has no more digits in `f32`.
const SMALLEST: f64 = 1e-6;

/// Makes `count` documents, each of one row of the inputs; the class whose loss is the error.
pub(crate) fn documents(count: usize) -> Vec<Document> {
    let document = |row: usize| Document {
        tokens: vec![row as u32],
        learn: vec![false],
        class: Some(0),
        row,
        ..Document::default()
    };
    (0..count).map(document).collect()
}

impl Regression {
    /// Makes the model; `widths` as for [`Mlp::new`], `targets` one row per input.
    pub(crate) fn new(inputs: Arc<[f32]>, targets: Arc<[f32]>, widths: &[usize]) -> Self {
        let net = Mlp::new(inputs, widths);
        let mut spec = ModelSpec::clone(net.spec());
        spec.weights.retain(retune_core::spec::WeightSpec::is_linear);
        for weight in &mut spec.weights {
            // No head that is new and trains by itself.
            weight.role = if weight.role == Role::Head { Role::Down } else { weight.role };
        }
        let width = widths.last().copied().unwrap_or(1);
        Self { net, spec: Arc::new(spec), targets: Inputs::new(targets, width) }
    }
}

impl Model for Regression {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        self.net.embed(pass)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        self.net.layer(pass, index, x)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let y = pass.linear("head", x)?;
        let errors = (y - self.targets.read(pass)).powi_scalar(2).mean_dim(1);
        let m = errors.clamp_min(SMALLEST);
        let logit = m.clone() + (m.neg().exp().neg() + 1.0).log();
        Ok(Output::Classes(Tensor::cat(vec![logit.zeros_like(), logit], 1)))
    }
}
