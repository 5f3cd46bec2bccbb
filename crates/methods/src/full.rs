//! Full tuning: every weight trains, or those a pattern selects.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan};
use retune_core::parameters::Parameters;
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, options};
use serde_json::Value;

use crate::registry::{self, Plugin};
use crate::replacement;

options! {
    /// Trains the weights themselves.
    pub struct FullOptions("full") {
        /// Modules that train, by suffix or regular expression; empty means all.
        targets: Vec<String> = Vec::new();
        /// Modules that stay frozen, matched the same way.
        freeze: Vec<String> = Vec::new();
    }
}

/// Full tuning.
#[derive(Debug, Clone, Default)]
pub struct Full {
    /// What trains.
    pub options: FullOptions,
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "full",
    summary: "Trains every weight of the model, or those a pattern selects.",
    source: "Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, arXiv 1801.06146",
    usual_learning_rates: (1e-6, 1e-4),
    options: registry::specs::<FullOptions>,
};

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Full { options: FullOptions::read(reader) }),
    adapter: None,
};

impl Full {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let targets = Targets { names: self.options.targets.clone(), ..Targets::default() };
        let wanted: Vec<String> = if self.options.targets.is_empty() {
            spec.weights.iter().map(|weight| weight.module().to_owned()).collect()
        } else {
            let selected = targets.select(spec, Among::Modules, "method.full.targets")?;
            selected.iter().map(|weight| weight.module().to_owned()).collect()
        };
        let frozen: Vec<String> = if self.options.freeze.is_empty() {
            Vec::new()
        } else {
            let freeze = Targets { names: self.options.freeze.clone(), ..Targets::default() };
            let selected = freeze.select(spec, Among::Modules, "method.full.freeze")?;
            selected.iter().map(|weight| weight.module().to_owned()).collect()
        };
        let chosen: Vec<&WeightSpec> = spec
            .weights
            .iter()
            .filter(|weight| {
                let module = weight.module().to_owned();
                wanted.contains(&module) && !frozen.contains(&module)
            })
            .collect();
        if chosen.is_empty() {
            return Err(Error::Setting {
                setting: "method.full.freeze".to_owned(),
                what: "nothing is left to train".to_owned(),
                expected: "at least one weight that is targeted and not frozen".to_owned(),
                found: self.options.freeze.join(", "),
                help: "freeze fewer modules".to_owned(),
            });
        }
        Ok(chosen)
    }
}

impl Method for Full {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn examples(&self) -> &'static [&'static str] {
        &["", "targets = [\".*0.*\"]"]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let parameters = self
            .chosen(spec)?
            .into_iter()
            .map(|weight| replacement::plan(weight.name.clone(), weight))
            .collect();
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let mut changes = Changes::default();
        for weight in self.chosen(&spec)? {
            replacement::attach(&weight.name, weight, weights, parameters, &mut changes)?;
        }
        Ok(changes)
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        None
    }
}
