//! ID³: entries are unmasked step by step, where a gradient is large beside its weight.

use retune_core::change::Changes;
use retune_core::method::{Card, Method, MethodPlan, PlannedParameter, Promises, Seat, StepView};
use retune_core::parameters::{ParameterId, Parameters};
use retune_core::random::Seed;
use retune_core::spec::{ModelSpec, WeightSpec};
use retune_core::tap::{Pool, Scoring, Tap};
use retune_core::targets::{Among, Targets};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::{Options, Table, choice, options};
use serde_json::{Value, json};

use crate::lora::{Lora, LoraOptions};
use crate::registry::{self, Plugin};
use crate::sparse::{self, Meaning};

choice! {
    /// What entries are unmasked of.
    pub enum Over {
        /// The weights themselves.
        Weights = "weights",
        /// The factors of LoRA.
        Lora = "lora",
    }
}

choice! {
    /// When entries are unmasked.
    pub enum Unmasking {
        /// As many in each step.
        Linear = "linear",
        /// All within the first half of the run.
        Early = "early",
        /// All in the first step: a fixed mask.
        AtOnce = "at-once",
    }
}

choice! {
    /// Which masked entries are unmasked first.
    pub enum Order {
        /// Those with the highest score.
        Score = "score",
        /// Any, drawn at random: what the score must beat.
        Random = "random",
    }
}

options! {
    /// Unmasks a budget of entries over the run, those with the largest gradient beside their size.
    pub struct Id3Options("id3") {
        /// Entries unmasked in all.
        budget: usize = 100_000, in 1..=1_000_000_000_000;
        /// What entries are unmasked of.
        over: Over = Over::Weights;
        /// Power of the weight's size a gradient is divided by: 0 goes by gradients alone.
        exponent: f64 = 0.0, in 0.0..=4.0, also "exp";
        /// Added to the size before.
        epsilon: f64 = 1e-3, in 1e-12..=10.0, also "eps";
        /// When entries are unmasked.
        unmasking: Unmasking = Unmasking::Linear;
        /// Which masked entries are unmasked first.
        order: Order = Order::Score;
        /// Targeted modules: suffixes, one regular expression, or all-linear.
        targets: Vec<String> = vec!["all-linear".to_owned()];
        /// Modules left out again, matched the same way.
        exclude: Vec<String> = Vec::new();
        /// Only these layers, counted from 0; empty means all.
        layers: Vec<usize> = Vec::new();
        /// Rank of LoRA, where entries are of its factors.
        rank: usize = 8, in 1..=65536;
        /// Scale of LoRA.
        alpha: f64 = 16.0, in 0.0..=1e6;
    }
}

/// What help, documentation and model cards say.
pub const CARD: Card = Card {
    name: "id3",
    summary: "Unmasks single entries step by step, where the gradient is large beside the weight.",
    source: "Agarwal, Ramesh, Sengupta and Chakraborty, Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models, 2024, arXiv 2408.14470",
    usual_learning_rates: (1e-4, 5e-3),
    options: registry::specs::<Id3Options>,
};

