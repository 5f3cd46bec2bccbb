//! Rows of the data as batches: splits, order, packing.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::recipe::{DataOptions, LossOn, OnLong};
use retune_core::batch::{Batch, Document};
use retune_core::random::Seed;
use retune_data::dataset::{Dataset, Keep};
use retune_data::labels::{Label, Labels};
use retune_data::order::{Held, Order, split};
use retune_data::pack::{PackedRow, pack, unpacked};
use retune_data::prepare::{PrepareOptions, Preparer, TokenRow, TooLong};
use retune_data::read::{ReadOptions, RowFile};
use retune_data::shape::{Shape, ShapeOptions, Shaper};
use retune_data::template::{ChatTemplate, Date, TemplateSettings};
use retune_data::tokenizer::Tokenizer;
use retune_train::training::BatchSource;

/// Rows of larger files are read and tokenised again whenever they are needed.
const IN_MEMORY_BYTES: u64 = 1 << 30;

/// The three sets of rows a run works with.
#[derive(Debug)]
pub struct Splits {
    /// What is learned.
    pub train: Subset,
    /// What the run is steered by.
    pub validation: Option<Subset>,
    /// What is only measured.
    pub test: Option<Subset>,
}

/// Some rows of a prepared file.
#[derive(Debug, Clone)]
pub struct Subset {
    /// The prepared file.
    pub dataset: std::sync::Arc<Dataset>,
    /// Which of its rows.
    pub rows: Vec<usize>,
}

impl Subset {
    /// Returns a row as a document of a batch.
    ///
    /// # Errors
    /// If rows are kept on disk and the file changed.
    pub fn document(&self, place: usize) -> retune_data::Result<Document> {
        let row = self.dataset.row(self.rows[place])?;
        Ok(document(row))
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the tokens of each row, in order.
    pub fn lengths(&self) -> impl Iterator<Item = u64> {
        self.rows.iter().map(|row| u64::from(self.dataset.lengths()[*row]))
    }

    /// Lays at most `limit` rows into batches of at most `budget` tokens.
    ///
    /// # Errors
    /// If rows are kept on disk and the file changed.
    pub fn batches(&self, limit: usize, budget: usize) -> Result<Vec<Batch>> {
        let mut batches = Vec::new();
        let (mut waiting, mut tokens) = (Vec::new(), 0);
        for place in 0..self.len().min(limit) {
            let document = self.document(place)?;
            if tokens + document.tokens.len() > budget && !waiting.is_empty() {
                batches.push(Batch::new(&waiting)?);
                waiting.clear();
                tokens = 0;
            }
            tokens += document.tokens.len();
            waiting.push(document);
        }
        if !waiting.is_empty() {
            batches.push(Batch::new(&waiting)?);
        }
        Ok(batches)
    }
}

fn document(row: TokenRow) -> Document {
    Document {
        tokens: row.ids,
        learn: row.learn,
        token_types: row.token_types.map(|types| types.into_iter().map(u32::from).collect()),
        class: match row.label {
            Some(Label::Class(class)) => Some(class),
            _ => None,
        },
        row: row.source_line,
    }
}

/// Prepares files of rows for one tokenizer.
#[derive(Debug)]
pub struct Rows<'a> {
    /// The `[data]` table.
    pub options: &'a DataOptions,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Longest row in tokens.
    pub max_length: usize,
    /// The token that begins the decoder's side, for models of two sides.
    pub decoder_start: Option<u32>,
    /// The day templates print.
    pub date: Date,
    /// The run's seed.
    pub seed: Seed,
}

impl Rows<'_> {
    /// Prepares the three sets.
    ///
    /// # Errors
    /// With file and line of the first row that cannot be used, unless broken lines are skipped.
    pub fn splits(&self) -> Result<Splits> {
        let train = self.file(&self.options.train, None)?;
        let labels = train.labels().cloned();
        let train = std::sync::Arc::new(train);
        let mut all: Vec<usize> = (0..train.len()).collect();
        if self.options.limit > 0 {
            all.truncate(self.options.limit);
        }
        let other = |path: &Path| -> Result<Subset> {
            let dataset = std::sync::Arc::new(self.file(path, labels.clone())?);
            let rows = (0..dataset.len()).collect();
            Ok(Subset { dataset, rows })
        };
        let test = self.options.test.as_deref().map(other).transpose()?;
        let fraction = self.options.validation_fraction;
        let (rows, validation) = match &self.options.validation {
            Some(path) => (all, Some(other(path)?)),
            None if fraction > 0.0 && all.len() > 1 => {
                let (rows, held) = self.hold_out(&train, all, fraction)?;
                (rows, Some(Subset { dataset: train.clone(), rows: held }))
            }
            None => (all, None),
        };
        Ok(Splits { train: Subset { dataset: train, rows }, validation, test })
    }

    /// Parts rows by a seeded hash of their tokens, so that equal rows stay on one side.
    fn hold_out(
        &self,
        dataset: &Dataset,
        rows: Vec<usize>,
        fraction: f64,
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut contents = Vec::with_capacity(rows.len());
        for row in &rows {
            let ids: Vec<u64> = dataset.row(*row)?.ids.into_iter().map(u64::from).collect();
            contents.push(self.seed.stream("validation", &ids).bits());
        }
        let split = split(&contents, Held::Fraction(fraction), self.seed.0)?;
        let rows = |part: Vec<u32>| part.into_iter().map(|place| rows[place as usize]).collect();
        Ok((rows(split.train), rows(split.validation)))
    }

    fn file(&self, path: &Path, labels: Option<Labels>) -> Result<Dataset> {
        let o = self.options;
        let read = ReadOptions { skip_broken: o.skip_broken, ..ReadOptions::default() };
        let file = RowFile::open(path, &read)?;
        let shape = ShapeOptions {
            shape: None,
            columns: o.columns.clone(),
            prompt_template: o.prompt.clone(),
        };
        let sample = file.rows().take(100).collect::<retune_data::Result<Vec<_>>>()?;
        let shaper = Shaper::detect(file.path(), &sample, &shape)?;
        let prepare = PrepareOptions {
            loss_on: match o.loss_on {
                Some(LossOn::Completion) => retune_data::mask::LossOn::Completion,
                Some(LossOn::All) => retune_data::mask::LossOn::All,
                None if shaper.shape() == Shape::Text => retune_data::mask::LossOn::All,
                Some(LossOn::Assistant) | None => retune_data::mask::LossOn::Assistant,
            },
            max_tokens: self.max_length,
            too_long: match o.on_long {
                OnLong::Cut => TooLong::Cut,
                OnLong::Drop => TooLong::Drop,
                OnLong::Error => TooLong::Error,
            },
            decoder_start: self.decoder_start,
            ..PrepareOptions::default()
        };
        let preparer = Preparer::new(self.tokenizer.clone(), self.template()?, prepare)?;
        // A missing length is no reason to stop: the reader has opened the file already.
        let bytes = std::fs::metadata(path).map_or(0, |meta| meta.len());
        let keep = if bytes > IN_MEMORY_BYTES { Keep::OnDisk } else { Keep::InMemory };
        Ok(Dataset::prepare(file, &shape, preparer, labels, keep)?)
    }

    /// Compiles the tokenizer's chat template, if it has one.
    ///
    /// # Errors
    /// If it does not compile.
    fn template(&self) -> Result<Option<ChatTemplate>> {
        let settings = TemplateSettings::of(self.tokenizer, Some(self.date));
        let source = self.tokenizer.chat_template();
        Ok(source.map(|source| ChatTemplate::compile(source, settings)).transpose()?)
    }
}

