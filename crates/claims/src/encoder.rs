//! A small transformer that sees whole documents: of words, or of rows of numbers.

use std::sync::Arc;

use retune_core::Result;
use retune_core::kernels::{Activation, AttentionOptions, gated};
use retune_core::model::{Model, Output};
use retune_core::pass::{Pass, Rope};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use serde_json::Value;
use tensor::Tensor;

use crate::mlp::Inputs;

const EPSILON: f64 = 1e-6;

/// Sizes of an [`Encoder`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Width of the residual stream.
    pub(crate) width: usize,
    /// Number of blocks.
    pub(crate) num_layers: usize,
    /// Number of heads.
    pub(crate) num_heads: usize,
    /// Width inside the feed-forward network.
    pub(crate) inner_width: usize,
    /// Whether every linear layer has a bias, and norms are LayerNorms with theirs.
    pub(crate) biases: bool,
    /// Whether positions are rotary, so that only distances count, and not learned ones.
    pub(crate) rotary: bool,
}

impl Sizes {
    /// Gives a feed-forward network twice as wide as the model, and heads of 8 or 16.
    pub(crate) fn of(width: usize, num_layers: usize) -> Self {
        Self {
            width,
            num_layers,
            num_heads: 4,
            inner_width: 2 * width,
            biases: false,
            rotary: false,
        }
    }

    /// Gives biases to all linear layers and norms, as encoders usually have them.
    pub(crate) fn with_biases(self) -> Self {
        Self { biases: true, ..self }
    }

    /// Turns queries and keys by their positions in place of learning positions.
    pub(crate) fn with_rotary(self) -> Self {
        Self { rotary: true, ..self }
    }
}

/// Pre-norm blocks as in Llama (SwiGLU, norms without biases; or LayerNorms and biases everywhere),
/// learned or rotary positions, every token sees every other.
///
/// Its head reads the mean over a document's tokens, and documents are all as long as the first;
/// or it predicts words, each at its own place.
#[derive(Debug)]
pub(crate) struct Encoder {
    spec: Arc<ModelSpec>,
    /// Rows of numbers that stand where a model of words has its vocabulary.
    inputs: Option<Inputs>,
    attention: AttentionOptions,
    biases: bool,
    rope: Option<Rope>,
}

impl Encoder {
    /// Makes a model of documents up to `length` tokens; without classes it predicts words.
    pub(crate) fn new(
        vocabulary: usize,
        length: usize,
        sizes: Sizes,
        classes: Option<usize>,
    ) -> Self {
        Self::reading(vocabulary, None, length, sizes, classes)
    }

    /// Makes a classifier whose tokens are rows of numbers, brought to the model's width.
    pub(crate) fn of_rows(inputs: Inputs, length: usize, sizes: Sizes, classes: usize) -> Self {
        Self::reading(inputs.len(), Some(inputs), length, sizes, Some(classes))
    }

    fn reading(
        vocabulary: usize,
        inputs: Option<Inputs>,
        length: usize,
        sizes: Sizes,
        classes: Option<usize>,
    ) -> Self {
        let Sizes { width, num_layers, num_heads, inner_width, biases, rotary } = sizes;
        let mut weights = Vec::new();
        let mut add = |name: &str, shape: &[usize], kind, role, layer| {
            weights.push(WeightSpec {
                name: name.to_owned(),
                shape: shape.to_vec(),
                kind,
                role,
                layer,
            });
        };
        let linear = Kind::Linear { transposed: false };
        if let Some(inputs) = &inputs {
            add("rows.weight", &[width, inputs.width()], linear, Role::Embedding, None);
            add("rows.bias", &[width], Kind::Bias, Role::Embedding, None);
        } else {
            add("words.weight", &[vocabulary, width], Kind::Embedding, Role::Embedding, None);
        }
        if !rotary {
            add("positions.weight", &[length, width], Kind::Embedding, Role::Position, None);
        }
        for index in 0..num_layers {
            let mut add = |name: &str, shape: &[usize], kind, role| {
                add(&format!("layers.{index}.{name}.weight"), shape, kind, role, Some(index));
                if biases {
                    let name = format!("layers.{index}.{name}.bias");
                    add(&name, &shape[..1], Kind::Bias, role, Some(index));
                }
            };
            let square = [width, width];
            add("input_layernorm", &[width], Kind::Norm, Role::Norm);
            add("self_attn.q_proj", &square, linear, Role::Query);
            add("self_attn.k_proj", &square, linear, Role::Key);
            add("self_attn.v_proj", &square, linear, Role::Value);
            add("self_attn.o_proj", &square, linear, Role::AttentionOutput);
            add("post_attention_layernorm", &[width], Kind::Norm, Role::Norm);
            add("mlp.gate_proj", &[inner_width, width], linear, Role::Gate);
            add("mlp.up_proj", &[inner_width, width], linear, Role::Up);
            add("mlp.down_proj", &[width, inner_width], linear, Role::Down);
        }
        add("norm.weight", &[width], Kind::Norm, Role::Norm, None);
        if biases {
            add("norm.bias", &[width], Kind::Bias, Role::Norm, None);
        }
        let outputs = classes.unwrap_or(vocabulary);
        add("head.weight", &[outputs, width], linear, Role::Head, None);
        let head = match classes {
            None => Head::Language { weight: "head.weight".to_owned(), bias: None, soft_cap: None },
            Some(classes) => {
                add("head.bias", &[classes], Kind::Bias, Role::Head, None);
                Head::Classes { labels: (0..classes).map(|class| class.to_string()).collect() }
            }
        };
        let head_width = width / num_heads;
        let spec = ModelSpec {
            architecture: "encoder".to_owned(),
            class: "Encoder".to_owned(),
            num_layers,
            width,
            inner_width,
            num_heads,
            num_key_heads: num_heads,
            head_width,
            vocabulary,
            // Only words have positions; room for what a method lays before them.
            max_positions: length + 1024,
            causal: false,
            weights,
            head,
            config: Value::Null,
            towers: Vec::new(),
        };
        let attention = AttentionOptions {
            causal: false,
            ..AttentionOptions::causal(num_heads, num_heads, head_width)
        };
        let frequency = |pair: usize| 1e4_f64.powf(-2.0 * pair as f64 / head_width as f64);
        let rope = rotary.then(|| Rope {
            inverse_frequencies: (0..head_width / 2).map(frequency).collect(),
            scale: 1.0,
        });
        Self { spec: Arc::new(spec), inputs, attention, biases, rope }
    }

