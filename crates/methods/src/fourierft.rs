//! FourierFT: a few Fourier coefficients of the change at random places.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::{Card, Promises};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_files::Dtype;
use retune_options::options;
use tensor::Device;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, Values, View, WeightMethod,
};
use crate::registry::{self, Plugin};
use crate::torch::TorchGenerator;

options! {
    /// Adds the real part of the inverse Fourier transform of a sparse spectrum to each targeted weight.
    pub struct FourierftOptions("fourierft") {
        /// Number of coefficients per weight.
        n_frequency: usize = 1000, in 1..=1073741824;
        /// Factor on the transform.
        scaling: f64 = 150.0, in 0.0..=1e6;
        /// Seed of the places.
        seed: u64 = 777;
        /// Numbers of coefficients of modules that match a regular expression.
        n_frequency_pattern: BTreeMap<String, usize>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<FourierftOptions>();

impl WeightMethod for FourierftOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "fourierft",
            summary: "Trains a few coefficients of the change's Fourier transform at random places.",
            source: "Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024, arXiv 2405.03003",
            usual_learning_rates: (1e-3, 1e-1),
            options: registry::specs::<Self>,
        },
        peft_type: "FOURIERFT",
        keys: &[
            ("n_frequency", "n_frequency"),
            ("scaling", "scaling"),
            ("seed", "random_loc_seed"),
            ("n_frequency_pattern", "n_frequency_pattern"),
        ],
        fixed: &[("bias", "\"none\"")],
        written: &[
            ("init_weights", "false"),
            ("fan_in_fan_out", "false"),
            ("exclude_modules", "null"),
            ("layers_to_transform", "null"),
            ("layers_pattern", "null"),
        ],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &[
            "n_frequency = 20\nscaling = 5.0",
            "n_frequency = 60\nscaling = 2.0\nseed = 1\nn_frequency_pattern = { \"v_proj\" = 3 }",
        ],
    };

    fn layout(&self, target: &Target, context: &Context<'_>) -> Result<Vec<Slot>> {
        let count = self.count(target)?;
        let limits = vec![checks::index_limit("fourierft", target)?];
        Ok(vec![
            Slot::normal("fourierft_spectrum", [count], 1.0),
            Slot::integers("fourierft_indices", [count], Dtype::I32, limits)
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
        let fourier = Fourierft { shape: target.shape(), scaling: self.scaling };
        Ok(Built::added(fourier).computed(vec![Values::Integers(places)]))
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: false, ..Promises::default() }
    }
}

impl FourierftOptions {
    fn count(&self, target: &Target) -> Result<usize> {
        checks::num_entries("fourierft", &self.n_frequency_pattern, self.n_frequency, target)
    }
}

#[derive(Debug)]
struct Fourierft {
    shape: [usize; 2],
    scaling: f64,
}

impl Addition for Fourierft {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let [rows, columns] = self.shape;
        let places = tensors.integers(1);
        let spectrum = tensors.get::<1>(0);
        let device = spectrum.device().inner();
        let along = |place: &i32| *place as usize / columns;
        let across = |place: &i32| *place as usize % columns;
        // cos(α + β) = cos α cos β − sin α sin β makes the transform a product of two thin factors.
        let (row_cos, row_sin) = waves(rows, places.iter().map(along), &device);
        let (column_cos, column_sin) = waves(columns, places.iter().map(across), &device);
        let spectrum = spectrum.unsqueeze_dim::<2>(1);
        let b = Tensor::cat(vec![row_cos, row_sin.neg()], 0).transpose();
        let a = Tensor::cat(vec![column_cos * spectrum.clone(), column_sin * spectrum], 0);
        Delta::Dense(b.matmul(a).mul_scalar(self.scaling / (rows * columns) as f64))
    }
}

/// Returns cos and sin of 2π·k·f/width for each frequency f and each k below `width`, one row per
/// frequency.
fn waves(
    width: usize,
    frequencies: impl Iterator<Item = usize>,
    device: &Device,
) -> (Tensor<2>, Tensor<2>) {
    let turn = std::f64::consts::TAU / width as f64;
    let table: Vec<(f64, f64)> = (0..width).map(|k| (k as f64 * turn).sin_cos()).collect();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for frequency in frequencies {
        for k in 0..width {
            let (s, c) = table[k * frequency % width];
            cos.push(c as f32);
            sin.push(s as f32);
        }
    }
    let shape = [cos.len() / width, width];
    let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
    (tensor(cos), tensor(sin))
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::parameters::to_vec;

    #[test]
    fn waves_of_width_four_by_hand() {
        let (cos, sin) = waves(4, [1, 3].into_iter(), &Device::flex());
        let expected_cos = [1.0, 0.0, -1.0, 0.0, 1.0, 0.0, -1.0, 0.0];
        let expected_sin = [0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0];
        for (found, expected) in [(cos, expected_cos), (sin, expected_sin)] {
            for (f, e) in to_vec(found).iter().zip(expected) {
                assert!((f - e).abs() < 1e-6);
            }
        }
    }
}
