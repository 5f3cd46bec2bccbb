//! VeRA: shared random projections, scaled per layer by two trained vectors.

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use serde_json::Value;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::torch::TorchGenerator;

options! {
    /// Adds diag(b)·B·diag(d)·A to each targeted weight, with A and B shared and random.
    pub struct VeraOptions("vera") {
        /// Rank of the shared projections.
        rank: usize = 256, in 1..=65536;
        /// Seed of the shared projections.
        seed: u64 = 0;
        /// What the vector between the projections begins as.
        d_initial: f64 = 0.1, in -1e3..=1e3;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<VeraOptions>();

impl WeightMethod for VeraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "vera",
            summary: "Trains two vectors per targeted weight that scale random projections all weights share.",
            source: "Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2023, arXiv 2310.11454",
            usual_learning_rates: (1e-3, 2e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "VERA",
        keys: &[
            ("rank", "r"),
            ("seed", "projection_prng_key"),
            ("d_initial", "d_initial"),
            ("dropout", "vera_dropout"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("save_projection", "true"),
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 8",
            "rank = 5\ndropout = 0.1\nseed = 3\nexclude = [\"down_proj\", \"c_proj\"]",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        Ok(vec![
            Slot::constant("vera_lambda_d", [self.rank], self.d_initial),
            Slot::zeros("vera_lambda_b", [target.rows]),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built::added(Vera { shape: target.shape(), dropout: self.dropout }))
    }

    fn shared(&self, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rows, columns) = checks::widest(context.targets);
        let kept = |slot: Slot| slot.buffer().saved_if(context.is_complete);
        Ok(vec![
            kept(Slot::computed("vera_A", [self.rank, columns])),
            kept(Slot::computed("vera_B", [rows, self.rank])),
        ])
    }

    fn shared_values(&self, context: &Context<'_>, _weights: &Weights) -> Result<Vec<Values>> {
        let (rows, columns) = checks::widest(context.targets);
        let mut generator = TorchGenerator::new(self.seed);
        let a = generator.kaiming(self.rank * columns, columns);
        let b = generator.kaiming(rows * self.rank, self.rank);
        Ok(vec![Values::Floats(a), Values::Floats(b)])
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_projection").and_then(Value::as_bool).unwrap_or(true)
    }
}

#[derive(Debug)]
struct Vera {
    shape: [usize; 2],
    dropout: f64,
}

impl Addition for Vera {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [rows, columns] = self.shape;
        let d = tensors.get::<1>(0).unsqueeze_dim::<2>(1);
        let scale = tensors.get::<1>(1).unsqueeze_dim::<2>(1);
        let a = tensors.shared::<2>(0).narrow(1, 0, columns) * d;
        let b = tensors.shared::<2>(1).narrow(0, 0, rows) * scale;
        Delta::LowRank { a, b, scale: 1.0 }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
