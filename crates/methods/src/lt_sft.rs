//! LT-SFT: train everything, keep what moved most, go back and train that alone.

use std::sync::Arc;

use retune_core::change::{Changes, Scope, WeightChange};
use retune_core::kernels::linear;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, Seat, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;
use tensor::{Tensor, TensorData};

use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning, SparseChange};

choice! {
    /// Which entries are kept.
    pub enum Selection {
        /// Those that moved most while everything trained.
        LotteryTicket = "lottery-ticket",
        /// Random ones; nothing trains before.
        Random = "random",
    }
}

options! {
    /// Trains everything once to find the entries that matter, then those alone from the start.
    pub struct LtSftOptions("lt-sft") {
        /// Entries kept, as a share of those targeted.
        density: f64 = 0.01, in 0.0..=1.0;
        /// Entries kept, as a number; given this, `density` is ignored.
        num_tunable: Option<usize> = None, in 1..=1_000_000_000_000;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Which entries are kept.
        selection: Selection = Selection::LotteryTicket;
        /// Share of the steps in which everything trains.
        full_fraction: f64 = 0.5, in 0.01..=0.99;
        /// Weight of the mean distance from the base while everything trains.
        full_l1: f64 = 0.0, in 0.0..=1e3;
        /// The same while the kept entries train.
        sparse_l1: f64 = 0.0, in 0.0..=1e3;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "lt-sft",
    summary: "Trains everything, rewinds, and trains only the entries that moved most; such changes add up.",
    source: "Ansell, Ponti, Korhonen and Vulić, Composable Sparse Fine-Tuning for Cross-Lingual Transfer, 2021, arXiv 2110.07560",
    usual_learning_rates: (1e-5, 1e-3),
    options: registry::specs::<LtSftOptions>,
};

/// Lottery-ticket sparse fine-tuning.
#[derive(Debug, Clone, Default)]
pub struct LtSft {
    /// Budget, targets and stages.
    pub options: LtSftOptions,
    /// Read from a file: only the kept entries are attached.
    loaded: bool,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(LtSft { options: LtSftOptions::read(reader), loaded: false }),
    adapter: Some(("LT_SFT", |config| {
        Ok(Box::new(LtSft { options: sparse::saved_options(config)?, loaded: true }))
    })),
};

/// The difference of a whole weight, while everything trains.
fn dense_name(weight: &WeightSpec) -> String {
    format!("{}.difference", weight.name)
}

/// The values a head has before the run, to go back to.
fn start_name(head: &str) -> String {
    format!("{head}.start")
}

/// A dense difference that is given up for a sparse one.
#[derive(Debug)]
struct Ticket {
    dense: ParameterId,
    sparse: ParameterId,
    kept: SparseChange,
}

impl WeightChange for Ticket {
    fn parameters(&self) -> Vec<ParameterId> {
        vec![self.dense, self.sparse]
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        if scope.parameters().get(self.dense).count() == 0 {
            return self.kept.materialize(base, scope);
        }
        let shape = base.dims();
        base + scope.tensor::<2>(self.dense, shape)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        if scope.parameters().get(self.dense).count() == 0 {
            return self.kept.linear(x, base, bias, scope);
        }
        // The packed matrix is at hand; reading the checkpoint again in each pass is not wanted.
        let data = TensorData::new(base.to_f32(), [base.rows(), base.columns()]);
        let weight = Tensor::<2>::from_data(data, scope.parameters().device());
        Some(linear(x.clone(), self.materialize(weight, scope), bias.cloned()))
    }
}

impl LtSft {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<(Vec<&'a WeightSpec>, usize)> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        let among = Among::LinearsAndEmbeddings;
        let chosen = targets.select(spec, among, "method.lt-sft.targets")?;
        let targeted: usize = chosen.iter().map(|weight| weight.count()).sum();
        let (setting, budget) = match o.num_tunable {
            Some(number) => ("num_tunable", number),
            None => ("density", (o.density * targeted as f64).round() as usize),
        };
        sparse::check_budget(&format!("method.lt-sft.{setting}"), budget, targeted)?;
        Ok((chosen, budget))
    }

    fn has_full_stage(&self) -> bool {
        self.options.selection == Selection::LotteryTicket && !self.loaded
    }

    fn full_steps(&self, num_steps: u64) -> Result<u64> {
        if !self.has_full_stage() {
            return Ok(0);
        }
        if num_steps < 2 {
            return Err(Error::Setting {
                setting: "train.steps".to_owned(),
                what: "lt-sft trains in two stages".to_owned(),
                expected: "at least 2 steps".to_owned(),
                found: num_steps.to_string(),
                help: "train longer, or set `selection` to \"random\"".to_owned(),
            });
        }
        let steps = (self.options.full_fraction * num_steps as f64).round() as u64;
        Ok(steps.clamp(1, num_steps - 1))
    }

    /// Keeps the entries that moved most and goes back to the start.
    fn select(&self, view: &mut StepView<'_>) -> Result<()> {
        let (chosen, budget) = self.chosen(view.spec)?;
        let find = |view: &StepView<'_>, name: String| {
            view.parameters.find(&name).ok_or_else(|| Error::Unsupported {
                what: format!("lt-sft without its parameter `{name}`"),
                help: "start the run anew".to_owned(),
            })
        };
        let mut dense = Vec::with_capacity(chosen.len());
        for weight in &chosen {
            dense.push(find(view, dense_name(weight))?);
        }
        let masks = sparse::largest(budget, chosen.len(), |place| {
            Ok(view.parameters.values(dense[place]).into_iter().map(f32::abs).collect())
        })?;
        for ((weight, mask), dense) in chosen.iter().zip(masks).zip(dense) {
            view.release(dense);
            let id = find(view, sparse::name(weight))?;
            let seats = mask.into_iter().map(|index| (index, Seat::fresh(0.0, 0.0))).collect();
            view.reseat(id, seats)?;
            view.reset_state(id);
        }
        for (name, _) in sparse::heads(view.spec, &chosen)? {
            let (head, start) = (find(view, name.clone())?, find(view, start_name(&name))?);
            let values = view.parameters.values(start);
            view.parameters.set(head, values)?;
            view.reset_state(head);
        }
        Ok(())
    }
}

