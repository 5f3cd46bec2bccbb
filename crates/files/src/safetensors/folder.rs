//! A checkpoint of one file or of several with an index.

use std::collections::{BTreeMap, btree_map::Entry};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::{Problem, SafetensorsError};
use super::file::{SafetensorsFile, TensorView};
use super::header::Pairs;
use super::{INDEX_FILE, SINGLE_FILE};
use crate::near::near;

/// Largest index read; one line per tensor makes a few megabytes for the largest models there are.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// A checkpoint: one safetensors file, or the shards a `model.safetensors.index.json` names.
#[derive(Debug, Clone)]
pub struct Safetensors {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Which file holds a tensor.
    holders: BTreeMap<String, usize>,
}

impl Safetensors {
    /// Opens a file, an index, or a folder with either (the index wins). Reads no weights.
    ///
    /// A tensor that a shard holds and the index does not name is part of the checkpoint, as it is
    /// for the ecosystem's own loaders.
    ///
    /// # Errors
    /// [`SafetensorsError`] if a file is missing or breaks a rule of the format, if index and
    /// shards disagree, or if the index names a path outside of its folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SafetensorsError> {
        let path = path.as_ref();
        if path.is_dir() {
            let (index, single) = (path.join(INDEX_FILE), path.join(SINGLE_FILE));
            return if index.exists() {
                Self::open_shards(&index)
            } else if single.exists() {
                Self::open_file(&single)
            } else {
                Err(SafetensorsError { file: path.to_path_buf(), problem: Problem::NoWeights })
            };
        }
        let is_index = path.to_str().is_some_and(|p| p.ends_with(".index.json"));
        if is_index { Self::open_shards(path) } else { Self::open_file(path) }
    }

    fn open_file(path: &Path) -> Result<Self, SafetensorsError> {
        let file = SafetensorsFile::open(path)?;
        let holders = file.names().map(|name| (name.to_owned(), 0)).collect();
        Ok(Self { path: path.to_path_buf(), files: vec![file], holders })
    }

    fn open_shards(index: &Path) -> Result<Self, SafetensorsError> {
        let fail = |problem| SafetensorsError { file: index.to_path_buf(), problem };
        let wanted = read_index(index).map_err(fail)?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &wanted {
            if !stays_inside(shard) {
                let (tensor, shard) = (tensor.clone(), shard.clone());
                return Err(fail(Problem::EscapesFolder { tensor, shard }));
            }
            by_shard.entry(shard).or_default().push(tensor);
        }
        let folder = index.parent().unwrap_or(Path::new(""));
        let mut files: Vec<SafetensorsFile> = Vec::with_capacity(by_shard.len());
        let mut holders: BTreeMap<String, usize> = BTreeMap::new();
        for (shard, tensors) in &by_shard {
            let path = folder.join(shard);
            if !path.exists() {
                return Err(fail(Problem::MissingShard {
                    shard: (*shard).to_owned(),
                    tensors: tensors.len(),
                    first: tensors[0].to_owned(),
                }));
            }
            let file = SafetensorsFile::open(path)?;
            if let Some(tensor) = tensors.iter().find(|tensor| file.get(tensor).is_none()) {
                let (tensor, shard) = ((*tensor).to_owned(), (*shard).to_owned());
                return Err(fail(Problem::NotInShard { tensor, shard }));
            }
            for name in file.names() {
                if wanted.get(name).is_some_and(|holder| holder != shard) {
                    continue;
                }
                match holders.entry(name.to_owned()) {
                    Entry::Vacant(entry) => {
                        entry.insert(files.len());
                    }
                    Entry::Occupied(entry) => {
                        let shards: Vec<&&str> = by_shard.keys().collect();
                        return Err(fail(Problem::InTwoShards {
                            tensor: name.to_owned(),
                            first: (*shards[*entry.get()]).to_owned(),
                            second: (*shard).to_owned(),
                        }));
                    }
                }
            }
            files.push(file);
        }
        Ok(Self { path: index.to_path_buf(), files, holders })
    }

    /// Returns the path of the file or index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Tells whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// Lists the tensors' names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.holders.keys().map(String::as_str)
    }

    /// Lists the tensors in alphabetical order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.names().filter_map(|name| self.get(name))
    }

    /// Looks up a tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.holders.get(name)?].get(name)
    }

    /// Looks up a tensor that must be there.
    ///
    /// # Errors
    /// [`Problem::Missing`], with near names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, SafetensorsError> {
        self.get(name).ok_or_else(|| SafetensorsError {
            file: self.path.clone(),
            problem: Problem::Missing { tensor: name.to_owned(), near: near(name, self.names()) },
        })
    }
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Pairs<String>,
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Problem> {
    let bytes = std::fs::metadata(path)?.len();
    if bytes > MAX_INDEX_BYTES {
        let message = format!("it has {bytes} bytes, at most {MAX_INDEX_BYTES} are read");
        return Err(Problem::Index { message });
    }
    let text = std::fs::read(path)?;
    let index: RawIndex =
        serde_json::from_slice(&text).map_err(|e| Problem::Index { message: e.to_string() })?;
    let mut map = BTreeMap::new();
    for (tensor, shard) in index.weight_map.0 {
        if map.contains_key(&tensor) {
            return Err(Problem::DuplicateName { name: tensor });
        }
        map.insert(tensor, shard);
    }
    Ok(map)
}

/// Tells whether a path of the index stays below its folder, on every system.
fn stays_inside(shard: &str) -> bool {
    let normal = |part| matches!(part, Component::Normal(_));
    !shard.is_empty()
        && !shard.contains(['\\', ':', '\0'])
        && Path::new(shard).components().all(normal)
}
