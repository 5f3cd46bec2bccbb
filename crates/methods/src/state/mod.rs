//! The frame of methods that change states rather than weights.
//!
//! A method says which tensors it keeps ([`StateMethod::slots`]) and what they do
//! ([`StateMethod::build`]). Planning, initial values, heads that train beside, and the adapter's
//! configuration are here, once.

pub mod attend;
pub mod block;
pub mod keys;
pub mod prompt;
pub mod sublayer;

use std::fmt::Debug;
use std::sync::Arc;

use retune_core::change::Changes;
pub use retune_core::method::FileTensors;
use retune_core::method::{
    Card, Method, MethodPlan, PlannedParameter, Promises, Refusal, StepView, Working,
};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{Head, Kind, ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Document, Options, Reader, Table, to_toml};
use serde_json::{Map, Value, json};

use crate::adapter::peft_config;
use crate::replacement;
use keys::Keys;

/// The key that holds a method's options in an adapter that is not one of PEFT's.
const OPTIONS: &str = "retune_options";

/// How a tensor begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// One number everywhere.
    Constant(f32),
    /// Uniform within plus and minus the bound.
    Uniform(f64),
    /// Normal with this deviation.
    Normal(f64),
    /// Normal around 1 with this deviation.
    AroundOne(f64),
    /// Rows of a matrix of the model, by their places, one after another.
    Rows(String, Vec<usize>),
}

/// One tensor a method keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// The name it is saved under.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The weight or site it changes.
    pub place: String,
    /// How it begins.
    pub start: Start,
    /// Whether it trains.
    pub trains: bool,
    /// Its learning rate is the run's times this.
    pub rate_factor: f64,
    /// Whether weight decay applies.
    pub decays: bool,
}

impl Slot {
    /// Makes a tensor that trains at the run's learning rate.
    pub fn new(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        place: impl ToString,
        start: Start,
    ) -> Self {
        Self {
            name: name.into(),
            shape: shape.into(),
            place: place.to_string(),
            start,
            trains: true,
            rate_factor: 1.0,
            decays: true,
        }
    }

    /// Makes it keep its first values.
    #[must_use]
    pub fn frozen(self) -> Self {
        Self { trains: false, ..self }
    }

    /// Adds the parameter with its first values.
    ///
    /// # Errors
    /// If the rows of the model it begins as cannot be read.
    pub fn add(self, weights: &Weights, seed: Seed, parameters: &mut Parameters) -> Result<()> {
        let values = self.values(weights, seed)?;
        let id = if self.trains {
            parameters.add(self.name, &self.shape, values)
        } else {
            parameters.add_buffer(self.name, &self.shape, values)
        };
        let parameter = parameters.get_mut(id);
        parameter.rate_factor = self.rate_factor;
        parameter.decays = self.decays;
        Ok(())
    }

    fn values(&self, weights: &Weights, seed: Seed) -> Result<Vec<f32>> {
        let mut random = seed.stream(&self.name, &[]);
        let mut values = vec![0.0; self.shape.iter().product()];
        match &self.start {
            Start::Constant(value) => values.fill(*value),
            Start::Uniform(bound) => random.fill_uniform(&mut values, *bound),
            Start::Normal(deviation) => random.fill_normal(&mut values, *deviation),
            Start::AroundOne(deviation) => {
                random.fill_normal(&mut values, *deviation);
                for value in &mut values {
                    *value += 1.0;
                }
            }
            Start::Rows(name, rows) => {
                let matrix = weights.matrix(name)?;
                for (out, row) in values.chunks_exact_mut(matrix.columns()).zip(rows) {
                    matrix.row_into(*row, out);
                }
            }
        }
        Ok(values)
    }
}

/// The bound of Kaiming's uniform start with a = √5 for this many inputs.
pub fn kaiming(inputs: usize) -> Start {
    Start::Uniform((inputs as f64).powf(-0.5))
}

/// The parameters made for a method's slots.
#[derive(Debug)]
pub struct Made<'a> {
    /// The frozen base.
    pub weights: &'a Weights,
    /// The run's seed.
    pub seed: Seed,
    parameters: &'a Parameters,
}

impl<'a> Made<'a> {
    /// Names the parameters made over a base.
    pub fn new(weights: &'a Weights, seed: Seed, parameters: &'a Parameters) -> Self {
        Self { weights, seed, parameters }
    }