    /// Says that the head is no new one, so that methods do not train it beside what they change.
    pub(crate) fn with_known_head(mut self) -> Self {
        for weight in &mut Arc::make_mut(&mut self.spec).weights {
            if weight.role == Role::Head {
                weight.role = Role::Pooler;
            }
        }
        self
    }

    fn norm(&self, pass: &mut Pass<'_>, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        if self.biases {
            pass.layer_norm(module, x, EPSILON)
        } else {
            pass.rms_norm(module, x, EPSILON, 0.0)
        }
    }
}

impl Model for Encoder {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let batch = pass.batch();
        let x = match &self.inputs {
            Some(inputs) => {
                let rows = inputs.read(pass);
                pass.linear("rows", rows)?
            }
            None => pass.embed("words", &batch.tokens)?,
        };
        if self.rope.is_some() {
            return Ok(pass.lay_virtual(x));
        }
        // Positions are those of the document: what a method lays before it must not move them.
        let positions: Vec<u32> = batch.positions.iter().map(|place| *place as u32).collect();
        let x = x + pass.embed("positions", &positions)?;
        Ok(pass.lay_virtual(x))
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = format!("layers.{index}");
        let h = self.norm(pass, &format!("{block}.input_layernorm"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let mut q = pass.linear(&format!("{block}.self_attn.q_proj"), h.clone())?;
            let mut k = pass.linear(&format!("{block}.self_attn.k_proj"), h.clone())?;
            if let Some(rope) = &self.rope {
                [q, k] = [q, k].map(|x| pass.rotary(x, self.spec.num_heads, rope));
            }
            let v = pass.linear(&format!("{block}.self_attn.v_proj"), h)?;
            let heads = pass.attention(index, q, k, v, &self.attention);
            let heads = pass.at(Site::Heads(index, Sublayer::Attention), heads);
            pass.linear(&format!("{block}.self_attn.o_proj"), heads)
        })?;
        let x = x + h;
        let h = self.norm(pass, &format!("{block}.post_attention_layernorm"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            let gate = pass.linear(&format!("{block}.mlp.gate_proj"), h.clone())?;
            let up = pass.linear(&format!("{block}.mlp.up_proj"), h)?;
            let hidden = gated(gate, up, Activation::Silu);
            let hidden = pass.at(Site::Hidden(index, Sublayer::FeedForward), hidden);
            pass.linear(&format!("{block}.mlp.down_proj"), hidden)
        })?;
        Ok(x + h)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = self.norm(pass, "norm", x)?;
        let x = pass.at(Site::Final, x);
        if matches!(self.spec.head, Head::Language { .. }) {
            return Ok(Output::States(x));
        }
        let (documents, width) = (pass.spans().documents(), self.spec.width);
        let tokens = x.dims()[0] / documents;
        let means = x.reshape([documents, tokens, width]).mean_dim(1).reshape([documents, width]);
        Ok(Output::Classes(pass.linear("head", means)?))
    }
}