/// Increment-D³.
#[derive(Debug, Clone, Default)]
pub struct Id3 {
    /// Budget, score and targets.
    pub options: Id3Options,
    /// Unmasked entries of each dense parameter, ascending; empty where entries are of weights.
    unmasked: Vec<(String, Vec<u32>)>,
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = Plugin {
    card: CARD,
    read: |reader| Box::new(Id3 { options: Id3Options::read(reader), unmasked: Vec::new() }),
    adapter: Some(("ID3", |config| {
        Ok(Box::new(Id3 { options: sparse::saved_options(config)?, unmasked: Vec::new() }))
    })),
};

/// A masked entry that may be unmasked.
struct Candidate {
    score: f32,
    parameter: usize,
    index: u32,
    weight: f32,
    gradient: f32,
}

/// Keeps the `count` best; ties go to the earlier parameter and the lower index.
fn best(mut candidates: Vec<Candidate>, count: usize) -> Vec<Candidate> {
    candidates.retain(|candidate| candidate.score.is_finite());
    candidates.sort_by(|a, b| {
        b.score.total_cmp(&a.score).then(a.parameter.cmp(&b.parameter)).then(a.index.cmp(&b.index))
    });
    candidates.truncate(count);
    candidates
}

impl Id3 {
    fn chosen<'a>(&self, spec: &'a ModelSpec) -> Result<Vec<&'a WeightSpec>> {
        let o = &self.options;
        let targets = Targets {
            names: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
        };
        targets.select(spec, Among::Linears, "method.id3.targets")
    }

    fn lora(&self) -> Lora {
        let o = &self.options;
        let options = LoraOptions {
            rank: o.rank,
            alpha: o.alpha,
            targets: o.targets.clone(),
            exclude: o.exclude.clone(),
            layers: o.layers.clone(),
            ..LoraOptions::default()
        };
        Lora { options, original: None }
    }

    fn scoring(&self) -> Scoring {
        let o = &self.options;
        Scoring { exponent: o.exponent, epsilon: o.epsilon, only_unchanged: true }
    }

    /// Returns how many entries are unmasked in step `step`, counted from 1.
    fn quota(&self, step: u64, num_steps: u64) -> usize {
        let length = match self.options.unmasking {
            Unmasking::Linear => num_steps,
            Unmasking::Early => num_steps.div_ceil(2),
            Unmasking::AtOnce => 1,
        };
        let upto = |step: u64| {
            (self.options.budget as u128 * u128::from(step.min(length)) / u128::from(length.max(1)))
                as usize
        };
        upto(step) - upto(step.saturating_sub(1))
    }

    fn unmask_weights(&self, view: &mut StepView<'_>, quota: usize) -> Result<()> {
        let scoring = self.scoring();
        let ids = sparse_ids(view.parameters);
        let mut candidates = Vec::new();
        for (parameter, id) in ids.iter().enumerate() {
            let Some(window) = view.parameters.tap(*id).and_then(Tap::close) else { continue };
            for (place, index) in window.candidates.iter().enumerate() {
                let (gradient, weight) = (window.pending[place], window.weights[place]);
                let score = scoring.score(gradient, weight);
                candidates.push(Candidate { score, parameter, index: *index, weight, gradient });
            }
        }
        let mut new: Vec<Vec<Candidate>> = ids.iter().map(|_| Vec::new()).collect();
        for candidate in best(candidates, quota) {
            new[candidate.parameter].push(candidate);
        }
        for (id, new) in ids.into_iter().zip(new).filter(|(_, new)| !new.is_empty()) {
            let indices = view.parameters.indices(id);
            let mut seats: Vec<(u32, Seat)> =
                indices.iter().enumerate().map(|(place, i)| (*i, Seat::Kept(place))).collect();
            seats.extend(new.iter().map(|c| (c.index, Seat::fresh(c.weight, c.gradient))));
            view.reseat(id, seats)?;
        }
        Ok(())
    }

    /// Unmasks entries drawn from all that are masked, before their first gradient.
    fn unmask_random(&self, view: &mut StepView<'_>, quota: usize) -> Result<()> {
        let Some(weights) = view.weights.filter(|_| quota > 0) else { return Ok(()) };
        let ids = sparse_ids(view.parameters);
        let chosen = self.chosen(view.spec)?;
        let unmasked: Vec<_> = ids.iter().map(|id| view.parameters.indices(*id)).collect();
        let masked: Vec<usize> = chosen
            .iter()
            .zip(&unmasked)
            .map(|(weight, known)| weight.count() - known.len())
            .collect();
        let total = masked.iter().sum();
        let mut random = view.seed.stream("id3", &[view.step]);
        let ranks = sparse::random_entries(total, quota.min(total), &mut random);
        let ranks = sparse::split(&ranks, &masked);
        for (((id, weight), known), ranks) in ids.into_iter().zip(chosen).zip(unmasked).zip(ranks) {
            if ranks.is_empty() {
                continue;
            }
            let values = weights.values(&weight.name)?;
            let new = masked_entries(&known, &ranks);
            let mut seats: Vec<(u32, Seat)> =
                known.iter().enumerate().map(|(place, i)| (*i, Seat::Kept(place))).collect();
            seats.extend(new.into_iter().map(|i| (i, Seat::fresh(values[i as usize], 0.0))));
            view.reseat(id, seats)?;
        }
        Ok(())
    }

    fn unmask_factors(&mut self, view: &mut StepView<'_>, quota: usize) {
        let ids = factor_ids(view.parameters);
        if self.unmasked.is_empty() {
            let name = |id: &ParameterId| view.parameters.get(*id).name.clone();
            self.unmasked = ids.iter().map(|id| (name(id), Vec::new())).collect();
        }
        let scoring = self.scoring();
        let mut random = view.seed.stream("id3", &[view.step]);
        let mut candidates = Vec::new();
        for (parameter, id) in ids.iter().enumerate() {
            let Some(gradient) = &view.gradients[id.index()] else { continue };
            let values = view.parameters.values(*id);
            let known = &self.unmasked[parameter].1;
            let masked = (0..gradient.len() as u32).filter(|i| known.binary_search(i).is_err());
            let mut few = Vec::new();
            for index in masked {
                let (gradient, weight) = (gradient[index as usize], values[index as usize]);
                let score = match self.options.order {
                    Order::Score => scoring.score(gradient, weight),
                    Order::Random => random.uniform() as f32,
                };
                few.push(Candidate { score, parameter, index, weight, gradient });
            }
            candidates.extend(best(few, quota));
        }
        for candidate in best(candidates, quota) {
            let list = &mut self.unmasked[candidate.parameter].1;
            let place = list.partition_point(|index| *index < candidate.index);
            list.insert(place, candidate.index);
        }
        for (id, (_, known)) in ids.into_iter().zip(&self.unmasked) {
            if let Some(gradient) = view.gradients[id.index()].as_mut() {
                for (index, g) in gradient.iter_mut().enumerate() {
                    if known.binary_search(&(index as u32)).is_err() {
                        *g = 0.0;
                    }
                }
            }
        }
    }
}

