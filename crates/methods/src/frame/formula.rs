//! What a method does to one weight, and the tensors it does it with.

use std::fmt::Debug;
use std::sync::Arc;

use retune_core::change::{Scope, SiteView, StateChange, WeightChange};
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{SparseEntries, linear, linear_frozen, linear_low_rank, linear_sparse};
use retune_core::parameters::ParameterId;
use tensor::Tensor;

use super::Values;
use crate::linear_algebra::scatter;

/// The tensors of one change, as places in the list of parameters.
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub(super) own: Vec<ParameterId>,
    pub(super) shared: Vec<ParameterId>,
}

impl Held {
    /// Returns the tensors as they are in this pass.
    pub fn view<'a>(&'a self, scope: &'a Scope<'_>) -> View<'a> {
        View { held: self, scope }
    }
}

/// The tensors of one change in one pass.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    held: &'a Held,
    scope: &'a Scope<'a>,
}

impl View<'_> {
    fn tensor<const D: usize>(&self, id: ParameterId) -> Tensor<D> {
        let shape = &self.scope.parameters().get(id).shape;
        let shape: [usize; D] = shape
            .as_slice()
            .try_into()
            .unwrap_or_else(|_| unreachable!("a method asks for {D} of dimensions {shape:?}"));
        self.scope.tensor(id, shape)
    }

    /// Returns the weight's own tensor at `place` of `WeightMethod::layout`.
    pub fn get<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.tensor(self.held.own[place])
    }

    /// Returns the tensor all weights share, at `place` of `WeightMethod::shared`.
    pub fn shared<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.tensor(self.held.shared[place])
    }

    /// Returns the tensor at `place` as a constant.
    pub fn frozen<const D: usize>(&self, place: usize) -> Tensor<D> {
        self.get::<D>(place).detach()
    }

    /// Returns the whole numbers at `place` of `WeightMethod::layout`.
    pub fn integers(&self, place: usize) -> &[i32] {
        self.scope.parameters().integers(self.held.own[place])
    }

    /// Returns the whole numbers at `place` of `WeightMethod::shared`.
    pub fn shared_integers(&self, place: usize) -> &[i32] {
        self.scope.parameters().integers(self.held.shared[place])
    }

    /// Returns how many tensors of its own the weight has.
    pub fn len(&self) -> usize {
        self.held.own.len()
    }

    /// Returns whether the weight has no tensor of its own.
    pub fn is_empty(&self) -> bool {
        self.held.own.is_empty()
    }

    /// Returns the pass, for randomness.
    pub fn scope(&self) -> &Scope<'_> {
        self.scope
    }
}

/// What a method does to one weight.
pub trait Formula: Debug + Send + Sync {
    /// Computes the changed weight, `[rows, columns]`: the definition.
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2>;

