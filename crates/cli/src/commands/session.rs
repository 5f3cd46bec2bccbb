//! A model with its adapter, opened to be used.

use std::path::Path;

use retune_core::Error;
use retune_core::change::Changes;
use retune_core::kernels::matrix::Arithmetic;
use retune_core::model::Tuned;
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::weights::Packing;
use retune_data::prepare::{PrepareOptions, Preparer};
use retune_data::template::{ChatTemplate, Date, TemplateSettings};
use retune_data::tokenizer::Tokenizer;
use retune_hub::Network;
use retune_methods::adapter::Adapter;
use retune_models::Task;
use retune_run::environment::Environment;
use retune_run::open::{Located, Opened};

use crate::args::ModelArguments;
use crate::environment::{clock, hub, machine, peak_bytes};
use crate::failure::Failure;
use crate::progress::Downloads;

/// Lets `work` use the outside world.
pub(crate) fn with_environment<T>(
    quiet: bool,
    work: impl FnOnce(&mut Environment<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut downloads = Downloads::new(quiet);
    let mut environment = Environment {
        hub: hub()?,
        fetch: &Network,
        clock: &clock,
        peak_bytes: &peak_bytes,
        machine: machine(),
        downloads: &mut downloads,
    };
    work(&mut environment)
}

/// A model that can be asked.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) located: Located,
    pub(crate) opened: Opened,
    pub(crate) adapter: Option<Adapter>,
    changes: Changes,
    parameters: Parameters,
}

impl Session {
    /// Opens a model for its numbers, in `f32`, and puts the adapter's changes in force.
    ///
    /// # Errors
    /// If either cannot be read, or the adapter is of another base and `force` is not given.
    pub(crate) fn open(
        model: &str,
        adapter: Option<&Path>,
        force: bool,
        quiet: bool,
    ) -> Result<Self, Failure> {
        Self::open_packed(model, adapter, &[Packing::default()], force, quiet)
    }

    /// Opens a model for its answers: quantised blocks stay as they lie, and are multiplied with
    /// inputs rounded to 8 bits unless asked otherwise.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub(crate) fn to_answer(arguments: &ModelArguments, quiet: bool) -> Result<Self, Failure> {
        // This thread becomes a worker: handing a token's hundreds of small products to others, and
        // waiting for each, would cost more than many of them. Fails where the pool is there already.
        let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
        let arithmetic = if arguments.exact { Arithmetic::F32 } else { Arithmetic::Int8 };
        let blocks = Packing { keep_blocks: true, arithmetic, ..Packing::default() };
        // Some adapters write into the weights, which blocks do not allow.
        let packings = [blocks, Packing::default()];
        let adapter = arguments.adapter.as_deref();
        Self::open_packed(&arguments.model, adapter, &packings, arguments.force, quiet)
    }

    /// Opens a model in the first of `packings` that the adapter can be attached to.
    fn open_packed(
        model: &str,
        adapter: Option<&Path>,
        packings: &[Packing],
        force: bool,
        quiet: bool,
    ) -> Result<Self, Failure> {
        with_environment(quiet, |environment| {
            let located = Located::find(model, environment)?;
            let adapter_files = adapter.map(Adapter::read).transpose()?;
            let task = adapter_files
                .as_ref()
                .and_then(labels)
                .map_or(Task::AsSaved, |labels| Task::Classify { labels });
            let mut packings = packings.iter().copied().peekable();
            loop {
                let packing = packings.next().unwrap_or_default();
                let opened = Opened::open_packed(&located, &task, Seed(0), packing, None)?;
                let mut parameters = Parameters::new(opened.weights.device());
                let mut changes = Changes::default();
                if let (Some(folder), Some(adapter)) = (adapter, &adapter_files) {
                    retune_run::open::check_base(folder, adapter, &opened, force)?;
                    let method = adapter.method()?;
                    changes = match method.attach(&opened.weights, &mut parameters, Seed(0)) {
                        Err(Error::Unsupported { .. }) if packings.peek().is_some() => continue,
                        attached => attached?,
                    };
                    adapter.fill(folder, &mut parameters)?;
                }
                return Ok(Self { located, opened, adapter: adapter_files, changes, parameters });
            }
        })
    }

    /// Returns the model with its changes.
    pub(crate) fn tuned(&self) -> Tuned<'_> {
        Tuned {
            model: self.opened.checkpoint.model.as_ref(),
            weights: &self.opened.weights,
            changes: &self.changes,
            parameters: &self.parameters,
        }
    }

    /// Opens the tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, Failure> {
        let tokenizer = self.located.tokenizer()?;
        tokenizer.check_fits(self.opened.checkpoint.model.spec().vocabulary)?;
        Ok(tokenizer)
    }

    /// Opens the tokenizer and compiles its chat template: what turns texts into prompts.
    pub(crate) fn preparer(&self) -> Result<Preparer, Failure> {
        let tokenizer = self.tokenizer()?;
        let spec = self.opened.checkpoint.model.spec();
        let date = Date::from_unix(clock() as i64);
        let settings = TemplateSettings::of(&tokenizer, Some(date));
        let template = tokenizer
            .chat_template()
            .map(|source| ChatTemplate::compile(source, settings))
            .transpose()?;
        let options =
            PrepareOptions { decoder_start: spec.decoder_start(), ..PrepareOptions::default() };
        Ok(Preparer::new(tokenizer, template, options)?)
    }
}

/// Returns the class names an adapter of a classifier was trained on, where its file says so.
fn labels(adapter: &Adapter) -> Option<Vec<String>> {
    let labels = adapter.config.get("retune_labels")?.as_array()?;
    labels.iter().map(|label| label.as_str().map(str::to_owned)).collect()
}
