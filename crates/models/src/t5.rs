//! T5: an encoder and a decoder with relative positions, in both published forms (version 1.0 with
//! a plain and tied, version 1.1 with a gated feed-forward network and a head of its own).
//!
//! A document holds both sides: the tokens the encoder reads, then the decoder's start token and
//! what follows it. Blocks are counted through: the encoder's first, then the decoder's. States of
//! both sides lie in one tensor, in the batch's order; a block of one side leaves the other alone.

use std::ops::Range;
use std::sync::Arc;

use crate::activation;
use crate::config::{Config, MAX_LAYERS, MAX_SIDE};
use crate::heads::{Classes, Purpose};
use crate::weight_list::WeightList;
use retune_core::batch::Batch;
use retune_core::kernels::{Activation, AttentionOptions, Spans, activate, gated};
use retune_core::model::{Model, Output};
use retune_core::pass::Pass;
use retune_core::site::{Site, Sublayer};
use retune_core::spec::{Head, ModelSpec, Role};
use retune_core::{Error, Result};
use tensor::{Bool, Int, Tensor, TensorData, activation as tensor_activation};

/// The classes of T5.
pub(crate) const T5: Classes = Classes {
    language: "T5ForConditionalGeneration",
    classifier: "T5ForSequenceClassification",
    bare: "T5Model",
    prefix: "",
};

/// A T5.
#[derive(Debug)]
pub(crate) struct T5Model {
    spec: Arc<ModelSpec>,
    start: u32,
    num_encoder_layers: usize,
    epsilon: f64,
    activation: Activation,
    gated: bool,
    /// Whether states are divided by the root of the width before the head.
    scales_output: bool,
    buckets: Buckets,
    dropout: f64,
}

/// How distances between tokens share numbers.
#[derive(Debug, Clone, Copy)]
struct Buckets {
    count: usize,
    max_distance: usize,
}

/// Which rows of the states belong to which side.
struct Sides {
    encoder: Side,
    decoder: Side,
    /// Places of the states' rows when the encoder's rows come first.
    order: Vec<i32>,
}

struct Side {
    rows: Vec<i32>,
    spans: Spans,
}

/// Builds a T5.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn t5(config: &Config) -> Result<Box<dyn Model>> {
    let (class, purpose) = T5.read(config)?;
    if purpose != Purpose::Language {
        return Err(Error::Unsupported {
            what: format!("the head of {class}"),
            help: format!("use {}: classes can be generated as words", T5.language),
        });
    }
    let width = config.side("d_model")?;
    let head_width = config.side("d_kv")?;
    let heads = config.side("num_heads")?;
    let inner = config.side("d_ff")?;
    let vocabulary = config.side("vocab_size")?;
    config.at_most("num_heads", heads * head_width, MAX_SIDE)?;
    let encoder = config.at_most("num_layers", config.size("num_layers")?, MAX_LAYERS / 2)?;
    let decoder = config.optional_size("num_decoder_layers")?.unwrap_or(encoder);
    let decoder = config.at_most("num_decoder_layers", decoder, MAX_LAYERS / 2)?;
    let buckets = Buckets {
        count: config.optional_side("relative_attention_num_buckets")?.unwrap_or(32),
        max_distance: config.optional_side("relative_attention_max_distance")?.unwrap_or(128),
    };
    if buckets.count < 4 || buckets.max_distance <= buckets.count / 2 {
        return Err(config.unknown(
            "relative_attention_max_distance",
            "more than half of relative_attention_num_buckets, and those at least 4",
        ));
    }
    let (gated, kind) = match config.text("feed_forward_proj")?.unwrap_or("relu") {
        "gated-gelu" => (true, Activation::GeluTanh),
        other => match other.strip_prefix("gated-") {
            Some(name) => (true, named(config, name)?),
            None => (false, named(config, other)?),
        },
    };
    let start = config.optional_token("decoder_start_token_id")?.unwrap_or(0);
    if start as usize >= vocabulary {
        return Err(config.unknown("decoder_start_token_id", "a token of the vocabulary"));
    }
    let tied = config.switch("tie_word_embeddings", true)?;

    let mut weights = WeightList::default();
    weights.embedding("shared", vocabulary, width, Role::Embedding);
    for (side, layers) in [("encoder", encoder), ("decoder", decoder)] {
        for i in 0..layers {
            let layer = Some(if side == "encoder" { i } else { encoder + i });
            let block = format!("{side}.block.{i}.layer");
            attention_weights(
                &mut weights,
                &format!("{block}.0.SelfAttention"),
                width,
                heads * head_width,
                layer,
            );
            if i == 0 {
                let bias = format!("{block}.0.SelfAttention.relative_attention_bias");
                weights.embedding(&bias, buckets.count, heads, Role::Position);
            }
            weights.norm(&format!("{block}.0.layer_norm"), width, false, layer);
            let mut last = 1;
            if side == "decoder" {
                attention_weights(
                    &mut weights,
                    &format!("{block}.1.EncDecAttention"),
                    width,
                    heads * head_width,
                    layer,
                );
                weights.norm(&format!("{block}.1.layer_norm"), width, false, layer);
                last = 2;
            }
            let dense = format!("{block}.{last}.DenseReluDense");
            let mut add = |name: &str, shape, role| {
                weights.linear(&format!("{dense}.{name}"), shape, false, role, layer);
            };
            if gated {
                add("wi_0", [inner, width], Role::Gate);
                add("wi_1", [inner, width], Role::Up);
            } else {
                add("wi", [inner, width], Role::Up);
            }
            add("wo", [width, inner], Role::Down);
            weights.norm(&format!("{block}.{last}.layer_norm"), width, false, layer);
        }
        weights.norm(&format!("{side}.final_layer_norm"), width, false, None);
    }
    if !tied {
        weights.linear("lm_head", [vocabulary, width], false, Role::Head, None);
    }
    let weight = if tied { "shared.weight" } else { "lm_head.weight" }.to_owned();
    let spec = ModelSpec {
        architecture: "t5".to_owned(),
        class: class.to_owned(),
        num_layers: encoder + decoder,
        width,
        inner_width: inner,
        num_heads: heads,
        num_key_heads: heads,
        head_width,
        vocabulary,
        // Both sides of a document count; distances beyond the last bucket share it.
        max_positions: 2 * config.optional_side("n_positions")?.unwrap_or(512),
        causal: true,
        towers: Vec::new(),
        weights: weights.0,
        head: Head::Language { weight, bias: None, soft_cap: None },
        config: config.value().clone(),
    };
    Ok(Box::new(T5Model {
        spec: Arc::new(spec),
        start,
        num_encoder_layers: encoder,
        epsilon: config.positive("layer_norm_epsilon")?.unwrap_or(1e-6),
        activation: kind,
        gated,
        scales_output: config.switch("scale_decoder_outputs", tied)?,
        buckets,
        dropout: config.rate("dropout_rate", 0.1)?,
    }))
}

