//! HiRA: each chosen weight times one plus a low-rank product, entry by entry.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{self, Built, Context, Facts, Formula, Slot, Target, View, WeightMethod};
use crate::registry::{self, Plugin};

options! {
    /// Multiplies each targeted weight by 1 + B·A, entry by entry.
    pub struct HiraOptions("hira") {
        /// Rank of the product.
        rank: usize = 32, in 1..=65536;
        /// Ranks of modules that match a regular expression.
        rank_pattern: BTreeMap<String, usize>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<HiraOptions>();

impl WeightMethod for HiraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "hira",
            summary: "Trains a low-rank product that modulates each targeted weight entry by entry.",
            source: "Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "HIRA",
        keys: &[("rank", "r"), ("rank_pattern", "rank_pattern")],
        fixed: &[],
        written: &[
            ("hira_dropout", "0.0"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4", "rank = 2\nrank_pattern = { \"v_proj\" = 3 }"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let rank = checks::by_pattern(&self.rank_pattern, target, self.rank, "hira.rank_pattern")?;
        checks::rank("hira", rank, target)?;
        Ok(vec![
            Slot::kaiming("hira_A", [rank, target.columns]),
            Slot::zeros("hira_B", [target.rows, rank]),
        ])
    }

    fn build(
        &self,
        _target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built::new(Hira))
    }
}

#[derive(Debug)]
struct Hira;

impl Formula for Hira {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let product = tensors.get::<2>(1).matmul(tensors.get::<2>(0));
        base * product.add_scalar(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn by_hand() {
        let given = [Given::Floats(&[1, 2], &[1.0, 2.0]), Given::Floats(&[2, 1], &[1.0, 3.0])];
        assert_eq!(weight(&Hira, &[1.0, 2.0, 3.0, 4.0], &given), [2.0, 6.0, 12.0, 28.0]);
    }
}
