//! CLIP: a tower for images and one for texts, whose vectors lie in one space.
//!
//! A document holds an image, a text, or both. Blocks are counted through: those of the images
//! first. States of both towers lie in one tensor, in the batch's order, as wide as the wider
//! tower; a block of one tower leaves the rows of the other alone, and sites see its own rows in
//! its own width.

use std::sync::Arc;

use crate::config::Config;
use crate::heads::{Classes, unit_rows};
use crate::tower::{Names, Stack, Usual, image, lay_images};
use crate::weight_list::WeightList;
use retune_core::batch::Batch;
use retune_core::kernels::Spans;
use retune_core::model::{Model, Output, Pairs};
use retune_core::pass::{Pass, select};
use retune_core::site::Site;
use retune_core::spec::{Head, ModelSpec, Role, Tower};
use retune_core::{Error, Result};
use tensor::Tensor;

/// The classes of CLIP.
pub(crate) const CLIP: Classes =
    Classes { language: "", classifier: "", bare: "CLIPModel", prefix: "" };

const NAMES: Names = Names {
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    attention_output: "self_attn.out_proj",
    up: "mlp.fc1",
    down: "mlp.fc2",
    norms: ["layer_norm1", "layer_norm2"],
};

const USUAL_VISION: Usual = Usual {
    width: 768,
    inner: 3072,
    layers: 12,
    heads: 12,
    activation: "quick_gelu",
    epsilon: 1e-5,
};

const USUAL_TEXT: Usual = Usual { width: 512, inner: 2048, heads: 8, ..USUAL_VISION };

/// The end token's number in checkpoints older than the key for it.
const LEGACY_END: u32 = 2;

/// A CLIP.
#[derive(Debug)]
pub(crate) struct Clip {
    spec: Arc<ModelSpec>,
    vision: Stack,
    text: Stack,
    /// The token whose state stands for a text.
    end: u32,
}

/// Which rows of a batch belong to one tower.
struct Side {
    rows: Vec<usize>,
    spans: Spans,
}

/// Which rows of a batch belong to which tower.
struct Sides {
    images: Side,
    texts: Side,
    /// Places of the batch's rows when all images' rows come first.
    order: Vec<usize>,
}

/// Builds a CLIP.
///
/// # Errors
/// If a number is missing or impossible, or a feature is unknown.
pub(crate) fn clip(config: &Config) -> Result<Box<dyn Model>> {
    let (class, _) = CLIP.read(config)?;
    let part = |key: &str| Ok::<_, Error>(config.part(key)?.unwrap_or_else(|| config.emptied()));
    let (of_vision, of_text) = (part("vision_config")?, part("text_config")?);
    let image = image(&of_vision, 32)?;
    let vision = "vision_model.encoder.layers";
    let vision = Stack::read(&of_vision, vision, NAMES, 0, false, USUAL_VISION)?;
    let first = vision.num_layers;
    let text = "text_model.encoder.layers";
    let text = Stack::read(&of_text, text, NAMES, first, true, USUAL_TEXT)?;
    let vocabulary = of_text.optional_side("vocab_size")?.unwrap_or(49408);
    let positions = of_text.optional_side("max_position_embeddings")?.unwrap_or(77);
    let end = of_text.optional_token("eos_token_id")?.unwrap_or(49407);
    let shared = config.optional_side("projection_dim")?.unwrap_or(512);

    let mut weights = WeightList::default();
    let module = "vision_model.embeddings";
    let width = vision.width;
    weights.constant(&format!("{module}.class_embedding"), &[width], Role::ClassToken);
    let kernel = [width, image.channels, image.patch[0], image.patch[1]];
    weights.convolution(&format!("{module}.patch_embedding"), kernel, false);
    let places = format!("{module}.position_embedding");
    weights.embedding(&places, image.num_tokens(), width, Role::Position);
    weights.norm("vision_model.pre_layrnorm", width, true, None);
    vision.list(&mut weights);
    weights.norm("vision_model.post_layernorm", width, true, None);
    let module = "text_model.embeddings";
    weights.embedding(
        &format!("{module}.token_embedding"),
        vocabulary,
        text.width,
        Role::Embedding,
    );
    let places = format!("{module}.position_embedding");
    weights.embedding(&places, positions, text.width, Role::Position);
    text.list(&mut weights);
    weights.norm("text_model.final_layer_norm", text.width, true, None);
    weights.linear("visual_projection", [shared, width], false, Role::Projection, None);
    weights.linear("text_projection", [shared, text.width], false, Role::Projection, None);
    weights.constant("logit_scale", &[], Role::LogitScale);

    let num_layers = first + text.num_layers;
    let wider = if vision.width >= text.width { &vision } else { &text };
    let spec = ModelSpec {
        architecture: "clip".to_owned(),
        class: class.to_owned(),
        num_layers,
        width: wider.width,
        inner_width: wider.inner,
        num_heads: wider.heads,
        num_key_heads: wider.heads,
        head_width: wider.width / wider.heads,
        vocabulary,
        max_positions: positions,
        causal: false,
        towers: vec![
            Tower { layers: 0..first, width: vision.width, image: Some(image) },
            Tower { layers: first..num_layers, width: text.width, image: None },
        ],
        weights: weights.0,
        head: Head::Pairs,
        config: config.value().clone(),
    };
    Ok(Box::new(Clip { spec: Arc::new(spec), vision, text, end }))
}

