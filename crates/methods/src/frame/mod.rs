//! The frame of methods that change weights one by one and are written as PEFT adapters.
//!
//! A method says which tensors one weight gets ([`WeightMethod::layout`]) and what they do to it
//! ([`WeightMethod::build`]). Targets, planning, initial values, naming and the adapter's
//! configuration are here, once.

mod formula;
mod slot;
mod tuner;

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt::Debug;

use retune_core::Result;
use retune_core::method::{Card, FileIntegers, FileTensors, Promises, StepView, Working};
use retune_core::parameters::Parameters;
use retune_core::random::Random;
use retune_core::spec::{Kind, ModelSpec, Role};
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::{Options, options};
use serde_json::{Map, Value};

use crate::peft_config;

pub use formula::{Added, Addition, Built, Delta, Formula, Held, View};
pub use slot::{Slot, Values};
pub use tuner::{Tuner, plugin};

options! {
    /// Which modules a method changes.
    pub struct Places("places") {
        /// Targeted modules: suffixes, one regular expression, or all-linear; empty means the
        /// method's own choice.
        targets: Vec<String> = Vec::new();
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Modules that train whole and are saved beside the change.
        modules_to_save: Vec<String> = Vec::new();
    }
}

/// What is fixed about a method.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// Name, sentence, source and rates; the options are filled in by [`plugin`].
    pub card: Card,
    /// PEFT's name of the adapter type.
    pub peft_type: &'static str,
    /// Options and the keys of `adapter_config.json` that hold them.
    pub keys: &'static [(&'static str, &'static str)],
    /// Keys that are written as this JSON and refused when a file has something else.
    pub fixed: &'static [(&'static str, &'static str)],
    /// Keys that are written as this JSON and mean nothing for a trained adapter.
    pub written: &'static [(&'static str, &'static str)],
    /// Which weights can be changed.
    pub among: Among,
    /// What `targets` is where nothing is written.
    pub targets: &'static [&'static str],
    /// Tables of options, as TOML, that between them use every path through the method on models
    /// of width 16.
    pub examples: &'static [&'static str],
}

/// A weight that is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its full name.
    pub name: String,
    /// Its module's path.
    pub module: String,
    /// Its place among the targets, in the order of the forward pass.
    pub index: usize,
    /// Outputs of a linear layer.
    pub rows: usize,
    /// Inputs of a linear layer.
    pub columns: usize,
    /// How it is used.
    pub kind: Kind,
    /// What it does.
    pub role: Role,
    /// Whether its module has a bias.
    pub has_bias: bool,
}

impl Target {
    /// Returns the weight's shape as a matrix.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Returns the name of the module's bias.
    pub fn bias(&self) -> String {
        format!("{}.bias", self.module)
    }
}

/// What a method may look at beside one target.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Every target, in the order of the forward pass.
    pub targets: &'a [Target],
    /// Whether the adapter's file holds what could also be made again from a seed.
    pub is_complete: bool,
    /// The configuration of the adapter, where it was read from a file.
    pub original: Option<&'a Value>,
    /// Whole numbers that are made once for all targets.
    pub once: &'a OnceCell<Vec<i32>>,
    /// What [`WeightMethod::shared_values`] returned; empty while only planning.
    pub shared: &'a [Values],
}

/// Returns what keeping `matrices` of each target's shape for the backward pass takes.
pub fn kept_matrices(matrices: u64, targets: &[Target]) -> Working {
    let count: usize = targets.iter().map(|target| target.rows * target.columns).sum();
    Working { bytes: 4 * matrices * count as u64, ..Working::default() }
}

/// Returns how many numbers a token has in the inputs of all targets, counted once where neighbours read
/// the same.
pub fn distinct_inputs(targets: &[Target]) -> u64 {
    let source = |target: &Target| match target.role {
        Role::Query | Role::Key | Role::Value => Some(0),
        Role::Gate | Role::Up => Some(1),
        _ => None,
    };
    let mut before = None;
    let mut count = 0;
    for target in targets {
        let own = source(target);
        if own.is_none() || own != before {
            count += target.columns as u64;
        }
        before = own;
    }
    count
}