/// Says in the configuration that the head has weights of its own, where the files hold them.
///
/// transformers 5 writes `tie_word_embeddings: true` for either form, and whether states are scaled
/// under a key of its own.
pub(crate) fn with_own_head(config: Config, held: bool) -> Config {
    let text = |key: &str| config.get(key).and_then(|value| value.as_str());
    let switch = |key: &str| config.get(key).and_then(serde_json::Value::as_bool);
    if !held || text("model_type") != Some("t5") {
        return config;
    }
    let scales = switch("scale_decoder_outputs").or(switch("tie_word_embeddings")).unwrap_or(true);
    config.with("tie_word_embeddings", false).with("scale_decoder_outputs", scales)
}

fn named(config: &Config, name: &str) -> Result<Activation> {
    activation(&config.clone().with("feed_forward_proj", name), "feed_forward_proj", name)
}

fn attention_weights(
    weights: &mut WeightList,
    module: &str,
    width: usize,
    inner: usize,
    layer: Option<usize>,
) {
    for (name, role) in [("q", Role::Query), ("k", Role::Key), ("v", Role::Value)] {
        weights.linear(&format!("{module}.{name}"), [inner, width], false, role, layer);
    }
    weights.linear(&format!("{module}.o"), [width, inner], false, Role::AttentionOutput, layer);
}

impl Buckets {
    /// Returns the bucket of a key `distance` tokens behind (positive) or before the query.
    fn of(self, distance: i64, both_ways: bool) -> u32 {
        let (count, offset, distance) = if both_ways {
            let half = self.count / 2;
            (half, if distance > 0 { half } else { 0 }, distance.unsigned_abs())
        } else {
            (self.count, 0, distance.min(0).unsigned_abs())
        };
        let exact = count / 2;
        let distance = distance as usize;
        let within = if distance < exact {
            distance
        } else {
            // In the width the published models were trained with.
            let far = (distance as f32 / exact as f32).ln()
                / (self.max_distance as f64 / exact as f64).ln() as f32
                * (count - exact) as f32;
            (exact + far as usize).min(count - 1)
        };
        (offset + within) as u32
    }
}

