//! Where every tensor will lie: in which file of a checkpoint, and at which bytes of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::Serialize;

use super::header::{self, METADATA};
use super::{INDEX_FILE, SINGLE_FILE};
use crate::Dtype;
use crate::placed::{SaveError, TensorProblem};

/// Name, type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// The type of its numbers.
    pub dtype: Dtype,
    /// Its shape, slowest dimension first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Puts the three together.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
}

/// Everything about a file that is known before its first number.
pub(super) struct Layout<'a> {
    pub(super) specs: Vec<&'a TensorSpec>,
    pub(super) head: Vec<u8>,
    pub(super) spans: Vec<Range<u64>>,
}

impl<'a> Layout<'a> {
    /// Orders tensors as the reference writer does, widest type first and then by name, which also
    /// keeps every tensor aligned; loaders that view the file in place depend on it.
    pub(super) fn new(
        path: &Path,
        specs: impl Iterator<Item = &'a TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, SaveError> {
        let mut specs: Vec<&TensorSpec> = specs.collect();
        specs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        names.sort_unstable();
        let fail = |name: &str, problem| Err(SaveError::tensor(path, name, problem));
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return fail(pair[0], TensorProblem::Duplicate);
        }
        if names.contains(&METADATA) {
            let why = "the format keeps it for the file's metadata";
            return fail(METADATA, TensorProblem::Name(why));
        }
        let mut sizes = Vec::with_capacity(specs.len());
        let mut total = 0usize;
        for spec in &specs {
            let bytes = header::byte_count(spec.dtype, &spec.shape);
            let sum = bytes.and_then(|bytes| total.checked_add(bytes));
            let (Some(bytes), Some(sum)) = (bytes, sum) else {
                let why = "the file's size overflows".to_owned();
                let shape = spec.shape.clone();
                return fail(&spec.name, TensorProblem::Shape { shape, why });
            };
            sizes.push(bytes);
            total = sum;
        }
        let fields = specs
            .iter()
            .zip(sizes)
            .map(|(spec, bytes)| (spec.name.as_str(), spec.dtype, spec.shape.as_slice(), bytes));
        let (head, spans) = header::build(fields, metadata);
        if head.len() as u64 - 8 > header::MAX_HEADER_BYTES {
            let message = format!(
                "its header takes {} bytes, readers accept at most {}; split it into shards",
                head.len() - 8,
                header::MAX_HEADER_BYTES
            );
            return Err(SaveError::Unfit { file: path.to_path_buf(), message });
        }
        Ok(Self { specs, head, spans })
    }

    pub(super) fn length(&self) -> u64 {
        self.spans.last().map_or(self.head.len() as u64, |span| span.end)
    }
}

/// The index file, fields in the order of the ecosystem's writer.
#[derive(Debug, Serialize)]
struct Index {
    metadata: Totals,
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Totals {
    total_parameters: u64,
    total_size: u64,
}

/// Distributes tensors over files in alphabetical order, and returns each file's name and tensors,
/// with the text of the index where there are several.
#[expect(clippy::type_complexity, reason = "used by two callers in this module")]
pub(super) fn shards<'a>(
    folder: &Path,
    specs: &'a [TensorSpec],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: u64,
) -> Result<(Vec<(String, Vec<&'a TensorSpec>)>, Option<String>), SaveError> {
    let path = folder.join(INDEX_FILE);
    // Checks the whole before it is cut: names must be unique across shards.
    Layout::new(&path, specs.iter(), metadata)?;
    let mut sorted: Vec<&TensorSpec> = specs.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut groups: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
    let mut totals = Totals { total_parameters: 0, total_size: 0 };
    let mut filled = 0u64;
    for spec in sorted {
        let bytes = header::byte_count(spec.dtype, &spec.shape).unwrap_or_default() as u64;
        totals.total_size += bytes;
        totals.total_parameters += bytes / spec.dtype.size() as u64;
        let fits = filled.checked_add(bytes).is_some_and(|sum| sum <= max_shard_bytes);
        if filled > 0 && !fits {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(group) = groups.last_mut() {
            group.push(spec);
        }
    }
    let count = groups.len();
    if count == 1 {
        return Ok((groups.into_iter().map(|g| (SINGLE_FILE.to_owned(), g)).collect(), None));
    }
    let name = |i: usize| format!("model-{:05}-of-{count:05}.safetensors", i + 1);
    let named: Vec<_> = groups.into_iter().enumerate().map(|(i, g)| (name(i), g)).collect();
    let holders = named
        .iter()
        .flat_map(|(name, group)| group.iter().map(move |spec| (spec.name.clone(), name.clone())));
    let index = Index { metadata: totals, weight_map: holders.collect() };
    let mut json = serde_json::to_string_pretty(&index)
        .map_err(|e| SaveError::Unfit { file: path, message: format!("bad index: {e}") })?;
    json.push('\n');
    Ok((named, Some(json)))
}

/// The files of a checkpoint before their numbers: what a writer needs that fills them in any
/// order, from several threads, or in several runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointLayout {
    /// The weight files, in the order of their names.
    pub files: Vec<FileLayout>,
    /// The text of `model.safetensors.index.json`, where there are several files.
    pub index: Option<String>,
}

/// One weight file before its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLayout {
    /// Its name in the folder.
    pub name: String,
    /// Length and header, which stand at its beginning.
    pub head: Vec<u8>,
    /// Its length in bytes.
    pub length: u64,
    /// Its tensors and the bytes of the file each one takes, in the order of those bytes.
    pub tensors: Vec<(TensorSpec, Range<u64>)>,
}

impl CheckpointLayout {
    /// Name of the index file.
    pub const INDEX_FILE: &str = INDEX_FILE;

    /// Lays out tensors as [`ShardedWriter`](super::ShardedWriter) does.
    ///
    /// `folder` stands for the checkpoint in messages; nothing is written.
    ///
    /// # Errors
    /// [`SaveError`] for repeated names or sizes that overflow.
    pub fn new(
        folder: &Path,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        max_shard_bytes: u64,
    ) -> Result<Self, SaveError> {
        let (groups, index) = shards(folder, specs, metadata, max_shard_bytes)?;
        let mut files = Vec::with_capacity(groups.len());
        for (name, group) in groups {
            let layout = Layout::new(&folder.join(&name), group.into_iter(), metadata)?;
            let length = layout.length();
            let specs = layout.specs.into_iter().cloned();
            let tensors = specs.zip(layout.spans).collect();
            files.push(FileLayout { name, head: layout.head, length, tensors });
        }
        Ok(Self { files, index })
    }
}
