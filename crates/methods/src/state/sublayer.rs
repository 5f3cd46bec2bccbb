//! Modules that hang on sub-layers: bottlenecks before or beside them, keys and values inside
//! attention.

use std::sync::Arc;

use retune_core::change::{AttentionChange, Scope, SiteView, StateChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{AttentionOptions, layer_norm, linear_frozen};
use retune_core::parameters::ParameterId;
use retune_core::spec::{ModelSpec, Role};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::choice;
use tensor::{Tensor, activation};

use super::attend::beside;
use super::block::Bottleneck;

choice! {
    /// Where a module's input comes from.
    pub enum Insertion {
        /// From what the sub-layer reads: the module works beside it.
        Parallel = "parallel",
        /// From what the sub-layer puts out: the module works behind it.
        Sequential = "sequential",
    }
}

/// A bottleneck whose result is added to a state.
#[derive(Debug)]
pub struct Adapter {
    /// What computes it.
    pub block: Bottleneck,
    /// Where its input comes from.
    pub insertion: Insertion,
    /// Factor on its result.
    pub scale: f64,
    /// Whether a sequential module is added to its input; a parallel one adds its input too.
    pub residual: bool,
    /// A norm of the model that a sequential module reads through.
    pub through: Option<Through>,
}

/// A frozen norm behind a sub-layer, of the sum with the residual.
#[derive(Debug)]
pub struct Through {
    gain: Tensor<1>,
    bias: Option<Tensor<1>>,
    epsilon: f64,
}

impl Through {
    /// Finds the norm of a layer by its name, with `{layer}` for the number; none by no name.
    ///
    /// # Errors
    /// If the model has no such norm, naming the nearest weights.
    pub fn named(name: &str, layer: usize, weights: &Weights) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let module = name.replace("{layer}", &layer.to_string());
        let spec = weights.spec();
        let bias = format!("{module}.bias");
        let bias = spec.weight(&bias).is_some().then(|| weights.vector(&bias)).transpose()?;
        let epsilon = spec.config.get("layer_norm_eps").and_then(serde_json::Value::as_f64);
        let gain = weights.vector(&format!("{module}.weight"))?;
        Ok(Some(Self { gain, bias, epsilon: epsilon.unwrap_or(1e-12) }))
    }

    fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        layer_norm(x, self.gain.clone(), self.bias.clone(), self.epsilon)
    }
}

impl StateChange for Adapter {
    fn parameters(&self) -> Vec<ParameterId> {
        self.block.parameters()
    }

    fn reads_documents(&self) -> bool {
        self.block.reads_documents()
    }

    fn apply(&self, y: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let read = read_of(self.insertion, self.through.as_ref(), &y, at);
        let added = self.block.apply(read.clone(), at, scope).mul_scalar(self.scale);
        match (self.insertion, self.residual) {
            (Insertion::Sequential, true) | (Insertion::Parallel, false) => y + added,
            (Insertion::Sequential, false) => added,
            (Insertion::Parallel, true) => y + read + added,
        }
    }
}

/// Returns what a module reads at a sub-layer's result `y`.
pub fn read_of(
    insertion: Insertion,
    through: Option<&Through>,
    y: &Tensor<2>,
    at: &SiteView<'_>,
) -> Tensor<2> {
    match (insertion, at.input, through) {
        (Insertion::Parallel, Some(input), _) => input.clone(),
        (Insertion::Sequential, Some(residual), Some(norm)) => {
            norm.apply(y.clone() + residual.clone())
        }
        _ => y.clone(),
    }
}

/// Keys and values of one block that train themselves.
#[derive(Debug)]
pub struct Extra {
    /// Keys, `[tokens, width]`.
    pub keys: ParameterId,
    /// Values, the same.
    pub values: ParameterId,
    /// How many there are.
    pub tokens: usize,
    /// Width of all heads of keys.
    pub width: usize,
    /// Whether they share the soft-max of the text; else they have one of their own, times this.
    pub beside: Option<f64>,
}

impl Extra {
    fn rows(&self, scope: &Scope<'_>) -> [Tensor<2>; 2] {
        [self.keys, self.values].map(|id| scope.tensor(id, [self.tokens, self.width]))
    }
}

impl AttentionChange for Extra {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.keys, self.values]
    }

    fn num_prefix(&self) -> usize {
        if self.beside.is_none() { self.tokens } else { 0 }
    }

    fn prefix(&self, scope: &mut Scope<'_>) -> Option<[Tensor<2>; 2]> {
        self.beside.is_none().then(|| self.rows(scope))
    }

    fn heads(
        &self,
        heads: Tensor<2>,
        queries: &Tensor<2>,
        options: &AttentionOptions,
        scope: &mut Scope<'_>,
    ) -> Tensor<2> {
        let Some(scale) = self.beside else { return heads };
        let [keys, values] = self.rows(scope);
        heads + beside(queries, keys, values, options).mul_scalar(scale)
    }
}

/// The frozen projection to queries, for modules that ask as the heads do.
#[derive(Debug)]
pub struct Queries {
    weight: Arc<PackedMatrix>,
    bias: Option<Tensor<1>>,
    width: usize,
}