/// Counts the tokens of the encoder's side of each document, which end at its first start token; a
/// piece that continues a document has none.
///
/// # Errors
/// [`Error::Input`] for a document without two sides, or with something to learn on the first.
fn sources(batch: &Batch, start: u32) -> Result<Vec<usize>> {
    let of_document = |(document, span): (usize, Range<usize>)| {
        let tokens = &batch.tokens[span.clone()];
        let begins = batch.positions.get(span.start).is_some_and(|position| *position == 0);
        let source = match (begins, tokens.iter().position(|token| *token == start)) {
            (false, _) => 0,
            (true, Some(place)) if place > 0 => place,
            (true, found) => {
                let row = batch.rows.get(document).copied().unwrap_or(document);
                return Err(Error::Input {
                    what: format!("row {row} does not have two sides"),
                    expected: format!(
                        "tokens for the encoder, then the decoder's start token {start}"
                    ),
                    found: match found {
                        Some(_) => "nothing before the start token".to_owned(),
                        None => "no start token".to_owned(),
                    },
                    help: "give rows of prompt and completion, or decoder_input_ids".to_owned(),
                });
            }
        };
        let border = span.start + source;
        if batch.targets[span.start..border].iter().any(Option::is_some) {
            return Err(Error::Input {
                what: "a token of the encoder's side is to be learned".to_owned(),
                expected: "learned tokens behind the decoder's start token".to_owned(),
                found: "one before it".to_owned(),
                help: "set loss_on = \"completion\"".to_owned(),
            });
        }
        Ok(source)
    };
    batch.spans.iter().enumerate().map(of_document).collect()
}

impl Sides {
    /// Parts the states of each document; a method's virtual tokens are read by the encoder.
    fn of(pass: &Pass<'_>, start: u32) -> Result<Self> {
        let batch = pass.batch();
        let (mut encoder, mut decoder) = (Vec::new(), Vec::new());
        let (mut read, mut written) = (Vec::new(), Vec::new());
        let documents = batch.spans.iter().zip(pass.spans().iter());
        for ((tokens, rows), source) in documents.zip(sources(batch, start)?) {
            let source = source + (rows.len() - tokens.len());
            let border = rows.start + source;
            encoder.extend((rows.start..border).map(|row| row as i32));
            decoder.extend((border..rows.end).map(|row| row as i32));
            read.push(source);
            written.push(rows.end - border);
        }
        let mut order = vec![0; encoder.len() + decoder.len()];
        for (place, row) in encoder.iter().chain(&decoder).enumerate() {
            order[*row as usize] = place as i32;
        }
        Ok(Self {
            encoder: Side { rows: encoder, spans: Spans::from_lengths(read) },
            decoder: Side { rows: decoder, spans: Spans::from_lengths(written) },
            order,
        })
    }

    /// Puts the states of both sides back into their order; a side without rows is left out.
    fn join(&self, encoder: Option<Tensor<2>>, decoder: Option<Tensor<2>>) -> Tensor<2> {
        let parts: Vec<Tensor<2>> = encoder.into_iter().chain(decoder).collect();
        let all = Tensor::cat(parts, 0);
        pick(&all, &self.order)
    }
}

impl Side {
    fn states(&self, x: &Tensor<2>) -> Option<Tensor<2>> {
        (!self.rows.is_empty()).then(|| pick(x, &self.rows))
    }
}

/// Returns rows of `x`.
fn pick(x: &Tensor<2>, rows: &[i32]) -> Tensor<2> {
    let index = TensorData::new(rows.to_vec(), [rows.len()]);
    let index = Tensor::<1, Int>::from_data(index, &x.device().inner());
    x.clone().select(0, index)
}

impl T5Model {
    fn norm(&self, pass: &mut Pass<'_>, module: &str, x: Tensor<2>) -> Result<Tensor<2>> {
        pass.rms_norm(module, x, self.epsilon, 0.0)
    }

    /// Computes what the relative positions add to the scores.
    ///
    /// # Shapes
    /// - returns: `[heads, queries, keys]`
    fn position_bias(
        &self,
        pass: &mut Pass<'_>,
        side: &str,
        queries: usize,
        keys: usize,
    ) -> Result<Tensor<3>> {
        let both_ways = side == "encoder";
        let ids: Vec<u32> = (0..queries)
            .flat_map(|t| {
                let place = (t + keys - queries) as i64;
                (0..keys).map(move |key| self.buckets.of(key as i64 - place, both_ways))
            })
            .collect();
        let module = format!("{side}.block.0.layer.0.SelfAttention.relative_attention_bias");
        let bias = pass.embed(&module, &ids)?;
        Ok(bias.reshape([queries, keys, self.spec.num_heads]).permute([2, 0, 1]))
    }