    /// Returns the parameter of a slot.
    ///
    /// # Panics
    /// If the method planned no slot of this name.
    pub fn id(&self, name: &str) -> ParameterId {
        planned(self.parameters, name)
    }
}

/// Returns the parameter of a slot.
///
/// # Panics
/// If the method planned no slot of this name.
pub fn planned(parameters: &Parameters, name: &str) -> ParameterId {
    parameters.find(name).unwrap_or_else(|| unreachable!("`{name}` was not planned"))
}

/// In which form a method's tensors are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As they train.
    Training,
    /// As an adapter's file has them.
    Saved,
}

/// What a method needs of a model beyond blocks with sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it looks at single weights and what comes out of them.
    Nothing,
    /// Blocks all of one width.
    OneStack,
    /// One text per document, every token in every block.
    OneText,
    /// Words before which it can put tokens.
    Words,
    /// Words of one text.
    OneTextOfWords,
}

impl Needs {
    /// Checks that a model has it.
    ///
    /// # Errors
    /// If it has not.
    pub fn check(self, method: &str, spec: &ModelSpec) -> Result<()> {
        let Some(refusal) = self.refusal().filter(|no| (no.applies)(spec)) else { return Ok(()) };
        Err(Error::Unsupported {
            what: format!("{method} on models {} (here {})", refusal.models, spec.class),
            help: "use a method that changes weights, such as lora, or ssf".to_owned(),
        })
    }

    /// Returns which models do not have it.
    pub fn refusal(self) -> Option<Refusal> {
        match self {
            Self::Nothing => None,
            Self::OneStack => {
                Some(Refusal { models: "of two towers", applies: |spec| spec.towers.len() > 1 })
            }
            Self::OneText => Some(Refusal {
                models: "of two towers, or of encoder and decoder",
                applies: ModelSpec::has_sides,
            }),
            Self::Words => {
                Some(Refusal { models: "that read images", applies: |spec| spec.image().is_some() })
            }
            Self::OneTextOfWords => Some(Refusal {
                models: "that read images, or of encoder and decoder",
                applies: |spec| spec.image().is_some() || spec.has_sides(),
            }),
        }
    }
}

/// A method that changes states, said by its options.
pub trait StateMethod: Options + Debug + Send + Sync + 'static {
    /// Name, sentence, source, rates, options.
    const CARD: Card;

    /// PEFT's name of the adapter type; the method's own in capitals where PEFT has none.
    const PEFT_TYPE: &'static str;

    /// What stands before a module's name where it is saved whole beside the method's tensors.
    const BESIDE: &'static str = crate::adapter::PREFIX;

    /// Lists the tensors, in the order they are made.
    ///
    /// # Errors
    /// If an option is impossible for this model, naming the nearest valid choice.
    fn slots(&self, spec: &ModelSpec, form: Form) -> Result<Vec<Slot>>;

    /// Attaches the changes.
    ///
    /// # Errors
    /// Those of reading weights.
    fn build(&self, spec: &ModelSpec, form: Form, made: &Made<'_>) -> Result<Changes>;

    /// Returns what the method promises with these options.
    fn promises(&self) -> Promises {
        Promises::default()
    }

    /// Returns what these options need of a model.
    fn needs(&self) -> Needs {
        Needs::OneStack
    }

    /// Returns tables of options that between them use every path through the method.
    fn examples() -> &'static [&'static str];

    /// Names modules that train whole and are saved beside.
    fn modules_to_save(&self) -> &[String] {
        &[]
    }

    /// Returns how many positions are taken before each document.
    fn num_positions(&self) -> usize {
        0
    }

    /// Returns how many stacks of blocks PEFT says such a file is for.
    fn num_stacks(_spec: &ModelSpec) -> usize {
        1
    }

    /// Returns what a person should know before the run.
    fn notes(&self, _spec: &ModelSpec) -> Vec<String> {
        Vec::new()
    }

    /// Returns what the operations hold through a step.
    fn working(&self, _spec: &ModelSpec) -> Working {
        Working::default()
    }

    /// Acts between two optimiser steps.
    fn on_step(&self, _step: &mut StepView<'_>) {}

    /// Turns trained tensors into saved ones.
    fn fold(&self, _parameters: &Parameters, _tensors: &mut FileTensors) {}

    /// Adds the method's keys to the configuration of an adapter.
    fn write_config(&self, _spec: &ModelSpec, config: &mut Map<String, Value>) {
        config.insert(OPTIONS.to_owned(), json!(to_toml(&self.write())));
    }

    /// Reads the configuration of an adapter.
    ///
    /// # Errors
    /// If a key is missing or asks for what is not supported.
    fn read_config(keys: &Keys<'_>) -> Result<Self> {
        let text = keys.text(OPTIONS)?.unwrap_or_default();
        let broken = |report: &retune_options::Report| {
            let first = report.diagnostics().first().map_or("", |d| d.message.as_str());
            keys.error(OPTIONS, first)
        };
        let document = Document::parse("adapter_config.json", text).map_err(|r| broken(&r))?;
        Ok(document.read(Self::read).map_err(|report| broken(&report))?.0)
    }
}