/// Training batches as a function of the step alone.
#[derive(Debug, Clone)]
pub struct TrainBatches {
    subset: Subset,
    seed: Seed,
    shuffle: bool,
    /// Rows of documents, in the data's order.
    packed: Vec<Vec<usize>>,
    batch_size: usize,
    accumulation: usize,
    /// Rows of documents, by epoch; the epochs last asked for.
    epochs: BTreeMap<u64, Vec<Vec<usize>>>,
}

impl TrainBatches {
    /// Makes the batches of a subset.
    ///
    /// # Errors
    /// If a row is longer than `max_length`.
    pub fn new(
        subset: Subset,
        seed: Seed,
        options: &DataOptions,
        max_length: usize,
        batch_size: usize,
        accumulation: usize,
    ) -> Result<Self> {
        let all = subset.dataset.lengths();
        let lengths: Vec<u32> = subset.rows.iter().map(|row| all[*row]).collect();
        let rows =
            if options.packing { pack(&lengths, max_length as u32)? } else { unpacked(&lengths) };
        let places = |row: PackedRow| row.documents.into_iter().map(|d| d as usize).collect();
        Ok(Self {
            subset,
            seed,
            shuffle: options.shuffle,
            packed: rows.into_iter().map(places).collect(),
            batch_size,
            accumulation,
            epochs: BTreeMap::new(),
        })
    }

    /// Returns the number of steps of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.packed.len().div_ceil(self.batch_size * self.accumulation).max(1) as u64
    }

    /// Returns the tokens of the largest micro-batch of the first epoch.
    pub fn most_tokens(&mut self) -> u64 {
        let all = self.subset.dataset.lengths();
        let lengths: Vec<u64> = self.subset.rows.iter().map(|row| u64::from(all[*row])).collect();
        let (batch_size, per_step) = (self.batch_size, self.batch_size * self.accumulation);
        let rows = self.epoch_rows(0);
        let micro_batches = rows.chunks(per_step).flat_map(|step| step.chunks(batch_size));
        let tokens = micro_batches.map(|rows| rows.iter().flatten().map(|row| lengths[*row]).sum());
        tokens.max().unwrap_or(0)
    }

    /// Returns the rows of an epoch, each a list of documents.
    ///
    /// Packing is done once and whole rows are shuffled after that: so every epoch has the same
    /// number of steps.
    fn epoch_rows(&mut self, epoch: u64) -> &[Vec<usize>] {
        if !self.epochs.contains_key(&epoch) {
            let order = Order { rows: self.packed.len(), seed: self.seed.0, shuffle: self.shuffle };
            let rows = order.epoch(epoch).map(|row| self.packed[row].clone()).collect();
            while self.epochs.len() > 1 {
                self.epochs.pop_first();
            }
            self.epochs.insert(epoch, rows);
        }
        &self.epochs[&epoch]
    }
}

impl BatchSource for TrainBatches {
    fn micro_batches(&mut self, step: u64) -> retune_train::Result<Vec<Batch>> {
        let per_epoch = self.steps_per_epoch();
        let (epoch, within) = (step / per_epoch, (step % per_epoch) as usize);
        let (batch_size, per_step) = (self.batch_size, self.batch_size * self.accumulation);
        let rows = self.epoch_rows(epoch);
        let last = rows.len().min((within + 1) * per_step);
        let chosen: Vec<Vec<usize>> = rows[(within * per_step).min(last)..last].to_vec();
        let mut batches = Vec::new();
        for micro in chosen.chunks(batch_size) {
            let documents = micro
                .iter()
                .flatten()
                .map(|place| self.subset.document(*place))
                .collect::<retune_data::Result<Vec<_>>>()
                .map_err(|error| retune_train::Error::Data(Box::new(error)))?;
            batches.push(Batch::new(&documents)?);
        }
        Ok(batches)
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / self.steps_per_epoch() as f64
    }
}