    /// Computes attention, document by document, with what methods add to it.
    ///
    /// Keys of a prefix stand before the text: relative positions count them, as they do in a
    /// cache.
    ///
    /// # Shapes
    /// - `q`: `[queries, heads · head width]`
    /// - `documents`: keys and values `[keys, heads · head width]` of each document
    /// - returns: as `q`
    fn attend(
        &self,
        pass: &mut Pass<'_>,
        (index, sublayer): (usize, Sublayer),
        q: Tensor<2>,
        documents: &[(Tensor<2>, Tensor<2>)],
        queries: &Spans,
        bias_of: Option<&str>,
    ) -> Result<Tensor<2>> {
        let (heads, width) = (self.spec.num_heads, self.spec.head_width);
        let mut outputs = Vec::new();
        let prefix = pass.prefix(index, sublayer);
        let all_queries = q.clone();
        for (query, (k, v)) in queries.iter().zip(documents) {
            if query.is_empty() {
                continue;
            }
            let (k, v) = match &prefix {
                Some([first_k, first_v]) => {
                    let behind = |first: &Tensor<2>, x: &Tensor<2>| {
                        Tensor::cat(vec![first.clone(), x.clone()], 0)
                    };
                    (behind(first_k, k), behind(first_v, v))
                }
                None => (k.clone(), v.clone()),
            };
            let (rows, columns) = (query.len(), k.dims()[0]);
            let split = |x: Tensor<2>| {
                let count = x.dims()[0];
                x.reshape([count, heads, width]).swap_dims(0, 1)
            };
            let q = split(q.clone().slice_dim(0, query));
            let (k, v) = (split(k), split(v));
            // T5 does not divide the scores by the root of the width.
            let mut scores = q.matmul(k.swap_dims(1, 2));
            if let Some(side) = bias_of {
                scores = scores + self.position_bias(pass, side, rows, columns)?;
                if side == "decoder" && rows > 1 {
                    let hidden: Vec<bool> = (0..rows)
                        .flat_map(|t| (0..columns).map(move |key| key + rows > t + columns))
                        .collect();
                    let hidden = TensorData::new(hidden, [1, rows, columns]);
                    let hidden = Tensor::<3, Bool>::from_data(hidden, &scores.device().inner())
                        .expand([heads, rows, columns]);
                    scores = scores.mask_fill(hidden, f64::NEG_INFINITY);
                }
            }
            let weights = tensor_activation::softmax(scores, 2).reshape([heads * rows, columns]);
            let weights = pass.dropout(weights, self.dropout).reshape([heads, rows, columns]);
            outputs.push(weights.matmul(v).swap_dims(0, 1).reshape([rows, heads * width]));
        }
        let options = AttentionOptions {
            scale: 1.0,
            causal: bias_of == Some("decoder"),
            ..AttentionOptions::causal(heads, heads, width)
        };
        Ok(pass.changed_heads(index, sublayer, Tensor::cat(outputs, 0), &all_queries, &options))
    }

