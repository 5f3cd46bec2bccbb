//! What models that read images share: patches as tokens, and a stack of blocks with norms in front.

use crate::activation;
use crate::config::{Config, MAX_LAYERS, MAX_SIDE};
use crate::weight_list::WeightList;
use retune_core::Result;
use retune_core::kernels::{Activation, AttentionOptions, Spans, activate, add, attention};
use retune_core::pass::{Pass, select};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{ImageSpec, Role};
use serde_json::Value;
use tensor::Tensor;

/// What the modules of a block are called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    pub(crate) query: &'static str,
    pub(crate) key: &'static str,
    pub(crate) value: &'static str,
    pub(crate) attention_output: &'static str,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
    pub(crate) norms: [&'static str; 2],
}

/// Sizes of a stack, as both kinds of configuration spell them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usual {
    pub(crate) width: usize,
    pub(crate) inner: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) activation: &'static str,
    pub(crate) epsilon: f64,
}

/// A stack of transformer blocks that normalise what a sub-layer reads.
#[derive(Debug)]
pub(crate) struct Stack {
    /// Path of the list of blocks.
    path: String,
    names: Names,
    /// Number of its first block in the model.
    first: usize,
    pub(crate) num_layers: usize,
    pub(crate) width: usize,
    pub(crate) inner: usize,
    pub(crate) heads: usize,
    pub(crate) epsilon: f64,
    activation: Activation,
    attention: AttentionOptions,
    /// Whether queries, keys and values have biases.
    pub(crate) qkv_bias: bool,
    /// Rate of dropout behind both sub-layers.
    pub(crate) dropout: f64,
}

impl Stack {
    /// Reads the sizes of a stack; absent ones are `usual`.
    ///
    /// # Errors
    /// If a number is impossible.
    pub(crate) fn read(
        config: &Config,
        path: &str,
        names: Names,
        first: usize,
        causal: bool,
        usual: Usual,
    ) -> Result<Self> {
        let width = config.optional_side("hidden_size")?.unwrap_or(usual.width);
        let heads = config.optional_side("num_attention_heads")?.unwrap_or(usual.heads);
        if !width.is_multiple_of(heads) {
            return Err(config.unknown("num_attention_heads", "a divisor of hidden_size"));
        }
        let num_layers = config.optional_size("num_hidden_layers")?.unwrap_or(usual.layers);
        let options = AttentionOptions::causal(heads, heads, width / heads);
        Ok(Self {
            path: path.to_owned(),
            names,
            first,
            num_layers: config.at_most("num_hidden_layers", num_layers, MAX_LAYERS / 2)?,
            width,
            inner: config.optional_side("intermediate_size")?.unwrap_or(usual.inner),
            heads,
            epsilon: config.positive("layer_norm_eps")?.unwrap_or(usual.epsilon),
            activation: activation(config, "hidden_act", usual.activation)?,
            attention: AttentionOptions { causal, ..options },
            qkv_bias: true,
            dropout: 0.0,
        })
    }

    /// Adds the weights of all blocks.
    pub(crate) fn list(&self, weights: &mut WeightList) {
        let (width, inner, names) = (self.width, self.inner, self.names);
        for i in 0..self.num_layers {
            let (block, layer) = (format!("{}.{i}", self.path), Some(self.first + i));
            weights.norm(&format!("{block}.{}", names.norms[0]), width, true, layer);
            let mut add = |name: &str, shape, bias, role| {
                weights.linear(&format!("{block}.{name}"), shape, bias, role, layer);
            };
            add(names.query, [width, width], self.qkv_bias, Role::Query);
            add(names.key, [width, width], self.qkv_bias, Role::Key);
            add(names.value, [width, width], self.qkv_bias, Role::Value);
            add(names.attention_output, [width, width], true, Role::AttentionOutput);
            weights.norm(&format!("{block}.{}", names.norms[1]), width, true, layer);
            let mut add = |name: &str, shape, role| {
                weights.linear(&format!("{block}.{name}"), shape, true, role, layer);
            };
            add(names.up, [inner, width], Role::Up);
            add(names.down, [width, inner], Role::Down);
        }
    }