impl Queries {
    /// Finds a block's projection.
    ///
    /// # Errors
    /// If the block has none, or it cannot be read.
    pub fn of(spec: &ModelSpec, layer: usize, weights: &Weights) -> Result<Self> {
        let asks = |role| matches!(role, Role::Query | Role::QueryKeyValue);
        let mut own = spec.weights.iter().filter(|w| w.layer == Some(layer) && w.is_linear());
        let weight = own.find(|w| asks(w.role)).ok_or_else(|| Error::Unsupported {
            what: format!("a module that asks as the heads of layer {layer} do"),
            help: "use a model with attention in every layer".to_owned(),
        })?;
        let bias = spec.weight(&format!("{}.bias", weight.module()));
        Ok(Self {
            weight: weights.matrix(&weight.name)?,
            bias: bias.map(|bias| weights.vector(&bias.name)).transpose()?,
            width: spec.num_heads * spec.head_width,
        })
    }

    /// Computes queries, not rotated, `[tokens, heads · head width]`.
    pub fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        // Queries come first where all three share a projection.
        linear_frozen(x, &self.weight, self.bias.clone()).narrow(1, 0, self.width)
    }
}

/// He and others' multi-head parallel adapter: `relu(q Kᵀ) V` in each head.
#[derive(Debug)]
pub struct HeadAdapter {
    /// The projection to queries.
    pub queries: Queries,
    /// Gain and bias of the norm before it.
    pub norm: [ParameterId; 2],
    /// `K`, `[size, heads · head width]`.
    pub down: ParameterId,
    /// `V`, the same.
    pub up: ParameterId,
    /// Rows of `K`.
    pub size: usize,
    /// Width of the model's states.
    pub inputs: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of one.
    pub head_width: usize,
    /// Factor on the result.
    pub scale: f64,
}

impl StateChange for HeadAdapter {
    fn parameters(&self) -> Vec<ParameterId> {
        self.norm.into_iter().chain([self.down, self.up]).collect()
    }

    fn apply(&self, heads: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let Some(input) = at.input else { return heads };
        let [gain, bias] = self.norm.map(|id| scope.tensor(id, [self.inputs]));
        let x = layer_norm(input.clone(), gain, Some(bias), 1e-5);
        let tokens = x.dims()[0];
        let side = self.heads * self.head_width;
        let by_head = |x: Tensor<2>, rows: usize| -> Tensor<3> {
            x.reshape([rows, self.heads, self.head_width]).swap_dims(0, 1)
        };
        let queries = by_head(self.queries.apply(x), tokens);
        let [down, up] =
            [self.down, self.up].map(|id| by_head(scope.tensor(id, [self.size, side]), self.size));
        let weights = activation::relu(queries.matmul(down.swap_dims(1, 2)));
        let added = weights.matmul(up).swap_dims(0, 1).reshape([tokens, side]);
        heads + added.mul_scalar(self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::kernels::{Spans, attention};
    use retune_core::parameters::to_vec;
    use retune_core::random::Seed;
    use tensor::{Device, TensorData};

    fn draw(name: &str, shape: [usize; 2]) -> Tensor<2> {
        let mut values = vec![0.0; shape[0] * shape[1]];
        Seed(4).stream(name, &[]).fill_normal(&mut values, 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    /// He and others, equation 7: a prefix is a gated module beside attention.
    #[test]
    fn a_prefix_is_a_gated_module() {
        let (tokens, prefix, width) = (5, 3, 4);
        let options = AttentionOptions::causal(1, 1, width);
        let [q, k, v] = ["q", "k", "v"].map(|name| draw(name, [tokens, width]));
        let [pk, pv] = ["pk", "pv"].map(|name| draw(name, [prefix, width]));
        let text = Spans::from_lengths([tokens]);
        let longer = Spans::from_lengths([prefix + tokens]);
        let behind = |a: &Tensor<2>, b: &Tensor<2>| Tensor::cat(vec![a.clone(), b.clone()], 0);
        let seen = AttentionOptions { prefix, ..options.clone() };
        let whole = attention(q.clone(), behind(&pk, &k), behind(&pv, &v), &text, &longer, &seen);

        let alone = attention(q.clone(), k.clone(), v, &text, &text, &options);
        let own = beside(&q, pk.clone(), pv, &options);
        let scores = |keys: Tensor<2>| to_vec(q.clone().matmul(keys.transpose()) * options.scale);
        let (of_prefix, of_text) = (scores(pk), scores(k));
        let sum = |row: &[f32]| row.iter().map(|score| f64::from(*score).exp()).sum::<f64>();
        let gates: Vec<f64> = (0..tokens)
            .map(|t| {
                let prefix = sum(&of_prefix[t * prefix..(t + 1) * prefix]);
                prefix / (prefix + sum(&of_text[t * tokens..=t * tokens + t]))
            })
            .collect();
        let (alone, own) = (to_vec(alone), to_vec(own));
        for (place, found) in to_vec(whole).into_iter().enumerate() {
            let gate = gates[place / width];
            let expected = (1.0 - gate) * f64::from(alone[place]) + gate * f64::from(own[place]);
            assert!((f64::from(found) - expected).abs() < 1e-6, "{place}: {found} {expected}");
        }
    }
}