    /// Computes `x · changedᵀ + bias` without the changed weight, where there is a faster way.
    fn linear(
        &self,
        _x: &Tensor<2>,
        _base: &Arc<PackedMatrix>,
        _bias: Option<&Tensor<1>>,
        _held: &Held,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Computes the same where the base does not matter, without the changed weight.
    fn linear_alone(
        &self,
        _x: &Tensor<2>,
        _bias: Option<&Tensor<1>>,
        _held: &Held,
        _scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        None
    }

    /// Returns whether the base does not matter.
    fn replaces_base(&self) -> bool {
        false
    }

    /// Returns whether the change also holds where a tied weight is used a second time.
    fn follows_tie(&self) -> bool {
        true
    }
}

/// What is added to a weight.
#[expect(clippy::large_enum_variant, reason = "one is made per pass and used up at once")]
#[derive(Debug)]
pub enum Delta {
    /// A matrix `[rows, columns]`.
    Dense(Tensor<2>),
    /// `scale · b · a`.
    LowRank {
        /// `[rank, columns]`.
        a: Tensor<2>,
        /// `[rows, rank]`.
        b: Tensor<2>,
        /// The factor on the product.
        scale: f64,
    },
    /// Numbers at some places.
    Sparse {
        /// One per place.
        values: Tensor<1>,
        /// Places in the matrix seen as one row-major list, in any order.
        places: Vec<i32>,
        /// `[rows, columns]` of the matrix.
        shape: [usize; 2],
    },
}

impl Delta {
    /// Multiplies out.
    pub fn dense(self) -> Tensor<2> {
        match self {
            Self::Dense(delta) => delta,
            Self::LowRank { a, b, scale } => b.matmul(a).mul_scalar(scale),
            Self::Sparse { values, places, shape } => scatter(values, &places, shape),
        }
    }
}

/// A change that adds something which does not depend on the base.
pub trait Addition: Debug + Send + Sync {
    /// Computes what is added.
    fn delta(&self, tensors: &View<'_>) -> Delta;

    /// Returns the probability of zeroing an entry of the added part's input while training.
    fn dropout(&self) -> f64 {
        0.0
    }
}

/// The formula of an [`Addition`].
#[derive(Debug)]
pub struct Added<A>(pub A);

impl<A: Addition> Formula for Added<A> {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        base + self.0.delta(tensors).dense()
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let dropped = scope.trains() && self.0.dropout() > 0.0;
        match self.0.delta(&held.view(scope)) {
            Delta::LowRank { a, b, scale } if !dropped => {
                Some(linear_low_rank(x.clone(), base, bias.cloned(), a, b, scale))
            }
            Delta::LowRank { a, b, scale } => {
                let x_dropped = scope.dropout(x.clone(), self.0.dropout());
                let low = linear(linear(x_dropped, a, None), b, None).mul_scalar(scale);
                Some(linear_frozen(x.clone(), base, bias.cloned()) + low)
            }
            // A file may hold places in any order, or twice; the kernel wants them ascending.
            Delta::Sparse { values, places, .. }
                if !dropped && places.is_sorted_by(|a, b| a < b) =>
            {
                let indices = places.into_iter().map(i32::cast_unsigned).collect();
                let entries = SparseEntries { indices, tap: None };
                Some(linear_sparse(x.clone(), base, bias.cloned(), values, &entries))
            }
            delta @ (Delta::Dense(_) | Delta::Sparse { .. }) if dropped => {
                let x_dropped = scope.dropout(x.clone(), self.0.dropout());
                let added = linear(x_dropped, delta.dense(), None);
                Some(linear_frozen(x.clone(), base, bias.cloned()) + added)
            }
            Delta::Dense(_) | Delta::Sparse { .. } => None,
        }
    }
}

/// What a method made for one target.
#[derive(Debug)]
pub struct Built {
    /// The change of the weight.
    pub weight: Option<Box<dyn Formula>>,
    /// The change of the module's bias, `[rows, 1]`; that of a layer without one, which starts from
    /// zeros, is a change of its output and cannot be merged.
    pub bias: Option<Box<dyn Formula>>,
    /// Values of the slots that are computed, in their order.
    pub computed: Vec<Values>,
}

impl Built {
    /// Changes the weight.
    pub fn new(weight: impl Formula + 'static) -> Self {
        Self { weight: Some(Box::new(weight)), bias: None, computed: Vec::new() }
    }

    /// Adds to the weight.
    pub fn added(addition: impl Addition + 'static) -> Self {
        Self::new(Added(addition))
    }

    /// Gives the computed slots their values.
    #[must_use]
    pub fn computed(self, computed: Vec<Values>) -> Self {
        Self { computed, ..self }
    }

    /// Changes the bias too.
    #[must_use]
    pub fn with_bias(self, bias: impl Formula + 'static) -> Self {
        Self { bias: Some(Box::new(bias)), ..self }
    }
}

/// A formula with its tensors.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) held: Held,
    pub(super) formula: Box<dyn Formula>,
}

impl WeightChange for Attached {
    fn parameters(&self) -> Vec<ParameterId> {
        [self.held.own.as_slice(), &self.held.shared].concat()
    }

    fn materialize(&self, base: Tensor<2>, scope: &Scope<'_>) -> Tensor<2> {
        self.formula.weight(base, &self.held.view(scope))
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        self.formula.linear(x, base, bias, &self.held, scope)
    }

    fn linear_alone(
        &self,
        x: &Tensor<2>,
        bias: Option<&Tensor<1>>,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        self.formula.linear_alone(x, bias, &self.held, scope)
    }

    fn replaces_base(&self) -> bool {
        self.formula.replaces_base()
    }

    fn follows_tie(&self) -> bool {
        self.formula.follows_tie()
    }
}

/// A bias of a layer that has none.
#[derive(Debug)]
pub(super) struct NewBias {
    pub(super) held: Held,
    pub(super) formula: Box<dyn Formula>,
}

impl StateChange for NewBias {
    fn parameters(&self) -> Vec<ParameterId> {
        [self.held.own.as_slice(), &self.held.shared].concat()
    }

    fn apply(&self, x: Tensor<2>, _at: &SiteView<'_>, scope: &mut Scope<'_>) -> Tensor<2> {
        let none = Tensor::zeros([x.dims()[1], 1], scope.parameters().device());
        x + self.formula.weight(none, &self.held.view(scope)).transpose()
    }
}