    /// Runs self-attention and its residual sum.
    fn self_attention(
        &self,
        pass: &mut Pass<'_>,
        index: usize,
        side: &str,
        block: &str,
        x: Tensor<2>,
        spans: &Spans,
    ) -> Result<Tensor<2>> {
        let module = format!("{block}.0.SelfAttention");
        let h = self.norm(pass, &format!("{block}.0.layer_norm"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::Attention, h, |pass, h| {
            let q = pass.linear(&format!("{module}.q"), h.clone())?;
            let k = pass.linear(&format!("{module}.k"), h.clone())?;
            let v = pass.linear(&format!("{module}.v"), h)?;
            let documents = if side == "decoder" {
                pass.keys_values(index, Some((k, v)), spans)?
            } else {
                let part = |x: &Tensor<2>, span| x.clone().slice_dim(0, span);
                spans.iter().map(|span| (part(&k, span.clone()), part(&v, span))).collect()
            };
            let place = (index, Sublayer::Attention);
            let heads = self.attend(pass, place, q, &documents, spans, Some(side))?;
            let heads = pass.at(Site::Heads(index, Sublayer::Attention), heads);
            pass.linear(&format!("{module}.o"), heads)
        })?;
        Ok(x + pass.dropout(h, self.dropout))
    }

    fn cross_attention(
        &self,
        pass: &mut Pass<'_>,
        index: usize,
        block: &str,
        x: Tensor<2>,
        memory: Option<Tensor<2>>,
        sides: &Sides,
    ) -> Result<Tensor<2>> {
        let module = format!("{block}.1.EncDecAttention");
        let h = self.norm(pass, &format!("{block}.1.layer_norm"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::CrossAttention, h, |pass, h| {
            let q = pass.linear(&format!("{module}.q"), h)?;
            let new = match memory {
                Some(memory) => Some((
                    pass.linear(&format!("{module}.k"), memory.clone())?,
                    pass.linear(&format!("{module}.v"), memory)?,
                )),
                None => None,
            };
            // The encoder is read once: later pieces find its keys where the first left them.
            let slot = self.spec.num_layers + index;
            let documents = pass.keys_values(slot, new, &sides.encoder.spans)?;
            let place = (index, Sublayer::CrossAttention);
            let heads = self.attend(pass, place, q, &documents, &sides.decoder.spans, None)?;
            let heads = pass.at(Site::Heads(index, Sublayer::CrossAttention), heads);
            pass.linear(&format!("{module}.o"), heads)
        })?;
        Ok(x + pass.dropout(h, self.dropout))
    }

    fn feed_forward(
        &self,
        pass: &mut Pass<'_>,
        index: usize,
        module: &str,
        x: Tensor<2>,
    ) -> Result<Tensor<2>> {
        let h = self.norm(pass, &format!("{module}.layer_norm"), x.clone())?;
        let h = pass.sublayer(index, Sublayer::FeedForward, h, |pass, h| {
            let dense = format!("{module}.DenseReluDense");
            let hidden = if self.gated {
                let gate = pass.linear(&format!("{dense}.wi_0"), h.clone())?;
                gated(gate, pass.linear(&format!("{dense}.wi_1"), h)?, self.activation)
            } else {
                activate(pass.linear(&format!("{dense}.wi"), h)?, self.activation)
            };
            let hidden = pass.dropout(hidden, self.dropout);
            let hidden = pass.at(Site::Hidden(index, Sublayer::FeedForward), hidden);
            pass.linear(&format!("{dense}.wo"), hidden)
        })?;
        Ok(x + pass.dropout(h, self.dropout))
    }
}

impl Model for T5Model {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let batch = pass.batch();
        let encoder = batch.spans.iter().zip(sources(batch, self.start)?);
        let encoder: Vec<bool> = encoder
            .flat_map(|(span, source)| (0..span.len()).map(move |place| place < source))
            .collect();
        let x = pass.embed_sides("shared", &encoder)?;
        Ok(pass.dropout(x, self.dropout))
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let sides = Sides::of(pass, self.start)?;
        let (memory, target) = (sides.encoder.states(&x), sides.decoder.states(&x));
        let Some(decoder_index) = index.checked_sub(self.num_encoder_layers) else {
            let Some(h) = memory else { return Ok(x) };
            let block = format!("encoder.block.{index}.layer");
            let h = self.self_attention(pass, index, "encoder", &block, h, &sides.encoder.spans)?;
            let mut h = self.feed_forward(pass, index, &format!("{block}.1"), h)?;
            if index + 1 == self.num_encoder_layers {
                h = self.norm(pass, "encoder.final_layer_norm", h)?;
                h = pass.dropout(h, self.dropout);
            }
            return Ok(sides.join(Some(h), target));
        };
        let Some(h) = target else { return Ok(x) };
        let block = format!("decoder.block.{decoder_index}.layer");
        let h = self.self_attention(pass, index, "decoder", &block, h, &sides.decoder.spans)?;
        let h = self.cross_attention(pass, index, &block, h, memory.clone(), &sides)?;
        let h = self.feed_forward(pass, index, &format!("{block}.2"), h)?;
        Ok(sides.join(memory, Some(h)))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let x = self.norm(pass, "decoder.final_layer_norm", x)?;
        let mut x = pass.dropout(x, self.dropout);
        if self.scales_output {
            x = x.mul_scalar((self.spec.width as f64).sqrt().recip());
        }
        Ok(Output::States(pass.at(Site::Final, x)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked out by hand from the published rule: 32 buckets, distances to 128.
    #[test]
    fn near_distances_have_a_bucket_each_and_far_ones_share() {
        let buckets = Buckets { count: 32, max_distance: 128 };
        // Both ways: 16 a side, 8 of them exact; 8 + floor(ln(16 / 8) / ln(16) · 8) = 10.
        assert_eq!([0, -1, -7, 1, 7].map(|d| buckets.of(d, true)), [0, 1, 7, 17, 23]);
        assert_eq!([-16, 16, -500, 500].map(|d| buckets.of(d, true)), [10, 26, 15, 31]);
        // One way: 16 exact; 16 + floor(ln(2) / ln(8) · 16) = 21; nothing ahead counts.
        assert_eq!([0, -15, -32, -500, 3].map(|d| buckets.of(d, false)), [0, 15, 21, 31, 0]);
    }
}
