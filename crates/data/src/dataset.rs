//! A data file prepared for one model: its rows, in memory or made anew when asked for.

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::labels::{Label, LabelCollector, Labels};
use crate::order::{Held, Split, split};
use crate::prepare::{Preparer, TokenRow};
use crate::read::{Row, RowFile};
use crate::shape::{Example, ShapeOptions, Shaper};
use crate::statistics::Statistics;

/// Rows from whose fields the shape is decided.
const SAMPLE: usize = 100;

/// Rows prepared at a time, on all threads.
const CHUNK: usize = 1024;

/// Where prepared rows are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// In memory: 5 bytes a token, about 130 a row.
    InMemory,
    /// In the file: rows are read and tokenised again whenever they are asked for, at the price of
    /// 32 bytes of memory a row.
    OnDisk,
}

/// A prepared data set. Rows are numbered from 0 in the file's order, left-out rows not counted.
#[derive(Debug)]
pub struct Dataset {
    file: RowFile,
    shaper: Shaper,
    preparer: Preparer,
    labels: Option<Labels>,
    /// The rows themselves, if they are kept in memory.
    memory: Option<Vec<TokenRow>>,
    /// Numbers of the kept rows in the file.
    kept: Vec<u32>,
    /// Tokens of each row.
    lengths: Vec<u32>,
    /// A hash of each row's content.
    contents: Vec<u64>,
    statistics: Statistics,
}

impl Dataset {
    /// Prepares every row of a file once: finds the shape, tokenises, masks, cuts and counts.
    ///
    /// `labels` are those of the training data when this is validation data; collected otherwise.
    ///
    /// # Errors
    /// [`Error::Row`] with the line of the first row that cannot be used; [`Error::File`] when no
    /// row is left, or no row has a token to learn.
    pub fn prepare(
        file: RowFile,
        shape: &ShapeOptions,
        preparer: Preparer,
        labels: Option<Labels>,
        keep: Keep,
    ) -> Result<Self> {
        let sample: Vec<Row> = file.rows().take(SAMPLE).collect::<Result<_>>()?;
        let shaper = Shaper::detect(file.path(), &sample, shape)?;
        drop(sample);
        let example_of = |row: &Row| shaper.example(row).map_err(|e| e.at(file.path(), row.line));
        let labels = match labels {
            Some(labels) => Some(labels),
            None => collect_labels(&file, &shaper)?,
        };
        let mut statistics =
            Statistics { rows_broken: file.skipped().len(), ..Statistics::default() };
        let (mut memory, mut kept, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let mut contents = Vec::new();
        let prepare_one = |row: Result<Row>| {
            let row = row?;
            let mut counted = Statistics::default();
            let token_row = preparer
                .row(&example_of(&row)?, labels.as_ref(), row.line, &mut counted)
                .map_err(|e| e.at(file.path(), row.line))?;
            let task = shaper.task(&row).map_err(|e| e.at(file.path(), row.line))?;
            Ok::<_, Error>((token_row.map(|row| TokenRow { task, ..row }), counted))
        };
        for start in (0..file.len()).step_by(CHUNK) {
            let chunk = start..file.len().min(start + CHUNK);
            // Files are read in order, which some forms need to be fast; the work is spread.
            let rows: Vec<_> = chunk.clone().map(|index| file.read(index)).collect();
            let prepared: Vec<_> = rows.into_par_iter().map(prepare_one).collect();
            for (index, prepared) in chunk.zip(prepared) {
                let (row, counted) = prepared?;
                statistics.absorb(&counted);
                let Some(row) = row else { continue };
                lengths.push(row.ids.len() as u32);
                contents.push(content(&row));
                kept.push(index as u32);
                if keep == Keep::InMemory {
                    memory.push(row);
                }
            }
        }
        if lengths.is_empty() {
            return Err(nothing_left(&file, &statistics));
        }
        let memory = (keep == Keep::InMemory).then_some(memory);
        Ok(Self { file, shaper, preparer, labels, memory, kept, lengths, contents, statistics })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Always false: a data set without rows is not made.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// The tokens of each row, for packing.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// Holds rows back for validation; equal rows stay on one side. Returns numbers of rows.
    ///
    /// # Errors
    /// As [`split`].
    pub fn split(&self, held: Held, seed: u64) -> Result<Split> {
        split(&self.contents, held, seed)
    }

    /// Gets a row.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Row`] when rows are kept on disk and the file changed.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn row(&self, index: usize) -> Result<TokenRow> {
        if let Some(rows) = &self.memory {
            return Ok(rows[index].clone());
        }
        let (example, line) = self.example(index)?;
        let task = self.task(index)?;
        let mut scratch = Statistics::default();
        let row = self
            .preparer
            .row(&example, self.labels.as_ref(), line, &mut scratch)
            .map_err(|e| e.at(self.file.path(), line))?;
        let row = row.map(|row| TokenRow { task, ..row });
        row.filter(|row| row.ids.len() == self.lengths[index] as usize).ok_or_else(|| {
            Error::row(
                self.file.path(),
                line,
                "the row is not the one it was when the run was prepared",
                "start again and leave the file alone",
            )
        })
    }

    /// The example a row was made from, with its line.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Row`] when the file changed.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn example(&self, index: usize) -> Result<(Example, usize)> {
        let row = self.file.read(self.kept[index] as usize)?;
        let example = self.shaper.example(&row).map_err(|e| e.at(self.file.path(), row.line))?;
        Ok((example, row.line))
    }

