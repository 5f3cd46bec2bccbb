//! BERT and RoBERTa: encoders with learned positions, token types and norms behind the residual sums.
//!
//! As a bare model each gives sentence embeddings; with a classifier class logits, from BERT's
//! pooler or RoBERTa's head of two layers.
//! Dropout of hidden states is applied while training; dropout of attention weights is not, as
//! fused attention never holds them.

use std::sync::Arc;

use crate::activation;
use crate::config::{Config, MAX_LAYERS};
use crate::heads::{Classes, Pooling, Purpose, pool, unit_rows};
use crate::weight_list::WeightList;
use retune_core::kernels::{Activation, AttentionOptions, activate, add};
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{Head, ModelSpec, Role};
use retune_core::{Error, Result};
use tensor::Tensor;

/// The classes of BERT.
pub(crate) const BERT: Classes = Classes {
    language: "",
    classifier: "BertForSequenceClassification",
    bare: "BertModel",
    prefix: "bert.",
};

/// The classes of RoBERTa.
pub(crate) const ROBERTA: Classes = Classes {
    language: "",
    classifier: "RobertaForSequenceClassification",
    bare: "RobertaModel",
    prefix: "roberta.",
};

/// The classes of XLM-RoBERTa: RoBERTa with another tokenizer.
pub(crate) const XLM_ROBERTA: Classes = Classes {
    classifier: "XLMRobertaForSequenceClassification",
    bare: "XLMRobertaModel",
    ..ROBERTA
};

/// What tells RoBERTa from BERT.
#[derive(Debug, Clone, Copy)]
struct Family {
    architecture: &'static str,
    classes: Classes,
    /// Number of the first token's position: RoBERTa counts from behind the padding token's number.
    first_position: usize,
    /// The two linear layers between the first token's state and the class logits.
    head: [&'static str; 2],
    /// Whether the first of them lies in the body, and only its result is dropped out.
    pooler: bool,
}

/// A BERT or RoBERTa.
#[derive(Debug)]
pub(crate) struct Bert {
    spec: Arc<ModelSpec>,
    family: Family,
    prefix: &'static str,
    epsilon: f64,
    activation: Activation,
    attention: AttentionOptions,
    num_types: usize,
    hidden_dropout: f64,
    classifier_dropout: f64,
}

/// Builds a BERT.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn bert(config: &Config) -> Result<Box<dyn Model>> {
    let family = Family {
        architecture: "bert",
        classes: BERT,
        first_position: 0,
        head: ["pooler.dense", "classifier"],
        pooler: true,
    };
    encoder(config, family)
}

/// Builds a RoBERTa.
///
/// # Errors
/// As [`bert`].
pub(crate) fn roberta(config: &Config) -> Result<Box<dyn Model>> {
    roberta_like(config, "roberta", ROBERTA)
}

/// Builds an XLM-RoBERTa.
///
/// # Errors
/// As [`bert`].
pub(crate) fn xlm_roberta(config: &Config) -> Result<Box<dyn Model>> {
    roberta_like(config, "xlm-roberta", XLM_ROBERTA)
}

fn roberta_like(
    config: &Config,
    architecture: &'static str,
    classes: Classes,
) -> Result<Box<dyn Model>> {
    let padding = config.optional_token("pad_token_id")?.unwrap_or(1);
    let family = Family {
        architecture,
        classes,
        first_position: padding as usize + 1,
        head: ["classifier.dense", "classifier.out_proj"],
        pooler: false,
    };
    encoder(config, family)
}

fn encoder(config: &Config, family: Family) -> Result<Box<dyn Model>> {
    if config.switch("is_decoder", false)? {
        return Err(Error::Unsupported {
            what: "a BERT that is a decoder (`is_decoder`)".to_owned(),
            help: "use an encoder, or one of the decoder families".to_owned(),
        });
    }
    if config.text("position_embedding_type")?.is_some_and(|kind| kind != "absolute") {
        return Err(config.unknown("position_embedding_type", "absolute"));
    }
    let width = config.side("hidden_size")?;
    let inner = config.side("intermediate_size")?;
    let heads = config.side("num_attention_heads")?;
    if !width.is_multiple_of(heads) {
        return Err(config.unknown("num_attention_heads", "a divisor of hidden_size"));
    }
    let num_layers = config.size("num_hidden_layers")?;
    let num_layers = config.at_most("num_hidden_layers", num_layers, MAX_LAYERS)?;
    let vocabulary = config.side("vocab_size")?;
    let positions = config.optional_side("max_position_embeddings")?.unwrap_or(512);
    let num_types = config.optional_side("type_vocab_size")?.unwrap_or(2);
    if positions <= family.first_position {
        let expected = format!("more than {}, the first position", family.first_position);
        return Err(config.unknown("max_position_embeddings", &expected));
    }
    let (class, purpose) = family.classes.read(config)?;
    let prefix = family.classes.prefix(&purpose);

    let mut weights = WeightList::default();
    let embeddings = format!("{prefix}embeddings");
    let words = format!("{embeddings}.word_embeddings");
    weights.embedding(&words, vocabulary, width, Role::Embedding);
    let places = format!("{embeddings}.position_embeddings");
    weights.embedding(&places, positions, width, Role::Position);
    let types = format!("{embeddings}.token_type_embeddings");
    weights.embedding(&types, num_types, width, Role::TokenType);
    weights.norm(&format!("{embeddings}.LayerNorm"), width, true, None);
    for i in 0..num_layers {
        let block = format!("{prefix}encoder.layer.{i}");
        let layer = Some(i);
        let mut add = |name: &str, shape, role| {
            weights.linear(&format!("{block}.{name}"), shape, true, role, layer);
        };
        add("attention.self.query", [width, width], Role::Query);
        add("attention.self.key", [width, width], Role::Key);
        add("attention.self.value", [width, width], Role::Value);
        add("attention.output.dense", [width, width], Role::AttentionOutput);
        add("intermediate.dense", [inner, width], Role::Up);
        add("output.dense", [width, inner], Role::Down);
        weights.norm(&format!("{block}.attention.output.LayerNorm"), width, true, layer);
        weights.norm(&format!("{block}.output.LayerNorm"), width, true, layer);
    }
    let head = match purpose {
        Purpose::Classes(labels) => {
            let [dense, out] = family.head_modules(prefix);
            let role = if family.pooler { Role::Pooler } else { Role::Head };
            weights.linear(&dense, [width, width], true, role, None);
            weights.linear(&out, [labels.len(), width], true, Role::Head, None);
            Head::Classes { labels }
        }
        // The pooler of a bare model takes no part in a sentence embedding.
        Purpose::Embedding | Purpose::Language => Head::Embedding,
    };
    let spec = ModelSpec {
        architecture: family.architecture.to_owned(),
        class: class.to_owned(),
        num_layers,
        width,
        inner_width: inner,
        num_heads: heads,
        num_key_heads: heads,
        head_width: width / heads,
        vocabulary,
        max_positions: positions - family.first_position,
        causal: false,
        towers: Vec::new(),
        weights: weights.0,
        head,
        config: config.value().clone(),
    };
    let attention =
        AttentionOptions { causal: false, ..AttentionOptions::causal(heads, heads, width / heads) };
    let hidden_dropout = config.rate("hidden_dropout_prob", 0.1)?;
    Ok(Box::new(Bert {
        spec: Arc::new(spec),
        family,
        prefix,
        epsilon: config.positive("layer_norm_eps")?.unwrap_or(1e-12),
        activation: activation(config, "hidden_act", "gelu")?,
        attention,
        num_types,
        hidden_dropout,
        classifier_dropout: config.rate("classifier_dropout", hidden_dropout)?,
    }))
}

