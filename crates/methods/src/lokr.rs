//! LoKr: a Kronecker product, its larger factor of low rank, added to each chosen weight.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::registry::{self, Plugin};

options! {
    /// Adds kron(w1, w2) to each targeted weight.
    pub struct LokrOptions("lokr") {
        /// Rank of the larger factor.
        rank: usize = 8, in 1..=65536;
        /// The change is scaled by alpha / rank.
        alpha: f64 = 8.0, in 0.0..=1e6;
        /// Makes the smaller factor low-rank too, where that saves something.
        decompose_both: bool = false;
        /// Rows and columns of the smaller factor; -1 takes divisors near the square root.
        decompose_factor: i64 = -1, in -1..=65536;
        /// Ranks of modules that match a regular expression.
        rank_pattern: BTreeMap<String, usize>;
        /// Alphas of modules that match a regular expression.
        alpha_pattern: BTreeMap<String, f64>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<LokrOptions>();

/// Splits a width into two factors, the smaller one first.
///
/// The search of the LyCORIS library: growing divisors as long as their sum shrinks and the first
/// is at most `factor`.
fn factors(width: usize, factor: i64) -> (usize, usize) {
    let factor = usize::try_from(factor).ok().filter(|factor| *factor > 0);
    if let Some(factor) = factor.filter(|factor| width.is_multiple_of(*factor)) {
        return (factor, width / factor);
    }
    let (mut small, mut large) = (1, width);
    let mut sum = small + large;
    while small < large {
        let next = (small + 1..=width).find(|n| width.is_multiple_of(*n)).unwrap_or(width);
        if next + width / next > sum || next > factor.unwrap_or(width) {
            break;
        }
        (small, large) = (next, width / next);
        sum = width + 1;
    }
    (small.min(large), small.max(large))
}

impl LokrOptions {
    /// Returns the rank and the shapes of the two factors.
    fn shapes(&self, target: &Target) -> Result<(usize, [usize; 2], [usize; 2])> {
        let rank = checks::by_pattern(&self.rank_pattern, target, self.rank, "lokr.rank_pattern")?;
        let rank = checks::rank("lokr", rank, target)?;
        let (small_rows, large_rows) = factors(target.rows, self.decompose_factor);
        let (small_columns, large_columns) = factors(target.columns, self.decompose_factor);
        Ok((rank, [small_rows, small_columns], [large_rows, large_columns]))
    }
}

impl WeightMethod for LokrOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "lokr",
            summary: "Trains a Kronecker product beside each targeted weight.",
            source: "Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023, arXiv 2309.14859",
            usual_learning_rates: (1e-4, 5e-3),
            options: registry::specs::<Self>,
        },
        peft_type: "LOKR",
        keys: &[
            ("rank", "r"),
            ("alpha", "alpha"),
            ("decompose_both", "decompose_both"),
            ("decompose_factor", "decompose_factor"),
            ("rank_pattern", "rank_pattern"),
            ("alpha_pattern", "alpha_pattern"),
        ],
        fixed: &[],
        written: &[
            ("rank_dropout", "0.0"),
            ("module_dropout", "0.0"),
            ("rank_dropout_scale", "false"),
            ("use_effective_conv2d", "false"),
            ("init_weights", "true"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "rank = 1",
            "rank = 2\ndecompose_factor = 2",
            "rank = 1\ndecompose_both = true",
        ],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let (rank, small, large) = self.shapes(target)?;
        let mut slots = Vec::new();
        if self.decompose_both && 2 * rank < small[0].max(small[1]) {
            slots.push(Slot::zeros("lokr_w1_a", [small[0], rank]));
            slots.push(Slot::kaiming("lokr_w1_b", [rank, small[1]]));
        } else {
            slots.push(Slot::zeros("lokr_w1", small));
        }
        if 2 * rank < large[0].max(large[1]) {
            slots.push(Slot::kaiming("lokr_w2_a", [large[0], rank]));
            slots.push(Slot::kaiming("lokr_w2_b", [rank, large[1]]));
        } else {
            slots.push(Slot::kaiming("lokr_w2", large));
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
        let (rank, small, large) = self.shapes(target)?;
        let pattern = &self.alpha_pattern;
        let alpha = checks::by_pattern(pattern, target, self.alpha, "lokr.alpha_pattern")?;
        let first_is_split = self.decompose_both && 2 * rank < small[0].max(small[1]);
        let second_is_split = 2 * rank < large[0].max(large[1]);
        Ok(Built::added(Lokr { scale: alpha / rank as f64, first_is_split, second_is_split }))
    }
}

#[derive(Debug)]
struct Lokr {
    scale: f64,
    first_is_split: bool,
    second_is_split: bool,
}

impl Addition for Lokr {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let factor = |place: usize, split: bool| {
            let first = tensors.get::<2>(place);
            if split { first.matmul(tensors.get::<2>(place + 1)) } else { first }
        };
        let first = factor(0, self.first_is_split);
        let second = factor(1 + usize::from(self.first_is_split), self.second_is_split);
        Delta::Dense(kronecker(first, second).mul_scalar(self.scale))
    }
}

/// Returns the Kronecker product.
fn kronecker(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let ([rows, columns], [inner_rows, inner_columns]) = (a.dims(), b.dims());
    let a: Tensor<4> = a.reshape([rows, 1, columns, 1]);
    let b: Tensor<4> = b.reshape([1, inner_rows, 1, inner_columns]);
    (a * b).reshape([rows * inner_rows, columns * inner_columns])
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::parameters::to_vec;
    use tensor::Device;

    #[test]
    fn widths_split_as_lycoris_splits_them() {
        assert_eq!(factors(256, -1), (16, 16));
        assert_eq!(factors(128, -1), (8, 16));
        assert_eq!(factors(127, -1), (1, 127));
        assert_eq!(factors(128, 4), (4, 32));
        assert_eq!(factors(90, 4), (3, 30));
        assert_eq!(factors(576, -1), (24, 24));
    }

    #[test]
    fn the_kronecker_product_by_hand() {
        let device = Device::flex();
        let a = Tensor::<2>::from_data([[1.0, 2.0]], &device);
        let b = Tensor::<2>::from_data([[3.0], [4.0]], &device);
        let product = kronecker(a, b);
        assert_eq!(product.dims(), [2, 2]);
        assert_eq!(to_vec(product), [3.0, 6.0, 4.0, 8.0]);
    }
}
