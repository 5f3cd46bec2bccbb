//! ViT: an image as a sequence of patches behind a class token.
//!
//! As a bare model it gives the class token's state, or its pooler's where the checkpoint has one,
//! scaled to length 1; with a classifier class logits from the class token.

use std::sync::Arc;

use crate::activation;
use crate::config::Config;
use crate::heads::{Classes, Pooling, Purpose, pool, unit_rows};
use crate::tower::{Names, Stack, Usual, image, lay_images};
use crate::weight_list::WeightList;
use retune_core::Result;
use retune_core::kernels::{Activation, activate};
use retune_core::model::{Model, Output};
use retune_core::pass::{Pass, select};
use retune_core::site::Site;
use retune_core::spec::{Head, ModelSpec, Role, Tower};
use tensor::Tensor;

/// The classes of ViT.
pub(crate) const VIT: Classes = Classes {
    language: "",
    classifier: "ViTForImageClassification",
    bare: "ViTModel",
    prefix: "vit.",
};

const NAMES: Names = Names {
    query: "attention.attention.query",
    key: "attention.attention.key",
    value: "attention.attention.value",
    attention_output: "attention.output.dense",
    up: "intermediate.dense",
    down: "output.dense",
    norms: ["layernorm_before", "layernorm_after"],
};

const USUAL: Usual =
    Usual { width: 768, inner: 3072, layers: 12, heads: 12, activation: "gelu", epsilon: 1e-12 };

/// The key under which [`with_pooler`] notes what no configuration says.
const POOLER: &str = "add_pooling_layer";

/// A ViT.
#[derive(Debug)]
pub(crate) struct Vit {
    spec: Arc<ModelSpec>,
    prefix: &'static str,
    stack: Stack,
    /// The pooler's activation, where there is a pooler.
    pooler: Option<Activation>,
}

/// Says in the configuration that a bare model has a pooler, where the files hold one.
pub(crate) fn with_pooler(config: Config, held: bool) -> Config {
    let is_vit = config.get("model_type").and_then(|value| value.as_str()) == Some("vit");
    if is_vit && held { config.with(POOLER, true) } else { config }
}

/// Builds a ViT.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn vit(config: &Config) -> Result<Box<dyn Model>> {
    let image = image(config, 16)?;
    let (class, purpose) = VIT.read(config)?;
    let prefix = VIT.prefix(&purpose);
    let path = format!("{prefix}encoder.layer");
    let mut stack = Stack::read(config, &path, NAMES, 0, false, USUAL)?;
    stack.qkv_bias = config.switch("qkv_bias", true)?;
    stack.dropout = config.rate("hidden_dropout_prob", 0.0)?;
    let width = stack.width;

    let mut weights = WeightList::default();
    let embeddings = format!("{prefix}embeddings");
    weights.constant(&format!("{embeddings}.cls_token"), &[1, 1, width], Role::ClassToken);
    let places = [1, image.num_tokens(), width];
    weights.constant(&format!("{embeddings}.position_embeddings"), &places, Role::Position);
    let kernel = [width, image.channels, image.patch[0], image.patch[1]];
    weights.convolution(&format!("{embeddings}.patch_embeddings.projection"), kernel, true);
    stack.list(&mut weights);
    weights.norm(&format!("{prefix}layernorm"), width, true, None);
    let mut pooler = None;
    let head = match purpose {
        Purpose::Classes(labels) => {
            weights.linear("classifier", [labels.len(), width], true, Role::Head, None);
            Head::Classes { labels }
        }
        Purpose::Embedding | Purpose::Language => {
            if config.switch(POOLER, false)? {
                let pooled = config.optional_side("pooler_output_size")?.unwrap_or(width);
                weights.linear("pooler.dense", [pooled, width], true, Role::Pooler, None);
                pooler = Some(activation(config, "pooler_act", "tanh")?);
            }
            Head::Embedding
        }
    };
    let spec = ModelSpec {
        architecture: "vit".to_owned(),
        class: class.to_owned(),
        num_layers: stack.num_layers,
        width,
        inner_width: stack.inner,
        num_heads: stack.heads,
        num_key_heads: stack.heads,
        head_width: width / stack.heads,
        vocabulary: 0,
        max_positions: image.num_tokens(),
        causal: false,
        towers: vec![Tower { layers: 0..stack.num_layers, width, image: Some(image) }],
        weights: weights.0,
        head,
        config: config.value().clone(),
    };
    Ok(Box::new(Vit { spec: Arc::new(spec), prefix, stack, pooler }))
}

impl Model for Vit {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let (module, width) = (format!("{}embeddings", self.prefix), self.stack.width);
        let patches = format!("{module}.patch_embeddings.projection");
        let x = lay_images(pass, &patches, &format!("{module}.cls_token"), width)?;
        let places = pass.constant(&format!("{module}.position_embeddings"), width)?;
        let x = x + select(places, &pass.batch().positions);
        Ok(pass.dropout(x, self.stack.dropout))
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        self.stack.layer(pass, index, x, None)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = pass.layer_norm(&format!("{}layernorm", self.prefix), x, self.stack.epsilon)?;
        let x = pass.at(Site::Final, x);
        let first = pool(pass, x, Pooling::First)?;
        if matches!(self.spec.head, Head::Classes { .. }) {
            return Ok(Output::Classes(pass.linear("classifier", first)?));
        }
        let vector = match self.pooler {
            Some(activation) => activate(pass.linear("pooler.dense", first)?, activation),
            None => first,
        };
        Ok(Output::Embeddings(unit_rows(vector)))
    }
}
