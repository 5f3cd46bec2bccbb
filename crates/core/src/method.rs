//! What a tuning method has to say.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;

use crate::change::Changes;
use crate::error::Result;
use crate::parameters::Parameters;
use crate::random::Seed;
use crate::spec::ModelSpec;
pub use crate::step::{FlatGradients, Memory, ParameterState, Seat, StepView};
use crate::weights::Weights;
use retune_files::Dtype;
use retune_options::{OptionSpec, Table};
use serde_json::Value;

/// Tensors of floats of an adapter's file: shape and values by name.
pub type FileTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Tensors of whole numbers of an adapter's file: type, shape and values by name.
pub type FileIntegers = BTreeMap<String, (Dtype, Vec<usize>, Vec<i64>)>;

/// What a method is, for help, documentation and model cards: one definition, all derived.
#[derive(Debug, Clone, Copy)]
pub struct Card {
    /// The name in a recipe: the paper's.
    pub name: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// Authors, title, year, address.
    pub source: &'static str,
    /// Learning rates between which the method usually trains well.
    pub usual_learning_rates: (f64, f64),
    /// Its options.
    pub options: fn() -> Vec<OptionSpec>,
}

/// One tensor a method will train or keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedParameter {
    /// The name it is saved under.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The weight or site it changes.
    pub place: String,
    /// Whether it trains (else it is a buffer).
    pub trains: bool,
}

/// The place of a planned number of values whose distribution over the parameters planned before it
/// is only known once the weights are read, or while the run is under way.
pub const POOL: &str = "shared out over the parameters above";

impl PlannedParameter {
    /// Plans `count` values that are shared out over parameters planned with the shape `[0]`.
    pub fn pool(method: &str, count: usize) -> Self {
        Self {
            name: format!("{method}.budget"),
            shape: vec![count],
            place: POOL.to_owned(),
            trains: true,
        }
    }
}

/// What a method will do to a model, before anything is done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MethodPlan {
    /// All tensors, in the order they will be made.
    pub parameters: Vec<PlannedParameter>,
    /// What a person should know, e.g. a target that was widened.
    pub notes: Vec<String>,
}

impl MethodPlan {
    /// Returns whether values are shared out later, so that shapes `[0]` are not final.
    pub fn is_pooled(&self) -> bool {
        self.parameters.iter().any(|parameter| parameter.place == POOL)
    }

    /// Returns the number of values that will train.
    pub fn num_trainable(&self) -> usize {
        self.parameters
            .iter()
            .filter(|parameter| parameter.trains)
            .map(|parameter| parameter.shape.iter().product::<usize>())
            .sum()
    }
}

/// What a method's own operations hold from the forward to the backward pass, beside its parameters
/// and what every model keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Working {
    /// Bytes, however many tokens there are.
    pub bytes: u64,
    /// Numbers for each token.
    pub values_per_token: u64,
}

/// A distance to the base's own predictions whose gradient a method wants beside the loss's.
///
/// It is `−Σ p log q` per label, `p` of the untouched base and `q` of the tuned model, both at
/// `temperature`, averaged like the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reference {
    /// Divides the logits of both.
    pub temperature: f64,
}

/// What a method keeps beyond what every method must keep.
///
/// The conformance suite holds it to this, both ways: a promise that is not made must not hold by
/// accident either, so that the documentation made from it is true.
#[expect(clippy::struct_excessive_bools, reason = "each promise is kept or not by itself")]
#[derive(Debug, Clone, Copy)]
pub struct Promises {
    /// Before the first step the tuned model computes what its base computes.
    pub starts_at_base: bool,
    /// A gradient reaches every tensor that trains within the first three steps.
    pub reaches_all: bool,
    /// Gradients are those of the loss, not a stand-in (a detached factor, a straight-through mask).
    pub exact_gradients: bool,
    /// The base may stay in quantised blocks; else attaching to such a base is refused.
    pub quantized_base: bool,
    /// What becomes of a weight is computed from the checkpoint's own values, so that no other
    /// method may change it before.
    pub needs_base: bool,
    /// How many tasks the method tells apart, where it does: a row then says which is its own.
    pub num_tasks: Option<usize>,
    /// Models the plan refuses whatever the options, if there are any.
    pub refuses: Option<Refusal>,
}

/// Which models a method refuses, by what they are made of.
#[derive(Debug, Clone, Copy)]
pub struct Refusal {
    /// What they have or lack, behind "models".
    pub models: &'static str,
    /// Says whether a model is one of them.
    pub applies: fn(&ModelSpec) -> bool,
}

impl Default for Promises {
    fn default() -> Self {
        Self {
            starts_at_base: true,
            reaches_all: true,
            exact_gradients: true,
            quantized_base: true,
            needs_base: false,
            num_tasks: None,
            refuses: None,
        }
    }
}

