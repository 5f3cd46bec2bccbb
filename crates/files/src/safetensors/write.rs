//! Writing safetensors files, whole or tensor by tensor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::INDEX_FILE;
use super::layout::{Layout, TensorSpec, shards};
use crate::Dtype;
use crate::atomic::write_file;
use crate::placed::{PlacedFile, SaveError, TensorProblem};

/// Writes one safetensors file tensor by tensor, in any order, holding none of them.
///
/// The file appears when [`Self::finish`] returns; before that, or if the writer is dropped, the
/// target is as it was. The bytes depend on tensors and metadata only, not on the order of writing.
/// # Examples
/// ```
/// # use retune_files::{Dtype, safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec}};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// let specs = [TensorSpec::new("a", Dtype::BF16, [2]), TensorSpec::new("b", Dtype::I32, [])];
/// let mut writer = SafetensorsWriter::create(&path, &specs, &Default::default())?;
/// writer.write("b", &7i32.to_le_bytes())?;
/// writer.write_f32("a", &[0.5, -1.0])?;
/// writer.finish()?;
/// assert_eq!(SafetensorsFile::open(&path)?.tensor("b")?.to_i64()?, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: PlacedFile,
    dtypes: BTreeMap<String, Dtype>,
}

impl SafetensorsWriter {
    /// Announces all tensors and starts the file.
    ///
    /// # Errors
    /// [`SaveError`] for repeated names, sizes that overflow, or a target that cannot be written.
    pub fn create(
        path: &Path,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, SaveError> {
        Self::start(path, specs.iter(), metadata)
    }

    fn start<'a>(
        path: &Path,
        specs: impl Iterator<Item = &'a TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, SaveError> {
        let layout = Layout::new(path, specs, metadata)?;
        let names = layout.specs.iter().map(|spec| spec.name.clone());
        let spans = names.zip(layout.spans.iter().cloned());
        let file = PlacedFile::create(path, &layout.head, spans, layout.length())?;
        let dtypes = layout.specs.iter().map(|spec| (spec.name.clone(), spec.dtype)).collect();
        Ok(Self { path: path.to_path_buf(), file, dtypes })
    }

    /// Writes a tensor's numbers as they are stored: row-major, little endian.
    ///
    /// # Errors
    /// [`SaveError`] for a name not announced or already written, a wrong length, or a full disk.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.file.write(name, bytes)
    }

    /// Writes `f32` values in the float type announced.
    ///
    /// # Errors
    /// As [`Self::write`]; also for an integer type and for values beyond the type's range.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<(), SaveError> {
        // A name not announced gets its error from `write`.
        let dtype = self.dtypes.get(name).copied().unwrap_or(Dtype::F32);
        let bytes = dtype.encode(values).map_err(|e| SaveError::tensor(&self.path, name, e))?;
        self.write(name, &bytes)
    }

    /// Flushes and publishes the file.
    ///
    /// # Errors
    /// [`SaveError`] if a tensor was not written, or the system fails to flush.
    pub fn finish(self) -> Result<(), SaveError> {
        self.file.finish()
    }
}

/// Writes a checkpoint as shards of limited size with an index, tensor by tensor, in any order.
///
/// Tensors fill the shards in alphabetical order; one larger than the limit gets its own. A
/// checkpoint that fits one file becomes `model.safetensors` without an index. Each file appears
/// whole; for a folder that appears whole, write into an
/// [`AtomicFolder`](crate::atomic::AtomicFolder).
#[derive(Debug)]
pub struct ShardedWriter {
    folder: PathBuf,
    shards: Vec<SafetensorsWriter>,
    /// The text of the index, where there are several files.
    index: Option<String>,
    places: BTreeMap<String, usize>,
}

impl ShardedWriter {
    /// Announces all tensors and starts the files in a folder that exists.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::create`].
    pub fn create(
        folder: &Path,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        max_shard_bytes: u64,
    ) -> Result<Self, SaveError> {
        let (groups, index) = shards(folder, specs, metadata, max_shard_bytes)?;
        let mut shards = Vec::with_capacity(groups.len());
        let mut places = BTreeMap::new();
        for (i, (name, group)) in groups.into_iter().enumerate() {
            places.extend(group.iter().map(|spec| (spec.name.clone(), i)));
            let shard = SafetensorsWriter::start(&folder.join(&name), group.into_iter(), metadata)?;
            shards.push(shard);
        }
        Ok(Self { folder: folder.to_path_buf(), shards, index, places })
    }

    /// Writes a tensor's numbers as they are stored: row-major, little endian.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::write`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.shard_of(name)?.write(name, bytes)
    }

    /// Writes `f32` values in the float type announced.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::write_f32`].
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<(), SaveError> {
        self.shard_of(name)?.write_f32(name, values)
    }

    fn shard_of(&mut self, name: &str) -> Result<&mut SafetensorsWriter, SaveError> {
        let Some(place) = self.places.get(name) else {
            let near = crate::near::near(name, self.places.keys().map(String::as_str));
            let path = self.folder.join(INDEX_FILE);
            return Err(SaveError::tensor(&path, name, TensorProblem::Unknown { near }));
        };
        Ok(&mut self.shards[*place])
    }

    /// Flushes and publishes the shards, then the index.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::finish`]; nothing is published unless every tensor was written.
    pub fn finish(self) -> Result<(), SaveError> {
        for shard in &self.shards {
            shard.file.check_complete()?;
        }
        for shard in self.shards {
            shard.finish()?;
        }
        if let Some(index) = self.index {
            write_file(&self.folder.join(INDEX_FILE), index.as_bytes())?;
        }
        Ok(())
    }
}

/// Writes a whole safetensors file in one step.
///
/// # Errors
/// As [`SafetensorsWriter`].
pub fn write_safetensors<B: AsRef<[u8]>>(
    path: &Path,
    tensors: &[(TensorSpec, B)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), SaveError> {
    let specs = tensors.iter().map(|(spec, _)| spec);
    let mut writer = SafetensorsWriter::start(path, specs, metadata)?;
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes.as_ref())?;
    }
    writer.finish()
}

/// Makes a safetensors file in memory.
///
/// # Errors
/// [`SaveError`] for repeated names, sizes that overflow, or bytes that do not fill their shape.
pub fn safetensors_bytes<B: AsRef<[u8]>>(
    tensors: &[(TensorSpec, B)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, SaveError> {
    let path = Path::new("memory");
    let layout = Layout::new(path, tensors.iter().map(|(spec, _)| spec), metadata)?;
    let contents: BTreeMap<&str, &[u8]> =
        tensors.iter().map(|(spec, bytes)| (spec.name.as_str(), bytes.as_ref())).collect();
    let mut file = layout.head;
    for (spec, span) in layout.specs.iter().zip(&layout.spans) {
        let bytes = contents[spec.name.as_str()];
        let (expected, got) = (span.end - span.start, bytes.len() as u64);
        if expected != got {
            let problem = TensorProblem::WrongLength { expected, got };
            return Err(SaveError::tensor(path, &spec.name, problem));
        }
        file.extend_from_slice(bytes);
    }
    Ok(file)
}
