//! PVeRA: VeRA with a distribution between its projections.

use std::sync::Arc;

use retune_core::Result;
use retune_core::change::Scope;
use retune_core::kernels::matrix::PackedMatrix;
use retune_core::kernels::{linear, linear_frozen, linear_low_rank};
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::Value;
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Built, Context, Facts, Formula, Held, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::torch::TorchGenerator;

options! {
    /// Adds diag(b)·B·z to each targeted layer, z drawn around diag(d)·A·x while training.
    pub struct PveraOptions("pvera") {
        /// Rank of the shared projections.
        rank: usize = 256, in 1..=32768;
        /// Seed of the shared projections.
        seed: u64 = 0;
        /// What the vectors of means and of log-variances begin as.
        d_initial: f64 = 0.1, in -1e3..=1e3;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<PveraOptions>();

impl WeightMethod for PveraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "pvera",
            summary: "Trains vectors that scale shared random projections to means and variances; runs with the means.",
            source: "Fillioux et al., PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv 2512.07703",
            usual_learning_rates: (1e-3, 2e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "PVERA",
        keys: &[
            ("rank", "r"),
            ("seed", "projection_prng_key"),
            ("d_initial", "d_initial"),
            ("dropout", "pvera_dropout"),
        ],
        fixed: &[("bias", "\"none\""), ("sample_at_inference", "false")],
        written: &[
            ("save_projection", "true"),
            ("generator_seed", "null"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        Ok(vec![
            Slot::constant("pvera_lambda_d", [2 * self.rank], self.d_initial),
            Slot::zeros("pvera_lambda_b", [target.rows]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built::new(Pvera { rank: self.rank, shape: target.shape(), dropout: self.dropout }))
    }

    fn shared(&self, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rows, columns) = checks::widest(context.targets);
        let kept = |slot: Slot| slot.buffer().saved_if(context.is_complete);
        Ok(vec![
            kept(Slot::computed("pvera_A", [2 * self.rank, columns])),
            kept(Slot::computed("pvera_B", [rows, self.rank])),
        ])
    }

    fn shared_values(&self, context: &Context<'_>, _weights: &Weights) -> Result<Vec<Values>> {
        let (rows, columns) = checks::widest(context.targets);
        let mut generator = TorchGenerator::new(self.seed);
        let a = generator.kaiming(2 * self.rank * columns, columns);
        let b = generator.kaiming(rows * self.rank, self.rank);
        Ok(vec![Values::Floats(a), Values::Floats(b)])
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_projection").and_then(Value::as_bool).unwrap_or(true)
    }
}

#[derive(Debug)]
struct Pvera {
    rank: usize,
    shape: [usize; 2],
    dropout: f64,
}

impl Pvera {
    /// Returns the projection to means or log-variances, `[rank, columns]`, and that back.
    fn projections(&self, half: usize, tensors: &View<'_>) -> (Tensor<2>, Tensor<2>) {
        let [rows, columns] = self.shape;
        let d = tensors.get::<1>(0).narrow(0, half * self.rank, self.rank);
        let a = tensors.shared::<2>(0).narrow(1, 0, columns);
        let a = a.narrow(0, half * self.rank, self.rank) * d.unsqueeze_dim::<2>(1);
        let scale = tensors.get::<1>(1).unsqueeze_dim::<2>(1);
        (a, tensors.shared::<2>(1).narrow(0, 0, rows) * scale)
    }
}

impl Formula for Pvera {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let (a, b) = self.projections(0, tensors);
        base + b.matmul(a)
    }

    fn linear(
        &self,
        x: &Tensor<2>,
        base: &Arc<PackedMatrix>,
        bias: Option<&Tensor<1>>,
        held: &Held,
        scope: &mut Scope<'_>,
    ) -> Option<Tensor<2>> {
        let (a, b) = self.projections(0, &held.view(scope));
        if !scope.trains() {
            return Some(linear_low_rank(x.clone(), base, bias.cloned(), a, b, 1.0));
        }
        let (log_variance, _) = self.projections(1, &held.view(scope));
        let dropped = scope.dropout(x.clone(), self.dropout);
        let mean = linear(dropped.clone(), a, None);
        let deviation = linear(dropped, log_variance, None).mul_scalar(0.5).exp();
        let noise = scope.noise(mean.dims());
        let added = linear(mean + deviation * noise, b, None);
        Some(linear_frozen(x.clone(), base, bias.cloned()) + added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn the_means_by_hand() {
        let given = [
            Given::Floats(&[2], &[2.0, 9.0]),
            Given::Floats(&[2], &[1.0, 3.0]),
            Given::Shared(&[2, 2], &[1.0, 2.0, 8.0, 8.0]),
            Given::Shared(&[2, 1], &[1.0, 1.0]),
        ];
        let pvera = Pvera { rank: 1, shape: [2, 2], dropout: 0.0 };
        assert_eq!(weight(&pvera, &[0.0; 4], &given), [2.0, 4.0, 6.0, 12.0]);
    }
}
