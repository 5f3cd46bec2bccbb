//! HRA: each chosen weight is reflected by a chain of Householder matrices.

use std::sync::Arc;

use retune_core::Result;
use retune_core::change::Scope;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{linear, linear_frozen};
use retune_core::method::{Card, Promises};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{self, Built, Context, Facts, Formula, Held, Slot, Target, View, WeightMethod};
use crate::linear_algebra::{identity, inverse};
use crate::registry::{self, Plugin};

options! {
    /// Multiplies the inputs of each targeted weight by ∏(I − 2uᵢuᵢᵀ).
    pub struct HraOptions("hra") {
        /// Number of reflections; an even one begins as the identity.
        rank: usize = 8, in 1..=4096;
        /// Makes the directions orthogonal to each other first (Gram and Schmidt).
        orthogonal: bool = false;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<HraOptions>();

impl WeightMethod for HraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "hra",
            summary: "Trains a chain of Householder reflections of each targeted weight's inputs.",
            source: "Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024, arXiv 2405.17484",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "HRA",
        keys: &[("rank", "r"), ("orthogonal", "apply_GS")],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_weights", "true"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4", "rank = 4\northogonal = true", "rank = 3"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        if self.rank > target.columns {
            return Err(checks::above("hra.rank", target, target.columns, self.rank));
        }
        Ok(vec![Slot::computed("hra_u", [target.columns, self.rank])])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        random: &mut Random,
    ) -> Result<Built> {
        let (columns, rank) = (target.columns, self.rank);
        let mut halves = vec![0.0; columns * (rank / 2)];
        random.fill_uniform(&mut halves, (3.0 / (rank as f64 / 2.0).max(1.0)).sqrt());
        let mut u = vec![0.0; columns * rank];
        for row in 0..columns {
            // Each direction stands twice in a row, so that the pair's reflections cancel.
            for pair in 0..rank / 2 {
                u[row * rank + 2 * pair] = halves[row * (rank / 2) + pair];
                u[row * rank + 2 * pair + 1] = halves[row * (rank / 2) + pair];
            }
        }
        if self.orthogonal {
            random.fill_normal(&mut u, 1.0);
        } else if rank % 2 == 1 {
            let mut last = vec![0.0; columns];
            random.fill_normal(&mut last, 1.0);
            (0..columns).for_each(|row| u[row * rank + rank - 1] = last[row]);
        }
        let values = vec![frame::Values::Floats(u)];
        Ok(Built::new(Hra { orthogonal: self.orthogonal }).computed(values))
    }

    fn promises(&self) -> Promises {
        // Reflections in directions at right angles never cancel.
        let cancels = self.rank.is_multiple_of(2) && !self.orthogonal;
        Promises { starts_at_base: cancels, ..Promises::default() }
    }
}

#[derive(Debug)]
struct Hra {
    orthogonal: bool,
}

impl Hra {
    /// Returns the unit directions, `[columns, 1]` each.
    fn directions(&self, tensors: &View<'_>) -> Vec<Tensor<2>> {
        let u = tensors.get::<2>(0);
        let unit = |v: Tensor<2>| {
            let length = v.clone().powi_scalar(2).sum_dim(0).sqrt();
            v / length
        };
        let mut directions: Vec<Tensor<2>> = Vec::new();
        for column in u.chunk(tensors.get::<2>(0).dims()[1], 1) {
            let own = match (self.orthogonal, directions.is_empty()) {
                (true, false) => directions.iter().fold(column.clone(), |rest, known| {
                    let along = known.clone().transpose().matmul(column.clone());
                    rest - known.clone().matmul(along)
                }),
                _ => column,
            };
            directions.push(unit(own));
        }
        directions
    }

    /// Reflects the columns of `x`, `[any, columns]`, by one direction after the other.
    fn reflect(x: Tensor<2>, directions: impl Iterator<Item = Tensor<2>>) -> Tensor<2> {
        directions.fold(x, |x, u| {
            let along = x.clone().matmul(u.clone());
            x - along.matmul(u.transpose()).mul_scalar(2.0)
        })
    }
}

impl Hra {
    /// Computes [`Hra::reflect`] with two products in all, which keep no reflected copies of `x`.
    ///
    /// The chain is `I − U·T·Uᵀ` with the directions as columns of U, and T the inverse of the strictly
    /// upper triangle of UᵀU with ½ on its diagonal (Schreiber and Van Loan, 1989).
    fn reflect_at_once(x: &Tensor<2>, directions: Vec<Tensor<2>>) -> Tensor<2> {
        let rank = directions.len();
        let units = Tensor::cat(directions, 1);
        let device = units.device();
        let upper = |i: usize| if i % rank > i / rank { 1.0_f32 } else { 0.0 };
        let upper: Vec<f32> = (0..rank * rank).map(upper).collect();
        let upper = Tensor::<2>::from_data(TensorData::new(upper, [rank, rank]), &device);
        let gram = units.clone().transpose().matmul(units.clone());
        let turned = gram * upper + identity(rank, &device).mul_scalar(0.5);
        let turned = inverse(turned.unsqueeze_dim::<3>(0)).squeeze_dim::<2>(0);
        let along = linear(x.clone(), units.clone().transpose(), None);
        x.clone() - linear(along, units.matmul(turned.transpose()), None)
    }
}

impl Formula for Hra {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        Self::reflect(base, self.directions(tensors).into_iter())
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        // x·(W·H₁⋯Hᵣ)ᵀ = (x·Hᵣ⋯H₁)·Wᵀ, since reflections are symmetric.
        let directions = self.directions(&held.view(scope)).into_iter().rev().collect();
        Some(linear_frozen(Self::reflect_at_once(x, directions), base, bias.cloned()))
    }
}
