//! The tiny models methods are tried on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_core::batch::{Batch, Document, IMAGE};
use retune_core::kernels::matrix::Form;
use retune_core::model::Model;
use retune_core::random::Seed;
use retune_core::spec::{Head, ModelSpec};
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_files::ggml::BlockType;
use retune_models::config::Config;
use retune_testkit::tiny::{MemorySource, configs, image_configs, sided_configs};
use serde_json::Value;
use tensor::Device;

use crate::case::Failed;

/// One tiny model with random weights.
#[derive(Debug)]
pub struct Subject {
    /// What failures call it.
    pub name: &'static str,
    /// The architecture.
    pub model: Box<dyn Model>,
    /// Its weights.
    pub source: Arc<dyn WeightSource>,
    /// How frozen matrices are kept.
    pub packing: Packing,
}

/// Shapes that differ in what methods trip over: an untied head, a tied head with offset norms and
/// short windows, transposed weights with biases, an encoder with classes, one of pictures, two towers,
/// an encoder with a decoder.
const KINDS: &[&str] = &["llama", "gemma3", "gpt2", "bert classes", "vit classes", "clip", "t5"];

/// Makes the models every method is tried on.
///
/// # Errors
/// If a configuration cannot be built.
pub fn subjects() -> Result<Vec<Subject>, Failed> {
    KINDS.iter().map(|name| Subject::new(name, config(name)?)).collect()
}

fn config(name: &str) -> Result<Value, Failed> {
    let all = configs().into_iter().chain(image_configs()).chain(sided_configs());
    let found = all.into_iter().find(|(known, _)| *known == name);
    found.map(|(_, config)| config).ok_or_else(|| Failed(format!("no tiny model `{name}`")))
}

impl Subject {
    /// Builds a model with random weights.
    ///
    /// # Errors
    /// If the configuration cannot be built.
    pub fn new(name: &'static str, config: Value) -> Result<Self, Failed> {
        let model = retune_models::build(&Config::new(Path::new("config.json"), config))?;
        let source = Arc::new(MemorySource::random(model.spec(), Seed(11)));
        Ok(Self { name, model, source, packing: Packing::default() })
    }

    /// Builds a llama-shaped model of width 32 whose matrices lie in Q8_0 blocks.
    ///
    /// # Errors
    /// If the configuration cannot be built.
    pub fn quantized() -> Result<Self, Failed> {
        let mut config = config("llama")?;
        for (key, value) in [("hidden_size", 32), ("intermediate_size", 64), ("head_dim", 8)] {
            config[key] = value.into();
        }
        let mut subject = Self::new("llama in Q8_0", config)?;
        subject.source = Arc::new(Quantized::new(subject.model.spec(), &*subject.source)?);
        subject.packing = Packing { form: Form::F32, keep_blocks: true, ..Packing::default() };
        Ok(subject)
    }

    /// Describes the model.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        self.model.spec()
    }

    /// Opens the frozen weights.
    ///
    /// # Errors
    /// If they do not fit the model.
    pub fn weights(&self) -> Result<Weights, Failed> {
        let spec = Arc::clone(self.spec());
        Ok(Weights::new(Arc::clone(&self.source), spec, self.packing, &Device::flex())?)
    }

    /// Draws documents of the given lengths, each with something to learn.
    pub fn documents(&self, purpose: &str, lengths: &[usize]) -> Vec<Document> {
        let spec = self.spec();
        let classes = match &spec.head {
            Head::Classes { labels } => labels.len(),
            _ => 0,
        };
        let draw = |(row, length): (usize, &usize)| {
            let mut random = Seed(5).stream(purpose, &[row as u64]);
            let mut tokens = Vec::new();
            let mut pixels = Vec::new();
            if let Some(image) = spec.image() {
                tokens = vec![IMAGE; image.num_tokens()];
                pixels = vec![0.0; image.num_values()];
                random.fill_normal(&mut pixels, 1.0);
            }
            if spec.vocabulary > 0 {
                tokens.extend((0..*length).map(|_| random.below(spec.vocabulary) as u32));
            }
            if spec.head == Head::Pairs {
                // The last token of the vocabulary is the end token.
                tokens.push(spec.vocabulary as u32 - 1);
            }
            // The first token that is learned; an encoder's side and the start token are not.
            let mut first = 1;
            if let Some(start) = spec.decoder_start() {
                first = tokens.len() / 2;
                tokens
                    .iter_mut()
                    .take(first)
                    .filter(|token| **token == start)
                    .for_each(|t| *t += 1);
                tokens.insert(first, start);
                first += 1;
            }
            let learn =
                (0..tokens.len()).map(|place| place >= first && pixels.is_empty()).collect();
            Document {
                pixels,
                tokens,
                learn,
                token_types: None,
                class: (classes > 0).then(|| random.below(classes.max(1)) as u32),
                task: None,
                row,
            }
        };
        lengths.iter().enumerate().map(draw).collect()
    }

    /// Draws a batch of two documents.
    ///
    /// # Errors
    /// Never, for documents with tokens.
    pub fn batch(&self, purpose: &str) -> Result<Batch, Failed> {
        Ok(Batch::new(&self.documents(purpose, &[7, 11]))?)
    }
}

/// Matrices in Q8_0 blocks, vectors as they are.
#[derive(Debug)]
struct Quantized {
    plain: MemorySource,
    blocks: BTreeMap<String, Arc<Vec<u8>>>,
}

impl Quantized {
    fn new(spec: &ModelSpec, source: &dyn WeightSource) -> Result<Self, Failed> {
        let mut found = Self { plain: MemorySource::default(), blocks: BTreeMap::new() };
        for weight in &spec.weights {
            let Stored::Values(values) = source.read(&weight.name)? else { continue };
            if weight.is_linear() {
                let kind = BlockType::Q8_0;
                let mut bytes = vec![0; kind.bytes_for(values.len())?];
                kind.quantize(&values, &mut bytes)?;
                found.blocks.insert(weight.name.clone(), Arc::new(bytes));
            }
            found.plain.insert(&weight.name, &weight.shape, values);
        }
        Ok(found)
    }
}

impl WeightSource for Quantized {
    fn names(&self) -> Vec<String> {
        self.plain.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.plain.shape(name)
    }

    fn stored_bytes(&self, name: &str) -> Option<u64> {
        self.blocks.get(name).map(|bytes| bytes.len() as u64)
    }

    fn read(&self, name: &str) -> retune_core::Result<Stored> {
        match self.blocks.get(name) {
            Some(bytes) => Ok(Stored::Blocks(BlockType::Q8_0, Arc::clone(bytes) as _)),
            None => self.plain.read(name),
        }
    }
}
