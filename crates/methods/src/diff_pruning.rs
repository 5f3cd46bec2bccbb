//! Diff pruning: a difference of every weight through gates that learn to close.

use std::sync::Arc;

use retune_core::change::{Changes, Mode, Scope, WeightChange};
use retune_core::kernels::linear;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, Seat, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, options};
use serde_json::Value;
use tensor::{Tensor, TensorData, activation};

use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning, SparseChange};

options! {
    /// Trains a difference of every targeted weight and which of its entries are needed.
    pub struct DiffPruningOptions("diff-pruning") {
        /// Entries kept in the end, as a share of those targeted.
        density: f64 = 0.005, in 0.0..=1.0;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Weight of the expected share of open gates.
        sparsity_weight: f64 = 1.0, in 0.0..=1e6;
        /// Logit each gate begins with.
        gate_start: f64 = 5.0, in -20.0..=20.0, also "alpha_init";
        /// Share of the steps with gates; in the rest the kept entries train alone.
        gated_fraction: f64 = 0.7, in 0.01..=0.99;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "diff-pruning",
    summary: "Trains a difference through hard-concrete gates under an L0 penalty, keeps the largest entries and trains those on.",
    source: "Guo, Rush and Kim, Parameter-Efficient Transfer Learning with Diff Pruning, 2020, arXiv 2012.07463",
    usual_learning_rates: (1e-5, 1e-3),
    options: registry::specs::<DiffPruningOptions>,
};

/// Diff pruning.
#[derive(Debug, Clone, Default)]
pub struct DiffPruning {
    /// Density, gates and stages.
    pub options: DiffPruningOptions,
    /// Read from a file: only the kept entries are attached.
    loaded: bool,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| {
        Box::new(DiffPruning { options: DiffPruningOptions::read(reader), loaded: false })
    },
    adapter: Some(("DIFF_PRUNING", |config| {
        Ok(Box::new(DiffPruning { options: sparse::saved_options(config)?, loaded: true }))
    })),
};

/// The ends a gate is stretched to before it is cut to 0 and 1 (Louizos et al., arXiv 1712.01312).
const STRETCH: (f64, f64) = (-1.5, 1.5);

fn names(weight: &WeightSpec) -> [String; 2] {
    [format!("{}.difference", weight.name), format!("{}.gate", weight.name)]
}

/// `W + z ⊙ D`, then `W` with the entries that were kept.
#[derive(Debug)]
struct Gated {
    difference: ParameterId,
    gate: ParameterId,
    kept: SparseChange,
    sparse: ParameterId,
    place: u64,
}

impl Gated {
    fn is_over(&self, scope: &Scope<'_>) -> bool {
        scope.parameters().get(self.difference).count() == 0
    }

    /// Draws a gate per entry while learning; else the gate is its mean, stretched and cut.
    fn gates(&self, shape: [usize; 2], scope: &Scope<'_>) -> Tensor<2> {
        let mut logits = scope.tensor::<2>(self.gate, shape);
        if let Mode::Train { seed, pass } = scope.mode() {
            let mut random = seed.stream("diff-pruning", &[pass, self.place]);
            let noise = |_| {
                let u = random.uniform().clamp(1e-6, 1.0 - 1e-6);
                (u.ln() - (1.0 - u).ln()) as f32
            };
            let noise: Vec<f32> = (0..shape[0] * shape[1]).map(noise).collect();
            let device = scope.parameters().device();
            logits = logits + Tensor::from_data(TensorData::new(noise, shape), device);
        }
        let (low, high) = STRETCH;
        activation::sigmoid(logits).mul_scalar(high - low).add_scalar(low).clamp(0.0, 1.0)
    }
}

impl WeightChange for Gated {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.difference, self.gate, self.sparse]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        if self.is_over(scope) {
            return self.kept.materialize(base, scope);
        }
        let shape = base.dims();
        base + scope.tensor::<2>(self.difference, shape) * self.gates(shape, scope)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        if self.is_over(scope) {
            return self.kept.linear(x, base, bias, scope);
        }
        let data = TensorData::new(base.to_f32(), [base.rows(), base.columns()]);
        let weight = Tensor::<2>::from_data(data, scope.parameters().device());
        Some(linear(x.clone(), self.materialize(weight, scope), bias.cloned()))
    }
}

/// Returns the probability that a gate with this logit is open.
fn open_probability(logit: f32) -> f64 {
    let (low, high) = STRETCH;
    1.0 / (1.0 + (-(f64::from(logit) - (-low / high).ln())).exp())
}

impl DiffPruning {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<(Vec<&'a WeightSpec>, usize)> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        let chosen = targets.select(spec, Among::Linears, "method.diff-pruning.targets")?;
        let targeted: usize = chosen.iter().map(|weight| weight.count()).sum();
        let budget = (o.density * targeted as f64).round() as usize;
        sparse::check_budget("method.diff-pruning.density", budget, targeted)?;
        Ok((chosen, budget))
    }

    fn gated_steps(&self, num_steps: u64) -> Result<u64> {
        if num_steps < 2 {
            return Err(Error::Setting {
                setting: "train.steps".to_owned(),
                what: "diff-pruning trains in two stages".to_owned(),
                expected: "at least 2 steps".to_owned(),
                found: num_steps.to_string(),
                help: "train longer".to_owned(),
            });
        }
        let steps = (self.options.gated_fraction * num_steps as f64).round() as u64;
        Ok(steps.clamp(1, num_steps - 1))
    }

