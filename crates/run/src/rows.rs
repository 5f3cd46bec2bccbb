//! Rows of the data as batches: splits, order, packing.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::images::{Images, Reader};
use crate::recipe::{DataOptions, LossOn, OnLong};
use retune_core::batch::{Batch, Document};
use retune_core::random::Seed;
use retune_core::spec::{ImageSpec, ModelSpec};
use retune_data::dataset::{Dataset, Keep};
use retune_data::image::set::{ImageSet, SetOptions};
use retune_data::image::transform::Transform;
use retune_data::labels::{Label, Labels};
use retune_data::order::{Held, Order, split};
use retune_data::pack::{PackedRow, pack, unpacked};
use retune_data::prepare::{PrepareOptions, Preparer, TokenRow, TooLong};
use retune_data::read::{ReadOptions, RowFile};
use retune_data::shape::{Shape, ShapeOptions, Shaper};
use retune_data::statistics::Statistics;
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

/// The prepared rows of one source.
#[derive(Debug)]
pub enum RowSet {
    /// Texts.
    Texts(Box<Dataset>),
    /// Pictures.
    Images(Box<Images>),
}

impl RowSet {
    /// Returns the texts, where that is what the rows are.
    pub fn texts(&self) -> Option<&Dataset> {
        match self {
            Self::Texts(dataset) => Some(dataset),
            Self::Images(_) => None,
        }
    }

    /// Returns the pictures, where that is what the rows are.
    pub fn images(&self) -> Option<&Images> {
        match self {
            Self::Texts(_) => None,
            Self::Images(images) => Some(images),
        }
    }

    /// Returns the number of rows.
    fn len(&self) -> usize {
        self.lengths().len()
    }

    /// Returns the tokens of each row.
    fn lengths(&self) -> &[u32] {
        match self {
            Self::Texts(dataset) => dataset.lengths(),
            Self::Images(images) => images.lengths(),
        }
    }

    /// Returns the labels of labelled rows.
    pub fn labels(&self) -> Option<&Labels> {
        match self {
            Self::Texts(dataset) => dataset.labels(),
            Self::Images(images) => images.set().labels(),
        }
    }

    /// Returns the counts.
    pub fn statistics(&self) -> &Statistics {
        match self {
            Self::Texts(dataset) => dataset.statistics(),
            Self::Images(images) => images.statistics(),
        }
    }

    /// Returns what the rows were understood to be.
    pub fn statement(&self) -> String {
        match self {
            Self::Texts(dataset) => dataset.shaper().statement().to_owned(),
            Self::Images(images) => images.statement(),
        }
    }

    /// Returns what every batch of pictures is compared with.
    fn prompts(&self, epoch: Option<u64>) -> Vec<Document> {
        self.images().map(|images| images.prompts(epoch)).unwrap_or_default()
    }
}

/// Some rows of a prepared source.
#[derive(Debug, Clone)]
pub struct Subset {
    /// The prepared source.
    pub dataset: std::sync::Arc<RowSet>,
    /// Which of its rows.
    pub rows: Vec<usize>,
}

impl Subset {
    /// Returns a row as a document of a batch: of the pass `epoch` over the data, where pictures
    /// differ from pass to pass, or as it is measured.
    ///
    /// # Errors
    /// If rows are kept on disk and the file changed.
    pub fn document(&self, place: usize, epoch: Option<u64>) -> retune_data::Result<Document> {
        match &*self.dataset {
            RowSet::Texts(dataset) => Ok(document(dataset.row(self.rows[place])?)),
            RowSet::Images(images) => images.document(self.rows[place], epoch),
        }
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
        let prompts = self.dataset.prompts(None);
        let (mut waiting, mut tokens) = (Vec::new(), 0);
        let mut close = |waiting: &mut Vec<Document>| -> Result<()> {
            waiting.extend(prompts.iter().cloned());
            batches.push(Batch::new(waiting)?);
            waiting.clear();
            Ok(())
        };
        for place in 0..self.len().min(limit) {
            let document = self.document(place, None)?;
            if tokens + document.tokens.len() > budget && !waiting.is_empty() {
                close(&mut waiting)?;
                tokens = 0;
            }
            tokens += document.tokens.len();
            waiting.push(document);
        }
        if !waiting.is_empty() {
            close(&mut waiting)?;
        }
        Ok(batches)
    }
}

fn document(row: TokenRow) -> Document {
    Document {
        pixels: Vec::new(),
        tokens: row.ids,
        learn: row.learn,
        token_types: row.token_types.map(|types| types.into_iter().map(u32::from).collect()),
        class: match row.label {
            Some(Label::Class(class)) => Some(class),
            _ => None,
        },
        task: row.task.map(|task| task as usize),
        row: row.source_line,
    }
}

