//! A perceptron of several layers as a model: the pictures are its frozen table of inputs.

use std::sync::Arc;

use retune_core::Result;
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use serde_json::Value;
use tensor::{Tensor, activation};

/// The table of inputs; it is no part of what the model has learned.
pub(crate) const INPUTS: &str = "inputs";

/// Linear layers with rectifiers between, and a head.
#[derive(Debug)]
pub(crate) struct Mlp {
    spec: Arc<ModelSpec>,
}

impl Mlp {
    /// Makes a model over `num_inputs` pictures; `widths` are those of the inputs, of each hidden
    /// layer and of the outputs.
    pub(crate) fn new(num_inputs: usize, widths: &[usize]) -> Self {
        let classes = widths.last().copied().unwrap_or(1);
        let mut weights = vec![WeightSpec {
            name: format!("{INPUTS}.weight"),
            shape: vec![num_inputs, widths[0]],
            kind: Kind::Embedding,
            role: Role::Embedding,
            layer: None,
        }];
        let num_layers = widths.len() - 2;
        for (index, pair) in widths.windows(2).enumerate() {
            let last = index == num_layers;
            let module = if last { "head".to_owned() } else { format!("layers.{index}") };
            let (role, layer) = if last { (Role::Head, None) } else { (Role::Up, Some(index)) };
            let mut add = |end: &str, shape: Vec<usize>, kind| {
                weights.push(WeightSpec {
                    name: format!("{module}.{end}"),
                    shape,
                    kind,
                    role,
                    layer,
                });
            };
            add("weight", vec![pair[1], pair[0]], Kind::Linear { transposed: false });
            add("bias", vec![pair[1]], Kind::Bias);
        }
        let spec = ModelSpec {
            architecture: "mlp".to_owned(),
            class: "Mlp".to_owned(),
            num_layers,
            width: widths[0],
            inner_width: widths[1],
            num_heads: 1,
            num_key_heads: 1,
            head_width: widths[0],
            vocabulary: num_inputs,
            max_positions: 2,
            causal: true,
            towers: Vec::new(),
            weights,
            head: Head::Classes { labels: (0..classes).map(|class| class.to_string()).collect() },
            config: Value::Null,
        };
        Self { spec: Arc::new(spec) }
    }
}

impl Model for Mlp {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let tokens = pass.batch().tokens.clone();
        pass.embed(INPUTS, &tokens)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        Ok(activation::relu(pass.linear(&format!("layers.{index}"), x)?))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        Ok(Output::Classes(pass.linear("head", x)?))
    }
}
