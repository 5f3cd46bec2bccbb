//! A deep perceptron of residual blocks, whose neighbouring blocks are alike as a transformer's are.

use std::sync::Arc;

use retune_core::Result;
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use serde_json::Value;
use tensor::{Tensor, activation};

use crate::mlp::Inputs;

/// Blocks `x + scale · down(relu(up(norm(x))))` between an embedding and a normalised head.
#[derive(Debug)]
pub(crate) struct Residual {
    spec: Arc<ModelSpec>,
    inputs: Inputs,
    /// What keeps the sum of all branches about as large as one.
    scale: f64,
}

impl Residual {
    /// Makes a model of `depth` blocks of one width.
    pub(crate) fn new(
        pixels: Arc<[f32]>,
        [inputs, width, classes]: [usize; 3],
        depth: usize,
    ) -> Self {
        let inputs = Inputs::new(pixels, inputs);
        let mut weights = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, kind, role, layer| {
            weights.push(WeightSpec { name, shape, kind, role, layer });
        };
        let matrix = Kind::Linear { transposed: false };
        let embed = vec![width, inputs.width()];
        add("embed.weight".to_owned(), embed, matrix, Role::Embedding, None);
        for block in 0..depth {
            let layer = Some(block);
            let name = |part: &str| format!("layers.{block}.{part}.weight");
            add(name("norm"), vec![width], Kind::Norm, Role::Norm, layer);
            add(name("up"), vec![width, width], matrix, Role::Up, layer);
            add(name("down"), vec![width, width], matrix, Role::Down, layer);
        }
        add("norm.weight".to_owned(), vec![width], Kind::Norm, Role::Norm, None);
        add("head.weight".to_owned(), vec![classes, width], matrix, Role::Head, None);
        let spec = ModelSpec {
            architecture: "residual".to_owned(),
            class: "Residual".to_owned(),
            num_layers: depth,
            width,
            inner_width: width,
            num_heads: 1,
            num_key_heads: 1,
            head_width: width,
            vocabulary: inputs.len(),
            max_positions: 2,
            causal: true,
            weights,
            head: Head::Classes { labels: (0..classes).map(|class| class.to_string()).collect() },
            config: Value::Null,
            towers: Vec::new(),
        };
        Self { spec: Arc::new(spec), inputs, scale: 1.0 / (depth as f64).sqrt() }
    }
}

impl Model for Residual {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let x = self.inputs.read(pass);
        pass.linear("embed", x)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let name = |part: &str| format!("layers.{index}.{part}");
        let h = pass.rms_norm(&name("norm"), x.clone(), 1e-6, 0.0)?;
        let h = activation::relu(pass.linear(&name("up"), h)?);
        Ok(x + pass.linear(&name("down"), h)?.mul_scalar(self.scale))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = pass.rms_norm("norm", x, 1e-6, 0.0)?;
        Ok(Output::Classes(pass.linear("head", x)?))
    }
}
