//! The frame of methods that change weights one by one and are written as PEFT adapters.
//!
//! A method says which tensors one weight gets ([`WeightMethod::layout`]) and what they do to it
//! ([`WeightMethod::build`]). Targets, planning, initial values, naming and the adapter's
//! configuration are here, once.

use std::fmt::Debug;
use std::sync::Arc;

use retune_core::Result;
use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{linear, linear_frozen, linear_low_rank};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::{Random, Seed};
use retune_core::spec::{Kind, ModelSpec, Role, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::{OptionSpec, Options, Reader, Table, options};
use serde_json::{Map, Value};
use tensor::Tensor;

use crate::adapter::PREFIX;
use crate::peft_config;
use crate::registry::Plugin;
use crate::replacement;

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
}

/// How a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Start {
    Constant(f32),
    /// Uniform within plus and minus the bound.
    Uniform(f64),
    /// Normal with this deviation.
    Normal(f64),
    Computed,
}

/// One tensor a method keeps: how it is called, its shape and how it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    name: String,
    shape: Vec<usize>,
    start: Start,
    trains: bool,
    dtype: Dtype,
}

impl Slot {
    fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, start: Start) -> Self {
        Self { name: name.into(), shape: shape.into(), start, trains: true, dtype: Dtype::F32 }
    }

    /// Begins as zeros.
    pub fn zeros(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self::new(name, shape, Start::Constant(0.0))
    }

    /// Begins as one number everywhere.
    pub fn constant(name: impl Into<String>, shape: impl Into<Vec<usize>>, value: f64) -> Self {
        Self::new(name, shape, Start::Constant(value as f32))
    }

    /// Begins uniform within plus and minus `bound`.
    pub fn uniform(name: impl Into<String>, shape: impl Into<Vec<usize>>, bound: f64) -> Self {
        Self::new(name, shape, Start::Uniform(bound))
    }

    /// Begins uniform within ±1/√(last dimension): Kaiming's rule with a = √5.
    pub fn kaiming(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let inputs = shape.last().copied().unwrap_or(1).max(1);
        Self::new(name, shape, Start::Uniform((inputs as f64).powf(-0.5)))
    }

    /// Begins normal with this deviation.
    pub fn normal(name: impl Into<String>, shape: impl Into<Vec<usize>>, deviation: f64) -> Self {
        Self::new(name, shape, Start::Normal(deviation))
    }

    /// Begins as [`Built::computed`] says.
    pub fn computed(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self::new(name, shape, Start::Computed)
    }

    /// Holds whole numbers that do not train; begins as [`Built::computed`] says.
    pub fn integers(name: impl Into<String>, shape: impl Into<Vec<usize>>, dtype: Dtype) -> Self {
        Self { trains: false, dtype, ..Self::new(name, shape, Start::Computed) }
    }

    /// Is saved but does not train.
    #[must_use]
    pub fn buffer(self) -> Self {
        Self { trains: false, ..self }
    }

    fn planned(&self, prefix: &str, place: &str) -> PlannedParameter {
        PlannedParameter {
            name: format!("{prefix}{}", self.name),
            shape: self.shape.clone(),
            place: place.to_owned(),
            trains: self.trains,
        }
    }
}

/// Values of a tensor that is computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floats.
    Floats(Vec<f32>),
    /// Whole numbers.
    Integers(Vec<i32>),
}

/// The tensors of one change, as places in the list of parameters.
#[derive(Debug, Clone, Default)]
pub struct Held {
    own: Vec<ParameterId>,
    shared: Vec<ParameterId>,
}

impl Held {
    /// Returns the tensors as they are in this pass.
    pub fn view<'a>(&'a self, scope: &'a Scope<'_>) -> View<'a> {
        View { held: self, scope }
    }
}

/// The tensors of one change in one pass.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    held: &'a Held,
    scope: &'a Scope<'a>,
}

