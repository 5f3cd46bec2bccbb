//! Rows from files: JSONL, JSON, CSV and Parquet, any size.
//!
//! Opening a file reads it through once, checks every row and remembers where each starts, so rows
//! can then be read in any order while only one is in memory.

mod csv;
mod json;
mod lines;
mod parquet;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The form of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object per line.
    Jsonl,
    /// One JSON array of objects.
    Json,
    /// Comma-separated values with a header line.
    Csv,
    /// Tab-separated values with a header line.
    Tsv,
    /// Apache Parquet, plain or compressed by snappy or gzip.
    Parquet,
}

/// How a file is read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The file's form; from its name if absent.
    pub format: Option<Format>,
    /// Leaves out rows that cannot be read, and counts them, rather than failing.
    pub skip_broken: bool,
    /// The largest row, in bytes; a guard against a file that is one endless line.
    pub max_row_bytes: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { format: None, skip_broken: false, max_row_bytes: 64 << 20 }
    }
}

/// One row: named values.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Field names and values, in the file's order. CSV values are all strings.
    pub fields: Map<String, Value>,
    /// The line the row starts on, counted from 1; in Parquet, the row's number.
    pub line: usize,
}

/// Where one row stands in its file: bytes, or in Parquet the row group and the row in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    bytes: u32,
    line: u32,
}

/// A row that was left out, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The line the row starts on, counted from 1.
    pub line: usize,
    /// What was wrong with it.
    pub problem: String,
}

/// An open data file, checked, whose rows can be read in any order.
///
/// Memory: 16 bytes for each row, and one row at a time while reading.
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    format: Format,
    places: Vec<Place>,
    /// CSV column names.
    columns: Vec<String>,
    skipped: Vec<Skipped>,
    storage: Storage,
}

/// What rows are read from.
#[derive(Debug)]
enum Storage {
    Bytes(Mutex<File>),
    Parquet(parquet::Groups),
}

