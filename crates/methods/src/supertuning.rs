//! Super-Tuning: the largest (or smallest) entries of each chosen weight train.

use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_files::Dtype;
use retune_options::options;
use serde_json::Value;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::linear_algebra::scatter;
use crate::registry::{self, Plugin};

options! {
    /// Adds trained values at the places of the entries of largest magnitude.
    pub struct SupertuningOptions("supertuning") {
        /// Fraction of entries that stay as they are.
        sparsity: f64 = 0.99, in 0.0..=0.9999999;
        /// Takes the entries of largest magnitude, else of smallest.
        select_top: bool = true;
        /// Rank of a low-rank change beside the entries; none without it.
        rank: Option<usize>, in 1..=65536;
        /// The low-rank change is scaled by alpha / rank; alpha is the rank where it is missing.
        alpha: Option<f64>, in 0.0..=1e6;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<SupertuningOptions>();

impl WeightMethod for SupertuningOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "supertuning",
            summary: "Trains the entries of largest magnitude of each targeted weight, with or without a low-rank change.",
            source: "Super-Tuning, 2026, arXiv 2607.09287",
            usual_learning_rates: (1e-5, 2e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "SUPERTUNING",
        keys: &[
            ("sparsity", "sparsity"),
            ("select_top", "select_top"),
            ("rank", "r"),
            ("alpha", "lora_alpha"),
        ],
        fixed: &[],
        written: &[
            ("lora_dropout", "0.0"),
            ("save_precomputed_indices", "true"),
            ("init_weights", "true"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["sparsity = 0.9", "sparsity = 0.9\nselect_top = false\nrank = 2\nalpha = 4.0"],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let count = self.count(target)?;
        let limits = vec![checks::index_limit("supertuning", target)?];
        let mut slots = vec![
            Slot::integers("supertuning_indices", [count], Dtype::I32, limits)
                .saved_if(context.is_complete),
            Slot::zeros("supertuning_values", [count]),
        ];
        if let Some(rank) = self.rank {
            checks::rank("supertuning", rank, target)?;
            slots.push(Slot::kaiming("supertuning_lora_A.weight", [rank, target.columns]));
            slots.push(Slot::zeros("supertuning_lora_B.weight", [target.rows, rank]));
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let values = weights.values(&target.name)?;
        let mut order: Vec<i32> = (0..values.len() as i32).collect();
        let size = |place: &i32| values[*place as usize].abs();
        order.sort_by(|a, b| {
            if self.select_top { size(b).total_cmp(&size(a)) } else { size(a).total_cmp(&size(b)) }
        });
        order.truncate(self.count(target)?);
        let scale = self.rank.map(|rank| self.alpha.unwrap_or(rank as f64) / rank as f64);
        let added = Supertuning { shape: target.shape(), scale };
        Ok(Built::added(added).computed(vec![Values::Integers(order)]))
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_precomputed_indices").and_then(Value::as_bool).unwrap_or(true)
    }
}

impl SupertuningOptions {
    fn count(&self, target: &Target) -> Result<usize> {
        let total = target.rows * target.columns;
        let count = (total as f64 * (1.0 - self.sparsity)) as usize;
        if count > 0 {
            return Ok(count);
        }
        Err(Error::Setting {
            setting: "method.supertuning.sparsity".to_owned(),
            what: format!("no entry of {} trains", target.module),
            expected: format!("at most {}", 1.0 - 1.0 / total as f64),
            found: self.sparsity.to_string(),
            help: "lower `sparsity`, or leave this module out with `exclude`".to_owned(),
        })
    }
}

#[derive(Debug)]
struct Supertuning {
    shape: [usize; 2],
    scale: Option<f64>,
}

impl Addition for Supertuning {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let sparse = scatter(tensors.get(1), tensors.integers(0), self.shape);
        Delta::Dense(match self.scale {
            None => sparse,
            Some(scale) => {
                let product = tensors.get::<2>(3).matmul(tensors.get::<2>(2));
                sparse + product.mul_scalar(scale)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Added;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn by_hand() {
        let given = [
            Given::Integers(&[3, 0]),
            Given::Floats(&[2], &[5.0, 7.0]),
            Given::Floats(&[1, 2], &[1.0, 1.0]),
            Given::Floats(&[2, 1], &[1.0, 0.0]),
        ];
        let sparse = Added(Supertuning { shape: [2, 2], scale: None });
        assert_eq!(weight(&sparse, &[1.0; 4], &given[..2]), [8.0, 1.0, 1.0, 6.0]);
        let both = Added(Supertuning { shape: [2, 2], scale: Some(2.0) });
        assert_eq!(weight(&both, &[1.0; 4], &given), [10.0, 3.0, 1.0, 6.0]);
    }
}
