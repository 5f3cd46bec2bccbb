//! TinyLoRA: a handful of numbers per weight, spread by random matrices over its leading directions.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::Value;

use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::svd::Svd;
use crate::torch::TorchGenerator;

options! {
    /// Adds B·(Σ vᵢ·Pᵢ)·A, with A and B from the singular value decomposition and P random.
    pub struct TinyloraOptions("tinylora") {
        /// Leading directions of each weight.
        rank: usize = 2, in 1..=4096;
        /// Numbers that train per group of weights.
        u: usize = 64, in 1..=65536;
        /// From 0, each weight has numbers of its own, to 1, all weights share them.
        weight_tying: f64 = 0.0, in 0.0..=1.0;
        /// Seed of the random matrices.
        seed: u64 = 42;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<TinyloraOptions>();

impl WeightMethod for TinyloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "tinylora",
            summary: "Trains a handful of numbers that random matrices spread over each weight's leading directions.",
            source: "TinyLoRA, 2026, arXiv 2602.04118",
            usual_learning_rates: (1e-3, 1e-1),
            options: registry::specs::<Self>,
        },
        peft_type: "TINYLORA",
        keys: &[
            ("rank", "r"),
            ("u", "u"),
            ("weight_tying", "weight_tying"),
            ("seed", "projection_seed"),
            ("dropout", "tinylora_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("save_projection", "true"),
            ("init_v_bound", "0.02"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["u = 8", "u = 5\nrank = 3\nweight_tying = 0.6"],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, [rows, columns]) =
            (self.rank.min(target.rows).min(target.columns), target.shape());
        Ok(vec![
            Slot::computed("tinylora_A", [rank, columns]).buffer(),
            Slot::computed("tinylora_B", [rows, rank]).buffer(),
            Slot::computed("tinylora_P", [self.u, rank, rank])
                .buffer()
                .saved_if(context.is_complete),
        ])
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let [rows, columns] = target.shape();
        let rank = self.rank.min(rows).min(columns);
        let svd = Svd::new(&weights.values(&target.name)?, rows, columns);
        let roots: Vec<f32> = svd.s[..rank].iter().map(|s| s.sqrt() as f32).collect();
        let mut a = svd.right(0, rank);
        for (row, root) in a.chunks_exact_mut(columns).zip(&roots) {
            for value in row.iter_mut() {
                *value *= root;
            }
        }
        let mut b = svd.left(0, rank);
        for row in b.chunks_exact_mut(rank) {
            row.iter_mut().zip(&roots).for_each(|(value, root)| *value *= root);
        }
        let mut generator = TorchGenerator::new(self.seed.wrapping_add(target.index as u64));
        let p = generator.normal(self.u * rank * rank, (rank as f64).powf(-0.5));
        let group = self.group(target.index, context.targets.len());
        let computed = vec![Values::Floats(a), Values::Floats(b), Values::Floats(p)];
        Ok(Built::added(Tinylora { group, dropout: self.dropout }).computed(computed))
    }

    fn shared(&self, context: &Context<'_>) -> Result<Vec<Slot>> {
        let count = context.targets.len();
        let groups = (0..count).map(|index| self.group(index, count)).max().map_or(0, |g| g + 1);
        Ok((0..groups).map(|g| Slot::zeros(format!("tinylora_v.{g}"), [self.u])).collect())
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_projection").and_then(Value::as_bool).unwrap_or(true)
    }
}

impl TinyloraOptions {
    /// Returns which numbers the target at `index` of `count` uses.
    fn group(&self, index: usize, count: usize) -> usize {
        // Python rounds halves to the even neighbour.
        let groups = ((count as f64 * (1.0 - self.weight_tying)).round_ties_even() as usize).max(1);
        (index / (count / groups).max(1)).min(groups - 1)
    }
}

#[derive(Debug)]
struct Tinylora {
    group: usize,
    dropout: f64,
}

impl Addition for Tinylora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let p = tensors.get::<3>(2);
        let [count, rank, _] = p.dims();
        let v = tensors.shared::<1>(self.group).unsqueeze_dim::<2>(0);
        let mixed = v.matmul(p.reshape([count, rank * rank])).reshape([rank, rank]);
        Delta::LowRank { a: mixed.matmul(tensors.get(0)), b: tensors.get(1), scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_hand() {
        let groups = |tying: f64| {
            let options = TinyloraOptions { weight_tying: tying, ..TinyloraOptions::default() };
            (0..5).map(|index| options.group(index, 5)).collect::<Vec<_>>()
        };
        assert_eq!(groups(0.0), [0, 1, 2, 3, 4]);
        assert_eq!(groups(0.5), [0, 0, 1, 1, 1]);
        assert_eq!(groups(1.0), [0; 5]);
    }
}