impl View<'_> {
    fn tensor<const D: usize>(&self, id: ParameterId) -> Tensor<D> {
        let shape = &self.scope.parameters().get(id).shape;
        let shape: [usize; D] = shape
            .as_slice()
            .try_into()
            .unwrap_or_else(|_| unreachable!("a method asks for {D} of dimensions {shape:?}"));
        self.scope.tensor(id, shape)
    }

    /// Returns the weight's own tensor at `place` of [`WeightMethod::layout`].
    pub fn get<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.tensor(self.held.own[place])
    }

    /// Returns the tensor all weights share, at `place` of [`WeightMethod::shared`].
    pub fn shared<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.tensor(self.held.shared[place])
    }

    /// Returns the tensor at `place` as a constant.
    pub fn frozen<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.get::<D>(place).detach()
    }

    /// Returns the whole numbers at `place` of [`WeightMethod::layout`].
    pub fn integers(&self, place: usize) -> &[i32] {
        self.scope.parameters().integers(self.held.own[place])
    }

    /// Returns the whole numbers at `place` of [`WeightMethod::shared`].
    pub fn shared_integers(&self, place: usize) -> &[i32] {
        self.scope.parameters().integers(self.held.shared[place])
    }

    /// Returns how many tensors of its own the weight has.
    pub fn len(&self) -> usize {
        self.held.own.len()
    }

    /// Returns whether the weight has no tensor of its own.
    pub fn is_empty(&self) -> bool {
        self.held.own.is_empty()
    }

    /// Returns the pass, for randomness.
    pub fn scope(&self) -> &Scope<'_> {
        self.scope
    }
}

/// What a method does to one weight.
pub trait Formula: Debug + Send + Sync {
    /// Computes the changed weight, `[rows, columns]`: the definition.
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2>;

    /// Computes `x · changedᵀ + bias` without the changed weight, where there is a faster way.
    fn linear(
        &self,
        _x: &Tensor<2>,
        _base: &Arc<PackedMatrix>,
        _bias: Option<&Tensor<1>>,
        _held: &Held,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Returns whether the base does not matter.
    fn replaces_base(&self) -> bool {
        false
    }

    /// Returns whether the change also holds where a tied weight is used a second time.
    fn follows_tie(&self) -> bool {
        true
    }
}

/// What is added to a weight.
#[expect(clippy::large_enum_variant, reason = "one is made per pass and used up at once")]
#[derive(Debug)]
pub enum Delta {
    /// A matrix `[rows, columns]`.
    Dense(Tensor<2>),
    /// `scale · b · a`.
    LowRank {
        /// `[rank, columns]`.
        a: Tensor<2>,
        /// `[rows, rank]`.
        b: Tensor<2>,
        /// The factor on the product.
        scale: f64,
    },
}

impl Delta {
    /// Multiplies out.
    pub fn dense(self) -> Tensor<2> {
        match self {
            Self::Dense(delta) => delta,
            Self::LowRank { a, b, scale } => b.matmul(a).mul_scalar(scale),
        }
    }
}

/// A change that adds something which does not depend on the base.
pub trait Addition: Debug + Send + Sync {
    /// Computes what is added.
    fn delta(&self, tensors: &View<'_>) -> Delta;

    /// Returns the probability of zeroing an entry of the added part's input while training.
    fn dropout(&self) -> f64 {
        0.0
    }
}

/// The formula of an [`Addition`].
#[derive(Debug)]
pub struct Added<A>(pub A);

impl<A: Addition> Formula for Added<A> {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        base + self.0.delta(tensors).dense()
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let dropped = scope.trains() && self.0.dropout() > 0.0;
        match self.0.delta(&held.view(scope)) {
            Delta::LowRank { a, b, scale } if !dropped => {
                Some(linear_low_rank(x.clone(), base, bias.cloned(), a, b, scale))
            }
            Delta::LowRank { a, b, scale } => {
                let x_dropped = scope.dropout(x.clone(), self.0.dropout());
                let low = linear(linear(x_dropped, a, None), b, None).mul_scalar(scale);
                Some(linear_frozen(x.clone(), base, bias.cloned()) + low)
            }
            Delta::Dense(delta) if dropped => {
                let x_dropped = scope.dropout(x.clone(), self.0.dropout());
                let added = linear(x_dropped, delta, None);
                Some(linear_frozen(x.clone(), base, bias.cloned()) + added)
            }
            Delta::Dense(_) => None,
        }
    }
}

/// What a method made for one target.
#[derive(Debug)]
pub struct Built {
    /// The change of the weight.
    pub weight: Option<Box<dyn Formula>>,
    /// The change of the module's bias, `[rows, 1]`; a layer without one starts from zeros.
    pub bias: Option<Box<dyn Formula>>,
    /// Values of the slots that are computed, in their order.
    pub computed: Vec<Values>,
}

impl Built {
    /// Changes the weight.
    pub fn new(weight: impl Formula + 'static) -> Self {
        Self { weight: Some(Box::new(weight)), bias: None, computed: Vec::new() }
    }

