//! LoRETTA-rep: a low-rank change whose two factors are trains of small tensors.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::tensor_train::TensorTrain;

options! {
    /// Adds B·A to each targeted weight, with B and A multiplied out of small tensors.
    pub struct LorettaRepOptions("loretta-rep") {
        /// Rank of the change.
        rank: usize = 8, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 16.0, in 0.0..=1e6;
        /// Rank of the tensor trains.
        tensor_rank: usize = 5, in 1..=1024;
        /// Sides of the small tensors, at most, where the weight's sides have such divisors.
        most: usize = 16, in 2..=1024;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<LorettaRepOptions>();

impl WeightMethod for LorettaRepOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "loretta-rep",
            summary: "Trains a low-rank change beside each targeted weight whose factors are trains of small tensors.",
            source: "Yang et al., LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large Language Models, 2024, arXiv 2402.11417",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "LORETTA_REP",
        keys: &[
            ("rank", "r"),
            ("alpha", "lora_alpha"),
            ("tensor_rank", "tensor_rank"),
            ("most", "most"),
            ("dropout", "lora_dropout"),
        ],
        fixed: &[],
        written: &[("exclude_modules", "null"), ("layers_to_transform", "null")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 4\ntensor_rank = 3\nmost = 4",
            "rank = 2\ntensor_rank = 2\ndropout = 0.1\nlayers = [1]",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        checks::rank("loretta-rep", self.rank, target)?;
        let [a, b] = self.trains(target);
        let (last, mut slots) = (b.cores.len() - 1, Vec::new());
        // A's entries deviate as LoRA's do; B is zero because its last core is.
        for (name, train, deviation) in
            [("loretta_A", a, (3.0 * target.columns as f64).powf(-0.5)), ("loretta_B", b, 1.0)]
        {
            let deviation = train.deviation(deviation);
            slots.extend(train.cores.iter().enumerate().map(|(place, shape)| {
                let core = format!("{name}.{place}");
                if name == "loretta_B" && place == last {
                    return Slot::zeros(core, *shape);
                }
                Slot::normal(core, *shape, deviation)
            }));
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
        let scale = self.alpha / self.rank as f64;
        Ok(Built::added(Trains { both: self.trains(target), scale, dropout: self.dropout }))
    }
}

impl LorettaRepOptions {
    /// Returns how A, `[rank, columns]`, and B, `[rows, rank]`, are cut.
    fn trains(&self, target: &Target) -> [TensorTrain; 2] {
        [[self.rank, target.columns], [target.rows, self.rank]]
            .map(|shape| TensorTrain::new(shape, self.tensor_rank, self.most))
    }
}

#[derive(Debug)]
struct Trains {
    both: [TensorTrain; 2],
    scale: f64,
    dropout: f64,
}

impl Addition for Trains {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [a, b] = &self.both;
        let second = a.cores.len();
        Delta::LowRank {
            a: a.matrix(|place| tensors.get(place)),
            b: b.matrix(|place| tensors.get(second + place)),
            scale: self.scale,
        }
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
    fn the_change_by_hand() {
        // Of rank 1: A = (1, 2) ⊗ (3, 5) has the entries 3, 5, 6, 10; B = (1, -1), twice.
        let both = [[1, 4], [2, 1]].map(|shape| TensorTrain::new(shape, 1, 2));
        let change = Added(Trains { both, scale: 2.0, dropout: 0.0 });
        let given = [
            Given::Floats(&[1, 1, 1], &[1.0]),
            Given::Floats(&[1, 2, 1], &[1.0, 2.0]),
            Given::Floats(&[1, 2, 1], &[3.0, 5.0]),
            Given::Floats(&[1, 2, 1], &[1.0, -1.0]),
            Given::Floats(&[1, 1, 1], &[1.0]),
        ];
        let found = weight(&change, &[0.5; 8], &given);
        assert_eq!(found, [6.5, 10.5, 12.5, 20.5, -5.5, -9.5, -11.5, -19.5]);
    }
}
