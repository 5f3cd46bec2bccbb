//! Five ways to ship an adapter that goes with a quantised base, and how far each moves the outputs.
//!
//! Source: Syromiatnikov, Ruvinskaya and Komleva, 2025, arXiv 2503.13988, who compare merging into
//! the unquantised base with what was trained; the five orders are those in use.
//!
//! | way | weights | note |
//! |---|---|---|
//! | attached | `Q(W)` and the adapter beside it | what QLoRA trained: the reference |
//! | merged | `W + Δ` | |
//! | merged, quantised | `Q(W + Δ)` | |
//! | dequantised, merged | `Q(W) + Δ` | attached, in exact arithmetic |
//! | dequantised, merged, quantised | `Q(Q(W) + Δ)` | rounds twice |
//!
//! `Q` is what a GGUF file of the type holds: matrices in blocks, or in F16 where a row is no whole
//! number of blocks; norms and biases as they are.

mod shift;
mod sources;

use std::path::Path;
use std::sync::Arc;

use retune_core::batch::Batch;
use retune_core::change::Changes;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::WeightSpec;
use retune_core::weights::{Packing, Stored, WeightSource, Weights};
use retune_files::Dtype;
use retune_files::ggml::BlockType;
use retune_methods::adapter::Adapter;

pub use shift::Shift;
use shift::{Answers, answers, shift};
use sources::{Quantised, block_type};

use crate::card::{
    Derived, Outputs, check_card_free, derived_card, with_measured, with_origins, write_card,
};
use crate::error::{Error, Result};
use crate::export::{Beside, check_mergeable, merged, write_gguf, write_weights};
use crate::merged::Merged;
use crate::open::{Opened, check_base};
use crate::prepare::Prepared;

/// One way to ship.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The quantised base and the adapter beside it.
    Attached,
    /// Merged into the unquantised base.
    Merged,
    /// Merged into the unquantised base, then quantised.
    MergedQuantised,
    /// Merged into the base after it was quantised and dequantised.
    DequantisedMerged,
    /// The same, quantised again.
    DequantisedMergedQuantised,
}

impl Way {
    /// All ways, the reference first.
    pub const ALL: [Self; 5] = [
        Self::Attached,
        Self::Merged,
        Self::MergedQuantised,
        Self::DequantisedMerged,
        Self::DequantisedMergedQuantised,
    ];

    /// Returns its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Merged => "merged",
            Self::MergedQuantised => "merged-quantised",
            Self::DequantisedMerged => "dequantised-merged",
            Self::DequantisedMergedQuantised => "dequantised-merged-quantised",
        }
    }

    /// Tells whether it begins with the base as it was before it was quantised.
    const fn needs_unquantised(self) -> bool {
        matches!(self, Self::Merged | Self::MergedQuantised)
    }

    /// Tells whether what comes out is quantised.
    const fn is_quantised(self) -> bool {
        matches!(self, Self::MergedQuantised | Self::DequantisedMergedQuantised)
    }
}

/// A base and an adapter that were opened to be shipped.
#[derive(Debug)]
pub struct Shipping<'a> {
    base: &'a Opened,
    adapter: Adapter,
    path: &'a Path,
    kind: BlockType,
}

impl<'a> Shipping<'a> {
    /// Opens an adapter for a base.
    ///
    /// # Errors
    /// If it is of another base, or changes states, which cannot be merged.
    pub fn open(base: &'a Opened, path: &'a Path, kind: BlockType, force: bool) -> Result<Self> {
        let adapter = Adapter::read(path)?;
        check_base(path, &adapter, base, force)?;
        Ok(Self { base, adapter, path, kind })
    }

    /// Lists the ways there are: without an unquantised base, those that begin with it are not.
    pub fn ways(&self) -> Vec<Way> {
        let spec = self.base.checkpoint.model.spec();
        let source = &self.base.checkpoint.source;
        // Only reading tells; damage shows when the way is measured.
        let in_blocks = |w: &WeightSpec| matches!(source.read(&w.name), Ok(Stored::Blocks(..)));
        let quantised = spec.linears().next().is_some_and(in_blocks);
        Way::ALL.into_iter().filter(|way| !(quantised && way.needs_unquantised())).collect()
    }

    /// Measures every way on the labelled positions of batches, `num_positions` at most.
    ///
    /// The model is opened once per way, one after the other.
    ///
    /// # Errors
    /// If there is no labelled position, or a weight cannot be quantised.
    pub fn measure(&self, batches: &[Batch], num_positions: usize) -> Result<Vec<Shift>> {
        let mut reference: Option<Answers> = None;
        let mut shifts = Vec::new();
        for way in self.ways() {
            let answers = self.with(way, |tuned| answers(tuned, batches, num_positions))?;
            let first = reference.as_ref().unwrap_or(&answers);
            shifts.push(shift(way, first, &answers, self.bytes(way)));
            if reference.is_none() {
                reference = Some(answers);
            }
        }
        Ok(shifts)
    }