    /// Adds to the weight.
    pub fn added(addition: impl Addition + 'static) -> Self {
        Self::new(Added(addition))
    }

    /// Gives the computed slots their values.
    #[must_use]
    pub fn computed(self, computed: Vec<Values>) -> Self {
        Self { computed, ..self }
    }

    /// Changes the bias too.
    #[must_use]
    pub fn with_bias(self, bias: impl Formula + 'static) -> Self {
        Self { bias: Some(Box::new(bias)), ..self }
    }
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

/// A method of this frame with its options and places.
#[derive(Debug, Clone, Default)]
pub struct Tuner<M> {
    /// The method's own options.
    pub options: M,
    /// What it changes.
    pub places: Places,
    /// The adapter's own configuration where it was read from a file: written back as it was.
    pub original: Option<Value>,
}

/// Returns the method's line in the registry.
pub const fn plugin<M: WeightMethod>() -> Plugin {
    Plugin {
        card: Card { options: specs::<M>, ..M::FACTS.card },
        read: |reader| Box::new(Tuner::<M>::read(reader)),
        adapter: Some((M::FACTS.peft_type, |config| {
            Ok(Box::new(Tuner::<M>::from_adapter(config)?))
        })),
    }
}

fn specs<M: WeightMethod>() -> Vec<OptionSpec> {
    let mut specs = [M::specs(), Places::specs()].concat();
    if let Some(targets) = specs.iter_mut().find(|spec| spec.name == "targets") {
        let names = M::FACTS.targets.iter().map(|name| retune_options::Value::from(*name).into());
        targets.default = Some(retune_options::Value::List(names.collect()).into());
    }
    specs
}

impl<M: WeightMethod> Tuner<M> {
    /// Reads the method's table of a recipe.
    pub fn read(reader: &mut Reader<'_>) -> Self {
        let options = M::read(reader);
        let has_targets = reader.has("targets");
        let mut places = Places::read(reader);
        if !has_targets {
            places.targets = M::FACTS.targets.iter().map(|t| (*t).to_owned()).collect();
        }
        Self { options, places, original: None }
    }

    /// Reads an `adapter_config.json`.
    ///
    /// # Errors
    /// If a value is impossible, or asks for a variant that is not supported.
    pub fn from_adapter(config: &Value) -> Result<Self> {
        let facts = M::FACTS;
        peft_config::check_fixed(config, facts.peft_type, facts.fixed)?;
        let mut options: M = peft_config::options(config, facts.keys)?;
        options.read_config(config)?;
        let places = peft_config::places(config)?;
        Ok(Self { options, places, original: Some(config.clone()) })
    }

    fn setting(what: &str) -> String {
        format!("method.{}.{what}", M::FACTS.card.name)
    }

    fn targets(&self, spec: &ModelSpec) -> Result<Vec<Target>> {
        let mut names = self.places.targets.clone();
        if names.is_empty() {
            names = self.options.default_targets(spec);
        }
        let Places { exclude, layers, .. } = self.places.clone();
        let targets = Targets { names, exclude, layers };
        let chosen = targets.select(spec, M::FACTS.among, &Self::setting("targets"))?;
        let target = |(index, weight): (usize, &WeightSpec)| {
            let [rows, columns] = weight.matrix();
            let module = weight.module().to_owned();
            let has_bias = spec.weight(&format!("{module}.bias")).is_some();
            let (kind, role) = (weight.kind, weight.role);
            Target { name: weight.name.clone(), module, index, rows, columns, kind, role, has_bias }
        };
        Ok(chosen.into_iter().enumerate().map(target).collect())
    }

    fn context<'a>(&'a self, targets: &'a [Target]) -> Context<'a> {
        let original = self.original.as_ref();
        let is_complete = original.is_none_or(|config| M::is_complete(config));
        Context { targets, is_complete, original }
    }

