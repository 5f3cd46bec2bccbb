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
    /// The map of a tower's vector into the space it shares with another's.
    Projection,
    /// The projection of an image's patches.
    Patches,
    /// The token that stands for a whole image.
    ClassToken,
    /// The factor on the similarities of images and texts, as a logarithm.
    LogitScale,
}

/// How a weight is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A matrix `[outputs, inputs]` of a linear layer.
    Linear {
        /// The checkpoint stores `[inputs, outputs]` (GPT-2's `Conv1D`).
        transposed: bool,
    },
    /// The kernel `[outputs, channels, height, width]` of a convolution that steps by its own size:
    /// a linear layer over patches.
    Convolution,
    /// A table `[rows, width]` read by index.
    Embedding,
    /// States `[1, rows, width]` that are laid beside those of the input or added to them (class
    /// tokens, positions of patches), or a lone number.
    Constant,
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
    /// Returns the module's path: the name without its last part; states that are a weight
    /// themselves are a module of their own.
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
        if self.kind == Kind::Constant {
            return &self.name;
        }
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
    /// One vector per image and one per text, in one space, and a factor on their similarities.
    Pairs,
}

/// What a model's images are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSpec {
    /// Numbers per pixel.
    pub channels: usize,
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// Height and width of a patch in pixels.
    pub patch: [usize; 2],
}

impl ImageSpec {
    /// Returns the rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        [self.size[0] / self.patch[0], self.size[1] / self.patch[1]]
    }

    /// Returns the tokens an image takes: one for the whole, one for each patch.
    pub fn num_tokens(&self) -> usize {
        let [rows, columns] = self.grid();
        1 + rows * columns
    }

    /// Returns the numbers of one patch.
    pub fn patch_values(&self) -> usize {
        self.channels * self.patch[0] * self.patch[1]
    }

    /// Cuts an image into patches, row by row.
    ///
    /// # Shapes
    /// - `image`: `[channels, height, width]`
    /// - returns: `[patches, channels · patch height · patch width]`
    pub fn patches(&self, image: &[f32]) -> Vec<f32> {
        let [rows, columns] = self.grid();
        let ([height, width], [tall, wide]) = (self.size, self.patch);
        let mut out = Vec::with_capacity(rows * columns * self.patch_values());
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |c| (row, c))) {
            for (channel, line) in (0..self.channels).flat_map(|c| (0..tall).map(move |l| (c, l))) {
                let start = (channel * height + row * tall + line) * width + column * wide;
                out.extend_from_slice(&image[start..start + wide]);
            }
        }
        out
    }

    /// Returns the numbers of one image.
    pub fn num_values(&self) -> usize {
        self.channels * self.size[0] * self.size[1]
    }
}

/// One stack of blocks of a model that reads images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tower {
    /// Its blocks, counted through all towers.
    pub layers: std::ops::Range<usize>,
    /// Width of its residual stream.
    pub width: usize,
    /// What its images are like; nothing for a tower that reads text.
    pub image: Option<ImageSpec>,
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
    /// The stacks of blocks of a model that reads images, in the order of the blocks; empty for a
    /// model that reads text only. Where there are two, the widths above are those of the wider.
    pub towers: Vec<Tower>,
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

    /// Returns how many of the blocks are the encoder's, if the model has one beside a decoder.
    pub fn encoder_layers(&self) -> Option<usize> {
        self.decoder_start()?;
        self.config.get("num_layers").and_then(Value::as_u64).map(|count| count as usize)
    }

    /// Returns what the model's images are like, if it reads any.
    pub fn image(&self) -> Option<&ImageSpec> {
        self.towers.iter().find_map(|tower| tower.image.as_ref())
    }

    /// Returns whether the model has several stacks of blocks, so that a block does not see all
    /// tokens of a document.
    pub fn has_sides(&self) -> bool {
        self.decoder_start().is_some() || self.towers.len() > 1
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_keep_channels_apart() {
        let image = ImageSpec { channels: 2, size: [2, 4], patch: [2, 2] };
        // Channel 0 holds 0 to 7, channel 1 holds 10 to 17, row by row.
        let values: Vec<f32> = (0..8_u8).chain(10..18).map(f32::from).collect();
        let patches = [[0., 1., 4., 5., 10., 11., 14., 15.], [2., 3., 6., 7., 12., 13., 16., 17.]];
        assert_eq!(image.patches(&values), patches.concat());
        assert_eq!((image.num_tokens(), image.patch_values(), image.num_values()), (3, 8, 16));
    }
}
