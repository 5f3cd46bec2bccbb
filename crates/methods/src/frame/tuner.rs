//! A method of the frame as every other crate sees it: targets, plan, changes, configuration.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use retune_core::Result;
use retune_core::change::Changes;
use retune_core::method::{
    Card, FileIntegers, FileTensors, Method, MethodPlan, Promises, StepView, Working,
};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::Targets;
use retune_core::weights::Weights;
use retune_options::{OptionSpec, Options, Reader, Table};
use serde_json::Value;

use super::formula::{Attached, NewBias};
use super::{Context, Held, Places, Target, WeightMethod};
use crate::adapter::PREFIX;
use crate::peft_config;
use crate::registry::Plugin;
use crate::replacement;

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

    fn context<'a>(&'a self, targets: &'a [Target], once: &'a OnceCell<Vec<i32>>) -> Context<'a> {
        let original = self.original.as_ref();
        let is_complete = original.is_none_or(|config| M::is_complete(config));
        Context { targets, is_complete, original, once, shared: &[] }
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

    fn promises(&self) -> Promises {
        self.options.promises()
    }

    fn examples(&self) -> &'static [&'static str] {
        M::FACTS.examples
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let targets = self.targets(spec)?;
        let once = OnceCell::new();
        let context = self.context(&targets, &once);
        let notes = self.options.notes(&context);
        let mut plan = MethodPlan { notes, ..MethodPlan::default() };
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

    fn working(&self, spec: &ModelSpec) -> Working {
        let targets = self.targets(spec).unwrap_or_default();
        self.options.working(&targets)
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = Arc::clone(weights.spec());
        let targets = self.targets(&spec)?;
        let once = OnceCell::new();
        let context = self.context(&targets, &once);
        let purpose = M::FACTS.card.name;
        let mut random = seed.stream(purpose, &[0]);
        let values = self.options.shared_values(&context, weights)?;
        let context = Context { shared: &values, ..context };
        let mut computed = values.clone().into_iter();
        let slots = self.options.shared(&context)?;
        let shared: Vec<_> = slots
            .iter()
            .map(|slot| slot.add(parameters, SHARED, &mut random, &mut computed))
            .collect();
        let mut changes = Changes::default();
        for target in &targets {
            let mut random = seed.stream(purpose, &[target.index as u64 + 1]);
            let slots = self.options.layout(target, &context)?;
            let built = self.options.build(target, &context, weights, &mut random)?;
            let mut computed = built.computed.into_iter();
            let prefix = format!("{PREFIX}{}.", target.module);
            let own: Vec<_> = slots
                .iter()
                .map(|slot| slot.add(parameters, &prefix, &mut random, &mut computed))
                .collect();
            let held = Held { own, shared: shared.clone() };
            if let Some(formula) = built.weight {
                changes.change_weight(&target.name, Attached { held: held.clone(), formula });
            }
            if let Some(formula) = built.bias {
                if target.has_bias {
                    changes.change_weight(target.bias(), Attached { held, formula });
                } else {
                    changes.change_output(&target.module, NewBias { held, formula });
                }
            }
        }
        for (name, weight) in self.saved(&spec, &targets)? {
            replacement::attach(&name, weight, weights, parameters, &mut changes)?;
        }
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.options.on_gradients(step);
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.options.on_step(step);
        Ok(())
    }

    fn describe(&self, parameters: &Parameters, config: &mut Value) {
        self.options.describe(parameters, config);
    }

    fn fold(&self, parameters: &Parameters, tensors: &mut FileTensors) {
        self.options.fold(parameters, tensors);
    }

    fn unfold(
        &self,
        parameters: &Parameters,
        integers: &FileIntegers,
        tensors: &mut Cow<'_, FileTensors>,
    ) -> Vec<String> {
        self.options.unfold(parameters, integers, tensors)
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        if let Some(original) = &self.original {
            return Some(original.clone());
        }
        let targets = self.targets(spec).unwrap_or_default();
        let mut config =
            peft_config::write(&M::FACTS, &self.options.write(), &self.places, spec, &targets);
        config.insert(peft_config::COMPLETE.to_owned(), Value::Bool(true));
        self.options.finish_config(&mut config, &targets);
        Some(config.into())
    }
}
