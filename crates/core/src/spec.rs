//! What a model is made of, as data: enough for a method to plan without knowing the architecture.

use serde_json::Value;

/// What a weight does in its block, in words every architecture shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Token embeddings.
    Embedding,
    /// Learned positions.
    Position,
    /// Token-type (segment) embeddings.
    TokenType,
    /// Projection to queries.
    Query,
    /// Projection to keys.
    Key,
    /// Projection to values.
    Value,
    /// Queries, keys and values in one projection (GPT-2).
    QueryKeyValue,
    /// Projection of the heads' outputs.
    AttentionOutput,
    /// The gate of a gated feed-forward network.
    Gate,
    /// The widening projection of a feed-forward network.
    Up,
    /// The narrowing projection of a feed-forward network.
    Down,
    /// Any normalisation.
    Norm,
    /// The pooler of an encoder.
    Pooler,
    /// The output head.
    Head,
}

/// How a weight is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A matrix `[outputs, inputs]` of a linear layer.
    Linear {
        /// The checkpoint stores `[inputs, outputs]` (GPT-2's `Conv1D`).
        transposed: bool,
    },
    /// A table `[rows, width]` read by index.
    Embedding,
    /// The gain of a norm.
    Norm,
    /// A vector added to a result.
    Bias,
}

/// One weight of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSpec {
    /// The name in the checkpoint, e.g. `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The logical shape; a linear layer is always `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// How it is used.
    pub kind: Kind,
    /// What it does.
    pub role: Role,
    /// The block it belongs to, if any.
    pub layer: Option<usize>,
}

impl WeightSpec {
    /// Returns the module's path: the name without its last part.
    ///
    /// ```
    /// # use retune_core::spec::{Kind, Role, WeightSpec};
    /// let weight = WeightSpec {
    ///     name: "model.norm.weight".into(), shape: vec![8],
    ///     kind: Kind::Norm, role: Role::Norm, layer: None,
    /// };
    /// assert_eq!(weight.module(), "model.norm");
    /// ```
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or(self.name.as_str(), |(module, _)| module)
    }

    /// Returns the number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the shape seen as a matrix: the first axis by all others.
    pub fn matrix(&self) -> [usize; 2] {
        let rows = self.shape.first().copied().unwrap_or(1);
        [rows, self.count() / rows.max(1)]
    }

    /// Returns whether this is the matrix of a linear layer.
    pub fn is_linear(&self) -> bool {
        matches!(self.kind, Kind::Linear { .. })
    }
}

/// What comes out of a model.
#[derive(Debug, Clone, PartialEq)]
pub enum Head {
    /// Next-token logits: `states · weightᵀ`.
    Language {
        /// The head's weight; the embedding's name where the two are tied.
        weight: String,
        /// A bias of the head, if the architecture has one.
        bias: Option<String>,
        /// Logits are squashed to `cap · tanh(logits / cap)`, where the architecture does so.
        soft_cap: Option<f64>,
    },
    /// One row of class logits per document.
    Classes {
        /// Names of the classes, in the order of the logits.
        labels: Vec<String>,
    },
    /// One vector per document.
    Embedding,
}

/// Everything a method, a planner or an exporter may know about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the configuration, e.g. `llama`.
    pub architecture: String,
    /// The class in the Hugging Face library, e.g. `LlamaForCausalLM`.
    pub class: String,
    /// Number of blocks.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width inside the feed-forward network.
    pub inner_width: usize,
    /// Query heads per block.
    pub num_heads: usize,
    /// Key and value heads per block.
    pub num_key_heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// The longest sequence the model was made for.
    pub max_positions: usize,
    /// Whether a token sees only what comes before it.
    pub causal: bool,
    /// All weights, in the order of the forward pass.
    pub weights: Vec<WeightSpec>,
    /// What comes out.
    pub head: Head,
    /// The configuration as the checkpoint has it, kept for export.
    pub config: Value,
}

impl ModelSpec {
    /// Returns the token that begins the decoder's side of a document, if the model has two sides.
    pub fn decoder_start(&self) -> Option<u32> {
        let flag = |key: &str| self.config.get(key);
        let two_sided = flag("is_encoder_decoder").and_then(Value::as_bool).unwrap_or(false);
        let start = flag("decoder_start_token_id").and_then(Value::as_u64).unwrap_or(0);
        two_sided.then_some(start as u32)
    }

    /// Finds a weight by its full name.
    pub fn weight(&self, name: &str) -> Option<&WeightSpec> {
        self.weights.iter().find(|weight| weight.name == name)
    }

    /// Returns the matrices of all linear layers, the output head included where it is untied.
    pub fn linears(&self) -> impl Iterator<Item = &WeightSpec> {
        self.weights.iter().filter(|weight| weight.is_linear())
    }

    /// Returns what the model adds to the stored gain of its norms.
    pub fn norm_offset(&self) -> f64 {
        // The family stores `gain - 1`, and no key of its configuration says so.
        if self.architecture.starts_with("gemma") { 1.0 } else { 0.0 }
    }

    /// Returns the number of values of all weights; tied ones count once.
    pub fn count(&self) -> usize {
        self.weights.iter().map(WeightSpec::count).sum()
    }
}