impl Sides {
    fn of(batch: &Batch) -> Self {
        let (mut images, mut texts) = (Vec::new(), Vec::new());
        let (mut of_images, mut of_texts) = (Vec::new(), Vec::new());
        for span in batch.spans.iter() {
            let [image, text] = batch.sides(span.clone());
            let border = span.start + image;
            images.extend(span.start..border);
            texts.extend(border..span.end);
            of_images.extend((image > 0).then_some(image));
            of_texts.extend((text > 0).then_some(text));
        }
        let mut order = vec![0; images.len() + texts.len()];
        for (place, row) in images.iter().chain(&texts).enumerate() {
            order[*row] = place;
        }
        let side = |rows, lengths: Vec<usize>| Side { rows, spans: Spans::from_lengths(lengths) };
        Self { images: side(images, of_images), texts: side(texts, of_texts), order }
    }

    /// Puts the states of both towers back into the batch's order, as wide as the wider.
    fn join(&self, images: Option<Tensor<2>>, texts: Option<Tensor<2>>, width: usize) -> Tensor<2> {
        let widened = |x: Tensor<2>| {
            let [rows, own] = x.dims();
            if own == width {
                return x;
            }
            let rest = Tensor::zeros([rows, width - own], &x.device().inner());
            Tensor::cat(vec![x, rest], 1)
        };
        let parts: Vec<Tensor<2>> = images.into_iter().chain(texts).map(widened).collect();
        select(Tensor::cat(parts, 0), &self.order)
    }
}

impl Side {
    /// Returns this tower's states, if the batch has something for it.
    fn states(&self, x: &Tensor<2>, width: usize) -> Option<Tensor<2>> {
        if self.rows.is_empty() {
            return None;
        }
        let rows = select(x.clone(), &self.rows);
        Some(if rows.dims()[1] == width { rows } else { rows.narrow(1, 0, width) })
    }

    fn tokens(&self, batch: &Batch) -> Vec<u32> {
        self.rows.iter().map(|row| batch.tokens[*row]).collect()
    }

    fn positions(&self, batch: &Batch) -> Vec<u32> {
        self.rows.iter().map(|row| batch.positions[*row] as u32).collect()
    }
}

impl Clip {
    /// Returns the row of each text whose state stands for it: that of the first end token.
    fn ends(&self, texts: &Side, batch: &Batch) -> Result<Vec<usize>> {
        let tokens = texts.tokens(batch);
        let end_of = |span: std::ops::Range<usize>| {
            let text = &tokens[span.clone()];
            let end = if self.end == LEGACY_END {
                text.iter().max().copied().unwrap_or_default()
            } else {
                self.end
            };
            let place = text.iter().position(|token| *token == end);
            place.map(|place| span.start + place).ok_or_else(|| Error::Input {
                what: "a text has no end token".to_owned(),
                expected: format!("token {end} behind every text"),
                found: format!("{} tokens without it", text.len()),
                help: "use the tokenizer beside the weights, and a longer `data.max_length` where \
                       the text was cut"
                    .to_owned(),
            })
        };
        texts.spans.iter().map(end_of).collect()
    }
}

