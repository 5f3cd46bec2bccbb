//! A model folder written tensor by tensor, from any number of threads, in as many runs as it takes.
//!
//! The work lies in the hidden folder `.<name>.merging` beside the target. It holds the weight files
//! at their full length and a journal: the identity of the work, then one line per finished tensor
//! with a checksum of its bytes. A later run of the same work checks these and goes on; a run of
//! other work starts anew. The folder takes the target's name when everything is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use retune_files::atomic::{AtomicFolder, write_file};
use retune_files::safetensors::{CheckpointLayout, TensorSpec};
use retune_files::{Dtype, SaveError, TensorProblem, read_exact_at, start_writing, write_all_at};

use crate::{Error, Result};

const LABEL: &str = "merging";
const JOURNAL: &str = "journal";
/// Bytes written at once: a file system keeps large writes in large pieces.
const STEP_BYTES: usize = 1 << 18;

/// Default limit of a weight file, in bytes: the ecosystem's own.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What stands at the target already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Is kept, and the work refused.
    Keep,
    /// Is replaced when the work is done, not before.
    Replace,
}

/// A model folder being written.
#[derive(Debug)]
pub struct ModelWriter {
    target: PathBuf,
    existing: Existing,
    folder: AtomicFolder,
    files: Vec<File>,
    /// Held while a tensor writes: the system lets one writer into a file at a time, and those that
    /// wait there burn a processor that merging and flushing need.
    turn: Mutex<()>,
    places: BTreeMap<String, Place>,
    journal: Mutex<Journal>,
    resumed: BTreeSet<String>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    span: Range<u64>,
}

#[derive(Debug)]
struct Journal {
    file: File,
    done: usize,
}

impl ModelWriter {
    /// Starts the folder that will stand at `target`, or goes on with one of the same `identity`.
    ///
    /// `identity` stands for everything that decides the bytes: plan, inputs, version.
    ///
    /// # Errors
    /// [`Error::Content`] if the target exists and is to be kept, or another process works on it;
    /// [`Error::Save`] for repeated names or sizes that overflow; [`Error::Write`] if the disk
    /// refuses.
    pub fn open(
        target: &Path,
        specs: &[TensorSpec],
        max_shard_bytes: u64,
        identity: &str,
        existing: Existing,
    ) -> Result<Self> {
        check_target(target, existing)?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let layout = CheckpointLayout::new(target, specs, &metadata, max_shard_bytes)?;
        let folder = AtomicFolder::resume(target, LABEL)?;
        let path = folder.path().join(JOURNAL);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut journal = options.open(&path).map_err(|e| folder.error(e))?;
        // On a file system without locks two runs at once are the user's care.
        if matches!(journal.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(Error::Content {
                path: folder.path().to_path_buf(),
                what: "another process writes this model".to_owned(),
                expected: "no other".to_owned(),
                found: "a locked journal".to_owned(),
                help: "wait for it, or choose another folder".to_owned(),
            });
        }
        let mut text = String::new();
        // A journal that is not text is no journal of this work.
        let _ = journal.read_to_string(&mut text);
        let finished = finished_lines(&text, identity);
        if finished.is_none() {
            clear(folder.path()).map_err(|e| folder.error(e))?;
        }
        let mut files = Vec::with_capacity(layout.files.len());
        let mut places = BTreeMap::new();
        for (i, file) in layout.files.into_iter().enumerate() {
            let path = folder.path().join(&file.name);
            let open = || {
                let mut options = OpenOptions::new();
                let opened = options.read(true).write(true).create(true).truncate(false);
                let opened = opened.open(path)?;
                opened.set_len(file.length)?;
                write_all_at(&opened, &file.head, 0)?;
                Ok(opened)
            };
            files.push(open().map_err(|e| folder.error(e))?);
            for (spec, span) in file.tensors {
                places.insert(spec.name, Place { file: i, dtype: spec.dtype, span });
            }
        }
        if let Some(index) = layout.index {
            write_file(&folder.path().join(CheckpointLayout::INDEX_FILE), index.as_bytes())?;
        }
        let mut resumed = BTreeSet::new();
        let mut lines = format!("{identity}\n");
        for (crc, name) in finished.unwrap_or_default() {
            let Some(place) = places.get(&name) else { continue };
            let found = checksum(&files[place.file], place.span.clone());
            if found.is_ok_and(|found| found == crc) && resumed.insert(name.clone()) {
                lines.push_str(&journal_line(crc, &name));
            }
        }
        let write = |journal: &mut File| {
            journal.set_len(0)?;
            journal.seek(SeekFrom::Start(0))?;
            journal.write_all(lines.as_bytes())
        };
        write(&mut journal).map_err(|e| folder.error(e))?;
        let journal = Mutex::new(Journal { file: journal, done: resumed.len() });
        let target = target.to_path_buf();
        let turn = Mutex::new(());
        Ok(Self { target, existing, folder, files, turn, places, journal, resumed })
    }