    /// The task of a row, where the data has any.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Row`] when the file changed.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn task(&self, index: usize) -> Result<Option<u32>> {
        if let Some(rows) = &self.memory {
            return Ok(rows[index].task);
        }
        let row = self.file.read(self.kept[index] as usize)?;
        self.shaper.task(&row).map_err(|e| e.at(self.file.path(), row.line))
    }

    /// The counts.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// What the rows were understood to be.
    pub fn shaper(&self) -> &Shaper {
        &self.shaper
    }

    /// What turned examples into rows.
    pub fn preparer(&self) -> &Preparer {
        &self.preparer
    }

    /// The labels of labelled data.
    pub fn labels(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }

    /// The data file.
    pub fn file(&self) -> &RowFile {
        &self.file
    }
}

/// A hash of what a row teaches: rows that are equal after tokenising and cutting are equal.
fn content(row: &TokenRow) -> u64 {
    let mut hash = Sha256::new();
    for id in &row.ids {
        hash.update(id.to_le_bytes());
    }
    hash.update(row.token_types.as_deref().unwrap_or_default());
    match row.label {
        Some(Label::Class(class)) => hash.update(class.to_le_bytes()),
        Some(Label::Score(score)) => hash.update(score.to_bits().to_le_bytes()),
        None => {}
    }
    if let Some(task) = row.task {
        hash.update(task.to_le_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
}

/// Collects the labels of a labelled file; `None` for other shapes.
fn collect_labels(file: &RowFile, shaper: &Shaper) -> Result<Option<Labels>> {
    let mut collector = LabelCollector::default();
    for row in file.rows() {
        let row = row?;
        match shaper.example(&row).map_err(|e| e.at(file.path(), row.line))? {
            Example::Labelled { label, .. } => collector.add(&label),
            _ => return Ok(None),
        }
    }
    let labels = collector.finish().map_err(|e| match e {
        Error::Example { problem, hint } => Error::file(file.path(), problem, hint),
        other => other,
    })?;
    Ok(Some(labels))
}

fn nothing_left(file: &RowFile, statistics: &Statistics) -> Error {
    let (total, unlearned) = (file.len(), statistics.rows_without_learned_token);
    if unlearned > 0 {
        return Error::file(
            file.path(),
            format!(
                "no token is left to learn: in {unlearned} of {total} rows the loss mask is empty"
            ),
            if statistics.rows_cut_learned > 0 {
                "the answers stand behind the cut: raise max_tokens"
            } else {
                "check that rows have an assistant's answer, or learn from all tokens (loss_on = \
                 \"all\")"
            },
        );
    }
    Error::file(
        file.path(),
        format!("all {total} rows are longer than max_tokens and left out"),
        "raise max_tokens, or set too_long = \"cut\"",
    )
}

#[cfg(test)]
mod tests;
