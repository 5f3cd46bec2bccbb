//! What the decoder families share: the list of a block's weights and the walk through attention.

use retune_core::Result;
use retune_core::kernels::AttentionOptions;
use retune_core::pass::{Pass, Rope};
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{Kind, Role, WeightSpec};
use tensor::Tensor;

/// Collects weights in the order of the forward pass.
#[derive(Debug, Default)]
pub(crate) struct WeightList(pub Vec<WeightSpec>);

impl WeightList {
    /// Adds one weight.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        kind: Kind,
        role: Role,
        layer: Option<usize>,
    ) {
        let name = name.into();
        self.0.push(WeightSpec { name, shape: shape.to_vec(), kind, role, layer });
    }

    /// Adds a linear layer, with its bias if it has one.
    pub(crate) fn linear(
        &mut self,
        module: &str,
        [outputs, inputs]: [usize; 2],
        bias: bool,
        role: Role,
        layer: Option<usize>,
    ) {
        let kind = Kind::Linear { transposed: false };
        self.add(format!("{module}.weight"), &[outputs, inputs], kind, role, layer);
        if bias {
            self.add(format!("{module}.bias"), &[outputs], Kind::Bias, role, layer);
        }
    }

    /// Adds a norm, with its bias if it has one.
    pub(crate) fn norm(&mut self, module: &str, width: usize, bias: bool, layer: Option<usize>) {
        self.add(format!("{module}.weight"), &[width], Kind::Norm, Role::Norm, layer);
        if bias {
            self.add(format!("{module}.bias"), &[width], Kind::Bias, Role::Norm, layer);
        }
    }

    /// Adds an embedding.
    pub(crate) fn embedding(&mut self, module: &str, rows: usize, width: usize, role: Role) {
        self.add(format!("{module}.weight"), &[rows, width], Kind::Embedding, role, None);
    }
}

/// Norms of queries and keys per head, where a family has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadNorm {
    /// Under the root.
    pub epsilon: f64,
    /// Added to the gain.
    pub offset: f64,
}

/// Runs rotary self-attention under `module`, from the sub-layer's input to its output projection.
///
/// # Errors
/// If a weight cannot be read.
pub(crate) fn rotary_attention(
    pass: &mut Pass<'_>,
    layer: usize,
    module: &str,
    x: Tensor<2>,
    rope: &Rope,
    options: &AttentionOptions,
    head_norm: Option<HeadNorm>,
) -> Result<Tensor<2>> {
    let mut q = pass.linear(&format!("{module}.q_proj"), x.clone())?;
    let mut k = pass.linear(&format!("{module}.k_proj"), x.clone())?;
    let v = pass.linear(&format!("{module}.v_proj"), x)?;
    if let Some(norm) = head_norm {
        q = per_head(pass, &format!("{module}.q_norm"), q, options.head_width, norm)?;
        k = per_head(pass, &format!("{module}.k_norm"), k, options.head_width, norm)?;
    }
    let q = pass.rotary(q, options.heads, rope);
    let k = pass.rotary(k, options.key_heads, rope);
    let heads = pass.attention(layer, q, k, v, options);
    let heads = pass.at(Site::Heads(layer, Sublayer::Attention), heads);
    pass.linear(&format!("{module}.o_proj"), heads)
}

fn per_head(
    pass: &mut Pass<'_>,
    module: &str,
    x: Tensor<2>,
    head_width: usize,
    norm: HeadNorm,
) -> Result<Tensor<2>> {
    let [tokens, width] = x.dims();
    let heads = x.reshape([tokens * width / head_width, head_width]);
    let heads = pass.rms_norm(module, heads, norm.epsilon, norm.offset)?;
    Ok(heads.reshape([tokens, width]))
}

/// Runs a gated feed-forward network under `module`.
///
/// # Errors
/// If a weight cannot be read.
pub(crate) fn gated_feed_forward(
    pass: &mut Pass<'_>,
    layer: usize,
    module: &str,
    x: Tensor<2>,
    activation: retune_core::kernels::Activation,
) -> Result<Tensor<2>> {
    let gate = pass.linear(&format!("{module}.gate_proj"), x.clone())?;
    let up = pass.linear(&format!("{module}.up_proj"), x)?;
    let hidden = retune_core::kernels::gated(gate, up, activation);
    let hidden = pass.at(Site::Hidden(layer, Sublayer::FeedForward), hidden);
    pass.linear(&format!("{module}.down_proj"), hidden)
}