impl Family {
    fn head_modules(&self, prefix: &str) -> [String; 2] {
        let [dense, out] = self.head;
        let dense = if self.pooler { format!("{prefix}{dense}") } else { dense.to_owned() };
        [dense, out.to_owned()]
    }
}

impl Bert {
    /// Returns the type of each token, zeros where the batch has none.
    fn token_types(&self, pass: &Pass<'_>) -> Result<Vec<u32>> {
        let types = pass.token_types();
        match types.iter().find(|kind| **kind as usize >= self.num_types) {
            Some(kind) => Err(Error::Input {
                what: "a token has a type the model does not know".to_owned(),
                expected: format!("token types below {}", self.num_types),
                found: kind.to_string(),
                help: "the tokenizer belongs to another model; use the one beside the weights"
                    .to_owned(),
            }),
            None => Ok(types),
        }
    }
}

impl Model for Bert {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let module = format!("{}embeddings", self.prefix);
        let types = self.token_types(pass)?;
        let first = self.family.first_position;
        let positions: Vec<u32> = pass.positions().iter().map(|p| (p + first) as u32).collect();
        let x = pass.embed_words(&format!("{module}.word_embeddings"), None)?
            + pass.embed(&format!("{module}.token_type_embeddings"), &types)?;
        let x = x + pass.embed(&format!("{module}.position_embeddings"), &positions)?;
        let x = pass.layer_norm(&format!("{module}.LayerNorm"), x, self.epsilon)?;
        Ok(pass.dropout(x, self.hidden_dropout))
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let block = format!("{}encoder.layer.{index}", self.prefix);
        let h = pass.sublayer(index, Sublayer::Attention, x.clone(), |pass, h| {
            let q = pass.linear(&format!("{block}.attention.self.query"), h.clone())?;
            let k = pass.linear(&format!("{block}.attention.self.key"), h.clone())?;
            let v = pass.linear(&format!("{block}.attention.self.value"), h)?;
            let heads = pass.attention(index, q, k, v, &self.attention);
            let heads = pass.at(Site::Heads(index, Sublayer::Attention), heads);
            let h = pass.linear(&format!("{block}.attention.output.dense"), heads)?;
            Ok(pass.dropout(h, self.hidden_dropout))
        })?;
        let norm = format!("{block}.attention.output.LayerNorm");
        let x = pass.layer_norm(&norm, add(x, h), self.epsilon)?;
        let h = pass.sublayer(index, Sublayer::FeedForward, x.clone(), |pass, h| {
            let h = pass.linear(&format!("{block}.intermediate.dense"), h)?;
            let h = activate(h, self.activation);
            let h = pass.at(Site::Hidden(index, Sublayer::FeedForward), h);
            let h = pass.linear(&format!("{block}.output.dense"), h)?;
            Ok(pass.dropout(h, self.hidden_dropout))
        })?;
        pass.layer_norm(&format!("{block}.output.LayerNorm"), add(x, h), self.epsilon)
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = pass.at(Site::Final, x);
        if self.spec.head == Head::Embedding {
            return Ok(Output::Embeddings(unit_rows(pool(pass, x, Pooling::Mean)?)));
        }
        let [dense, out] = self.family.head_modules(self.prefix);
        let mut first = pool(pass, x, Pooling::First)?;
        if !self.family.pooler {
            first = pass.dropout(first, self.classifier_dropout);
        }
        let pooled = activate(pass.linear(&dense, first)?, Activation::Tanh);
        let pooled = pass.dropout(pooled, self.classifier_dropout);
        Ok(Output::Classes(pass.linear(&out, pooled)?))
    }
}
