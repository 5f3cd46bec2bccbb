//! SpIEL: a fixed number of entries that move to where the gradients are.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Seat, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::tap::{Best, Scoring, Tap, Window};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::Value;

use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning};

choice! {
    /// How new entries are found.
    pub enum Variant {
        /// By gradients accumulated over a few steps, for a list of candidates.
        Ag = "ag",
        /// By row and column momenta of the SM3 optimiser, which then moves the entries.
        Sm3 = "sm3",
    }
}

choice! {
    /// How the replaced share falls over the run.
    pub enum Policy {
        /// In a straight line to 0.
        Linear = "linear",
        /// Along half a cosine to 0.
        Cosine = "cosine",
    }
}

options! {
    /// Trains a fixed number of entries that are dropped and grown again during the run.
    pub struct SpielOptions("spiel", validate = SpielOptions::check) {
        /// Trained entries as a share of all the model's parameters.
        density: f64 = 0.01, in 0.0..=1.0;
        /// Trained entries as a number; given this, `density` is ignored.
        num_tunable: Option<usize> = None, in 1..=1_000_000_000_000;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// How new entries are found.
        variant: Variant = Variant::Ag;
        /// Steps from one reselection to the next.
        reselect_every: u64 = 20, in 2..=1_000_000, also "reselection_steps";
        /// Steps over which gradients are gathered before a reselection.
        accumulate: u64 = 5, in 1..=1_000_000, also "selection_accumulation_steps";
        /// Share of the entries replaced at first; it falls to 0 over the run.
        first_share: f64 = 0.2, in 0.0..=1.0, also "initial_reselection_rate";
        /// How that share falls.
        policy: Policy = Policy::Linear;
    }
}

impl SpielOptions {
    fn check(&self, reader: &mut retune_options::Reader<'_>) {
        if self.reselect_every <= self.accumulate {
            reader.error(
                "reselect_every",
                "one window would reach into the next",
                "make `reselect_every` larger than `accumulate`",
            );
        }
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "spiel",
    summary: "Trains single entries of the weights; those that move least are dropped for others with larger gradients.",
    source: "Ansell, Vulić, Sterz, Korhonen and Ponti, Scaling Sparse Fine-Tuning to Large Language Models, 2024, arXiv 2401.16405",
    usual_learning_rates: (3e-5, 3e-3),
    options: registry::specs::<SpielOptions>,
};

/// SpIEL.
#[derive(Debug, Clone, Default)]
pub struct Spiel {
    /// Budget, targets and clock.
    pub options: SpielOptions,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Spiel { options: SpielOptions::read(reader) }),
    adapter: Some(("SPIEL", |config| {
        Ok(Box::new(Spiel { options: sparse::saved_options(config)? }))
    })),
};

/// Weights with their number of entries.
type Shares<'a> = Vec<(&'a WeightSpec, usize)>;

/// The lists of SM3 beside a sparse parameter.
fn momentum_name(parameter: &str, of: &str) -> String {
    format!("{parameter}.sm3_{of}")
}

impl Spiel {
    /// Returns the weights with their number of entries; those with none are left out.
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<(Shares<'a>, Vec<String>)> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        let weights = targets.select(spec, Among::Linears, "method.spiel.targets")?;
        let targeted = weights.iter().map(|weight| weight.count()).sum();
        let budget = match o.num_tunable {
            Some(number) => number,
            None => (o.density * spec.count() as f64) as usize,
        };
        let setting = if o.num_tunable.is_some() { "num_tunable" } else { "density" };
        sparse::check_budget(&format!("method.spiel.{setting}"), budget, targeted)?;
        let mut notes = Vec::new();
        let mut chosen = Vec::new();
        for (weight, share) in weights.iter().zip(sparse::shares(budget, &weights)) {
            if share == 0 {
                notes
                    .push(format!("{} is too small for an entry and is left out", weight.module()));
            } else {
                chosen.push((*weight, share));
            }
        }
        if chosen.is_empty() {
            return Err(Error::Setting {
                setting: format!("method.spiel.{setting}"),
                what: "no targeted weight gets an entry".to_owned(),
                expected: format!("at least {} values in all", weights.len()),
                found: budget.to_string(),
                help: "raise the budget, or target fewer modules".to_owned(),
            });
        }
        Ok((chosen, notes))
    }

    fn sparse_ids(parameters: &Parameters) -> Vec<ParameterId> {
        parameters.iter().map(|(id, _)| id).filter(|id| parameters.tap(*id).is_some()).collect()
    }

    /// Returns the share of entries replaced after `step` steps.
    fn share(&self, step: u64, num_steps: u64) -> f64 {
        if step == self.options.accumulate {
            // All entries were drawn at random and stand to be replaced.
            return 1.0;
        }
        let done = step as f64 / num_steps.max(1) as f64;
        let left = match self.options.policy {
            Policy::Linear => 1.0 - done,
            Policy::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.options.first_share * left
    }

    fn is_due(&self, step: u64) -> bool {
        let o = &self.options;
        step == o.accumulate || (step > o.reselect_every && step % o.reselect_every == o.accumulate)
    }
}

/// Returns the places of the `count` smallest values by size, as a mark per place.
fn smallest(values: &[f32], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()).then(a.cmp(b)));
    let mut marks = vec![false; values.len()];
    order.iter().take(count).for_each(|place| marks[*place] = true);
    marks
}

