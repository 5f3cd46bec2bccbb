//! A set of pictures prepared for one model.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::packed::Packed;
use super::transform::Transform;
use super::{Picture, decode};
use crate::error::{Error, Result};
use crate::labels::{Label, LabelCollector, Labels};
use crate::order::{Held, Split, split};
use crate::read::{ReadOptions, Row, RowFile};
use crate::shape::{LabelValue, label, string};

/// Pictures of more bytes in all are read again whenever they are needed.
const IN_MEMORY_BYTES: usize = 1 << 30;

/// Rows prepared at a time, on all threads.
const CHUNK: usize = 1024;

/// Endings of files that are taken for pictures.
const ENDINGS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Where one picture lies.
#[derive(Debug, Clone)]
enum Place {
    File(PathBuf),
    Packed(usize),
}

/// One picture with what belongs to it.
#[derive(Debug, Clone)]
struct Listed {
    place: Place,
    label: Option<LabelValue>,
    text: Option<String>,
    /// Line of the file of rows, or the picture's number from 1.
    line: usize,
}

/// All pictures of a source, before any is read.
#[derive(Debug, Default)]
struct Listing {
    rows: Vec<Listed>,
    packed: Option<Packed>,
    /// Names of the classes where the source has them.
    names: Option<Vec<String>>,
    statement: String,
    num_broken: usize,
}

/// How a set is read.
#[derive(Debug, Clone, Default)]
pub struct SetOptions {
    /// From a field's standard name (`image`, `label`, `text`) to the file's own.
    pub columns: BTreeMap<String, String>,
    /// Leaves out pictures that cannot be read, and counts them, rather than failing.
    pub skip_broken: bool,
    /// Reads the first pictures only; 0 means all.
    pub limit: usize,
}

/// Pictures of a model's size, each with a class or a text.
#[derive(Debug)]
pub struct ImageSet {
    path: PathBuf,
    transform: Transform,
    rows: Vec<Listed>,
    packed: Option<Packed>,
    /// The pictures themselves, if they are kept in memory.
    memory: Option<Vec<Picture>>,
    classes: Vec<Option<u32>>,
    labels: Option<Labels>,
    contents: Vec<u64>,
    statement: String,
    num_broken: usize,
}

