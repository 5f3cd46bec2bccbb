//! Uni-LoRA: all low-rank factors of the model are drawn from one short trained vector.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::method::Promises;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::options;
use serde_json::Value;
use tensor::Int;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::numpy::NumpyGenerator;
use crate::registry::{self, Plugin};

options! {
    /// Adds B·A to each targeted weight, each entry one of a short vector all weights share.
    pub struct UniloraOptions("unilora") {
        /// Rank of each change.
        rank: usize = 4, in 1..=65536;
        /// Length of the vector.
        theta_d_length: usize = 256, in 1..=16777216;
        /// Seed of which entry goes where.
        seed: u64 = 42;
        /// The vector begins uniform within ± this.
        init_theta_d_bound: f64 = 0.02, in 0.0..=10.0;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<UniloraOptions>();

impl WeightMethod for UniloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "unilora",
            summary: "Trains one short vector from which all low-rank factors of the model are made.",
            source: "Li et al., Uni-LoRA: One Vector is All You Need, 2025, arXiv 2506.00799",
            usual_learning_rates: (1e-3, 5e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "UNILORA",
        keys: &[
            ("rank", "r"),
            ("theta_d_length", "theta_d_length"),
            ("seed", "proj_seed"),
            ("init_theta_d_bound", "init_theta_d_bound"),
            ("dropout", "unilora_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("save_indices", "true"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 2\ntheta_d_length = 64",
            "rank = 1\ntheta_d_length = 33\nseed = 5\ndropout = 0.1",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, [rows, columns]) = (checks::rank("unilora", self.rank, target)?, target.shape());
        let limits = vec![i32::try_from(self.theta_d_length).unwrap_or(i32::MAX)];
        let mut slots = Vec::new();
        for (side, shape) in [("A", [rank, columns]), ("B", [rows, rank])] {
            let name = format!("unilora_indices_{side}");
            let places = Slot::integers(name, shape, Dtype::I64, limits.clone());
            slots.push(places.saved_if(context.is_complete));
            let scales = Slot::computed(format!("unilora_scales_{side}"), shape).buffer();
            slots.push(scales.saved_if(context.is_complete));
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
        let (rank, [rows, columns]) = (self.rank, target.shape());
        let count = |targets: &[Target]| -> usize {
            targets.iter().map(|target| rank * (target.rows + target.columns)).sum()
        };
        let total = count(context.targets);
        let order = context.once.get_or_init(|| self.order(total));
        let mut counts = vec![total / self.theta_d_length; self.theta_d_length];
        if !total.is_multiple_of(self.theta_d_length) {
            counts.fill(0);
            for entry in order {
                counts[*entry as usize] += 1;
            }
        }
        let before = count(&context.targets[..target.index]);
        let own = &order[before..before + rank * (rows + columns)];
        let (a, b) = own.split_at(rank * columns);
        let scale = |entry: &i32| (counts[*entry as usize] as f32).sqrt().recip();
        let scales = |places: &[i32]| Values::Floats(places.iter().map(scale).collect());
        let computed =
            vec![Values::Integers(a.to_vec()), scales(a), Values::Integers(b.to_vec()), scales(b)];
        Ok(Built::added(Unilora { dropout: self.dropout }).computed(computed))
    }

    fn shared(&self, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let length = [self.theta_d_length];
        Ok(vec![Slot::uniform("unilora_theta_d", length, self.init_theta_d_bound)])
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_indices").and_then(Value::as_bool).unwrap_or(false)
    }
}

impl UniloraOptions {
    /// Returns which entry of the vector each of `total` entries of the factors is: each equally
    /// often, in random order.
    fn order(&self, total: usize) -> Vec<i32> {
        let mut generator = NumpyGenerator::new(self.seed);
        let length = self.theta_d_length;
        let each = |entry: usize| std::iter::repeat_n(entry as i32, total / length);
        let mut order: Vec<i32> = (0..length).flat_map(each).collect();
        if !total.is_multiple_of(length) {
            let rest = generator.choice(length, total % length);
            order.extend(rest.into_iter().map(|entry| entry as i32));
        }
        generator.shuffle(&mut order);
        order
    }
}

#[derive(Debug)]
struct Unilora {
    dropout: f64,
}

impl Addition for Unilora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let theta = tensors.shared::<1>(0);
        let device = theta.device().inner();
        let factor = |place: usize| {
            let (places, scales) = (tensors.integers(place).to_vec(), tensors.get::<2>(place + 1));
            let count = places.len();
            let index = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
            theta.clone().select(0, index).reshape(scales.dims()) * scales
        };
        Delta::LowRank { a: factor(0), b: factor(2), scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