    /// Returns the number of tensors in all.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Tells whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Returns the tensors an earlier run finished, which need not be written again.
    pub fn resumed(&self) -> &BTreeSet<String> {
        &self.resumed
    }

    /// Starts one tensor, whose values then come in order.
    ///
    /// # Errors
    /// [`Error::Save`] for a name that was not announced.
    pub fn tensor(&self, name: &str) -> Result<TensorWriter<'_>> {
        let Some((name, place)) = self.places.get_key_value(name) else {
            return Err(self.problem(name, TensorProblem::Unknown { near: String::new() }));
        };
        Ok(TensorWriter {
            model: self,
            name,
            place,
            at: place.span.start,
            crc: crc32fast::Hasher::new(),
            waiting: Vec::with_capacity(
                STEP_BYTES.min((place.span.end - place.span.start) as usize),
            ),
        })
    }

    /// Writes another file of the folder, such as `config.json`.
    ///
    /// # Errors
    /// [`Error::Write`] if the disk refuses.
    pub fn file(&self, name: &str, content: &[u8]) -> Result<()> {
        Ok(write_file(&self.folder.path().join(name), content)?)
    }

    /// Has what was written so far sent to the disk, so that little is left to wait for at the end.
    ///
    /// # Errors
    /// [`Error::Write`] if the disk refuses.
    pub fn start_writing(&self) -> Result<()> {
        let start = |file: &File| start_writing(file).map_err(|e| self.folder.error(e).into());
        self.files.iter().try_for_each(start)
    }

    /// Adds to an error what is kept and how to go on.
    pub fn interrupted(&self, source: Error) -> Error {
        let done = self.journal.lock().unwrap_or_else(PoisonError::into_inner).done;
        let kept = self.folder.path().to_path_buf();
        Error::Interrupted { kept, done, total: self.len(), source: Box::new(source) }
    }

    /// Flushes everything and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Save`] if a tensor was not finished; [`Error::Write`] if the disk refuses or the
    /// target appeared meanwhile.
    pub fn publish(self) -> Result<()> {
        let journal = self.journal.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(others) = (self.places.len() - journal.done).checked_sub(1) {
            let problem = TensorProblem::Unwritten { others };
            return Err(problem_of(&self.target, "of the plan", problem));
        }
        // Windows renames no folder with open files, and the journal is no part of a model.
        drop((journal, self.files));
        let path = self.folder.path().join(JOURNAL);
        fs::remove_file(path).map_err(|e| self.folder.error(e))?;
        match self.existing {
            Existing::Keep => self.folder.commit()?,
            Existing::Replace => self.folder.replace()?,
        }
        Ok(())
    }

    fn problem(&self, tensor: &str, problem: TensorProblem) -> Error {
        problem_of(&self.target, tensor, problem)
    }
}

fn problem_of(target: &Path, tensor: &str, problem: TensorProblem) -> Error {
    SaveError::Tensor { file: target.to_path_buf(), tensor: tensor.to_owned(), problem }.into()
}

/// One tensor being written, from its first value to its last.
#[derive(Debug)]
pub struct TensorWriter<'a> {
    model: &'a ModelWriter,
    name: &'a str,
    place: &'a Place,
    /// Where in the file the waiting bytes begin.
    at: u64,
    crc: crc32fast::Hasher,
    waiting: Vec<u8>,
}

