//! VB-LoRA: low-rank factors composed of the vectors of one shared bank.

use retune_core::Result;
use retune_core::method::{Card, Promises};
use retune_core::parameters::to_vec;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::options;
use serde_json::{Map, Value, json};
use tensor::{Int, activation};
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds B·A to each targeted weight, both mixed from a bank of vectors all weights share.
    pub struct VbloraOptions("vblora") {
        /// Rank of the change.
        rank: usize = 4, in 1..=65536;
        /// Vectors in the bank.
        num_vectors: usize = 256, in 2..=65536;
        /// Length of a vector; divides both widths of every targeted weight.
        vector_length: usize = 256, in 1..=65536;
        /// Vectors mixed into one.
        topk: usize = 2, in 1..=1024;
        /// Saves only the mixed vectors' places and weights, which cannot be trained further.
        save_only_topk_weights: bool = false;
        /// The bank begins uniform within ± this.
        init_vector_bank_bound: f64 = 0.02, in 0.0..=10.0;
        /// The logits begin normal with this deviation.
        init_logits_std: f64 = 0.1, in 0.0..=10.0;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<VbloraOptions>();

impl WeightMethod for VbloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "vblora",
            summary: "Trains a bank of vectors all weights share, and which of them make up each low-rank change.",
            source: "Li et al., VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, 2024, arXiv 2405.15179",
            usual_learning_rates: (1e-3, 2e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "VBLORA",
        keys: &[
            ("rank", "r"),
            ("num_vectors", "num_vectors"),
            ("vector_length", "vector_length"),
            ("topk", "topk"),
            ("save_only_topk_weights", "save_only_topk_weights"),
            ("init_vector_bank_bound", "init_vector_bank_bound"),
            ("init_logits_std", "init_logits_std"),
            ("dropout", "vblora_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 2\nnum_vectors = 16\nvector_length = 4",
            "rank = 2\nnum_vectors = 6\nvector_length = 8\ntopk = 3",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, length, most) = (self.rank, self.vector_length, self.num_vectors);
        checks::rank("vblora", rank, target)?;
        checks::divides("vblora.vector_length", target, length, target.rows)?;
        checks::divides("vblora.vector_length", target, length, target.columns)?;
        if self.topk > most {
            return Err(checks::above("vblora.topk", target, most, self.topk));
        }
        let mut slots = Vec::new();
        for (name, [first, second]) in [
            ("vblora_logits_A", [rank, target.columns / length]),
            ("vblora_logits_B", [target.rows / length, rank]),
        ] {
            if is_final(context) {
                let dtype = match most {
                    0..=255 => Dtype::U8,
                    256..=32767 => Dtype::I16,
                    _ => Dtype::I32,
                };
                let places = [first, second, self.topk];
                let limits = vec![most as i32];
                slots.push(Slot::integers(format!("{name}_topk_indices"), places, dtype, limits));
                let weights = [first, second, self.topk - 1];
                slots.push(Slot::zeros(format!("{name}_topk_weights"), weights).buffer());
            } else {
                slots.push(Slot::normal(name, [first, second, most], self.init_logits_std));
            }
        }
        Ok(slots)
    }

    fn build(
        &self,
        target: &Target,
        context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let topk = self.topk;
        let vblora = Vblora { topk, is_final: is_final(context), dropout: self.dropout };
        let built = Built::added(vblora);
        if !is_final(context) {
            return Ok(built);
        }
        let count = |rows: usize| Values::Integers(vec![0; self.rank * rows * topk]);
        let tiles = |width: usize| width / self.vector_length;
        Ok(built.computed(vec![count(tiles(target.columns)), count(tiles(target.rows))]))
    }

    fn shared(&self, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let shape = [self.num_vectors, self.vector_length];
        Ok(vec![Slot::uniform("vblora_vector_bank", shape, self.init_vector_bank_bound)])
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        // A new adapter is written with its logits, from which training can go on.
        config.insert("save_only_topk_weights".to_owned(), json!(false));
    }

    fn promises(&self) -> Promises {
        // Which vectors are mixed jumps with the logits.
        Promises { starts_at_base: false, exact_gradients: false, ..Promises::default() }
    }
}

/// Returns whether the file holds the mixed vectors' places and weights instead of logits.
fn is_final(context: &Context<'_>) -> bool {
    let key = |config: &Value| config.get("save_only_topk_weights").and_then(Value::as_bool);
    context.original.and_then(key).unwrap_or(false)
}

#[derive(Debug)]
struct Vblora {
    topk: usize,
    is_final: bool,
    dropout: f64,
}

impl Vblora {
    /// Mixes one vector per tile, `[tiles, rank, length]` or `[rank, tiles, length]`.
    fn mix(&self, which: usize, tensors: &View<'_>) -> Tensor<3> {
        let bank = tensors.shared::<2>(0);
        let [_, length] = bank.dims();
        let device = bank.device().inner();
        let index = |places: Vec<i32>| {
            let count = places.len();
            Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device)
        };
        let (places, weights) = if self.is_final {
            let weights = tensors.get::<3>(2 * which + 1);
            let last = weights.clone().sum_dim(2).neg().add_scalar(1.0);
            let weights = Tensor::cat(vec![weights, last], 2);
            (tensors.integers(2 * which).to_vec(), weights)
        } else {
            let logits = tensors.get::<3>(which);
            let [first, second, _] = logits.dims();
            let places = largest(&logits, self.topk);
            let shape = [first, second, self.topk];
            let at = index(places.clone()).reshape(shape);
            (places, activation::softmax(logits.gather(2, at), 2))
        };
        let [first, second, topk] = weights.dims();
        let vectors: Tensor<4> =
            bank.select(0, index(places)).reshape([first, second, topk, length]);
        (vectors * weights.unsqueeze_dim::<4>(3)).sum_dim(2).reshape([first, second, length])
    }
}

/// Returns the places of the `count` largest numbers of each row, largest first.
fn largest(logits: &Tensor<3>, count: usize) -> Vec<i32> {
    let width = logits.dims()[2];
    let values = to_vec(logits.clone().inner());
    let mut places = Vec::new();
    for row in values.chunks_exact(width) {
        let mut order: Vec<i32> = (0..width as i32).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        places.extend_from_slice(&order[..count]);
    }
    places
}

impl Addition for Vblora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let (a, b) = (self.mix(0, tensors), self.mix(1, tensors));
        let ([rank, tiles, length], [outputs, _, _]) = (a.dims(), b.dims());
        let a = a.reshape([rank, tiles * length]);
        let b = b.swap_dims(1, 2).reshape([outputs * length, rank]);
        Delta::LowRank { a, b, scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
