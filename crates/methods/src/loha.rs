//! LoHa: the Hadamard product of two low-rank products, added to each chosen weight.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::{Card, Working};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds (w1a·w1b) ∘ (w2a·w2b) to each targeted weight.
    pub struct LohaOptions("loha") {
        /// Rank of each of the two products; that of the change reaches its square.
        rank: usize = 8, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 8.0, in 0.0..=1e6;
        /// Ranks of modules that match a regular expression.
        rank_pattern: BTreeMap<String, usize>;
        /// Alphas of modules that match a regular expression.
        alpha_pattern: BTreeMap<String, f64>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<LohaOptions>();

impl LohaOptions {
    fn rank(&self, target: &Target) -> Result<usize> {
        let rank = checks::by_pattern(&self.rank_pattern, target, self.rank, "loha.rank_pattern")?;
        checks::rank("loha", rank, target)
    }
}

impl WeightMethod for LohaOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "loha",
            summary: "Trains the element-wise product of two low-rank changes beside each targeted weight.",
            source: "Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, 2021, arXiv 2108.06098",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "LOHA",
        keys: &[
            ("rank", "r"),
            ("alpha", "alpha"),
            ("rank_pattern", "rank_pattern"),
            ("alpha_pattern", "alpha_pattern"),
        ],
        fixed: &[],
        written: &[
            ("rank_dropout", "0.0"),
            ("module_dropout", "0.0"),
            ("use_effective_conv2d", "false"),
            ("init_weights", "true"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 2",
            "rank = 3\nrank_pattern = { \"v_proj\" = 2 }\nalpha_pattern = { \"v_proj\" = 4.0 }",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let [rows, columns] = target.shape();
        let rank = self.rank(target)?;
        Ok(vec![
            Slot::kaiming("hada_w1_a", [rows, rank]),
            Slot::kaiming("hada_w1_b", [rank, columns]),
            Slot::kaiming("hada_w2_a", [rows, rank]),
            Slot::zeros("hada_w2_b", [rank, columns]),
        ])
    }

    fn working(&self, targets: &[Target]) -> Working {
        // Both products, their product, and the changed weight.
        frame::kept_matrices(4, targets)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let pattern = &self.alpha_pattern;
        let alpha = checks::by_pattern(pattern, target, self.alpha, "loha.alpha_pattern")?;
        Ok(Built::added(Loha { scale: alpha / self.rank(target)? as f64 }))
    }
}

#[derive(Debug)]
struct Loha {
    scale: f64,
}

impl Addition for Loha {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let product = |a: usize| tensors.get::<2>(a).matmul(tensors.get::<2>(a + 1));
        Delta::Dense((product(0) * product(2)).mul_scalar(self.scale))
    }
}
