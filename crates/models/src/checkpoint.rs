//! Opens a checkpoint: a Hugging Face folder or a GGUF file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::Config;
use crate::emulator::as_configured;
use crate::fingerprint::{Part, fingerprint};
use crate::folder::{FolderSource, read_config};
use crate::fresh::FreshHead;
use crate::gguf::{self, GgufSource, GgufTokenizer};
use crate::heads::{Task, for_task};
use crate::{t5, vit};
use retune_core::model::Model;
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::weights::WeightSource;
use retune_core::{Error, Result};
use retune_files::gguf::GgufFile;
use retune_files::safetensors::Safetensors;

/// How a checkpoint is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A folder with `config.json` and safetensors.
    Folder,
    /// One GGUF file.
    Gguf,
}

/// A checkpoint that was opened: the model it is for and where its weights come from.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder or file.
    pub path: PathBuf,
    /// How it is stored.
    pub kind: FileKind,
    /// The configuration, rewritten for the task.
    pub config: Config,
    /// The architecture.
    pub model: Box<dyn Model>,
    /// The weights, under the names of the model's class.
    pub source: Arc<dyn WeightSource>,
    /// Weights that were drawn because the checkpoint has none for the task, sorted.
    pub fresh: Vec<String>,
    /// Tensors of the files that the model does not use, sorted.
    pub unused: Vec<String>,
    files: Files,
}

/// Where the tensors lie, for what concerns the files rather than the model.
#[derive(Debug)]
enum Files {
    Folder(Safetensors),
    Gguf(GgufFile),
}

impl Checkpoint {
    /// Returns the tokenizer inside a GGUF file; a folder has its own files for it.
    ///
    /// # Errors
    /// If one of its keys has a wrong type.
    pub fn tokenizer(&self) -> Result<Option<GgufTokenizer>> {
        self.gguf().map(|file| GgufTokenizer::read(file.metadata())).transpose()
    }

    /// Returns the GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.files {
            Files::Gguf(file) => Some(file),
            Files::Folder(_) => None,
        }
    }

    /// Hashes the names, shapes and bytes of all tensors in the files, as 64 hexadecimal digits.
    ///
    /// It does not depend on what the checkpoint was opened for, nor on shards and padding.
    ///
    /// # Cost
    /// One pass over the mapped weights on all threads, about a second per gigabyte and core.
    pub fn fingerprint(&self) -> String {
        fingerprint(match &self.files {
            Files::Folder(tensors) => tensors
                .tensors()
                .map(|tensor| Part {
                    name: tensor.name,
                    shape: tensor.shape,
                    kind: tensor.dtype.name(),
                    bytes: tensor.bytes,
                    file: Some(tensor.share()),
                })
                .collect(),
            Files::Gguf(file) => file
                .tensors()
                .map(|tensor| Part {
                    name: tensor.name,
                    shape: tensor.shape,
                    kind: tensor.kind.name(),
                    bytes: tensor.bytes,
                    file: Some(tensor.share()),
                })
                .collect(),
        })
    }
}

/// Opens a checkpoint for what it was saved for. Reads no weights.
///
/// # Errors
/// If files are missing or damaged, the architecture is unknown, or the weights do not belong to
/// the configuration.
pub fn open(path: &Path) -> Result<Checkpoint> {
    open_for(path, &Task::AsSaved, Seed(0))
}

/// Opens a checkpoint for a task; a head it lacks is drawn from `seed`.
///
/// # Errors
/// As [`open`], and if the task's labels are fewer than two or not all different.
pub fn open_for(path: &Path, task: &Task, seed: Seed) -> Result<Checkpoint> {
    let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let (files, saved) = if path.is_dir() {
        // The configuration first: a folder that is no model at all says so by that.
        let config = read_config(path)?;
        let tensors = Safetensors::open(path)?;
        let config = t5::with_own_head(config, tensors.get("lm_head.weight").is_some());
        let config = vit::with_pooler(config, tensors.get("pooler.dense.weight").is_some());
        (Files::Folder(tensors), config)
    } else if is_gguf {
        let file = GgufFile::open(path)?;
        let config = gguf::read_config(&file)?;
        (Files::Gguf(file), config)
    } else {
        return Err(Error::Content {
            path: path.to_path_buf(),
            what: "this is no checkpoint".to_owned(),
            expected: "a folder with config.json and model.safetensors, or a .gguf file".to_owned(),
            found: if path.exists() { "another file" } else { "nothing" }.to_owned(),
            help: "check the path".to_owned(),
        });
    };
    if saved.get("quantization_config").is_some() {
        return Err(Error::Unsupported {
            what: format!("the quantised weights of {}", path.display()),
            help: "use the model's plain checkpoint, or a GGUF file".to_owned(),
        });
    }
    let family = crate::family(&saved)?;
    let (config, keep) = for_task(saved, &family.classes, task)?;
    let model = as_configured((family.build)(&config)?, &config)?;
    let spec = Arc::clone(model.spec());
    let (kind, stored, unused): (FileKind, Arc<dyn WeightSource>, Vec<String>) = match &files {
        Files::Gguf(file) => {
            let source = GgufSource::open(file.clone(), &spec)?;
            let unused = source.unused().to_vec();
            (FileKind::Gguf, Arc::new(source), unused)
        }
        Files::Folder(tensors) => {
            let source = FolderSource::new(tensors.clone(), &spec);
            let unused = unused(&source, &spec);
            (FileKind::Folder, Arc::new(source), unused)
        }
    };
    refuse_strangers(path, &unused, &spec)?;
    let (source, fresh): (Arc<dyn WeightSource>, Vec<String>) = match task {
        Task::Classify { .. } => {
            let source = FreshHead::new(stored, &spec, &config, keep, seed)?;
            let fresh = source.fresh().map(str::to_owned).collect();
            (Arc::new(source), fresh)
        }
        Task::AsSaved | Task::Embed => (stored, Vec::new()),
    };
    Ok(Checkpoint { path: path.to_path_buf(), kind, config, model, source, fresh, unused, files })
}

fn unused(source: &dyn WeightSource, spec: &ModelSpec) -> Vec<String> {
    let known: BTreeSet<&str> = spec.weights.iter().map(|weight| weight.name.as_str()).collect();
    source.names().into_iter().filter(|name| !known.contains(name.as_str())).collect()
}

/// Refuses a tensor that sits in a module the model has, but that the model does not use.
///
/// A bias the configuration does not mention changes every result when it is left out; a whole
/// module left out (a pooler, another task's head) does not.
fn refuse_strangers(path: &Path, unused: &[String], spec: &ModelSpec) -> Result<()> {
    let modules: BTreeSet<&str> = spec.weights.iter().map(WeightSpec::module).collect();
    let stranger = unused.iter().find(|name| {
        let parts = name.rsplit_once('.');
        parts.is_some_and(|(module, last)| {
            matches!(last, "weight" | "bias") && modules.contains(module)
        })
    });
    match stranger {
        Some(name) => Err(Error::Content {
            path: path.to_path_buf(),
            what: format!("the weights hold `{name}`, which the model would leave out"),
            expected: format!("the weights {} has by its configuration", spec.class),
            found: "one more".to_owned(),
            help: "config.json and the weights are of different models, or a switch such as \
                   `attention_bias` is missing in it"
                .to_owned(),
        }),
        None => Ok(()),
    }
}
