//! The two kinds of change a method makes: to weights at their path, to states at a site.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;
use crate::parameters::{ParameterId, Parameters};
use crate::random::Seed;
use crate::site::Site;
use crate::weights::Weights;
use retune_kernels::Spans;
use retune_kernels::matrix::PackedMatrix;
use tensor::{Tensor, TensorData};

/// Whether a pass learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Parameters are constants and dropout is off.
    Evaluate,
    /// Parameters are tracked; dropout draws from the seed's stream for this pass number.
    Train {
        /// The seed of dropout.
        seed: Seed,
        /// A number no other pass of the run has: step and micro-batch.
        pass: u64,
    },
}

/// What a change may look at while it is applied: its parameters, the mode and randomness.
#[derive(Debug)]
pub struct Scope<'a> {
    parameters: &'a Parameters,
    mode: Mode,
    draws: u64,
}

impl<'a> Scope<'a> {
    /// Makes the scope of one pass.
    pub fn new(parameters: &'a Parameters, mode: Mode) -> Self {
        Self { parameters, mode, draws: 0 }
    }

    /// Returns whether the pass learns.
    pub fn trains(&self) -> bool {
        matches!(self.mode, Mode::Train { .. })
    }

    /// Returns how many random draws were made.
    pub(crate) fn draws(&self) -> u64 {
        self.draws
    }

    /// Goes back to an earlier number of draws.
    pub(crate) fn set_draws(&mut self, draws: u64) {
        self.draws = draws;
    }

    /// Returns the list of parameters.
    pub fn parameters(&self) -> &'a Parameters {
        self.parameters
    }

    /// Returns a parameter in the given shape, tracked if the pass learns.
    ///
    /// # Panics
    /// If `shape` holds another number of values.
    pub fn tensor<const D: usize>(&self, id: ParameterId, shape: [usize; D]) -> Tensor<D> {
        if self.trains() {
            self.parameters.tracked(id, shape)
        } else {
            self.parameters.constant(id, shape)
        }
    }

    /// Zeroes each entry with probability `rate` and scales the rest by `1 / (1 - rate)`.
    ///
    /// Draws are counted per pass, so the same recipe gives the same masks on any machine.
    pub fn dropout<const D: usize>(&mut self, x: Tensor<D>, rate: f64) -> Tensor<D> {
        let Mode::Train { seed, pass } = self.mode else { return x };
        if rate <= 0.0 {
            return x;
        }
        self.draws += 1;
        let mut random = seed.stream("dropout", &[pass, self.draws]);
        let kept = (1.0 / (1.0 - rate)) as f32;
        let shape = x.shape();
        let mask: Vec<f32> = (0..shape.num_elements())
            .map(|_| if random.uniform() < rate { 0.0 } else { kept })
            .collect();
        x.clone() * Tensor::from_data(TensorData::new(mask, shape), self.parameters.device())
    }
}

/// A change of one weight.
///
/// The one required computation is slow and obvious: it is the definition. The fast path is an
/// override, and the conformance suite compares the two.
pub trait WeightChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Computes the changed weight.
    ///
    /// # Shapes
    /// - `base`: `[rows, columns]`, the weight seen as a matrix (a vector is `[n, 1]`)
    /// - returns: the same
    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2>;

    /// Computes `x · changedᵀ + bias` without the changed weight, where there is a faster way.
    ///
    /// # Shapes
    /// - `x`: `[tokens, columns]`
    /// - `bias`: `[rows]`
    /// - returns: `[tokens, rows]`, or nothing where [`WeightChange::materialize`] must do
    fn linear(
        &self,
        _x: &Tensor<2>,
        _base: &Arc<PackedMatrix>,
        _bias: Option<&Tensor<1>>,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Returns whether the base does not matter, so that it need not be read.
    fn replaces_base(&self) -> bool {
        false
    }

    /// Returns whether the change also holds where a tied weight is used a second time.
    fn follows_tie(&self) -> bool {
        true
    }
}

/// What a state change sees beside the state itself.
#[derive(Debug)]
pub struct SiteView<'a> {
    /// Where the change is applied.
    pub site: Site,
    /// What the sub-layer read, at `Output` sites: parallel adapters work on it.
    pub input: Option<&'a Tensor<2>>,
    /// Where documents begin and end.
    pub spans: &'a Spans,
}

/// A change of the states at one site.
pub trait StateChange: Debug + Send + Sync {
    /// Returns the parameters and buffers this change uses.
    fn parameters(&self) -> Vec<ParameterId>;

    /// Computes the changed states.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]`, as the site's table says
    /// - returns: the same
    fn apply(&self, x: Tensor<2>, at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2>;
}

/// All changes in force, by place; several at one place apply in the order they were added.
#[derive(Debug, Default)]
pub struct Changes {
    weights: BTreeMap<String, Vec<Box<dyn WeightChange>>>,
    states: BTreeMap<Site, Vec<Box<dyn StateChange>>>,
}

impl Changes {
    /// Adds a change of the weight `name`.
    pub fn change_weight(&mut self, name: impl Into<String>, change: impl WeightChange + 'static) {
        self.weights.entry(name.into()).or_default().push(Box::new(change));
    }

    /// Adds a change of the states at `site`.
    pub fn change_state(&mut self, site: Site, change: impl StateChange + 'static) {
        self.states.entry(site).or_default().push(Box::new(change));
    }

    /// Returns the changes of a weight.
    pub fn of_weight(&self, name: &str) -> &[Box<dyn WeightChange>] {
        self.weights.get(name).map_or(&[], Vec::as_slice)
    }

    /// Returns the changes of a site.
    pub fn of_site(&self, site: Site) -> &[Box<dyn StateChange>] {
        self.states.get(&site).map_or(&[], Vec::as_slice)
    }

    /// Returns the names of all changed weights, sorted.
    pub fn changed_weights(&self) -> impl Iterator<Item = &str> {
        self.weights.keys().map(String::as_str)
    }

    /// Returns all sites with a change, in the order of the forward pass of a block.
    pub fn changed_sites(&self) -> impl Iterator<Item = Site> {
        self.states.keys().copied()
    }

    /// Returns whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.states.is_empty()
    }

    /// Computes a weight with its changes, as `[first axis, all others]`.
    ///
    /// # Errors
    /// If the base weight cannot be read.
    pub fn materialize(
        &self,
        name: &str,
        weights: &Weights,
        scope: &Scope<'_>,
    ) -> Result<Tensor<2>> {
        let changes = self.of_weight(name);
        // A change that replaces the base makes everything before it irrelevant.
        let first = changes.iter().rposition(|change| change.replaces_base()).unwrap_or(0);
        let base = match changes.get(first) {
            Some(change) if change.replaces_base() => {
                let shape = weights.describe(name)?.matrix();
                Tensor::zeros(shape, weights.device())
            }
            _ => weights.dense(name)?,
        };
        Ok(changes[first..].iter().fold(base, |weight, change| change.materialize(weight, scope)))
    }
}
