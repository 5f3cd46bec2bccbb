//! GraLoRA: a low-rank change per block of each chosen weight.

use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_core::{Error, Result};
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds k × k blocks of low rank to each targeted weight.
    pub struct GraloraOptions("gralora") {
        /// Rank of the change; a multiple of k.
        rank: usize = 32, in 1..=65536;
        /// The change is scaled by alpha / (rank + hybrid_rank).
        alpha: f64 = 64.0, in 0.0..=1e6;
        /// Blocks along each side; divides both widths of every targeted weight.
        k: usize = 2, in 1..=4096;
        /// Rank of an undivided low-rank change beside the blocks.
        hybrid_rank: usize = 0, in 0..=65536;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<GraloraOptions>();

impl WeightMethod for GraloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "gralora",
            summary: "Trains a low-rank change per block of each targeted weight.",
            source: "Jung et al., GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, 2025, arXiv 2505.20355",
            usual_learning_rates: (5e-5, 2e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "GRALORA",
        keys: &[
            ("rank", "r"),
            ("alpha", "alpha"),
            ("k", "gralora_k"),
            ("hybrid_rank", "hybrid_r"),
            ("dropout", "gralora_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["rank = 4", "rank = 4\nhybrid_rank = 2\nk = 4"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (k, rank, [rows, columns]) = (self.k, self.rank, target.shape());
        checks::divides("gralora.k", target, k, rows)?;
        checks::divides("gralora.k", target, k, columns)?;
        checks::rank("gralora", rank.max(self.hybrid_rank), target)?;
        if !rank.is_multiple_of(k) {
            return Err(Error::Setting {
                setting: "method.gralora.rank".to_owned(),
                what: "cannot be divided among the blocks".to_owned(),
                expected: format!("a multiple of k = {k}"),
                found: rank.to_string(),
                help: format!("use rank = {}", rank.next_multiple_of(k)),
            });
        }
        let bound = ((columns / k) as f64).powf(-0.5);
        let mut slots = vec![
            Slot::uniform("gralora_A", [k, columns / k, rank], bound),
            Slot::zeros("gralora_B", [k, rank, rows / k]),
        ];
        if self.hybrid_rank > 0 {
            slots.push(Slot::kaiming("gralora_A_general.weight", [self.hybrid_rank, columns]));
            slots.push(Slot::zeros("gralora_B_general.weight", [rows, self.hybrid_rank]));
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let scale = self.alpha / (self.rank + self.hybrid_rank) as f64;
        Ok(Built::added(Gralora { shape: target.shape(), scale, dropout: self.dropout }))
    }
}

#[derive(Debug)]
struct Gralora {
    shape: [usize; 2],
    scale: f64,
    dropout: f64,
}

impl Addition for Gralora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let (a, b) = (tensors.get::<3>(0), tensors.get::<3>(1));
        let ([k, inputs, rank], [_, _, outputs]) = (a.dims(), b.dims());
        // Input block j and output block i meet in slice i of A[j] and slice j of B[i].
        let a: Tensor<4> = a.reshape([k, inputs, k, rank / k]);
        let a = a.permute([2, 0, 1, 3]);
        let b: Tensor<4> = b.reshape([k, k, rank / k, outputs]);
        let blocks = a.matmul(b).permute([0, 3, 1, 2]).reshape(self.shape);
        let delta = match tensors.len() {
            2 => blocks,
            _ => blocks + tensors.get::<2>(3).matmul(tensors.get::<2>(2)),
        };
        Delta::Dense(delta.mul_scalar(self.scale))
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
        let given = [
            Given::Floats(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]),
            Given::Floats(&[2, 2, 1], &[5.0, 6.0, 7.0, 8.0]),
            Given::Floats(&[1, 2], &[1.0, 0.0]),
            Given::Floats(&[2, 1], &[0.0, 1.0]),
        ];
        let gralora = Added(Gralora { shape: [2, 2], scale: 2.0, dropout: 0.0 });
        // Output block i and input block j: A[j]'s slice i times B[i]'s slice j.
        assert_eq!(weight(&gralora, &[0.0; 4], &given[..2]), [10.0, 36.0, 28.0, 64.0]);
        assert_eq!(weight(&gralora, &[0.0; 4], &given), [10.0, 36.0, 30.0, 64.0]);
    }
}
