//! WaveFT: a few wavelet coefficients of the change at random places.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::Card;
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::options;
use tensor::Tensor;

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::linear_algebra::scatter;
use crate::registry::{self, Plugin};
use crate::torch::TorchGenerator;

options! {
    /// Adds the inverse Haar transform of a sparse matrix of coefficients to each targeted weight.
    pub struct WaveftOptions("waveft") {
        /// Number of coefficients per weight.
        n_frequency: usize = 2592, in 1..=1073741824;
        /// Factor on the transform.
        scaling: f64 = 25.0, in 0.0..=1e6;
        /// Seed of the places.
        seed: u64 = 777;
        /// Transforms the coefficients; else they are entries of the change itself.
        use_idwt: bool = true;
        /// Numbers of coefficients of modules that match a regular expression.
        n_frequency_pattern: BTreeMap<String, usize>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<WaveftOptions>();

impl WeightMethod for WaveftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "waveft",
            summary: "Trains a few coefficients of the change's Haar wavelet transform at random places.",
            source: "Bilican et al., Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, 2025, arXiv 2505.12532",
            usual_learning_rates: (1e-4, 1e-2),
            options: registry::specs::<Self>,
        },
        peft_type: "WAVEFT",
        keys: &[
            ("n_frequency", "n_frequency"),
            ("scaling", "scaling"),
            ("seed", "random_loc_seed"),
            ("use_idwt", "use_idwt"),
            ("n_frequency_pattern", "n_frequency_pattern"),
        ],
        fixed: &[
            ("bias", "\"none\""),
            ("wavelet_family", "\"db1\""),
            ("proportional_parameters", "false"),
        ],
        written: &[
            ("init_weights", "true"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["n_frequency = 20", "n_frequency = 30\nuse_idwt = false"],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let count = self.count(target)?;
        let limits = vec![checks::index_limit("waveft", target)?];
        Ok(vec![
            Slot::zeros("waveft_spectrum", [count]),
            Slot::integers("waveft_indices", [count], Dtype::I32, limits)
                .saved_if(context.is_complete),
        ])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        let mut generator = TorchGenerator::new(self.seed);
        let places = generator.permutation(target.rows * target.columns, self.count(target)?);
        let places = places.into_iter().map(|place| place as i32).collect();
        let wave =
            Waveft { shape: target.shape(), scaling: self.scaling, transforms: self.use_idwt };
        Ok(Built::added(wave).computed(vec![Values::Integers(places)]))
    }
}

impl WaveftOptions {
    fn count(&self, target: &Target) -> Result<usize> {
        checks::num_entries("waveft", &self.n_frequency_pattern, self.n_frequency, target)
    }
}

#[derive(Debug)]
struct Waveft {
    shape: [usize; 2],
    scaling: f64,
    transforms: bool,
}

impl Addition for Waveft {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [rows, columns] = self.shape;
        let (spectrum, places) = (tensors.get::<1>(0), tensors.integers(1));
        if !self.transforms {
            let dense = scatter(spectrum, places, self.shape);
            return Delta::Dense(dense.mul_scalar(self.scaling));
        }
        // Odd sides are padded by one, which is cut off again.
        let even = [rows.next_multiple_of(2), columns.next_multiple_of(2)];
        let moved: Vec<i32> = places
            .iter()
            .map(|place| (*place as usize / columns * even[1] + *place as usize % columns) as i32)
            .collect();
        let dense = haar(scatter(spectrum, &moved, even)).mul_scalar(self.scaling);
        Delta::Dense(dense.narrow(0, 0, rows).narrow(1, 0, columns))
    }
}

/// Computes the inverse of one level of the two-dimensional Haar transform.
///
/// The quarters of `s` are the averages and the horizontal, vertical and diagonal details.
fn haar(s: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = s.dims();
    let (h, w) = (rows / 2, columns / 2);
    let quarter = |row: usize, column: usize| s.clone().narrow(0, row, h).narrow(1, column, w);
    let (average, x, y, z) = (quarter(0, 0), quarter(0, w), quarter(h, 0), quarter(h, w));
    let (sum, difference) = (average.clone() + x.clone(), average - x);
    let (up, down) = (y.clone() + z.clone(), y - z);
    let corners =
        [sum.clone() + up.clone(), sum - up, difference.clone() + down.clone(), difference - down];
    let [a, b, c, d] = corners.map(|corner| corner.mul_scalar(0.5).reshape([h, 1, w, 1]));
    let even: Tensor<4> = Tensor::cat(vec![a, b], 3);
    let odd = Tensor::cat(vec![c, d], 3);
    Tensor::cat(vec![even, odd], 1).reshape([rows, columns])
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::parameters::to_vec;
    use tensor::Device;

    #[test]
    fn one_block_by_hand() {
        let s = Tensor::<2>::from_data([[8.0, 4.0], [2.0, 1.0]], &Device::flex());
        assert_eq!(to_vec(haar(s)), [7.5, 4.5, 2.5, 1.5]);
    }

    #[test]
    fn blocks_stand_beside_each_other() {
        let s =
            Tensor::<2>::from_data([[2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], &Device::flex());
        assert_eq!(to_vec(haar(s)), [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]);
    }
}