/// A [`StateMethod`] as the rest of the program knows methods.
#[derive(Debug, Clone)]
pub struct State<T> {
    /// Its options.
    pub options: T,
    /// The adapter's own configuration where it was read from a file: written back as it was.
    pub original: Option<Value>,
}

/// Reads a method from its table of a recipe.
pub fn read<T: StateMethod>(reader: &mut Reader<'_>) -> Box<dyn Method> {
    Box::new(State { options: T::read(reader), original: None })
}

/// Reads a method from an adapter's configuration.
///
/// # Errors
/// If a key is missing or asks for what is not supported.
pub fn from_adapter<T: StateMethod>(config: &Value) -> Result<Box<dyn Method>> {
    let options = T::read_config(&Keys(config))?;
    Ok(Box::new(State { options, original: Some(config.clone()) }))
}

/// Makes a method's line in the registry.
#[macro_export]
macro_rules! state_plugin {
    ($Options:ty) => {
        /// The method's line in the registry.
        pub const PLUGIN: $crate::registry::Plugin = $crate::registry::Plugin {
            card: <$Options as $crate::state::StateMethod>::CARD,
            read: $crate::state::read::<$Options>,
            adapter: Some((
                <$Options as $crate::state::StateMethod>::PEFT_TYPE,
                $crate::state::from_adapter::<$Options>,
            )),
        };
    };
}

impl<T: StateMethod> State<T> {
    fn form(&self) -> Form {
        if self.original.is_some() { Form::Saved } else { Form::Training }
    }

    fn check_stacks(&self, spec: &ModelSpec) -> Result<()> {
        let original = self.original.as_ref();
        original.map_or(Ok(()), |config| Keys(config).stacks(T::num_stacks(spec), spec))
    }

    fn beside<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<(String, &'a WeightSpec)>> {
        let setting = format!("method.{}.modules_to_save", T::NAME);
        beside(spec, self.options.modules_to_save(), T::BESIDE, &setting)
    }
}

impl<T: StateMethod> Method for State<T> {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        T::CARD
    }

    fn promises(&self) -> Promises {
        let own = self.options.promises();
        Promises { refuses: own.refuses.or_else(|| self.options.needs().refusal()), ..own }
    }

    fn examples(&self) -> &'static [&'static str] {
        T::examples()
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        self.options.needs().check(T::NAME, spec)?;
        self.check_stacks(spec)?;
        room(spec, self.options.num_positions(), T::NAME)?;
        let slots = self.options.slots(spec, self.form())?;
        let own = slots.into_iter().map(|slot| PlannedParameter {
            name: slot.name,
            shape: slot.shape,
            place: slot.place,
            trains: slot.trains,
        });
        let beside = self.beside(spec)?;
        let whole = beside.into_iter().map(|(name, weight)| replacement::plan(name, weight));
        let notes = self.options.notes(spec);
        Ok(MethodPlan { parameters: own.chain(whole).collect(), notes })
    }

    fn working(&self, spec: &ModelSpec) -> Working {
        self.options.working(spec)
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = Arc::clone(weights.spec());
        self.check_stacks(&spec)?;
        room(&spec, self.options.num_positions(), T::NAME)?;
        for slot in self.options.slots(&spec, self.form())? {
            slot.add(weights, seed, parameters)?;
        }
        let made = Made::new(weights, seed, parameters);
        let mut changes = self.options.build(&spec, self.form(), &made)?;
        for (name, weight) in self.beside(&spec)? {
            replacement::attach(&name, weight, weights, parameters, &mut changes)?;
        }
        Ok(changes)
    }

    fn num_positions(&self) -> usize {
        self.options.num_positions()
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.options.on_step(step);
        Ok(())
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        if self.form() == Form::Training {
            self.options.fold(parameters, tensors);
        }
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        if let Some(original) = &self.original {
            return Some(original.clone());
        }
        let mut config = peft_config(T::PEFT_TYPE, spec);
        self.options.write_config(spec, &mut config);
        let saved = self.options.modules_to_save();
        let saved = if saved.is_empty() { Value::Null } else { json!(saved) };
        config.insert("modules_to_save".to_owned(), saved);
        Some(config.into())
    }
}