impl ImageSet {
    /// Reads and checks every picture once, and brings it to the model's size.
    ///
    /// `path` is a folder of one folder per class, a packed file ([`Packed::read`]) or several whose
    /// names differ where it has a `*`, or a file of rows with `image` and `label` or `text`.
    /// `labels` are those of the training data when this is validation data.
    ///
    /// # Errors
    /// With the file of the first picture that cannot be used; also where rows have neither class
    /// nor text, or some have and some have not.
    pub fn open(
        path: &Path,
        transform: Transform,
        labels: Option<Labels>,
        options: &SetOptions,
    ) -> Result<Self> {
        let mut listing = list(path, options)?;
        if options.limit > 0 {
            listing.rows.truncate(options.limit);
        }
        let labels = match labels {
            Some(labels) => Some(labels),
            None => listing.labels(path)?,
        };
        let class = |row: &Listed| match (&labels, &row.label) {
            (Some(labels), Some(label)) => match labels.resolve(label) {
                Ok(Label::Class(class)) => Ok(Some(class)),
                Ok(Label::Score(_)) => Err(Error::example(
                    "the label is a score, which no picture can be tuned to yet",
                    "give classes",
                )),
                Err(error) => Err(error),
            },
            _ => Ok(None),
        };
        let mut set = Self {
            path: path.to_path_buf(),
            transform,
            rows: Vec::new(),
            packed: listing.packed.take(),
            memory: Some(Vec::new()),
            classes: Vec::new(),
            contents: Vec::new(),
            statement: listing.statement,
            num_broken: listing.num_broken,
            labels: None,
        };
        let mut bytes = 0;
        for chunk in listing.rows.chunks(CHUNK) {
            let read = |row: &Listed| {
                let class = class(row).map_err(|error| error.at(path, row.line))?;
                Ok::<_, Error>((set.read(row)?, class))
            };
            let prepared: Vec<_> = chunk.par_iter().map(read).collect();
            for (row, prepared) in chunk.iter().zip(prepared) {
                let (picture, class) = match prepared {
                    Ok(prepared) => prepared,
                    Err(_) if options.skip_broken => {
                        set.num_broken += 1;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                bytes += picture.values.len();
                set.contents.push(content(&picture, class, row.text.as_deref()));
                set.classes.push(class);
                set.rows.push(row.clone());
                match &mut set.memory {
                    Some(memory) if bytes <= IN_MEMORY_BYTES => memory.push(picture),
                    memory => *memory = None,
                }
            }
        }
        if set.rows.is_empty() {
            return Err(Error::file(
                path,
                format!("no picture can be used; {} are broken", set.num_broken),
                "check that this is the right folder or file",
            ));
        }
        set.labels = labels;
        Ok(set)
    }

    fn read(&self, row: &Listed) -> Result<Picture> {
        match (&row.place, &self.packed) {
            (Place::Packed(index), Some(packed)) => {
                let fitted = self.transform.fit(packed.picture(*index));
                fitted.map_err(|error| error.at(&self.path, row.line))
            }
            (Place::File(path), _) => {
                let fitted = self.transform.fit(decode::read(path)?);
                fitted.map_err(|error| match error {
                    Error::Example { problem, hint } => Error::file(path, problem, hint),
                    other => other,
                })
            }
            (Place::Packed(_), None) => unreachable!("packed pictures have their file"),
        }
    }

    /// Returns the number of pictures.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Always false: a set without pictures is not made.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns a picture of the model's size.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] when the file changed since the set was opened.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    pub fn picture(&self, index: usize) -> Result<Picture> {
        match &self.memory {
            Some(pictures) => Ok(pictures[index].clone()),
            None => self.read(&self.rows[index]),
        }
    }

    /// Returns what turns pictures into numbers.
    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// Returns a picture's class, if it has one.
    pub fn class(&self, index: usize) -> Option<u32> {
        self.classes[index]
    }

    /// Returns a picture's text, if it has one.
    pub fn text(&self, index: usize) -> Option<&str> {
        self.rows[index].text.as_deref()
    }

    /// Returns the line or number a picture has in its source, counted from 1.
    pub fn line(&self, index: usize) -> usize {
        self.rows[index].line
    }

    /// Returns the picture's file, or the packed file with the picture's number.
    pub fn origin(&self, index: usize) -> String {
        match &self.rows[index].place {
            Place::File(path) => path.display().to_string(),
            Place::Packed(number) => format!("{}, picture {}", self.path.display(), number + 1),
        }
    }

    /// Returns the classes, if pictures have them.
    pub fn labels(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }

    /// Returns a hash of each picture with its class and text.
    pub fn contents(&self) -> &[u64] {
        &self.contents
    }

    /// Returns what was understood, for people.
    pub fn statement(&self) -> &str {
        &self.statement
    }

    /// Returns how many pictures were left out because they cannot be read.
    pub fn num_broken(&self) -> usize {
        self.num_broken
    }

    /// Holds pictures back for validation; equal ones stay on one side.
    ///
    /// # Errors
    /// As [`split`].
    pub fn split(&self, held: Held, seed: u64) -> Result<Split> {
        split(&self.contents, held, seed)
    }
}

fn content(picture: &Picture, class: Option<u32>, text: Option<&str>) -> u64 {
    let mut hash = Sha256::new();
    hash.update(&picture.values);
    hash.update(class.map_or(u32::MAX, |class| class).to_le_bytes());
    hash.update(text.unwrap_or_default());
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
}

impl Listing {
    fn labels(&self, path: &Path) -> Result<Option<Labels>> {
        let labelled = self.rows.iter().filter(|row| row.label.is_some()).count();
        if labelled == 0 {
            return Ok(None);
        }
        let mut collector = LabelCollector::default();
        self.rows.iter().filter_map(|row| row.label.as_ref()).for_each(|l| collector.add(l));
        let found = collector.finish().map_err(|error| match error {
            Error::Example { problem, hint } => Error::file(path, problem, hint),
            other => other,
        })?;
        match (&self.names, found) {
            (Some(names), Labels::Classes(found)) if names.len() >= found.len() => {
                Ok(Some(Labels::Classes(names.clone())))
            }
            (_, found) => Ok(Some(found)),
        }
    }
}

fn list(path: &Path, options: &SetOptions) -> Result<Listing> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if path.is_dir() {
        list_folder(path)
    } else if name.contains('*') {
        list_packed(path, &matching(path, name)?)
    } else if ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"].contains(&ending) {
        list_rows(path, options)
    } else {
        list_packed(path, &[path.to_path_buf()])
    }
}

