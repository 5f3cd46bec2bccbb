//! C3A: a block-circulant change.

use std::collections::BTreeMap;

use retune_core::Result;
use retune_core::method::{Card, Promises};
use retune_core::random::Random;
use retune_core::targets::Among;
use retune_core::weights::Weights;
use retune_options::{choice, options};
use serde_json::{Map, Value, json};
use tensor::Int;
use tensor::{Tensor, TensorData};

use crate::checks;
use crate::frame::{
    self, Addition, Built, Context, Delta, Facts, Slot, Target, View, WeightMethod,
};
use crate::registry::{self, Plugin};

choice! {
    /// What kernels begin as.
    pub enum Init {
        /// Uniform within ±√(6 / (inputs + outputs)); the first step does not start from the base.
        XavierUniform = "xavier_uniform",
        /// Zeros, so that the first step starts from the base.
        Zeros = "zeros",
    }
}

options! {
    /// Adds a matrix of circulant blocks to each targeted weight.
    pub struct C3aOptions("c3a") {
        /// Width of a block; divides both widths of every targeted weight.
        block_size: usize = 256, in 1..=65536;
        /// What the kernels begin as.
        init: Init = Init::XavierUniform;
        /// Block widths of modules that match a regular expression.
        block_size_pattern: BTreeMap<String, usize>;
    }
}

/// The method's line in the registry.
pub const PLUGIN: Plugin = frame::plugin::<C3aOptions>();

impl WeightMethod for C3aOptions {
    const FACTS: Facts = Facts {
        card: Card {
            name: "c3a",
            summary: "Trains one circulant kernel per block of each targeted weight.",
            source: "Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, 2024, arXiv 2407.19342",
            usual_learning_rates: (1e-3, 1e-1),
            options: registry::specs::<Self>,
        },
        peft_type: "C3A",
        keys: &[("block_size", "block_size"), ("block_size_pattern", "block_size_pattern")],
        fixed: &[("bias", "\"none\"")],
        written: &[("layers_to_transform", "null"), ("layers_pattern", "null")],
        among: Among::Linears,
        targets: &["all-linear"],
        examples: &["block_size = 4\ninit = \"zeros\"", "block_size = 8"],
    };

    fn layout(&self, target: &Target, _context: &Context<'_>) -> Result<Vec<Slot>> {
        let [rows, columns] = target.shape();
        let size = self.size(target)?;
        let shape = [rows / size, columns / size, size];
        let bound = match self.init {
            Init::XavierUniform => (6.0 / (rows + columns) as f64).sqrt(),
            Init::Zeros => 0.0,
        };
        Ok(vec![Slot::uniform("c3a_kernel", shape, bound)])
    }

    fn build(
        &self,
        target: &Target,
        _context: &Context<'_>,
        _weights: &Weights,
        _random: &mut Random,
    ) -> Result<Built> {
        Ok(Built::added(C3a { shape: target.shape() }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _targets: &[Target]) {
        let init = match self.init {
            Init::XavierUniform => json!("xavier_uniform"),
            Init::Zeros => json!(true),
        };
        config.insert("init_weights".to_owned(), init);
    }

    fn read_config(&mut self, config: &Value) -> Result<()> {
        if config.get("init_weights") == Some(&Value::Bool(true)) {
            self.init = Init::Zeros;
        }
        Ok(())
    }

    fn promises(&self) -> Promises {
        Promises { starts_at_base: self.init == Init::Zeros, ..Promises::default() }
    }
}

impl C3aOptions {
    fn size(&self, target: &Target) -> Result<usize> {
        let pattern = &self.block_size_pattern;
        let size = checks::by_pattern(pattern, target, self.block_size, "c3a.block_size_pattern")?;
        checks::divides("c3a.block_size", target, size, target.rows)?;
        checks::divides("c3a.block_size", target, size, target.columns)?;
        Ok(size)
    }
}

#[derive(Debug)]
struct C3a {
    shape: [usize; 2],
}

impl Addition for C3a {
    fn delta(&self, tensors: &View<'_>) -> Delta {
        let kernel = tensors.get::<3>(0);
        let blocks = circulant(kernel).reshape(self.shape);
        Delta::Dense(blocks.div_scalar(self.shape[1] as f64))
    }
}

/// Returns the circulant blocks of kernels `[m, n, b]`, as `[m, b, n, b]`: entry (a, q) of a block
/// is the kernel's at (q − a) mod b.
fn circulant(kernel: Tensor<3>) -> Tensor<4> {
    let [m, n, b] = kernel.dims();
    let places: Vec<i32> =
        (0..b).flat_map(|a| (0..b).map(move |q| ((q + b - a) % b) as i32)).collect();
    let device = kernel.device().inner();
    let index = Tensor::<1, Int>::from_data(TensorData::new(places, [b * b]), &device);
    let blocks: Tensor<4> = kernel.select(2, index).reshape([m, n, b, b]);
    blocks.swap_dims(1, 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use retune_core::parameters::to_vec;
    use tensor::Device;

    #[test]
    fn circulant_blocks_by_hand() {
        let kernel = Tensor::<3>::from_data([[[1.0, 2.0, 3.0]]], &Device::flex());
        let expected = [1.0, 2.0, 3.0, 3.0, 1.0, 2.0, 2.0, 3.0, 1.0];
        assert_eq!(to_vec(circulant(kernel)), expected);
    }
}
