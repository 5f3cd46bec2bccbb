//! Several methods at once: each keeps its own parameters, hooks and adapter, and acts on what those
//! before it left.
//!
//! What a change means on top of another follows from [`WeightChange::materialize`]: it is given the
//! weight as the changes before it made it. Changes that add commute; one that scales, rotates or
//! replaces acts on the sum. PEFT's mixed models nest layers in the same order.
//!
//! [`WeightChange::materialize`]: retune_core::change::WeightChange::materialize

use std::collections::BTreeMap;

use retune_core::change::Changes;
use retune_core::method::{
    Card, FlatGradients, Method, MethodPlan, POOL, Part, PlannedParameter, Promises, Reference,
    StepView, Working,
};
use retune_core::parameters::{Parameters, name_in_part};
use retune_core::random::Seed;
use retune_core::spec::{Head, ModelSpec, Role};
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::Table;
use serde_json::{Value, json};

use crate::adapter::{Adapter, BaseIdentity};
use crate::difference::Difference;

/// What help and errors say of a stack; each of its methods has a card of its own.
const CARD: Card = Card {
    name: "stack",
    summary: "Trains several methods at once, each on top of those before it.",
    source: "the methods' own",
    usual_learning_rates: (1e-5, 1e-2),
    options: Vec::new,
};

/// Steps of a run that is long enough for every method's stages.
const LONG_RUN: u64 = 1 << 20;

/// Several methods, in the order their changes apply.
#[derive(Debug, Clone)]
pub struct Stack {
    parts: Vec<Part>,
}

/// Makes one method of those a recipe names: a single one is itself.
pub fn stacked(mut parts: Vec<Part>) -> Box<dyn Method> {
    if parts.len() == 1 {
        return parts.remove(0).method;
    }
    Box::new(Stack { parts })
}

/// Returns whether a plan trains the weight at its place whole.
fn is_whole(planned: &PlannedParameter, spec: &ModelSpec) -> bool {
    planned.trains
        && spec.weight(&planned.place).is_some_and(|weight| weight.shape == planned.shape)
}

/// Returns whether a weight belongs to the head of a classifier, which every method trains.
fn is_new_head(name: &str, spec: &ModelSpec) -> bool {
    matches!(spec.head, Head::Classes { .. })
        && spec.weight(name).is_some_and(|weight| {
            let heads = spec.weights.iter().filter(|weight| weight.role == Role::Head);
            heads.map(retune_core::spec::WeightSpec::module).any(|module| module == weight.module())
        })
}

/// Collects what each part of a stack trained as an adapter of its own, in the order in which they
/// apply.
///
/// A part whose result alone would be a whole model is written as the weights it replaces.
///
/// # Errors
/// [`Error::Unsupported`] if a part trains what is neither an adapter nor a weight of the model.
pub fn adapters(
    method: &dyn Method,
    spec: &ModelSpec,
    parameters: &Parameters,
    base: Option<&BaseIdentity>,
) -> Result<Vec<(String, Adapter)>> {
    let mut lists = parameters.clone();
    let parts = method.parts();
    let mut lists: Vec<Parameters> = parts.iter().map(|part| lists.take_part(&part.name)).collect();
    // The head of a classifier is in each adapter, and one part has trained it.
    for place in 0..lists.len() {
        let (earlier, later) = lists.split_at_mut(place + 1);
        let list = &mut earlier[place];
        let ids: Vec<_> = list.iter().map(|(id, p)| (id, p.name.clone(), p.trains)).collect();
        for (id, name, _) in ids.into_iter().filter(|(_, _, trains)| !trains) {
            let trained = later.iter().rev().find_map(|other| {
                let found = other.find(&name).filter(|id| other.get(*id).trains)?;
                Some(other.values(found))
            });
            if let Some(values) = trained.filter(|values| values.len() == list.get(id).count()) {
                list.set(id, values)?;
            }
        }
    }
    let mut adapters = Vec::new();
    for (part, list) in parts.iter().zip(&lists) {
        let adapter = if part.method.adapter_config(spec).is_some() {
            Adapter::collect(part.method.as_ref(), spec, list, base)?
        } else {
            Difference::replacing(&part.name, spec, list, base)?
        };
        adapters.push((part.name.clone(), adapter));
    }
    Ok(adapters)
}