impl RowFile {
    /// Opens a data file, reads it through once and checks every row's form.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a file that is empty or of no known form; [`Error::Row`]
    /// with the line of the first row that cannot be read, unless such rows are to be skipped.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        let format = match options.format {
            Some(format) => format,
            None => format_of(path)?,
        };
        let file = File::open(path).map_err(Error::io("open", path))?;
        if file.metadata().map_err(Error::io("read", path))?.is_dir() {
            return Err(Error::file(
                path,
                "this is a folder, expected a data file",
                "name one of the files in it",
            ));
        }
        let mut scan = Scan::new(path, options);
        let mut storage = None;
        let columns = match format {
            Format::Jsonl => lines::scan(&file, &mut scan).map(|()| Vec::new()),
            Format::Json => json::scan(&file, &mut scan).map(|()| Vec::new()),
            Format::Csv => csv::scan(&file, b',', &mut scan),
            Format::Tsv => csv::scan(&file, b'\t', &mut scan),
            Format::Parquet => {
                parquet::open(&file, &mut scan).map(Storage::Parquet).map(|opened| {
                    storage = Some(opened);
                    Vec::new()
                })
            }
        }?;
        if scan.places.is_empty() {
            let problem = match scan.skipped.as_slice() {
                [] => "the file has no rows".to_owned(),
                [first, ..] => format!(
                    "none of its {} rows can be read; the first, on line {}: {}",
                    scan.skipped.len(),
                    first.line,
                    first.problem
                ),
            };
            return Err(Error::file(path, problem, "check that this is the right file"));
        }
        Ok(Self {
            path: path.to_owned(),
            format,
            places: scan.places,
            columns,
            skipped: scan.skipped,
            storage: storage.unwrap_or_else(|| Storage::Bytes(Mutex::new(file))),
        })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Always false: a file without rows is not opened.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Reads the row at `index`, counted from 0.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Row`] when the file changed since it was opened.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn read(&self, index: usize) -> Result<Row> {
        let place = self.places[index];
        let line = place.line as usize;
        let file = match &self.storage {
            Storage::Bytes(file) => file,
            Storage::Parquet(groups) => {
                let fields = groups.read(place.offset as usize, place.bytes as usize);
                let refuse = |problem: String| {
                    let hint = if problem.contains("Disabled feature") {
                        "write the file again with snappy compression, the usual one, with gzip or none"
                    } else {
                        "get the file again: it is damaged"
                    };
                    Error::row(&self.path, line, problem, hint)
                };
                return Ok(Row { fields: fields.map_err(refuse)?, line });
            }
        };
        let mut bytes = vec![0; place.bytes as usize];
        {
            // A reader that panicked leaves only the position behind, which is set anew here.
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(place.offset)).map_err(Error::io("read", &self.path))?;
            file.read_exact(&mut bytes).map_err(Error::io("read", &self.path))?;
        }
        let fields = match self.format {
            Format::Jsonl | Format::Json | Format::Parquet => object(&bytes),
            Format::Csv => csv::fields(&bytes, b',', &self.columns),
            Format::Tsv => csv::fields(&bytes, b'\t', &self.columns),
        };
        let fields = fields.map_err(|problem| {
            Error::row(
                &self.path,
                line,
                format!("{problem}; the file changed while it was read"),
                "start again and leave the file alone",
            )
        })?;
        Ok(Row { fields, line })
    }

    /// Reads all rows in the file's order, one at a time.
    pub fn rows(&self) -> impl Iterator<Item = Result<Row>> + '_ {
        (0..self.len()).map(|index| self.read(index))
    }

    /// The line a row starts on, counted from 1.
    pub fn line(&self, index: usize) -> usize {
        self.places[index].line as usize
    }

    /// Rows that were left out because they cannot be read.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's form.
    pub fn format(&self) -> Format {
        self.format
    }
}

fn format_of(path: &Path) -> Result<Format> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    match extension.as_str() {
        "jsonl" | "ndjson" => Ok(Format::Jsonl),
        "json" => Ok(Format::Json),
        "csv" => Ok(Format::Csv),
        "tsv" => Ok(Format::Tsv),
        "parquet" => Ok(Format::Parquet),
        _ => Err(Error::file(
            path,
            format!("cannot tell the file's form from its ending {extension:?}"),
            "name it .jsonl, .json, .csv, .tsv or .parquet, or set the format",
        )),
    }
}

/// What the readers of all forms fill while they go through a file.
struct Scan<'a> {
    path: &'a Path,
    skip_broken: bool,
    max_row_bytes: usize,
    places: Vec<Place>,
    skipped: Vec<Skipped>,
}

impl<'a> Scan<'a> {
    fn new(path: &'a Path, options: &ReadOptions) -> Self {
        Self {
            path,
            skip_broken: options.skip_broken,
            // Lengths are kept in 32 bits.
            max_row_bytes: options.max_row_bytes.min(u32::MAX as usize),
            places: Vec::new(),
            skipped: Vec::new(),
        }
    }

    fn good(&mut self, offset: u64, bytes: usize, line: usize) -> Result<()> {
        let line = u32::try_from(line).map_err(|_| {
            Error::file(self.path, "more than 4,294,967,295 lines", "split the file")
        })?;
        self.places.push(Place { offset, bytes: bytes as u32, line });
        Ok(())
    }

    /// Skips a broken row or fails, as the options say.
    fn broken(&mut self, line: usize, problem: String) -> Result<()> {
        if self.skip_broken {
            self.skipped.push(Skipped { line, problem });
            return Ok(());
        }
        Err(Error::row(
            self.path,
            line,
            problem,
            "repair the row, or set skip_broken = true to leave such rows out",
        ))
    }

    fn too_long(&self) -> String {
        format!("the row is longer than {} bytes", self.max_row_bytes)
    }
}

/// Parses a row that is a JSON object.
fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    let text = utf8(bytes)?;
    let value: Value = serde_json::from_str(text).map_err(|e| json_problem(&e))?;
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(format!("expected a JSON object, got {}", kind(&other))),
    }
}

/// What is wrong with a JSON text. The line that serde names counts within the row, so only the
/// column is kept.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text).to_owned();
    format!("not JSON: {what} (column {})", error.column())
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        format!("not UTF-8: byte 0x{:02x} at position {} of the row", bytes[at], at + 1)
    })
}

/// A JSON value's kind, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests;
