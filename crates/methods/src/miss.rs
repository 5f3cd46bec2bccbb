//! MiSS: one trained shard, repeated along the inputs of each chosen weight.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::Choice;
use retune_options::{choice, options};
use serde_json::{Map, Value, json};
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Formula, Slot, Target, View, WeightMethod,
};
use crate::linear_algebra::identity;
use crate::peft_config;
use crate::registry::{self, Plugin};

choice! {
    /// How the shard changes the weight.
    pub enum Variant {
        /// One column per output.
        Balance = "balance",
        /// Blocks of the weight times the shard, plus the shard.
        Bat = "bat",
        /// Few columns, repeated along the outputs.
        Mini = "mini",
    }
}

options! {
    /// Adds one matrix, repeated along the inputs, to each targeted weight.
    pub struct MissOptions("miss") {
        /// Rows of the shard: inputs that share one trained row.
        rank: usize = 64, in 1..=65536;
        /// How the shard changes the weight.
        variant: Variant = Variant::Balance;
        /// Columns of the shard of the variant mini.
        mini_rank: usize = 1, in 1..=65536;
        /// Probability of zeroing an entry of the input of the change while training; none with the
        /// variant bat.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<MissOptions>();

impl WeightMethod for MissOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "miss",
            summary: "Trains one shard per targeted weight that is shared along its inputs.",
            source: "Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024, arXiv 2409.15371",
            usual_learning_rates: (1e-5, 1e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "MISS",
        keys: &[("rank", "r"), ("mini_rank", "mini_r"), ("dropout", "miss_dropout")],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 4",
            "rank = 5",
            "rank = 4\nvariant = \"bat\"",
            "rank = 3\nvariant = \"mini\"\nmini_rank = 2",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, rows) = (self.rank, target.rows);
        Ok(vec![match self.variant {
            Variant::Balance => {
                if rank > target.columns {
                    return Err(checks::above("miss.rank", target, target.columns, rank));
                }
                Slot::zeros("miss_block", [rank, rows])
            }
            Variant::Mini => {
                checks::divides("miss.mini_rank", target, self.mini_rank, rows)?;
                if rank > target.columns {
                    return Err(checks::above("miss.rank", target, target.columns, rank));
                }
                Slot::zeros("miss_block", [rank, self.mini_rank])
            }
            Variant::Bat => {
                checks::divides("miss.rank", target, rank, rows)?;
                checks::divides("miss.rank", target, rank, target.columns)?;
                Slot::zeros("miss_block", [rows / rank, rank, rank])
            }
        }])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let shape = target.shape();
        if self.variant == Variant::Bat {
            return Ok(Built::new(Bat));
        }
        Ok(Built::added(Shard { rank: self.rank, shape, dropout: self.dropout }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        let variant = match self.variant {
            Variant::Balance => json!(true),
            other => json!(other.name()),
        };
        config.insert("init_weights".to_owned(), variant);
    }

    fn read_config(&mut self, config: &Value) -> Result<()> {
        // PEFT keeps the variant under the name of the initialisation.
        self.variant = match config.get("init_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Variant::Balance,
            Some(Value::String(word)) if word == "bat" => Variant::Bat,
            Some(Value::String(word)) if word == "mini" => Variant::Mini,
            Some(_) => return Err(peft_config::unsupported("MISS", "init_weights", config)),
        };
        Ok(())
    }
}

#[derive(Debug)]
struct Shard {
    rank: usize,
    shape: [usize; 2],
    dropout: f64,
}

impl Addition for Shard {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [rows, columns] = self.shape;
        let block = tensors.get::<2>(0);
        let repeats = rows / block.dims()[1];
        // Input i reads row i mod rank of the shard.
        let a = identity(self.rank, &block.device().inner());
        let a = a.repeat_dim(1, columns.div_ceil(self.rank)).narrow(1, 0, columns);
        Delta::LowRank { a, b: block.repeat_dim(1, repeats).transpose(), scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}

#[derive(Debug)]
struct Bat;

impl Formula for Bat {
    fn weight(&self, base: Tensor<2>, tensors: &View<'_>) -> Tensor<2> {
        let [rows, columns] = base.dims();
        let shard = tensors.get::<3>(0);
        let [_, rank, _] = shard.dims();
        let blocks: Tensor<4> = base.clone().reshape([rows / rank, rank, columns / rank, rank]);
        let shard: Tensor<4> = shard.unsqueeze_dim(1);
        let blocks = blocks.swap_dims(1, 2);
        let [_, across, _, _] = blocks.dims();
        let shard = shard.repeat_dim(1, across);
        let added = blocks.matmul(shard.clone()) + shard;
        base + added.swap_dims(1, 2).reshape([rows, columns])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Added;
    use crate::frame::by_hand::{Given, weight};

    #[test]
    fn shards_repeat_along_the_inputs() {
        let shard = Added(Shard { rank: 2, shape: [2, 3], dropout: 0.0 });
        let balance = [Given::Floats(&[2, 2], &[1.0, 2.0, 3.0, 4.0])];
        assert_eq!(weight(&shard, &[0.0; 6], &balance), [1.0, 3.0, 1.0, 2.0, 4.0, 2.0]);
        let mini = [Given::Floats(&[2, 1], &[1.0, 3.0])];
        assert_eq!(weight(&shard, &[0.0; 6], &mini), [1.0, 3.0, 1.0, 1.0, 3.0, 1.0]);
    }

    #[test]
    fn blocks_are_multiplied_by_the_shard() {
        let given = [Given::Floats(&[1, 2, 2], &[1.0, 0.0, 1.0, 1.0])];
        assert_eq!(weight(&Bat, &[1.0, 2.0, 3.0, 4.0], &given), [5.0, 4.0, 11.0, 9.0]);
    }
}
