//! From a model's name to something that can run: weights, architecture, tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::recipe::{ArithmeticName, ComputeOptions, WeightsName};
use retune_core::kernels::matrix::{Arithmetic, Form};
use retune_core::model::Model;
use retune_core::random::Seed;
use retune_core::weights::{Packing, Weights};
use retune_data::tokenizer::{GgufTokenizer, Tokenizer};
use retune_hub::{Found, Location, find};
use retune_methods::adapter::{Adapter, Lower};
use retune_models::{Checkpoint, Task, open_for};
use tensor::Device;

/// A model that was found, before its weights are opened.
#[derive(Debug)]
pub struct Located {
    /// How it was found.
    pub found: Found,
    /// Its folder or file.
    pub path: PathBuf,
}

impl Located {
    /// Finds a model by name, downloading it where needed and allowed.
    ///
    /// # Errors
    /// If it is nowhere to be had; the error lists every place asked.
    pub fn find(name: &str, environment: &mut Environment<'_>) -> Result<Self> {
        let found = find(name, &environment.hub, environment.fetch, &mut *environment.downloads)?;
        let path = match &found.location {
            Location::Folder(path) | Location::Gguf(path) => path.clone(),
            Location::Builtin(name) => crate::builtin::unpack(name, &environment.hub.cache)?,
        };
        Ok(Self { found, path })
    }

    /// Opens the tokenizer beside or inside the weights.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        open_tokenizer(&self.path)
    }
}

/// Opens the tokenizer of a folder or GGUF file.
///
/// # Errors
/// If there is none, or it cannot be read.
pub fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() {
        return Ok(Tokenizer::from_folder(path)?);
    }
    let file = retune_files::gguf::GgufFile::open(path).map_err(retune_core::Error::from)?;
    let raw = retune_models::gguf::GgufTokenizer::read(file.metadata())?;
    let metadata = GgufTokenizer {
        model: raw.model,
        pre: raw.pre,
        tokens: raw.tokens,
        scores: raw.scores,
        token_types: raw.token_types,
        merges: raw.merges,
        bos: raw.bos,
        eos: raw.eos,
        unk: raw.unknown,
        pad: raw.padding,
        add_bos: raw.add_bos,
        add_eos: raw.add_eos,
        add_space_prefix: raw.add_space_prefix,
        chat_template: raw.chat_template,
    };
    Ok(Tokenizer::from_gguf(metadata, &path.display().to_string())?)
}

/// A model whose weights can be read.
#[derive(Debug)]
pub struct Opened {
    /// Files, configuration and architecture.
    pub checkpoint: Checkpoint,
    /// The frozen base.
    pub weights: Weights,
    /// SHA-256 that stands for the base.
    pub fingerprint: String,
    /// Adapters that were merged into the weights.
    pub under: Vec<Lower>,
}

impl Opened {
    /// Returns the architecture.
    pub fn model(&self) -> &dyn Model {
        self.checkpoint.model.as_ref()
    }

    /// Opens the weights for a task.
    ///
    /// # Errors
    /// If files are missing, damaged, or of an unknown architecture.
    pub fn open(
        located: &Located,
        task: &Task,
        seed: Seed,
        compute: &ComputeOptions,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        Self::open_packed(located, task, seed, packing(compute), tokenizer)
    }

    /// Opens the weights for a task, in a form and an arithmetic no recipe asks for too.
    ///
    /// # Errors
    /// As [`Opened::open`].
    pub fn open_packed(
        located: &Located,
        task: &Task,
        seed: Seed,
        packing: Packing,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        let checkpoint = open_for(&located.path, task, seed)?;
        if let Some(tokenizer) = tokenizer {
            tokenizer.check_fits(checkpoint.model.spec().vocabulary)?;
        }
        let fingerprint = match &located.found.identity.sha256 {
            Some(known) => known.clone(),
            None => checkpoint.fingerprint(),
        };
        let weights = Weights::new(
            Arc::clone(&checkpoint.source),
            Arc::clone(checkpoint.model.spec()),
            packing,
            &Device::flex(),
        )?;
        Ok(Self { checkpoint, weights, fingerprint, under: Vec::new() })
    }
}

/// Returns the hash a model is recognised by, without opening its weights for use.
///
/// # Errors
/// If files are missing, damaged, or of an unknown architecture.
pub fn fingerprint(located: &Located) -> Result<String> {
    match &located.found.identity.sha256 {
        Some(known) => Ok(known.clone()),
        None => Ok(retune_models::open(&located.path)?.fingerprint()),
    }
}

/// Refuses an adapter that was trained on another base.
///
/// An adapter that does not say what it was trained on (PEFT's own do not) is taken as it is; its
/// shapes are still checked one by one.
///
/// # Errors
/// [`Error::OtherBase`], unless forced.
pub fn check_base(folder: &Path, adapter: &Adapter, opened: &Opened, force: bool) -> Result<()> {
    match adapter.base() {
        Some(base) if base.fingerprint != opened.fingerprint && !force => Err(Error::OtherBase {
            path: folder.to_path_buf(),
            expected: format!("{} ({})", base.name, base.fingerprint),
            found: format!("{} ({})", opened.checkpoint.path.display(), opened.fingerprint),
        }),
        _ => Ok(()),
    }
}

/// Returns the form and arithmetic a recipe asks for.
pub fn packing(compute: &ComputeOptions) -> Packing {
    Packing {
        form: match compute.weights {
            WeightsName::F32 | WeightsName::Stored => Form::F32,
            WeightsName::Bf16 => Form::Bf16,
        },
        keep_blocks: compute.weights == WeightsName::Stored,
        arithmetic: match compute.arithmetic {
            ArithmeticName::F32 => Arithmetic::F32,
            ArithmeticName::Bf16 => Arithmetic::Bf16,
        },
    }
}
