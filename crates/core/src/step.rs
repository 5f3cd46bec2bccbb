//! What a method may look at and change between two optimiser steps.

use crate::error::Result;
use crate::parameters::{ParameterId, Parameters};
use crate::random::Seed;
use crate::spec::{Head, ModelSpec};
use crate::weights::Weights;

/// Gradients of all parameters, in their order; nothing where none arrived.
pub type FlatGradients = Vec<Option<Vec<f32>>>;

/// What an optimiser remembers of one parameter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParameterState {
    /// Lists as long as the parameter, in the order of the optimiser's names.
    pub lists: Vec<Vec<f32>>,
    /// How many updates each element has had, where elements come and go.
    pub ages: Option<Vec<f32>>,
    /// Steps of the run that were done when the state was made.
    pub since: u64,
}

impl ParameterState {
    /// Makes the state of a parameter nothing has moved yet.
    pub fn fresh(count: usize, num_lists: usize, counts_ages: bool, since: u64) -> Self {
        Self {
            lists: vec![vec![0.0; count]; num_lists],
            ages: counts_ages.then(|| vec![0.0; count]),
            since,
        }
    }

    /// Returns the bytes it holds.
    pub fn bytes(&self) -> usize {
        self.lists.iter().chain(&self.ages).map(|list| size_of_val(list.as_slice())).sum()
    }
}

/// Where an entry of a sparse parameter comes from when its entries change.
#[derive(Debug, Clone, PartialEq)]
pub enum Seat {
    /// It was there: value, gradient, state and age go with it. Holds its place in the old list.
    Kept(usize),
    /// It is new.
    New {
        /// Its first value.
        value: f32,
        /// Its gradient of the step that is under way.
        gradient: f32,
        /// What the optimiser is to remember of it, one number per list.
        state: Vec<f32>,
        /// How many updates that stands for.
        age: f32,
    },
}

impl Seat {
    /// Makes a new entry the optimiser knows nothing of.
    pub fn fresh(value: f32, gradient: f32) -> Self {
        Self::New { value, gradient, state: Vec::new(), age: 0.0 }
    }
}

/// What a method may ask of the optimiser.
pub trait Memory: std::fmt::Debug {
    /// Returns how many lists the optimiser keeps per parameter.
    fn num_lists(&self) -> usize;

    /// Returns what it would remember of an element after `age` updates with this mean gradient
    /// and mean squared gradient, one number per list.
    fn seeded(&self, mean: f32, mean_square: f32, age: f32) -> Vec<f32>;

    /// Returns the share of a value that decays per unit of learning rate.
    fn weight_decay(&self) -> f64;
}

/// What a method sees of a step, before and after the parameters move.
#[derive(Debug)]
pub struct StepView<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// The frozen base, where there is one.
    pub weights: Option<&'a Weights>,
    /// Number of this step, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub num_steps: u64,
    /// Loss of this step's batch, before anything moved.
    pub loss: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Factor on the gradients (clipping); 1 until the gradients are what they will be.
    pub gradient_scale: f64,
    /// Everything that trains.
    pub parameters: &'a mut Parameters,
    /// Gradient of the step's mean loss per parameter; empty before the step's pass. After the move
    /// only those of parameters the method moves itself are left.
    pub gradients: &'a mut FlatGradients,
    /// Gradients of the distance to the base's predictions, where the method asked for them.
    pub reference_gradients: &'a [Option<Vec<f32>>],
    /// What the optimiser remembers, per parameter.
    pub states: &'a mut [ParameterState],
    /// The optimiser.
    pub optimizer: &'a dyn Memory,
    /// The run's seed.
    pub seed: Seed,
}