/// Returns a folder's entries by name, hidden ones left out.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn list_folder(path: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    let (mut names, mut others) = (Vec::new(), 0);
    for folder in entries(path)?.into_iter().filter(|entry| entry.is_dir()) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for file in entries(&folder)? {
            let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if !file.is_file() || !ENDINGS.contains(&ending.to_ascii_lowercase().as_str()) {
                others += 1;
                continue;
            }
            listing.rows.push(Listed {
                place: Place::File(file),
                label: Some(LabelValue::Name(name.clone())),
                text: None,
                line: listing.rows.len() + 1,
            });
        }
        names.push(name);
    }
    if listing.rows.is_empty() {
        return Err(Error::file(
            path,
            format!("no picture lies in {} folders of classes", names.len()),
            "put the PNG or JPEG files of each class into a folder named after it",
        ));
    }
    listing.statement = format!("folders of {} classes", names.len());
    if others > 0 {
        let _ = write!(listing.statement, "; {others} entries are no PNG or JPEG files");
    }
    listing.names = Some(names);
    Ok(listing)
}

/// Returns the files beside `path` whose names are `pattern`, its `*` standing for anything.
fn matching(path: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (before, after) = pattern.split_once('*').unwrap_or((pattern, ""));
    let fits = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let rest = name.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
        file.is_file() && rest.is_some()
    };
    let found: Vec<PathBuf> = entries(folder)?.into_iter().filter(fits).collect();
    if found.is_empty() {
        let hint = "check the name; one `*` stands for any letters";
        return Err(Error::file(path, "no file has a name like this", hint));
    }
    Ok(found)
}

/// Names of a packed set's classes, one a line, in files that usually lie beside it.
fn class_names(path: &Path) -> Result<Option<Vec<String>>> {
    for name in ["classes.txt", "batches.meta.txt", "fine_label_names.txt"] {
        let path = path.with_file_name(name);
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            return Ok(Some(lines.map(str::to_owned).collect()));
        }
    }
    Ok(None)
}

fn list_packed(path: &Path, files: &[PathBuf]) -> Result<Listing> {
    let mut all: Option<Packed> = None;
    for file in files {
        let packed = Packed::read(file)?;
        match &mut all {
            Some(all) => all.append(file, packed)?,
            None => all = Some(packed),
        }
    }
    let packed = all.ok_or_else(|| Error::file(path, "there is no file", "check the name"))?;
    let row = |(index, label): (usize, &u32)| Listed {
        place: Place::Packed(index),
        label: Some(LabelValue::Index(*label)),
        text: None,
        line: index + 1,
    };
    Ok(Listing {
        rows: packed.labels.iter().enumerate().map(row).collect(),
        statement: format!("{} of {} pictures", packed.kind, packed.len()),
        packed: Some(packed),
        names: class_names(path)?,
        num_broken: 0,
    })
}

fn list_rows(path: &Path, options: &SetOptions) -> Result<Listing> {
    let read = ReadOptions { skip_broken: options.skip_broken, ..ReadOptions::default() };
    let file = RowFile::open(path, &read)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let column = |name: &'static str| options.columns.get(name).map_or(name, String::as_str);
    let mut listing = Listing { num_broken: file.skipped().len(), ..Listing::default() };
    let listed = |row: &Row| {
        let field = |name| row.fields.get(column(name)).filter(|value| !value.is_null());
        let image = field("image").ok_or_else(|| {
            Error::example(
                format!("the field `{}` with the picture's path is missing", column("image")),
                "give every row one, or name another in `columns`",
            )
        })?;
        let label = field("label").map(label).transpose()?;
        let text = field("text").map(|text| string(text, "text").map(str::to_owned)).transpose()?;
        if label.is_some() == text.is_some() {
            return Err(Error::example(
                "a picture needs a label or a text, and not both",
                "name the one that counts in `columns`",
            ));
        }
        let place = Place::File(folder.join(string(image, "image")?));
        Ok(Listed { place, label, text, line: row.line })
    };
    for row in file.rows() {
        let row = row?;
        let listed = listed(&row).map_err(|error| error.at(path, row.line))?;
        if let Some(first) = listing.rows.first()
            && first.text.is_some() != listed.text.is_some()
        {
            let hint = "give all rows labels, or all rows texts";
            return Err(Error::row(path, row.line, "the rows before it are of another kind", hint));
        }
        listing.rows.push(listed);
    }
    let with_text = listing.rows.first().is_some_and(|row| row.text.is_some());
    let kind = if with_text { "text" } else { "label" };
    listing.statement = format!("pictures from `{}` with `{}`", column("image"), column(kind));
    Ok(listing)
}

#[cfg(test)]
mod tests;