/// Puts `grown` in the place of as many dropped entries; one that is both stays as it is.
///
/// Of the dropped, those with the smallest values go first, so the number of entries stays.
fn exchange(
    indices: &[u32],
    values: &[f32],
    dropped: &[bool],
    mut grown: Vec<(u32, Seat)>,
) -> Vec<(u32, Seat)> {
    grown.retain(|(index, _)| indices.binary_search(index).is_err());
    let mut going: Vec<usize> = (0..indices.len()).filter(|place| dropped[*place]).collect();
    going.sort_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()).then(a.cmp(b)));
    going.truncate(grown.len());
    going.sort_unstable();
    let stay = (0..indices.len()).filter(|place| going.binary_search(place).is_err());
    let mut seats: Vec<(u32, Seat)> =
        stay.map(|place| (indices[place], Seat::Kept(place))).collect();
    seats.extend(grown);
    seats
}

impl Spiel {
    fn reselect_ag(&self, view: &mut StepView<'_>, id: ParameterId, window: Window) -> Result<()> {
        let indices = view.parameters.indices(id);
        let values = view.parameters.values(id);
        let replaced = (self.share(view.step, view.num_steps) * indices.len() as f64) as usize;
        let dropped = smallest(&values, replaced);
        let remains = |index: u32| indices.binary_search(&index).is_ok_and(|place| !dropped[place]);
        let mut valid: Vec<usize> =
            (0..window.candidates.len()).filter(|c| !remains(window.candidates[*c])).collect();
        valid
            .sort_by(|a, b| window.sums[*b].abs().total_cmp(&window.sums[*a].abs()).then(a.cmp(b)));
        valid.truncate(replaced);
        let count = window.updates.max(1) as f32;
        // An entry both dropped and grown keeps its value: `exchange` leaves it alone, and so it
        // must not be counted among those that go.
        let mut dropped = dropped;
        for c in &valid {
            if let Ok(place) = indices.binary_search(&window.candidates[*c]) {
                dropped[place] = false;
            }
        }
        let grown = valid
            .into_iter()
            .map(|c| {
                let (mean, square) = (window.sums[c] / count, window.squares[c] / count);
                let state = view.optimizer.seeded(mean, square, count);
                let seat = Seat::New { value: 0.0, gradient: 0.0, state, age: count };
                (window.candidates[c], seat)
            })
            .collect();
        view.reseat(id, exchange(&indices, &values, &dropped, grown))
    }

    fn reselect_sm3(&self, view: &mut StepView<'_>, id: ParameterId) -> Result<()> {
        let indices = view.parameters.indices(id);
        let values = view.parameters.values(id);
        let replaced = (self.share(view.step, view.num_steps) * indices.len() as f64) as usize;
        let dropped = smallest(&values, replaced);
        let (rows, columns) = momenta(view.parameters, id)?;
        let (rows, columns) = (view.parameters.values(rows), view.parameters.values(columns));
        let mut best = Best::new(replaced);
        let mut active = indices.iter().copied().peekable();
        for (row, r) in rows.iter().enumerate() {
            for (column, c) in columns.iter().enumerate() {
                let index = (row * columns.len() + column) as u32;
                if active.next_if_eq(&index).is_none() {
                    best.offer(index, r * c);
                }
            }
        }
        let grown = best.into_indices().into_iter().map(|i| (i, Seat::fresh(0.0, 0.0))).collect();
        view.reseat(id, exchange(&indices, &values, &dropped, grown))
    }
}

/// Finds the row and column momenta of SM3 beside a sparse parameter.
fn momenta(parameters: &Parameters, id: ParameterId) -> Result<(ParameterId, ParameterId)> {
    let name = &parameters.get(id).name;
    let find = |of: &str| {
        let name = momentum_name(name, of);
        parameters.find(&name).ok_or(Error::Unsupported {
            what: format!("SM3 without its list `{name}`"),
            help: "start the run anew".to_owned(),
        })
    };
    Ok((find("rows")?, find("columns")?))
}

/// Moves the entries of one weight by SM3 (Anil et al., arXiv 1901.11150).
fn move_by_sm3(view: &mut StepView<'_>, id: ParameterId) -> Result<()> {
    let Some(gradient) = view.gradients[id.index()].take() else { return Ok(()) };
    let indices = view.parameters.indices(id);
    let (row_id, column_id) = momenta(view.parameters, id)?;
    let (old_rows, old_columns) =
        (view.parameters.values(row_id), view.parameters.values(column_id));
    let (mut rows, mut columns) = (old_rows.clone(), old_columns.clone());
    let width = columns.len();
    let (rate, scale) = (view.learning_rate as f32, view.gradient_scale as f32);
    let decay = (view.learning_rate * view.optimizer.weight_decay()) as f32;
    view.parameters.update(id, |values| {
        for ((value, g), index) in values.iter_mut().zip(&gradient).zip(indices.iter()) {
            let (row, column) = (*index as usize / width, *index as usize % width);
            let g = g * scale;
            let u = old_rows[row].min(old_columns[column]) + g * g;
            rows[row] = rows[row].max(u);
            columns[column] = columns[column].max(u);
            *value -= rate * g / (u + 1e-8).sqrt() + decay * *value;
        }
    });
    view.parameters.set(row_id, rows)?;
    view.parameters.set(column_id, columns)
}

