//! DeLoRA: a low-rank change with normalised directions and a trained length.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds λ/rank · B·diag(1/(‖aᵢ‖·‖bᵢ‖))·A, scaled by the lengths of the base's columns.
    pub struct DeloraOptions("delora") {
        /// Rank of the change.
        rank: usize = 8, in 1..=65536;
        /// What the bound on the change's length begins as.
        lambda: f64 = 15.0, in 0.0..=1e6;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
        /// Ranks of modules that match a regular expression.
        rank_pattern: BTreeMap<String, usize>;
        /// First bounds of modules that match a regular expression.
        lambda_pattern: BTreeMap<String, f64>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<DeloraOptions>();

impl WeightMethod for DeloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "delora",
            summary: "Trains directions and length of a low-rank change apart from each other.",
            source: "Bini et al., Decoupling Angles and Strength in Low-rank Adaptation, 2025, arXiv 2503.18225",
            usual_learning_rates: (1e-3, 5e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "DELORA",
        keys: &[
            ("rank", "r"),
            ("lambda", "delora_lambda"),
            ("dropout", "module_dropout"),
            ("rank_pattern", "rank_pattern"),
            ("lambda_pattern", "lambda_pattern"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_weights", "true"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4", "rank = 2\nlambda = 3.0\ndropout = 0.1"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let [rows, columns] = target.shape();
        let rank =
            checks::by_pattern(&self.rank_pattern, target, self.rank, "delora.rank_pattern")?;
        checks::rank("delora", rank, target)?;
        let pattern = &self.lambda_pattern;
        let lambda = checks::by_pattern(pattern, target, self.lambda, "delora.lambda_pattern")?;
        Ok(vec![
            Slot::kaiming("delora_A", [rank, columns]),
            Slot::zeros("delora_B", [rows, rank]),
            Slot::constant("delora_lambda", [1], lambda),
            Slot::computed("delora_w_norm", [columns]).buffer(),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let mut squares = vec![0.0_f64; target.columns];
        for row in weights.values(&target.name)?.chunks_exact(target.columns) {
            squares.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*w).powi(2));
        }
        let lengths = squares.into_iter().map(|square| square.sqrt() as f32).collect();
        Ok(Built::added(Delora { dropout: self.dropout }).computed(vec![Values::Floats(lengths)]))
    }
}

#[derive(Debug)]
struct Delora {
    dropout: f64,
}

impl Addition for Delora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let (a, b) = (tensors.get::<2>(0), tensors.get::<2>(1));
        let rank = a.dims()[0];
        // The tiny number keeps the slope of the root finite where a direction is still zero.
        let length = |x: Tensor<2>, dim: usize| {
            x.powi_scalar(2).sum_dim(dim).add_scalar(1e-30).sqrt().clamp_min(1e-4)
        };
        let a = a.clone() / length(a, 1);
        let b = b.clone() / length(b, 0);
        let a = a * tensors.get::<1>(3).unsqueeze_dim::<2>(0);
        let b = b * tensors.get::<1>(2).unsqueeze_dim::<2>(0);
        Delta::LowRank { a, b, scale: 1.0 / rank as f64 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Added;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn by_hand() {
        // ‖a‖ = 5, ‖b‖ = 2 and λ = 10 leave b·a itself, before the columns are scaled.
        let given = [
            Given::Floats(&[1, 2], &[3.0, 4.0]),
            Given::Floats(&[2, 1], &[0.0, 2.0]),
            Given::Floats(&[1], &[10.0]),
            Given::Floats(&[2], &[1.0, 2.0]),
        ];
        let found = weight(&Added(Delora { dropout: 0.0 }), &[1.0, 0.0, 0.0, 0.0], &given);
        for (f, e) in found.iter().zip([1.0, 0.0, 6.0, 16.0]) {
            assert!((f - e).abs() < 1e-5, "{found:?}");
        }
    }
}