impl StepView<'_> {
    /// Forgets what the optimiser knows of a parameter, as if it had just been made.
    pub fn reset_state(&mut self, id: ParameterId) {
        let parameter = self.parameters.get(id);
        let num_lists = if parameter.trains && !parameter.moved_by_method {
            self.optimizer.num_lists()
        } else {
            0
        };
        let ages = parameter.trains && parameter.counts_ages;
        self.states[id.index()] =
            ParameterState::fresh(parameter.count(), num_lists, ages, self.step);
    }

    /// Lets a parameter train from the next step on, or freezes it and drops its state.
    pub fn set_trains(&mut self, id: ParameterId, trains: bool) {
        if self.parameters.get(id).trains != trains {
            self.parameters.set_trains(id, trains);
            self.reset_state(id);
        }
    }

    /// Gives up a dense parameter and its state.
    pub fn release(&mut self, id: ParameterId) {
        self.parameters.release(id);
        if let Some(gradient) = self.gradients.get_mut(id.index()) {
            *gradient = None;
        }
        self.reset_state(id);
    }

    /// Replaces the entries of a sparse parameter; values, gradient, optimiser state and ages move
    /// with the entries that stay.
    ///
    /// # Errors
    /// If an index lies outside the weight or stands there twice.
    pub fn reseat(&mut self, id: ParameterId, mut seats: Vec<(u32, Seat)>) -> Result<()> {
        seats.sort_unstable_by_key(|(index, _)| *index);
        let place = id.index();
        let values = self.parameters.values(id);
        let gradient = self.gradients.get_mut(place).and_then(Option::take);
        let state = std::mem::take(&mut self.states[place]);
        let pick = |old: Option<&[f32]>, new: &dyn Fn(&Seat) -> f32| -> Vec<f32> {
            let of = |seat: &Seat| match seat {
                Seat::Kept(place) => old.and_then(|old| old.get(*place)).copied().unwrap_or(0.0),
                seat @ Seat::New { .. } => new(seat),
            };
            seats.iter().map(|(_, seat)| of(seat)).collect()
        };
        let new_values = pick(Some(&values), &|seat| match seat {
            Seat::New { value, .. } => *value,
            Seat::Kept(_) => 0.0,
        });
        let new_gradient = pick(gradient.as_deref(), &|seat| match seat {
            Seat::New { gradient, .. } => *gradient,
            Seat::Kept(_) => 0.0,
        });
        let parameter = self.parameters.get(id);
        let keeps_state = parameter.trains && !parameter.moved_by_method;
        let num_lists = if keeps_state { self.optimizer.num_lists() } else { 0 };
        let lists = (0..num_lists)
            .map(|list| {
                pick(state.lists.get(list).map(Vec::as_slice), &|seat| match seat {
                    Seat::New { state, .. } => state.get(list).copied().unwrap_or(0.0),
                    Seat::Kept(_) => 0.0,
                })
            })
            .collect();
        let ages = (parameter.trains && parameter.counts_ages).then(|| {
            pick(state.ages.as_deref(), &|seat| match seat {
                Seat::New { age, .. } => *age,
                Seat::Kept(_) => 0.0,
            })
        });
        let has_gradient = gradient.is_some() || new_gradient.iter().any(|g| *g != 0.0);
        if let Some(gradient) = self.gradients.get_mut(place).filter(|_| has_gradient) {
            *gradient = Some(new_gradient);
        }
        self.states[place] = ParameterState { lists, ages, since: state.since };
        let indices = seats.into_iter().map(|(index, _)| index).collect();
        self.parameters.set_entries(id, indices, new_values)
    }
}

/// The parts of a [`StepView`] where there is no training loop: tests of single methods.
#[derive(Debug)]
pub struct StepParts {
    /// The model; without weights at first.
    pub spec: ModelSpec,
    /// One place per parameter.
    pub gradients: FlatGradients,
    /// One place per parameter.
    pub reference_gradients: FlatGradients,
    /// One per parameter, empty at first.
    pub states: Vec<ParameterState>,
}

impl StepParts {
    /// Makes the parts that fit a list of parameters.
    pub fn new(parameters: &Parameters) -> Self {
        let count = parameters.iter().count();
        let spec = ModelSpec {
            architecture: String::new(),
            class: String::new(),
            num_layers: 0,
            width: 0,
            inner_width: 0,
            num_heads: 0,
            num_key_heads: 0,
            head_width: 0,
            vocabulary: 0,
            max_positions: 0,
            causal: true,
            towers: Vec::new(),
            weights: Vec::new(),
            head: Head::Embedding,
            config: serde_json::Value::Null,
        };
        Self {
            spec,
            gradients: vec![None; count],
            reference_gradients: vec![None; count],
            states: vec![ParameterState::default(); count],
        }
    }

