//! A perceptron of several layers as a model.

use std::sync::Arc;

use retune_core::Result;
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use serde_json::Value;
use tensor::{Tensor, TensorData, activation};

/// What a model reads: rows of numbers that are no weights, so that no method can change them.
#[derive(Debug, Clone)]
pub(crate) struct Inputs {
    values: Arc<[f32]>,
    width: usize,
}

impl Inputs {
    /// Cuts `values` into rows of `width` numbers.
    pub(crate) fn new(values: Arc<[f32]>, width: usize) -> Self {
        Self { values, width }
    }

    /// Returns how many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Returns how many numbers a row has.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Gives the rows whose numbers are the batch's tokens, `[tokens, width]`.
    pub(crate) fn read(&self, pass: &Pass<'_>) -> Tensor<2> {
        let tokens = &pass.batch().tokens;
        let row = |token: &u32| &self.values[*token as usize * self.width..][..self.width];
        let rows: Vec<f32> = tokens.iter().flat_map(|token| row(token).iter().copied()).collect();
        let data = TensorData::new(rows, [tokens.len(), self.width]);
        Tensor::from_data(data, pass.weights().device())
    }
}

/// Linear layers with rectifiers between, and a head.
#[derive(Debug)]
pub(crate) struct Mlp {
    spec: Arc<ModelSpec>,
    inputs: Inputs,
}

/// A scale and a shift of the inputs, 1 and 0 in a model that was just made.
const INPUT: &str = "input";

impl Mlp {
    /// Makes a model; `widths` are those of the inputs, of each hidden layer and of the outputs.
    pub(crate) fn new(inputs: Arc<[f32]>, widths: &[usize]) -> Self {
        let inputs = Inputs::new(inputs, widths[0]);
        let classes = widths.last().copied().unwrap_or(1);
        let mut weights = Vec::new();
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
            vocabulary: inputs.len(),
            max_positions: 2,
            causal: true,
            weights,
            head: Head::Classes { labels: (0..classes).map(|class| class.to_string()).collect() },
            config: Value::Null,
        };
        Self { spec: Arc::new(spec), inputs }
    }

    /// Puts a scale and a shift of each input before the first layer, for methods that work on them.
    pub(crate) fn with_scaled_input(mut self) -> Self {
        let spec = Arc::make_mut(&mut self.spec);
        for (place, (end, kind)) in
            [("weight", Kind::Norm), ("bias", Kind::Bias)].into_iter().enumerate()
        {
            let weight = WeightSpec {
                name: format!("{INPUT}.{end}"),
                shape: vec![spec.width],
                kind,
                role: Role::Norm,
                layer: None,
            };
            spec.weights.insert(place, weight);
        }
        self
    }
}

impl Model for Mlp {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let x = self.inputs.read(pass);
        if self.spec.weight(&format!("{INPUT}.weight")).is_none() {
            return Ok(x);
        }
        let scale = pass.vector(&format!("{INPUT}.weight"))?;
        let shift = pass.vector(&format!("{INPUT}.bias"))?;
        Ok(x * scale.unsqueeze() + shift.unsqueeze())
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        Ok(activation::relu(pass.linear(&format!("layers.{index}"), x)?))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        Ok(Output::Classes(pass.linear("head", x)?))
    }
}