    fn saved<'a>(
        &self,
        spec: &'a ModelSpec,
        targets: &[Target],
    ) -> Result<Vec<(String, &'a WeightSpec)>> {
        let targeted = |module: &str| targets.iter().any(|target| target.module == module);
        replacement::saved_modules(
            spec,
            &self.places.modules_to_save,
            &targeted,
            &Self::setting("modules_to_save"),
        )
    }
}

/// Adds a slot's parameter with its first values.
fn add(
    parameters: &mut Parameters,
    name: String,
    slot: &Slot,
    random: &mut Random,
    computed: &mut std::vec::IntoIter<Values>,
) -> ParameterId {
    let mut values = vec![0.0; slot.shape.iter().product()];
    match slot.start {
        Start::Constant(value) => values.fill(value),
        Start::Uniform(bound) => random.fill_uniform(&mut values, bound),
        Start::Normal(deviation) => random.fill_normal(&mut values, deviation),
        Start::Computed => match computed.next() {
            Some(Values::Floats(floats)) => values = floats,
            Some(Values::Integers(integers)) => {
                return parameters.add_integers(name, &slot.shape, integers, slot.dtype);
            }
            None => unreachable!("{name} is computed, but has no values"),
        },
    }
    if slot.trains {
        parameters.add(name, &slot.shape, values)
    } else {
        parameters.add_buffer(name, &slot.shape, values)
    }
}

/// What shared tensors' names begin with.
const SHARED: &str = "base_model.";

impl<M: WeightMethod> Method for Tuner<M> {
    fn options(&self) -> Table {
        let mut table = self.options.write();
        for (name, entry) in self.places.write().iter() {
            table.insert(name, entry.item.clone());
        }
        table
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        Card { options: specs::<M>, ..M::FACTS.card }
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let targets = self.targets(spec)?;
        let context = self.context(&targets);
        let mut plan = MethodPlan::default();
        for slot in self.options.shared(&context)? {
            plan.parameters.push(slot.planned(SHARED, "all targets"));
        }
        for target in &targets {
            let prefix = format!("{PREFIX}{}.", target.module);
            let slots = self.options.layout(target, &context)?;
            plan.parameters.extend(slots.iter().map(|slot| slot.planned(&prefix, &target.name)));
        }
        for (name, weight) in self.saved(spec, &targets)? {
            plan.parameters.push(replacement::plan(name, weight));
        }
        Ok(plan)
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = Arc::clone(weights.spec());
        let targets = self.targets(&spec)?;
        let context = self.context(&targets);
        let purpose = M::FACTS.card.name;
        let mut random = seed.stream(purpose, &[0]);
        let mut computed = self.options.shared_values(&context, weights)?.into_iter();
        let slots = self.options.shared(&context)?;
        let shared: Vec<_> = slots
            .iter()
            .map(|slot| {
                let name = format!("{SHARED}{}", slot.name);
                add(parameters, name, slot, &mut random, &mut computed)
            })
            .collect();
        let mut changes = Changes::default();
        for target in &targets {
            let mut random = seed.stream(purpose, &[target.index as u64 + 1]);
            let slots = self.options.layout(target, &context)?;
            let built = self.options.build(target, &context, weights, &mut random)?;
            let mut computed = built.computed.into_iter();
            let own: Vec<_> = slots
                .iter()
                .map(|slot| {
                    let name = format!("{PREFIX}{}.{}", target.module, slot.name);
                    add(parameters, name, slot, &mut random, &mut computed)
                })
                .collect();
            let held = Held { own, shared: shared.clone() };
            for (name, formula) in
                [(target.name.clone(), built.weight), (target.bias(), built.bias)]
            {
                if let Some(formula) = formula {
                    changes.change_weight(name, Attached { held: held.clone(), formula });
                }
            }
        }
        for (name, weight) in self.saved(&spec, &targets)? {
            replacement::attach(&name, weight, weights, parameters, &mut changes)?;
        }
        Ok(changes)
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        if let Some(original) = &self.original {
            return Some(original.clone());
        }
        let targets = self.targets(spec).unwrap_or_default();
        let mut config =
            peft_config::write(&M::FACTS, &self.options.write(), &self.places, spec, &targets);
        self.options.finish_config(&mut config, &targets);
        Some(config.into())
    }
}

/// A formula with its tensors.
#[derive(Debug)]
struct Attached {
    held: Held,
    formula: Box<dyn Formula>,
}

impl WeightChange for Attached {
    fn parameters(&self) -> Vec<ParameterId> {
        [self.held.own.as_slice(), &self.held.shared].concat()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        self.formula.weight(base, &self.held.view(scope))
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        self.formula.linear(x, base, bias, &self.held, scope)
    }

    fn replaces_base(&self) -> bool {
        self.formula.replaces_base()
    }

    fn follows_tie(&self) -> bool {
        self.formula.follows_tie()
    }
}