impl Stack {
    fn plans(&self, spec: &ModelSpec) -> Result<Vec<MethodPlan>> {
        let mut plans =
            self.parts.iter().map(|part| part.method.plan(spec)).collect::<Result<Vec<_>>>()?;
        // All would train a classifier's head; the last one does, since its change comes last.
        for place in 0..plans.len() {
            let (earlier, later) = plans.split_at_mut(place + 1);
            for planned in &mut earlier[place].parameters {
                let again = |other: &PlannedParameter| {
                    is_whole(other, spec) && other.place == planned.place
                };
                let is_shared = is_whole(planned, spec)
                    && is_new_head(&planned.place, spec)
                    && later.iter().any(|plan| plan.parameters.iter().any(again));
                planned.trains &= !is_shared;
            }
        }
        self.check(&plans, spec)?;
        Ok(plans)
    }

    fn refuse(&self, what: String, expected: &str, help: String) -> Error {
        let names: Vec<&str> = self.parts.iter().map(|part| part.name.as_str()).collect();
        Error::Setting {
            setting: "method".to_owned(),
            what,
            expected: expected.to_owned(),
            found: names.join(", "),
            help,
        }
    }

    /// Refuses methods that go back or prune half-way.
    fn check_stages(&self, num_steps: u64) -> Result<()> {
        for part in &self.parts {
            let stages = part.method.stages(num_steps)?;
            if stages.len() > 1 {
                return Err(self.refuse(
                    format!(
                        "{} trains in {} stages and goes back or prunes between them, which \
                         another method would not follow",
                        part.name,
                        stages.len()
                    ),
                    "methods that train in one stage",
                    format!(
                        "run `[method.{}]` alone first, then the others with its adapter under \
                         them: `adapters = [\"…/adapter\"]`",
                        part.name
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Refuses methods that fight.
    fn check(&self, plans: &[MethodPlan], spec: &ModelSpec) -> Result<()> {
        self.check_stages(LONG_RUN)?;
        for (above, plan) in plans.iter().enumerate() {
            let name = &self.parts[above].name;
            for (below, other) in plans[..above].iter().enumerate() {
                let other_name = &self.parts[below].name;
                let mut pairs = plan.parameters.iter().flat_map(|planned| {
                    let same = |o: &&PlannedParameter| o.place == planned.place && o.trains;
                    other.parameters.iter().filter(same).map(move |o| (planned, o))
                });
                let is_fight = |(a, b): &(&PlannedParameter, &PlannedParameter)| {
                    a.trains && (is_whole(a, spec) || is_whole(b, spec))
                };
                if let Some((planned, o)) = pairs.find(is_fight) {
                    let whole = if is_whole(planned, spec) { name } else { other_name };
                    let which = if is_whole(planned, spec) && is_whole(o, spec) {
                        "both train it whole".to_owned()
                    } else {
                        format!("{whole} trains it whole")
                    };
                    return Err(self.refuse(
                        format!(
                            "{other_name} and {name} fight over `{}`: {which}",
                            planned.place
                        ),
                        "each weight that is trained whole left to one method",
                        format!(
                            "leave it out of one of them (`targets`, `exclude`, `freeze`, `terms`), \
                             or keep one of `[method.{other_name}]` and `[method.{name}]`"
                        ),
                    ));
                }
                if self.parts[above].method.promises().needs_base
                    && let Some(shared) = shared_weight(plan, other, spec)
                {
                    return Err(self.refuse(
                        format!(
                            "{name} is computed from `{shared}` as the checkpoint has it, but \
                             {other_name} changes it before"
                        ),
                        "no change before it at the same weight",
                        format!(
                            "write `[method.{name}]` before `[method.{other_name}]`, or give them \
                             different targets"
                        ),
                    ));
                }
            }
        }
        let references: Vec<_> =
            self.parts.iter().filter(|part| part.method.reference().is_some()).collect();
        if let [first, second, ..] = references.as_slice()
            && first.method.reference() != second.method.reference()
        {
            return Err(self.refuse(
                format!(
                    "{} and {} compare with the base at different temperatures",
                    first.name, second.name
                ),
                "one temperature",
                "give both the same one".to_owned(),
            ));
        }
        let taken = self.num_positions();
        if taken >= spec.max_positions {
            return Err(self.refuse(
                format!("the virtual tokens take {taken} positions"),
                &format!("at most {} together", spec.max_positions.saturating_sub(1)),
                "lower `num_virtual_tokens` of one of them".to_owned(),
            ));
        }
        Ok(())
    }

    /// Returns the factor on the learning rate of each part: a method whose usual rates lie apart
    /// from the first one's learns at its own.
    fn rate_factors(&self) -> Vec<f64> {
        let rates = |part: &Part| part.method.card().usual_learning_rates;
        let (low, high) = self.parts.first().map_or((1.0, 1.0), rates);
        let factor = |part: &Part| {
            let (own_low, own_high) = rates(part);
            let overlap = own_low <= high && low <= own_high;
            if overlap { 1.0 } else { ((own_low * own_high) / (low * high)).sqrt() }
        };
        self.parts.iter().map(factor).collect()
    }

    /// Lets each method act on its own parameters, gradients and state.
    fn each(
        &mut self,
        step: &mut StepView<'_>,
        hook: impl Fn(&mut dyn Method, &mut StepView<'_>) -> Result<()>,
    ) -> Result<()> {
        for part in &mut self.parts {
            let range = step.parameters.part(&part.name);
            let mut parameters = step.parameters.take_part(&part.name);
            // Before a step there are no gradients yet.
            let has_gradients = step.gradients.len() >= range.end;
            let mut gradients: FlatGradients = if has_gradients {
                step.gradients.drain(range.clone()).collect()
            } else {
                FlatGradients::new()
            };
            let mut view = StepView {
                spec: step.spec,
                weights: step.weights,
                step: step.step,
                num_steps: step.num_steps,
                loss: step.loss,
                learning_rate: step.learning_rate,
                gradient_scale: step.gradient_scale,
                parameters: &mut parameters,
                gradients: &mut gradients,
                reference_gradients: step.reference_gradients.get(range.clone()).unwrap_or(&[]),
                states: &mut step.states[range.clone()],
                optimizer: step.optimizer,
                seed: step.seed,
            };
            let result = hook(part.method.as_mut(), &mut view);
            if has_gradients {
                step.gradients.splice(range.start..range.start, gradients);
            }
            step.parameters.put_part(&part.name, range.start, parameters);
            result?;
        }
        Ok(())
    }
}

/// Returns a weight both plans change.
fn shared_weight<'a>(
    plan: &'a MethodPlan,
    other: &MethodPlan,
    spec: &ModelSpec,
) -> Option<&'a str> {
    let places = plan.parameters.iter().map(|planned| planned.place.as_str());
    places
        .filter(|place| *place != POOL && !is_new_head(place, spec))
        .find(|place| other.parameters.iter().any(|planned| planned.place == *place))
}

impl Method for Stack {
    fn options(&self) -> Table {
        let mut tables = Table::default();
        for part in &self.parts {
            tables.insert(part.name.clone(), part.method.options());
        }
        tables
    }

    fn boxed_clone(&self) -> Box<dyn Method> {
        Box::new(self.clone())
    }

    fn card(&self) -> Card {
        let first = self.parts.first().map(|part| part.method.card());
        Card {
            usual_learning_rates: first
                .map_or(CARD.usual_learning_rates, |card| card.usual_learning_rates),
            ..CARD
        }
    }

    fn promises(&self) -> Promises {
        let mut all = Promises::default();
        for part in &self.parts {
            let own = part.method.promises();
            all.starts_at_base &= own.starts_at_base;
            all.reaches_all &= own.reaches_all;
            all.exact_gradients &= own.exact_gradients;
            all.quantized_base &= own.quantized_base;
            all.needs_base |= own.needs_base;
            all.num_tasks = all.num_tasks.into_iter().chain(own.num_tasks).min();
        }
        all
    }

    fn parts(&self) -> &[Part] {
        &self.parts
    }

    fn plan(&self, spec: &ModelSpec) -> Result<MethodPlan> {
        let mut plan = MethodPlan::default();
        let factors = self.rate_factors();
        for ((part, own), factor) in self.parts.iter().zip(self.plans(spec)?).zip(factors) {
            plan.parameters.extend(own.parameters.into_iter().map(|planned| PlannedParameter {
                name: name_in_part(&part.name, &planned.name),
                ..planned
            }));
            plan.notes.extend(own.notes.into_iter().map(|note| format!("{}: {note}", part.name)));
            if factor != 1.0 {
                plan.notes.push(format!(
                    "{} learns at {factor:.3e} times the run's learning rate, which is {}'s",
                    part.name, self.parts[0].name
                ));
            }
        }
        Ok(plan)
    }

    fn working(&self, spec: &ModelSpec) -> Working {
        self.parts.iter().map(|part| part.method.working(spec)).fold(
            Working::default(),
            |sum, own| Working {
                bytes: sum.bytes + own.bytes,
                values_per_token: sum.values_per_token + own.values_per_token,
            },
        )
    }

    fn attach(
        &self,
        weights: &Weights,
        parameters: &mut Parameters,
        seed: Seed,
    ) -> Result<Changes> {
        let plans = self.plans(weights.spec())?;
        let mut changes = Changes::default();
        for ((part, plan), factor) in self.parts.iter().zip(plans).zip(self.rate_factors()) {
            let mut list = parameters.continued();
            changes.extend(part.method.attach(weights, &mut list, seed)?);
            let ids: Vec<_> = list.iter().map(|(id, p)| (id, p.name.clone())).collect();
            for (id, name) in ids {
                list.get_mut(id).rate_factor *= factor;
                let left = |planned: &PlannedParameter| planned.name == name && !planned.trains;
                if plan.parameters.iter().any(left) {
                    list.set_trains(id, false);
                }
            }
            parameters.append(&part.name, list);
        }
        Ok(changes)
    }

    fn stages(&self, num_steps: u64) -> Result<Vec<u64>> {
        self.check_stages(num_steps)?;
        Ok(vec![num_steps])
    }

    fn reference(&self) -> Option<Reference> {
        self.parts.iter().find_map(|part| part.method.reference())
    }

    fn weighs_rows_alike(&self) -> bool {
        self.parts.iter().any(|part| part.method.weighs_rows_alike())
    }

    fn before_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.each(step, |method, step| method.before_step(step))
    }

    fn on_gradients(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.each(step, |method, step| method.on_gradients(step))
    }

    fn on_step(&mut self, step: &mut StepView<'_>) -> Result<()> {
        self.each(step, |method, step| method.on_step(step))
    }

    fn save_state(&self) -> Value {
        let states = self.parts.iter().map(|p| (p.name.clone(), p.method.save_state()));
        json!(states.collect::<BTreeMap<_, _>>())
    }

    fn load_state(&mut self, state: &Value) -> Result<()> {
        for part in &mut self.parts {
            part.method.load_state(&state[&part.name])?;
        }
        Ok(())
    }

    fn num_positions(&self) -> usize {
        self.parts.iter().map(|part| part.method.num_positions()).sum()
    }

    fn adapter_config(&self, _spec: &ModelSpec) -> Option<Value> {
        // Each part has a file of its own.
        None
    }
}