/// Returns the indices that stand at `ranks`, ascending, among those not in `known`.
fn masked_entries(known: &[u32], ranks: &[u32]) -> Vec<u32> {
    let mut before = 0;
    let entry = |rank: &u32| {
        while known.get(before).is_some_and(|index| *index <= rank + before as u32) {
            before += 1;
        }
        rank + before as u32
    };
    ranks.iter().map(entry).collect()
}

fn sparse_ids(parameters: &Parameters) -> Vec<ParameterId> {
    parameters.iter().map(|(id, _)| id).filter(|id| parameters.tap(*id).is_some()).collect()
}

fn factor_ids(parameters: &Parameters) -> Vec<ParameterId> {
    let factors = parameters.iter().filter(|(_, p)| p.trains && p.name.contains(".lora_"));
    factors.map(|(id, _)| id).collect()
}

impl Method for Id3 {
    fn options(&self) -> Table {
        self.options.write()
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(Self { options: self.options.clone(), unmasked: Vec::new() })
    }

    fn card(&self) -> Card {
        CARD
    }

    fn promises(&self) -> Promises {
        // What is unmasked lies in few of the tensors.
        let quantized_base = self.options.over == Over::Lora;
        Promises { reaches_all: false, quantized_base, ..Promises::default() }
    }