impl Method for LtSft {
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
        // The kept entries are empty until everything has trained.
        let reaches_all = !self.has_full_stage();
        Promises { reaches_all, quantized_base: reaches_all, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "density = 0.1\nfull_l1 = 0.1\nsparse_l1 = 0.1",
            "num_tunable = 150\nselection = \"random\"",
        ]
    }

    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        let full = self.full_steps(num_steps)?;
        Ok([full, num_steps - full].into_iter().filter(|length| *length > 0).collect())
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let (chosen, budget) = self.chosen(spec)?;
        let mut parameters = Vec::new();
        let mut notes = Vec::new();
        for weight in &chosen {
            let mut add = |name: String, shape: Vec<usize>| {
                let place = weight.name.clone();
                parameters.push(PlannedParameter { name, shape, place, trains: true });
            };
            if self.has_full_stage() {
                add(dense_name(weight), weight.shape.clone());
            }
            add(sparse::name(weight), vec![0]);
        }
        if self.has_full_stage() {
            // The differences are given up before the kept entries begin.
            parameters.push(PlannedParameter::pool("lt-sft", 0));
            notes.push(format!("everything targeted trains first; {budget} values are kept"));
        } else {
            parameters.push(PlannedParameter::pool("lt-sft", budget));
        }
        let heads = sparse::heads(spec, &chosen)?;
        for planned in sparse::plan_heads(&heads) {
            let start = PlannedParameter {
                name: start_name(&planned.name),
                trains: false,
                ..planned.clone()
            };
            parameters.push(planned);
            if self.has_full_stage() {
                parameters.push(start);
            }
        }
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        if self.has_full_stage() {
            sparse::refuse_blocks(weights, "lt-sft")?;
        }
        let spec = weights.spec().clone();
        let (chosen, budget) = self.chosen(&spec)?;
        let mut changes = Changes::default();
        let mut random_masks = vec![Vec::new(); chosen.len()];
        if self.options.selection == Selection::Random && !self.loaded {
            let total = chosen.iter().map(|weight| weight.count()).sum();
            sparse::check_places("lt-sft", total)?;
            let mut random = seed.stream("lt-sft", &[]);
            let counts: Vec<usize> = chosen.iter().map(|weight| weight.count()).collect();
            random_masks =
                sparse::split(&sparse::random_entries(total, budget, &mut random), &counts);
        }
        for (weight, mask) in chosen.iter().zip(random_masks) {
            let [rows, columns] = weight.matrix();
            let mut dense = None;
            if self.has_full_stage() {
                let zeros = vec![0.0; rows * columns];
                let id = parameters.add(dense_name(weight), &weight.shape, zeros);
                parameters.get_mut(id).saved = false;
                dense = Some(id);
            }
            let values = vec![0.0; mask.len()];
            let id = parameters.add_sparse(sparse::name(weight), [rows, columns], mask, values);
            let kept = SparseChange::new(id, Meaning::Difference);
            match dense {
                Some(dense) => {
                    changes.change_weight(&weight.name, Ticket { dense, sparse: id, kept });
                }
                None => changes.change_weight(&weight.name, kept),
            }
        }
        for (name, weight) in sparse::heads(&spec, &chosen)? {
            let head = [(name.clone(), weight)];
            sparse::attach_heads(&head, weights, parameters, &mut changes)?;
            if self.has_full_stage() {
                let values = weights.values(&weight.name)?;
                let id = parameters.add_buffer(start_name(&name), &weight.shape, values);
                parameters.get_mut(id).saved = false;
            }
        }
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let full = step.step <= self.full_steps(step.num_steps)?;
        let weight = if full { self.options.full_l1 } else { self.options.sparse_l1 };
        if weight == 0.0 {
            return Ok(());
        }
        let each = (weight / step.spec.count() as f64) as f32;
        let ids: Vec<ParameterId> = step.parameters.iter().map(|(id, _)| id).collect();
        for id in ids {
            let parameter = step.parameters.get(id);
            let is_difference =
                step.parameters.support(id).is_some() || parameter.name.ends_with(".difference");
            let Some(gradient) = step.gradients[id.index()].as_mut() else { continue };
            if is_difference {
                for (g, value) in gradient.iter_mut().zip(step.parameters.values(id)) {
                    *g += each * if value == 0.0 { 0.0 } else { value.signum() };
                }
            }
        }
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let full = self.full_steps(step.num_steps)?;
        if full > 0 && step.step == full {
            self.select(step)?;
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("LT_SFT", &self.options.write(), spec).into())
    }
}
