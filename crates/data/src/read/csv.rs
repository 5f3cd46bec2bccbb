//! CSV and TSV with a header line; quoted fields may hold line feeds.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};

use super::{Scan, lines::BOM, utf8};
use crate::error::{Error, Result};

/// Goes through the records; returns the column names.
pub(super) fn scan(file: &File, delimiter: u8, scan: &mut Scan<'_>) -> Result<Vec<String>> {
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut columns: Option<Vec<String>> = None;
    let (mut offset, mut line) = (0u64, 1);
    let mut record = Vec::new();
    loop {
        let found = Record::read(&mut reader, delimiter, &mut record, scan.max_row_bytes)
            .map_err(Error::io("read", scan.path))?;
        if found.bytes == 0 {
            return Ok(columns.unwrap_or_default());
        }
        let start = if offset == 0 && record.starts_with(BOM) { BOM.len() } else { 0 };
        let row = &record[start..];
        if !found.complete {
            let problem = format!("{}; is a quote left open?", scan.too_long());
            scan.broken(line, problem)?;
        } else if !row.trim_ascii().is_empty() {
            match &columns {
                None => columns = Some(header(row, delimiter, scan.path, line)?),
                Some(columns) => match fields(row, delimiter, columns) {
                    Ok(_) => scan.good(offset + start as u64, row.len(), line)?,
                    Err(problem) => scan.broken(line, problem)?,
                },
            }
        }
        offset += found.bytes;
        line += found.lines;
    }
}

/// One record's extent.
struct Record {
    bytes: u64,
    lines: usize,
    /// Whether all of it was kept.
    complete: bool,
}

/// Where in a record the reader is. A quote opens a field only as its first character.
#[derive(Clone, Copy, PartialEq)]
enum Inside {
    FieldStart,
    Field,
    Quotes,
    /// Behind a quote in a quoted field: its end, or the first of two quotes that mean one.
    QuoteInQuotes,
}

impl Record {
    /// Reads to the end of a record, its line feed included, but keeps at most `limit` bytes.
    fn read(
        reader: &mut impl BufRead,
        delimiter: u8,
        record: &mut Vec<u8>,
        limit: usize,
    ) -> std::io::Result<Self> {
        record.clear();
        let mut found = Self { bytes: 0, lines: 0, complete: true };
        let mut inside = Inside::FieldStart;
        loop {
            let buffer = reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(found);
            }
            let mut end = None;
            for (at, &b) in buffer.iter().enumerate() {
                found.lines += usize::from(b == b'\n');
                inside = match (inside, b) {
                    (Inside::Quotes, b'"') => Inside::QuoteInQuotes,
                    (Inside::Quotes, _) | (Inside::FieldStart | Inside::QuoteInQuotes, b'"') => {
                        Inside::Quotes
                    }
                    (_, b'\n') => {
                        end = Some(at + 1);
                        break;
                    }
                    (_, b) if b == delimiter => Inside::FieldStart,
                    // A byte order mark comes before the first field.
                    (Inside::FieldStart, b) if BOM.contains(&b) => Inside::FieldStart,
                    _ => Inside::Field,
                };
            }
            let piece = &buffer[..end.unwrap_or(buffer.len())];
            if record.len() + piece.len() <= limit {
                record.extend_from_slice(piece);
            } else {
                found.complete = false;
            }
            let used = piece.len();
            found.bytes += used as u64;
            reader.consume(used);
            if end.is_some() {
                return Ok(found);
            }
        }
    }
}

fn header(row: &[u8], delimiter: u8, path: &Path, line: usize) -> Result<Vec<String>> {
    let refuse = |problem: String| Error::row(path, line, problem, "repair the header line");
    let record = parse(row, delimiter).map_err(refuse)?;
    let mut columns: Vec<String> = Vec::with_capacity(record.len());
    for field in &record {
        let name = utf8(field).map_err(refuse)?.trim().to_owned();
        if columns.contains(&name) {
            return Err(refuse(format!("the header names the column {name:?} twice")));
        }
        columns.push(name);
    }
    Ok(columns)
}

/// Parses one record's bytes.
pub(super) fn fields(
    bytes: &[u8],
    delimiter: u8,
    columns: &[String],
) -> Result<Map<String, Value>, String> {
    let record = parse(bytes, delimiter)?;
    if record.len() != columns.len() {
        return Err(format!(
            "expected {} columns as in the header, got {}",
            columns.len(),
            record.len()
        ));
    }
    columns
        .iter()
        .zip(&record)
        .map(|(name, field)| Ok((name.clone(), Value::String(utf8(field)?.to_owned()))))
        .collect()
}

fn parse(bytes: &[u8], delimiter: u8) -> Result<ByteRecord, String> {
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(bytes);
    let mut record = ByteRecord::new();
    match reader.read_byte_record(&mut record) {
        Ok(true) => Ok(record),
        Ok(false) => Err("the row is empty".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}