impl Model for Clip {
    fn spec(&self) -> &Arc<ModelSpec> {
        &self.spec
    }

    fn embed(&self, pass: &mut Pass<'_>) -> Result<Tensor<2>> {
        let batch = pass.batch();
        let sides = Sides::of(batch);
        let mut images = None;
        if !sides.images.rows.is_empty() {
            let module = "vision_model.embeddings";
            let (patches, class) =
                (format!("{module}.patch_embedding"), format!("{module}.class_embedding"));
            let x = lay_images(pass, &patches, &class, self.vision.width)?;
            let places = sides.images.positions(batch);
            let x = x + pass.embed(&format!("{module}.position_embedding"), &places)?;
            images = Some(pass.layer_norm("vision_model.pre_layrnorm", x, self.vision.epsilon)?);
        }
        let mut texts = None;
        if !sides.texts.rows.is_empty() {
            let module = "text_model.embeddings";
            let tokens = sides.texts.tokens(batch);
            let x = pass.embed(&format!("{module}.token_embedding"), &tokens)?;
            let places = sides.texts.positions(batch);
            texts = Some(x + pass.embed(&format!("{module}.position_embedding"), &places)?);
        }
        Ok(sides.join(images, texts, self.spec.width))
    }

    fn block(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        // The sites of a block lie inside, where only its own tower's rows are.
        self.layer(pass, index, x)
    }

    fn layer(&self, pass: &mut Pass<'_>, index: usize, x: Tensor<2>) -> Result<Tensor<2>> {
        let sides = Sides::of(pass.batch());
        let mut images = sides.images.states(&x, self.vision.width);
        let mut texts = sides.texts.states(&x, self.text.width);
        let (stack, spans, states) = if index < self.vision.num_layers {
            (&self.vision, &sides.images.spans, &mut images)
        } else {
            (&self.text, &sides.texts.spans, &mut texts)
        };
        let Some(h) = states.take() else { return Ok(x) };
        let h = pass.at(Site::LayerInput(index), h);
        let h = stack.layer(pass, index, h, Some(spans))?;
        *states = Some(pass.at(Site::LayerOutput(index), h));
        Ok(sides.join(images, texts, self.spec.width))
    }

    fn finish(&self, pass: &mut Pass<'_>, x: Tensor<2>) -> Result<Output> {
        let batch = pass.batch();
        let sides = Sides::of(batch);
        let images = sides.images.states(&x, self.vision.width);
        let texts = sides.texts.states(&x, self.text.width);
        let (Some(images), Some(texts)) = (images, texts) else {
            return Err(Error::Input {
                what: "there is nothing to compare".to_owned(),
                expected: "at least one image and one text in a batch".to_owned(),
                found: "only one of the two".to_owned(),
                help: "give rows of images with texts, or a prompt for every class".to_owned(),
            });
        };
        let images = pass.layer_norm("vision_model.post_layernorm", images, self.vision.epsilon)?;
        let texts = pass.layer_norm("text_model.final_layer_norm", texts, self.text.epsilon)?;
        let x = pass.at(Site::Final, sides.join(Some(images), Some(texts), self.spec.width));
        let first: Vec<usize> = sides.images.spans.iter().map(|span| span.start).collect();
        let ends = self.ends(&sides.texts, batch)?;
        let vectors = |side: &Side, width: usize, rows: &[usize]| {
            side.states(&x, width).map(|states| select(states, rows))
        };
        let (Some(images), Some(texts)) = (
            vectors(&sides.images, self.vision.width, &first),
            vectors(&sides.texts, self.text.width, &ends),
        ) else {
            unreachable!("both sides have rows")
        };
        Ok(Output::Pairs(Box::new(Pairs {
            images: unit_rows(pass.linear("visual_projection", images)?),
            texts: unit_rows(pass.linear("text_projection", texts)?),
            scale: pass.constant("logit_scale", 1)?.exp(),
        })))
    }
}