    /// Makes the view of step `step` at a learning rate and a loss of 1.
    pub fn view<'a>(
        &'a mut self,
        step: u64,
        num_steps: u64,
        parameters: &'a mut Parameters,
    ) -> StepView<'a> {
        StepView {
            spec: &self.spec,
            weights: None,
            step,
            num_steps,
            loss: 1.0,
            learning_rate: 1.0,
            gradient_scale: 1.0,
            parameters,
            gradients: &mut self.gradients,
            reference_gradients: &self.reference_gradients,
            states: &mut self.states,
            optimizer: &Forgetful,
            seed: Seed(0),
        }
    }
}

/// An optimiser that remembers nothing.
#[derive(Debug)]
struct Forgetful;

impl Memory for Forgetful {
    fn num_lists(&self) -> usize {
        0
    }

    fn seeded(&self, _mean: f32, _mean_square: f32, _age: f32) -> Vec<f32> {
        Vec::new()
    }

    fn weight_decay(&self) -> f64 {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::Device;

    #[derive(Debug)]
    struct Two;

    impl Memory for Two {
        fn num_lists(&self) -> usize {
            2
        }

        fn seeded(&self, mean: f32, mean_square: f32, _age: f32) -> Vec<f32> {
            vec![mean, mean_square]
        }

        fn weight_decay(&self) -> f64 {
            0.0
        }
    }

    #[test]
    fn entries_that_stay_take_everything_with_them() {
        let mut parameters = Parameters::new(&Device::flex());
        let id = parameters.add_sparse("s", [2, 3], vec![1, 4], vec![0.5, -0.5]);
        parameters.get_mut(id).counts_ages = true;
        let mut parts = StepParts::new(&parameters);
        parts.gradients = vec![Some(vec![7.0, 8.0])];
        parts.states = vec![ParameterState {
            lists: vec![vec![1.0, 2.0], vec![3.0, 4.0]],
            ages: Some(vec![5.0, 6.0]),
            since: 0,
        }];
        let mut view = StepView { optimizer: &Two, ..parts.view(3, 9, &mut parameters) };
        let new = Seat::New { value: 9.0, gradient: 0.25, state: vec![10.0, 11.0], age: 2.0 };
        view.reseat(id, vec![(4, Seat::Kept(1)), (0, new), (5, Seat::fresh(0.0, 1.0))]).unwrap();
        assert_eq!(*view.parameters.indices(id), [0, 4, 5]);
        assert_eq!(view.parameters.values(id), [9.0, -0.5, 0.0]);
        assert_eq!(view.gradients[0], Some(vec![0.25, 8.0, 1.0]));
        let expected = ParameterState {
            lists: vec![vec![10.0, 2.0, 0.0], vec![11.0, 4.0, 0.0]],
            ages: Some(vec![2.0, 6.0, 0.0]),
            since: 0,
        };
        assert_eq!(view.states[0], expected);
        assert_eq!(view.states[0].bytes(), 9 * 4);
        assert!(view.reseat(id, vec![(4, Seat::Kept(1)), (4, Seat::Kept(0))]).is_err());
        view.set_trains(id, false);
        assert_eq!(view.states[0].bytes(), 0);
    }

    #[test]
    fn entries_may_come_before_there_are_gradients() {
        let mut parameters = Parameters::new(&Device::flex());
        let id = parameters.add_sparse("s", [2, 3], vec![1], vec![0.5]);
        let mut parts = StepParts::new(&parameters);
        parts.gradients.clear();
        let mut view = parts.view(1, 9, &mut parameters);
        view.reseat(id, vec![(1, Seat::Kept(0)), (2, Seat::fresh(4.0, 0.0))]).unwrap();
        assert_eq!(*view.parameters.indices(id), [1, 2]);
        assert_eq!(view.parameters.values(id), [0.5, 4.0]);
        assert!(view.gradients.is_empty());
    }
}
