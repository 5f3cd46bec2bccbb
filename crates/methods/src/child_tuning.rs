//! Child-tuning: full tuning through a mask on the gradients.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::ModelSpec;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::full::{Full, FullOptions};
use crate::registry::{self, Plugin};
use crate::sparse;

choice! {
    /// How the child network is found.
    pub enum Mode {
        /// Task-free: drawn anew in each step.
        Free = "free",
        /// Task-driven: the entries of largest Fisher information, found once.
        Driven = "driven",
    }
}

options! {
    /// Trains every weight through a mask on its gradient.
    pub struct ChildTuningOptions("child-tuning") {
        /// How the child network is found.
        mode: Mode = Mode::Driven;
        /// Share of the entries in the child network.
        share: f64 = 0.3, in 0.001..=1.0, also "reserve_p";
        /// Steps whose gradients give the Fisher information; nothing moves in them.
        fisher_steps: u64 = 8, in 1..=1_000_000;
        /// Modules that train, by suffix or regular expression; empty means all.
        targets: Vec<String> = Vec::new();
        /// Modules that stay frozen, matched the same way.
        freeze: Vec<String> = Vec::new();
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "child-tuning",
    summary: "Trains every weight, but lets gradients through to a part of the entries only.",
    source: "Xu, Luo, Zhang, Tan, Chang, Huang and Huang, Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, 2021, arXiv 2109.05687",
    usual_learning_rates: (1e-6, 1e-4),
    options: registry::specs::<ChildTuningOptions>,
};

/// Child-tuning.
#[derive(Debug, Clone, Default)]
pub struct ChildTuning {
    /// Mode and share.
    pub options: ChildTuningOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(ChildTuning { options: ChildTuningOptions::read(reader) }),
    adapter: None,
};

/// Fisher information at first, then the mask it gives.
fn mask_name(parameter: &str) -> String {
    format!("{parameter}.child")
}

impl ChildTuning {
    fn full(&self) -> Full {
        let options = FullOptions {
            targets: self.options.targets.clone(),
            freeze: self.options.freeze.clone(),
        };
        Full { options }
    }

    /// Whether a mask is kept: with a share of 1 this is full tuning.
    fn is_driven(&self) -> bool {
        self.options.mode == Mode::Driven && self.options.share < 1.0
    }

    fn pairs(parameters: &Parameters) -> Vec<(ParameterId, ParameterId)> {
        let find = |(id, p): (ParameterId, &retune_core::parameters::Parameter)| {
            Some((id, parameters.find(&mask_name(&p.name))?))
        };
        parameters.iter().filter_map(find).collect()
    }

    fn measure(&self, view: &mut StepView<'_>) -> Result<()> {
        let pairs = Self::pairs(view.parameters);
        for (id, mask) in &pairs {
            if let Some(gradient) = view.gradients[id.index()].take() {
                view.parameters.update(*mask, |fisher| {
                    for (sum, g) in fisher.iter_mut().zip(&gradient) {
                        *sum += g * g;
                    }
                });
            }
        }
        if view.step < self.options.fisher_steps {
            return Ok(());
        }
        let total: usize = pairs.iter().map(|(id, _)| view.parameters.get(*id).count()).sum();
        let wanted = (self.options.share * total as f64).round() as usize;
        let chosen =
            sparse::largest(wanted, pairs.len(), |p| Ok(view.parameters.values(pairs[p].1)))?;
        for ((_, mask), chosen) in pairs.into_iter().zip(chosen) {
            view.parameters.update(mask, |values| {
                values.fill(0.0);
                for index in chosen {
                    values[index as usize] = 1.0;
                }
            });
        }
        Ok(())
    }
}

impl Method for ChildTuning {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        // While the Fisher information is gathered nothing moves.
        Promises { reaches_all: !self.is_driven(), quantized_base: false, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["fisher_steps = 3", "mode = \"free\"\nshare = 0.7", "share = 1.0"]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let mut plan = self.full().plan(spec)?;
        if self.is_driven() {
            let masks: Vec<PlannedParameter> = plan
                .parameters
                .iter()
                .map(|p| PlannedParameter { name: mask_name(&p.name), trains: false, ..p.clone() })
                .collect();
            plan.parameters.extend(masks);
            plan.notes.push(format!(
                "the first {} steps only look for the child network",
                self.options.fisher_steps
            ));
        }
        Ok(plan)
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        sparse::refuse_blocks(weights, "child-tuning")?;
        let changes = self.full().attach(weights, parameters, seed)?;
        if self.is_driven() {
            let all: Vec<(ParameterId, String, Vec<usize>)> = parameters
                .iter()
                .map(|(id, p)| (id, mask_name(&p.name), p.shape.clone()))
                .collect();
            for (id, name, shape) in all {
                // Decay would move what the mask holds.
                parameters.get_mut(id).decays = false;
                let zeros = vec![0.0; shape.iter().product()];
                let mask = parameters.add_buffer(name, &shape, zeros);
                parameters.get_mut(mask).saved = false;
            }
        }
        Ok(changes)
    }

    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        if !self.is_driven() {
            return Ok(vec![num_steps]);
        }
        let first = self.options.fisher_steps;
        if first >= num_steps {
            return Err(Error::Setting {
                setting: "method.child-tuning.fisher_steps".to_owned(),
                what: "no step is left to train".to_owned(),
                expected: format!("fewer than the run's {num_steps} steps"),
                found: first.to_string(),
                help: "lower it, or train longer".to_owned(),
            });
        }
        Ok(vec![first, num_steps - first])
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let share = self.options.share;
        if share >= 1.0 {
            return Ok(());
        }
        if self.is_driven() {
            if step.step <= self.options.fisher_steps {
                return self.measure(step);
            }
            for (id, mask) in Self::pairs(step.parameters) {
                let mask = step.parameters.values(mask);
                if let Some(gradient) = step.gradients[id.index()].as_mut() {
                    for (g, open) in gradient.iter_mut().zip(mask) {
                        *g *= open / share as f32;
                    }
                }
            }
            return Ok(());
        }
        for (place, gradient) in step.gradients.iter_mut().enumerate() {
            let Some(gradient) = gradient else { continue };
            let mut random = step.seed.stream("child-tuning", &[step.step, place as u64]);
            for g in gradient {
                *g = if random.uniform() < share { *g / share as f32 } else { 0.0 };
            }
        }
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        if self.is_driven() && step.step == self.options.fisher_steps {
            // Nothing has moved yet: the optimiser's first step is the next one.
            for (id, _) in Self::pairs(step.parameters) {
                step.reset_state(id);
            }
        }
        Ok(())
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        None
    }
}