/// Prepares sources of rows for one model.
#[derive(Debug)]
pub struct Rows<'a> {
    /// The `[data]` table.
    pub options: &'a DataOptions,
    /// The model.
    pub spec: &'a ModelSpec,
    /// The model's folder or file.
    pub model: &'a Path,
    /// The model's tokenizer; nothing for models that read no text.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Longest row in tokens.
    pub max_length: usize,
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
        let train = std::sync::Arc::new(train);
        let mut all: Vec<usize> = (0..train.len()).collect();
        if self.options.limit > 0 {
            all.truncate(self.options.limit);
        }
        let other = |path: &Path| self.other(path, &train);
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

    /// Prepares another file with the labels of the training rows.
    ///
    /// # Errors
    /// As [`Rows::splits`].
    pub fn other(&self, path: &Path, train: &RowSet) -> Result<Subset> {
        let dataset = std::sync::Arc::new(self.file(path, train.labels().cloned())?);
        let rows = (0..dataset.len()).collect();
        Ok(Subset { dataset, rows })
    }

    /// Parts rows by a seeded hash of their content, so that equal rows stay on one side.
    fn hold_out(
        &self,
        set: &RowSet,
        rows: Vec<usize>,
        fraction: f64,
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut contents = Vec::with_capacity(rows.len());
        for row in &rows {
            let content: Vec<u64> = match set {
                RowSet::Texts(set) => set.row(*row)?.ids.into_iter().map(u64::from).collect(),
                RowSet::Images(images) => vec![images.fingerprint(*row)],
            };
            contents.push(self.seed.stream("validation", &content).bits());
        }
        let split = split(&contents, Held::Fraction(fraction), self.seed.0)?;
        let rows = |part: Vec<u32>| part.into_iter().map(|place| rows[place as usize]).collect();
        Ok((rows(split.train), rows(split.validation)))
    }

    fn file(&self, path: &Path, labels: Option<Labels>) -> Result<RowSet> {
        match (self.spec.image(), self.tokenizer) {
            (Some(image), tokenizer) => self.images(path, labels, *image, tokenizer),
            (None, Some(tokenizer)) => self.texts(path, labels, tokenizer),
            (None, None) => Err(Error::Core(retune_core::Error::Unsupported {
                what: format!("rows for {}, which reads neither text nor images", self.spec.class),
                help: "use another model".to_owned(),
            })),
        }
    }

    fn images(
        &self,
        path: &Path,
        labels: Option<Labels>,
        image: ImageSpec,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<RowSet> {
        let o = self.options;
        let transform = Transform::of_folder(self.model, image.channels, image.size)?;
        // A limit counts training rows only; others are limited where they are measured.
        let limit = if labels.is_none() && path == o.train { o.limit } else { 0 };
        let options = SetOptions { columns: o.columns.clone(), skip_broken: o.skip_broken, limit };
        let set = ImageSet::open(path, transform, labels, &options)?;
        let max_length = self.max_length;
        let reader = tokenizer.map(|tokenizer| Reader { tokenizer, max_length });
        Ok(RowSet::Images(Box::new(Images::new(set, image, reader, o, self.seed)?)))
    }

    fn texts(&self, path: &Path, labels: Option<Labels>, tokenizer: &Tokenizer) -> Result<RowSet> {
        let o = self.options;
        let read = ReadOptions { skip_broken: o.skip_broken, ..ReadOptions::default() };
        let file = RowFile::open(path, &read)?;
        let shape = ShapeOptions {
            shape: None,
            columns: o.columns.clone(),
            prompt_template: o.prompt.clone(),
            task: o.task.clone(),
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
            decoder_start: self.spec.decoder_start(),
            ..PrepareOptions::default()
        };
        let preparer = Preparer::new(tokenizer.clone(), self.template(tokenizer)?, prepare)?;
        // A missing length is no reason to stop: the reader has opened the file already.
        let bytes = std::fs::metadata(path).map_or(0, |meta| meta.len());
        let keep = if bytes > IN_MEMORY_BYTES { Keep::OnDisk } else { Keep::InMemory };
        Ok(RowSet::Texts(Box::new(Dataset::prepare(file, &shape, preparer, labels, keep)?)))
    }

    /// Compiles the tokenizer's chat template, if it has one.
    ///
    /// # Errors
    /// If it does not compile.
    fn template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let settings = TemplateSettings::of(tokenizer, Some(self.date));
        let source = tokenizer.chat_template();
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
                .map(|place| self.subset.document(*place, Some(epoch)))
                .collect::<retune_data::Result<Vec<_>>>()
                .map_err(|error| retune_train::Error::Data(Box::new(error)))?;
            let prompts = self.subset.dataset.prompts(Some(epoch));
            batches.push(Batch::new(&[documents, prompts].concat())?);
        }
        Ok(batches)
    }

    fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / self.steps_per_epoch() as f64
    }
}
