//! Writing GGUF files tensor by tensor.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::metadata::{Array, Metadata, Value};
use super::parse::{alignment, byte_count};
use super::{MAGIC, MAX_DEPTH, MAX_KEY_BYTES, MAX_RANK, VERSION};
use crate::ggml::BlockType;
use crate::placed::{PlacedFile, SaveError, TensorProblem};

/// llama.cpp keeps names in 64 bytes with a final NUL.
const MAX_NAME_BYTES: usize = 63;

/// Name, block type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufSpec {
    /// Its name.
    pub name: String,
    /// How its numbers are stored.
    pub kind: BlockType,
    /// Its shape, slowest dimension first (`[out, in]` for a linear layer).
    pub shape: Vec<usize>,
}

impl GgufSpec {
    /// Puts the three together.
    pub fn new(name: impl Into<String>, kind: BlockType, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), kind, shape: shape.into() }
    }
}

/// Writes one GGUF v3 file tensor by tensor, in any order, holding none of them.
///
/// Keys and tensors stand in the file as given. The file appears when [`Self::finish`] returns;
/// before that, or if the writer is dropped, the target is as it was.
///
/// # Examples
/// ```
/// # use retune_files::{ggml::BlockType, gguf::{GgufFile, GgufSpec, GgufWriter, Metadata}};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("lora.gguf");
/// let mut metadata = Metadata::default();
/// metadata.insert("general.architecture", "llama");
/// let specs = [GgufSpec::new("blk.0.attn_q.weight.lora_a", BlockType::F32, [2, 3])];
/// let mut writer = GgufWriter::create(&path, &metadata, &specs)?;
/// writer.write_f32("blk.0.attn_q.weight.lora_a", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// writer.finish()?;
///
/// let file = GgufFile::open(&path)?;
/// assert_eq!(file.metadata().str("general.architecture")?, "llama");
/// assert_eq!(file.tensor("blk.0.attn_q.weight.lora_a")?.shape, [2, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: PlacedFile,
    kinds: BTreeMap<String, BlockType>,
}

impl GgufWriter {
    /// Announces all keys and tensors and starts the file. `general.alignment` among the keys is
    /// respected; without it, tensors are aligned to 32 bytes.
    ///
    /// # Errors
    /// [`SaveError`] for repeated or overlong names, rows that do not divide into blocks, more than
    /// four dimensions, or a target that cannot be written.
    pub fn create(path: &Path, metadata: &Metadata, specs: &[GgufSpec]) -> Result<Self, SaveError> {
        let layout = layout(path, metadata, specs)?;
        let names = specs.iter().map(|spec| spec.name.clone());
        let spans = names.zip(layout.spans);
        let file = PlacedFile::create(path, &layout.head, spans, layout.length)?;
        let kinds = specs.iter().map(|spec| (spec.name.clone(), spec.kind)).collect();
        Ok(Self { path: path.to_path_buf(), file, kinds })
    }