impl Method for Spiel {
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
        &[
            "density = 0.05\nreselect_every = 3\naccumulate = 1",
            "num_tunable = 200\nvariant = \"sm3\"\npolicy = \"cosine\"",
        ]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let (chosen, notes) = self.chosen(spec)?;
        let mut parameters = Vec::new();
        for (weight, count) in chosen {
            let name = sparse::name(weight);
            let mut add = |name: String, shape: usize, trains| {
                let place = weight.name.clone();
                parameters.push(PlannedParameter { name, shape: vec![shape], place, trains });
            };
            add(name.clone(), count, true);
            if self.options.variant == Variant::Sm3 {
                let [rows, columns] = weight.matrix();
                add(momentum_name(&name, "rows"), rows, false);
                add(momentum_name(&name, "columns"), columns, false);
            }
        }
        let changed: Vec<_> = self.chosen(spec)?.0.iter().map(|(weight, _)| *weight).collect();
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &changed)?));
        Ok(MethodPlan { parameters, notes })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let spec = weights.spec().clone();
        let mut changes = Changes::default();
        let chosen = self.chosen(&spec)?.0;
        for (number, (weight, count)) in chosen.iter().copied().enumerate() {
            let mut random = seed.stream("spiel", &[number as u64]);
            let indices = sparse::random_entries(weight.count(), count, &mut random);
            let values = vec![0.0; count];
            let id = sparse::attach(
                weight,
                indices,
                values,
                Meaning::Difference,
                parameters,
                &mut changes,
            );
            parameters.add_tap(id, Scoring::GRADIENT);
            match self.options.variant {
                Variant::Ag => {
                    parameters.get_mut(id).counts_ages = true;
                    parameters.tap(id).into_iter().for_each(|tap| tap.open(count));
                }
                Variant::Sm3 => {
                    parameters.get_mut(id).moved_by_method = true;
                    let name = sparse::name(weight);
                    let [rows, columns] = weight.matrix();
                    for (of, count) in [("rows", rows), ("columns", columns)] {
                        let name = momentum_name(&name, of);
                        let id = parameters.add_buffer(name, &[count], vec![0.0; count]);
                        parameters.get_mut(id).saved = false;
                    }
                }
            }
        }
        let changed: Vec<_> = chosen.iter().map(|(weight, _)| *weight).collect();
        let heads = sparse::heads(&spec, &changed)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        for id in Self::sparse_ids(step.parameters) {
            step.parameters.tap(id).into_iter().for_each(Tap::end_step);
        }
        Ok(())
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        for id in Self::sparse_ids(step.parameters) {
            if self.options.variant == Variant::Sm3 {
                move_by_sm3(step, id)?;
                if self.is_due(step.step) {
                    self.reselect_sm3(step, id)?;
                }
                continue;
            }
            if self.is_due(step.step)
                && let Some(window) = step.parameters.tap(id).and_then(Tap::close)
            {
                self.reselect_ag(step, id, window)?;
            }
            let count = step.parameters.get(id).count();
            if (step.step + 1).is_multiple_of(self.options.reselect_every)
                && let Some(tap) = step.parameters.tap(id)
            {
                tap.open(count);
            }
        }
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("SPIEL", &self.options.write(), spec).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_the_papers() {
        let spiel = Spiel::default();
        let due: Vec<u64> = (1..70).filter(|step| spiel.is_due(*step)).collect();
        assert_eq!(due, [5, 25, 45, 65]);
        assert_eq!(spiel.share(5, 100), 1.0);
        assert!((spiel.share(25, 100) - 0.2 * 0.75).abs() < 1e-12);
    }

    #[test]
    fn an_exchange_keeps_the_number_and_what_is_dropped_and_grown() {
        let (indices, values) = ([2, 5, 7, 9], [0.1, -3.0, 0.0, 0.2]);
        let dropped = smallest(&values, 3);
        assert_eq!(dropped, [true, false, true, true]);
        // 7 is dropped and grown; 11 is new; so one of 2 and 9 goes, the smaller.
        let grown = vec![(7, Seat::fresh(0.0, 0.0)), (11, Seat::fresh(0.0, 0.0))];
        let kept = [true, false, false, true];
        let mut seats = exchange(&indices, &values, &kept, grown);
        seats.sort_by_key(|(index, _)| *index);
        let found: Vec<u32> = seats.iter().map(|(index, _)| *index).collect();
        assert_eq!(found, [5, 7, 9, 11]);
        assert_eq!(seats[1].1, Seat::Kept(2));
    }
}