    fn examples(&self) -> &'static [&'static str] {
        &[
            "budget = 5",
            "budget = 6\nexponent = 1.0\nunmasking = \"early\"",
            "budget = 6\nover = \"lora\"\nrank = 2",
            "budget = 6\nunmasking = \"at-once\"\norder = \"random\"",
        ]
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let budget = self.options.budget;
        if self.options.over == Over::Lora {
            let mut plan = self.lora().plan(spec)?;
            sparse::check_budget("method.id3.budget", budget, plan.num_trainable())?;
            plan.notes.push(format!("{budget} of {} values are unmasked", plan.num_trainable()));
            return Ok(plan);
        }
        let chosen = self.chosen(spec)?;
        let targeted = chosen.iter().map(|weight| weight.count()).sum();
        sparse::check_budget("method.id3.budget", budget, targeted)?;
        let planned = |weight: &&WeightSpec| PlannedParameter {
            name: sparse::name(weight),
            shape: vec![0],
            place: weight.name.clone(),
            trains: true,
        };
        let mut parameters: Vec<PlannedParameter> = chosen.iter().map(planned).collect();
        parameters.push(PlannedParameter::pool("id3", budget));
        parameters.extend(sparse::plan_heads(&sparse::heads(spec, &chosen)?));
        Ok(MethodPlan { parameters, notes: Vec::new() })
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        if self.options.over == Over::Lora {
            let changes = self.lora().attach(weights, parameters, seed)?;
            for id in factor_ids(parameters) {
                let parameter = parameters.get_mut(id);
                // Decay would move what is masked.
                parameter.decays = false;
                parameter.counts_ages = true;
            }
            return Ok(changes);
        }
        sparse::refuse_blocks(weights, "id3")?;
        let spec = weights.spec().clone();
        let chosen = self.chosen(&spec)?;
        let mut changes = Changes::default();
        for weight in &chosen {
            let (none, nothing) = (Vec::new(), Vec::new());
            let id =
                sparse::attach(weight, none, nothing, Meaning::Value, parameters, &mut changes);
            parameters.get_mut(id).counts_ages = true;
            parameters.add_tap(id, self.scoring());
        }
        let heads = sparse::heads(&spec, &chosen)?;
        sparse::attach_heads(&heads, weights, parameters, &mut changes)?;
        Ok(changes)
    }

    fn before_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let quota = self.quota(step.step, step.num_steps);
        if self.options.order == Order::Random {
            return self.unmask_random(step, quota);
        }
        if quota == 0 {
            return Ok(());
        }
        // With several passes the first one names candidates, and all of them decide: it names
        // more than are needed.
        let pool = Pool::new(quota.saturating_mul(16).saturating_add(4096));
        for id in sparse_ids(step.parameters) {
            step.parameters.tap(id).into_iter().for_each(|tap| tap.open_in(&pool));
        }
        Ok(())
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        let quota = self.quota(step.step, step.num_steps);
        if self.options.over == Over::Lora {
            self.unmask_factors(step, quota);
            return Ok(());
        }
        if self.options.order == Order::Random {
            return Ok(());
        }
        self.unmask_weights(step, quota)
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        // A masked entry has had no update, so that its first one is corrected as a first.
        for (name, known) in &self.unmasked {
            let Some(id) = step.parameters.find(name) else { continue };
            if let Some(ages) = step.states[id.index()].ages.as_mut() {
                for (index, age) in ages.iter_mut().enumerate() {
                    if known.binary_search(&(index as u32)).is_err() {
                        *age = 0.0;
                    }
                }
            }
        }
        Ok(())
    }

    fn save_state(&self) -> Value {
        json!(self.unmasked)
    }

    fn load_state(&mut self, state: &Value) -> Result<()> {
        self.unmasked = serde_json::from_value(state.clone()).map_err(|error| Error::Setting {
            setting: "state.json: method".to_owned(),
            what: "cannot be used".to_owned(),
            expected: "the unmasked entries of id3".to_owned(),
            found: error.to_string(),
            help: "the checkpoint is damaged; use the one before".to_owned(),
        })?;
        Ok(())
    }

    fn adapter_config(&self, spec: &ModelSpec) -> Option<Value> {
        Some(sparse::config("ID3", &self.options.write(), spec).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quotas_add_up_to_the_budget_exactly() {
        for (budget, steps) in [(200, 228), (800, 228), (7, 3), (1, 10)] {
            for unmasking in [Unmasking::Linear, Unmasking::Early, Unmasking::AtOnce] {
                let options = Id3Options { budget, unmasking, ..Id3Options::default() };
                let id3 = Id3 { options, ..Id3::default() };
                let all: usize = (1..=steps).map(|step| id3.quota(step, steps)).sum();
                assert_eq!((all, id3.quota(steps + 1, steps)), (budget, 0));
            }
        }
    }

    #[test]
    fn ranks_count_masked_entries_only() {
        // Masked of 0 to 9 are 0, 2, 3, 6, 7, 9.
        assert_eq!(masked_entries(&[1, 4, 5, 8], &[0, 1, 2, 3, 4, 5]), [0, 2, 3, 6, 7, 9]);
        assert_eq!(masked_entries(&[0, 1], &[0, 3]), [2, 5]);
        assert_eq!(masked_entries(&[], &[4]), [4]);
    }

    #[test]
    fn updates_are_half_of_a_fixed_masks() {
        // (T + 1) / 2T of them, for a budget the steps divide.
        let options = Id3Options { budget: 456, ..Id3Options::default() };
        let id3 = Id3 { options, ..Id3::default() };
        let (mut open, mut updates) = (0, 0);
        for step in 1..=228 {
            open += id3.quota(step, 228);
            updates += open;
        }
        assert_eq!(updates * 2, 456 * 229);
    }
}
