//! `logits`: what a model computes for given ids, so that anyone can compare with another tool.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retune_core::batch::{Batch, Document};
use retune_core::model::Output;
use retune_core::pass::logit_rows;
use retune_files::Dtype;
use retune_files::safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec};
use serde_json::json;

use super::pixels;
use super::session::Session;
use crate::failure::Failure;

/// One row of the input: its columns that count, and the document they make.
struct Row {
    columns: Vec<usize>,
    document: Document,
    /// Tokens before the decoder's side, which have no logits; none in models of one side.
    num_source: usize,
}

/// Computes logits of the ids in a file and writes them to another.
pub(crate) fn logits(
    model: &str,
    adapters: &[PathBuf],
    input: &Path,
    output: &Path,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let session = Session::open(model, adapters, force, json)?;
    let tuned = session.tuned();
    if tuned.model.spec().image().is_some() {
        let rows = pixels::rows(&tuned, input)?;
        let shape = vec![rows.len(), rows.first().map_or(0, Vec::len)];
        return write(output, &shape, &rows.concat(), json);
    }
    let two_sided = tuned.model.spec().decoder_start().is_some();
    let (rows, width) = read_rows(input, two_sided)?;
    let num_rows = rows.len();
    let mut values: Vec<f32> = Vec::new();
    let mut shape = Vec::new();
    for row in &rows {
        if row.columns.is_empty() {
            return Err(wrong(
                input,
                "attention_mask",
                "at least one 1 in every row",
                "a row of zeros",
            ));
        }
        let mut batch = Batch::new(std::slice::from_ref(&row.document))?;
        if row.num_source == 0 {
            // Positions count every column, masked or not, as the other tools' default does.
            batch.positions.clone_from(&row.columns);
        }
        let (found, classes) = tuned.evaluate(&batch, None, |pass, out| match out {
            Output::States(states) => {
                let all: Vec<usize> = (row.num_source..batch.num_tokens()).collect();
                Ok((logit_rows(pass.logits(&states, &all)?), false))
            }
            Output::Classes(logits) | Output::Embeddings(logits) => Ok((logit_rows(logits), true)),
            Output::Pairs(pairs) => Ok((logit_rows(pairs.similarities()), true)),
        })?;
        let size = found.first().map_or(0, Vec::len);
        if classes {
            shape = vec![num_rows, size];
            values.extend(found.into_iter().flatten());
        } else {
            shape = vec![num_rows, width, size];
            let start = values.len();
            values.resize(start + width * size, 0.0);
            for (column, logits) in row.columns.iter().zip(found) {
                let place = start + column * size;
                values[place..place + size].copy_from_slice(&logits);
            }
        }
    }
    write(output, &shape, &values, json)
}

fn write(output: &Path, shape: &[usize], values: &[f32], json: bool) -> Result<(), Failure> {
    let spec = [TensorSpec::new("logits", Dtype::F32, shape.to_vec())];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = SafetensorsWriter::create(output, &spec, &metadata)?;
    writer.write_f32("logits", values)?;
    writer.finish()?;
    if json {
        println!("{}", json!({"output": output, "shape": shape}));
    } else {
        println!("{}: logits {shape:?}", output.display());
    }
    Ok(())
}

fn wrong(path: &Path, name: &str, expected: &str, found: &str) -> Failure {
    Failure::Failed(format!(
        "{}: tensor `{name}` cannot be used\n  expected: {expected}\n  found: {found}\n  help: input_ids [B, T] and, where needed, attention_mask and token_type_ids of the same shape and decoder_input_ids [B, U], any integer type",
        path.display()
    ))
}

fn read_rows(path: &Path, two_sided: bool) -> Result<(Vec<Row>, usize), Failure> {
    let file = SafetensorsFile::open(path)?;
    let ids = file.tensor("input_ids")?;
    let [num_rows, width] = *ids.shape else {
        return Err(wrong(path, "input_ids", "shape [B, T]", &format!("{:?}", ids.shape)));
    };
    let ids = ids.to_i64()?;
    let read = |name: &str| -> Result<Option<Vec<i64>>, Failure> {
        let Some(view) = file.get(name) else { return Ok(None) };
        if *view.shape != [num_rows, width] {
            let found = format!("{:?}", view.shape);
            return Err(wrong(path, name, &format!("shape [{num_rows}, {width}]"), &found));
        }
        Ok(Some(view.to_i64()?))
    };
    let mask = read("attention_mask")?;
    let types = read("token_type_ids")?;
    let small = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| wrong(path, name, "ids from 0", &value.to_string()))
    };
    let decoder = match file.get("decoder_input_ids").filter(|_| two_sided) {
        None => None,
        Some(view) => match *view.shape {
            [rows, width] if rows == num_rows => Some((view.to_i64()?, width)),
            _ => {
                let found = format!("{:?}", view.shape);
                let expected = format!("shape [{num_rows}, U]");
                return Err(wrong(path, "decoder_input_ids", &expected, &found));
            }
        },
    };
    let mut rows = Vec::with_capacity(num_rows);
    for row in 0..num_rows {
        let at = |column: usize| row * width + column;
        let columns: Vec<usize> = (0..width)
            .filter(|column| mask.as_ref().is_none_or(|mask| mask[at(*column)] != 0))
            .collect();
        let mut tokens = columns
            .iter()
            .map(|column| small("input_ids", ids[at(*column)]))
            .collect::<Result<Vec<_>, _>>()?;
        let token_types = types
            .as_ref()
            .map(|types| {
                columns.iter().map(|column| small("token_type_ids", types[at(*column)])).collect()
            })
            .transpose()?;
        let (mut columns, mut num_source) = (columns, 0);
        if let (Some((ids, width)), false) = (&decoder, columns.is_empty()) {
            num_source = tokens.len();
            for id in &ids[row * width..(row + 1) * width] {
                tokens.push(small("decoder_input_ids", *id)?);
            }
            columns = (0..*width).collect();
        }
        let learn = vec![false; tokens.len()];
        rows.push(Row {
            columns,
            document: Document { tokens, learn, token_types, row, ..Document::default() },
            num_source,
        });
    }
    Ok((rows, decoder.map_or(width, |(_, width)| width)))
}