    /// Keeps the entries of the largest gated differences, with their values.
    fn project(&self, view: &mut StepView<'_>) -> Result<()> {
        let (chosen, budget) = self.chosen(view.spec)?;
        let (low, high) = STRETCH;
        let differences = |view: &StepView<'_>, weight: &WeightSpec| -> Vec<f32> {
            let [difference, gate] = names(weight).map(|name| view.parameters.find(&name));
            let (Some(difference), Some(gate)) = (difference, gate) else { return Vec::new() };
            let gates = view.parameters.values(gate).into_iter().map(|logit| {
                let open = 1.0 / (1.0 + (-f64::from(logit)).exp());
                (open * (high - low) + low).clamp(0.0, 1.0) as f32
            });
            view.parameters.values(difference).into_iter().zip(gates).map(|(d, z)| d * z).collect()
        };
        let masks = sparse::largest(budget, chosen.len(), |place| {
            Ok(differences(view, chosen[place]).into_iter().map(f32::abs).collect())
        })?;
        for (weight, mask) in chosen.iter().zip(masks) {
            let values = differences(view, weight);
            for id in names(weight)
                .iter()
                .filter_map(|name| view.parameters.find(name))
                .collect::<Vec<_>>()
            {
                view.release(id);
            }
            let Some(id) = view.parameters.find(&sparse::name(weight)) else { continue };
            let seats = mask.into_iter().map(|i| (i, Seat::fresh(values[i as usize], 0.0)));
            view.reseat(id, seats.collect())?;
            view.reset_state(id);
        }
        Ok(())
    }
}

impl Method for DiffPruning {
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
        // The kept entries are empty while there are gates.
        Promises { reaches_all: self.loaded, quantized_base: false, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &["density = 0.1\ngate_start = 0.5"]
    }

    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        let first = self.gated_steps(num_steps)?;
        Ok(vec![first, num_steps - first])
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let (chosen, budget) = self.chosen(spec)?;
        let mut parameters = Vec::new();
        for weight in &chosen {
            let mut add = |name: String, shape: Vec<usize>| {
                let place = weight.name.clone();
                parameters.push(PlannedParameter { name, shape, place, trains: true });
            };
            if !self.loaded {
                for name in names(weight) {
                    add(name, weight.shape.clone());
                }
            }
            add(sparse::name(weight), vec![0]);
        }
        parameters
            .push(PlannedParameter::pool("diff-pruning", if self.loaded { budget } else { 0 }));
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &chosen)?));
        let notes =
            vec![format!("differences of everything train first; {budget} entries are kept")];
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        _seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let (chosen, _) = self.chosen(&spec)?;
        let mut changes = Changes::default();
        if !self.loaded {
            sparse::refuse_blocks(weights, "diff-pruning")?;
        }
        for (place, weight) in chosen.iter().enumerate() {
            let mut dense = None;
            if !self.loaded {
                let starts = [0.0, self.options.gate_start as f32];
                let mut ids = names(weight).into_iter().zip(starts).map(|(name, start)| {
                    let id = parameters.add(name, &weight.shape, vec![start; weight.count()]);
                    let parameter = parameters.get_mut(id);
                    (parameter.saved, parameter.decays) = (false, false);
                    id
                });
                dense = ids.next().zip(ids.next());
            }
            let (none, nothing) = (Vec::new(), Vec::new());
            let id = parameters.add_sparse(sparse::name(weight), weight.matrix(), none, nothing);
            let kept = SparseChange::new(id, Meaning::Difference);
            match dense {
                Some((difference, gate)) => {
                    let place = place as u64;
                    let change = Gated { difference, gate, kept, sparse: id, place };
                    changes.change_weight(&weight.name, change);
                }
                None => changes.change_weight(&weight.name, kept),
            }
        }
        let heads = sparse::heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let gates: Vec<ParameterId> = step
            .parameters
            .iter()
            .filter(|(_, p)| p.name.strip_suffix(".gate").is_some() && p.count() > 0)
            .map(|(id, _)| id)
            .collect();
        let total: usize = gates.iter().map(|id| step.parameters.get(*id).count()).sum();
        let weight = self.options.sparsity_weight / total.max(1) as f64;
        for id in gates {
            let Some(gradient) = step.gradients[id.index()].as_mut() else { continue };
            for (g, logit) in gradient.iter_mut().zip(step.parameters.values(id)) {
                let open = open_probability(logit);
                *g += (weight * open * (1.0 - open)) as f32;
            }
        }
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        if step.step == self.gated_steps(step.num_steps)? {
            self.project(step)?;
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("DIFF_PRUNING", &self.options.write(), spec).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_open_as_often_as_its_logit_says() {
        // P(stretched sigmoid > 0) with both ends alike is the sigmoid of the logit.
        assert!((open_probability(0.0) - 0.5).abs() < 1e-9);
        let mut random = Seed(4).stream("gate", &[]);
        let logit = -1.0_f64;
        let open = (0..40_000)
            .filter(|_| {
                let u = random.uniform().clamp(1e-9, 1.0 - 1e-9);
                let s = 1.0 / (1.0 + (-(logit + u.ln() - (1.0 - u).ln())).exp());
                s * (STRETCH.1 - STRETCH.0) + STRETCH.0 > 0.0
            })
            .count();
        let expected = open_probability(logit as f32);
        assert!((open as f64 / 40_000.0 - expected).abs() < 0.01, "{open} {expected}");
    }
}