/// Refuses to take more positions than leave room for a text.
fn room(spec: &ModelSpec, taken: usize, name: &str) -> Result<()> {
    // Patches have their places in the image, whatever stands before them.
    if taken < spec.max_positions || spec.vocabulary == 0 {
        return Ok(());
    }
    Err(Error::Setting {
        setting: format!("method.{name}.tokens"),
        what: "no position is left for the text".to_owned(),
        expected: format!("fewer than the model's {} positions", spec.max_positions),
        found: taken.to_string(),
        help: "take a shorter prompt or prefix".to_owned(),
    })
}

/// Returns the weights that train whole beside a method, with their names in the file.
///
/// A new head of classes always does: a frozen random one is useless.
///
/// # Errors
/// If a name matches no module.
fn beside<'a>(
    spec: &'a ModelSpec,
    names: &[String],
    prefix: &str,
    setting: &str,
) -> Result<Vec<(String, &'a WeightSpec)>> {
    let mut modules = names.to_vec();
    if matches!(spec.head, Head::Classes { .. }) {
        for head in spec.weights.iter().filter(|weight| weight.role == Role::Head) {
            let last = head.module().rsplit('.').next().unwrap_or_default().to_owned();
            if !modules.contains(&last) {
                modules.push(last);
            }
        }
    }
    if modules.is_empty() {
        return Ok(Vec::new());
    }
    let targets = Targets { names: modules, ..Targets::default() };
    let mut whole = Vec::new();
    for module in targets.select(spec, Among::Modules, setting)? {
        let parts = spec.weights.iter().filter(|weight| weight.module() == module.module());
        whole.extend(parts.map(|weight| (format!("{prefix}{}", weight.name), weight)));
    }
    Ok(whole)
}

/// Returns the table of words.
///
/// # Errors
/// If the model has none.
pub fn embedding(spec: &ModelSpec) -> Result<&WeightSpec> {
    let is_words = |w: &&WeightSpec| w.role == Role::Embedding && w.kind == Kind::Embedding;
    spec.weights.iter().find(is_words).ok_or_else(|| Error::Unsupported {
        what: format!("a prompt before the words of {}, which reads none", spec.class),
        help: "use a model that reads text".to_owned(),
    })
}

/// Returns a layer's weight of one role.
///
/// # Errors
/// If the layer has none of this role.
pub fn in_layer<'a>(
    spec: &'a ModelSpec,
    layer: usize,
    role: Role,
    what: &str,
) -> Result<&'a WeightSpec> {
    let fits = |w: &&WeightSpec| w.layer == Some(layer) && w.role == role && w.is_linear();
    spec.weights.iter().find(fits).ok_or_else(|| Error::Unsupported {
        what: format!("{what} on {}, whose layer {layer} has no {role:?} projection", spec.class),
        help: "use a model that projects queries, keys and values apart".to_owned(),
    })
}

/// Checks a list of layers, empty meaning all, and returns it filled in, in order.
///
/// # Errors
/// [`Error::Setting`] for a layer the model does not have.
pub fn layers(spec: &ModelSpec, wanted: &[usize], setting: &str) -> Result<Vec<usize>> {
    if let Some(layer) = wanted.iter().find(|layer| **layer >= spec.num_layers) {
        return Err(Error::Setting {
            setting: setting.to_owned(),
            what: "no such layer".to_owned(),
            expected: format!("0 to {}", spec.num_layers.saturating_sub(1)),
            found: layer.to_string(),
            help: "layers are counted from 0".to_owned(),
        });
    }
    let chosen = |layer: &usize| wanted.is_empty() || wanted.contains(layer);
    Ok((0..spec.num_layers).filter(chosen).collect())
}
