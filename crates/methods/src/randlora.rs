//! RandLoRA: a full-rank change as a sum of random low-rank bases with trained scales.

use retune_core::Result;
use retune_core::method::{Card, Working};
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
    /// Adds Σ Bᵢ·diag(λᵢ)·A·diag(γᵢ) to each targeted weight, with A and B shared and random.
    pub struct RandloraOptions("randlora") {
        /// Rank of each basis; there are as many as make the sum full-rank.
        rank: usize = 32, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 640.0, in 0.0..=1e6;
        /// Seed of the shared bases.
        seed: u64 = 0;
        /// Makes the entries of the bases -1, 0 and 1, two thirds of them 0.
        sparse: bool = false;
        /// As sparse, with all but 1 of √width entries 0.
        very_sparse: bool = false;
        /// Probability of zeroing an entry of the input of the change while training.
        dropout: f64 = 0.0, in 0.0..=0.99;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<RandloraOptions>();

impl WeightMethod for RandloraOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "randlora",
            summary: "Trains the scales of random low-rank bases whose sum reaches full rank.",
            source: "Albert et al., RandLoRA: Full-rank parameter-efficient fine-tuning of large models, 2025, arXiv 2502.00987",
            usual_learning_rates: (1e-5, 1e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "RANDLORA",
        keys: &[
            ("rank", "r"),
            ("alpha", "randlora_alpha"),
            ("seed", "projection_prng_key"),
            ("sparse", "sparse"),
            ("very_sparse", "very_sparse"),
            ("dropout", "randlora_dropout"),
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
            "rank = 4\nalpha = 8.0",
            "rank = 5\nalpha = 8.0\nsparse = true",
            "rank = 6\nalpha = 8.0\nvery_sparse = true",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let narrow = target.rows.min(target.columns);
        let bases = narrow.div_ceil(self.rank);
        Ok(vec![
            Slot::zeros("randlora_lambda", [self.rank, bases]),
            Slot::constant("randlora_gamma", [bases, narrow], 1.0 / bases.max(narrow) as f64),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built::added(Randlora {
            rank: self.rank,
            shape: target.shape(),
            scale: self.alpha / self.rank as f64,
            dropout: self.dropout,
        }))
    }

    fn working(&self, targets: &[Target]) -> Working {
        let (rows, columns) = checks::widest(targets);
        let inner = rows.min(columns).div_ceil(self.rank) * self.rank;
        // The scaled bases, and the changed weight.
        let bytes = |t: &Target| 4 * (inner * t.rows.min(t.columns) + t.rows * t.columns);
        let bytes: usize = targets.iter().map(bytes).sum();
        Working { bytes: bytes as u64, ..Working::default() }
    }

    fn shared(&self, context: &Context<'_>) -> Result<Vec<Slot>> {
        let (wide, narrow, bases) = self.widths(context);
        let kept = |slot: Slot| slot.buffer().saved_if(context.is_complete);
        Ok(vec![
            kept(Slot::computed("randlora_A", [self.rank, 1, narrow])),
            kept(Slot::computed("randlora_B", [wide, bases, self.rank])),
        ])
    }

    fn shared_values(&self, context: &Context<'_>, _weights: &Weights) -> Result<Vec<Values>> {
        let (wide, narrow, bases) = self.widths(context);
        let rank = self.rank;
        let mut generator = TorchGenerator::new(self.seed);
        if self.sparse || self.very_sparse {
            let sparsity = if self.very_sparse { (narrow as f64).sqrt() } else { 3.0 };
            let mut draw = |count| signs(generator.uniform(count, 0.0, 1.0), sparsity);
            let (a, b) = (draw(rank * narrow), draw(wide * bases * rank));
            return Ok(vec![Values::Floats(standardised(a)), Values::Floats(standardised(b))]);
        }
        // PEFT draws, and divides by the deviation, in half the width.
        let mut draw = |count, fan: usize| {
            let bound = (fan as f64).powf(-0.5);
            let values = generator.uniform(count, -bound, bound);
            let top = bf16(bound as f32);
            // Its range is open at the top: what rounds up to there is the bottom.
            let wrap = |v: f32| if bf16(v) == top { -top } else { bf16(v) };
            values.into_iter().map(wrap).collect::<Vec<f32>>()
        };
        let a = draw(rank * narrow, narrow);
        let mut b = vec![0.0; wide * bases * rank];
        for basis in 0..bases {
            // PEFT draws one basis after the other and lays them side by side.
            for (row, values) in draw(wide * rank, rank).chunks_exact(rank).enumerate() {
                let at = (row * bases + basis) * rank;
                b[at..at + rank].copy_from_slice(values);
            }
        }
        let halved = |values: Vec<f32>| {
            let deviation = bf16(deviation(&values) as f32);
            Values::Floats(values.into_iter().map(|v| bf16(v / deviation)).collect())
        };
        Ok(vec![halved(a), halved(b)])
    }

    fn is_complete(config: &Value) -> bool {
        config.get("save_projection").and_then(Value::as_bool).unwrap_or(true)
    }
}

impl RandloraOptions {
    /// Returns the wide and the narrow side of the shared bases, and how many there are.
    fn widths(&self, context: &Context<'_>) -> (usize, usize, usize) {
        let (rows, columns) = checks::widest(context.targets);
        let narrow = rows.min(columns);
        (rows.max(columns), narrow, narrow.div_ceil(self.rank))
    }
}

/// Turns uniform numbers into -1, 0 and 1, each sign with probability 1 / (2 · sparsity).
fn signs(uniform: Vec<f32>, sparsity: f64) -> Vec<f32> {
    let edge = (1.0 / (2.0 * sparsity)) as f32;
    let sign = |u: f32| {
        if u < edge {
            -1.0
        } else if u > 1.0 - edge {
            1.0
        } else {
            0.0
        }
    };
    uniform.into_iter().map(sign).collect()
}

/// Returns the standard deviation; 1 where the numbers do not differ.
fn deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let squares = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
    let deviation = (squares / (count - 1.0)).sqrt();
    if deviation > 0.0 { deviation } else { 1.0 }
}

/// Divides by the standard deviation.
fn standardised(mut values: Vec<f32>) -> Vec<f32> {
    let deviation = deviation(&values);
    for value in &mut values {
        *value = (f64::from(*value) / deviation) as f32;
    }
    values
}

/// Rounds to the nearest bf16, to even in the middle.
fn bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    f32::from_bits(rounded & 0xffff_0000)
}

#[derive(Debug)]
struct Randlora {
    rank: usize,
    shape: [usize; 2],
    scale: f64,
    dropout: f64,
}

impl Addition for Randlora {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [rows, columns] = self.shape;
        let (narrow, wide) = (rows.min(columns), rows.max(columns));
        let (lambda, gamma) = (tensors.get::<2>(0), tensors.get::<2>(1));
        let bases = gamma.dims()[0];
        let a = tensors.shared::<3>(0).narrow(2, 0, narrow);
        let a = a * lambda.unsqueeze_dim::<3>(2) * gamma.unsqueeze_dim::<3>(0);
        let a = a.reshape([self.rank * bases, narrow]);
        let b = tensors.shared::<3>(1).narrow(0, 0, wide).narrow(1, 0, bases);
        let b = b.reshape([wide, bases * self.rank]);
        if narrow == columns {
            return Delta::LowRank { a, b, scale: self.scale };
        }
        Delta::LowRank { a: b.transpose(), b: a.transpose(), scale: self.scale }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }
}