/// A method that changes weights one by one; its options are the method.
pub trait WeightMethod: Options + Debug + Send + Sync + 'static {
    /// What is fixed about it.
    const FACTS: Facts;

    /// Returns the tensors of one target, in the order [`View::get`] counts them.
    ///
    /// # Errors
    /// If an option is impossible for this weight.
    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>>;

    /// Makes the change of one target, and the values of its computed slots.
    ///
    /// # Errors
    /// If the base cannot be read.
    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        weights: &Weights,
        random: &mut Random,
    ) -> Result<Built>;

    /// Returns the tensors all targets share; their names follow `base_model.`.
    ///
    /// # Errors
    /// If an option is impossible for these weights.
    fn shared(&self, _context: &Context<'_>) -> Result<Vec<Slot>> {
        Ok(Vec::new())
    }

    /// Returns the values of the shared slots that are computed, in their order.
    ///
    /// # Errors
    /// If a base weight cannot be read.
    fn shared_values(&self, _context: &Context<'_>, _weights: &Weights) -> Result<Vec<Values>> {
        Ok(Vec::new())
    }

    /// Returns the targets where none are written, if [`Facts::targets`] does not say.
    fn default_targets(&self, _spec: &ModelSpec) -> Vec<String> {
        Self::FACTS.targets.iter().map(|target| (*target).to_owned()).collect()
    }

    /// Returns whether an adapter's file holds what could also be made again.
    fn is_complete(config: &Value) -> bool {
        config.get(peft_config::COMPLETE).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Returns what a person should know before the first step.
    fn notes(&self, _context: &Context<'_>) -> Vec<String> {
        Vec::new()
    }

    /// Returns what the operations hold through a step, as [`Method::working`] does.
    ///
    /// [`Method::working`]: retune_core::method::Method::working
    fn working(&self, _targets: &[Target]) -> Working {
        Working::default()
    }

    /// Returns what the method promises with these options.
    fn promises(&self) -> Promises {
        Promises::default()
    }

    /// Acts on the gradients of a step, as [`Method::on_gradients`] does.
    ///
    /// [`Method::on_gradients`]: retune_core::method::Method::on_gradients
    fn on_gradients(&self, _step: &mut StepView<'_>) {}

    /// Acts after the parameters have moved.
    fn on_step(&self, _step: &mut StepView<'_>) {}

    /// Says in the configuration of an adapter what training decided.
    fn describe(&self, _parameters: &Parameters, _config: &mut Value) {}

    /// Turns what was trained into what an adapter's file holds.
    fn fold(&self, _parameters: &Parameters, _tensors: &mut FileTensors) {}

    /// Turns what an adapter's file holds into what was attached, as [`Method::unfold`] does.
    ///
    /// [`Method::unfold`]: retune_core::method::Method::unfold
    fn unfold(
        &self,
        _parameters: &Parameters,
        _integers: &FileIntegers,
        _tensors: &mut Cow<'_, FileTensors>,
    ) -> Vec<String> {
        Vec::new()
    }

    /// Edits the configuration a new adapter is written with.
    fn finish_config(&self, _config: &mut Map<String, Value>, _targets: &[Target]) {}

    /// Reads what the list of keys cannot say.
    ///
    /// # Errors
    /// If the configuration asks for something that is not supported.
    fn read_config(&mut self, _config: &Value) -> Result<()> {
        Ok(())
    }
}

/// Formulas on values worked out by hand.
#[cfg(test)]
pub(crate) mod by_hand {
    use retune_core::change::{Mode, Scope};
    use retune_core::parameters::{Integers, Parameters, to_vec};
    use retune_files::Dtype;
    use tensor::{Device, Tensor, TensorData};

    use super::{Formula, Held};

    /// A tensor of a change: shape and values.
    pub(crate) enum Given<'a> {
        Floats(&'a [usize], &'a [f32]),
        Integers(&'a [i32]),
        /// One all targets share.
        Shared(&'a [usize], &'a [f32]),
        SharedIntegers(&'a [i32]),
    }

    /// Computes the changed weight of a base of two rows.
    pub(crate) fn weight(formula: &dyn Formula, base: &[f32], given: &[Given<'_>]) -> Vec<f32> {
        let device = Device::flex();
        let mut parameters = Parameters::new(&device);
        let mut held = Held::default();
        for (place, given) in given.iter().enumerate() {
            let name = place.to_string();
            match given {
                Given::Floats(shape, values) => {
                    held.own.push(parameters.add(name, shape, values.to_vec()));
                }
                Given::Shared(shape, values) => {
                    held.shared.push(parameters.add_buffer(name, shape, values.to_vec()));
                }
                Given::Integers(values) | Given::SharedIntegers(values) => {
                    let limits = vec![i32::MAX];
                    let values = values.to_vec();
                    let shape = [values.len()];
                    let integers = Integers { values, dtype: Dtype::I32, limits };
                    let id = parameters.add_integers(name, &shape, integers);
                    let shared = matches!(given, Given::SharedIntegers(_));
                    if shared { &mut held.shared } else { &mut held.own }.push(id);
                }
            }
        }
        let shape = [2, base.len() / 2];
        let base = Tensor::<2>::from_data(TensorData::new(base.to_vec(), shape), &device);
        let scope = Scope::new(&parameters, Mode::Evaluate);
        to_vec(formula.weight(base, &held.view(&scope)).inner())
    }
}