    /// Writes a tensor's blocks as they are stored.
    ///
    /// # Errors
    /// [`SaveError`] for a name not announced or already written, a wrong length, or a full disk.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.file.write(name, bytes)
    }

    /// Writes `f32` values in the block type announced.
    ///
    /// # Errors
    /// As [`Self::write`]; also for a type that is not written and for values beyond its range.
    pub fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<(), SaveError> {
        // A name not announced gets its error from `write`.
        let kind = self.kinds.get(name).copied().unwrap_or(BlockType::F32);
        let fail = |e| SaveError::tensor(&self.path, name, TensorProblem::Quantize(e));
        let mut bytes = vec![0; kind.bytes_for(values.len()).map_err(fail)?];
        kind.quantize(values, &mut bytes).map_err(fail)?;
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

/// Makes a GGUF v3 file in memory.
///
/// # Errors
/// As [`GgufWriter::create`] and [`GgufWriter::write`].
pub fn gguf_bytes<B: AsRef<[u8]>>(
    metadata: &Metadata,
    tensors: &[(GgufSpec, B)],
) -> Result<Vec<u8>, SaveError> {
    let path = Path::new("memory");
    let specs: Vec<GgufSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let layout = layout(path, metadata, &specs)?;
    let mut file = layout.head;
    for ((spec, bytes), span) in tensors.iter().zip(layout.spans) {
        let bytes = bytes.as_ref();
        let (expected, got) = (span.end - span.start, bytes.len() as u64);
        if expected != got {
            let problem = TensorProblem::WrongLength { expected, got };
            return Err(SaveError::tensor(path, &spec.name, problem));
        }
        file.resize(span.start as usize, 0);
        file.extend_from_slice(bytes);
    }
    file.resize(layout.length as usize, 0);
    Ok(file)
}

struct Layout {
    head: Vec<u8>,
    spans: Vec<Range<u64>>,
    length: u64,
}

fn layout(path: &Path, metadata: &Metadata, specs: &[GgufSpec]) -> Result<Layout, SaveError> {
    let unfit = |message: String| SaveError::Unfit { file: path.to_path_buf(), message };
    let alignment = alignment(metadata).map_err(|e| unfit(e.to_string()))? as u64;
    let mut head = Vec::from(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend((specs.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        if key.len() > MAX_KEY_BYTES {
            let got = key.len();
            return Err(unfit(format!("key of {got} bytes, at most {MAX_KEY_BYTES} are allowed")));
        }
        put_text(&mut head, key);
        if !put_value(&mut head, value) {
            return Err(unfit(format!(
                "key '{key}' nests arrays more than {MAX_DEPTH} deep, which readers refuse"
            )));
        }
    }
    let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(SaveError::tensor(path, pair[0], TensorProblem::Duplicate));
    }
    let mut offsets = Vec::with_capacity(specs.len());
    let mut end = 0u64;
    for spec in specs {
        let fail = |problem| SaveError::tensor(path, &spec.name, problem);
        let shape = |why: &str| {
            fail(TensorProblem::Shape { shape: spec.shape.clone(), why: why.to_owned() })
        };
        if spec.name.len() > MAX_NAME_BYTES {
            return Err(fail(TensorProblem::Name("llama.cpp keeps at most 63 bytes")));
        }
        if spec.shape.len() > MAX_RANK {
            return Err(shape("ggml has at most 4 dimensions"));
        }
        let bytes = byte_count(spec.kind, &spec.shape)
            .map_err(|e| fail(TensorProblem::Quantize(e)))?
            .ok_or_else(|| shape("its size overflows"))? as u64;
        put_text(&mut head, &spec.name);
        head.extend((spec.shape.len() as u32).to_le_bytes());
        for d in spec.shape.iter().rev() {
            head.extend((*d as u64).to_le_bytes());
        }
        head.extend(spec.kind.id().to_le_bytes());
        head.extend(end.to_le_bytes());
        let start = end;
        end = start
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            // Leaves room for the head and stays a file size every system accepts.
            .filter(|end| *end < u64::MAX / 4)
            .ok_or_else(|| shape("the file's size overflows"))?;
        offsets.push(start..start + bytes);
    }
    let padded = (head.len() as u64).next_multiple_of(alignment);
    head.resize(padded as usize, 0);
    let spans = offsets.into_iter().map(|span| span.start + padded..span.end + padded).collect();
    Ok(Layout { head, spans, length: padded + end })
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes a value's type and the value; false if arrays nest too deep.
fn put_value(out: &mut Vec<u8>, value: &Value) -> bool {
    let id: u32 = match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    };
    out.extend(id.to_le_bytes());
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_text(out, v),
        Value::Array(v) => return put_array(out, v, 0),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
    true
}

fn put_array(out: &mut Vec<u8>, array: &Array, depth: usize) -> bool {
    if depth == MAX_DEPTH {
        return false;
    }
    let id: u32 = match array {
        Array::U8(_) => 0,
        Array::I8(_) => 1,
        Array::U16(_) => 2,
        Array::I16(_) => 3,
        Array::U32(_) => 4,
        Array::I32(_) => 5,
        Array::F32(_) => 6,
        Array::Bool(_) => 7,
        Array::String(_) => 8,
        Array::Array(_) => 9,
        Array::U64(_) => 10,
        Array::I64(_) => 11,
        Array::F64(_) => 12,
    };
    out.extend(id.to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|v| u8::from(*v))),
        Array::String(v) => v.iter().for_each(|v| put_text(out, v)),
        Array::Array(v) => return v.iter().all(|v| put_array(out, v, depth + 1)),
        Array::U64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
    }
    true
}