    /// Runs the block that has number `index` in the model.
    ///
    /// # Shapes
    /// - `x`: `[tokens of the stack, width]`
    /// - `spans`: documents among them, where they are not those of the pass
    ///
    /// # Errors
    /// If a weight cannot be read.
    pub(crate) fn layer(
        &self,
        pass: &mut Pass<'_>,
        index: usize,
        x: Tensor<2>,
        spans: Option<&Spans>,
    ) -> Result<Tensor<2>> {
        let block = format!("{}.{}", self.path, index - self.first);
        let names = self.names;
        let norm = format!("{block}.{}", names.norms[0]);
        let h = pass.layer_norm(&norm, x.clone(), self.epsilon)?;
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let q = pass.linear(&format!("{block}.{}", names.query), h.clone())?;
            let k = pass.linear(&format!("{block}.{}", names.key), h.clone())?;
            let v = pass.linear(&format!("{block}.{}", names.value), h)?;
            let heads = match spans {
                Some(spans) => attention(q, k, v, spans, spans, &self.attention),
                None => pass.attention(index, q, k, v, &self.attention),
            };
            let heads = pass.at(Site::Heads(index, Sublayer::Attention), heads);
            let h = pass.linear(&format!("{block}.{}", names.attention_output), heads)?;
            Ok(pass.dropout(h, self.dropout))
        })?;
        let x = add(x, h);
        let norm = format!("{block}.{}", names.norms[1]);
        let h = pass.layer_norm(&norm, x.clone(), self.epsilon)?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            let h = pass.linear(&format!("{block}.{}", names.up), h)?;
            let h = activate(h, self.activation);
            let h = pass.at(Site::Hidden(index, Sublayer::FeedForward), h);
            let h = pass.linear(&format!("{block}.{}", names.down), h)?;
            Ok(pass.dropout(h, self.dropout))
        })?;
        Ok(add(x, h))
    }
}

/// Reads what a configuration says of its images.
///
/// # Errors
/// If a number is impossible, or patches do not fill the image.
pub(crate) fn image(config: &Config, usual_patch: usize) -> Result<ImageSpec> {
    let pair = |key: &str, usual: usize| -> Result<[usize; 2]> {
        let Some(Value::Array(list)) = config.get(key) else {
            let side = config.optional_side(key)?.unwrap_or(usual);
            return Ok([side; 2]);
        };
        let side = |value: &Value| {
            let side = value.as_u64().filter(|side| (1..=MAX_SIDE as u64).contains(side));
            side.map(|side| side as usize)
        };
        match list.as_slice() {
            [height, width] => side(height).zip(side(width)).map(|(h, w)| [h, w]),
            _ => None,
        }
        .ok_or_else(|| config.unknown(key, "one whole number, or a height and a width"))
    };
    let image = ImageSpec {
        channels: config.optional_side("num_channels")?.unwrap_or(3),
        size: pair("image_size", 224)?,
        patch: pair("patch_size", usual_patch)?,
    };
    let fills = |axis: usize| image.size[axis].is_multiple_of(image.patch[axis]);
    if !fills(0) || !fills(1) {
        return Err(config.unknown("patch_size", "a divisor of image_size"));
    }
    // Sides and channels multiply; what no machine holds is refused before anything is made.
    let [height, width] = image.size;
    config.at_most("image_size", height.saturating_mul(width), MAX_SIDE * 16)?;
    config.at_most("num_channels", image.channels, 1024)?;
    Ok(image)
}

/// Lays the class token and the projected patches of each image one behind the other.
///
/// # Shapes
/// - returns: `[tokens of images, width]`, without positions
///
/// # Errors
/// If a weight cannot be read, or the batch has no image.
pub(crate) fn lay_images(
    pass: &mut Pass<'_>,
    patches: &str,
    class: &str,
    width: usize,
) -> Result<Tensor<2>> {
    let patches = pass.patches(patches)?;
    let class = pass.constant(class, width)?;
    let batch = pass.batch();
    let mut rows = Vec::with_capacity(batch.num_tokens());
    let mut next = 1;
    for span in batch.spans.iter() {
        let [image, _] = batch.sides(span);
        if image > 0 {
            rows.push(0);
            rows.extend(next..next + image - 1);
            next += image - 1;
        }
    }
    Ok(select(Tensor::cat(vec![class, patches], 0), &rows))
}