impl Promises {
    /// Returns whether the plan refuses this model.
    pub fn refuses(&self, spec: &ModelSpec) -> bool {
        self.refuses.is_some_and(|refusal| (refusal.applies)(spec))
    }
}

/// One of several methods in force at once.
#[derive(Debug)]
pub struct Part {
    /// Its name, which its parameters carry in the whole list.
    pub name: String,
    /// The method.
    pub method: Box<dyn Method>,
}

impl Clone for Part {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), method: self.method.boxed_clone() }
    }
}

/// A tuning method: plans, attaches its changes, and says how its adapter is written.
///
/// It knows no architecture; it looks at the [`ModelSpec`] only.
pub trait Method: Debug + Send {
    /// Returns the options with every default filled in.
    fn options(&self) -> Table;

    /// Copies the method with its options.
    fn boxed_clone(&self) -> Box<dyn Method>;

    /// Describes the method.
    fn card(&self) -> Card;

    /// Returns what the method promises with its present options.
    fn promises(&self) -> Promises {
        Promises::default()
    }

    /// Returns tables of options, as TOML, that between them use every path through the method.
    ///
    /// The conformance suite tries each, on models of 2 layers and width 16; by default the method's
    /// defaults only.
    fn examples(&self) -> &'static [&'static str] {
        &[""]
    }

    /// Says what would train, where and how many values. Reads no weights.
    ///
    /// # Errors
    /// If an option is impossible for this model, naming the nearest valid choice.
    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan>;

    /// Returns what the method's operations hold through a step, for the forecast of memory.
    fn working(&self, _spec: &ModelSpec) -> Working {
        Working::default()
    }

    /// Makes the parameters and attaches the changes, exactly as planned.
    ///
    /// # Errors
    /// Those of [`Method::plan`], and of reading weights an initialisation looks at.
    fn attach(&self, weights: &Weights, parameters: &mut Parameters, seed: Seed)
    -> Result<Changes>;

    /// Splits the run into stages, each with its own schedule; by default there is one.
    ///
    /// The lengths sum up to `num_steps`. What happens between two stages is up to
    /// [`Method::on_step`].
    ///
    /// # Errors
    /// If the run is too short for the stages.
    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        Ok(vec![num_steps])
    }

    /// Asks for gradients of the distance to the base's predictions beside those of the loss.
    fn reference(&self) -> Option<Reference> {
        None
    }

    /// Returns whether each row weighs the same in the loss, however many labels it has; by default
    /// each label does.
    fn weighs_rows_alike(&self) -> bool {
        false
    }

    /// Prepares a step before its gradients are computed: opens taps.
    ///
    /// # Errors
    /// If the method's own state does not fit.
    fn before_step(&mut self, _step: &mut StepView<'_>) -> Result<()> {
        Ok(())
    }

    /// Acts on the gradients of a step before their norm is taken and anything moves: mask them,
    /// add those of a penalty, let entries in.
    ///
    /// # Errors
    /// If the method's own state does not fit.
    fn on_gradients(&mut self, _step: &mut StepView<'_>) -> Result<()> {
        Ok(())
    }

    /// Returns what the method keeps beside the parameters, for a checkpoint.
    ///
    /// Parameters, their entries, taps and the optimiser's state are saved without it.
    fn save_state(&self) -> Value {
        Value::Null
    }

    /// Puts back what [`Method::save_state`] gave.
    ///
    /// # Errors
    /// If it is of another method, or damaged.
    fn load_state(&mut self, _state: &Value) -> Result<()> {
        Ok(())
    }

    /// Acts after the parameters have moved: unmask, regrow, rotate halves, prune.
    ///
    /// # Errors
    /// If the method's own state does not fit.
    fn on_step(&mut self, _step: &mut StepView<'_>) -> Result<()> {
        Ok(())
    }

    /// Returns the methods this one stacks, in the order their changes apply; by default none.
    fn parts(&self) -> &[Part] {
        &[]
    }

    /// Returns how many positions of the model the method takes before each document.
    fn num_positions(&self) -> usize {
        0
    }

    /// Says in the configuration of an adapter what training decided, such as which ranks are left.
    fn describe(&self, _parameters: &Parameters, _config: &mut Value) {}

    /// Turns what was trained into what an adapter's file holds: networks that only help training
    /// are folded away, and tensors the file repeats are repeated.
    fn fold(&self, _parameters: &Parameters, _tensors: &mut FileTensors) {}

    /// Turns what an adapter's file holds into what was attached, where the two differ: the way back
    /// of [`Method::fold`]. Returns what is wrong with the file, one sentence each.
    fn unfold(
        &self,
        _parameters: &Parameters,
        _integers: &FileIntegers,
        _tensors: &mut Cow<'_, FileTensors>,
    ) -> Vec<String> {
        Vec::new()
    }

    /// Returns the `adapter_config.json` of the PEFT library for this method, or nothing where the
    /// result is a whole model rather than an adapter.
    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value>;
}
