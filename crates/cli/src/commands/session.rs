//! A model with its adapter, opened to be used.

use std::path::PathBuf;

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
use retune_methods::adapter::{Adapter, LABELS};
use retune_models::Task;
use retune_run::adapters::{Adapters, InForce, attach_adapters, read_adapters};
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

/// Shows what a person should know beside the result.
pub(crate) fn warn(notes: &[String], quiet: bool) {
    for note in notes.iter().filter(|_| !quiet) {
        eprintln!("warning: {note}");
    }
}

/// A model that can be asked.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) located: Located,
    pub(crate) opened: Opened,
    pub(crate) adapters: Adapters,
    changes: Changes,
    parameters: Parameters,
}

impl Session {
    /// Opens a model for its numbers, in `f32`, and puts adapters in force, each on top of those
    /// before it.
    ///
    /// # Errors
    /// If one cannot be read, or is of another base and `force` is not given.
    pub(crate) fn open(
        model: &str,
        adapters: &[PathBuf],
        force: bool,
        quiet: bool,
    ) -> Result<Self, Failure> {
        Self::open_packed(model, adapters, &[Packing::default()], force, quiet)
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
        Self::open_packed(&arguments.model, &arguments.adapters, &packings, arguments.force, quiet)
    }

    /// Opens a model in the first of `packings` that the adapters can be attached to.
    fn open_packed(
        model: &str,
        adapters: &[PathBuf],
        packings: &[Packing],
        force: bool,
        quiet: bool,
    ) -> Result<Self, Failure> {
        with_environment(quiet, |environment| {
            let located = Located::find(model, environment)?;
            let adapters = read_adapters(adapters)?;
            let task = adapters
                .iter()
                .find_map(|(_, adapter)| labels(adapter))
                .map_or(Task::AsSaved, |labels| Task::Classify { labels });
            let mut packings = packings.iter().copied().peekable();
            loop {
                let packing = packings.next().unwrap_or_default();
                let opened = Opened::open_packed(&located, &task, Seed(0), packing, None)?;
                let attached = attach_adapters(&adapters, &opened, force);
                if packings.peek().is_some() && attached.as_ref().is_err_and(is_unsupported) {
                    continue;
                }
                let InForce { changes, parameters, notes } = attached?;
                warn(&notes, quiet);
                return Ok(Self { located, opened, adapters, changes, parameters });
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

fn is_unsupported(error: &retune_run::Error) -> bool {
    matches!(error, retune_run::Error::Core(Error::Unsupported { .. }))
}

/// Returns the class names an adapter of a classifier was trained on, where its file says so.
fn labels(adapter: &Adapter) -> Option<Vec<String>> {
    let labels = adapter.config.get(LABELS)?.as_array()?;
    labels.iter().map(|label| label.as_str().map(str::to_owned)).collect()
}