    /// Writes one way: a Hugging Face folder where it is not quantised, else a GGUF file with its
    /// card beside it. The card says what was measured: `shifts`, on `prepared`'s rows.
    ///
    /// # Errors
    /// For the attached adapter, which is nothing new to write; if the way is not there; if the
    /// card of a file would be written over another text; if the disk is full.
    pub fn write(
        &self,
        way: Way,
        shifts: &[Shift],
        prepared: &Prepared,
        output: &Path,
    ) -> Result<()> {
        let refuse = |what: &str, help: &str| {
            Err(Error::Core(retune_core::Error::Unsupported {
                what: what.to_owned(),
                help: help.to_owned(),
            }))
        };
        if way == Way::Attached {
            return refuse(
                "writing an adapter beside its base as one model",
                "write the base with `retune export --format gguf-…`, the adapter with `--format \
                 gguf-lora`",
            );
        }
        if !self.ways().contains(&way) {
            return refuse(
                &format!("`{}` of a base that is quantised already", way.name()),
                "give the base as it was before it was quantised",
            );
        }
        // Without its last rounding, so that the writer rounds once.
        let unrounded = match way {
            Way::MergedQuantised => Way::Merged,
            Way::DequantisedMergedQuantised => Way::DequantisedMerged,
            other => other,
        };
        let card = self.card(way, shifts, prepared, output);
        let tokenizer = prepared.tokenizer.as_ref();
        self.with(unrounded, |tuned| {
            if way.is_quantised() {
                let name = output.file_stem().map(|name| name.to_string_lossy().into_owned());
                let name = name.unwrap_or_default();
                let checkpoint = &self.base.checkpoint;
                let Some(tokenizer) = tokenizer else {
                    return refuse(
                        "a GGUF file of a model that reads no text",
                        "write a way that is not quantised",
                    );
                };
                check_card_free(output)?;
                write_gguf(tuned, checkpoint, tokenizer, self.kind, &name, output)?;
                return write_card(output, &card);
            }
            let spec = tuned.model.spec();
            let beside = Beside::of(&self.base.checkpoint.path, tokenizer)?;
            write_weights(&[tuned], spec, &beside, Dtype::F32, &card, output, |weight| {
                merged(tuned, weight)
            })
        })
    }

    fn card(&self, way: Way, shifts: &[Shift], prepared: &Prepared, output: &Path) -> String {
        let recipe = &prepared.recipe;
        let mut facts = vec![
            ("base", format!("`{}`", recipe.model)),
            ("adapter", format!("`{}`", self.path.display())),
            ("way", way.name().to_owned()),
            ("base quantised as", self.kind.to_string()),
        ];
        let title = output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
        let shift = shifts.iter().find(|shift| shift.way == way);
        if let Some(shift) = shift {
            let nats = |value: f64| format!("{value:.3e} nats a position");
            facts.extend([
                ("divergence from the attached adapter", nats(shift.divergence)),
                ("the largest", nats(shift.largest)),
                ("same likeliest answer", format!("{:.2} %", 100.0 * shift.agreement)),
            ]);
        }
        let card = derived_card(&Derived {
            library: if way.is_quantised() { "gguf" } else { "transformers" },
            base: Some(&recipe.model),
            tag: "merged",
            title: &title,
            summary: "A model with an adapter merged in.",
            facts: &facts,
        });
        let data = recipe.data.train.display().to_string();
        let card = match shift {
            Some(shift) => with_measured(&card, &title, &data, &[("loss", shift.loss)]),
            None => card,
        };
        with_origins(&card, &[self.path.to_path_buf()], Outputs::Moved)
    }

    /// Opens the weights of a way and lends them with their changes.
    fn with<T>(&self, way: Way, work: impl FnOnce(&Tuned<'_>) -> Result<T>) -> Result<T> {
        let spec = self.base.checkpoint.model.spec();
        let base = Arc::clone(&self.base.checkpoint.source);
        let source: Arc<dyn WeightSource> = if way.needs_unquantised() {
            base
        } else {
            Arc::new(Quantised { inner: base, spec: Arc::clone(spec), kind: self.kind })
        };
        let model = self.base.checkpoint.model.as_ref();
        let (weights, changes, parameters) = self.attach(source)?;
        let tuned = Tuned { model, weights: &weights, changes: &changes, parameters: &parameters };
        if way == Way::Attached {
            return work(&tuned);
        }
        check_mergeable(&tuned)?;
        let mut source: Arc<dyn WeightSource> =
            Arc::new(Merged { weights, changes, parameters, path: self.path.to_path_buf() });
        if way.is_quantised() {
            source = Arc::new(Quantised { inner: source, spec: Arc::clone(spec), kind: self.kind });
        }
        let device = self.base.weights.device();
        let weights = Weights::new(source, Arc::clone(spec), Packing::default(), device)?;
        let (changes, parameters) = (Changes::default(), Parameters::new(device));
        work(&Tuned { model, weights: &weights, changes: &changes, parameters: &parameters })
    }

    fn attach(&self, source: Arc<dyn WeightSource>) -> Result<(Weights, Changes, Parameters)> {
        let spec = Arc::clone(self.base.checkpoint.model.spec());
        let device = self.base.weights.device();
        let weights = Weights::new(source, spec, Packing::default(), device)?;
        let mut parameters = Parameters::new(device);
        let changes = self.adapter.method()?.attach(&weights, &mut parameters, Seed(0))?;
        self.adapter.fill(self.path, &mut parameters)?;
        Ok((weights, changes, parameters))
    }

    /// Counts the bytes of the weights, as GGUF or as F16 where they are not quantised.
    fn bytes(&self, way: Way) -> u64 {
        let weights = &self.base.checkpoint.model.spec().weights;
        let quantised =
            |w: &WeightSpec| block_type(w, self.kind).bytes_for(w.count()).unwrap_or(0) as u64;
        let adapter = self.adapter.tensors.values().map(|(_, v)| 4 * v.len() as u64).sum::<u64>();
        match way {
            Way::Attached => weights.iter().map(quantised).sum::<u64>() + adapter,
            way if way.is_quantised() => weights.iter().map(quantised).sum(),
            _ => weights.iter().map(|w| 2 * w.count() as u64).sum(),
        }
    }
}
