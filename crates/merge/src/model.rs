//! The models of a plan, opened, and the values of their tensors.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use retune_files::safetensors::TensorView;
use serde_json::{Map, Value};

use crate::lora::{Lora, LowRank};
use crate::methods::Values;
use crate::plan::ModelName;
use crate::source::Source;
use crate::{Error, Result};

/// A model that was found and opened.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) name: ModelName,
    pub(crate) source: Source,
    pub(crate) config: Map<String, Value>,
    lora: Option<Lora>,
    lora_folder: Option<PathBuf>,
}

impl Model {
    /// Opens a model whose folder is known.
    pub(crate) fn open(name: &ModelName, folder: &Path, lora: Option<&Path>) -> Result<Self> {
        let source = Source::open(folder)?;
        let path = source.folder().join("config.json");
        let config = source.config()?.ok_or_else(|| Error::Content {
            path: path.clone(),
            what: format!("the model {name} has no configuration"),
            expected: "config.json beside the weights".to_owned(),
            found: "nothing".to_owned(),
            help: "give a whole model folder".to_owned(),
        })?;
        if config.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Err(Error::Content {
                path,
                what: format!("the weights of {name} are quantised"),
                expected: "plain weights".to_owned(),
                found: "`quantization_config`".to_owned(),
                help: "merge the unquantised models, then quantise the result".to_owned(),
            });
        }
        let lora_folder = lora.map(Path::to_path_buf);
        let lora = lora.map(|folder| Lora::open(folder, &source)).transpose()?;
        Ok(Self { name: name.clone(), source, config, lora, lora_folder })
    }

    /// Lists the folders the model is read from.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> {
        [Some(self.source.folder()), self.lora_folder.as_deref()].into_iter().flatten()
    }

    /// Opens the values of a tensor, with the adapter's change.
    pub(crate) fn values(&self, tensor: &str) -> Result<Tensor<'_>> {
        let whole = self.lora.as_ref().and_then(|lora| lora.whole(tensor));
        let view = match whole {
            Some(view) => view,
            None => self.source.tensor(tensor)?,
        };
        let change = match &self.lora {
            Some(lora) => lora.change(tensor, view.shape)?,
            None => None,
        };
        Ok(Tensor { model: self, view, change })
    }
}

/// A tensor of a model, read in parts.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    model: &'a Model,
    view: TensorView<'a>,
    change: Option<LowRank>,
}

impl Values for Tensor<'_> {
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        thread_local! {
            static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        SCRATCH.with_borrow_mut(|scratch| self.view.read_f32(start, out, scratch))?;
        if let Some(change) = &self.change {
            change.add(start, out);
        }
        Ok(())
    }

    fn model(&self) -> String {
        self.model.name.to_string()
    }
}
