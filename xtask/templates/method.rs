//! My method: one sentence that says what it changes.

use retune_core::Result;
use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_options::{Options, Table, options};
use serde_json::Value;
use tensor::Tensor;

use crate::registry::{self, Plugin};

options! {
    /// Scales the rows of each targeted weight.
    pub struct MyMethodOptions("my-method") {
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
    }
}

/// My method.
#[derive(Debug, Clone, Default)]
pub struct MyMethod {
    /// What trains.
    pub options: MyMethodOptions,
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "my-method",
    summary: "Scales the rows of each targeted weight.",
    source: "Authors, Title, year, address",
    usual_learning_rates: (1e-4, 1e-2),
    options: registry::specs::<MyMethodOptions>,
};

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(MyMethod { options: MyMethodOptions::read(reader) }),
    adapter: None,
};

impl MyMethod {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let targets = Targets { names: self.options.targets.clone(), ..Targets::default() };
        targets.select(spec, Among::Linears, "method.my-method.targets")
    }
}

/// Returns the one tensor that belongs to a weight.
fn planned(weight: &WeightSpec) -> PlannedParameter {
    let [rows, _] = weight.matrix();
    PlannedParameter {
        name: format!("{}.my_method", weight.module()),
        shape: vec![rows],
        place: weight.name.clone(),
        trains: true,
    }
}

impl Method for MyMethod {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let parameters = self.chosen(spec)?.into_iter().map(planned).collect();
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let mut changes = Changes::default();
        for weight in self.chosen(weights.spec())? {
            let [rows, _] = weight.matrix();
            let plan = planned(weight);
            let scale = parameters.add(plan.name, &plan.shape, vec![1.0; rows]);
            changes.change_weight(&weight.name, ScaledRows { scale, rows });
        }
        Ok(changes)
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        None
    }
}

/// The change of one weight: row r times its scale.
#[derive(Debug)]
struct ScaledRows {
    scale: ParameterId,
    rows: usize,
}

impl WeightChange for ScaledRows {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.scale]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        base * scope.tensor(self.scale, [self.rows, 1])
    }
}