impl TensorWriter<'_> {
    /// Writes the next values in the float type announced.
    ///
    /// # Errors
    /// [`Error::Save`] for an integer type, values beyond the type or more than announced;
    /// [`Error::Write`] if the disk refuses.
    pub fn push(&mut self, values: &[f32]) -> Result<()> {
        let dtype = self.place.dtype;
        if dtype == Dtype::F32 && cfg!(target_endian = "little") {
            return self.push_bytes(bytemuck::cast_slice(values));
        }
        self.check_length(values.len() * dtype.size())?;
        dtype
            .encode_behind(values, &mut self.waiting)
            .map_err(|e| self.model.problem(self.name, e.into()))?;
        self.write_when_full()
    }

    /// Writes the next numbers as they are stored: row-major, little endian.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.check_length(bytes.len())?;
        self.waiting.extend_from_slice(bytes);
        self.write_when_full()
    }

    /// Refuses more bytes than were announced.
    fn check_length(&self, more: usize) -> Result<()> {
        let end = self.at + (self.waiting.len() + more) as u64;
        if end > self.place.span.end { Err(self.wrong_length(end)) } else { Ok(()) }
    }

    /// Writes what waits up to a multiple of [`STEP_BYTES`] of the file, so that pieces of
    /// neighbouring writes do not share a page.
    fn write_when_full(&mut self) -> Result<()> {
        let end = self.at + self.waiting.len() as u64;
        let whole = end - end % STEP_BYTES as u64;
        if whole <= self.at {
            return Ok(());
        }
        self.write((whole - self.at) as usize)
    }

    fn write(&mut self, count: usize) -> Result<()> {
        let bytes = &self.waiting[..count];
        let file = &self.model.files[self.place.file];
        {
            let _turn = self.model.turn.lock().unwrap_or_else(PoisonError::into_inner);
            write_all_at(file, bytes, self.at).map_err(|e| self.model.folder.error(e))?;
        }
        self.crc.update(bytes);
        self.at += count as u64;
        self.waiting.drain(..count);
        Ok(())
    }

    /// Notes the tensor as finished.
    ///
    /// # Errors
    /// [`Error::Save`] if values are missing, [`Error::Write`] if the disk refuses.
    pub fn finish(mut self) -> Result<()> {
        let end = self.at + self.waiting.len() as u64;
        if end != self.place.span.end {
            return Err(self.wrong_length(end));
        }
        self.write(self.waiting.len())?;
        let line = journal_line(self.crc.finalize(), self.name);
        let mut journal = self.model.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.file.write_all(line.as_bytes()).map_err(|e| self.model.folder.error(e))?;
        journal.done += 1;
        Ok(())
    }

    fn wrong_length(&self, end: u64) -> Error {
        let start = self.place.span.start;
        let (expected, got) = (self.place.span.end - start, end - start);
        self.model.problem(self.name, TensorProblem::WrongLength { expected, got })
    }
}

/// Refuses a target that may not be replaced, or that is no folder.
fn check_target(target: &Path, existing: Existing) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(target) else { return Ok(()) };
    let (expected, found, help) = if !found.is_dir() {
        ("a folder, or nothing", "a file", "choose another name")
    } else if existing == Existing::Keep {
        let help = "choose another name, or replace it with --force";
        ("nothing", "a folder", help)
    } else {
        return Ok(());
    };
    Err(Error::Content {
        path: target.to_path_buf(),
        what: "the target exists".to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
        help: help.to_owned(),
    })
}

fn journal_line(crc: u32, name: &str) -> String {
    // A name with a line break would be two lines; JSON writes it in one.
    format!("{crc:08x} {}\n", serde_json::Value::from(name))
}

/// Reads the journal's finished tensors; `None` if it is of other work. A last line cut short by a
/// crash is left out.
fn finished_lines(text: &str, identity: &str) -> Option<Vec<(u32, String)>> {
    let lines = text.strip_prefix(identity)?.strip_prefix('\n')?;
    let whole = lines.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let parse = |line: &str| {
        let (crc, name) = line.split_once(' ')?;
        let name = serde_json::from_str(name).ok()?;
        Some((u32::from_str_radix(crc, 16).ok()?, name))
    };
    Some(whole.map_while(parse).collect())
}

fn checksum(file: &File, span: Range<u64>) -> std::io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    let mut step = vec![0; STEP_BYTES];
    let mut at = span.start;
    while at < span.end {
        let n = (span.end - at).min(STEP_BYTES as u64) as usize;
        read_exact_at(file, &mut step[..n], at)?;
        crc.update(&step[..n]);
        at += n as u64;
    }
    Ok(crc.finalize())
}

/// Removes what other work left in the hidden folder, save the journal that is locked.
fn clear(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() == JOURNAL {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
